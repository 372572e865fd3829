//! Snapshots, growing and merging of volumes that crash, against an oracle.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulbil_store::{ChangedDisk as _, Digest, DigestBuilder, Manifest, StoreErrorKind, window_leaf};
use bulbil_testkit::{DiskOracle, MemoryDisk, PowerLossDirectory, Rng, tagged};
use bulbil_types::{FRAME_LEN, VolumeId};
use bulbil_volume::{BlockDevice as _, FrozenState, HostDirectory, StorageDirectory, Volume, VolumeErrorKind};
use support::{Image, check_after, kill_or_lose_power, read_all, step};

/// Who listens to no import.
fn nobody() -> MemoryDisk {
    MemoryDisk(Vec::new())
}

/// A directory whose syncs cost nothing, where there is one: what is tested is the volume's directory.
fn quick_directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn rounds(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap())
}

fn digest_of(content: &[u8]) -> Digest {
    let mut builder = DigestBuilder::new(content.len() as u64);
    for (index, window) in content.chunks(FRAME_LEN).enumerate() {
        builder.push(index as u64, window_leaf(window));
    }
    builder.finish()
}

fn open(image: &Image, directory: &PowerLossDirectory) -> Volume {
    Volume::open_in(Arc::new(directory.clone()), &image.store, &image.cache).unwrap()
}

fn create(image: &Image, directory: &dyn StorageDirectory) {
    let size_bytes = image.content.len() as u64;
    Volume::create_in(directory, &VolumeId::random(), size_bytes, Some(&image.manifest)).unwrap();
}

/// Stores a frozen content, and checks that it is the expected one; `None` when it could not be read.
fn import(image: &Image, frozen: &FrozenState, expected: &[u8]) -> Option<Manifest> {
    match image.store.import_changes(frozen.base().as_ref(), frozen.size_bytes(), frozen, &nobody()) {
        Ok(report) => {
            assert_eq!(report.digest, digest_of(expected));
            Some(image.store.manifest(&report.digest).unwrap())
        }
        Err(error) => {
            assert_eq!(error.kind(), StoreErrorKind::Source, "{error}");
            None
        }
    }
}

fn read_frozen(frozen: &FrozenState) -> Option<Vec<u8>> {
    let mut content = vec![0; frozen.size_bytes() as usize];
    frozen.read_exact_at(&mut content, 0).ok().map(|()| content)
}

fn read_image(image: &Image, manifest: &Manifest) -> Vec<u8> {
    let directory = Arc::new(PowerLossDirectory::default());
    let size_bytes = manifest.size_bytes();
    read_all(&Volume::over_image(size_bytes, manifest.clone(), &image.store, &image.cache, directory).unwrap())
}

/// What a volume under test does besides answering requests.
struct Life<'a> {
    image: &'a Image,
    oracle: DiskOracle,
    /// The frozen state and what it must hold.
    frozen: Option<(FrozenState, Vec<u8>)>,
    /// A size that was asked for without an answer.
    asked_size: Option<u64>,
    snapshots: u64,
}

