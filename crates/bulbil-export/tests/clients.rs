//! Real clients: libnbd and its tools, and QEMU's. They must be installed (Debian: `libnbd-bin`,
//! `python3-libnbd`, `qemu-utils`); a missing one fails its test.

#![allow(clippy::unwrap_used, reason = "in tests a failed unwrap is a failed test")]

mod support;

use std::sync::Arc;

use support::*;

const MIB: u64 = 1 << 20;

fn stdout(program: &str, args: &[&str]) -> String {
    String::from_utf8(run(program, args).stdout).unwrap()
}

fn sparse_disk(size_bytes: u64) -> Arc<MemoryDisk> {
    use bulbil_volume::BlockDevice;
    let disk = MemoryDisk::new(size_bytes);
    for block in [0u64, 1, 2, 700, 701, size_bytes / BLOCK - 1] {
        let offset = block * BLOCK;
        let data = pattern(usize::try_from(offset).unwrap(), usize::try_from(BLOCK).unwrap());
        disk.write_at(&data, offset, false).unwrap();
    }
    Arc::new(disk)
}

#[test]
fn nbdinfo_describes_the_export() {
    let served = Served::new(sparse_disk(16 * MIB));
    let text = stdout("nbdinfo", &["--json", &served.uri()]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 16 * MIB);
    assert_eq!(export["description"], "a disk in memory");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for flag in
        ["can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_multi_conn", "can_cache"]
    {
        assert_eq!(export[flag], true, "{flag}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(
        [&export["block_size_minimum"], &export["block_size_preferred"], &export["block_size_maximum"]],
        [&serde_json::json!(1), &serde_json::json!(4096), &serde_json::json!(32 * MIB)]
    );
    let list = stdout("nbdinfo", &["--list", "--json", &served.uri()]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["exports"][0]["export-name"], "disk");
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let served = Served::new(sparse_disk(16 * MIB));
    let map = stdout("nbdinfo", &["--map", "--json", &served.uri()]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let runs: Vec<(u64, u64)> =
        map.iter().map(|run| (run["length"].as_u64().unwrap() / BLOCK, run["type"].as_u64().unwrap())).collect();
    assert_eq!(runs, [(3, 0), (697, 3), (2, 0), (3393, 3), (1, 0)]);
}

#[test]
fn nbdcopy_copies_out_and_in() {
    let disk = sparse_disk(64 * MIB);
    let source = Served::new(disk.clone());
    let file = source.dir.path().join("copy.raw");
    run("nbdcopy", &[&source.uri(), file.to_str().unwrap()]);
    assert!(std::fs::read(&file).unwrap() == disk.bytes());
    let copy = Arc::new(MemoryDisk::new(64 * MIB).patterned());
    let target = Served::new(copy.clone());
    run("nbdcopy", &["--flush", file.to_str().unwrap(), &target.uri()]);
    assert!(copy.durable_bytes() == disk.bytes(), "and flushed");
    let second = Arc::new(MemoryDisk::new(64 * MIB));
    let third = Served::new(second.clone());
    run("nbdcopy", &["--connections=4", &target.uri(), &third.uri()]);
    assert!(second.bytes() == disk.bytes());
}

#[test]
fn qemu_img_inspects_compares_and_converts() {
    let disk = sparse_disk(64 * MIB);
    let served = Served::new(disk.clone());
    let info = stdout("qemu-img", &["info", "--output=json", &served.uri()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 64 * MIB);
    let map = stdout("qemu-img", &["map", "--output=json", &served.uri()]);
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&map).unwrap().len(), 5);
    let qcow2 = served.dir.path().join("copy.qcow2");
    let qcow2 = qcow2.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &served.uri(), qcow2]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", qcow2, &served.uri()]);
    let copy = Arc::new(MemoryDisk::new(64 * MIB).patterned());
    let target = Served::new(copy.clone());
    run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", qcow2, &target.uri()]);
    assert!(copy.bytes() == disk.bytes());
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &served.uri(), &target.uri()]);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let disk = Arc::new(MemoryDisk::new(16 * MIB).patterned());
    let served = Served::new(disk.clone());
    let commands = [
        "write -f -P 0xaa 0 64k",
        "write -P 0xbb 1m 1m",
        "write -z 2m 64k",
        "write -z -u 3m 64k",
        "write -z -f 5000 100",
        "discard 4m 1m",
        "aio_write -P 0xcc 6m 128k",
        "aio_read -P 0xbb 1m 1m",
        "aio_flush",
        "read -P 0xaa 0 4096",
        "read -P 0 5000 100",
        "read -P 0 2m 64k",
        "read -P 0 4m 1m",
        "flush",
    ];
    let mut args = vec!["-f", "raw", "-d", "unmap"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    let uri = served.uri();
    args.push(&uri);
    let output = stdout("qemu-io", &args);
    assert!(!output.contains("fail"), "{output}");
    assert!(disk.is_clean());
    let durable = disk.durable_bytes();
    assert_eq!(durable[..5000], [0xaa; 5000]);
    assert_eq!(durable[6 << 20], 0xcc);
    assert!(disk.forced_writes.load(std::sync::atomic::Ordering::Relaxed) > 0);
}

