//! Very small guests, for everything that does not need cloud-init.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use common::{Bulbil, guest_image, is_alive, kill, wait_for};

const SMALL: [&str; 2] = ["--memory", "256MiB"];

fn launch(bulbil: &Bulbil, arguments: &[&str]) -> common::Ran {
    bulbil.run(&[&["launch"], arguments, &SMALL].concat())
}

#[test]
fn guest_file_is_imported_launched_reached_and_removed_in_one_go_each() {
    let bulbil = Bulbil::new();
    let file = guest_image("tiny.qcow2");
    let port = free_port();
    let publish = format!("{port}:22");
    let ran = launch(&bulbil, &[file.to_str().unwrap(), "--name", "one", "--publish", &publish]);
    assert!(ran.stderr.contains("one is ready"), "{}", ran.stderr);
    assert_eq!(bulbil.sh("one", "hostname"), "one");
    assert_eq!(bulbil.run(&["exec", "one", "--", "sh", "-c", "exit 7"]).status, 7);
    // The published port leads to the guest's own ssh server.
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut banner = [0; 4];
    stream.read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-");
    drop(stream);
    // What the boot has read is kept with the image, for the next ones.
    let traces = bulbil.data_dir().join("store/attachments/boot-trace");
    wait_for("the boot trace", || std::fs::read_dir(&traces).ok()?.next()).unwrap();
    let log = bulbil.run(&["logs", "one", "-n", "5"]).ok();
    assert_eq!(log.lines().count(), 5);

    // Bad requests meet a running instance.
    let taken = launch(&bulbil, &["tiny", "--name", "two", "--publish", &publish]);
    assert_eq!(taken.status, 1);
    assert!(taken.stderr.contains(&format!("cannot publish port {port}")), "{}", taken.stderr);
    let same_name = launch(&bulbil, &["tiny", "--name", "one"]);
    assert!(same_name.stderr.contains("exists already") && same_name.stderr.contains("--name"), "{}", same_name.stderr);
    let in_use = bulbil.run(&["image", "rm", "tiny"]);
    assert!(in_use.status == 1 && in_use.stderr.contains("is the base of instance `one`"), "{}", in_use.stderr);
    let running = bulbil.run(&["rm", "one"]);
    assert!(running.status == 1 && running.stderr.contains("--force"), "{}", running.stderr);
    let again = bulbil.run(&["start", "one"]);
    assert!(again.status == 1 && again.stderr.contains("is running, not stopped"), "{}", again.stderr);

    let rebooted = bulbil.run(&["reboot", "one"]);
    assert!(rebooted.stderr.contains("one is ready"), "{}", rebooted.stderr);
    bulbil.run(&["rm", "one", "--force"]).ok();
    assert_eq!(bulbil.run(&["list", "-o", "json"]).json(), serde_json::json!([]));
    bulbil.run(&["image", "rm", "tiny"]).ok();
    let stats = bulbil.run(&["store", "stats", "-o", "json"]).json();
    assert_eq!((stats["packs"].as_u64(), stats["manifests"].as_u64()), (Some(0), Some(0)), "all space is free again");
}

