//! Measures clones, snapshots and idle volumes in a directory that it makes and removes.
//!
//! ```text
//! bench_snapshots DIRECTORY      one JSON object a line: {"what": …, "value": …, "unit": …}
//! ```
//! Times are of the whole call, durable, on the file system that the directory is on.
#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a measurement"
)]

use std::error::Error;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bulbil_store::{Digest, Store};
use bulbil_testkit::{MemoryDisk, Rng};
use bulbil_types::VolumeId;
use bulbil_volume::{BaseCache, BlockDevice as _, FrozenState, Volume, VolumeDirectory};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BLOCK: u64 = 4096;

fn main() -> Result<()> {
    let parent = std::env::args().nth(1).ok_or("usage: bench_snapshots DIRECTORY")?;
    let path = PathBuf::from(parent).join(format!("bench-snapshots.{}", std::process::id()));
    let bench = Bench::new(&path)?;
    let measured = bench.run();
    std::fs::remove_dir_all(&path)?;
    measured
}

fn say(what: &str, value: f64, unit: &str) {
    println!("{{\"what\": \"{what}\", \"value\": {value:.3}, \"unit\": \"{unit}\"}}");
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn say_times(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: f64| ms(times[((times.len() - 1) as f64 * share) as usize]);
    say(&format!("{what}, median"), at(0.5), "ms");
    say(&format!("{what}, 99 %"), at(0.99), "ms");
    say(&format!("{what}, longest"), at(1.0), "ms");
}

struct Bench {
    path: PathBuf,
    store: Arc<Store>,
    cache: Arc<BaseCache>,
    volumes: VolumeDirectory,
    image: Digest,
    nobody: MemoryDisk,
}

impl Bench {
    fn new(path: &Path) -> Result<Self> {
        let store = Arc::new(Store::open_or_create(&path.join("store"))?);
        let cache = Arc::new(BaseCache::open(&path.join("cache"))?);
        let volumes = VolumeDirectory::open(&path.join("volumes"))?;
        let disk = MemoryDisk(Rng::new(1).bytes(128 << 20));
        let image = store.import(&disk, &disk)?.digest;
        Ok(Self { path: path.to_owned(), store, cache, volumes, image, nobody: MemoryDisk(Vec::new()) })
    }

    fn run(&self) -> Result<()> {
        for (name, size_bytes) in [("1 GiB", 1 << 30), ("1 TiB", 1 << 40), ("64 TiB", 64 << 40)] {
            let times = (0..200).map(|_| self.clone_of(&self.image, size_bytes).map(|(_, time)| time));
            say_times(&format!("clone of {name}"), times.collect::<Result<_>>()?);
        }
        self.thousand_clones()?;
        self.idle_volumes()?;
        self.growth()?;
        self.snapshots()?;
        self.stall()?;
        self.written_parent()
    }

    /// Makes a volume as a server does: the manifest is read each time.
    fn clone_of(&self, digest: &Digest, size_bytes: u64) -> Result<(VolumeId, Duration)> {
        let (id, start) = (VolumeId::random(), Instant::now());
        self.volumes.create(&id, size_bytes, Some(&self.store.manifest(digest)?))?;
        Ok((id, start.elapsed()))
    }

    fn open(&self, id: &VolumeId) -> Result<Volume> {
        Ok(self.volumes.open_volume(id, &self.store, &self.cache)?)
    }

    fn new_volume(&self, size_bytes: u64) -> Result<(VolumeId, Volume)> {
        let (id, _) = self.clone_of(&self.image, size_bytes)?;
        let volume = self.open(&id)?;
        Ok((id, volume))
    }

    fn thousand_clones(&self) -> Result<()> {
        let start = Instant::now();
        for _ in 0..1000 {
            self.clone_of(&self.image, 20 << 30)?;
        }
        say("1000 clones, one after another", ms(start.elapsed()), "ms");
        Ok(())
    }

    fn idle_volumes(&self) -> Result<()> {
        let ids =
            (0..500).map(|_| self.clone_of(&self.image, 1 << 40).map(|(id, _)| id)).collect::<Result<Vec<_>>>()?;
        let before = resident_bytes()?;
        let start = Instant::now();
        let open = ids.iter().map(|id| self.open(id)).collect::<Result<Vec<_>>>()?;
        say("opening a volume", ms(start.elapsed()) / 500.0, "ms");
        say("memory of an idle volume", (resident_bytes()? - before) / 500.0 / 1024.0, "KiB");
        drop(open);
        Ok(())
    }

    fn growth(&self) -> Result<()> {
        for (name, size_bytes) in [("1 GiB", 1 << 30), ("20 GiB", 20 << 30)] {
            let (id, volume) = self.new_volume(size_bytes)?;
            self.write_scattered(&volume, 1024, 7)?;
            volume.flush()?;
            let stored = stored_bytes(&self.path.join("volumes").join(id.as_str()))?;
            let what = format!("overlay of 4 MiB of scattered 4 KiB writes to {name}");
            say(&what, stored as f64 / f64::from(1 << 20), "MiB");
        }
        Ok(())
    }

    fn write_scattered(&self, volume: &Volume, blocks: u64, seed: u64) -> Result<()> {
        let mut rng = Rng::new(seed);
        for _ in 0..blocks {
            let block = rng.below(volume.size_bytes() / BLOCK);
            volume.write_at(&rng.bytes(4096), block * BLOCK, false)?;
        }
        Ok(())
    }

    /// Time by what was written since the last snapshot, on disks of two sizes.
    fn snapshots(&self) -> Result<()> {
        for (name, size_bytes) in [("1 GiB", 1 << 30), ("1 TiB", 1 << 40)] {
            let (_, volume) = self.new_volume(size_bytes)?;
            volume.snapshot(&self.nobody)?;
            for mib in [0_u64, 1, 16, 128] {
                let bytes = Rng::new(mib + size_bytes).bytes((mib << 20) as usize);
                for (chunk, index) in bytes.chunks(1 << 20).zip(0..) {
                    volume.write_at(chunk, (200 + index) << 20, false)?;
                }
                let start = Instant::now();
                volume.snapshot(&self.nobody)?;
                say(&format!("snapshot of {name}, {mib} MiB written in a row"), ms(start.elapsed()), "ms");
            }
            self.write_scattered(&volume, 256, size_bytes)?;
            let start = Instant::now();
            volume.snapshot(&self.nobody)?;
            say(&format!("snapshot of {name}, 1 MiB written in 256 places"), ms(start.elapsed()), "ms");
        }
        Ok(())
    }

    /// How long requests take while snapshots are taken, and while none is.
    fn stall(&self) -> Result<()> {
        let (_, volume) = self.new_volume(4 << 30)?;
        for (what, snapshots, store) in
            [("without snapshots", 0, false), ("during 8 freezes", 8, false), ("during 8 snapshots", 8, true)]
        {
            let done = AtomicBool::new(false);
            let (writes, flushes, freezes) = std::thread::scope(|scope| {
                let writer = scope.spawn(|| write_until(&volume, &done));
                let mut freezes = Vec::new();
                for _ in 0..snapshots {
                    std::thread::sleep(Duration::from_millis(400));
                    let start = Instant::now();
                    let frozen = volume.freeze().expect("the disk has room");
                    freezes.push(start.elapsed());
                    if store {
                        self.store_frozen(&volume, frozen);
                    }
                }
                if snapshots == 0 {
                    std::thread::sleep(Duration::from_secs(4));
                }
                done.store(true, Ordering::Relaxed);
                let (writes, flushes) = writer.join().expect("the writer does not panic");
                (writes, flushes, freezes)
            });
            say_times(&format!("4 KiB write {what}"), writes);
            say_times(&format!("flush {what}"), flushes);
            if snapshots > 0 {
                say_times(&format!("freeze {what}, guest not stopped"), freezes);
            }
        }
        Ok(())
    }

    fn store_frozen(&self, volume: &Volume, frozen: FrozenState) {
        let (base, size_bytes) = (frozen.base(), frozen.size_bytes());
        let report = self.store.import_changes(base.as_ref(), size_bytes, &frozen, &self.nobody);
        let digest = report.expect("the store has room").digest;
        let manifest = self.store.manifest(&digest).expect("just stored");
        volume.rebase(frozen, manifest).expect("the disk has room");
    }

    fn written_parent(&self) -> Result<()> {
        let (id, volume) = self.new_volume(64 << 30)?;
        self.write_scattered(&volume, 100_000, 3)?;
        volume.flush()?;
        let start = Instant::now();
        let report = volume.snapshot(&self.nobody)?;
        say("snapshot after 100000 scattered writes", ms(start.elapsed()), "ms");
        drop(volume);
        let times = (0..200).map(|_| self.clone_of(&report.digest, report.size_bytes).map(|(_, time)| time));
        say_times("clone of that snapshot", times.collect::<Result<_>>()?);
        self.volumes.remove(&id)?;
        Ok(())
    }
}

/// Writes blocks as a guest does, with a flush now and then: the times of writes and of flushes.
fn write_until(volume: &Volume, done: &AtomicBool) -> (Vec<Duration>, Vec<Duration>) {
    let mut rng = Rng::new(9);
    let (mut writes, mut flushes) = (Vec::new(), Vec::new());
    let block = rng.bytes(4096);
    while !done.load(Ordering::Relaxed) {
        let at = rng.below(volume.size_bytes() / BLOCK) * BLOCK;
        let start = Instant::now();
        volume.write_at(&block, at, false).expect("the disk has room");
        writes.push(start.elapsed());
        if rng.one_in(50) {
            let start = Instant::now();
            volume.flush().expect("the disk has room");
            flushes.push(start.elapsed());
        }
    }
    (writes, flushes)
}

fn resident_bytes() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split_whitespace().nth(1).ok_or("statm has two numbers")?.parse()?;
    Ok((pages * 4096) as f64)
}

fn stored_bytes(directory: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let found = entry.metadata()?;
        total += if found.is_dir() { stored_bytes(&entry.path())? } else { found.blocks() * 512 };
    }
    Ok(total)
}
