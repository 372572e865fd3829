//! Looking after a store: what is unused goes, what is damaged is named and healed, what it takes is told.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::PathBuf;

use bulbil_testkit::Rng;
use serde_json::{Value, json};
use support::{Home, disks};

const SEED: u64 = 0x5eed_0161;

#[track_caller]
fn assert_has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some(), "no `{field}` in {document:#}");
    }
}

/// The packs of a home's own store.
fn packs(home: &Home) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(home.data().join("store/packs")).into_iter().flatten().flatten();
    let mut packs: Vec<_> =
        folders.flat_map(|folder| std::fs::read_dir(folder.path()).unwrap().flatten()).map(|e| e.path()).collect();
    packs.sort();
    packs
}

/// Replaces a byte of a pack, as a failing disk does.
fn damage(pack: &PathBuf, at: usize) {
    let mut bytes = std::fs::read(pack).unwrap();
    bytes[at] ^= 1;
    std::fs::remove_file(pack).unwrap();
    disks::write(pack, &bytes);
}

fn noise_image(home: &Home, name: &str, seed: u64, len: usize) -> Value {
    let disk = home.file(&format!("{name}.raw"), disks::noise(seed, len));
    home.json(&["image", "import", &disk])
}

#[test]
fn stats_tell_what_each_image_alone_costs() {
    let home = Home::new();
    let bytes = disks::noise(SEED, 8 << 20);
    let half = home.file("half.raw", &bytes[..4 << 20]);
    let whole = home.file("whole.raw", &bytes);
    home.ok(&["image", "import", &half]);
    home.ok(&["image", "import", &whole]);
    home.ok(&["image", "import", &whole, "--as", "again:7"]);
    let stats = home.json(&["store", "stats"]);
    let images = stats["images"].as_array().unwrap();
    let [costly, cheap] = &images[..] else { panic!("two contents: {stats:#}") };
    for image in images {
        assert_has(image, &["digest", "names", "size_bytes", "data_bytes", "shared_bytes", "alone_bytes", "ratio"]);
    }
    assert_eq!(costly["names"], json!(["again:7", "whole:1"]));
    assert_eq!(
        json!([cheap["names"], cheap["size_bytes"], cheap["shared_bytes"]]),
        json!([["half:1"], 4 << 20, 4 << 20])
    );
    let alone = |image: &Value| image["alone_bytes"].as_u64().unwrap();
    assert!((4 << 20..5 << 20).contains(&alone(costly)) && alone(cheap) < 64 << 10, "{stats:#}");
    assert_eq!(
        json!([stats["logical_bytes"], stats["data_bytes"], stats["unique_bytes"]]),
        json!([12 << 20, 12 << 20, 8 << 20])
    );
    let text = home.ok(&["store", "stats"]).stdout;
    assert!(
        text.contains("again:7, whole:1") && text.contains("ALONE") && text.contains("12 MiB (12582912)"),
        "{text}"
    );
}

#[test]
fn a_collection_says_what_it_would_free_and_then_frees_it() {
    let home = Home::new();
    noise_image(&home, "kept", SEED + 1, 4 << 20);
    // As a killed copy leaves it: packs that no manifest names.
    let other = Home::new();
    let foreign = noise_image(&other, "foreign", SEED + 2, 4 << 20);
    for pack in packs(&other) {
        let name = pack.strip_prefix(other.data().join("store")).unwrap().to_owned();
        let target = home.data().join("store").join(name);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&pack, target).unwrap();
    }
    let left: u64 = packs(&other).iter().map(|pack| pack.metadata().unwrap().len()).sum();
    let before = packs(&home);
    let planned = home.json(&["store", "gc", "--dry-run"]);
    assert_has(&planned, &["dry_run", "grace_s", "unused_contents", "busy", "packs", "deleted_packs", "freed_bytes"]);
    assert_has(&planned, &["repacked_packs", "repacked_bytes", "later_bytes"]);
    assert_eq!(json!([planned["dry_run"], planned["deleted_packs"], planned["freed_bytes"]]), json!([true, 1, left]));
    assert_has(&planned["packs"][0], &["pack", "bytes", "fate", "reason"]);
    assert_eq!(packs(&home), before, "a dry run changes nothing");
    let text = home.ok(&["store", "gc", "--dry-run"]).stdout;
    assert!(
        text.contains("no image uses it") && text.contains("would free 4") && text.contains("in 1 packs"),
        "{text}"
    );
    let kept = home.json(&["store", "gc", "--grace", "1h"]);
    assert_eq!(
        json!([kept["deleted_packs"], kept["later_bytes"], kept["packs"][0]["fate"]]),
        json!([0, left, "condemned"])
    );
    let kept = home.json(&["store", "gc", "--grace", "1h", "--no-repack"]);
    assert!(kept["packs"][0]["reason"].as_str().unwrap().contains("it stays until 20"), "{kept:#}");
    let freed = home.json(&["store", "gc"]);
    assert_eq!(json!([freed["dry_run"], freed["deleted_packs"], freed["freed_bytes"]]), json!([false, 1, left]));
    assert_eq!(packs(&home).len(), before.len() - 1);
    assert_eq!(home.ok(&["store", "gc"]).stdout, "freed 0 B in 0 packs\n");
    home.ok(&["image", "export", "kept", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &home.text_path("kept.raw"));
    assert_ne!(foreign["digest"], home.json(&["image", "show", "kept"])["digest"]);
}

