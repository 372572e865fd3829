//! What `cargo xtask bench launch` starts: volumes without a virtual machine.
//!
//! ```text
//! bench_volume create DATA_DIR DIGEST SIZE_BYTES             make a volume, print its id
//! bench_volume time-creates DATA_DIR DIGEST SIZE_BYTES N     make N and print the microseconds of each
//! bench_volume time-clones DATA_DIR VOLUME N              clone it N times and print the microseconds of each
//! bench_volume time-live-clones DATA_DIR VOLUME N         the same of an open clone of it, with a write before each
//! bench_volume open-many DATA_DIR DIGEST SIZE_BYTES N        open N, print the bytes of memory of each
//! bench_volume serve DATA_DIR VOLUME SOCKET [--nbd | --vhost-user] [--boot]
//! bench_volume working-set DATA_DIR DIGEST                   print what the image's boot trace comes to
//! ```
//! `serve` goes on until standard input is closed, with `--boot` as for a machine that starts. The line `snapshot` takes
//! a snapshot meanwhile, `boot-over` keeps what the boot has read, `stats` prints what reads of the image have cost.
//! A volume is made and opened as a launch does it: from the image's manifest, durable.
//! A new data directory belongs to the store that `BULBIL_STORE` names.

use std::error::Error;
use std::io::{self, BufRead as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bulbil_control::{DataDir, StoreChoice, open_cache, open_store};
use bulbil_export::nbd::{Export, NbdServer};
use bulbil_export::vhost_user::{Options, VhostUserServer};
use bulbil_store::{Digest, ImportObserver, Store};
use bulbil_types::VolumeId;
use bulbil_volume::{BlockDevice as _, Volume, VolumeDirectory, WorkingSet, boot_working_set};

const USAGE: &str = "usage: bench_volume create DATA_DIR DIGEST SIZE_BYTES
       bench_volume time-creates DATA_DIR DIGEST SIZE_BYTES N
       bench_volume time-clones DATA_DIR VOLUME N
       bench_volume time-live-clones DATA_DIR VOLUME N
       bench_volume open-many DATA_DIR DIGEST SIZE_BYTES N
       bench_volume serve DATA_DIR VOLUME SOCKET [--nbd | --vhost-user] [--boot]
       bench_volume working-set DATA_DIR DIGEST";

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["create", data, digest, size_bytes] => {
            let id = Volumes::open(data)?.create(&digest.parse()?, size_bytes.parse()?)?;
            writeln!(io::stdout(), "{id}")?;
        }
        ["time-creates", data, digest, size_bytes, count] => {
            let (volumes, digest, size_bytes) = (Volumes::open(data)?, digest.parse()?, size_bytes.parse()?);
            for _ in 0..count.parse::<u32>()? {
                let start = Instant::now();
                volumes.create(&digest, size_bytes)?;
                writeln!(io::stdout(), "{}", start.elapsed().as_micros())?;
            }
        }
        ["time-clones", data, volume, count] => {
            let (volumes, volume) = (Volumes::open(data)?, volume.parse()?);
            for _ in 0..count.parse::<u32>()? {
                let start = Instant::now();
                let clone = volumes.directory.clone_volume(&volume, &VolumeId::random())?;
                writeln!(io::stdout(), "{}", start.elapsed().as_micros())?;
                clone.ok_or("the host's file system has no hard links")?;
            }
        }
        ["time-live-clones", data, volume, count] => {
            Volumes::open(data)?.clone_live(&volume.parse()?, count.parse()?)?;
        }
        ["open-many", data, digest, size_bytes, count] => {
            let each = Volumes::open(data)?.open_many(&digest.parse()?, size_bytes.parse()?, count.parse()?)?;
            writeln!(io::stdout(), "{each}")?;
        }
        ["serve", data, volume, socket, ref flags @ ..] => {
            let has = |flag: &str| flags.contains(&flag);
            let volumes = Volumes::open(data)?;
            volumes.serve(&volume.parse()?, Path::new(socket), has("--vhost-user"), has("--boot"))?;
        }
        ["working-set", data, digest] => {
            let found = Volumes::open(data)?.working_set(&digest.parse()?)?.ok_or("the image has no boot trace")?;
            writeln!(io::stdout(), "{} {} {}", found.read_bytes, found.frames, found.stored_bytes)?;
        }
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

/// The store and the volumes of one data directory.
struct Volumes {
    data: DataDir,
    store: Arc<Store>,
    directory: VolumeDirectory,
}

impl Volumes {
    fn open(data: &str) -> Result<Self, Box<dyn Error>> {
        let data = DataDir::open(Path::new(data))?;
        let location = std::env::var("BULBIL_STORE").ok().map(|location| location.parse()).transpose()?;
        let store = Arc::new(open_store(&data, &StoreChoice { location, key: None })?.0);
        let directory = VolumeDirectory::open(&data.volumes())?;
        Ok(Self { data, store, directory })
    }

    fn create(&self, digest: &Digest, size_bytes: u64) -> Result<VolumeId, Box<dyn Error>> {
        let id = VolumeId::random();
        let manifest = self.store.manifest(digest)?;
        self.directory.create(&id, size_bytes, Some(&manifest))?;
        Ok(id)
    }

    /// Clones an open volume that is written to and flushed before each clone.
    fn clone_live(&self, id: &VolumeId, count: u32) -> Result<(), Box<dyn Error>> {
        let cache = Arc::new(open_cache(&self.data)?);
        let parent = VolumeId::random();
        self.directory.clone_volume(id, &parent)?.ok_or("the host's file system has no hard links")?;
        let volume = self.directory.open_volume(&parent, &self.store, &cache)?;
        for number in 0..count {
            volume.write_at(&[7; 4096], u64::from(number) * 4096, true)?;
            let start = Instant::now();
            if volume.clone_as(&VolumeId::random())?.is_none() {
                // Eight layers are shared: the ninth clone is a snapshot first.
                let taken = volume.snapshot(&Silent)?;
                self.create(&taken.digest, taken.size_bytes)?;
            }
            writeln!(io::stdout(), "{}", start.elapsed().as_micros())?;
        }
        Ok(())
    }

    /// Memory that each of `count` open volumes takes, when each was read from once.
    fn open_many(&self, digest: &Digest, size_bytes: u64, count: u64) -> Result<u64, Box<dyn Error>> {
        let cache = Arc::new(open_cache(&self.data)?);
        let open = || -> Result<_, Box<dyn Error>> {
            let volume = self.directory.open_volume(&self.create(digest, size_bytes)?, &self.store, &cache)?;
            volume.read_at(&mut [0; 4096], 0)?;
            Ok(volume)
        };
        // The first brings what all share.
        let mut volumes = vec![open()?];
        let before = own_memory_bytes()?;
        for _ in 0..count {
            volumes.push(open()?);
        }
        Ok(own_memory_bytes()?.saturating_sub(before) / count.max(1))
    }

    fn working_set(&self, digest: &Digest) -> Result<Option<WorkingSet>, Box<dyn Error>> {
        let cache = Arc::new(open_cache(&self.data)?);
        Ok(boot_working_set(&self.store, &cache, self.store.manifest(digest)?)?)
    }

    fn serve(&self, id: &VolumeId, socket: &Path, vhost_user: bool, boot: bool) -> Result<(), Box<dyn Error>> {
        let cache = Arc::new(open_cache(&self.data)?);
        let volume = Arc::new(self.directory.open_volume(id, &self.store, &cache)?);
        if boot {
            volume.expect_boot();
        }
        if vhost_user {
            let server = VhostUserServer::bind(socket, Arc::clone(&volume) as _, Options::default())?.spawn()?;
            obey(&volume)?;
            server.shutdown();
        } else {
            let export = Export { name: String::new(), description: id.to_string(), device: Arc::clone(&volume) as _ };
            let server = NbdServer::bind(socket)?.export(export)?.spawn()?;
            obey(&volume)?;
            server.shutdown();
        }
        Ok(())
    }
}

/// Does what standard input says, line by line, until it is closed.
fn obey(volume: &Volume) -> Result<(), Box<dyn Error>> {
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            "snapshot" => writeln!(io::stderr(), "{}", volume.snapshot(&Silent)?.digest)?,
            "boot-over" => drop(volume.finish_recording()?),
            "stats" => writeln!(io::stderr(), "{:?}", volume.read_stats())?,
            other => return Err(format!("`{other}` is no command: there are snapshot, boot-over and stats").into()),
        }
    }
    Ok(())
}

struct Silent;

impl ImportObserver for Silent {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64, _stored_bytes: u64) {}
}

fn own_memory_bytes() -> Result<u64, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let kib = text.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.map(|kib: u64| kib * 1024).ok_or_else(|| "the kernel does not tell the memory of a process".into())
}
