//! The base cache: decompressed, verified frames, shared by every volume of every image on a host.
//!
//! One sparse file for each pack:
//!
//! ```text
//! 0       8      magic "BULBBASE"
//! 8       4      format version, 2
//! 12      36     boot id of the host, as in /proc/sys/kernel/random/boot_id
//! 48      4      flags: bit 0, blocks are encrypted
//! 4096    2048   one byte per frame: 1 when the frame is here; also what a process locks to fetch it
//! 8192    …      frame n at 8192 + n · 128 KiB
//! ```
//! A frame's bytes are written before its mark, and a mark is a whole byte, so processes that fill
//! the same file at the same time do no harm: they write the same bytes. Within one boot of the
//! host all of them see one page cache, in order. After a reboot nothing is known of what reached
//! the disk, so a file with another boot id is thrown away.
//!
//! When the files take more than the bound, those not used for longest lose their names. Who has one
//! open reads on; each process lets go of such files within seconds (see `cache_upkeep`).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bulbil_store::{PackRef, Store, StoreError, StoreErrorKind};

use crate::cache_file::CacheFile;
use crate::cache_upkeep;
use crate::error::VolumeError;
use crate::fetch::Fetcher;
use crate::fetch_pool::Pool;
use crate::storage::host_boot_id;

/// Open files of the cache in one process: well below the usual limit of 1024 descriptors.
const MAX_OPEN_FILES: usize = 384;

/// How a base cache behaves.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CacheOptions {
    /// The most bytes that its files may take on the disk; `None` for no bound.
    ///
    /// It is passed by at most a 64th of it (1 to 64 MiB) for each process that fills the cache, and by
    /// the files that others still have open, for as long as `check_every`.
    pub max_bytes: Option<u64>,
    /// How often a process looks whether files it has open were evicted by others.
    pub check_every: Duration,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { max_bytes: None, check_every: Duration::from_secs(3) }
    }
}

impl CacheOptions {
    /// The defaults with a bound in bytes.
    #[must_use]
    pub fn bounded(max_bytes: u64) -> Self {
        Self { max_bytes: Some(max_bytes), ..Self::default() }
    }

    /// The same with another time between two looks at the open files.
    #[must_use]
    pub fn check_every(self, check_every: Duration) -> Self {
        Self { check_every, ..self }
    }
}

/// Decompressed frames on this host, and the threads of this process that fetch them.
#[derive(Debug)]
pub struct BaseCache {
    shared: Arc<CacheShared>,
}

/// What threads of the cache share.
#[derive(Debug)]
pub(crate) struct CacheShared {
    pub(crate) directory: PathBuf,
    pub(crate) boot_id: String,
    pub(crate) options: CacheOptions,
    pub(crate) handles: Mutex<HashMap<bulbil_store::PackId, Arc<PackHandle>>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) fetcher: Fetcher,
    pub(crate) closed: Mutex<bool>,
    pub(crate) closing: Condvar,
    upkeep_started: AtomicBool,
    written_since_check: AtomicU64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BaseCache {
    /// Opens or creates the cache in a directory, without a bound.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn open(directory: &Path) -> Result<Self, VolumeError> {
        Self::open_with(directory, CacheOptions::default())
    }

    /// Opens or creates the cache in a directory.
    ///
    /// Of processes with different bounds each keeps to its own when it writes.
    ///
    /// # Errors
    /// `Io` or `NoSpace` when the directory cannot be made.
    pub fn open_with(directory: &Path, options: CacheOptions) -> Result<Self, VolumeError> {
        std::fs::create_dir_all(directory)
            .map_err(|e| VolumeError::io(format!("cannot create `{}`", directory.display()), e))?;
        let boot_id = host_boot_id().map_err(|e| VolumeError::io("cannot read the host's boot id", e))?;
        let shared = CacheShared {
            directory: directory.to_owned(),
            boot_id,
            options,
            handles: Mutex::default(),
            pool: Pool::new(),
            fetcher: Fetcher::default(),
            closed: Mutex::new(false),
            closing: Condvar::new(),
            upkeep_started: AtomicBool::new(false),
            written_since_check: AtomicU64::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Adds up the bytes that the cache's files take on the disk.
    ///
    /// # Errors
    /// `Io` when the directory cannot be read.
    pub fn used_bytes(&self) -> Result<u64, VolumeError> {
        let files = cache_upkeep::list(&self.shared.directory)
            .map_err(|e| VolumeError::io(format!("cannot list `{}`", self.shared.directory.display()), e))?;
        Ok(files.iter().map(|file| file.bytes).sum())
    }

    pub(crate) fn shared(&self) -> &Arc<CacheShared> {
        &self.shared
    }
}

impl Drop for BaseCache {
    fn drop(&mut self) {
        *lock(&self.shared.closed) = true;
        self.shared.closing.notify_all();
        self.shared.pool.close();
    }
}

impl CacheShared {
    /// The handle of a pack in this process.
    pub(crate) fn handle(self: &Arc<Self>, store: &Store, pack: &PackRef) -> Arc<PackHandle> {
        if !self.upkeep_started.swap(true, Ordering::Relaxed) {
            cache_upkeep::start(self);
        }
        if store.is_remote() {
            self.pool.allow_remote();
        }
        Arc::clone(lock(&self.handles).entry(pack.id).or_default())
    }

    /// The pack's file; `None` when the host cannot give one now.
    pub(crate) fn file(&self, handle: &PackHandle, store: &Store, pack: &PackRef) -> Option<Arc<CacheFile>> {
        if let Some(file) = handle.get() {
            return Some(file);
        }
        cache_upkeep::make_room_for_descriptor(self, MAX_OPEN_FILES);
        let mut current = handle.current.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*current {
            return Some(Arc::clone(file));
        }
        match CacheFile::open(&self.directory, pack.id, &self.boot_id, store.cache_cipher(pack.id)) {
            Ok(file) => Some(Arc::clone(current.insert(Arc::new(file)))),
            Err(error) => {
                // Once for each cache: the next read would say the same.
                if !handle.open_failure_reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!(pack = %pack.id, %error, "cannot open the base cache; reading from the store");
                }
                None
            }
        }
    }

    /// Counts what was written; evicts when that may have passed the bound.
    pub(crate) fn note_written(&self, bytes: u64) {
        let Some(max_bytes) = self.options.max_bytes else { return };
        let interval = (max_bytes / 64).clamp(1 << 20, 64 << 20);
        let written = self.written_since_check.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if written >= interval {
            self.written_since_check.store(0, Ordering::Relaxed);
            cache_upkeep::evict(self, max_bytes);
        }
    }
}

