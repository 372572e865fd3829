//! Stores elsewhere than in the data directory: which one a data directory belongs to, and copies between them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Home, Ran, disks, holds_files, wait_until};

const SEED: u64 = 0x5eed_0151;

fn import_small(home: &Home, seed: u64) -> Value {
    let disk = home.file("small.raw", disks::content(seed, 4 << 20));
    home.json(&["image", "import", &disk])
}

fn binding(home: &Home) -> Value {
    serde_json::from_slice(&std::fs::read(home.data().join("store.json")).unwrap()).unwrap()
}

#[test]
fn a_data_directory_belongs_to_the_store_of_its_first_use() {
    let home = Home::new();
    let elsewhere = home.text_path("elsewhere");
    let disk = home.file("small.raw", disks::content(SEED, 4 << 20));
    let image = home.json(&["image", "import", &disk, "--store", "elsewhere"]);
    assert!(holds_files(&home.path("elsewhere/packs")) && !home.data().join("store").exists());
    assert_eq!(json!([binding(&home)["format_version"], binding(&home)["location"]]), json!([1, elsewhere]));
    // Neither said again nor otherwise said.
    assert_eq!(home.json(&["image", "list"]), json!([image]));
    assert_eq!(home.json(&["image", "list", "--store", &format!("file://{elsewhere}")]), json!([image]));
    let refused = [
        "error: the data directory `",
        &format!("has its images in the store `{elsewhere}`, not in `"),
        "hint: copy images between stores with `bulbil image copy`, or use another --data-dir\n",
    ];
    home.run(&["image", "list", "--store", "other"]).refused(1, &refused);
    home.ok(&["shutdown"]);
    home.run(&["image", "list", "--store", "other"]).refused(1, &refused);
    home.run(&["serve", "--store", "other"]).refused_with_log(&refused);
    let by_variable = home.command(&["image", "list"]).env("BULBIL_STORE", "other").output().unwrap();
    Ran::new("image list, with a variable".to_owned(), by_variable).refused(1, &refused);
    assert!(!home.path("other").exists(), "a store that is refused is not made");
    // A new daemon, and a shim, find it without being told.
    home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    assert_eq!(home.json(&["image", "list"]), json!([image]));
}

#[test]
fn an_instance_reads_its_disk_from_the_store_that_is_bound() {
    let home = Home::new();
    let disk = home.file("small.raw", disks::content(SEED + 1, 4 << 20));
    home.ok(&["image", "import", &disk, "--store", &home.text_path("elsewhere")]);
    let instance = home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    disks::assert_served_is(disk.as_ref(), "raw", &home.disk_socket(&instance));
}

#[test]
fn a_store_that_cannot_be_opened_is_named_and_binds_nothing() {
    let home = Home::new();
    let file = home.file("file", "not a directory");
    let ran = home.run(&["image", "list", "--store", &format!("{file}/store")]);
    ran.refused(1, &["error: the daemon does not start\n", "caused by: cannot open the store `", "Not a directory"]);
    assert!(!home.data().join("store.json").exists());
    home.assert_no_images();
    assert_eq!(binding(&home)["location"], "store");
}

#[test]
fn a_data_directory_of_an_earlier_version_keeps_its_store() {
    let home = Home::new();
    let image = import_small(&home, SEED + 2);
    home.ok(&["shutdown"]);
    // As it was before data directories were bound: no file, and owner 0.
    std::fs::remove_file(home.data().join("store.json")).unwrap();
    for folder in std::fs::read_dir(home.data().join("store/manifests")).unwrap().flatten() {
        let manifest = std::fs::read_dir(folder.path()).unwrap().flatten().next().unwrap().path();
        std::fs::rename(manifest, folder.path().with_extension("manifest")).unwrap();
        std::fs::remove_dir_all(folder.path()).unwrap();
    }
    let other = home.text_path("other");
    home.run(&["image", "list", "--store", &other]).refused(1, &["has its images in the store `"]);
    assert_eq!(home.json(&["image", "list"]), json!([image]));
    assert_eq!(json!([binding(&home)["location"], binding(&home)["owner"]]), json!(["store", "0000000000000000"]));
    home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    home.ok(&["rm", "web", "--force"]);
    home.ok(&["image", "rm", "small"]);
    assert_eq!(home.json(&["store", "stats"])["packs"], 0);
}

