//! Disk image files without a daemon: shown, checked, and converted from each format to each other. Needs `qemu-img`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;

use bulbil_testkit::Rng;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::disks::{self, run, try_run};
use support::{Home, Ran, assert_same_disk, send_signal, wait_until};

const SEED: u64 = 0x5eed_0061;

/// No multiple of a cluster, a block or a grain of any format.
const DISK_BYTES: usize = (9 << 20) + 3 * 512;

/// A file to write: its name, its options, and what `qemu-img` calls its format; nothing for one it does not read.
const TARGETS: &[(&str, &[&str], &str)] = &[
    ("plain.raw", &[], "raw"),
    ("plain.qcow2", &[], "qcow2"),
    ("zlib.qcow2", &["--compress", "zlib"], "qcow2"),
    ("zstd.qcow2", &["--compress", "zstd", "--cluster-size", "256KiB"], "qcow2"),
    ("small-clusters.qcow2", &["--cluster-size", "4k"], "qcow2"),
    ("dynamic.vhd", &[], "vpc"),
    ("fixed.vhd", &["--subformat", "fixed"], "vpc"),
    ("plain.vhdx", &[], "vhdx"),
    ("sparse.vmdk", &[], "vmdk"),
    ("stream.vmdk", &["--subformat", "streamOptimized"], "vmdk"),
    ("plain.vdi", &[], "vdi"),
    ("plain.ova", &[], ""),
];

fn source(home: &Home) -> String {
    let path = home.path("source.raw");
    disks::write_sparse(&path, &disks::content(SEED, DISK_BYTES));
    home.text_path("source.raw")
}