impl Life<'_> {
    /// One random act; `false` when it failed: the machine is off.
    fn act(&mut self, volume: &Volume, rng: &mut Rng, tag: u64) -> bool {
        match rng.below(24) {
            0 | 1 if self.frozen.is_none() => self.freeze(volume),
            0 | 1 => {
                assert_eq!(volume.freeze().unwrap_err().kind(), VolumeErrorKind::InUse);
                true
            }
            2 | 3 => self.rebase(volume),
            // A snapshot that failed.
            4 => {
                self.frozen = None;
                true
            }
            5 if volume.size_bytes() < 2 * self.image.content.len() as u64 => self.grow(volume, 1 + rng.below(9)),
            6 if self.frozen.is_none() => volume.compact().is_ok(),
            _ => step(volume, &mut self.oracle, rng, tag),
        }
    }

    fn freeze(&mut self, volume: &Volume) -> bool {
        let Ok(frozen) = volume.freeze() else { return false };
        self.oracle.flushed();
        let Some(content) = read_frozen(&frozen) else { return false };
        self.oracle.check_running(&content).unwrap();
        self.frozen = Some((frozen, content));
        true
    }

    fn rebase(&mut self, volume: &Volume) -> bool {
        let Some((frozen, content)) = self.frozen.take() else { return true };
        match read_frozen(&frozen) {
            Some(found) => assert!(found == content, "a frozen content has changed"),
            None => return false,
        }
        let Some(manifest) = import(self.image, &frozen, &content) else { return false };
        assert!(read_image(self.image, &manifest) == content);
        self.snapshots += 1;
        volume.rebase(frozen, manifest).is_ok()
    }

    fn grow(&mut self, volume: &Volume, blocks: u64) -> bool {
        let size_bytes = volume.size_bytes() + blocks * 4096;
        self.asked_size = Some(size_bytes);
        let grown = volume.grow(size_bytes).is_ok();
        if grown {
            self.asked_size = None;
            self.oracle.grow(blocks);
        }
        grown
    }

    fn check_after(&mut self, killed: bool, volume: &Volume, context: &str) {
        let content = read_all(volume);
        let before = self.oracle.newest().len();
        if self.asked_size.take() == Some(content.len() as u64) {
            self.oracle.grow((content.len() - before) as u64 / 4096);
        }
        assert_eq!(content.len(), self.oracle.newest().len(), "{context}: size");
        check_after(killed, &mut self.oracle, &content).unwrap_or_else(|e| panic!("{context}: {e}"));
    }
}

#[test]
fn snapshots_hold_the_content_of_their_moment_and_crashes_lose_nothing() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let (mut tag, mut crashes, mut snapshots, mut most_layers) = (1 << 32, 0, 0, 0);
    for seed in 0..rounds("BULBIL_TEST_LAYER_SEEDS", 30) {
        let mut rng = Rng::new(seed);
        let directory = PowerLossDirectory::default();
        create(&image, &directory);
        let oracle = DiskOracle::new(&image.content);
        let mut life = Life { image: &image, oracle, frozen: None, asked_size: None, snapshots: 0 };
        for _ in 0..12 {
            let volume = open(&image, &directory);
            most_layers = most_layers.max(volume.frozen_layers());
            assert!(volume.frozen_layers() <= 8, "seed {seed}: {} layers", volume.frozen_layers());
            let fuse = rng.below(250);
            directory.set_fuse(fuse);
            loop {
                tag += 1;
                if !life.act(&volume, &mut rng, tag) {
                    break;
                }
                let mut content = vec![0; volume.size_bytes() as usize];
                if rng.one_in(20) && volume.read_at(&mut content, 0).is_ok() {
                    life.oracle.check_running(&content).unwrap_or_else(|e| panic!("seed {seed}, running: {e}"));
                }
            }
            assert!(directory.is_dead(), "seed {seed}: something failed before the crash");
            life.frozen = None;
            drop(volume);
            let killed = kill_or_lose_power(&directory, &mut rng);
            crashes += 1;
            life.check_after(killed, &open(&image, &directory), &format!("seed {seed}, crash {crashes}"));
        }
        snapshots += life.snapshots;
    }
    println!("{crashes} crashes, {snapshots} snapshots, at most {most_layers} frozen layers");
    assert!(snapshots > crashes / 6 && most_layers >= 2);
}

/// Freezes, writes, stores and rebases, with a crash after each number of file operations.
#[test]
fn a_crash_at_any_operation_of_a_snapshot_changes_nothing() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let mut operations = 0;
    for seed in 0..6 {
        for fuse in 0.. {
            let mut rng = Rng::new(seed << 16 | fuse);
            let directory = PowerLossDirectory::default();
            create(&image, &directory);
            let oracle = DiskOracle::new(&image.content);
            let mut life = Life { image: &image, oracle, frozen: None, asked_size: None, snapshots: 0 };
            let volume = open(&image, &directory);
            let writes = |life: &mut Life<'_>, rng: &mut Rng| {
                (0..3).all(|_| step(&volume, &mut life.oracle, rng, rng.clone().next_u64() | 1))
            };
            // A frozen layer is there already in some of the rounds.
            for _ in 0..seed % 3 {
                assert!(writes(&mut life, &mut rng) && life.freeze(&volume));
                life.frozen = None;
            }
            assert!(writes(&mut life, &mut rng));
            directory.set_fuse(fuse);
            let all = life.freeze(&volume)
                && writes(&mut life, &mut rng)
                && life.rebase(&volume)
                && writes(&mut life, &mut rng)
                && life.grow(&volume, 3);
            assert!(all || directory.is_dead(), "seed {seed}, fuse {fuse}: something failed before the crash");
            life.frozen = None;
            drop(volume);
            let killed = kill_or_lose_power(&directory, &mut rng);
            life.check_after(killed, &open(&image, &directory), &format!("seed {seed}, fuse {fuse}"));
            // Once more: what opening tidies up must not be needed.
            drop(open(&image, &directory));
            directory.lose_power(&mut rng);
            life.check_after(false, &open(&image, &directory), &format!("seed {seed}, fuse {fuse}, again"));
            operations += 1;
            if all {
                break;
            }
        }
    }
    assert!(operations > 150, "{operations} operations");
}