/// What a process has of one pack in the cache: a file, or none at the moment.
#[derive(Debug, Default)]
pub(crate) struct PackHandle {
    current: RwLock<Option<Arc<CacheFile>>>,
    open_failure_reported: AtomicBool,
    layout: LayoutGate,
}

/// Lets one thread read where a pack's frames lie, while others wait for that.
#[derive(Debug, Default)]
struct LayoutGate {
    known: AtomicBool,
    attempts: AtomicU64,
    /// Held during an attempt; how the last one failed.
    failure: Mutex<Option<Arc<StoreError>>>,
}

/// How a read of the cache went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheRead {
    Done,
    Absent,
    /// The frame is there, but the host cannot read it.
    Failed,
}

impl PackHandle {
    pub(crate) fn get(&self) -> Option<Arc<CacheFile>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sees to it that the store knows where the pack's frames lie.
    ///
    /// Who waited for an attempt that failed gets its error, so that a failing store is not waited for by
    /// one thread after the other.
    pub(crate) fn know_layout(&self, store: &Store, pack: &PackRef) -> Result<(), Arc<StoreError>> {
        let gate = &self.layout;
        if gate.known.load(Ordering::Acquire) {
            return Ok(());
        }
        let seen = gate.attempts.load(Ordering::Acquire);
        let mut failure = lock(&gate.failure);
        if gate.known.load(Ordering::Acquire) {
            return Ok(());
        }
        if gate.attempts.load(Ordering::Acquire) != seen
            && let Some(error) = &*failure
        {
            return Err(Arc::clone(error));
        }
        let loaded = store.pack_layout(pack).or_else(|error| match error.kind() {
            // Perhaps it was damaged on the way.
            StoreErrorKind::Corrupt => store.pack_layout(pack),
            _ => Err(error),
        });
        gate.attempts.fetch_add(1, Ordering::Release);
        match loaded {
            Ok(_) => {
                *failure = None;
                gate.known.store(true, Ordering::Release);
                Ok(())
            }
            Err(error) => Err(Arc::clone(failure.insert(Arc::new(error)))),
        }
    }

    /// Fills `buf` from `offset` in a frame if it is in the file.
    pub(crate) fn read(&self, frame: u32, offset: u64, buf: &mut [u8]) -> CacheRead {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = current.as_ref().filter(|file| file.has(frame)) else { return CacheRead::Absent };
        match file.read(frame, offset, buf) {
            Ok(()) => CacheRead::Done,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => CacheRead::Failed,
            Err(error) => {
                tracing::warn!(frame, %error, "cannot read the base cache");
                CacheRead::Failed
            }
        }
    }

    /// Whether a frame is in the file or in memory, by what this process knows.
    pub(crate) fn is_near(&self, frame: u32) -> bool {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().is_some_and(|file| file.is_near(frame))
    }

    /// Whether a frame can be read from the file, by what this process knows.
    pub(crate) fn has(&self, frame: u32) -> bool {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().is_some_and(|file| file.has(frame))
    }

    /// Lets go of a file; one that another thread has put in its place stays.
    pub(crate) fn release(&self, file: &Arc<CacheFile>) {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|found| Arc::ptr_eq(found, file)) {
            *current = None;
        }
    }
}