/// The files of a directory, so that nothing is left that was not asked for.
fn names(home: &Home) -> Vec<String> {
    let entries = std::fs::read_dir(home.path("")).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs commands that must be refused and must leave no file.
#[track_caller]
fn check(home: &Home, cases: &[(&[&str], i32, &[&str])]) {
    let before = names(home);
    for (args, status, says) in cases {
        let args = [&["disk"], *args].concat();
        let ran = home.run(&args).refused(*status, says);
        println!("$ {}\n{}", ran.command, ran.stderr);
        assert_eq!(names(home), before, "`{}` left something", ran.command);
    }
}

#[test]
fn a_disk_is_the_same_in_every_format_and_back() {
    let home = Home::new();
    let raw = source(&home);
    for (name, args, format) in TARGETS {
        let ran = home.ok(&[&["disk", "convert", &raw, name], *args].concat());
        assert_eq!(ran.stdout, "");
        let extension = Path::new(name).extension().unwrap().to_str().unwrap();
        assert!(ran.stderr.starts_with(&format!("wrote {name}: {extension}, 9 MiB disk, ")), "{ran}");
        if !format.is_empty() {
            assert_same_disk(&home, name, format, &raw);
        }
        let described = home.json(&["disk", "info", name]);
        assert_eq!(described["path"], *name);
        assert!(described["size_bytes"].as_u64().unwrap() >= DISK_BYTES as u64, "{described:#}");
        let back = format!("back-{name}.raw");
        home.ok(&["disk", "convert", name, &back]);
        assert_same_disk(&home, &back, "raw", &raw);
    }
    assert!(!home.data().exists(), "a data directory was made");
    assert!(names(&home).iter().all(|name| !name.starts_with('.')), "{:?}", names(&home));
}

#[test]
fn the_words_of_qemu_img_are_understood() {
    let home = Home::new();
    let raw = source(&home);
    home.ok(&["disk", "convert", "-f", "raw", "-O", "vpc", &raw, "out"]);
    assert_same_disk(&home, "out", "vpc", &raw);
    let described = home.json(&["disk", "info", "-f", "vpc", "out"]);
    assert_eq!(described["format"], "vhd");
}

#[test]
fn programs_find_their_fields() {
    let home = Home::new();
    let raw = source(&home);
    let written = home.json(&["disk", "convert", &raw, "disk.qcow2", "--compress", "zstd"]);
    assert_eq!(
        json!([written["path"], written["format"], written["size_bytes"]]),
        json!(["disk.qcow2", "qcow2", DISK_BYTES])
    );
    let file_bytes = home.path("disk.qcow2").metadata().unwrap().len();
    assert_eq!(written["file_bytes"], file_bytes);
    assert!(written["allocated_bytes"].is_u64(), "{written:#}");
    run("qemu-img", &["snapshot", "-c", "before", &home.text_path("disk.qcow2")]);
    let info = home.json(&["disk", "info", "disk.qcow2"]);
    assert_eq!(
        json!([info["format"], info["variant"], info["size_bytes"], info["cluster_bytes"], info["compression"]]),
        json!(["qcow2", "version 3", DISK_BYTES, 64 << 10, "zstd"])
    );
    for number in ["file_bytes", "data_bytes", "compressed_clusters"] {
        assert!(info[number].as_u64().unwrap() > 0, "{number}: {info:#}");
    }
    for field in ["identifier", "creator", "notes"] {
        assert!(info.get(field).is_some(), "{field}: {info:#}");
    }
    let snapshot = &info["snapshots"][0];
    assert_eq!(json!([snapshot["id"], snapshot["name"], snapshot["size_bytes"]]), json!(["1", "before", DISK_BYTES]));
    assert!(snapshot["created_at"].as_u64().unwrap() > 1_700_000_000, "{info:#}");
    let checked = home.json(&["disk", "check", "disk.qcow2", &raw]);
    assert_eq!(
        json!([
            checked[0]["path"],
            checked[0]["ok"],
            checked[0]["format"],
            checked[0]["size_bytes"],
            checked[0]["error"]
        ]),
        json!(["disk.qcow2", true, "qcow2", DISK_BYTES, null])
    );
    assert_eq!(json!([checked[1]["path"], checked[1]["format"]]), json!([raw, "raw"]));
}

#[test]
fn people_read_what_an_image_is() {
    let home = Home::new();
    let raw = source(&home);
    home.ok(&["disk", "convert", &raw, "disk.qcow2", "--compress", "zlib"]);
    run("qemu-img", &["snapshot", "-c", "before", &home.text_path("disk.qcow2")]);
    let ran = home.ok(&["disk", "info", "disk.qcow2"]);
    let size = format!("size          9 MiB ({DISK_BYTES})\n");
    for line in ["format        qcow2, version 3\n", &size, "cluster size  64 KiB (65536)\n", "compressed clusters\n"] {
        assert!(ran.stdout.contains(line), "expected `{line}`: {ran}");
    }
    assert!(ran.stdout.contains("\n\nSNAPSHOT  NAME    SIZE   TAKEN\n1         before  9 MiB  "), "{ran}");
    let ran = home.ok(&["disk", "check", "disk.qcow2", &raw]);
    let lines: Vec<_> = ran.stdout.lines().collect();
    assert!(lines[0].starts_with("disk.qcow2: ok, qcow2, 9 MiB, ") && lines[0].ends_with(" of data"), "{ran}");
    assert!(lines[1].starts_with(&format!("{raw}: ok, raw, 9 MiB, ")), "{ran}");
}

/// A disk of which no cluster can be stored as it is.
fn text_disk(home: &Home) -> String {
    let mut rng = Rng::new(SEED);
    let mut bytes = vec![0; 512];
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    while bytes.len() < DISK_BYTES {
        bytes.extend(format!("{}\n", rng.next_u64()).into_bytes());
    }
    bytes.truncate(DISK_BYTES);
    home.file("text.raw", bytes)
}

/// Damages the compressed data of an image, which only reading it shows.
fn damage_data(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + (128 << 10)].fill(0xff);
    disks::write(path, &bytes);
}

#[test]
fn a_check_reads_everything_and_tells_each_file_that_is_not_sound() {
    let home = Home::new();
    let raw = text_disk(&home);
    for name in ["good.qcow2", "bad.qcow2"] {
        home.ok(&["disk", "convert", &raw, name, "--compress", "zstd"]);
    }
    damage_data(&home.path("bad.qcow2"));
    home.ok(&["disk", "info", "bad.qcow2"]);
    let ran = home.run(&["disk", "check", "bad.qcow2", "missing", "good.qcow2"]);
    assert_eq!(ran.status, Some(1), "{ran}");
    assert!(ran.stdout.starts_with("good.qcow2: ok, qcow2, ") && ran.stdout.lines().count() == 1, "{ran}");
    for says in ["error: cannot check `bad.qcow2`\n  caused by: corrupt: ", "error: cannot open `missing`\n"] {
        assert!(ran.stderr.contains(says), "expected `{says}`: {ran}");
    }
    let ran = home.run(&["disk", "check", "-o", "json", "bad.qcow2", "good.qcow2"]);
    assert_eq!(ran.status, Some(1), "{ran}");
    let checked: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json!([checked[0]["path"], checked[0]["ok"], checked[1]["ok"]]), json!(["bad.qcow2", false, true]));
    assert_eq!(checked[0]["error"]["message"], "cannot check `bad.qcow2`");
    assert!(checked[0]["error"]["causes"][0].as_str().unwrap().starts_with("corrupt: "), "{checked:#}");
    check(&home, &[(&["convert", "bad.qcow2", "out.raw"], 1, &["error: cannot convert `bad.qcow2`\n", "corrupt: "])]);
}

