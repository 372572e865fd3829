//! The states of a disk that are kept in a qcow2 image are read as `qemu-img` reads them.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;
use std::sync::Arc;

use bulbil_format::{Disk, FormatError, OpenOptions, open_disk};
use support::{Rng, check_content, content, run, write_sparse};

const SEED: u64 = 0x5eed_0004;
const DISK_BYTES: u64 = 2 << 20;

/// Makes an image of which each state has its own content: `one`, `two`, and the current one.
fn image_with_snapshots(dir: &Path, seed: u64, options: &str) -> String {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (raw, image) = (path("disk.raw"), path("disk.qcow2"));
    let mut rng = Rng(seed);
    write_sparse(Path::new(&raw), &content(&mut rng, usize::try_from(DISK_BYTES).unwrap()));
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &image]);
    for name in ["one", "two"] {
        run("qemu-img", &["snapshot", "-c", name, &image]);
        for _ in 0..6 {
            let (offset, len) = (rng.below(DISK_BYTES / 512 - 200) * 512, (1 + rng.below(200)) * 512);
            let command = match rng.below(3) {
                0 => format!("write -z -u {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", 1 + rng.below(255)),
            };
            run("qemu-io", &["-f", "qcow2", "-d", "unmap", "-c", &command, &image]);
        }
    }
    image
}

fn open(bytes: &[u8], snapshot: &str) -> Result<Box<dyn Disk>, FormatError> {
    let options = OpenOptions { snapshot: Some(snapshot.to_owned()), ..OpenOptions::default() };
    open_disk(Arc::new(bytes.to_vec()), &options)
}

#[test]
fn every_snapshot_is_read_by_name_and_by_id() {
    for (seed, options) in (SEED..).zip(["compat=0.10", "compat=1.1", "cluster_size=512", "extended_l2=on"]) {
        println!("{options}: seed {seed:#x}");
        let dir = tempfile::tempdir().unwrap();
        let image = image_with_snapshots(dir.path(), seed, options);
        let bytes = std::fs::read(&image).unwrap();
        let raw = dir.path().join("state.raw");
        let mut states = Vec::new();
        for (id, name) in [("1", "one"), ("2", "two")] {
            run("qemu-img", &["convert", "-l", name, "-f", "qcow2", "-O", "raw", &image, raw.to_str().unwrap()]);
            let expected = std::fs::read(&raw).unwrap();
            for wanted in [id, name] {
                check_content(&*open(&bytes, wanted).unwrap(), &expected);
            }
            states.push(expected);
        }
        assert!(states[0] != states[1], "the test needs states that differ");
    }
}

#[test]
fn snapshots_are_listed_with_their_sizes_and_times() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let image = image.to_str().unwrap();
    let start = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    run("qemu-img", &["create", "-f", "qcow2", image, "1M"]);
    run("qemu-img", &["snapshot", "-c", "žlutý", image]);
    run("qemu-img", &["resize", image, "3M"]);
    run("qemu-img", &["snapshot", "-c", "", image]);
    let bytes = std::fs::read(image).unwrap();
    let listed = support::open_bytes(&bytes, None).unwrap().info().snapshots;
    let found: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str(), s.size_bytes)).collect();
    assert_eq!(found, [("1", "žlutý", 1 << 20), ("2", "", 3 << 20)]);
    assert!(listed.iter().all(|snapshot| (start - 1..start + 600).contains(&snapshot.created_unix_s)));
    assert_eq!(open(&bytes, "žlutý").unwrap().size_bytes(), 1 << 20);
    assert_eq!(open(&bytes, "2").unwrap().size_bytes(), 3 << 20);
}

