//! Volumes through their public interface, against a plain vector of bytes.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bulbil_store::{Manifest, Store};
use bulbil_testkit::{MemoryDisk, PowerLossDirectory, Rng};
use bulbil_types::VolumeId;
use bulbil_volume::{
    BaseCache, BlockDevice, BlockErrorKind, ExtentKind, StatusExtent, Volume, VolumeDirectory, VolumeErrorKind,
};

struct Host {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    cache: Arc<BaseCache>,
    volumes: VolumeDirectory,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open_or_create(&dir.path().join("store")).unwrap());
        let cache = Arc::new(BaseCache::open(&dir.path().join("cache")).unwrap());
        let volumes = VolumeDirectory::open(&dir.path().join("volumes")).unwrap();
        Self { dir, store, cache, volumes }
    }

    fn import(&self, content: &[u8]) -> Manifest {
        let disk = MemoryDisk(content.to_vec());
        let report = self.store.import(&disk, &disk).unwrap();
        self.store.manifest(&report.digest).unwrap()
    }

    fn open(&self, id: &VolumeId) -> Volume {
        self.volumes.open_volume(id, &self.store, &self.cache).unwrap()
    }
}

fn sample_image(seed: u64, blocks: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..blocks).flat_map(|i| if i % 5 == 1 { vec![0; 4096] } else { rng.bytes(4096) }).collect()
}

fn check_equal(volume: &dyn BlockDevice, expected: &[u8]) {
    let mut found = vec![0xee; expected.len()];
    volume.read_at(&mut found, 0).unwrap();
    let different = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(different, None, "first different byte");
}

#[test]
fn random_requests_of_any_alignment_match_a_vector() {
    for seed in 0..8 {
        let mut rng = Rng::new(seed);
        let host = Host::new();
        let image = sample_image(seed, 70);
        let manifest = host.import(&image);
        // A size that ends within a block, past the end of the image.
        let size = image.len() + 3 * 4096 + 512;
        let id = VolumeId::random();
        host.volumes.create(&id, size as u64, Some(&manifest)).unwrap();
        let mut expected = image.clone();
        expected.resize(size, 0);
        let mut volume = host.open(&id);
        for _ in 0..300 {
            let offset = rng.below(size as u64) as usize;
            let len = (1 + rng.below(20_000) as usize).min(size - offset);
            let range = offset..offset + len;
            match rng.below(6) {
                0 | 1 => {
                    let bytes = rng.bytes(len);
                    volume.write_at(&bytes, offset as u64, false).unwrap();
                    expected[range].copy_from_slice(&bytes);
                }
                2 => {
                    volume.write_zeroes(offset as u64, len as u64, rng.one_in(3)).unwrap();
                    expected[range].fill(0);
                }
                3 => {
                    volume.discard(offset as u64, len as u64, false).unwrap();
                    let end = if offset + len == size { size } else { (offset + len) / 4096 * 4096 };
                    let start = offset.next_multiple_of(4096);
                    if start < end {
                        expected[start..end].fill(0);
                    }
                }
                4 => {
                    let mut found = vec![0; len];
                    volume.read_at(&mut found, offset as u64).unwrap();
                    assert!(found == expected[range], "seed {seed}: {len} bytes at {offset:#x}");
                }
                _ => {
                    volume.flush().unwrap();
                    drop(volume);
                    volume = host.open(&id);
                }
            }
        }
        check_equal(&volume, &expected);
        check_status(&volume, &expected);
    }
}

/// Holes must read as zeroes, and the runs must cover the disk.
fn check_status(volume: &Volume, expected: &[u8]) {
    let mut at = 0;
    while at < expected.len() {
        let runs = volume.status(at as u64, (expected.len() - at) as u64, 3).unwrap();
        assert!(!runs.is_empty() && runs.len() <= 3);
        for run in runs {
            let end = at + run.len_bytes as usize;
            assert!(run.kind == ExtentKind::Data || expected[at..end].iter().all(|b| *b == 0));
            at = end;
        }
    }
    assert_eq!(at, expected.len());
}

#[test]
fn two_volumes_of_one_image_never_see_each_other() {
    let host = Host::new();
    let image = sample_image(1, 64);
    let manifest = host.import(&image);
    let (a, b) = (VolumeId::random(), VolumeId::random());
    for id in [&a, &b] {
        host.volumes.create(id, image.len() as u64, Some(&manifest)).unwrap();
    }
    let (volume_a, volume_b) = (host.open(&a), host.open(&b));
    volume_a.write_at(&[7; 10_000], 3000, true).unwrap();
    check_equal(&volume_b, &image);
    volume_b.discard(0, image.len() as u64, true).unwrap();
    let mut expected = image.clone();
    expected[3000..13_000].fill(7);
    check_equal(&volume_a, &expected);
}

