//! The volume of a running guest: snapshots, clones and a new size, by either way that a disk is attached.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::process::Stdio;

use common::{Bulbil, wait_for};

const MARK: &str = "written-before-the-snapshot-4e1f";
const LATER: &str = "written-after-the-snapshot-9c2b";

fn check(attached_by: &str) {
    let bulbil = Bulbil::new();
    // The daemon's environment counts.
    let mut first = bulbil.command(&["image", "list"]);
    assert!(first.env("BULBIL_DISK", attached_by).stdout(Stdio::null()).status().unwrap().success());
    bulbil.import("tiny.qcow2");
    bulbil.run(&["launch", "tiny", "--name", "one", "--memory", "256MiB"]).ok();
    bulbil.sh("one", &format!("echo {MARK} > /root/mark; sync"));
    let snapshot = bulbil.run(&["volume", "snapshot", "one", "--name", "live", "-o", "json"]).json();
    bulbil.sh("one", &format!("echo {LATER} > /root/later; sync"));
    assert_eq!(bulbil.sh("one", "cat /root/mark /root/later"), format!("{MARK}\n{LATER}"));

    let old_bytes = snapshot["size_bytes"].as_u64().unwrap();
    let new_bytes = old_bytes + (64 << 20);
    bulbil.run(&["volume", "resize", "one", &new_bytes.to_string()]).ok();
    wait_for("the guest to see the new size", || {
        (bulbil.sh("one", "cat /sys/block/vda/size") == (new_bytes / 512).to_string()).then_some(())
    });
    // What is behind the old end can be used at once.
    let at = old_bytes >> 20;
    bulbil.sh("one", &format!("echo {LATER} | dd of=/dev/vda bs=1M seek={at} conv=notrunc,fsync 2>/dev/null"));

    bulbil.run(&["volume", "clone", "one", "--name", "later"]).ok();
    bulbil.run(&["volume", "create", "restored", "--snapshot", "live"]).ok();
    let restored = content(&bulbil, "restored");
    assert!(holds(&restored, MARK) && !holds(&restored, LATER));
    let later = content(&bulbil, "later");
    assert!(holds(&later, MARK) && holds(&later, LATER));
    assert!(later[usize::try_from(old_bytes).unwrap()..].starts_with(LATER.as_bytes()));
}

fn holds(disk: &[u8], text: &str) -> bool {
    disk.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Everything in a volume.
fn content(bulbil: &Bulbil, volume: &str) -> Vec<u8> {
    let socket = bulbil.data_dir().join("nbd");
    let address = format!("unix:{}", socket.display());
    let mut served =
        bulbil.command(&["volume", "serve", volume, "--nbd", &address]).stdout(Stdio::null()).spawn().unwrap();
    wait_for("the volume to be served", || socket.exists().then_some(()));
    let out = bulbil.data_dir().join("out.raw");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let copied =
        std::process::Command::new("qemu-img").args(["convert", "-O", "raw", &uri]).arg(&out).status().unwrap();
    common::kill(u64::from(served.id()), "-INT");
    assert!(copied.success() && served.wait().unwrap().success());
    std::fs::read(out).unwrap()
}

#[test]
fn guest_volume_over_vhost_user_is_snapshotted_and_grows_while_it_runs() {
    check("vhost-user");
}

#[test]
fn guest_volume_over_nbd_is_snapshotted_and_grows_while_it_runs() {
    check("nbd");
}
