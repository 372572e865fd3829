//! Imports through the public interface, read back and compared with what went in.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bulbil_store::{
    Digest, DigestBuilder, DiskSource, ImportObserver, ImportReport, SourceError, Store, StoreError, StoreErrorKind,
    window_leaf,
};
use bulbil_types::{BLOCK_LEN, FRAME_LEN};

/// A disk in memory: pieces of data on a background of zeroes.
#[derive(Clone, Default)]
struct Disk {
    size_bytes: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    fail_at: Option<u64>,
    panics: bool,
}

impl DiskSource for Disk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let next = self.pieces.iter().map(|(start, bytes)| *start..start + bytes.len() as u64);
        Ok(next.filter(|range| range.end > offset).min_by_key(|range| range.start).map(|r| r.start.max(offset)..r.end))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        buf.fill(0);
        let wanted = offset..offset + buf.len() as u64;
        if self.fail_at.is_some_and(|at| wanted.contains(&at)) {
            assert!(!self.panics, "as told");
            return Err("bad sector".into());
        }
        for (start, bytes) in &self.pieces {
            let from = wanted.start.max(*start);
            let to = wanted.end.min(start + bytes.len() as u64);
            if from < to {
                let source = &bytes[(from - start) as usize..(to - start) as usize];
                buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Observer {
    calls: AtomicU64,
    cancel_after: Option<u64>,
}

impl ImportObserver for Observer {
    fn progress(&self, done_bytes: u64, total_bytes: u64, _stored_bytes: u64) {
        assert!(done_bytes <= total_bytes);
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel_after.is_some_and(|limit| self.calls.load(Ordering::Relaxed) >= limit)
    }
}

/// A small generator of reproducible, moderately compressible bytes.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|i| if i % 3 == 0 { 0x55 } else { (self.next() >> 32) as u8 }).collect()
    }
}

fn import(store: &Store, disk: &Disk) -> Result<ImportReport, StoreError> {
    store.import(disk, &Observer::default())
}

fn expected_digest(disk: &Disk) -> Digest {
    let mut builder = DigestBuilder::new(disk.size_bytes);
    let mut window = vec![0; FRAME_LEN];
    for index in 0..disk.size_bytes.div_ceil(FRAME_LEN as u64) {
        let start = index * FRAME_LEN as u64;
        let len = (disk.size_bytes - start).min(FRAME_LEN as u64) as usize;
        disk.clone_without_faults().read_exact_at(&mut window[..len], start).unwrap();
        if window[..len].iter().any(|b| *b != 0) {
            builder.push(index, window_leaf(&window[..len]));
        }
    }
    builder.finish()
}

impl Disk {
    fn clone_without_faults(&self) -> Self {
        Self { fail_at: None, ..self.clone() }
    }
}

/// Reads every block through the manifest and compares it with the disk.
fn check_content(store: &Store, digest: &Digest, disk: &Disk) {
    let manifest = store.manifest(digest).unwrap();
    assert_eq!(manifest.size_bytes(), disk.size_bytes);
    let mut next_block = 0;
    let mut expected = vec![0; BLOCK_LEN];
    let read = |block: u64, expected: &mut Vec<u8>| {
        expected.fill(0);
        let start = block * BLOCK_LEN as u64;
        let len = (disk.size_bytes - start).min(BLOCK_LEN as u64) as usize;
        disk.read_exact_at(&mut expected[..len], start).unwrap();
    };
    let mut last_frame = None;
    for extent in manifest.extents() {
        for block in next_block..extent.first_block {
            read(block, &mut expected);
            assert!(expected.iter().all(|b| *b == 0), "block {block} is not in the manifest");
        }
        for i in 0..extent.blocks {
            let at = extent.block_in_pack + i;
            if last_frame.as_ref().is_none_or(|(name, _)| *name != (extent.pack, at / 32)) {
                let frame = store.read_frame(&manifest.packs()[extent.pack as usize], at / 32).unwrap();
                last_frame = Some(((extent.pack, at / 32), frame));
            }
            let frame = &last_frame.as_ref().unwrap().1;
            let start = (at % 32) as usize * BLOCK_LEN;
            read(extent.first_block + u64::from(i), &mut expected);
            assert!(frame[start..start + BLOCK_LEN] == expected, "block {}", extent.first_block + u64::from(i));
        }
        next_block = extent.end_block();
    }
    for block in next_block..disk.size_bytes.div_ceil(BLOCK_LEN as u64) {
        read(block, &mut expected);
        assert!(expected.iter().all(|b| *b == 0), "block {block} is not in the manifest");
    }
}

fn store(path: &Path) -> Store {
    Store::open_or_create(path).unwrap()
}

fn sample(seed: u64) -> Disk {
    let mut noise = Noise(seed);
    let pieces = vec![
        (0, noise.bytes(3 * FRAME_LEN)),
        (5 << 20, noise.bytes(30 << 20)),
        ((40 << 20) + 512, noise.bytes(12_345)),
    ];
    Disk { size_bytes: (48 << 20) + 512, pieces, ..Disk::default() }
}

