//! Overlays of every format version that was ever written are read for ever; the layout of the base cache is the one
//! that is documented.
//!
//! `fixtures/` was written by [`write_the_overlays`] with the first program that had the format, and is never changed.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_store::{Digest, DirObjects, OwnerId, Store, StoreKey, StoreOptions};
use bulbil_testkit::{MemoryDisk, tagged};
use bulbil_types::{BLOCK_LEN, VolumeId};
use bulbil_volume::{BaseCache, BlockDevice as _, Volume, VolumeDirectory};

const BLOCKS: usize = 12;
const FRAME_LEN: usize = 128 << 10;

fn id() -> VolumeId {
    "vol-0123456789abcdef0".parse().unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Every file below a directory that is more than a note of this boot, by its path in it.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if !path.ends_with("map.live") {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn put(path: &Path, bytes: &[u8]) {
    std::fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

fn copy(from: &Path, to: &Path) {
    for (path, bytes) in files(from) {
        let target = to.join(path);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        put(&target, &bytes);
    }
}

fn plain_store(directory: &Path) -> Arc<Store> {
    Arc::new(Store::open_or_create(&directory.join("store")).unwrap())
}

/// A copy of the encrypted store whose bytes the store's own tests keep.
fn encrypted_store(directory: &Path) -> Arc<Store> {
    let store = directory.join("store");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../bulbil-store/tests/fixtures/encrypted-v1"), &store);
    let options = StoreOptions::new(&directory.join("index"), OwnerId::default());
    let options = options.with_key(StoreKey::from_bytes([0x42; 32]));
    Arc::new(Store::open(Arc::new(DirObjects::open(&store).unwrap()), options).unwrap())
}

fn open(directory: &Path, store: &Arc<Store>) -> Volume {
    let cache = Arc::new(BaseCache::open(&directory.join("cache")).unwrap());
    VolumeDirectory::open(&directory.join("volumes")).unwrap().open_volume(&id(), store, &cache).unwrap()
}

fn content_of(volume: &Volume) -> Vec<u8> {
    let mut content = vec![0; volume.size_bytes() as usize];
    volume.read_at(&mut content, 0).unwrap();
    content
}

/// What is in layer 0 of the fixtures.
fn fill_first_layer(volume: &Volume) {
    volume.write_at(&tagged(1, 8), 0, false).unwrap();
    volume.write_at(&tagged(2, 24), 3 * BLOCK_LEN as u64, false).unwrap();
    volume.write_zeroes(4 * BLOCK_LEN as u64, BLOCK_LEN as u64, false).unwrap();
    volume.flush().unwrap();
}

/// What is in the layer above.
fn fill_second_layer(volume: &Volume) {
    volume.write_at(&tagged(5, 8), 3 * BLOCK_LEN as u64, false).unwrap();
    volume.discard(0, BLOCK_LEN as u64, false).unwrap();
    // A part of a block: the rest is that of the layer below.
    volume.write_at(&tagged(7, 4), 5 * BLOCK_LEN as u64, false).unwrap();
    volume.flush().unwrap();
}

/// The content of the overlays: of layer 0 alone, or of both.
fn expected(layers: usize) -> Vec<u8> {
    let mut content = vec![0; BLOCKS * BLOCK_LEN];
    let mut put = |at: usize, bytes: Vec<u8>| content[at..at + bytes.len()].copy_from_slice(&bytes);
    put(0, tagged(1, 8));
    put(3 * BLOCK_LEN, tagged(2, 24));
    put(4 * BLOCK_LEN, vec![0; BLOCK_LEN]);
    if layers == 2 {
        put(3 * BLOCK_LEN, tagged(5, 8));
        put(0, vec![0; BLOCK_LEN]);
        put(5 * BLOCK_LEN, tagged(7, 4));
    }
    content
}

/// Writes a volume of two layers; its directory holds its record already.
fn write(directory: &Path, store: &Arc<Store>) {
    let volume = open(directory, store);
    fill_first_layer(&volume);
    drop(volume.freeze().unwrap());
    fill_second_layer(&volume);
}

fn check_read(name: &str, layers: usize, store: fn(&Path) -> Arc<Store>) {
    let directory = tempfile::tempdir().unwrap();
    let volumes = directory.path().join("volumes").join(id().as_str());
    copy(&fixture(name), &volumes);
    let store = store(directory.path());
    assert!(content_of(&open(directory.path(), &store)) == expected(layers), "{name}");
    assert_eq!(files(&volumes), files(&fixture(name)), "reading changes nothing");
    let volume = open(directory.path(), &store);
    volume.write_at(&tagged(9, 8), 0, true).unwrap();
    drop(volume);
    assert!(content_of(&open(directory.path(), &store))[..BLOCK_LEN] == tagged(9, 8), "{name} can be written to");
}

#[test]
fn an_overlay_of_version_1_is_read() {
    check_read("overlay-v1", 1, plain_store);
}

#[test]
fn an_overlay_of_version_2_is_read() {
    check_read("overlay-v2", 2, plain_store);
}

#[test]
fn an_encrypted_overlay_is_read() {
    check_read("overlay-encrypted-v2", 2, encrypted_store);
}

#[test]
fn what_is_written_now_is_byte_for_byte_what_was_written_then() {
    for (name, kept, store) in [
        ("overlay-v2", &["volume.json"][..], plain_store as fn(&Path) -> Arc<Store>),
        ("overlay-encrypted-v2", &["volume.json", "cipher"][..], encrypted_store),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volumes").join(id().as_str());
        std::fs::create_dir_all(&volume).unwrap();
        for file in kept {
            std::fs::copy(fixture(name).join(file), volume.join(file)).unwrap();
        }
        let record = std::fs::read_to_string(volume.join("volume.json")).unwrap();
        put(&volume.join("volume.json"), record.replace("[1,0]", "[0]").as_bytes());
        write(directory.path(), &store(directory.path()));
        assert_eq!(files(&volume), files(&fixture(name)), "{name}");
    }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim_end().to_owned()
}

/// A live map as docs/formats/overlay.md has it, that says of block 1 that it is data, of block 3 that it is zero.
fn live_map(boot_id: &str) -> Vec<u8> {
    let mut bytes = [b"BULBLIVE", &1_u32.to_le_bytes()[..], boot_id.as_bytes()].concat();
    bytes.resize(4096, 0);
    bytes.push(0b1000_0100);
    bytes
}

#[test]
fn what_a_killed_process_has_left_is_taken_over_within_a_boot_only() {
    let other_boot = boot_id().chars().rev().collect::<String>();
    for (boot_id, taken) in [(boot_id(), true), (other_boot, false)] {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volumes").join(id().as_str());
        copy(&fixture("overlay-v2"), &volume);
        put(&volume.join("layer.1/map.live"), &live_map(&boot_id));
        let mut content = expected(2);
        if taken {
            // Whatever the file has there: nothing, since the fixture has nothing.
            content[BLOCK_LEN..2 * BLOCK_LEN].fill(0);
            content[3 * BLOCK_LEN..4 * BLOCK_LEN].fill(0);
        }
        let store = plain_store(directory.path());
        assert!(content_of(&open(directory.path(), &store)) == content, "taken: {taken}");
        std::fs::remove_file(volume.join("layer.1/map.live")).unwrap();
        assert!(content_of(&open(directory.path(), &store)) == content, "it is in the map now");
    }
}

/// What is written is there for whoever comes next in the layout that is documented.
#[test]
fn a_change_is_in_the_live_map_before_the_write_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let volumes = VolumeDirectory::open(&directory.path().join("volumes")).unwrap();
    volumes.create(&id(), (BLOCKS * BLOCK_LEN) as u64, None).unwrap();
    let volume = open(directory.path(), &plain_store(directory.path()));
    volume.write_at(&tagged(1, 16), BLOCK_LEN as u64, false).unwrap();
    volume.write_at(&tagged(1, 16), 3 * BLOCK_LEN as u64, false).unwrap();
    volume.write_zeroes(2 * BLOCK_LEN as u64, 2 * BLOCK_LEN as u64, false).unwrap();
    let path = directory.path().join("volumes").join(id().as_str()).join("map.live");
    let mut expected = live_map(&boot_id());
    expected[4096] = 0b1010_0100;
    expected.push(0b01);
    assert!(std::fs::read(&path).unwrap() == expected);
    volume.flush().unwrap();
    drop(volume);
    assert!(std::fs::read(&path).unwrap()[..48] == [0; 48], "nothing is left to be taken over");
}

/// The file that the base cache has made.
fn cache_file(directory: &Path) -> PathBuf {
    let mut found = std::fs::read_dir(directory.join("cache")).unwrap().map(|entry| entry.unwrap().path());
    found.find(|path| path.extension().is_some_and(|e| e == "frames")).unwrap()
}

/// The first 8 KiB of a file of the base cache, as docs/formats/base-cache.md has it.
fn cache_head(flags: u32, frames: usize) -> Vec<u8> {
    let mut head = [b"BULBBASE", &2_u32.to_le_bytes()[..], boot_id().as_bytes()].concat();
    head.extend(flags.to_le_bytes());
    head.resize(4096, 0);
    head.extend(vec![1; frames]);
    head.resize(8192, 0);
    head
}

#[test]
fn the_base_cache_is_written_and_read_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let store = plain_store(directory.path());
    let image = MemoryDisk((0..64).flat_map(|block| tagged(100 + block, 8)).collect());
    let digest = store.import(&image, &image).unwrap().digest;
    let volume = || {
        let cache = Arc::new(BaseCache::open(&directory.path().join("cache")).unwrap());
        let overlay = Arc::new(bulbil_volume::HostDirectory::new(&directory.path().join("overlay")));
        let manifest = store.manifest(&digest).unwrap();
        Volume::over_image(image.0.len() as u64, manifest, &store, &cache, overlay).unwrap()
    };
    let first = volume();
    assert!(content_of(&first) == image.0);
    let expected = [&cache_head(0, 2)[..], &image.0].concat();
    // Frames are written after the reads that fetched them.
    let path = cache_file(directory.path());
    wait_until("the layout has changed", || std::fs::read(&path).unwrap() == expected);
    drop(first);
    let other: Vec<u8> = (0..64).flat_map(|block| tagged(900 + block, 8)).collect();
    put(&path, &[&cache_head(0, 2)[..], &other].concat());
    assert!(content_of(&volume()) == other, "what a file of this layout holds is what is read");
    assert_eq!(other.len(), 2 * FRAME_LEN);
}

/// Files of the base cache, and BLAKE3 of their first frames.
const ENCRYPTED_FRAMES: [(&str, &str); 2] = [
    ("a5b93813381732fd55bae497db2ae8a5.frames", "50610b1e4a8f0e4efbe85beaee085c488a9d53776855b92f90d6874e0cc3243d"),
    ("b06347d820705d7207a2a225816f5973.frames", "9a191a8cdf48d29a11f20bdbe8d468613ec52649e43dbe7c26c89d251a38bce0"),
];

#[test]
fn the_base_cache_of_an_encrypted_store_is_written_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let store = encrypted_store(directory.path());
    let digest: Digest = store.digests().unwrap()[0];
    let cache = Arc::new(BaseCache::open(&directory.path().join("cache")).unwrap());
    let volumes = VolumeDirectory::open(&directory.path().join("volumes")).unwrap();
    let manifest = store.manifest(&digest).unwrap();
    volumes.create(&id(), manifest.size_bytes(), Some(&manifest)).unwrap();
    let volume = volumes.open_volume(&id(), &store, &cache).unwrap();
    content_of(&volume);
    let expected = ENCRYPTED_FRAMES.map(|(name, hash)| (name.to_owned(), hash.to_owned()));
    wait_until("the layout has changed", || hashes_of_frames(&directory.path().join("cache")) == expected);
}

