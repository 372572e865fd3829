//! Stores of every format version that was ever written are read for ever.
//!
//! `fixtures/v1` was written by [`write_the_store`] with the first version of the format and is
//! never changed. It holds two disks, whose content this file knows how to make.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "helpers of tests are tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bulbil_store::{Digest, ImportReport, Store, StoreUsage};
use bulbil_testkit::MemoryDisk;
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

const FIRST: &str = "sha256:8691a3a4a2ff44b8e82ade5556c9cc35f6edc82c518b788a69e5de94de8bdb38";
const SECOND: &str = "sha256:da5af69481b1f0c058c44ada36ba8cf6c09d39e68a352a3b0e0c2657e3c7170a";

/// Blocks that compress, each another one.
fn text(first: u32, blocks: u32) -> Vec<u8> {
    let block = |number| format!("block {number} of a disk that is read for ever\n").into_bytes();
    (first..first + blocks).flat_map(|number| block(number).into_iter().cycle().take(BLOCK_LEN)).collect()
}

/// Blocks that do not compress (xorshift64).
fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(blocks * BLOCK_LEN).collect()
}

/// A frame that compresses, a hole, a frame that does not compress, a block that is there twice, a
/// hole at the end.
fn first_disk() -> MemoryDisk {
    let mut bytes = text(0, 32);
    bytes.resize(300 << 10, 0);
    bytes.extend(noise(1, 7));
    bytes.extend(text(3, 1));
    bytes.resize(2 << 20, 0);
    MemoryDisk(bytes)
}

/// Blocks of the first disk at other places, blocks of its own, and an end within a block.
fn second_disk() -> MemoryDisk {
    let mut bytes = text(100, 3);
    bytes.extend(text(8, 20));
    bytes.resize(1 << 20, 0);
    bytes.extend(&noise(1, 7)[2 * BLOCK_LEN..]);
    bytes.extend(noise(2, 2));
    bytes.extend(&text(200, 1)[..1536]);
    MemoryDisk(bytes)
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1")
}

/// Every file below a directory, by its path in it.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// A copy of the store, in which nothing that was stored can be written to.
fn copy_of_fixture() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for path in files(&fixture()).keys() {
        let target = copy.path().join(path);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(fixture().join(path), &target).unwrap();
        let mut permissions = target.metadata().unwrap().permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(&target, permissions).unwrap();
    }
    copy
}

/// Reads a disk by its manifest, frame after frame.
fn read_disk(store: &Store, digest: &Digest) -> Vec<u8> {
    let manifest = store.manifest(digest).unwrap();
    let mut bytes = vec![0; manifest.size_bytes().next_multiple_of(BLOCK_BYTES) as usize];
    for extent in manifest.extents() {
        for index in 0..extent.blocks {
            let at = (extent.block_in_pack + index) as usize;
            let frame = store.read_frame(&manifest.packs()[extent.pack as usize], (at / 32) as u32).unwrap();
            let block = &frame[at % 32 * BLOCK_LEN..][..BLOCK_LEN];
            bytes[(extent.first_block + u64::from(index)) as usize * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(block);
        }
    }
    let past_end = bytes.split_off(manifest.size_bytes() as usize);
    assert!(past_end.iter().all(|byte| *byte == 0));
    bytes
}

fn import(store: &Store, disk: &MemoryDisk) -> ImportReport {
    store.import(disk, disk).unwrap()
}

fn known_disks() -> [(Digest, MemoryDisk); 2] {
    [(FIRST.parse().unwrap(), first_disk()), (SECOND.parse().unwrap(), second_disk())]
}

#[test]
fn a_store_of_version_1_is_read() {
    let copy = copy_of_fixture();
    let store = Store::open_or_create(copy.path()).unwrap();
    let mut digests = store.digests().unwrap();
    digests.sort_by_key(ToString::to_string);
    let mut expected = known_disks().map(|(digest, _)| digest);
    expected.sort_by_key(ToString::to_string);
    assert_eq!(digests, expected);
    for (digest, disk) in known_disks() {
        assert!(read_disk(&store, &digest) == disk.0, "{digest}");
    }
    let usage = store.usage().unwrap();
    assert_eq!((usage.packs, usage.manifests), (2, 2));
    assert_eq!(files(copy.path()), files(&fixture()), "reading changes nothing");
}

#[test]
fn a_store_of_version_1_recognises_its_content() {
    let copy = copy_of_fixture();
    let store = Store::open_or_create(copy.path()).unwrap();
    let before = store.usage().unwrap();
    for (digest, disk) in known_disks() {
        let report = import(&store, &disk);
        assert_eq!((report.digest, report.existed, report.stored_bytes), (digest, true, 0));
    }
    assert_eq!(store.usage().unwrap(), before);
    let moved = MemoryDisk([text(8, 20), text(300, 1), noise(2, 2)].concat());
    let report = import(&store, &moved);
    assert_eq!(report.new_bytes, BLOCK_BYTES, "blocks of old packs are not stored again");
    assert!(read_disk(&store, &report.digest) == moved.0);
}

#[test]
fn a_store_of_version_1_is_swept() {
    let copy = copy_of_fixture();
    let store = Store::open_or_create(copy.path()).unwrap();
    let [(first, _), (second, second_disk)] = known_disks();
    assert_eq!(store.sweep().unwrap(), 0);
    store.remove_manifest(&first).unwrap();
    assert_eq!(store.sweep().unwrap(), 0, "the second disk has blocks in both packs");
    assert!(read_disk(&store, &second) == second_disk.0);
    store.remove_manifest(&second).unwrap();
    store.sweep().unwrap();
    assert_eq!(store.usage().unwrap(), StoreUsage::default());
}

/// Writes the fixture of the current format version; for a new version, in a new directory.
#[test]
#[ignore = "writes a fixture that is then kept for ever"]
fn write_the_store() {
    let target = fixture();
    assert!(!target.exists(), "{} is never written again", target.display());
    let store = Store::open_or_create(&target).unwrap();
    for (disk, digest) in [(first_disk(), FIRST), (second_disk(), SECOND)] {
        assert_eq!(import(&store, &disk).digest.to_string(), digest);
    }
    // What is rebuilt from the rest.
    for directory in ["index", "tmp"] {
        std::fs::remove_dir_all(target.join(directory)).unwrap();
    }
}