#[test]
fn two_data_directories_share_a_store_and_free_only_what_is_theirs() {
    let home = Home::new();
    let store = home.text_path("shared");
    let second = home.text_path("data2");
    let disk = home.file("small.raw", disks::content(SEED + 3, 4 << 20));
    home.ok(&["image", "import", &disk, "--store", &store]);
    let there = |args: &[&str]| home.run(&[args, &["--data-dir", &second, "--store", &store]].concat());
    let image = there(&["image", "import", &disk, "-o", "json"]).json();
    assert!(image["stored_bytes"].as_u64().unwrap() < 64 << 10, "only a manifest is new: {image}");
    home.ok(&["image", "rm", "small"]);
    assert!(home.json(&["store", "stats"])["packs"].as_u64().unwrap() > 0);
    there(&["image", "export", "small", &home.text_path("out.raw")]).ok();
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
    there(&["image", "rm", "small"]).ok();
    assert_eq!(home.json(&["store", "stats"])["packs"], 0);
    there(&["shutdown"]).ok();
}

#[test]
fn doctor_tells_of_the_store_and_changes_nothing() {
    let home = Home::new();
    let store_check = |args: &[&str]| {
        let ran = home.run(&[&["doctor", "-o", "json"], args].concat());
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        let check = report["checks"].as_array().unwrap().iter().find(|check| check["name"] == "store").cloned();
        let check = check.unwrap();
        (check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
    };
    let (ok, detail) = store_check(&[]);
    assert!(ok && detail.starts_with("will be made at ") && detail.ends_with("/data/store"), "{detail}");
    assert!(!home.data().exists());
    home.ok(&["image", "list", "--store", &home.text_path("elsewhere")]);
    home.ok(&["shutdown"]);
    assert_eq!(store_check(&[]), (true, home.text_path("elsewhere")));
    let (ok, detail) = store_check(&["--store", "other"]);
    assert!(!ok && detail.contains("not in `"), "{detail}");
    std::fs::remove_file(home.path("elsewhere/bulbil-store.json")).unwrap();
    let (ok, detail) = store_check(&[]);
    assert!(!ok && detail.starts_with("there is no store at `"), "{detail}");
    home.run(&["doctor"]).failed();
}

#[test]
fn locations_and_keys_that_make_no_sense_are_refused() {
    let home = Home::new();
    for (args, says) in [
        (&["image", "list", "--store", ""][..], "the location of a store is empty"),
        (&["image", "list", "--store", "ftp://host/x"], "`ftp://` is not known"),
        (&["image", "list", "--store", "file://relative"], "an absolute path"),
        (&["image", "list", "--store"], "--store <LOCATION>"),
        (&["image", "list", "--store-key", "hidden"], "a key source is `file:PATH` or `command:PROGRAM"),
        (&["image", "list", "--store-key", "file:"], "file:PATH"),
        (&["image", "list", "--store-key", "command: "], "command:PROGRAM"),
    ] {
        let ran = home.run(args).refused(2, &[says]);
        println!("$ {}\n{}", ran.command, ran.stderr);
        assert!(!ran.stderr.contains("hidden"), "somebody may type the key itself: {ran}");
    }
    assert!(!home.data().exists());
}

#[test]
fn an_image_is_copied_to_a_store_and_found_there_by_name() {
    let home = Home::new();
    let disk = home.file("small.raw", disks::content(SEED + 4, 4 << 20));
    let image = home.json(&["image", "import", &disk]);
    let other = home.text_path("other");
    let ran = home.ok(&["image", "copy", "small", "--to", &other]);
    assert_eq!(ran.stdout, format!("{}\n", image["digest"].as_str().unwrap()));
    assert!(ran.stderr.starts_with("copied small:1 in ") && ran.stderr.contains("grew by"), "{ran}");
    let again = home.json(&["image", "copy", "small:1", "--to", &other]);
    assert_eq!(
        json!([
            again["location"],
            again["name"],
            again["version"],
            again["digest"],
            again["existed"],
            again["stored_bytes"]
        ]),
        json!([other, "small", "1", image["digest"], true, 0])
    );
    home.ok(&["image", "copy", "small", "--to", &other, "--as", "web:2.1"]);
    let offered = home.json(&["image", "list", "--from", &other]);
    let names: Vec<_> = offered.as_array().unwrap().iter().map(|i| json!([i["name"], i["version"]])).collect();
    assert_eq!(names, [json!(["small", "1"]), json!(["web", "2.1"])]);
    for field in ["digest", "size_bytes", "data_bytes", "architecture", "boot_mode", "source_format", "created_at"] {
        assert_eq!(offered[0][field], image[field], "{field}");
    }
    // A host that has never seen the image.
    let second = home.text_path("data2");
    let there = |args: &[&str]| home.run(&[args, &["--data-dir", &second]].concat());
    let copied = there(&["image", "copy", "web", "--from", &other, "-o", "json"]).json();
    assert_eq!(
        json!([copied["name"], copied["version"], copied["digest"], copied["boot_mode"], copied["source_format"]]),
        json!(["web", "2.1", image["digest"], image["boot_mode"], "raw"])
    );
    there(&["image", "export", "web", &home.text_path("out.raw")]).ok();
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
    let ran = there(&["image", "copy", "web:latest", "--from", &other]).ok();
    assert!(ran.stderr.contains("is there already, with the same content"), "{ran}");
    there(&["image", "copy", "small:1", "--from", &other, "--as", "mine"]).ok();
    assert_eq!(there(&["image", "list", "-o", "json"]).json().as_array().unwrap().len(), 2);
    there(&["shutdown"]).ok();
}

#[test]
fn a_copy_sends_only_what_is_missing() {
    let home = Home::new();
    let mut bytes = disks::noise(SEED + 5, 24 << 20);
    let first = home.file("first.raw", &bytes);
    home.ok(&["image", "import", &first]);
    bytes[8 << 20..][..1 << 20].copy_from_slice(&disks::noise(SEED + 6, 1 << 20));
    let second = home.file("second.raw", &bytes);
    home.ok(&["image", "import", &second]);
    let other = home.text_path("other");
    home.ok(&["image", "copy", "first", "--to", &other]);
    let copied = home.json(&["image", "copy", "second", "--to", &other]);
    let stored = copied["stored_bytes"].as_u64().unwrap();
    assert!((1 << 20..2 << 20).contains(&stored), "a MiB has changed, {stored} bytes were stored");
}

#[test]
fn an_image_that_its_own_store_offers_stays_when_it_is_removed_here() {
    let home = Home::new();
    let image = import_small(&home, SEED + 7);
    let store = home.data().join("store").to_str().unwrap().to_owned();
    home.ok(&["image", "copy", "small", "--to", &store]);
    home.ok(&["image", "rm", "small"]);
    assert!(home.json(&["store", "stats"])["packs"].as_u64().unwrap() > 0);
    let copied = home.json(&["image", "copy", "small", "--from", &store]);
    assert_eq!(copied["digest"], image["digest"]);
}

#[test]
fn a_copy_that_was_killed_goes_on_where_it_was() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 8, 160 << 20));
    let image = home.json(&["image", "import", &disk]);
    let other = home.path("other");
    let to = ["image", "copy", "disk", "--to", other.to_str().unwrap()];
    let packs = || -> u64 {
        let folders = std::fs::read_dir(other.join("packs")).into_iter().flatten().flatten();
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten());
        files.map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum()
    };
    // Killed with its daemon, then given up by its client: both leave what was stored.
    let mut client = home.spawn(&to);
    wait_until("the first pack", || packs() > 0);
    home.signal_daemon(Signal::KILL);
    assert!(!client.wait().unwrap().success());
    assert!(!holds_files(&other.join("manifests")), "the copy was over too early");
    let after_kill = packs();
    let mut client = home.spawn(&to);
    wait_until("another pack", || packs() > after_kill);
    support::send_signal(client.id(), Signal::INT);
    assert!(!client.wait().unwrap().success());
    wait_until("the copy to have ended", || {
        let before = packs();
        std::thread::sleep(std::time::Duration::from_millis(50));
        packs() == before
    });
    let (left, offered) = (packs(), home.json(&["image", "list", "--from", other.to_str().unwrap()]));
    assert!(left > after_kill, "what was stored is not taken back");
    assert_eq!(offered, json!([]), "nothing is offered before it is complete");
    let copied = home.json(&to);
    assert_eq!(copied["digest"], image["digest"]);
    let stored = copied["stored_bytes"].as_u64().unwrap();
    println!("{after_kill} bytes were left by the kill, {left} by the interruption, {stored} were stored then");
    assert!(stored + left <= (161 << 20) + (1 << 20), "nothing is sent twice: {stored} and {left}");
    home.ok(&["image", "copy", "disk", "--from", other.to_str().unwrap(), "--as", "back"]);
    assert_eq!(home.json(&["image", "show", "back"])["digest"], image["digest"]);
}