fn hashes_of_frames(cache: &Path) -> Vec<(String, String)> {
    let frames = files(cache).into_iter().filter(|(name, _)| name.extension().is_some_and(|e| e == "frames"));
    let hash = |(name, bytes): (PathBuf, Vec<u8>)| {
        assert_eq!(bytes[..4096], cache_head(1, 0)[..4096]);
        (name.display().to_string(), blake3::hash(&bytes[8192..8192 + FRAME_LEN]).to_hex().to_string())
    };
    frames.map(hash).collect()
}

fn wait_until(otherwise: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{otherwise}");
        std::thread::yield_now();
    }
}

/// Writes the fixtures of the current format version; for a new version, in new directories.
#[test]
#[ignore = "writes fixtures that are then kept for ever"]
fn write_the_overlays() {
    for (name, store) in
        [("overlay-v2", plain_store as fn(&Path) -> Arc<Store>), ("overlay-encrypted-v2", encrypted_store)]
    {
        assert!(!fixture(name).exists(), "{name} is never written again");
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path());
        let volumes = VolumeDirectory::open(&directory.path().join("volumes")).unwrap();
        volumes.create(&id(), (BLOCKS * BLOCK_LEN) as u64, None).unwrap();
        write(directory.path(), &store);
        copy(&directory.path().join("volumes").join(id().as_str()), &fixture(name));
    }
}