#[test]
fn mistakes_are_told_with_what_to_type_instead_and_leave_no_file() {
    let home = Home::new();
    let raw = source(&home);
    let (text, there) = (home.file("notes.txt", "dear diary\n"), home.file("there.raw", "mine"));
    std::fs::create_dir(home.path("folder")).unwrap();
    std::os::unix::fs::symlink(&raw, home.path("link.raw")).unwrap();
    let no_file = "caused by: No such file or directory";
    check(
        &home,
        &[
            (&["info", "missing"], 1, &["error: cannot open `missing`\n", no_file]),
            (&["info", "folder"], 1, &["error: cannot open `folder`\n", "this is a directory"]),
            (&["check", "/dev/null"], 1, &["error: cannot open `/dev/null`\n", "this is a character device"]),
            (&["info", &text], 1, &["it is a text file", "hint: ", "--format raw\n"]),
            (&["info", &raw, "--format", "tape"], 2, &["`tape`", "use raw, qcow2, vhd, vhdx, vmdk or vdi"]),
            (
                &["info", &raw, "--snapshot", "x"],
                1,
                &["no-such-snapshot", "hint: see which there are: bulbil disk info "],
            ),
            (&["info", &raw, "--extent-dir", "missing"], 1, &["error: cannot open `missing`\n", no_file]),
            (&["convert", &raw], 2, &["<OUT>"]),
            (&["convert", "missing", "out.raw"], 1, &["error: cannot open `missing`\n", no_file]),
            (&["convert", &text, "out.qcow2"], 1, &["it is a text file", "hint: ", "--input-format raw\n"]),
            (&["convert", &raw, "out"], 2, &["error: the name `out` does not say", "hint: say so: --format raw, "]),
            (&["convert", &raw, "out.raw", "-O", "qed"], 2, &["unknown image format `qed`", "vmdk, vdi or ova"]),
            (&["convert", &raw, &there], 1, &["there.raw`: it exists already\n", "hint: replace it: --force"]),
            (&["convert", &raw, &raw, "--force"], 1, &["source.raw`, which is read\n"]),
            (&["convert", &raw, "link.raw", "--force"], 1, &["error: cannot write `link.raw`: it is `"]),
            (&["convert", &raw, "folder", "-O", "raw", "--force"], 1, &["it is a directory\n"]),
            (&["convert", &raw, "/dev/null", "-O", "raw", "--force"], 1, &["it is a character device\n"]),
            (&["convert", &raw, "no/such/out.raw"], 1, &["error: cannot write `no/such/out.raw`\n", no_file]),
            (&["convert", &raw, "out.vhd", "--subformat", "sparse"], 2, &["unknown subformat `sparse`: use dynamic"]),
            (&["convert", &raw, "out.vhd", "--subformat", "streamOptimized"], 2, &["use dynamic or fixed\n"]),
            (&["convert", &raw, "out.raw", "--subformat", "fixed"], 2, &["does not fit raw, which has none\n"]),
            (
                &["convert", &raw, "out.vmdk", "--compress", "zlib"],
                2,
                &["the subformat streamOptimized is compressed\n"],
            ),
            (&["convert", &raw, "out.vhdx", "--cluster-size", "64k"], 2, &["only qcow2 takes one\n"]),
            (&["convert", &raw, "out.qcow2", "--cluster-size", "3k"], 2, &["a power of two from 512 B to 2 MiB\n"]),
            (&["convert", &raw, "out.vdi", "--backing", &raw], 2, &["a backing file does not fit vdi"]),
            (&["convert", &raw, "out.qcow2", "--backing", "missing"], 1, &["error: cannot open `missing`\n", no_file]),
            (&["convert", &raw, "out.qcow2", "--backing-format", "raw"], 2, &["--backing <FILE>"]),
            (&["convert", &raw, "out.qcow2", "--backing", &text], 1, &["hint: ", "say so: --backing-format raw\n"]),
            (
                &["convert", &raw, "out.qcow2", "--backing", &raw, "--backing-format", "vhd"],
                1,
                &["hint: leave --backing-format out"],
            ),
            (&["info", &raw, "--format", "vhd"], 1, &["format-mismatch: ", "hint: leave the format out"]),
            (&["info", &raw, "--parent", &raw], 1, &["parent-mismatch: ", "hint: it needs no other image"]),
        ],
    );
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "mine");
    home.ok(&["disk", "convert", &raw, &there, "--force"]);
    assert_same_disk(&home, "there.raw", "raw", &raw);
}

