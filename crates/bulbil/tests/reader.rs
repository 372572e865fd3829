//! Image files are read by a process that can do nothing else, and whose end harms nobody. Needs `qemu-img`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Home, Ran, disks, holds_files, send_signal, wait_until};

const SEED: u64 = 0x5eed_0061;

/// What a file is called that no image may get at.
const CANARY: &str = "canary-7f3a";

/// What the store holds; a killed import may leave a few bytes under a name for ever.
fn store_bytes(home: &Home) -> Value {
    let stats = home.json(&["store", "stats"]);
    json!(["packs", "pack_bytes", "manifests"].map(|field| stats[field].clone()))
}

fn empty_store() -> Value {
    json!([0, 0, 0])
}

/// The processes that read images for the daemon of this home.
fn readers(daemon: u32) -> Vec<u32> {
    let is_reader = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name in parentheses: state, parent.
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok());
        line.split(|byte| *byte == 0).nth(1) == Some(b"image-reader") && parent == Some(daemon)
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_reader).collect()
}

/// An image that takes a while, of a format that has to be parsed all along.
fn noise_as_qcow2(home: &Home, seed: u64) -> String {
    let raw = home.file("disk.raw", disks::noise(seed, 160 << 20));
    let qcow2 = home.text_path("disk.qcow2");
    disks::run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &qcow2]);
    std::fs::remove_file(raw).unwrap();
    qcow2
}

/// Starts an import and stops its reader when the store has been written to, which is far from the end.
fn begin_import(home: &Home, disk: &str) -> (std::process::Child, u32) {
    home.assert_no_images();
    let daemon = home.daemon();
    let client = home.spawn(&["image", "import", disk]);
    wait_until("the reader", || !readers(daemon).is_empty());
    let [reader] = readers(daemon)[..] else { panic!("one process reads the image") };
    wait_until("the first pack", || {
        send_signal(reader, Signal::STOP);
        let begun = holds_files(&home.data().join("store/packs"));
        if !begun {
            send_signal(reader, Signal::CONT);
        }
        begun
    });
    (client, reader)
}

