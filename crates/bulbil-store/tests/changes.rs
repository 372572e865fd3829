//! Imports of changes, compared with imports of the whole disk.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bulbil_store::{ChangedDisk, Digest, DiskSource, ImportObserver, ImportReport, SourceError, Store, StoreErrorKind};
use bulbil_types::{BLOCK_LEN, FRAME_LEN};

const BLOCKS: usize = 40 * 32;

/// A disk in memory, of which it is known where it was written to.
#[derive(Clone)]
struct Disk {
    bytes: Vec<u8>,
    written: Vec<Range<u64>>,
}

impl Disk {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.written.push(offset as u64..(offset + bytes.len()) as u64);
    }

    fn base(bytes: Vec<u8>) -> Self {
        Self { bytes, written: Vec::new() }
    }
}

impl DiskSource for Disk {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        Ok((offset < self.size_bytes()).then(|| offset..self.size_bytes()))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// A disk with its changes, and what was read of it.
struct Changes<'a> {
    disk: &'a Disk,
    read: Mutex<Vec<Range<u64>>>,
}

impl ChangedDisk for Changes<'_> {
    fn next_changed(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let after = self.disk.written.iter().filter(|range| range.end > offset);
        Ok(after.map(|range| range.start.max(offset)..range.end).min_by_key(|range| range.start))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.read.lock().unwrap().push(offset..offset + buf.len() as u64);
        self.disk.read_exact_at(buf, offset)
    }
}

struct Nobody;

impl ImportObserver for Nobody {
    fn progress(&self, done_bytes: u64, total_bytes: u64, _stored_bytes: u64) {
        assert!(done_bytes <= total_bytes);
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|i| if i % 3 == 0 { 0x55 } else { (self.next() >> 32) as u8 }).collect()
    }

    /// Runs of data and of zeroes.
    fn disk(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let run = (1 + self.below(90)) * BLOCK_LEN;
            let more = if self.below(2) == 0 { vec![0; run] } else { self.bytes(run) };
            bytes.extend(more);
        }
        bytes.truncate(len);
        bytes
    }
}

/// A copy of the base disk, grown now and then and changed at random.
fn changed(rng: &mut Rng, base: &Disk) -> Disk {
    let mut disk = Disk::base(base.bytes.clone());
    if rng.below(2) == 0 {
        disk.bytes.resize(base.bytes.len() + rng.below(300) * 512, 0);
    }
    for _ in 0..rng.below(12) {
        let offset = rng.below(disk.bytes.len() / BLOCK_LEN) * BLOCK_LEN;
        let longest = if rng.below(4) == 0 { 70 } else { 3 };
        let len = ((1 + rng.below(longest)) * BLOCK_LEN).min(disk.bytes.len() - offset);
        let bytes = match rng.below(4) {
            0 => vec![0; len],
            // What is there already, or was elsewhere.
            1 => disk.bytes[offset..offset + len].to_vec(),
            2 => base.bytes[..len.min(base.bytes.len())].to_vec(),
            _ => rng.bytes(len),
        };
        disk.write(offset, &bytes);
    }
    disk
}

fn store(path: &Path) -> Store {
    Store::open_or_create(path).unwrap()
}

fn import_changes(store: &Store, base: &Digest, disk: &Disk) -> (ImportReport, Vec<Range<u64>>) {
    let changes = Changes { disk, read: Mutex::default() };
    let report = store.import_changes(Some(base), disk.size_bytes(), &changes, &Nobody).unwrap();
    (report, changes.read.into_inner().unwrap())
}

