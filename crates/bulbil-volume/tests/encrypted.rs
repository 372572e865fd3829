//! Overlays of an encrypted store: what the host sees, and crashes.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bulbil_store::{DirObjects, OwnerId, Store, StoreKey, StoreOptions};
use bulbil_testkit::{PowerLossDirectory, Rng, tagged};
use bulbil_types::VolumeId;
use bulbil_volume::{BlockDevice as _, HostDirectory, Volume, VolumeDirectory, VolumeErrorKind, open_for_store};
use support::{Image, crash_again_and_again, read_all};

fn open_store(directory: &Path, key: u8) -> Arc<Store> {
    let options = StoreOptions::new(&directory.join("index"), OwnerId::default());
    let options = options.with_key(StoreKey::from_bytes([key; 32])).encrypt_new();
    Arc::new(Store::open(Arc::new(DirObjects::open(directory).unwrap()), options).unwrap())
}

/// An image in an encrypted store of its own.
fn encrypted_image(directory: &Path) -> Image {
    Image::make_in(directory, open_store(&directory.join("store"), 1))
}

#[test]
fn nothing_acknowledged_is_lost_of_an_encrypted_overlay_at_1000_crashes() {
    let dir = tempfile::tempdir().unwrap();
    let image = encrypted_image(dir.path());
    let crashes = crash_again_and_again(&image, 100);
    assert_eq!(crashes, 1000);
}

#[test]
fn a_crash_while_the_key_of_an_overlay_is_made_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let image = encrypted_image(dir.path());
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let directory = PowerLossDirectory::default();
        directory.set_fuse(rng.below(4));
        let opened = open_for_store(Arc::new(directory.clone()), &image.store);
        if rng.one_in(2) {
            directory.kill_process();
        } else {
            directory.lose_power(&mut rng);
        }
        drop(opened);
        let volume = image.volume(Arc::new(directory.clone()));
        volume.write_at(&tagged(7, 3), 512, true).unwrap();
        drop(volume);
        directory.lose_power(&mut rng);
        let content = read_all(&image.volume(Arc::new(directory.clone())));
        assert!(content[512..4 * 512] == tagged(7, 3), "seed {seed}");
    }
}

#[test]
fn requests_of_any_alignment_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path(), 1);
    let files = open_for_store(Arc::new(PowerLossDirectory::default()), &store).unwrap();
    let file = files.create("data.0").unwrap();
    let mut expected = vec![0; 3 << 20];
    let mut rng = Rng::new(3);
    for _ in 0..400 {
        let longest = if rng.one_in(10) { 2 << 20 } else { 10_000 };
        let len = 1 + rng.below(longest) as usize;
        let offset = rng.below((expected.len() - len) as u64);
        let part = offset as usize..offset as usize + len;
        match rng.below(3) {
            0 => {
                let bytes = rng.bytes(len);
                file.write_at(&bytes[..len], offset).unwrap();
                expected[part].copy_from_slice(&bytes[..len]);
            }
            1 => {
                let (from, to) = (offset / 4096 * 4096, (offset + len as u64) / 4096 * 4096);
                if from < to {
                    file.punch_hole(from, to - from).unwrap();
                    expected[from as usize..to as usize].fill(0);
                }
            }
            _ => {
                let mut read = vec![1; len];
                file.read_at(&mut read, offset).unwrap();
                assert!(read == expected[part], "{len} bytes at {offset}");
            }
        }
    }
}

#[test]
fn sectors_of_one_block_written_at_the_same_time_do_not_lose_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&dir.path().join("store"), 1);
    let host = dir.path().join("overlay");
    std::fs::create_dir(&host).unwrap();
    let files = open_for_store(Arc::new(HostDirectory::new(&host)), &store).unwrap();
    let file = files.create("data.0").unwrap();
    file.write_at(&[0xff; 8192], 0).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4_u64)
            .map(|sector| {
                let file = &file;
                scope.spawn(move || {
                    // Every other sector, over the border of the two blocks.
                    let offset = 2048 + sector * 1024;
                    for round in 0..2000_u64 {
                        let value = [(round % 251) as u8; 512];
                        file.write_at(&value, offset).unwrap();
                        let mut read = [0; 512];
                        file.read_at(&mut read, offset).unwrap();
                        assert!(read == value, "sector {sector}, round {round}");
                    }
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            let mut read = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                file.read_at(&mut read, 0).unwrap();
                assert!(read == [0xff; 2048], "what nobody writes stays");
            }
        });
        let written: Vec<_> = writers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        written.into_iter().for_each(Result::unwrap);
    });
    let mut read = [0; 8192];
    file.read_at(&mut read, 0).unwrap();
    for (sector, bytes) in read.chunks(512).enumerate() {
        let written = (4..12).contains(&sector) && sector.is_multiple_of(2);
        assert!(bytes.iter().all(|byte| *byte == if written { (1999 % 251) as u8 } else { 0xff }), "sector {sector}");
    }
}