fn is_gone(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[test]
fn everything_an_image_reader_does_not_need_is_refused() {
    let home = Home::new();
    let report = home.ok(&["image-reader", "--self-test"]).json();
    let attempts = report["attempts"].as_array().unwrap();
    let count = |forbidden: bool| attempts.iter().filter(|attempt| attempt["forbidden"] == forbidden).count();
    assert!(count(true) >= 20 && count(false) >= 2, "{report:#}");
    for attempt in attempts {
        assert_eq!(attempt["refused"], attempt["forbidden"], "{attempt}");
    }
    assert_eq!(report["sandbox"]["seccomp"], true);
    let doctor = home.json(&["doctor"]);
    let checks = doctor["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "image sandbox").unwrap();
    assert_eq!(check["ok"], true, "{check}");
    assert!(check["detail"].as_str().unwrap().starts_with("seccomp, "), "{check}");
}

#[test]
fn an_import_whose_reader_is_killed_names_the_signal_and_leaves_nothing() {
    let home = Home::new();
    let disk = noise_as_qcow2(&home, SEED);
    home.assert_no_images();
    let daemon = home.daemon();
    for (signal, name) in [(Signal::KILL, "signal 9 (SIGKILL)"), (Signal::SYS, "signal 31 (SIGSYS")] {
        let (client, reader) = begin_import(&home, &disk);
        send_signal(reader, signal);
        if signal != Signal::KILL {
            send_signal(reader, Signal::CONT);
        }
        let ran = Ran::new("import".to_owned(), client.wait_with_output().unwrap());
        ran.refused(1, &["cannot import `", &format!("the image reader was killed by {name}")]);
        home.assert_no_images();
        assert_eq!(store_bytes(&home), empty_store());
        assert!(is_gone(reader));
    }
    assert_eq!(home.daemon(), daemon, "the daemon goes on");
    home.ok(&["image", "import", &disk]);
}

#[test]
fn a_reader_that_hangs_ends_with_the_client_or_the_daemon() {
    let home = Home::new();
    let disk = noise_as_qcow2(&home, SEED + 1);
    let (mut client, reader) = begin_import(&home, &disk);
    send_signal(client.id(), Signal::INT);
    client.wait().unwrap();
    wait_until("the reader to be gone", || is_gone(reader));
    wait_until("the packs to be gone", || store_bytes(&home) == empty_store());
    home.assert_no_images();

    let (client, reader) = begin_import(&home, &disk);
    home.signal_daemon(Signal::KILL);
    wait_until("the reader to be gone", || is_gone(reader));
    Ran::new("import".to_owned(), client.wait_with_output().unwrap()).refused(1, &["daemon"]);
    home.assert_no_images();
}

#[test]
fn one_content_has_one_digest_however_it_is_packed() {
    let home = Home::new();
    let raw = home.file("disk.raw", disks::content(SEED + 2, 8 << 20));
    let qcow2 = home.text_path("disk.qcow2");
    disks::run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", &raw, &qcow2]);
    let gzip = home.text_path("disk.raw.gz");
    assert!(home.program("gzip").args(["-k", &raw]).status().unwrap().success());
    let digest = home.json(&["image", "import", &raw])["digest"].clone();
    for (number, (file, format)) in [(&qcow2, "qcow2"), (&gzip, "raw")].into_iter().enumerate() {
        let image = home.json(&["image", "import", file, "--as", &format!("copy-{number}")]);
        assert_eq!((&image["digest"], &image["source_format"]), (&digest, &json!(format)), "{file}");
    }
    let files = std::fs::read_dir(home.data()).unwrap().flatten().filter(|entry| entry.path().is_file());
    let names: Vec<_> = files.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(
        names.iter().all(|name| name.starts_with("catalog.db") || name == "store.json"),
        "what is unpacked goes: {names:?}"
    );
}

/// Imports an image that refers to a canary; nothing of the canary may get into the store, or into a message.
#[track_caller]
fn assert_leaves_the_canary(home: &Home, image: &str, code: &str) {
    let before = home.state();
    home.run(&["image", "import", image]).refused(1, &["cannot import `", code]);
    assert_eq!(home.state(), before, "{code}");
}

#[test]
fn an_image_that_points_at_another_file_gets_nothing_of_it() {
    let home = Home::new();
    let content = disks::noise(SEED + 3, 1 << 20);
    let canary = home.file(CANARY, &content);
    let create = |args: &[&str]| disks::run("qemu-img", &[&["create", "-q"], args].concat());
    let overlay = home.text_path("overlay.qcow2");
    create(&["-f", "qcow2", "-b", &canary, "-F", "raw", &overlay]);
    assert_leaves_the_canary(&home, &overlay, "has-backing-file");
    let external = home.text_path("external.qcow2");
    create(&["-f", "qcow2", "-o", &format!("data_file={canary},data_file_raw=on"), &external, "1M"]);
    disks::write(&home.path(CANARY), &content);
    assert_leaves_the_canary(&home, &external, "external-data-file");
    let split = home.text_path("split.vmdk");
    create(&["-f", "vmdk", "-o", "subformat=monolithicFlat", &split, "1M"]);
    disks::write(&home.path("split-flat.vmdk"), &content);
    assert_leaves_the_canary(&home, &split, "external-extent");
    // Named by the operator, they are read.
    let expected = home.json(&["image", "import", &canary])["digest"].clone();
    let based = home.json(&["image", "import", &overlay, "--parent", &canary]);
    assert_eq!(based["digest"], expected);
    let directory = home.text_path("");
    let whole = home.json(&["image", "import", &split, "--extent-dir", &directory]);
    assert_eq!(whole["digest"], expected);
    // A link in the directory leads nowhere.
    std::fs::remove_file(home.path("split-flat.vmdk")).unwrap();
    std::os::unix::fs::symlink(&canary, home.path("split-flat.vmdk")).unwrap();
    home.run(&["image", "import", &split, "--as", "linked", "--extent-dir", &directory])
        .refused(1, &["external-extent"]);
}

#[test]
fn parents_that_do_not_fit_are_named() {
    let home = Home::new();
    let parent = home.file("not-a-disk.txt", "some text");
    let overlay = home.text_path("overlay.qcow2");
    disks::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &parent, "-F", "raw", &overlay, "1M"]);
    home.run(&["image", "import", &overlay, "--parent", &parent])
        .refused(1, &["cannot use `", "not-a-disk.txt`", "not a disk image"]);
    home.run(&["image", "import", &overlay, "--parent", "absent.raw"]).refused(1, &["cannot open `absent.raw`"]);
    home.run(&["image", "import", &overlay, "--extent-dir", &parent]).refused(1, &["cannot use `", "Not a directory"]);
}
