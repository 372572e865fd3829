//! Measures requests to a volume in this process: 4 KiB reads and writes of blocks in its overlay.
//!
//! ```text
//! bench_requests DIRECTORY       nanoseconds of each, one thread and two
//! ```
#![allow(clippy::print_stdout, reason = "a measurement")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use bulbil_testkit::Rng;
use bulbil_volume::{BlockDevice, HostDirectory, Volume};

const SIZE_BYTES: u64 = 256 << 20;
const REQUESTS: u32 = 400_000;

fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args().nth(1).ok_or("usage: bench_requests DIRECTORY")?;
    let path = std::path::PathBuf::from(parent).join(format!("bench-requests.{}", std::process::id()));
    std::fs::create_dir_all(&path)?;
    let volume = Volume::without_base(SIZE_BYTES, Arc::new(HostDirectory::new(&path)))?;
    for offset in (0..SIZE_BYTES).step_by(1 << 20) {
        volume.write_at(&vec![1; 1 << 20], offset, false)?;
    }
    for threads in [1, 2, 1, 2] {
        for (name, write) in [("read", false), ("write", true)] {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for seed in 0..threads {
                    let volume = &volume;
                    scope.spawn(move || request(volume, seed, write));
                }
            });
            println!("{threads} threads, {name}: {} ns", start.elapsed().as_nanos() / u128::from(REQUESTS));
        }
    }
    drop(volume);
    Ok(std::fs::remove_dir_all(&path)?)
}

fn request(volume: &Volume, seed: u64, write: bool) {
    let mut rng = Rng::new(seed);
    let mut buf = [7; 4096];
    for _ in 0..REQUESTS {
        let offset = rng.below(SIZE_BYTES / 4096) * 4096;
        if write {
            volume.write_at(&buf, offset, false).expect("the directory has room");
        } else {
            volume.read_at(&mut buf, offset).expect("the directory can be read");
        }
    }
}
