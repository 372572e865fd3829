//! Measures reads of a volume whose image lies in a store on this host.
//!
//! ```text
//! bench_reads DIRECTORY SIZE_MIB       makes a store in DIRECTORY (once), then measures
//! ```
//! Each line: what was measured, its rate, and the processor time that it took, of all threads. Cold means
//! that the base cache is empty; the store's own files stay in the page cache.
#![allow(clippy::cast_precision_loss, reason = "rates are shown with three digits")]

use std::error::Error;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bulbil_store::{Manifest, Store};
use bulbil_testkit::{MemoryDisk, Rng};
use bulbil_types::VolumeId;
use bulbil_volume::{BaseCache, BlockDevice as _, Volume, VolumeDirectory};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(directory), Some(size_mib)) = (args.next(), args.next()) else {
        return Err("usage: bench_reads DIRECTORY SIZE_MIB".into());
    };
    let bench = Bench::open(Path::new(&directory), size_mib.parse::<u64>()? << 20)?;
    for _ in 0..3 {
        bench.sequential(128 << 10, "cold sequential 128 KiB")?;
        bench.sequential(1 << 20, "cold sequential 1 MiB")?;
        bench.random(200_000)?;
    }
    Ok(())
}

struct Bench {
    directory: PathBuf,
    store: Arc<Store>,
    manifest: Manifest,
    volumes: VolumeDirectory,
}

impl Bench {
    fn open(directory: &Path, size_bytes: u64) -> Result<Self, Box<dyn Error>> {
        let store = Arc::new(Store::open_or_create(&directory.join("store"))?);
        let digest = match store.digests()?.first() {
            Some(digest) => *digest,
            None => {
                let disk = MemoryDisk(content(usize::try_from(size_bytes)?));
                store.import(&disk, &disk)?.digest
            }
        };
        let manifest = store.manifest(&digest)?;
        let volumes = VolumeDirectory::open(&directory.join("volumes"))?;
        Ok(Self { directory: directory.to_owned(), store, manifest, volumes })
    }

    /// A new volume over an empty cache.
    fn cold(&self) -> Result<Volume, Box<dyn Error>> {
        let cache = self.directory.join("cache");
        if cache.exists() {
            std::fs::remove_dir_all(&cache)?;
        }
        let id = VolumeId::random();
        self.volumes.create(&id, self.manifest.size_bytes(), Some(&self.manifest))?;
        Ok(self.volumes.open_volume(&id, &self.store, &Arc::new(BaseCache::open(&cache)?))?)
    }

    fn sequential(&self, request_bytes: usize, name: &str) -> Result<(), Box<dyn Error>> {
        let volume = self.cold()?;
        let mut buf = vec![0; request_bytes];
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        let mut at = 0;
        while at + buf.len() as u64 <= volume.size_bytes() {
            volume.read_at(&mut buf, at)?;
            at += buf.len() as u64;
        }
        let seconds = start.elapsed().as_secs_f64();
        let (rate, cpu) = (at as f64 / 1e6 / seconds, cpu_seconds()? - cpu);
        let frames = at as f64 / 131_072.0;
        writeln!(io::stdout(), "{name:<28} {rate:>9.0} MB/s {:>8.1} µs CPU per frame", cpu * 1e6 / frames)?;
        Ok(())
    }

    /// Random 4 KiB at depth 1: first each frame of the disk once, in a random order, then warm ones.
    fn random(&self, warm_reads: u32) -> Result<(), Box<dyn Error>> {
        let volume = self.cold()?;
        let mut rng = Rng::new(1);
        let mut buf = [0; 4096];
        let frames = volume.size_bytes() / (128 << 10);
        let mut order: Vec<u64> = (0..frames).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, usize::try_from(rng.below(i as u64 + 1))?);
        }
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        for frame in &order {
            volume.read_at(&mut buf, frame * (128 << 10) + rng.below(32) * 4096)?;
        }
        report("cold random 4 KiB", start, cpu, frames)?;
        std::thread::sleep(std::time::Duration::from_millis(300));
        let blocks = volume.size_bytes() / 4096;
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        for _ in 0..warm_reads {
            volume.read_at(&mut buf, rng.below(blocks) * 4096)?;
        }
        report("warm random 4 KiB", start, cpu, u64::from(warm_reads))
    }
}

fn report(name: &str, start: Instant, cpu: f64, count: u64) -> Result<(), Box<dyn Error>> {
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    let (rate, micros) = (count as f64 / seconds, cpu * 1e6 / count as f64);
    writeln!(io::stdout(), "{name:<28} {rate:>9.0} IOPS {micros:>8.2} µs CPU each")?;
    Ok(())
}

/// Processor time of this process, all threads, user and system; in steps of 10 ms.
fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).ok_or("no times in /proc");
    Ok((ticks(11)? + ticks(12)?) as f64 / 100.0)
}

/// Files of this system's `/usr`, one after another: what a guest's disk holds, too.
fn content(len_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len_bytes + (1 << 20));
    let mut todo = vec![PathBuf::from("/usr")];
    while let Some(directory) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.into_iter().filter(|path| !path.is_symlink()) {
            if path.is_dir() {
                todo.push(path);
            } else if bytes.len() < len_bytes {
                bytes.extend(std::fs::read(path).unwrap_or_default());
                bytes.resize(bytes.len().next_multiple_of(4096), 0);
            }
        }
    }
    bytes.truncate(len_bytes);
    bytes
}