/// Every 16 bytes at a multiple of 16 that are in a file below the directory.
fn host_bytes(directory: &Path) -> HashSet<Vec<u8>> {
    let (mut found, mut todo) = (HashSet::new(), vec![directory.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                found.extend(std::fs::read(path).unwrap().chunks(16).map(<[u8]>::to_vec));
            }
        }
    }
    found
}

/// Whether a file of the base cache has the first frame of its pack.
fn has_marks(cache: &Path) -> bool {
    let files = std::fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    let mut files = files.filter(|path| path.extension().is_some_and(|extension| extension == "frames"));
    files.any(|path| std::fs::read(path).unwrap().get(4096) == Some(&1))
}

#[test]
fn the_host_sees_no_byte_that_a_guest_writes() {
    let (plain, encrypted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stores = [
        (plain.path(), Arc::new(Store::open_or_create(&plain.path().join("store")).unwrap()), true),
        (encrypted.path(), open_store(&encrypted.path().join("store"), 1), false),
    ];
    for (path, store, visible) in stores {
        let image = Image::make_in(path, store);
        let volumes = VolumeDirectory::open(&path.join("volumes")).unwrap();
        let id: VolumeId = "vol-0123456789abcdef0".parse().unwrap();
        volumes.create(&id, image.content.len() as u64, Some(&image.manifest)).unwrap();
        let secret = Rng::new(5).bytes(20_480);
        let volume = volumes.open_volume(&id, &image.store, &image.cache).unwrap();
        volume.write_at(&secret[..8192], 8192, false).unwrap();
        volume.write_at(&secret[8192..], 512 * 77, true).unwrap();
        drop(volume);
        let volume = volumes.open_volume(&id, &image.store, &image.cache).unwrap();
        let mut read = vec![0; 8192];
        volume.read_at(&mut read, 8192).unwrap();
        assert!(read == secret[..8192]);
        assert!(read_all(&volume)[4096 * 70..] == image.content[4096 * 70..]);
        drop(volume);
        let seen = host_bytes(&path.join("volumes"));
        assert_eq!(secret.chunks(16).any(|part| seen.contains(part)), visible);
        // What was read of the image is in the base cache, or soon will be.
        let started = Instant::now();
        while !has_marks(&path.join("cache")) {
            assert!(started.elapsed() < Duration::from_secs(30), "no frame came into the cache");
            std::thread::yield_now();
        }
        let seen = host_bytes(&path.join("cache"));
        let content = image.content.chunks(16).filter(|part| part.iter().any(|byte| *byte != 0));
        assert_eq!(content.filter(|part| seen.contains(*part)).count() > 1000, visible);
        let seen = host_bytes(path);
        let mut all = image.content.chunks(16).chain(secret.chunks(16)).filter(|part| part[..8] != [0; 8]);
        assert_eq!(all.any(|part| seen.contains(part)), visible);
    }
}

#[test]
fn an_overlay_is_opened_with_its_own_store_only() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [1, 2].map(|key| open_store(&dir.path().join(key.to_string()), key));
    let plain = Store::open_or_create(&dir.path().join("plain")).unwrap();
    let refused = |directory: &PowerLossDirectory, store: &Store| {
        open_for_store(Arc::new(directory.clone()), store).unwrap_err().kind() == VolumeErrorKind::Corrupt
    };
    let encrypted = PowerLossDirectory::default();
    drop(open_for_store(Arc::new(encrypted.clone()), &stores[0]).unwrap());
    assert!(refused(&encrypted, &stores[1]) && refused(&encrypted, &plain));
    drop(open_for_store(Arc::new(encrypted), &stores[0]).unwrap());

    let unencrypted = PowerLossDirectory::default();
    let files = open_for_store(Arc::new(unencrypted.clone()), &plain).unwrap();
    Volume::without_base(1 << 20, files).unwrap().write_at(&[1; 4096], 0, true).unwrap();
    assert!(refused(&unencrypted, &stores[0]));
    drop(open_for_store(Arc::new(unencrypted), &plain).unwrap());
}
