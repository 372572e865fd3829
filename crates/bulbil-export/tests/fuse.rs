//! Devices as mounted files, through the kernel. Needs `/dev/fuse`; skips with a reason where it is missing, unless `CI`
//! is set.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

#[path = "support/fuse.rs"]
mod mounts;
mod support;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulbil_export::fuse::{FuseError, FuseMount, FuseOptions};
use bulbil_testkit::Rng;
use bulbil_volume::{BlockDevice as _, BlockErrorKind};
use mounts::*;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use support::*;

const MIB: u64 = 1 << 20;

fn raw_error(result: std::io::Result<impl Sized>) -> Option<Errno> {
    result.err().and_then(|error| Errno::from_io_error(&error))
}

#[test]
fn the_file_is_the_device() {
    if !can_mount() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(3 * MIB + 512).patterned());
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let names: Vec<_> = std::fs::read_dir(mounted.mount.directory()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["disk.raw"]);
    let metadata = std::fs::metadata(mounted.path()).unwrap();
    assert_eq!(metadata.len(), 3 * MIB + 512);
    assert_eq!(metadata.blocks(), metadata.len() / 512);
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert_eq!(std::fs::read(mounted.path()).unwrap(), disk.bytes());
    assert_eq!(File::open(mounted.path()).unwrap().read_at(&mut [0; 10], metadata.len()).unwrap(), 0);
    let other = std::fs::metadata(mounted.mount.directory().join("other"));
    assert_eq!(other.unwrap_err().kind(), ErrorKind::NotFound);
    mounted.mount.unmount().unwrap();
    assert_eq!(std::fs::read_dir(mounted.dir.path()).unwrap().count(), 0);
    assert_eq!(Arc::strong_count(&disk), 1, "nothing holds a device that is not mounted");
}

#[test]
fn a_read_only_device_cannot_be_written() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(Arc::new(MemoryDisk::new(MIB).patterned().read_only()));
    assert_eq!(std::fs::metadata(mounted.path()).unwrap().permissions().mode() & 0o7777, 0o400);
    let opened = OpenOptions::new().write(true).open(mounted.path());
    assert_eq!(raw_error(opened), Some(Errno::ROFS));
    assert_eq!(mounted.read(5, 7), pattern(5, 7));
    File::open(mounted.path()).unwrap().sync_all().unwrap();
    mounted.mount.unmount().unwrap();
}

#[test]
fn what_was_written_is_durable_after_fsync() {
    if !can_mount() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(2 * MIB));
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let file = mounted.file();
    let data = pattern(0, 300_000);
    file.write_all_at(&data, 4096).unwrap();
    assert!(disk.bytes()[4096..].starts_with(&data), "a write that returned has been taken by the device");
    assert!(!disk.is_clean());
    file.sync_data().unwrap();
    assert!(disk.durable_bytes()[4096..].starts_with(&data));
    file.write_all_at(b"short", 700_001).unwrap();
    file.sync_all().unwrap();
    assert!(disk.durable_bytes()[700_001..].starts_with(b"short"));
    file.write_all_at(b"at the end", 900_000).unwrap();
    drop(file);
    mounted.mount.unmount().unwrap();
    assert!(disk.durable_bytes()[900_000..].starts_with(b"at the end"), "unmounting flushes");
}

#[test]
fn a_failed_flush_is_told_at_fsync_and_at_the_end() {
    if !can_mount() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(MIB));
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let file = mounted.file();
    file.write_all_at(b"lost", 0).unwrap();
    *disk.fault.lock().unwrap() = Some(BlockErrorKind::Io);
    assert_eq!(raw_error(file.sync_all()), Some(Errno::IO));
    drop(file);
    let error = mounted.mount.unmount().unwrap_err();
    assert!(matches!(error, FuseError::Served { .. }), "{error:?}");
}

#[test]
fn errors_of_the_device_reach_the_reader() {
    if !can_mount() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(MIB));
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let file = mounted.file();
    for (kind, expected) in [
        (BlockErrorKind::NoSpace, Errno::NOSPC),
        (BlockErrorKind::Io, Errno::IO),
        (BlockErrorKind::Poisoned, Errno::IO),
    ] {
        *disk.fault.lock().unwrap() = Some(kind);
        assert_eq!(raw_error(file.write_at(&[1; 4096], 0)), Some(expected));
    }
    assert_eq!(raw_error(file.read_at(&mut [0; 4096], 65536)), Some(Errno::IO));
    *disk.fault.lock().unwrap() = None;
    assert_eq!(read(&file, 65536, 10), [0; 10], "a failed read is not kept");
    disk.panic_on_read.store(1, Ordering::Relaxed);
    for _ in 0..8 {
        // More often than there are receiving threads.
        assert_eq!(raw_error(file.read_at(&mut [0; 4096], 512 * 1024)), Some(Errno::IO));
    }
    disk.panic_on_read.store(0, Ordering::Relaxed);
    assert_eq!(read(&file, 512 * 1024, 10), [0; 10]);
}