#[test]
fn a_collection_writes_packs_anew_that_are_used_in_small_part() {
    let home = Home::new();
    let bytes = disks::noise(SEED + 3, 12 << 20);
    let whole = home.file("whole.raw", &bytes);
    let part = home.file("part.raw", &bytes[..2 << 20]);
    home.ok(&["image", "import", &whole]);
    home.ok(&["image", "import", &part]);
    home.ok(&["image", "rm", "whole"]);
    let taken = || home.json(&["store", "stats"])["pack_bytes"].as_u64().unwrap();
    assert!(taken() > 12 << 20);
    let kept = home.json(&["store", "gc", "--no-repack"]);
    assert_eq!(json!([kept["repacked_packs"], kept["freed_bytes"]]), json!([0, 0]));
    let planned = home.json(&["store", "gc", "--dry-run"]);
    assert_eq!(json!([planned["repacked_packs"], planned["packs"][0]["fate"]]), json!([1, "repacked"]));
    assert!(taken() > 12 << 20);
    let done = home.json(&["store", "gc"]);
    assert_eq!(done["repacked_packs"], 1, "{done:#}");
    assert!(taken() < 3 << 20, "{} bytes of packs for 2 MiB, after {done:#}", taken());
    home.ok(&["image", "export", "part", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &part);
}

#[test]
fn contents_below_instances_survive_collections() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::content(SEED + 4, 4 << 20));
    home.ok(&["image", "import", &disk]);
    let instance = home.json(&["launch", "disk", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    for _ in 0..3 {
        assert_eq!(home.json(&["store", "gc"])["freed_bytes"], 0);
    }
    disks::assert_served_is(disk.as_ref(), "raw", &home.disk_socket(&instance));
}

#[test]
fn a_scrub_of_a_sound_store_finds_nothing() {
    let home = Home::new();
    noise_image(&home, "disk", SEED + 5, 4 << 20);
    let ran = home.ok(&["store", "scrub"]);
    assert_eq!(ran.stdout, "nothing is damaged\n");
    assert!(ran.stderr.starts_with("read 1 packs, "), "{ran}");
    let report = home.json(&["store", "scrub"]);
    assert_eq!(
        json!([report["packs"], report["manifests"], report["damaged"], report["healed"], report["damage"]]),
        json!([1, 1, 0, 0, []])
    );
    let read: u64 =
        (1..=3).map(|i| home.json(&["store", "scrub", "--share", &format!("{i}/3")])["packs"].as_u64().unwrap()).sum();
    assert_eq!(read, 1, "three shares are everything, once");
}

#[test]
fn a_scrub_names_the_images_and_instances_that_damage_hits_and_heals_from_another_store() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 6, 6 << 20));
    let image = home.json(&["image", "import", &disk]);
    home.ok(&["image", "import", &disk, "--as", "again:2"]);
    noise_image(&home, "other", SEED + 7, 1 << 20);
    let mirror = home.text_path("mirror");
    home.ok(&["image", "copy", "disk", "--to", &mirror]);
    home.ok(&["launch", "disk", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    home.ok(&["stop", "web", "--force"]);
    home.ok(&["shutdown"]);
    // What the machine has read would heal it.
    std::fs::remove_dir_all(home.data().join("cache")).unwrap();
    let pack = packs(&home).into_iter().max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    damage(&pack, 3 << 20);
    let ran = home.run(&["store", "scrub", "-o", "json"]);
    assert_eq!(ran.status, Some(1), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        json!([report["damaged"], report["healed"], report["damage"].as_array().unwrap().len()]),
        json!([1, 0, 1])
    );
    let found = &report["damage"][0];
    assert_has(found, &["kind", "object", "reason", "frames", "digests", "images", "volumes", "healed"]);
    assert_eq!(
        json!([found["kind"], found["digests"], found["images"], found["volumes"][0]["instance"], found["healed"]]),
        json!(["pack", [image["digest"]], ["again:2", "disk:1"], "web", false])
    );
    assert_eq!(found["frames"].as_array().unwrap().len(), 1);
    let ran = home.run(&["store", "scrub"]);
    assert_eq!(ran.status, Some(1), "{ran}");
    assert!(ran.stdout.contains("again:2, disk:1, instance web") && ran.stderr.contains("hint: heal from"), "{ran}");
    home.run(&["image", "export", "disk", "out.raw"]).refused(1, &["is damaged"]);
    let healed = home.json(&["store", "scrub", "--heal-from", &mirror]);
    assert_eq!(json!([healed["damaged"], healed["healed"], healed["damage"][0]["healed"]]), json!([0, 1, true]));
    home.ok(&["image", "export", "disk", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
}

#[test]
fn what_the_cache_has_heals_the_store() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 8, 4 << 20));
    home.ok(&["image", "import", &disk]);
    home.ok(&["image", "warm", "disk"]);
    damage(&packs(&home)[0], 1 << 20);
    let healed = home.json(&["store", "scrub"]);
    assert_eq!(json!([healed["damaged"], healed["healed"]]), json!([0, 1]), "{healed:#}");
    home.ok(&["image", "export", "disk", "out.raw"]);
    support::assert_same_disk(&home, "out.raw", "raw", &disk);
}