#[test]
fn a_disk_comes_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = sample(1);
    let report = import(&store, &disk).unwrap();
    assert_eq!(report.digest, expected_digest(&disk));
    assert!(!report.existed && report.stored_bytes > 0 && report.new_bytes == report.data_bytes);
    check_content(&store, &report.digest, &disk);
    let usage = store.usage().unwrap();
    assert_eq!(usage.pack_bytes + usage.manifest_bytes, report.stored_bytes);
    assert!(usage.packs >= 2, "30 MiB of noise is more than one pack");
}

#[test]
fn importing_the_same_content_again_adds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = sample(2);
    let first = import(&store, &disk).unwrap();
    let before = store.usage().unwrap();
    let mut cut_differently = disk.clone();
    let whole = cut_differently.pieces.remove(1);
    let (left, right) = whole.1.split_at(7 << 20);
    cut_differently.pieces.push((whole.0, left.to_vec()));
    cut_differently.pieces.push((whole.0 + left.len() as u64, right.to_vec()));
    let second = import(&store, &cut_differently).unwrap();
    assert!(second.existed && second.stored_bytes == 0);
    assert_eq!(second.digest, first.digest);
    assert_eq!(store.usage().unwrap(), before);
}

#[test]
fn moved_blocks_are_not_stored_again_even_by_a_later_process() {
    let dir = tempfile::tempdir().unwrap();
    let disk = sample(3);
    import(&store(dir.path()), &disk).unwrap();
    let mut moved = disk.clone();
    moved.size_bytes = 1 << 30;
    moved.pieces[1].0 = (700 << 20) + 3 * BLOCK_LEN as u64;
    let store = store(dir.path());
    let report = import(&store, &moved).unwrap();
    assert_eq!(report.new_bytes, 0, "only the manifest is new");
    check_content(&store, &report.digest, &Disk { size_bytes: 1 << 30, ..moved });
}

#[test]
fn an_index_that_was_lost_is_rebuilt_from_the_packs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = sample(4);
    import(&store(dir.path()), &disk).unwrap();
    std::fs::remove_dir_all(dir.path().join("index")).unwrap();
    let mut other = disk.clone();
    other.size_bytes += 4096;
    assert_eq!(import(&store(dir.path()), &other).unwrap().new_bytes, 0);
}

#[test]
fn an_empty_disk_of_64_tib_is_imported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = Disk { size_bytes: 64 << 40, ..Disk::default() };
    let report = import(&store, &disk).unwrap();
    assert_eq!(report.data_bytes, 0);
    assert!(store.manifest(&report.digest).unwrap().extents().is_empty());
}

#[test]
fn a_source_that_fails_and_a_cancelled_import_leave_the_store_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, &sample(5)).unwrap();
    let before = store.usage().unwrap();
    let failing = Disk { fail_at: Some(24 << 20), ..sample(6) };
    assert_eq!(import(&store, &failing).unwrap_err().kind(), StoreErrorKind::Source);
    let panicking = Disk { panics: true, ..failing };
    assert_eq!(import(&store, &panicking).unwrap_err().kind(), StoreErrorKind::Source);
    let cancelled = store.import(&sample(6), &Observer { cancel_after: Some(18), ..Observer::default() });
    assert_eq!(cancelled.unwrap_err().kind(), StoreErrorKind::Cancelled);
    assert_eq!(store.usage().unwrap(), before);
    assert_eq!(store.digests().unwrap(), [kept.digest]);
    let retried = import(&store, &sample(6)).unwrap();
    check_content(&store, &retried.digest, &sample(6));
}

#[test]
fn a_damaged_frame_is_an_error_that_names_it_and_never_data() {
    let dir = tempfile::tempdir().unwrap();
    let report = import(&store(dir.path()), &sample(7)).unwrap();
    let fresh = store(dir.path());
    let manifest = fresh.manifest(&report.digest).unwrap();
    let pack = manifest.packs()[0];
    let name = pack.id.to_string();
    let path = dir.path().join(format!("packs/{}/{name}.pack", &name[..2]));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[500] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path).and_then(|mut f| std::io::Write::write_all(&mut f, &bytes)).unwrap();
    let error = fresh.read_frame(&pack, 0).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    assert!(error.to_string().contains(&name), "{error}");
    assert!(fresh.read_frame(&pack, 1).is_ok());
}

#[test]
fn a_sweep_frees_what_no_manifest_needs_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let (kept, gone) = (import(&store, &sample(8)).unwrap(), import(&store, &sample(9)).unwrap());
    assert_eq!(store.sweep().unwrap(), 0);
    store.remove_manifest(&gone.digest).unwrap();
    assert!(store.sweep().unwrap() > 10 << 20);
    check_content(&store, &kept.digest, &sample(8));
    let again = import(&store, &sample(9)).unwrap();
    assert!(again.new_bytes > 0);
    check_content(&store, &again.digest, &sample(9));
}

#[test]
fn a_store_of_a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(store(dir.path()));
    let path = dir.path().join("bulbil-store.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"format_version\": 1", "\"format_version\": 3");
    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path).and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes())).unwrap();
    assert_eq!(Store::open_or_create(dir.path()).unwrap_err().kind(), StoreErrorKind::UnsupportedVersion);
}
