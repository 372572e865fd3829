//! Encrypted stores: nothing of an image can be read without the key, and the key is found where it was said to be.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::{Home, disks, holds_files};

const SEED: u64 = 0x5eed_0181;

/// Words that are in the disk and must be nowhere else.
const PLAIN: &[u8] = b"the quick brown fox jumps over the lazy dog, and nobody may read of it. ";

fn plain_disk(len: usize) -> Vec<u8> {
    let mut bytes = disks::noise(SEED, len);
    for (number, block) in bytes.chunks_mut(4096).enumerate().filter(|(number, _)| number % 3 == 0) {
        block[..PLAIN.len()].copy_from_slice(PLAIN);
        block[PLAIN.len()..][..8].copy_from_slice(&(number as u64).to_le_bytes());
    }
    bytes
}

/// The files below a directory that hold the words.
fn telltales(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(telltales(&path)),
            kind if kind.is_file() => {
                let bytes = std::fs::read(&path).unwrap();
                if bytes.windows(PLAIN.len()).any(|window| window == PLAIN) {
                    found.push(path.display().to_string());
                }
            }
            _ => {}
        }
    }
    found
}

fn new_key(home: &Home, name: &str) -> String {
    let ran = home.ok(&["store", "key", "new", &home.text_path(name)]);
    assert!(ran.stderr.contains("keep a copy of it"), "{ran}");
    assert_eq!(ran.stdout, format!("file:{}\n", home.text_path(name)));
    ran.stdout.trim_end().to_owned()
}

fn binding(home: &Home) -> Value {
    serde_json::from_slice(&std::fs::read(home.data().join("store.json")).unwrap()).unwrap()
}