#[test]
fn guest_console_can_be_typed_at() {
    let bulbil = Bulbil::new();
    bulbil.import("tiny.qcow2");
    launch(&bulbil, &["tiny", "--name", "typed"]).ok();
    let mut child = bulbil.command(&["console", "typed"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut keys = child.stdin.take().unwrap();
    bulbil.sh("typed", "echo shown-on-the-console > /dev/console");
    let mut shown = Vec::new();
    let mut out = child.stdout.take().unwrap();
    while !String::from_utf8_lossy(&shown).contains("shown-on-the-console") {
        let mut piece = [0; 256];
        let len = out.read(&mut piece).unwrap();
        assert_ne!(len, 0, "{}", String::from_utf8_lossy(&shown));
        shown.extend_from_slice(&piece[..len]);
    }
    keys.write_all(&[0x1d]).unwrap();
    assert!(child.wait().unwrap().success(), "Ctrl-] leaves");
    assert_eq!(bulbil.show("typed")["state"], "running");
}

#[test]
fn guest_whose_shim_is_killed_is_stopped_with_a_reason_and_starts_again() {
    let bulbil = Bulbil::new();
    bulbil.import("tiny.qcow2");
    launch(&bulbil, &["tiny", "--name", "lone"]).ok();
    bulbil.sh("lone", "echo kept > /root/kept; sync");
    let shown = bulbil.show("lone");
    kill(shown["shim_pid"].as_u64().unwrap(), "-9");
    let vm = shown["vm_pid"].as_u64().unwrap();
    wait_for("the machine to end with its shim", || (!is_alive(vm)).then_some(()));
    let stopped = wait_for("the state to change", || Some(bulbil.show("lone")).filter(|s| s["state"] == "stopped"));
    assert!(stopped["reason"].as_str().unwrap().contains("supervising process"), "{stopped:#}");
    // Also when the daemon was not there to see it.
    bulbil.run(&["start", "lone"]).ok();
    assert_eq!(bulbil.sh("lone", "cat /root/kept"), "kept");
    let shown = bulbil.show("lone");
    bulbil.run(&["shutdown"]).ok();
    kill(shown["shim_pid"].as_u64().unwrap(), "-9");
    wait_for("the machine to end with its shim", || (!is_alive(shown["vm_pid"].as_u64().unwrap())).then_some(()));
    assert_eq!(bulbil.show("lone")["state"], "stopped");
}

#[test]
fn guest_disk_is_the_same_over_vhost_user_and_nbd() {
    let bulbil = Bulbil::new();
    bulbil.import("tiny.qcow2");
    // By itself the better one; this QEMU has it.
    launch(&bulbil, &["tiny", "--name", "two-ways"]).ok();
    assert!(qemu_arguments(&bulbil, "two-ways").contains("vhost-user-blk-pci"));
    let serial = bulbil.sh("two-ways", "cat /sys/block/vda/serial");
    let volume = bulbil.show("two-ways")["volume_id"].as_str().unwrap().replacen('-', "", 1);
    assert_eq!(serial, volume);
    bulbil.sh(
        "two-ways",
        "dd if=/dev/urandom of=/root/data bs=1M count=8 2>/dev/null; md5sum /root/data > /root/sum; sync",
    );
    for (choice, device) in [("nbd", "driver=nbd"), ("vhost-user", "vhost-user-blk-pci")] {
        bulbil.run(&["stop", "two-ways"]).ok();
        // The daemon's environment counts.
        bulbil.run(&["shutdown"]).ok();
        let started = bulbil.command(&["start", "two-ways"]).env("BULBIL_DISK", choice).output().unwrap();
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        assert!(qemu_arguments(&bulbil, "two-ways").contains(device), "{choice}");
        let seen = "cat /sys/block/vda/serial /sys/block/vda/queue/write_cache; md5sum -c /root/sum";
        assert_eq!(bulbil.sh("two-ways", seen), format!("{serial}write back\n/root/data: OK"), "{choice}");
    }
}

fn qemu_arguments(bulbil: &Bulbil, instance: &str) -> String {
    let pid = bulbil.show(instance)["vm_pid"].as_u64().unwrap();
    String::from_utf8(std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap()
}

#[test]
fn guest_that_cannot_boot_has_failed_with_the_line_that_shows_it() {
    let bulbil = Bulbil::new();
    // Boot code that does nothing, and no system behind it.
    let mut disk = vec![0; 4 << 20];
    disk[..2].copy_from_slice(&[0xcd, 0x18]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let file = bulbil.file("empty.raw", &disk);
    let ran = launch(&bulbil, &[&file, "--name", "empty"]);
    assert_eq!(ran.status, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("error: instance `empty` did not come up"), "{}", ran.stderr);
    assert!(ran.stderr.contains("No bootable device"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint: see the whole console: bulbil logs empty"), "{}", ran.stderr);
}

#[test]
fn guest_without_bios_boot_code_is_started_by_uefi() {
    let bulbil = Bulbil::new();
    let mut disk = Vec::new();
    std::fs::File::open(guest_image("tiny.raw")).unwrap().read_to_end(&mut disk).unwrap();
    disk[..440].fill(0);
    let file = bulbil.file("uefi.raw", &disk);
    let ran = launch(&bulbil, &[&file, "--name", "uefi"]);
    assert!(ran.stderr.contains("uefi is ready"), "{}", ran.stderr);
    assert_eq!(bulbil.show("uefi")["boot_mode"], "uefi");
    assert_eq!(bulbil.sh("uefi", "ls -d /sys/firmware/efi"), "/sys/firmware/efi");
}

#[test]
fn guest_on_a_full_host_disk_gets_an_error_and_its_disk_stays_sound() {
    // Mounting a small file system needs root, which CI has.
    let is_root = std::fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t");
    if !is_root {
        assert!(std::env::var_os("CI").is_none(), "in CI this test runs as root");
        println!("skipped: only root can mount a tmpfs");
        return;
    }
    let bulbil = Bulbil::new();
    bulbil.import("tiny.qcow2");
    launch(&bulbil, &["tiny", "--name", "full", "--wait", "none"]).ok();
    bulbil.run(&["stop", "full", "--force"]).ok();
    // The volume moves to a small file system of its own.
    let volume = bulbil.data_dir().join("volumes").join(bulbil.show("full")["volume_id"].as_str().unwrap());
    let small = SmallDisk::over(&volume);
    bulbil.run(&["start", "full"]).ok();
    let filled = bulbil.run(&[
        "exec",
        "full",
        "--",
        "sh",
        "-c",
        "dd if=/dev/urandom of=/root/filler bs=1M count=60; sync; dmesg | grep -c 'I/O error'",
    ]);
    assert!(
        !filled.stdout.trim().is_empty() && filled.stdout.trim() != "0",
        "the guest is told: {} {}",
        filled.stdout,
        filled.stderr
    );
    assert_eq!(bulbil.show("full")["state"], "running");
    bulbil.run(&["stop", "full", "--force"]).ok();
    small.grow();
    bulbil.run(&["start", "full"]).ok();
    assert_eq!(bulbil.sh("full", "hostname"), "full");
    bulbil.run(&["rm", "full", "--force"]);
    drop(small);
}

/// A tmpfs mounted over a directory; needs root, which CI has.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn over(path: &std::path::Path) -> Self {
        let keep = path.with_extension("moved");
        std::fs::rename(path, &keep).unwrap();
        std::fs::create_dir(path).unwrap();
        let mounted = run("mount", &["-t", "tmpfs", "-o", "size=16m", "small", path.to_str().unwrap()]);
        assert!(mounted, "this test mounts a tmpfs: run it as root");
        assert!(run("cp", &["-a", "--sparse=always", &format!("{}/.", keep.display()), path.to_str().unwrap()]));
        Self(path.to_owned())
    }

    fn grow(&self) {
        assert!(run("mount", &["-o", "remount,size=256m", self.0.to_str().unwrap()]));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    std::process::Command::new(program).args(arguments).status().unwrap().success()
}

/// A port nobody listens on now.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