#[test]
fn qemu_sees_a_read_only_export() {
    let served = Served::new(Arc::new(MemoryDisk::new(MIB).patterned().read_only()));
    let uri = served.uri();
    let refused = output_of("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    assert!(!refused.status.success() || String::from_utf8_lossy(&refused.stderr).contains("read-only"));
    run("qemu-io", &["-r", "-f", "raw", "-c", "read 0 4k", &uri]);
}

/// The first Python that has libnbd's bindings: distributions put them beside their own Python.
fn python() -> &'static str {
    let candidates = ["/usr/bin/python3", "python3"];
    let has_bindings = |python: &&str| {
        std::process::Command::new(python).args(["-c", "import nbd"]).output().is_ok_and(|out| out.status.success())
    };
    candidates.into_iter().find(has_bindings).expect("this test needs python3 with libnbd (python3-libnbd)")
}

#[test]
fn libnbd_in_strict_mode_is_content() {
    let served = Served::new(Arc::new(MemoryDisk::new(64 * MIB)));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/libnbd_check.py");
    let size = (64 * MIB).to_string();
    let output = stdout(python(), &[script, served.socket.to_str().unwrap(), &size]);
    assert_eq!(output.lines().filter(|line| line.starts_with("ok")).count(), 7, "{output}");
    served.wait_until_empty();
}

#[test]
fn a_killed_client_leaves_nothing_behind() {
    let disk = Arc::new(MemoryDisk::new(64 * MIB).patterned());
    let served = Served::new(disk.clone());
    let uri = served.uri();
    for gated in [false, true] {
        if gated {
            disk.slow_from.store(0, std::sync::atomic::Ordering::Relaxed);
            disk.read_gate.close();
        }
        let before = served.server.stats().reads;
        let reads = || served.server.stats().reads;
        let args = ["bench", "-f", "raw", "-c", "10000000", &uri];
        let client = std::process::Command::new("qemu-img").args(args).stdout(std::process::Stdio::null()).spawn();
        let mut client = client.expect("qemu-img is needed by this test");
        // QEMU has at most 16 requests in flight.
        wait_until("the client to be busy", || reads() >= before + 16);
        client.kill().unwrap();
        client.wait().unwrap();
        disk.read_gate.open();
        served.wait_until_empty();
    }
    let mut next = served.client();
    next.enter();
    assert_eq!(next.errno_of(READ, 0, 0, 4096), 0);
}

#[test]
fn qemu_reconnects_to_a_replaced_device_without_an_error() {
    let disk = Arc::new(MemoryDisk::new(64 * MIB).patterned());
    let served = Served::new(disk.clone());
    let node =
        format!("driver=nbd,server.type=unix,server.path={},export=disk,reconnect-delay=30", served.socket.display());
    let args = ["60", "qemu-img", "bench", "-c", "60000", "--image-opts", &node];
    let client = std::process::Command::new("timeout").args(args).stdout(std::process::Stdio::null()).spawn();
    let mut client = client.expect("`timeout` is a part of coreutils");
    for _ in 0..5 {
        let before = served.server.stats().reads;
        wait_until("the client to be busy", || served.server.stats().reads >= before + 1000);
        served.server.replace_device("disk", disk.clone()).unwrap();
    }
    assert!(client.wait().unwrap().success());
    assert_eq!(served.server.stats().connections, 6);
}