#[test]
fn nothing_of_an_image_is_plain_in_an_encrypted_store_its_cache_and_its_volumes() {
    let home = Home::new();
    let key = new_key(&home, "key");
    let disk = home.file("disk.raw", plain_disk(6 << 20));
    let image = home.json(&["image", "import", &disk, "--store-key", &key]);
    assert_eq!(binding(&home)["key"], json!(key));
    // Neither the daemon nor a shim is told the key again.
    home.ok(&["shutdown"]);
    let instance = home.json(&["launch", "disk", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    disks::assert_served_is(disk.as_ref(), "raw", &home.disk_socket(&instance));
    home.ok(&["image", "warm", "disk"]);
    home.ok(&["image", "copy", "disk", "--to", &home.data().join("store").to_string_lossy(), "--to-key", &key]);
    assert!(holds_files(&home.data().join("cache")), "the cache was used");
    assert_eq!(telltales(&home.data()), [""; 0]);
    let secret = std::fs::read_to_string(home.path("key")).unwrap();
    for file in ["store.json", "run/daemon.log"] {
        assert!(!std::fs::read_to_string(home.data().join(file)).unwrap().contains(secret.trim()), "{file}");
    }
    assert_eq!(home.json(&["store", "scrub"])["damaged"], 0);
    home.ok(&["image", "export", "disk", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
    assert_eq!(home.json(&["image", "show", "disk"])["digest"], image["digest"]);
}

#[test]
fn a_key_that_is_missing_or_wrong_is_named_and_a_new_source_is_kept() {
    let home = Home::new();
    let key = new_key(&home, "key");
    home.ok(&["image", "list", "--store-key", &key]);
    home.ok(&["shutdown"]);
    std::fs::rename(home.path("key"), home.path("moved")).unwrap();
    let hint = "hint: say where the key of the store is: --store-key file:PATH or command:PROGRAM\n";
    home.run(&["image", "list"]).refused(1, &["the daemon does not start", "cannot open the store `", "key"]);
    let doctor = home.run(&["doctor"]);
    assert!(doctor.status == Some(1) && doctor.stdout.contains("cannot open the store `"), "{doctor}");
    let wrong = new_key(&home, "wrong");
    home.run(&["image", "list", "--store-key", &wrong]).refused(1, &["the daemon does not start", "key"]);
    assert_eq!(binding(&home)["key"], json!(key), "a key that opens nothing is not kept");
    let moved = format!("file:{}", home.text_path("moved"));
    home.ok(&["image", "list", "--store-key", &moved]);
    assert_eq!(binding(&home)["key"], json!(moved));
    home.run(&["image", "list", "--store-key", &wrong])
        .refused(1, &["the daemon has opened the store with the key `file:"]);
    home.ok(&["shutdown"]);
    home.ok(&["image", "list"]);
    let by_command = format!("command:cat {}", home.text_path("moved"));
    home.ok(&["shutdown"]);
    home.ok(&["image", "list", "--store-key", &by_command]);
    assert_eq!(binding(&home)["key"], json!(by_command));
    println!("{hint}");
}

#[test]
fn a_key_is_replaced_without_writing_anything_again() {
    let home = Home::new();
    let key = new_key(&home, "key");
    let disk = home.file("disk.raw", plain_disk(2 << 20));
    home.ok(&["image", "import", &disk, "--store-key", &key]);
    let before = home.json(&["store", "stats"]);
    let listed = home.json(&["store", "key", "list"]);
    assert_eq!(json!([listed[0]["provider"], listed[0]["in_use"]]), json!(["file", true]));
    let next = new_key(&home, "next");
    let rotated = home.json(&["store", "key", "rotate", "--new-key", &next]);
    assert_eq!(rotated.as_array().unwrap().len(), 1, "{rotated}");
    assert_eq!(rotated[0]["in_use"], true);
    assert_ne!(rotated[0]["id"], listed[0]["id"]);
    assert_eq!(binding(&home)["key"], json!(next));
    assert_eq!(home.json(&["store", "stats"]), before);
    home.ok(&["shutdown"]);
    std::fs::remove_file(home.path("key")).unwrap();
    let added = home.json(&["store", "key", "add-data-key"]);
    assert!(added["data_key"].as_u64().unwrap() >= 1, "{added}");
    home.ok(&["image", "export", "disk", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
    let again = new_key(&home, "again");
    assert_eq!(home.json(&["store", "key", "rotate", "--new-key", &again]).as_array().unwrap().len(), 1);
}

#[test]
fn images_are_copied_between_stores_with_and_without_a_key() {
    let home = Home::new();
    let key = new_key(&home, "key");
    let disk = home.file("disk.raw", plain_disk(2 << 20));
    let image = home.json(&["image", "import", &disk]);
    let vault = home.text_path("vault");
    home.ok(&["image", "copy", "disk", "--to", &vault, "--to-key", &key]);
    assert_eq!(telltales(&home.path("vault")), [""; 0]);
    for (args, says) in [
        (&["image", "list", "--from", &vault][..], "hint: say where the key of that store is"),
        (&["image", "copy", "disk", "--from", &vault, "--as", "x"], "hint: say where the key of that store is"),
        (&["image", "copy", "disk", "--to", &vault], "hint: say where the key of that store is"),
    ] {
        home.run(args).refused(1, &["key", says]);
    }
    let back = home.json(&["image", "copy", "disk", "--from", &vault, "--from-key", &key, "--as", "back"]);
    assert_eq!(back["digest"], image["digest"]);
    let offered = home.json(&["image", "list", "--from", &vault, "--from-key", &key]);
    assert_eq!(json!([offered[0]["name"], offered[0]["digest"]]), json!(["disk", image["digest"]]));
}

#[test]
fn keys_that_make_no_sense_are_refused() {
    let home = Home::new();
    let key = new_key(&home, "key");
    home.assert_no_images();
    let empty = home.file("empty", "");
    std::fs::set_permissions(&empty, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["store", "key", "new", &home.text_path("key")], 1, &["a key is never overwritten", "hint: choose"]),
        (&["store", "key", "new", "/no/such/folder/key"], 1, &["cannot write a key to `/no/such/folder/key`"]),
        (&["store", "key", "new"], 2, &["<FILE>"]),
        (&["store", "key", "rotate"], 2, &["--new-key <SOURCE>"]),
        (&["store", "key", "rotate", "--new-key", "secret"], 2, &["file:PATH"]),
        (&["store", "key", "rotate", "--new-key", &key], 1, &["not encrypted"]),
        (&["store", "key", "add-data-key"], 1, &["not encrypted"]),
        (&["store", "key", "burn"], 2, &["burn"]),
    ];
    for (args, status, says) in cases {
        let ran = home.run(args).refused(*status, says);
        println!("$ {}\n{}", ran.command, ran.stderr);
    }
    assert_eq!(home.json(&["store", "key", "list"]), json!([]));
    assert_eq!(home.ok(&["store", "key", "list"]).stdout, "the store is not encrypted\n");
    home.ok(&["shutdown"]);
    // Who names a key believes that the store is encrypted.
    home.run(&["image", "list", "--store-key", &key]).refused(1, &["not encrypted"]);
    let other = home.text_path("data2");
    let source = format!("file:{empty}");
    home.run(&["image", "list", "--data-dir", &other, "--store-key", &source]).refused(1, &["holds no key"]);
    assert!(!Path::new(&other).join("store.json").exists());
}