/// A crash after each number of file operations of a merge, then another merge and another crash.
#[test]
fn a_crash_at_any_operation_of_a_merge_changes_nothing() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    for seed in 0..12 {
        for fuse in 0.. {
            let mut rng = Rng::new(seed << 16 | fuse);
            let directory = PowerLossDirectory::default();
            create(&image, &directory);
            let mut oracle = DiskOracle::new(&image.content);
            let volume = open(&image, &directory);
            for layer in 1..5 {
                assert!((0..4).all(|tag| step(&volume, &mut oracle, &mut rng, 10 * layer + tag)));
                drop(volume.freeze().unwrap());
                oracle.flushed();
            }
            directory.set_fuse(fuse);
            let merged = volume.compact().is_ok();
            assert!(merged || directory.is_dead());
            drop(volume);
            if seed % 2 == 0 {
                directory.kill_process();
            } else {
                directory.lose_power(&mut rng);
            }
            let volume = open(&image, &directory);
            let right = check_after(seed % 2 == 0, &mut oracle, &read_all(&volume));
            right.unwrap_or_else(|e| panic!("seed {seed}, fuse {fuse}: {e}"));
            volume.compact().unwrap();
            drop(volume);
            directory.lose_power(&mut rng);
            let content = read_all(&open(&image, &directory));
            oracle.check_after_crash(&content).unwrap_or_else(|e| panic!("seed {seed}, fuse {fuse}, again: {e}"));
            if merged {
                break;
            }
        }
    }
}

