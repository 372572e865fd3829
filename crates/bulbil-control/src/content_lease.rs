//! Contents that processes beside the daemon read, and that therefore stay in the store.
//!
//! ```text
//! run/leases/lock                  held shared while a lease is begun and while a shim takes a snapshot, whose content
//!                                  nothing refers to yet; alone while it is decided what nothing needs
//! run/leases/<digest>.<pid>.<n>    held shared as long as the content is read; whoever dies lets go
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bulbil_store::Digest;
use rustix::fs::{FlockOperation, flock};

use crate::data_dir::DataDir;
use crate::error::ControlError;

/// Tells the leases of one process apart.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Keeps a content in the store until it is dropped.
#[derive(Debug)]
pub(crate) struct ContentLease {
    path: PathBuf,
    _held: File,
}

/// While it lives, nobody begins a lease.
#[derive(Debug)]
pub(crate) struct NoNewLease(#[allow(dead_code, reason = "held for its lock")] File);

/// While it lives, no content is removed.
#[derive(Debug)]
pub(crate) struct NoRemoval(#[allow(dead_code, reason = "held for its lock")] File);

/// Waits until no content is being removed, and keeps it so.
pub(crate) fn without_removals(data: &DataDir) -> Result<NoRemoval, ControlError> {
    let look = || -> io::Result<NoRemoval> {
        let gate = open(&directory(data)?.join("lock"))?;
        flock(&gate, FlockOperation::LockShared)?;
        Ok(NoRemoval(gate))
    };
    look().map_err(|e| failed(&e))
}

fn failed(e: &io::Error) -> ControlError {
    ControlError::io("cannot keep a content in the store", e)
}

fn directory(data: &DataDir) -> io::Result<PathBuf> {
    let directory = data.run_file("leases");
    match std::fs::create_dir(&directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(directory),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

impl ContentLease {
    /// Keeps `digest` in the store, if `is_there` finds that it is there at this moment.
    ///
    /// # Errors
    /// What `is_there` says; `Failed` when the lease cannot be made.
    pub(crate) fn begin<T>(
        data: &DataDir,
        digest: &Digest,
        is_there: impl FnOnce() -> Result<T, ControlError>,
    ) -> Result<(Self, T), ControlError> {
        let begin = || -> io::Result<(Self, File)> {
            let directory = directory(data)?;
            let gate = open(&directory.join("lock"))?;
            flock(&gate, FlockOperation::LockShared)?;
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let hex = digest.to_string().replace(':', "-");
            let path = directory.join(format!("{hex}.{}.{number}", std::process::id()));
            let held = open(&path)?;
            flock(&held, FlockOperation::LockShared)?;
            Ok((Self { path, _held: held }, gate))
        };
        let (lease, gate) = begin().map_err(|e| failed(&e))?;
        let found = is_there()?;
        drop(gate);
        Ok((lease, found))
    }
}

impl Drop for ContentLease {
    fn drop(&mut self) {
        // What is left over is found by its lock.
        drop(std::fs::remove_file(&self.path));
    }
}

/// The contents that are read by some process; until the second value is dropped there will be no more of them.
pub(crate) fn leased_contents(data: &DataDir) -> Result<(Vec<Digest>, NoNewLease), ControlError> {
    let look = || -> io::Result<(Vec<Digest>, NoNewLease)> {
        let directory = directory(data)?;
        let gate = open(&directory.join("lock"))?;
        flock(&gate, FlockOperation::LockExclusive)?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            let Some(digest) = digest_of(&path) else { continue };
            let file = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Nobody holds it any more.
                Ok(()) => drop(std::fs::remove_file(&path)),
                Err(rustix::io::Errno::WOULDBLOCK) => found.push(digest),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok((found, NoNewLease(gate)))
    };
    look().map_err(|e| failed(&e))
}

fn digest_of(path: &Path) -> Option<Digest> {
    let name = path.file_name()?.to_str()?;
    let (digest, _) = name.split_once('.')?;
    digest.replacen('-', ":", 1).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_is_leased_until_its_lease_is_dropped() {
        let dir = tempfile::Builder::new().prefix("bb-").tempdir_in("/tmp").unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let digest = |byte: &str| format!("sha256:{}", byte.repeat(32)).parse::<Digest>().unwrap();
        let leased = || leased_contents(&data).unwrap().0;
        assert_eq!(leased(), []);
        let (first, _) = ContentLease::begin(&data, &digest("0a"), || Ok(())).unwrap();
        let (second, _) = ContentLease::begin(&data, &digest("0a"), || Ok(())).unwrap();
        assert_eq!(leased(), [digest("0a"); 2]);
        drop(first);
        assert_eq!(leased(), [digest("0a")]);
        drop(second);
        assert_eq!(leased(), []);
        let missing = ControlError::new(crate::error::ErrorCode::NotFound, "gone");
        assert!(ContentLease::begin(&data, &digest("0b"), || Err::<(), _>(missing)).is_err());
        assert_eq!(leased(), []);
        // What a killed process has left.
        std::fs::File::create(dir.path().join("run/leases").join(format!("sha256-{}.1.0", "0c".repeat(32)))).unwrap();
        assert_eq!(leased(), []);
        assert_eq!(std::fs::read_dir(dir.path().join("run/leases")).unwrap().count(), 1);
    }
}