#[test]
fn a_flip_of_any_byte_is_found() {
    let home = Home::new();
    let mut rng = Rng::new(SEED + 9);
    println!("seed {:#x}", SEED + 9);
    noise_image(&home, "disk", SEED + 9, 1 << 20);
    let pack = packs(&home).remove(0);
    let len = usize::try_from(pack.metadata().unwrap().len()).unwrap();
    for _ in 0..10 {
        let at = usize::try_from(rng.below(len as u64)).unwrap();
        damage(&pack, at);
        let ran = home.run(&["store", "scrub", "-o", "json"]);
        assert_eq!(ran.status, Some(1), "byte {at} of {len}: {ran}");
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["damage"][0]["images"], json!(["disk:1"]), "byte {at}: {report:#}");
        damage(&pack, at);
    }
    assert_eq!(home.json(&["store", "scrub"])["damaged"], 0);
}

#[test]
fn an_image_is_brought_into_the_cache_as_far_as_its_bound_allows() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 10, 80 << 20));
    let image = home.json(&["image", "import", &disk]);
    let bounded = home.json(&["image", "warm", "disk", "--cache-size", "64MiB"]);
    assert_eq!(
        json!([bounded["id"], bounded["complete"], bounded["reason"]]),
        json!([image["id"], false, "cache_full"])
    );
    let setting: Value = serde_json::from_slice(&std::fs::read(home.data().join("cache.json")).unwrap()).unwrap();
    assert_eq!(setting, json!({"format_version": 1, "max_bytes": 64 << 20}));
    let ran = home.ok(&["image", "warm", "disk"]);
    assert!(ran.stderr.contains("does not fit into the cache") && ran.stderr.contains("--cache-size"), "{ran}");
    let whole = home.json(&["image", "warm", "disk", "--cache-size", "unlimited"]);
    assert_has(&whole, &["complete", "reason", "total_bytes", "present_bytes", "fetched_bytes", "read_bytes"]);
    assert_eq!(json!([whole["complete"], whole["reason"], whole["total_bytes"]]), json!([true, null, 80 << 20]));
    let again = home.json(&["image", "warm", "disk"]);
    assert_eq!(json!([again["fetched_bytes"], again["present_bytes"]]), json!([0, 80 << 20]));
}

#[test]
fn commands_on_a_store_that_make_no_sense_are_refused() {
    let home = Home::new();
    noise_image(&home, "disk", SEED + 11, 1 << 20);
    let before = home.state();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["store"], 2, &[]),
        (&["store", "clean"], 2, &["clean"]),
        (&["store", "gc", "--grace", "soon"], 2, &["`soon` is not a duration"]),
        (&["store", "gc", "--grace", "-1h"], 2, &[]),
        (&["store", "gc", "--grace", "1.5h"], 2, &["such as 24h"]),
        (&["store", "gc", "disk"], 2, &["disk"]),
        (&["store", "gc", "--dry-run", "--dry-run"], 2, &["--dry-run"]),
        (&["store", "scrub", "--share", "0/3"], 2, &["such as 3/30"]),
        (&["store", "scrub", "--share", "4/3"], 2, &["with I from 1 to N"]),
        (&["store", "scrub", "--share", "half"], 2, &["`half`"]),
        (&["store", "scrub", "--heal-from", "x://y"], 2, &["x://"]),
        (&["store", "scrub", "--heal-from-key", "file:/k"], 2, &["--heal-from <LOCATION>"]),
        (&["store", "scrub", "--heal-from", "/nonexistent/store"], 1, &["there is no store at `/nonexistent/store`"]),
        (&["store", "stats", "disk"], 2, &["disk"]),
        (&["image", "warm"], 2, &["<IMAGE>"]),
        (&["image", "warm", "nosuch"], 1, &["there is no image `nosuch`", "hint: see which"]),
        (&["image", "warm", "disk", "--cache-size", "1MiB"], 2, &["too small: use at least 64 MiB"]),
        (&["image", "warm", "disk", "--cache-size", "much"], 2, &["`much`", "`unlimited`"]),
        (&["list", "--cache-size", ""], 2, &["--cache-size"]),
    ];
    for (args, status, says) in cases {
        let ran = home.run(args);
        println!("$ {}\n{}", ran.command, ran.stderr);
        assert_eq!(ran.status, Some(*status), "{ran}");
        assert!(says.iter().all(|part| ran.stderr.contains(part)), "expected {says:?} in {ran}");
        assert_eq!(home.state(), before, "{ran}");
    }
    assert!(!home.data().join("cache.json").exists());
}