#[test]
fn slow_requests_do_not_hold_back_fast_ones() {
    if !can_mount() {
        return;
    }
    const SLOW: usize = 8;
    let disk = Arc::new(MemoryDisk::new(32 * MIB).patterned());
    disk.slow_from.store(16 * MIB, Ordering::Relaxed);
    disk.read_gate.close();
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let mut direct = OpenOptions::new();
    // Past the page cache, whose readahead would make other requests.
    let direct = direct.read(true).custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
    let slow: Vec<_> = (0..SLOW)
        .map(|i| {
            let file = direct.open(mounted.path()).unwrap();
            std::thread::spawn(move || {
                let offset = 16 * MIB + i as u64 * MIB;
                // Aligned memory is the kernel's wish for O_DIRECT on block devices, not here.
                read(&file, offset, 4096) == pattern(offset as usize, 4096)
            })
        })
        .collect();
    disk.read_gate.wait_for(SLOW);
    assert_eq!(mounted.read(MIB + 1, 100_000), pattern(MIB as usize + 1, 100_000));
    let file = mounted.file();
    file.write_all_at(&[7; 4096], 0).unwrap();
    disk.read_gate.open();
    assert!(slow.into_iter().all(|thread| thread.join().unwrap()));
    file.sync_all().unwrap();
}

#[test]
fn holes_are_punched_to_the_byte_and_found() {
    if !can_mount() {
        return;
    }
    const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let file = mounted.file();
    let mut expected = disk.bytes();
    for (flags, offset, len) in [
        (PUNCH, 10_000, 50_000),
        (PUNCH, 100, 200),
        (PUNCH, 81_920, 8_192),
        (PUNCH, MIB - 5_000, 10_000),
        (FallocateFlags::ZERO_RANGE, 200_001, 20_000),
    ] {
        fallocate(&file, flags, offset, len).unwrap();
        let end = (offset + len).min(MIB) as usize;
        expected[offset as usize..end].fill(0);
        assert!(disk.bytes() == expected, "{flags:?} {offset} {len}");
        assert!(std::fs::read(mounted.path()).unwrap() == expected, "the page cache knows of {flags:?} {offset} {len}");
    }
    for (from, sought, found) in [
        (SeekFrom::Hole(0), "hole", 12_288),
        (SeekFrom::Data(12_288), "data", 57_344),
        (SeekFrom::Data(5), "data", 5),
        (SeekFrom::Hole(85_000), "hole", 85_000),
        (SeekFrom::Hole(300_000), "hole", 1_044_480),
    ] {
        assert_eq!(seek(&file, from), Ok(found), "{sought} from {from:?}");
    }
    assert_eq!(seek(&file, SeekFrom::Data(1_044_480)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(MIB)), Err(Errno::NXIO));
    assert!(std::fs::metadata(mounted.path()).unwrap().blocks() < MIB / 512);
    for flags in [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE] {
        assert_eq!(fallocate(&file, flags, 0, 4096), Err(Errno::OPNOTSUPP), "space is not promised");
    }
    assert!(fallocate(&file, FallocateFlags::ZERO_RANGE, MIB - 10, 20).is_err(), "the file does not grow");
}

#[test]
fn the_file_keeps_its_size_and_the_directory_its_content() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(Arc::new(MemoryDisk::new(MIB).patterned()));
    let (directory, path, file) = (mounted.mount.directory(), mounted.path(), mounted.file());
    assert_eq!(raw_error(file.set_len(10)), Some(Errno::PERM));
    assert_eq!(raw_error(file.set_len(2 * MIB)), Some(Errno::PERM));
    file.set_len(MIB).unwrap();
    assert_eq!(raw_error(File::create(&path)), Some(Errno::PERM), "opening does not empty it");
    assert_eq!(raw_error(File::create(directory.join("other"))), Some(Errno::PERM));
    assert_eq!(raw_error(std::fs::create_dir(directory.join("other"))), Some(Errno::PERM));
    assert_eq!(raw_error(std::fs::remove_file(&path)), Some(Errno::PERM));
    assert_eq!(raw_error(std::fs::rename(&path, directory.join("other"))), Some(Errno::PERM));
    assert_eq!(raw_error(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777))), Some(Errno::PERM));
    assert_eq!(file.write_at(&[1; 100], MIB - 40).unwrap(), 40);
    assert_eq!(raw_error(file.write_at(&[1; 100], MIB)), Some(Errno::NOSPC));
    assert_eq!(file.metadata().unwrap().len(), MIB);
    file.set_modified(std::time::SystemTime::now()).unwrap();
}