/// Writers count up in two blocks each, the first one first: a snapshot of one moment never has more
/// in the second.
#[test]
fn a_snapshot_under_writers_is_of_one_moment() {
    const WRITERS: u64 = 4;
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let path = dir.path().join("volume");
    std::fs::create_dir(&path).unwrap();
    create(&image, &HostDirectory::new(&path));
    let volume = Volume::open_in(Arc::new(HostDirectory::new(&path)), &image.store, &image.cache).unwrap();
    let counters = |content: &[u8], writer: u64| {
        let at = |block: u64| u64::from_le_bytes(*content[block as usize * 4096..].first_chunk().unwrap());
        (at(2 * writer + 1), at(2 * writer + 40))
    };
    for writer in 0..WRITERS {
        volume.write_zeroes((2 * writer + 1) * 4096, 4096, false).unwrap();
        volume.write_zeroes((2 * writer + 40) * 4096, 4096, false).unwrap();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (volume, done) = (&volume, &done);
            scope.spawn(move || {
                for count in 1_u64.. {
                    for block in [2 * writer + 1, 2 * writer + 40] {
                        // Whole blocks, and parts that are merged.
                        let len = if writer % 2 == 0 { 8 } else { 1 };
                        volume.write_at(&tagged(count, len), block * 4096, false).unwrap();
                    }
                    if count % 64 == 0 {
                        volume.flush().unwrap();
                    }
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let mut last = vec![0; WRITERS as usize];
        for _ in 0..40 {
            let frozen = volume.freeze().unwrap();
            let content = read_frozen(&frozen).unwrap();
            for writer in 0..WRITERS {
                let (first, second) = counters(&content, writer);
                assert!(first == second || first == second + 1, "writer {writer}: {first} and {second}");
                assert!(second >= last[writer as usize], "writer {writer} went back");
                last[writer as usize] = second;
            }
            let manifest = import(&image, &frozen, &content).unwrap();
            volume.rebase(frozen, manifest).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let content = read_all(&volume);
    assert!((0..WRITERS).all(|writer| counters(&content, writer).0 == counters(&content, writer).1));
    volume.flush().unwrap();
    drop(volume);
    let volume = Volume::open_in(Arc::new(HostDirectory::new(&path)), &image.store, &image.cache).unwrap();
    assert!(read_all(&volume) == content);
}

#[test]
fn layers_that_failed_snapshots_leave_are_merged_and_their_files_go() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let directory = PowerLossDirectory::default();
    create(&image, &directory);
    let volume = open(&image, &directory);
    let mut oracle = DiskOracle::new(&image.content);
    let mut rng = Rng::new(5);
    for tag in 1..200 {
        assert!(step(&volume, &mut oracle, &mut rng, tag));
        drop(volume.freeze().unwrap());
        assert!(volume.frozen_layers() <= 8);
    }
    oracle.check_running(&read_all(&volume)).unwrap();
    volume.compact().unwrap();
    assert_eq!(volume.frozen_layers(), 1);
    let frozen = volume.freeze().unwrap();
    let manifest = import(&image, &frozen, &oracle.newest()).unwrap();
    volume.rebase(frozen, manifest.clone()).unwrap();
    assert_eq!(volume.frozen_layers(), 0);
    // All that was written is in the image now; the newest layer has an empty file to write to.
    let paths = directory.paths();
    assert!(matches!(&paths[..], [data, record] if data.ends_with("/data.0") && record == "volume.json"), "{paths:?}");
    assert!(read_all(&volume) == oracle.newest());
    // Nothing was written: nothing is frozen, and the same content comes at once.
    let report = volume.snapshot(&nobody()).unwrap();
    assert!(report.existed && report.digest == manifest.digest());
    assert_eq!(directory.paths(), paths);
}

#[test]
fn a_full_host_fails_the_snapshot_and_no_content() {
    // The record cannot be written when the new layer takes writes already.
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let directory = PowerLossDirectory::default();
    create(&image, &directory);
    let volume = open(&image, &directory);
    let mut oracle = DiskOracle::new(&image.content);
    oracle.write(0, 8, 7);
    volume.write_at(&tagged(7, 8), 0, false).unwrap();
    directory.set_full(true);
    assert_eq!(volume.freeze().unwrap_err().kind(), VolumeErrorKind::NoSpace);
    oracle.write(8, 8, 9);
    volume.write_at(&tagged(9, 8), 4096, false).unwrap();
    volume.flush().unwrap();
    oracle.flushed();
    directory.set_full(false);
    drop(volume);
    directory.lose_power(&mut Rng::new(1));
    let volume = open(&image, &directory);
    oracle.check_after_crash(&read_all(&volume)).unwrap();
    assert_eq!(volume.frozen_layers(), 0);
}

/// Where a killed writer works; its presence makes the test below act as that writer.
const WRITER_DIRECTORY: &str = "BULBIL_TEST_SNAPSHOT_WRITER";
const WRITER_SEED: &str = "BULBIL_TEST_SNAPSHOT_WRITER_SEED";
const CAMPAIGN: &str = "nothing_acknowledged_is_lost_when_processes_are_killed_in_snapshots";

#[test]
fn nothing_acknowledged_is_lost_when_processes_are_killed_in_snapshots() {
    if let Ok(directory) = std::env::var(WRITER_DIRECTORY) {
        write_until_killed(Path::new(&directory), std::env::var(WRITER_SEED).unwrap().parse().unwrap());
    }
    let seed: u64 = std::process::id().into();
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let (mut snapshots, kills) = (0, rounds("BULBIL_TEST_SNAPSHOT_KILLS", 60));
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let path = dir.path().join("volume");
    std::fs::create_dir(&path).unwrap();
    create(&image, &HostDirectory::new(&path));
    let mut oracle = DiskOracle::new(&image.content);
    for kill in 0..kills {
        let lines = run_writer(dir.path(), rng.next_u64(), rng.below(1500));
        snapshots += replay(&lines, &mut oracle, &image);
        let storage = Arc::new(HostDirectory::new(&path));
        let volume = Volume::open_in(storage, &image.store, &image.cache).unwrap();
        oracle
            .check_after_kill(&read_all(&volume))
            .unwrap_or_else(|e| panic!("seed {seed}, kill {kill}: {e}\n{lines:?}"));
    }
    println!("{kills} kills, {snapshots} snapshots");
    assert!(snapshots > kills / 10, "{snapshots} snapshots");
}

/// Starts a writer, kills it after it has said `lines` lines, and returns all it said.
fn run_writer(directory: &Path, seed: u64, lines: u64) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CAMPAIGN, "--nocapture"])
        .env(WRITER_DIRECTORY, directory)
        .env(WRITER_SEED, seed.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut heard: Vec<String> = Vec::new();
    for line in said.by_ref() {
        heard.push(line);
        if heard.iter().filter(|line| line.contains('!')).count() as u64 > lines {
            break;
        }
    }
    child.kill().unwrap();
    // What was in the pipe when it died counts as well.
    heard.extend(said);
    child.wait().unwrap();
    heard
}

/// Says one line by one write, so that it is whole or not there.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The writer: says what it is about to do and what was acknowledged; snapshots are stored while it writes.
fn write_until_killed(directory: &Path, seed: u64) -> ! {
    let image = Image::make(directory);
    let storage = Arc::new(HostDirectory::new(&directory.join("volume")));
    let volume = Volume::open_in(storage, &image.store, &image.cache).unwrap();
    let sectors_in_all = volume.size_bytes() / 512;
    let mut rng = Rng::new(seed);
    std::thread::scope(|scope| {
        let mut snapshot: Option<std::thread::ScopedJoinHandle<'_, ()>> = None;
        loop {
            let first = rng.below(sectors_in_all);
            let sectors = (1 + rng.below(24)).min(sectors_in_all - first);
            if rng.one_in(16) && snapshot.as_ref().is_none_or(std::thread::ScopedJoinHandle::is_finished) {
                let frozen = volume.freeze().unwrap();
                say("!frozen\n".to_owned());
                let (image, volume) = (&image, &volume);
                snapshot = Some(scope.spawn(move || store_snapshot(image, volume, frozen)));
            } else if rng.one_in(6) {
                volume.flush().unwrap();
                say("!flushed\n".to_owned());
            } else if rng.one_in(6) {
                say(format!("!write {first} {sectors} 0\n"));
                volume.write_zeroes(first * 512, sectors * 512, false).unwrap();
            } else {
                let tag = rng.next_u64() | 1;
                say(format!("!write {first} {sectors} {tag}\n"));
                volume.write_at(&tagged(tag, sectors as usize), first * 512, false).unwrap();
            }
        }
    })
}

fn store_snapshot(image: &Image, volume: &Volume, frozen: FrozenState) {
    let base = frozen.base();
    let report = image.store.import_changes(base.as_ref(), frozen.size_bytes(), &frozen, &nobody()).unwrap();
    volume.rebase(frozen, image.store.manifest(&report.digest).unwrap()).unwrap();
    say(format!("!stored {}\n", report.digest));
}

/// Tells the oracle what happened, and checks the snapshots that were stored; returns how many.
fn replay(lines: &[String], oracle: &mut DiskOracle, image: &Image) -> u64 {
    let (mut frozen, mut stored) = (None, 0);
    for line in lines.iter().filter_map(|line| line.split('!').nth(1)) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["flushed"] => oracle.flushed(),
            ["frozen"] => {
                oracle.flushed();
                frozen = Some(oracle.newest());
            }
            ["stored", digest] => {
                let content = frozen.take().unwrap();
                let digest: Digest = digest.parse().unwrap();
                assert_eq!(digest, digest_of(&content));
                assert!(read_image(image, &image.store.manifest(&digest).unwrap()) == content);
                stored += 1;
            }
            ["write", first, sectors, tag] => {
                oracle.write(first.parse().unwrap(), sectors.parse().unwrap(), tag.parse().unwrap());
            }
            _ => {}
        }
    }
    stored
}
