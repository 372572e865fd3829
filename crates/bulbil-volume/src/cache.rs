//! The base cache: decompressed, verified frames, shared by every volume of every image on a host.
//!
//! One sparse file for each pack:
//!
//! ```text
//! 0       8      magic "BULBBASE"
//! 8       4      format version, 1
//! 12      36     boot id of the host, as in /proc/sys/kernel/random/boot_id
//! 4096    2048   one byte per frame: 1 when the frame is here
//! 8192    …      frame n at 8192 + n · 128 KiB
//! ```
//! A frame's bytes are written before its mark, and a mark is a whole byte, so processes that fill
//! the same file at the same time do no harm: they write the same bytes. Within one boot of the
//! host all of them see one page cache, in order. After a reboot nothing is known of what reached
//! the disk, so a file with another boot id is thrown away.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bulbil_store::{PackId, PackRef, Store, StoreError};
use bulbil_types::FRAME_BYTES;

use crate::error::VolumeError;

const MAGIC: &[u8; 8] = b"BULBBASE";
const VERSION: u32 = 1;
const MARKS_OFFSET: u64 = 4096;
const FRAMES_OFFSET: u64 = 8192;
const MAX_FRAMES: usize = 2048;

/// Decompressed frames on this host.
#[derive(Debug)]
pub struct BaseCache {
    directory: PathBuf,
    boot_id: String,
    files: Mutex<HashMap<PackId, Arc<CacheFile>>>,
}

/// How often frames were found and fetched, since the process began.
#[derive(Debug, Default)]
pub(crate) struct CacheCounters {
    pub(crate) fetched: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BaseCache {
    /// Opens or creates the cache in a directory.
    ///
    /// # Errors
    /// `Io` or `NoSpace` when the directory cannot be made.
    pub fn open(directory: &Path) -> Result<Self, VolumeError> {
        std::fs::create_dir_all(directory)
            .map_err(|e| VolumeError::io(format!("cannot create `{}`", directory.display()), e))?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|e| VolumeError::io("cannot read the host's boot id", e))?;
        Ok(Self { directory: directory.to_owned(), boot_id: boot_id.trim().to_owned(), files: Mutex::default() })
    }

    pub(crate) fn file(&self, pack: &PackRef) -> io::Result<Arc<CacheFile>> {
        let mut files = lock(&self.files);
        if let Some(file) = files.get(&pack.id) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(CacheFile::open(&self.directory, pack.id, &self.boot_id)?);
        files.insert(pack.id, Arc::clone(&file));
        Ok(file)
    }
}

/// The frames of one pack.
#[derive(Debug)]
pub(crate) struct CacheFile {
    file: File,
    /// What is known of each frame's mark; a mark set by another process is noticed on a miss.
    present: Vec<AtomicBool>,
    filling: Mutex<HashSet<u32>>,
    filled: Condvar,
    full_disk_reported: AtomicBool,
}

impl CacheFile {
    fn open(directory: &Path, pack: PackId, boot_id: &str) -> io::Result<Self> {
        let path = directory.join(format!("{pack}.frames"));
        let file = match Self::open_current(&path, boot_id)? {
            Some(file) => file,
            None => Self::create(directory, &path, boot_id)?,
        };
        let mut marks = vec![0; MAX_FRAMES];
        file.read_exact_at(&mut marks, MARKS_OFFSET)?;
        Ok(Self {
            file,
            present: marks.iter().map(|mark| AtomicBool::new(*mark == 1)).collect(),
            filling: Mutex::default(),
            filled: Condvar::new(),
            full_disk_reported: AtomicBool::new(false),
        })
    }