#[test]
fn a_volume_of_64_tib_is_made_and_written_at_both_ends() {
    let host = Host::new();
    let manifest = host.import(&sample_image(2, 4));
    let id = VolumeId::random();
    host.volumes.create(&id, 64 << 40, Some(&manifest)).unwrap();
    let volume = host.open(&id);
    let last = (64 << 40) - 4096;
    volume.write_at(&[9; 4096], last, true).unwrap();
    volume.write_at(&[8; 8192], (1 << 40) - 4096, true).unwrap();
    drop(volume);
    let volume = host.open(&id);
    let mut found = [0; 4096];
    for (offset, value) in [(last, 9), ((1 << 40) - 4096, 8), (1 << 40, 8), (1 << 41, 0)] {
        volume.read_at(&mut found, offset).unwrap();
        assert!(found.iter().all(|b| *b == value), "{offset:#x}");
    }
    let volume_path = host.dir.path().join("volumes").join(id.as_str());
    let stored: u64 =
        std::fs::read_dir(volume_path).unwrap().map(|e| e.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!(stored < 1 << 20, "{stored} bytes on the host");
}

#[test]
fn a_volume_is_open_once_and_removed_only_when_closed() {
    let host = Host::new();
    let id = VolumeId::random();
    host.volumes.create(&id, 1 << 20, None).unwrap();
    let open = host.open(&id);
    let kind = |result: Result<(), bulbil_volume::VolumeError>| result.unwrap_err().kind();
    assert_eq!(kind(host.volumes.open_volume(&id, &host.store, &host.cache).map(drop)), VolumeErrorKind::InUse);
    assert_eq!(kind(host.volumes.remove(&id)), VolumeErrorKind::InUse);
    drop(open);
    host.volumes.remove(&id).unwrap();
    host.volumes.remove(&id).unwrap();
    assert_eq!(kind(host.volumes.record(&id).map(drop)), VolumeErrorKind::NotFound);
}

#[test]
fn sizes_that_cannot_be_are_refused_and_leave_nothing() {
    let host = Host::new();
    let manifest = host.import(&sample_image(3, 8));
    for size in [0, 512, 8 * 4096 - 512, 8 * 4096 + 1, (64 << 40) + 512] {
        let error = host.volumes.create(&VolumeId::random(), size, Some(&manifest)).unwrap_err();
        assert_eq!(error.kind(), VolumeErrorKind::BadSize, "{size}");
    }
    assert_eq!(std::fs::read_dir(host.dir.path().join("volumes")).unwrap().count(), 0);
}

#[test]
fn requests_past_the_end_are_refused() {
    let volume = Volume::without_base(8192, Arc::new(PowerLossDirectory::default())).unwrap();
    let mut buf = [0; 512];
    assert_eq!(volume.read_at(&mut buf, 8192).unwrap_err().kind(), BlockErrorKind::OutOfRange);
    assert_eq!(volume.write_at(&buf, u64::MAX - 100, false).unwrap_err().kind(), BlockErrorKind::OutOfRange);
    assert_eq!(volume.discard(4096, 4097, false).unwrap_err().kind(), BlockErrorKind::OutOfRange);
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_any_more() {
    let directory = PowerLossDirectory::default();
    let volume = Volume::without_base(1 << 20, Arc::new(directory.clone())).unwrap();
    volume.write_at(&[1; 4096], 0, true).unwrap();
    volume.write_at(&[2; 4096], 0, false).unwrap();
    directory.set_fuse(0);
    assert_eq!(volume.flush().unwrap_err().kind(), BlockErrorKind::Io);
    directory.set_fuse(1000);
    assert_eq!(volume.flush().unwrap_err().kind(), BlockErrorKind::Poisoned);
    assert_eq!(volume.write_at(&[3; 4096], 0, false).unwrap_err().kind(), BlockErrorKind::Poisoned);
    let mut found = [0; 4096];
    volume.read_at(&mut found, 0).unwrap();
}

#[test]
fn discarding_what_the_image_does_not_hold_costs_nothing() {
    let host = Host::new();
    let mut image = sample_image(4, 16);
    image.resize(8 << 20, 0);
    let manifest = host.import(&image);
    let id = VolumeId::random();
    host.volumes.create(&id, image.len() as u64, Some(&manifest)).unwrap();
    host.open(&id).discard(1 << 20, 7 << 20, true).unwrap();
    assert!(!host.dir.path().join("volumes").join(id.as_str()).join("map").exists());
}

#[test]
fn frames_are_fetched_once_for_all_volumes_of_a_host() {
    let host = Host::new();
    let image = sample_image(5, 256);
    let manifest = host.import(&image);
    let ids = [VolumeId::random(), VolumeId::random()];
    for id in &ids {
        host.volumes.create(id, image.len() as u64, Some(&manifest)).unwrap();
    }
    let first = host.open(&ids[0]);
    assert!(!first.is_fast(0, image.len() as u64));
    check_equal(&first, &image);
    assert!(first.is_fast(0, image.len() as u64));
    assert!(first.frames_fetched() > 0);
    // Another process: a cache that shares nothing but the files.
    let other_cache = Arc::new(BaseCache::open(&host.dir.path().join("cache")).unwrap());
    let second = host.volumes.open_volume(&ids[1], &host.store, &other_cache).unwrap();
    check_equal(&second, &image);
    assert_eq!(second.frames_fetched(), 0);
    let whole = StatusExtent { len_bytes: 4096, kind: ExtentKind::Hole };
    assert_eq!(second.status(4096, 4096, 9).unwrap(), [whole]);
}

/// Bytes that a directory takes on the host.
fn stored_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            found if found.is_dir() => stored_bytes(&entry.path()),
            found => found.blocks() * 512,
        })
        .sum()
}