#[test]
fn a_damaged_source_is_never_copied() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 9, 4 << 20));
    home.ok(&["image", "import", &disk]);
    for folder in std::fs::read_dir(home.data().join("store/packs")).unwrap().flatten() {
        for pack in std::fs::read_dir(folder.path()).unwrap().flatten() {
            let mut bytes = std::fs::read(pack.path()).unwrap();
            bytes[1 << 20] ^= 1;
            std::fs::remove_file(pack.path()).unwrap();
            disks::write(&pack.path(), &bytes);
        }
    }
    let other = home.text_path("other");
    home.run(&["image", "copy", "disk", "--to", &other])
        .refused(1, &["error: cannot copy `disk:1` to `", "is damaged"]);
    assert_eq!(home.json(&["image", "list", "--from", &other]), json!([]));
}

#[test]
fn copies_that_make_no_sense_are_refused() {
    let home = Home::new();
    import_small(&home, SEED + 10);
    let other = home.text_path("other");
    home.ok(&["image", "copy", "small", "--to", &other]);
    let changed = home.file("changed.raw", disks::content(SEED + 11, 4 << 20));
    home.ok(&["image", "import", &changed]);
    let before = [home.state().to_vec(), vec![home.json(&["image", "list", "--from", &other])]];
    let nowhere = home.text_path("nowhere");
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["image", "copy", "small"], 2, &["--to <LOCATION>"]),
        (&["image", "copy", "--to", &other], 2, &["IMAGE"]),
        (&["image", "copy", "small", "--to", &other, "--from", &other], 2, &["cannot be used with"]),
        (&["image", "copy", "small", "--from", &other, "--to-key", "file:/k"], 2, &["--to-key"]),
        (&["image", "copy", "small", "--to", "gs:/x://"], 2, &["is not known; known: `s3://`"]),
        (&["image", "copy", "small", "--to", &other, "--as", "a/b"], 2, &["`a/b` is not a name"]),
        (&["image", "copy", "small", "--to", &other, "--as", "a:latest"], 1, &["no version may be called `latest`"]),
        (&["image", "copy", "nosuch", "--to", &other], 1, &["there is no image `nosuch`", "hint: see which"]),
        (&["image", "copy", "changed", "--to", &other, "--as", "small:1"], 1, &["offers something else", "hint: give"]),
        (&["image", "copy", "nosuch", "--from", &other], 1, &["offers no image `nosuch`", "image list --from"]),
        (&["image", "copy", "small:2", "--from", &other], 1, &["offers no image `small:2`"]),
        (&["image", "copy", "../x", "--from", &other], 1, &["offers no image `../x`"]),
        (&["image", "copy", "small", "--from", &other, "--as", "changed"], 1, &["exists already", "hint: give"]),
        (&["image", "copy", "small", "--from", &nowhere], 1, &["there is no store at `"]),
        (&["image", "list", "--from", &nowhere], 1, &["there is no store at `"]),
        (&["image", "list", "--from", "x://y"], 2, &["`x://` is not known"]),
        (&["image", "list", "--from-key", "file:/k"], 2, &["--from <LOCATION>"]),
    ];
    for (args, status, says) in cases {
        let ran = home.run(args).refused(*status, says);
        println!("$ {}\n{}", ran.command, ran.stderr);
    }
    assert_eq!([home.state().to_vec(), vec![home.json(&["image", "list", "--from", &other])]], before);
    assert!(!home.path("nowhere").exists(), "looking makes no store");
}