#[test]
fn a_file_in_use_stays_and_can_be_taken_away_lazily() {
    if !can_mount() {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let mounted = Mounted::new(Arc::clone(&disk) as _);
    let file = mounted.file();
    let error = mounted.mount.unmount().unwrap_err();
    assert!(matches!(error, FuseError::Busy { .. }), "{error:?}");
    assert_eq!(read(&file, 0, 100), pattern(0, 100));
    mounted.mount.detach().unwrap();
    assert!(!mounted.path().exists());
    file.write_all_at(b"after all", 5000).unwrap();
    assert!(!mounted.mount.wait_for(std::time::Duration::ZERO).unwrap());
    drop(file);
    mounted.mount.wait().unwrap();
    assert!(disk.durable_bytes()[5000..].starts_with(b"after all"));
    mounted.mount.unmount().unwrap();
}

#[test]
fn it_ends_when_someone_else_unmounts() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(Arc::new(MemoryDisk::new(MIB)));
    run("umount", &[mounted.mount.directory().to_str().unwrap()]);
    mounted.mount.wait().unwrap();
    // What is mounted there now is not ours to take away.
    let next =
        FuseMount::mount(Arc::new(MemoryDisk::new(2 * MIB)), mounted.dir.path(), &FuseOptions::default()).unwrap();
    mounted.mount.unmount().unwrap();
    assert_eq!(std::fs::metadata(next.file()).unwrap().len(), 2 * MIB);
}

#[test]
fn only_an_empty_directory_is_taken() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let try_at = |name: &str| {
        FuseMount::mount(Arc::new(MemoryDisk::new(MIB)), &dir.path().join(name), &FuseOptions::default()).unwrap_err()
    };
    File::create(dir.path().join("file")).unwrap();
    assert!(matches!(try_at("."), FuseError::NotAnEmptyDirectory { .. }));
    assert!(matches!(try_at("file"), FuseError::NotAnEmptyDirectory { .. }));
    assert!(matches!(try_at("missing"), FuseError::Directory { .. }));
}

#[test]
fn random_requests_match_a_vector() {
    if !can_mount() {
        return;
    }
    const LEN: u64 = MIB + 1024;
    let seed = std::env::var("BULBIL_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let rounds = std::env::var("BULBIL_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2_000);
    println!("seed {seed}, {rounds} rounds");
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let storage = Arc::new(bulbil_volume::HostDirectory::new(dir.path()));
    let volume = Arc::new(bulbil_volume::Volume::without_base(LEN, storage).unwrap());
    let mounted = Mounted::new(Arc::clone(&volume) as _);
    let file = mounted.file();
    let mut expected = vec![0; LEN as usize];
    for round in 0..rounds {
        let offset = rng.below(LEN);
        let longest = 1 << (1 + rng.below(20));
        let len = 1 + rng.below((LEN - offset).min(longest));
        let range = offset as usize..(offset + len) as usize;
        match rng.below(8) {
            0..=2 => {
                let data = rng.bytes(range.len());
                file.write_all_at(&data, offset).unwrap();
                expected[range].copy_from_slice(&data);
            }
            3 => {
                fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len).unwrap();
                expected[range].fill(0);
            }
            4 => {
                fallocate(&file, FallocateFlags::ZERO_RANGE, offset, len).unwrap();
                expected[range].fill(0);
            }
            5 => file.sync_data().unwrap(),
            _ => assert!(read(&file, offset, range.len()) == expected[range], "seed {seed}, round {round}"),
        }
    }
    drop(file);
    mounted.mount.unmount().unwrap();
    let mut found = vec![0; LEN as usize];
    volume.read_at(&mut found, 0).unwrap();
    assert!(found == expected, "seed {seed}");
}

#[test]
fn a_file_system_on_a_loop_device_lives_in_the_volume() {
    if !can_loop() {
        return;
    }
    const SIZE_BYTES: u64 = 64 * MIB;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let overlay = dir.path().join("overlay");
    std::fs::create_dir(&root).unwrap();
    std::fs::create_dir(&overlay).unwrap();
    let open = || {
        let storage = Arc::new(bulbil_volume::HostDirectory::new(&overlay));
        Arc::new(bulbil_volume::Volume::without_base(SIZE_BYTES, storage).unwrap())
    };
    let data = Rng::new(3).bytes(5_000_000);

    let mounted = Mounted::new(open());
    run("mkfs.ext4", &["-q", "-F", mounted.path().to_str().unwrap()]);
    {
        let device = LoopDevice::new(&mounted.path(), &[]);
        let _mounted = MountedOn::new(device.path(), &root, "discard");
        let mut file = File::create(root.join("data")).unwrap();
        std::io::Write::write_all(&mut file, &data).unwrap();
        file.sync_all().unwrap();
        std::fs::create_dir(root.join("directory")).unwrap();
        let busy = mounted.mount.unmount().unwrap_err();
        assert!(matches!(busy, FuseError::Busy { .. }), "{busy:?}");
    }
    run("e2fsck", &["-f", "-n", mounted.path().to_str().unwrap()]);
    mounted.mount.unmount().unwrap();

    // Again, as the volume stands on disk.
    let mounted = Mounted::new(open());
    {
        // O_DIRECT from the loop device on.
        let device = LoopDevice::new(&mounted.path(), &["--read-only", "--direct-io=on"]);
        let _mounted = MountedOn::new(device.path(), &root, "ro,noload");
        assert!(std::fs::read(root.join("data")).unwrap() == data);
        assert!(root.join("directory").is_dir());
    }
    mounted.mount.unmount().unwrap();
}