#[test]
fn images_that_need_others_are_read_when_these_are_named() {
    let home = Home::new();
    let raw = source(&home);
    let (base, middle, top) = ("base.qcow2", "middle.qcow2", "top.qcow2");
    home.ok(&["disk", "convert", &raw, base]);
    for (below, above, command) in [(base, middle, "write -P 0x11 1M 300k"), (middle, top, "write -P 0x22 5M 70k")] {
        let above = home.text_path(above);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &home.text_path(below), &above]);
        run("qemu-io", &["-f", "qcow2", "-c", command, &above]);
    }
    let of_raw = "of-raw.qcow2";
    let text = home.file("notes.txt", "dear diary\n");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &text, &home.text_path(of_raw), "1M"]);
    check(
        &home,
        &[
            (&["info", top], 1, &["has-backing-file", "hint: name the image it is based on: --parent FILE\n"]),
            (
                &["info", top, "--parent", middle],
                1,
                &["has-backing-file", "hint: name the image that this one is based"],
            ),
            (
                &["convert", base, "out.qcow2", "--backing", top],
                1,
                &["has-backing-file", "hint: it needs another image"],
            ),
            (
                &["info", of_raw, "--parent", &text],
                1,
                &["it is a text file", "hint: ", "disk convert -f raw IN OUT.qcow2"],
            ),
        ],
    );
    home.ok(&["disk", "convert", "-f", "raw", &text, "says-raw.qcow2"]);
    home.ok(&["disk", "info", of_raw, "--parent", "says-raw.qcow2"]);
    home.ok(&["disk", "check", top, "--parent", middle, "--parent", base]);
    home.ok(&["disk", "convert", top, "flat.raw", "--parent", middle, "--parent", base]);
    let expected = home.text_path("expected.raw");
    run("qemu-img", &["convert", "-O", "raw", &home.text_path(top), &expected]);
    assert_same_disk(&home, "flat.raw", "raw", &expected);
    // Back to the difference: it names the image below, and QEMU finds it there.
    home.ok(&["disk", "convert", "flat.raw", "again.qcow2", "--backing", base]);
    let info = run("qemu-img", &["info", "--output", "json", &home.text_path("again.qcow2")]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(json!([info["backing-filename"], info["backing-filename-format"]]), json!([base, "qcow2"]));
    assert_same_disk(&home, "again.qcow2", "qcow2", &expected);
    let [difference, whole] = ["again.qcow2", base].map(|name| home.path(name).metadata().unwrap().len());
    assert!(difference < whole / 4, "{difference} of {whole} bytes");
}

/// The one child of a process.
fn child_of(parent: u32) -> u32 {
    let child = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    child.trim().parse().unwrap()
}

/// Whether the child of a process is under a filter of system calls.
fn is_confined(parent: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child_of(parent))).unwrap();
    status.lines().any(|line| line == "Seccomp:\t2")
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let home = Home::new();
    let raw = home.file("noise.raw", disks::noise(SEED + 1, 96 << 20));
    let before = names(&home);
    let part = || names(&home).into_iter().find(|name| name.starts_with('.'));
    for (signal, status) in [(Signal::INT, Some(130)), (Signal::TERM, Some(143)), (Signal::HUP, Some(129))] {
        let client = home.spawn(&["disk", "convert", &raw, "out.qcow2", "--compress", "zlib"]);
        wait_until("the conversion to begin", || {
            part().is_some_and(|name| home.path(&name).metadata().is_ok_and(|file| file.len() > 1 << 20))
        });
        assert!(is_confined(client.id()), "what reads the image has the rights of its user");
        send_signal(client.id(), signal);
        let ran = Ran::new(format!("disk convert, ended by {signal:?}"), client.wait_with_output().unwrap());
        assert_eq!(ran.status, status, "{ran}");
        assert_eq!(ran.stderr, "error: interrupted: `out.qcow2` was not written\n", "{ran}");
        assert_eq!(names(&home), before);
    }
}