#[test]
fn four_mib_of_scattered_writes_take_little_more_on_the_host() {
    let host = Host::new();
    let manifest = host.import(&sample_image(11, 64));
    let id = VolumeId::random();
    host.volumes.create(&id, 1 << 30, Some(&manifest)).unwrap();
    let volume = host.open(&id);
    let mut rng = Rng::new(11);
    for _ in 0..1024 {
        let block = rng.below((1 << 30) / 4096);
        volume.write_at(&rng.bytes(4096), block * 4096, false).unwrap();
    }
    volume.flush().unwrap();
    let stored = stored_bytes(&host.dir.path().join("volumes").join(id.as_str()));
    assert!(stored <= 4_300 << 10, "{stored} bytes");
}

#[test]
fn a_stopped_volume_has_snapshots_and_clones_of_them() {
    let host = Host::new();
    let image = sample_image(21, 80);
    let manifest = host.import(&image);
    let id = VolumeId::random();
    let size = image.len() + 5 * 4096 + 512;
    host.volumes.create(&id, size as u64, Some(&manifest)).unwrap();
    let observer = MemoryDisk(Vec::new());
    let snapshot = |id: &VolumeId| host.volumes.snapshot(id, &host.store, &host.cache, &observer).unwrap();
    let mut expected = image.clone();
    expected.resize(size, 0);
    let mut rng = Rng::new(21);
    for round in 0..4 {
        let volume = host.open(&id);
        for _ in 0..5 {
            let offset = rng.below(size as u64) as usize;
            let len = (1 + rng.below(9000) as usize).min(size - offset);
            let bytes = rng.bytes(len);
            volume.write_at(&bytes, offset as u64, false).unwrap();
            expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        volume.flush().unwrap();
        drop(volume);
        let report = snapshot(&id);
        let whole = MemoryDisk(expected.clone());
        assert_eq!(report.digest, host.store.import(&whole, &whole).unwrap().digest, "round {round}");
        let again = snapshot(&id);
        assert!(again.existed && again.digest == report.digest, "round {round}: nothing was written since");
        let record = host.volumes.record(&id).unwrap();
        assert_eq!((record.base, record.layers.len()), (Some(report.digest), 1));
        let clone = VolumeId::random();
        host.volumes.create(&clone, size as u64, Some(&host.store.manifest(&report.digest).unwrap())).unwrap();
        check_equal(&host.open(&clone), &expected);
        host.open(&clone).write_at(&[1; 512], 0, true).unwrap();
        check_equal(&host.open(&id), &expected);
        assert!(host.volumes.bases().unwrap().contains(&(clone, vec![report.digest])));
    }
    let path = host.dir.path().join("volumes").join(id.as_str());
    // The record and the newest layer. The others are freed beside what goes on; the runner's time limit ends a test that waits in vain.
    while std::fs::read_dir(&path).unwrap().count() > 2 {
        std::thread::yield_now();
    }
}

#[test]
fn an_open_volume_grows_and_tells_who_listens() {
    let host = Host::new();
    let image = sample_image(31, 20);
    let manifest = host.import(&image);
    let id = VolumeId::random();
    // Sizes that end within a block, whose rest must be zero afterwards.
    let size = image.len() + 512;
    host.volumes.create(&id, size as u64, Some(&manifest)).unwrap();
    let volume = host.open(&id);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let listener = Arc::clone(&heard);
    volume.on_resize(Box::new(move |size_bytes| listener.lock().unwrap().push(size_bytes)));
    let mut expected = image.clone();
    expected.resize(size, 0);
    volume.write_at(&[7; 100], size as u64 - 100, false).unwrap();
    expected[size - 100..].fill(7);
    for more in [512, 1024, 3 * 4096, 4096 + 1536] {
        let frozen = (more == 1024).then(|| volume.freeze().unwrap());
        let size = expected.len() + more;
        volume.grow(size as u64).unwrap();
        expected.resize(size, 0);
        assert_eq!(volume.size_bytes(), size as u64);
        check_equal(&volume, &expected);
        volume.write_at(&[9; 300], size as u64 - 300, false).unwrap();
        expected[size - 300..].fill(9);
        drop(frozen);
    }
    for bad in [expected.len() as u64 - 512, expected.len() as u64 + 1, (64 << 40) + 512] {
        assert_eq!(volume.grow(bad).unwrap_err().kind(), VolumeErrorKind::BadSize, "{bad}");
    }
    assert_eq!(heard.lock().unwrap().len(), 4);
    check_equal(&volume, &expected);
    let report = volume.snapshot(&MemoryDisk(Vec::new())).unwrap();
    let whole = MemoryDisk(expected.clone());
    assert_eq!(report.digest, host.store.import(&whole, &whole).unwrap().digest);
    assert_eq!(
        host.volumes.resize(&id, 1 << 30).unwrap_err().kind(),
        VolumeErrorKind::InUse,
        "it is open, and grows by itself"
    );
    drop(volume);
    let size = expected.len() as u64;
    assert_eq!(host.volumes.resize(&id, size - 512).unwrap_err().kind(), VolumeErrorKind::BadSize);
    host.volumes.resize(&id, 1 << 40).unwrap();
    let volume = host.open(&id);
    assert_eq!(volume.size_bytes(), 1 << 40);
    check_equal(&volume, &expected);
    let mut last = [1; 4096];
    volume.read_at(&mut last, (1 << 40) - 4096).unwrap();
    assert!(last == [0; 4096]);
}

#[test]
fn a_volume_of_version_1_is_opened_and_its_layer_is_kept() {
    let host = Host::new();
    let image = sample_image(41, 16);
    let manifest = host.import(&image);
    let id: VolumeId = "vol-0123456789abcdef0".parse().unwrap();
    let path = host.dir.path().join("volumes").join(id.as_str());
    std::fs::create_dir(&path).unwrap();
    let put = |name: &str, bytes: &[u8]| {
        std::fs::File::create(path.join(name)).and_then(|mut f| std::io::Write::write_all(&mut f, bytes)).unwrap();
    };
    let digest = manifest.digest();
    put(
        "volume.json",
        format!(r#"{{"format_version":1,"id":"{id}","size_bytes":65536,"base":"{digest}"}}"#).as_bytes(),
    );
    // Block 0 is that of the image, block 1 in the overlay, block 2 zero.
    put("map", &[&[0b10_01_00_u8][..], &[0; 4095]].concat());
    put("data.0", &[[0; 4096], [5; 4096]].concat());
    let mut expected = image.clone();
    expected[4096..8192].fill(5);
    expected[8192..12288].fill(0);
    let volume = host.open(&id);
    check_equal(&volume, &expected);
    let frozen = volume.freeze().unwrap();
    volume.write_at(&[6; 4096], 0, true).unwrap();
    expected[..4096].fill(6);
    drop((frozen, volume));
    assert_eq!(host.volumes.record(&id).unwrap().layers, [1, 0]);
    let volume = host.open(&id);
    check_equal(&volume, &expected);
    check_status(&volume, &expected);
}

#[test]
fn volumes_that_were_never_completed_are_not_there_and_damaged_ones_are_told() {
    let host = Host::new();
    let manifest = host.import(&sample_image(51, 4));
    let id = VolumeId::random();
    host.volumes.create(&id, 1 << 20, Some(&manifest)).unwrap();
    let volumes = host.dir.path().join("volumes");
    let other = VolumeId::random();
    std::fs::create_dir(volumes.join(other.as_str())).unwrap();
    let expected = [(id.clone(), vec![manifest.digest()])];
    assert_eq!(host.volumes.bases().unwrap(), expected);
    std::fs::File::create(volumes.join(other.as_str()).join("volume.json")).unwrap();
    assert_eq!(host.volumes.bases().unwrap(), expected);
    assert_eq!(host.volumes.record(&other).unwrap_err().kind(), VolumeErrorKind::NotFound);
    let mut file = std::fs::File::create(volumes.join(other.as_str()).join("volume.json")).unwrap();
    std::io::Write::write_all(&mut file, b"{").unwrap();
    assert_eq!(host.volumes.bases().unwrap_err().kind(), VolumeErrorKind::Corrupt);
}