fn read_back(store: &Store, digest: &Digest) -> Vec<u8> {
    let manifest = store.manifest(digest).unwrap();
    let mut bytes = vec![0; (manifest.size_bytes() as usize).next_multiple_of(BLOCK_LEN)];
    for extent in manifest.extents() {
        for index in 0..extent.blocks {
            let at = extent.block_in_pack + index;
            let frame = store.read_frame(&manifest.packs()[extent.pack as usize], at / 32).unwrap();
            let block = &frame[(at % 32) as usize * BLOCK_LEN..][..BLOCK_LEN];
            assert!(block.iter().any(|byte| *byte != 0), "a zero block is stored");
            bytes[(extent.first_block + u64::from(index)) as usize * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(block);
        }
    }
    let past_end = bytes.split_off(manifest.size_bytes() as usize);
    assert!(past_end.iter().all(|byte| *byte == 0));
    bytes
}

fn leaves_path(directory: &Path, digest: &Digest) -> PathBuf {
    directory.join("attachments/leaves").join(digest.to_hex())
}

/// Compares a chain of changes with whole imports; `spoil` does something to the leaves in between.
fn check_chain(seed: u64, spoil: impl Fn(&mut Rng, &Path)) {
    let mut rng = Rng(seed * 2 + 0x9e37_79b9);
    let (dir, whole_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, whole) = (store(dir.path()), store(whole_dir.path()));
    let len = (BLOCKS / 4 + rng.below(BLOCKS)) * BLOCK_LEN + rng.below(8) * 512;
    let mut base = Disk::base(rng.disk(len));
    let mut digest = store.import(&base, &Nobody).unwrap().digest;
    for step in 0..4 {
        spoil(&mut rng, &leaves_path(dir.path(), &digest));
        let disk = changed(&mut rng, &base);
        let (report, _) = import_changes(&store, &digest, &disk);
        let expected = whole.import(&disk, &Nobody).unwrap();
        assert_eq!(report.digest, expected.digest, "seed {seed}, step {step}");
        assert_eq!(report.data_bytes, expected.data_bytes, "seed {seed}, step {step}");
        assert!(read_back(&store, &report.digest) == disk.bytes, "seed {seed}, step {step}");
        let leaves = [dir.path(), whole_dir.path()].map(|d| std::fs::read(leaves_path(d, &report.digest)).unwrap());
        assert!(leaves[0] == leaves[1], "seed {seed}, step {step}");
        (base, digest) = (disk, report.digest);
    }
}

#[test]
fn changes_of_random_disks_give_the_digest_of_the_whole() {
    for seed in 1..13 {
        check_chain(seed, |_, _| ());
    }
}

#[test]
fn missing_and_damaged_leaves_cost_time_only() {
    for seed in 100..108 {
        check_chain(seed, |rng, path| match rng.below(3) {
            0 => std::fs::remove_file(path).unwrap(),
            1 => {
                let mut bytes = std::fs::read(path).unwrap();
                let at = rng.below(bytes.len());
                bytes[at] ^= 4;
                std::fs::remove_file(path).unwrap();
                std::fs::File::create(path).and_then(|mut f| std::io::Write::write_all(&mut f, &bytes)).unwrap();
            }
            _ => {}
        });
    }
}

#[test]
fn only_windows_with_changes_are_read_and_only_new_blocks_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut rng = Rng(7);
    let base = Disk::base(rng.bytes(64 * FRAME_LEN));
    let digest = store.import(&base, &Nobody).unwrap().digest;
    let mut disk = Disk::base(base.bytes.clone());
    for window in [0, 17, 18, 63] {
        disk.write(window * FRAME_LEN + 5 * BLOCK_LEN, &rng.bytes(BLOCK_LEN));
    }
    let (report, read) = import_changes(&store, &digest, &disk);
    assert_eq!(report.new_bytes, 4 * BLOCK_LEN as u64);
    let read_bytes: u64 = read.iter().map(|range| range.end - range.start).sum();
    assert_eq!(read_bytes, 4 * FRAME_LEN as u64);
    let windows = store.manifest(&report.digest).unwrap().extents().len();
    assert!(windows <= 9, "{windows} extents");
}

#[test]
fn no_change_is_the_same_content_and_a_larger_size_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let base = Disk::base(Rng(3).disk(30 * FRAME_LEN + 512));
    let digest = store.import(&base, &Nobody).unwrap().digest;
    let (same, read) = import_changes(&store, &digest, &base);
    assert!(same.existed && same.digest == digest && read.is_empty());
    let mut grown = base.clone();
    grown.bytes.resize(base.bytes.len() + 5 * FRAME_LEN, 0);
    let (report, read) = import_changes(&store, &digest, &grown);
    assert!(read.is_empty() && report.new_bytes == 0);
    assert!(read_back(&store, &report.digest) == grown.bytes);
    let changes = Changes { disk: &base, read: Mutex::default() };
    let smaller = store.import_changes(Some(&digest), base.size_bytes() - 512, &changes, &Nobody);
    assert_eq!(smaller.unwrap_err().kind(), StoreErrorKind::Source);
    let unknown = Digest::from_bytes([1; 32]);
    let nothing = store.import_changes(Some(&unknown), base.size_bytes(), &changes, &Nobody);
    assert_eq!(nothing.unwrap_err().kind(), StoreErrorKind::NotFound);
}

#[test]
fn changes_of_a_disk_of_zeroes_are_a_whole_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut disk = Disk::base(vec![0; 10 * FRAME_LEN]);
    disk.write(3 * FRAME_LEN, &Rng(5).bytes(2 * BLOCK_LEN));
    let changes = Changes { disk: &disk, read: Mutex::default() };
    let report = store.import_changes(None, disk.size_bytes(), &changes, &Nobody).unwrap();
    assert_eq!(report.digest, store.import(&disk, &Nobody).unwrap().digest);
    assert!(read_back(&store, &report.digest) == disk.bytes);
}
