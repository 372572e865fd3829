//! Images that leave the store as files: in each format the disk that was imported, whole or not at all. Needs
//! `qemu-img`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::disks;
use support::{Home, Ran, assert_same_disk, send_signal, wait_until};

const SEED: u64 = 0x5eed_0071;

/// No multiple of a cluster, a frame or a block.
const DISK_BYTES: usize = (11 << 20) + 5 * 512;

/// The format of a new file, what more is said, and what `qemu-img` calls it; nothing for one it does not read.
const TARGETS: &[(&str, &[&str], &str)] = &[
    ("raw", &[], "raw"),
    ("qcow2", &[], "qcow2"),
    ("qcow2", &["--compress", "zstd"], "qcow2"),
    ("vhd", &[], "vpc"),
    ("vhd", &["--subformat", "fixed"], "vpc"),
    ("vhdx", &[], "vhdx"),
    ("vmdk", &[], "vmdk"),
    ("vmdk", &["--subformat", "streamOptimized"], "vmdk"),
    ("vdi", &[], "vdi"),
    ("ova", &[], ""),
];

fn hidden_files(home: &Home) -> Vec<String> {
    let entries = std::fs::read_dir(home.path("")).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn an_exported_image_is_the_disk_that_was_imported_in_every_format() {
    let home = Home::new();
    let raw = home.text_path("disk.raw");
    disks::write_sparse(raw.as_ref(), &disks::content(SEED, DISK_BYTES));
    // Stored first, so that the image's blocks lie in packs of two imports.
    let half = home.file("half.raw", &std::fs::read(&raw).unwrap()[..4 << 20]);
    home.ok(&["image", "import", &half]);
    let image = home.json(&["image", "import", &raw]);
    for (number, (format, args, qemu_format)) in TARGETS.iter().enumerate() {
        let name = format!("out{number}.{format}");
        let ran = home.ok(&[&["image", "export", "disk", &name], *args].concat());
        println!("{}", ran.stderr);
        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.contains(&format!("{name}: {format}, 11 MiB disk, ")), "{ran}");
        if !qemu_format.is_empty() {
            assert_same_disk(&home, &name, qemu_format, &raw);
        }
        if ["raw", "qcow2"].contains(format) {
            let again = home.json(&["image", "import", &name, "--as", &format!("again:{number}")]);
            assert_eq!(again["digest"], image["digest"], "{name}");
        }
    }
    assert_eq!(hidden_files(&home), [""; 0]);
    let written = home.json(&["image", "export", "disk:1", "again.raw"]);
    assert_eq!(
        json!([written["path"], written["format"], written["size_bytes"], written["file_bytes"]]),
        json!([home.text_path("again.raw"), "raw", DISK_BYTES, DISK_BYTES])
    );
    assert!(written["allocated_bytes"].as_u64().unwrap() <= (DISK_BYTES + 4096) as u64, "{written:#}");
}

#[test]
fn what_cannot_be_exported_is_told_and_leaves_no_file() {
    let home = Home::new();
    let raw = home.file("disk.raw", disks::content(SEED + 1, 2 << 20));
    home.ok(&["image", "import", &raw]);
    let there = home.file("there.raw", "mine");
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["nothing", "out.raw"], 1, &["error: there is no image `nothing`\n", "hint: see which there are"]),
        (&["disk", &there], 1, &["there.raw`: it exists already\n", "hint: replace it: --force"]),
        (&["disk", "no/such/out.raw"], 1, &["no/such/out.raw`\n", "No such file or directory"]),
        (&["disk", "/dev/null", "--format", "raw", "--force"], 1, &["it is a character device\n"]),
        (&["disk", "out"], 2, &["error: the name `out` does not say"]),
        (&["disk", "out.raw", "--format", "qed"], 2, &["unknown image format `qed`"]),
        (&["disk", "out.vdi", "--subformat", "fixed"], 2, &["does not fit vdi, which has none\n"]),
    ];
    for (args, status, says) in cases {
        home.run(&[&["image", "export"], *args].concat()).refused(*status, says);
        assert!(!home.path("out.raw").exists() && hidden_files(&home).is_empty());
    }
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "mine");
    home.ok(&["image", "export", "disk", &there, "--force"]);
    assert_same_disk(&home, "there.raw", "raw", &raw);
}

#[test]
fn a_damaged_image_is_not_exported() {
    let home = Home::new();
    let raw = home.file("disk.raw", disks::noise(SEED + 4, 4 << 20));
    home.ok(&["image", "import", &raw]);
    let mut damaged = 0;
    for folder in std::fs::read_dir(home.data().join("store/packs")).unwrap().flatten() {
        for pack in std::fs::read_dir(folder.path()).unwrap().flatten() {
            let mut bytes = std::fs::read(pack.path()).unwrap();
            bytes[1 << 20] ^= 1;
            std::fs::remove_file(pack.path()).unwrap();
            disks::write(&pack.path(), &bytes);
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);
    home.run(&["image", "export", "disk", "out.raw"]).refused(1, &["error: cannot export `disk:1` to `", "is damaged"]);
    assert!(!home.path("out.raw").exists() && hidden_files(&home).is_empty());
}

/// Starts an export that takes a while and returns when it has written something.
fn begin_export(home: &Home) -> std::process::Child {
    let client = home.spawn(&["image", "export", "disk", "out.qcow2", "--compress", "zlib"]);
    wait_until("the export to begin", || {
        hidden_files(home).first().is_some_and(|name| home.path(name).metadata().is_ok_and(|file| file.len() > 1 << 20))
    });
    client
}

#[test]
fn an_export_ends_when_its_client_does_and_leaves_nothing() {
    let home = Home::new();
    let raw = home.file("disk.raw", disks::noise(SEED + 2, 96 << 20));
    home.ok(&["image", "import", &raw]);
    for signal in [Signal::INT, Signal::KILL] {
        let mut client = begin_export(&home);
        send_signal(client.id(), signal);
        assert!(!client.wait().unwrap().success());
        wait_until("the file to be gone", || hidden_files(&home).is_empty());
        assert!(!home.path("out.qcow2").exists());
    }
    home.ok(&["image", "rm", "disk"]);
    assert_eq!(home.json(&["store", "stats"])["packs"], 0, "an export that ended keeps nothing");
}

#[test]
fn an_image_may_be_removed_while_it_is_being_exported() {
    let home = Home::new();
    let raw = home.file("disk.raw", disks::noise(SEED + 3, 96 << 20));
    home.ok(&["image", "import", &raw]);
    let client = begin_export(&home);
    home.ok(&["image", "rm", "disk"]);
    home.assert_no_images();
    assert!(!home.path("out.qcow2").exists(), "the export was over too early");
    Ran::new("image export".to_owned(), client.wait_with_output().unwrap()).ok();
    assert_same_disk(&home, "out.qcow2", "qcow2", &raw);
    wait_until("the content to be freed", || home.json(&["store", "stats"])["packs"] == 0);
}
