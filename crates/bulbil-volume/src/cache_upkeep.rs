//! Keeps the base cache within its bound, and this process' view of it up to date.
//!
//! | what | when | by whom |
//! |---|---|---|
//! | files lose their names until 90 % of the bound is left | it was passed | one process at a time, by a try-lock |
//! | a file that lost its name is let go of | every few seconds | each process, for its own |
//! | use is recorded as the file's time of change | about every ten seconds of use | each process |
//! | files of an earlier boot, and half-made ones, are removed | once | the first process |
//!
//! Nothing is ever cut out of a file: whoever has it open reads what it was promised.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::cache::{CacheShared, PackHandle, lock};
use crate::cache_file::{CacheFile, HEADER_BYTES, header};

const RECORD_USE_EVERY: Duration = Duration::from_secs(10);

/// The bound is also kept when nobody writes, since it may be smaller than the last time.
const EVICT_EVERY: Duration = Duration::from_secs(60);

/// A file is made within milliseconds; one that is half made for this long has lost its maker.
const HALF_MADE: Duration = Duration::from_secs(60);

/// A file of the cache, as its directory shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) path: PathBuf,
    pub(crate) used_at: SystemTime,
    /// Bytes on the disk, not the length: files are sparse.
    pub(crate) bytes: u64,
}

/// Lists the files of a cache with frames.
pub(crate) fn list(directory: &Path) -> io::Result<Vec<Listed>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "frames") {
            continue;
        }
        match entry.metadata() {
            // Evicted by another process meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => {
                let metadata = other?;
                found.push(Listed { path, used_at: metadata.modified()?, bytes: metadata.blocks() * 512 });
            }
        }
    }
    Ok(found)
}

/// Chooses what to evict: the files not used for longest, until 90 % of the bound is left.
fn choose(mut files: Vec<Listed>, max_bytes: u64) -> Vec<Listed> {
    let mut left: u64 = files.iter().map(|file| file.bytes).sum();
    if left <= max_bytes {
        return Vec::new();
    }
    let aim = max_bytes / 10 * 9;
    files.sort_by_key(|file| file.used_at);
    let leave = |file: &Listed| {
        let evict = left > aim;
        left -= if evict { file.bytes } else { 0 };
        evict
    };
    files.into_iter().take_while(leave).collect()
}

/// Takes names from files until the cache is within its bound, unless another process is doing that.
pub(crate) fn evict(shared: &CacheShared, max_bytes: u64) {
    let evicted = with_lock(&shared.directory, || {
        for file in choose(list(&shared.directory)?, max_bytes) {
            match std::fs::remove_file(&file.path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => tracing::debug!(file = %file.path.display(), bytes = file.bytes, "evicted from the base cache"),
            }
        }
        Ok(())
    });
    if let Err(error) = evicted {
        tracing::warn!(%error, "cannot keep the base cache within its bound");
    }
    release_unlinked(shared);
}

/// Runs `work` if no other process holds the lock of the cache.
fn with_lock(directory: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(directory.join("lock"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => work(),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn open_files(shared: &CacheShared) -> Vec<(Arc<PackHandle>, Arc<CacheFile>)> {
    let handles: Vec<_> = lock(&shared.handles).values().map(Arc::clone).collect();
    handles.into_iter().filter_map(|handle| handle.get().map(|file| (handle, file))).collect()
}

/// Lets go of files that have lost their names, so that their space returns.
pub(crate) fn release_unlinked(shared: &CacheShared) {
    for (handle, file) in open_files(shared) {
        if file.is_unlinked() {
            handle.release(&file);
        }
    }
}

/// Closes a file that was not used lately when too many are open.
pub(crate) fn make_room_for_descriptor(shared: &CacheShared, max_open: usize) {
    // The handles are as many as packs were ever read: usually far fewer than the limit.
    if lock(&shared.handles).len() < max_open {
        return;
    }
    let open = open_files(shared);
    if open.len() >= max_open {
        let idle = open.iter().find(|(_, file)| !file.take_used());
        if let Some((handle, file)) = idle.or(open.first()) {
            handle.release(file);
        }
    }
}

/// Starts the thread that does what comes up from time to time; it ends with the cache.
pub(crate) fn start(shared: &Arc<CacheShared>) {
    let weak = Arc::downgrade(shared);
    let spawned = std::thread::Builder::new().name("cache-upkeep".to_owned()).spawn(move || run(&weak));
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot start the upkeep of the base cache");
    }
}

fn run(weak: &Weak<CacheShared>) {
    let (mut recorded, mut evicted) = (Instant::now(), None);
    if let Some(shared) = weak.upgrade()
        && let Err(error) = remove_stale(&shared)
    {
        tracing::warn!(%error, "cannot remove stale files of the base cache");
    }
    while let Some(shared) = weak.upgrade() {
        let closed = lock(&shared.closed);
        let (closed, _) = shared
            .closing
            .wait_timeout_while(closed, shared.options.check_every, |closed| !*closed)
            .unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return;
        }
        drop(closed);
        release_unlinked(&shared);
        if recorded.elapsed() >= RECORD_USE_EVERY {
            recorded = Instant::now();
            open_files(&shared).iter().filter(|(_, file)| file.take_used()).for_each(|(_, file)| file.record_use());
            lock(&shared.handles).retain(|_, handle| Arc::strong_count(handle) > 1);
        }
        if let Some(max_bytes) = shared.options.max_bytes
            && evicted.is_none_or(|at: Instant| at.elapsed() >= EVICT_EVERY)
        {
            evicted = Some(Instant::now());
            evict(&shared, max_bytes);
        }
    }
}

/// Removes what an earlier boot of the host and dead processes left; once for each boot.
fn remove_stale(shared: &CacheShared) -> io::Result<()> {
    let marker = shared.directory.join("boot-id");
    if std::fs::read(&marker).is_ok_and(|found| found == shared.boot_id.as_bytes()) {
        return Ok(());
    }
    with_lock(&shared.directory, || {
        let current = header(&shared.boot_id, false);
        for file in list(&shared.directory)? {
            let mut found = [0; HEADER_BYTES];
            let read = File::open(&file.path).and_then(|mut file| file.read_exact(&mut found));
            // The flags at the end may differ.
            if read.is_err() || found[..HEADER_BYTES - 4] != current[..HEADER_BYTES - 4] {
                drop(std::fs::remove_file(&file.path));
            }
        }
        for entry in std::fs::read_dir(&shared.directory)?.flatten() {
            let half_made = entry.path().extension().is_some_and(|extension| extension == "new");
            let old = entry.metadata().and_then(|metadata| metadata.modified());
            if half_made && old.is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= HALF_MADE)) {
                drop(std::fs::remove_file(entry.path()));
            }
        }
        File::create(&marker)?.write_all(shared.boot_id.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_not_used_for_longest_go_until_ninety_percent_are_left() {
        let file = |age: u64, bytes| Listed {
            path: PathBuf::from(age.to_string()),
            used_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1000 - age),
            bytes,
        };
        let names = |files: Vec<Listed>| files.into_iter().map(|f| f.path.display().to_string()).collect::<Vec<_>>();
        let files = vec![file(1, 40), file(3, 20), file(2, 41)];
        assert!(choose(files.clone(), 101).is_empty());
        assert_eq!(names(choose(files.clone(), 100)), ["3"]);
        assert_eq!(names(choose(files.clone(), 80)), ["3", "2"]);
        assert_eq!(names(choose(files, 0)), ["3", "2", "1"]);
    }
}