/// Whether a process runs or is stopped; one that has ended may wait to be collected by whoever is its parent now.
fn lives(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.starts_with("State:\tZ"))
}

#[test]
fn a_conversion_that_makes_no_step_ends_with_the_command_that_was_killed() {
    let home = Home::new();
    let raw = home.file("noise.raw", disks::noise(SEED + 3, 96 << 20));
    let mut client = home.spawn(&["disk", "convert", &raw, "out.qcow2", "--compress", "zlib"]);
    wait_until("the conversion to begin", || names(&home).iter().any(|name| name.starts_with('.')));
    wait_until("the reader to give up its rights", || is_confined(client.id()));
    let converter = child_of(client.id());
    send_signal(converter, Signal::STOP);
    assert!(lives(converter));
    send_signal(client.id(), Signal::KILL);
    client.wait().unwrap();
    let ended = std::panic::catch_unwind(|| wait_until("the converter to end", || !lives(converter)));
    if ended.is_err() {
        send_signal(converter, Signal::KILL);
    }
    ended.unwrap();
}

#[test]
fn split_images_are_read_where_their_directory_is_named() {
    let home = Home::new();
    let raw = source(&home);
    std::fs::create_dir(home.path("parts")).unwrap();
    let image = home.text_path("parts/split.vmdk");
    let split = ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"];
    run("qemu-img", &[&["convert", "-f", "raw"], &split[..], &[&raw, &image]].concat());
    let needs_folder =
        ["external-extent: ", "hint: its other files must lie in the directory that is named: --extent-dir"];
    check(&home, &[(&["info", "parts/split.vmdk"], 1, &needs_folder)]);
    home.ok(&["disk", "check", "parts/split.vmdk", "--extent-dir", "parts"]);
    home.ok(&["disk", "convert", "parts/split.vmdk", "whole.qcow2", "--extent-dir", "parts"]);
    assert_same_disk(&home, "whole.qcow2", "qcow2", &raw);
}

#[test]
fn compressed_files_are_unpacked_on_the_way() {
    let home = Home::new();
    let raw = source(&home);
    run("gzip", &["-k", &raw]);
    let described = home.json(&["disk", "info", "source.raw.gz"]);
    assert_eq!(json!([described["format"], described["size_bytes"]]), json!(["raw", DISK_BYTES]));
    home.ok(&["disk", "convert", "source.raw.gz", "again.vhdx", "--no-sandbox"]);
    assert_same_disk(&home, "again.vhdx", "vhdx", &raw);
    assert!(names(&home).iter().all(|name| !name.starts_with('.')), "{:?}", names(&home));
}

#[test]
fn texts_of_an_image_do_not_steer_the_terminal() {
    let home = Home::new();
    let raw = source(&home);
    home.ok(&["disk", "convert", &raw, "disk.qcow2"]);
    let name = "old\u{1b}[31m\nhint: do this";
    run("qemu-img", &["snapshot", "-c", name, &home.text_path("disk.qcow2")]);
    let shown = home.ok(&["disk", "info", "disk.qcow2"]).stdout;
    assert!(shown.contains("old\\u{1b}[31m\\nhint: do this") && !shown.contains('\u{1b}'), "{shown}");
    assert_eq!(home.json(&["disk", "info", "disk.qcow2"])["snapshots"][0]["name"], name);
}

#[test]
fn a_snapshot_is_read_by_its_name() {
    let home = Home::new();
    let raw = source(&home);
    home.ok(&["disk", "convert", &raw, "disk.qcow2"]);
    let image = home.text_path("disk.qcow2");
    run("qemu-img", &["snapshot", "-c", "before", &image]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x33 2M 1M", &image]);
    home.ok(&["disk", "convert", "disk.qcow2", "old.raw", "--snapshot", "before"]);
    assert_same_disk(&home, "old.raw", "raw", &raw);
    home.ok(&["disk", "convert", "disk.qcow2", "new.raw"]);
    let compared = try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &home.text_path("new.raw"), &raw]);
    assert_eq!(compared.status.code(), Some(1), "{compared:?}");
}