#[test]
fn a_name_that_does_not_choose_one_snapshot_is_refused_with_the_choice() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let image = image.to_str().unwrap();
    let error = |wanted: &str| {
        let error = open(&std::fs::read(image).unwrap(), wanted).unwrap_err();
        assert_eq!(error.code(), "no-such-snapshot");
        error.to_string()
    };
    run("qemu-img", &["create", "-f", "qcow2", image, "1M"]);
    assert_eq!(error("one"), r#"no-such-snapshot: "one"; the image has none"#);
    for name in ["2", "twin", "twin"] {
        run("qemu-img", &["snapshot", "-c", name, image]);
    }
    let all = r#""2" (id "1"), "twin" (id "2"), "twin" (id "3")"#;
    assert_eq!(error("one"), format!(r#"no-such-snapshot: "one"; the image has {all}"#));
    assert!(error("twin").ends_with(r#"the image has several: "twin" (id "2"), "twin" (id "3")"#));
    // The name of one, the id of another: QEMU itself answers this in two ways.
    assert!(error("2").ends_with(r#"the image has several: "2" (id "1"), "twin" (id "2")"#));
    for only in ["1", "3"] {
        assert!(open(&std::fs::read(image).unwrap(), only).is_ok());
    }
    for number in 4..30 {
        run("qemu-img", &["snapshot", "-c", &format!("n{number}"), image]);
    }
    assert!(error("one").ends_with(" and 9 more"));
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn index_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64_at(bytes, at) & OFFSET).unwrap()
}

fn poked(bytes: &[u8], at: usize, poke: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + poke.len()].copy_from_slice(poke);
    bytes
}

#[test]
fn damaged_snapshot_tables_are_refused() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let image = std::fs::read(image_with_snapshots(dir.path(), SEED, "cluster_size=4k")).unwrap();
    let table = index_at(&image, 64);
    let (active_l1, reftable) = (u64_at(&image, 40), u64_at(&image, 48));
    let second_l1 = u64_at(&image, (table + 40 + 24 + 1 + 3).next_multiple_of(8));
    for (at, poke, message) in [
        (60, &65536_u32.to_be_bytes()[..], "truncated at byte"),
        (60, &65537_u32.to_be_bytes(), "corrupt: snapshot table too large: 65537 snapshots"),
        (64, &[0; 8], "corrupt: snapshot table at 0x0 is not at a cluster"),
        (64, &(table as u64 + 8).to_be_bytes(), "corrupt: snapshot table at "),
        (64, &(image.len() as u64).next_multiple_of(4096).to_be_bytes(), "truncated at byte"),
        (64, &[0xff; 8], "corrupt: table at 0xffffffffffffffff does not end"),
        // The L1 table of the first snapshot: outside, not at a cluster, without end, too large, used twice.
        (table, &(1_u64 << 50).to_be_bytes(), "truncated at byte"),
        (table, &0_u64.to_be_bytes(), "corrupt: L1 table of snapshot 1 at 0x0 is not at a cluster"),
        (table, &0x1200_u64.to_be_bytes(), "corrupt: L1 table of snapshot 1 at 0x1200 is not at a cluster"),
        (table, &[0xff; 8], "corrupt: table at 0xffffffffffffffff does not end"),
        (table, &active_l1.to_be_bytes(), "corrupt: cluster 0x"),
        (table, &reftable.to_be_bytes(), "corrupt: cluster 0x"),
        (table, &(table as u64).to_be_bytes(), "corrupt: cluster 0x"),
        (table, &second_l1.to_be_bytes(), "corrupt: cluster 0x"),
        (table + 8, &u32::MAX.to_be_bytes(), "corrupt: L1 table of snapshot 1 too large: 34359738360 bytes"),
        (table + 8, &(4_u32 << 20).to_be_bytes(), "truncated at byte"),
        // Lengths of the id, the name and the extra data.
        (table + 12, &1024_u16.to_be_bytes(), "too-large: the name or id of snapshot 1 is over the limit of 1023"),
        (table + 14, &u16::MAX.to_be_bytes(), "too-large: the name or id of snapshot 1 is over the limit of 1023"),
        (table + 36, &1025_u32.to_be_bytes(), "corrupt: snapshot 1 has 1025 bytes of extra data"),
        (table + 36, &u32::MAX.to_be_bytes(), "corrupt: snapshot 1 has 4294967295 bytes of extra data"),
    ] {
        let damaged = poked(&image, at, poke);
        // A damaged table is refused even if nobody asks for a snapshot.
        for opened in [support::open_bytes(&damaged, None), open(&damaged, "one")] {
            let error = opened.map(|_| ()).expect_err(message).to_string();
            assert!(error.starts_with(message), "expected: {message}\n   found: {error}");
        }
    }
    let error = support::open_bytes(&image[..table + 100], None).unwrap_err();
    assert!(error.to_string().contains("the snapshot table ends at byte"), "{error}");
}

#[test]
fn the_tree_of_the_chosen_snapshot_is_checked_as_that_of_the_current_state() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let image = std::fs::read(image_with_snapshots(dir.path(), SEED, "cluster_size=4k")).unwrap();
    let table = index_at(&image, 64);
    let l1 = index_at(&image, table);
    let l2 = index_at(&image, l1);
    let stored = (0..512).map(|n| l2 + 8 * n).find(|at| u64_at(&image, *at) & OFFSET != 0).unwrap();
    let first = u64_at(&image, stored);
    for (at, word, message) in [
        (table + 8, 0, "corrupt: L1 table too small: 0 of 1 entries"),
        (table + 40 + 8, 0, "virtual-size: 0 bytes is an empty disk"),
        (table + 40 + 8, u64::MAX, "virtual-size: 18446744073709551615 bytes is more than"),
        (table + 40 + 8, 1 << 30, "corrupt: L1 table too small: 1 of 512 entries"),
        (l1, 1 << 50, "truncated at byte"),
        (l1, l1 as u64, "corrupt: cluster 0x"),
        (l1, u64_at(&image, l1) | 1, "corrupt: L1 entry for disk offset 0x0: reserved bits are set"),
        (stored, 1 << 50, "truncated at byte"),
        (stored + 8, first, "corrupt: cluster 0x"),
        (stored, first & OFFSET | 2, "corrupt: L2 entry for disk offset"),
        (stored, l1 as u64, "corrupt: cluster 0x"),
        (stored, table as u64, "corrupt: cluster 0x"),
    ] {
        let poke = word.to_be_bytes();
        let damaged = poked(&image, at, if at == table + 8 { &poke[4..] } else { &poke });
        let error = open(&damaged, "one").unwrap_err().to_string();
        assert!(error.starts_with(message), "expected: {message}\n   found: {error}");
    }
}
