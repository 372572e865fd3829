//! An image to put volumes above, and random requests to them.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "each test uses its part; a test may panic and makes small numbers"
)]

use std::path::Path;
use std::sync::Arc;

use bulbil_store::{Manifest, Store};
use bulbil_testkit::{DiskOracle, MemoryDisk, PowerLossDirectory, Rng, tagged};
use bulbil_volume::{BaseCache, BlockDevice as _, StorageDirectory, Volume, open_for_store};

/// Sectors of the image.
pub const SECTORS: u64 = 96 * 8;

/// An image of tagged sectors, half of it zero, in a store of its own.
pub struct Image {
    pub store: Arc<Store>,
    pub cache: Arc<BaseCache>,
    pub manifest: Manifest,
    pub content: Vec<u8>,
}

impl Image {
    pub fn make(directory: &Path) -> Self {
        Self::make_in(directory, Arc::new(Store::open_or_create(&directory.join("store")).unwrap()))
    }

    pub fn make_in(directory: &Path, store: Arc<Store>) -> Self {
        let mut content = Vec::new();
        for block in 0..SECTORS / 8 {
            content.extend(if block % 3 == 0 { vec![0; 4096] } else { tagged(1000 + block, 8) });
        }
        let disk = MemoryDisk(content.clone());
        let report = store.import(&disk, &disk).unwrap();
        let manifest = store.manifest(&report.digest).unwrap();
        let cache = Arc::new(BaseCache::open(&directory.join("cache")).unwrap());
        Self { store, cache, manifest, content }
    }

    pub fn volume(&self, directory: Arc<dyn StorageDirectory>) -> Volume {
        let size_bytes = self.content.len() as u64;
        let directory = open_for_store(directory, &self.store).unwrap();
        Volume::over_image(size_bytes, self.manifest.clone(), &self.store, &self.cache, directory).unwrap()
    }
}

pub fn read_all(volume: &Volume) -> Vec<u8> {
    let mut content = vec![0; volume.size_bytes() as usize];
    volume.read_at(&mut content, 0).unwrap();
    content
}

/// Ends the process, or the machine with it; says whether only the process.
pub fn kill_or_lose_power(directory: &PowerLossDirectory, rng: &mut Rng) -> bool {
    let killed = rng.one_in(3);
    if killed {
        directory.kill_process();
    } else {
        directory.lose_power(rng);
    }
    killed
}

/// Checks what a disk holds after its process has ended, or the machine with it.
pub fn check_after(killed: bool, oracle: &mut DiskOracle, content: &[u8]) -> Result<(), String> {
    if killed { oracle.check_after_kill(content) } else { oracle.check_after_crash(content) }
}

/// One random request; the oracle hears of it first. `false` when it failed: the machine is off.
pub fn step(volume: &Volume, oracle: &mut DiskOracle, rng: &mut Rng, tag: u64) -> bool {
    let sectors_in_all = volume.size_bytes() / 512;
    let first = rng.below(sectors_in_all);
    let whole_blocks = rng.one_in(2);
    let first = if whole_blocks { first / 8 * 8 } else { first };
    let longest = if rng.one_in(4) { 80 } else { 12 };
    let sectors = (1 + rng.below(longest)).min(sectors_in_all - first);
    let sectors = if whole_blocks { sectors.next_multiple_of(8) } else { sectors };
    let (offset, len_bytes) = (first * 512, sectors * 512);
    let fua = rng.one_in(8);
    let done = match rng.below(10) {
        0..=5 => {
            oracle.write(first, sectors, tag);
            volume.write_at(&tagged(tag, sectors as usize), offset, fua)
        }
        6 => {
            oracle.write(first, sectors, 0);
            volume.write_zeroes(offset, len_bytes, fua)
        }
        7 => {
            // A discard takes whole blocks only.
            let (from, to) = (first.next_multiple_of(8), (first + sectors) / 8 * 8);
            if from < to {
                oracle.write(from, to - from, 0);
            }
            volume.discard(offset, len_bytes, fua)
        }
        _ => {
            if volume.flush().is_err() {
                return false;
            }
            oracle.flushed();
            return true;
        }
    };
    if done.is_err() {
        return false;
    }
    oracle.answered();
    if fua {
        // This volume makes everything durable with a FUA write.
        oracle.flushed();
    }
    true
}

/// Writes to a volume and cuts it off at random points, ten times for each seed: nothing that was acknowledged is lost.
/// Returns the number of crashes.
pub fn crash_again_and_again(image: &Image, seeds: u64) -> u32 {
    let (mut crashes, mut tag) = (0, 1 << 32);
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let directory = PowerLossDirectory::default();
        let mut oracle = DiskOracle::new(&image.content);
        for _ in 0..10 {
            let volume = image.volume(Arc::new(directory.clone()));
            directory.set_fuse(rng.below(120));
            loop {
                tag += 1;
                if !step(&volume, &mut oracle, &mut rng, tag) {
                    break;
                }
                let mut content = vec![0; image.content.len()];
                if rng.one_in(20) && volume.read_at(&mut content, 0).is_ok() {
                    oracle.check_running(&content).unwrap_or_else(|e| panic!("seed {seed}, running: {e}"));
                }
            }
            assert!(directory.is_dead(), "seed {seed}: a request failed before the crash");
            let killed = kill_or_lose_power(&directory, &mut rng);
            crashes += 1;
            let content = read_all(&image.volume(Arc::new(directory.clone())));
            let right = check_after(killed, &mut oracle, &content);
            right.unwrap_or_else(|e| panic!("seed {seed}, crash {crashes}, killed {killed}: {e}"));
        }
    }
    crashes
}