    fn open_current(path: &Path, boot_id: &str) -> io::Result<Option<File>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let expected = header(boot_id);
        let mut found = vec![0; expected.len()];
        let current = file.read_exact_at(&mut found, 0).is_ok() && found == expected;
        if !current && let Err(error) = std::fs::remove_file(path)
            // Another process has thrown it away at the same time.
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        Ok(current.then_some(file))
    }

    /// Makes the file complete under another name first; of two processes the first one's counts.
    fn create(directory: &Path, path: &Path, boot_id: &str) -> io::Result<File> {
        let temporary = directory.join(format!(
            "{}.{}.{:?}.new",
            path.file_name().unwrap_or_default().to_string_lossy(),
            std::process::id(),
            std::thread::current().id(),
        ));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&temporary)?;
        if let Err(error) = file.write_all_at(&header(boot_id), 0).and_then(|()| file.set_len(FRAMES_OFFSET)) {
            drop(std::fs::remove_file(&temporary));
            return Err(error);
        }
        let linked = std::fs::hard_link(&temporary, path);
        std::fs::remove_file(&temporary)?;
        match linked {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Self::open_current(path, boot_id)?.ok_or_else(|| io::Error::from(io::ErrorKind::AlreadyExists))
            }
            other => other.map(|()| file),
        }
    }

    /// Whether a frame is here, by what this process knows.
    pub(crate) fn has(&self, frame: u32) -> bool {
        self.present.get(frame as usize).is_some_and(|present| present.load(Ordering::Acquire))
    }

    /// Fills `buf` from `offset` in a frame; fetches and keeps the frame when it is not here.
    pub(crate) fn read(
        &self,
        store: &Store,
        pack: &PackRef,
        frame: u32,
        offset: u64,
        buf: &mut [u8],
        counters: &CacheCounters,
    ) -> Result<(), StoreError> {
        if !self.has(frame) {
            let _turn = self.wait_for_turn(frame);
            if !self.has(frame) && !self.marked_by_another(frame) {
                let plain = store.read_frame(pack, frame)?;
                counters.fetched.fetch_add(1, Ordering::Relaxed);
                self.keep(frame, &plain);
                return copy_part(&plain, offset, buf, pack);
            }
        }
        match self.file.read_exact_at(buf, frame_offset(frame) + offset) {
            Ok(()) => Ok(()),
            // The store still has it.
            Err(error) => {
                tracing::warn!(pack = %pack.id, frame, %error, "cannot read the base cache");
                read_uncached(store, pack, frame, offset, buf)
            }
        }
    }

    fn marked_by_another(&self, frame: u32) -> bool {
        let mut mark = [0];
        let marked = self.file.read_exact_at(&mut mark, MARKS_OFFSET + u64::from(frame)).is_ok() && mark[0] == 1;
        if marked {
            self.present[frame as usize].store(true, Ordering::Release);
        }
        marked
    }

    fn keep(&self, frame: u32, plain: &[u8]) {
        let written = self
            .file
            .write_all_at(plain, frame_offset(frame))
            .and_then(|()| self.file.write_all_at(&[1], MARKS_OFFSET + u64::from(frame)));
        match written {
            Ok(()) => self.present[frame as usize].store(true, Ordering::Release),
            Err(error) => {
                if !self.full_disk_reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "cannot write the base cache; frames are read from the store each time");
                }
            }
        }
    }

    /// Lets one thread of this process fetch a frame while the others wait for it.
    fn wait_for_turn(&self, frame: u32) -> Turn<'_> {
        let mut filling = lock(&self.filling);
        while !filling.insert(frame) {
            filling = self.filled.wait(filling).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { cache: self, frame }
    }
}

struct Turn<'a> {
    cache: &'a CacheFile,
    frame: u32,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.cache.filling).remove(&self.frame);
        self.cache.filled.notify_all();
    }
}

fn header(boot_id: &str) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(boot_id.as_bytes());
    header
}

fn frame_offset(frame: u32) -> u64 {
    FRAMES_OFFSET + u64::from(frame) * FRAME_BYTES
}

/// Reads a part of a frame from the store alone, for when there is no cache to be had.
pub(crate) fn read_uncached(
    store: &Store,
    pack: &PackRef,
    frame: u32,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), StoreError> {
    copy_part(&store.read_frame(pack, frame)?, offset, buf, pack)
}

fn copy_part(plain: &[u8], offset: u64, buf: &mut [u8], pack: &PackRef) -> Result<(), StoreError> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    match plain.get(start..start.saturating_add(buf.len())) {
        Some(part) => {
            buf.copy_from_slice(part);
            Ok(())
        }
        None => Err(StoreError::outside_frame(pack.id)),
    }
}
