//! The overlay: a volume's own writes, crash safe without a journal.
//!
//! ```text
//! data.N   bytes of 1 TiB of disk each, at their own offsets, sparse; made at the first write there
//! map      two bits for each 4 KiB block (see `map`), sparse; made at the first write
//! map.live what a process has changed in it (see `live_map`); made at the first change, never synced
//! ```
//!
//! # Rules
//! 1. A block's data is written before its state says `Data`, and synced before that state is
//!    written: [`flush`](Overlay::flush) copies the changed pages, syncs the data, then writes the
//!    copies and syncs them. After a crash a state found on disk therefore describes content that
//!    was complete.
//! 2. `Zero` needs nothing in the data file, so its order does not matter: a block that is being
//!    zeroed reads as its old content, or as zeroes by its state or by the hole.
//! 3. A hole in the data file never has a meaning of its own; only the map says where content is.
//! 4. Whole blocks only: the volume merges smaller writes. Overwriting a block in `Data` is in
//!    place, so after a crash it is old or new; hosts do not tear an aligned 4 KiB page.
//! 5. A change of a state is in `map.live` before the request that made it is answered, so that a process
//!    that is killed takes no answered write with it. Whoever opens the overlay next takes it over.
//! 6. When a sync fails, what is on disk is unknown: the overlay refuses every later write and
//!    flush. A write that fails for lack of space changes nothing that was acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

use crate::device::{BlockError, BlockErrorKind};
use crate::live_map::{LeftBehind, LiveMap};
use crate::map::{BLOCKS_PER_PAGE, BlockMap, BlockState, MapPage};
use crate::storage::{StorageDirectory, StorageFile};

/// Pages that are taken over from a killed process before they are written, 4 MiB.
const PAGES_TAKEN_OVER: u64 = 1024;

/// Disk bytes that one data file covers: below the largest file of every common file system.
const SEGMENT_BYTES: u64 = 1 << 40;

#[derive(Debug)]
pub(crate) struct Overlay {
    directory: Arc<dyn StorageDirectory>,
    map: RwLock<BlockMap>,
    /// Locked from a change of the map to the end of its write.
    live: Mutex<LiveMap>,
    map_file: Mutex<Option<Arc<dyn StorageFile>>>,
    segments: RwLock<BTreeMap<u64, Option<Arc<dyn StorageFile>>>>,
    /// Segments written since they were last synced.
    unsynced: Mutex<BTreeSet<u64>>,
    /// One flush at a time: pages must reach the disk in the order they were copied.
    flushing: Mutex<()>,
    /// Whether a block may be in another state than `Base`.
    touched: AtomicBool,
    /// Shared by all layers of a volume.
    poisoned: Arc<AtomicBool>,
}

impl Drop for Overlay {
    /// What has been flushed needs no second place; what has not is for whoever opens the overlay next.
    fn drop(&mut self) {
        let map = self.map.get_mut().unwrap_or_else(PoisonError::into_inner);
        if map.is_clean() && !self.poisoned.load(Ordering::Acquire) {
            // Should that fail, the next one takes over what it has already.
            drop(self.live.get_mut().unwrap_or_else(PoisonError::into_inner).end());
        }
    }
}

/// A panic while a lock is held leaves these maps whole; the data path must go on or fail by itself.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Overlay {
    /// Uses the overlay in a directory; an empty directory is an empty overlay.
    ///
    /// Whatever a process that was killed had written but not synced is synced first: what this
    /// one shows its guest must not disappear later in a loss of power.
    pub(crate) fn open(
        directory: Arc<dyn StorageDirectory>,
        size_bytes: u64,
        poisoned: Arc<AtomicBool>,
    ) -> Result<Self, BlockError> {
        let map_file = directory.open("map").map_err(|e| io_error("cannot open the overlay's map", e))?;
        let left = LeftBehind::find(&*directory).map_err(|e| io_error("cannot read what a process has left", e))?;
        let is_touched = map_file.is_some() || left.is_some();
        let overlay = Self {
            touched: AtomicBool::new(is_touched),
            directory,
            map: RwLock::default(),
            live: Mutex::default(),
            map_file: Mutex::new(map_file),
            segments: RwLock::default(),
            unsynced: Mutex::default(),
            flushing: Mutex::default(),
            poisoned,
        };
        // Without a map no block is in state `Data`, so no data file counts.
        if is_touched {
            lock(&overlay.unsynced).extend(0..size_bytes.div_ceil(SEGMENT_BYTES));
            overlay.sync_data()?;
        }
        if let Some(map_file) = lock(&overlay.map_file).clone() {
            map_file.sync_data().map_err(|e| io_error("cannot sync the overlay's map", e))?;
        }
        if let Some(left) = left {
            overlay.take_over(&left)?;
        }
        Ok(overlay)
    }

    /// Puts into the map, durably, what a process that was killed had said of it.
    fn take_over(&self, left: &LeftBehind) -> Result<(), BlockError> {
        let mut number = 0;
        loop {
            let next = left.next_page(number).map_err(|e| io_error("cannot read what a process has left", e))?;
            let Some((found, page)) = next else { break };
            self.map_with_page(found)?.merge_page(found, &page).map_err(damaged)?;
            number = found + 1;
            // Changed pages stay in memory until they are written.
            if number.is_multiple_of(PAGES_TAKEN_OVER) {
                self.flush()?;
            }
        }
        self.flush()?;
        left.end().map_err(|e| self.write_failed(0, e))
    }

    /// Makes durable what a killed process has left in a layer that nobody has open.
    pub(crate) fn recover(directory: Arc<dyn StorageDirectory>, size_bytes: u64) -> Result<(), BlockError> {
        let left = LeftBehind::find(&*directory).map_err(|e| io_error("cannot read what a process has left", e))?;
        left.map_or(Ok(()), |_| Self::open(directory, size_bytes, Arc::default()).map(drop))
    }

    /// Creates the data files that another layer has open, so that no write has to wait for that.
    pub(crate) fn create_files_of(&self, other: &Self) -> Result<(), BlockError> {
        let segments = other.segments.read().unwrap_or_else(PoisonError::into_inner);
        let numbers: Vec<_> = segments.iter().filter(|(_, file)| file.is_some()).map(|(number, _)| *number).collect();
        drop(segments);
        let names: Vec<String> = numbers.iter().map(|number| format!("data.{number}")).collect();
        self.directory.create_all(&names).map_err(|e| io_error("cannot create the overlay's data", e))?;
        numbers.into_iter().try_for_each(|number| self.segment(number, true).map(drop))
    }

    /// Whether every block is in state `Base`; may say `false` when that is so.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.touched.load(Ordering::Acquire)
    }

    /// The first run of blocks at or after `first` that are not in state `Base`: (first, count), before `end`.
    pub(crate) fn next_changed(&self, first: u64, end: u64) -> Result<Option<(u64, u64)>, BlockError> {
        let mut at = first;
        while at < end
            && let Some(page) = self.next_page(at / BLOCKS_PER_PAGE)?
        {
            at = at.max(page * BLOCKS_PER_PAGE);
            let page_end = end.min((page + 1) * BLOCKS_PER_PAGE);
            while at < page_end {
                let (state, len) = self.run(at, page_end - at)?;
                if state != BlockState::Base {
                    return Ok(Some((at, len)));
                }
                at += len;
            }
        }
        Ok(None)
    }

    /// The first page from `page` on that is in memory or stored.
    fn next_page(&self, page: u64) -> Result<Option<u64>, BlockError> {
        let in_memory = self.map.read().unwrap_or_else(PoisonError::into_inner).next_page(page);
        let stored = match &*lock(&self.map_file) {
            Some(file) if in_memory != Some(page) => {
                file.next_data(page * BLOCK_BYTES).map_err(|e| io_error("cannot read the overlay's map", e))?
            }
            _ => None,
        };
        let stored = stored.map(|offset| (offset / BLOCK_BYTES).max(page));
        Ok(in_memory.into_iter().chain(stored).min())
    }

    /// The state of `first` and how many blocks from it, at most `limit`, share it.
    pub(crate) fn run(&self, first: u64, limit: u64) -> Result<(BlockState, u64), BlockError> {
        loop {
            if let Some(run) = self.map.read().unwrap_or_else(PoisonError::into_inner).run(first, limit) {
                return Ok(run);
            }
            drop(self.map_with_page(first / BLOCKS_PER_PAGE)?);
        }
    }

    /// Reads bytes of blocks that are in state `Data`.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        for (segment, in_segment, range) in pieces(offset, buf.len()) {
            match self.segment(segment, false)? {
                Some(file) => file
                    .read_at(&mut buf[range], in_segment)
                    .map_err(|e| io_error(format!("cannot read the overlay at {offset:#x}"), e))?,
                None => buf[range].fill(0),
            }
        }
        Ok(())
    }

    /// Writes bytes; blocks that are not in state `Data` yet are written whole.
    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<(), BlockError> {
        self.check_usable()?;
        let first = offset / BLOCK_BYTES;
        let count = (offset + buf.len() as u64).div_ceil(BLOCK_BYTES) - first;
        for (segment, in_segment, range) in pieces(offset, buf.len()) {
            let file = self.segment(segment, true)?.expect("created when it is missing");
            file.write_at(&buf[range], in_segment).map_err(|e| self.write_failed(offset, e))?;
            // After the write and before the state: a flush that takes the state finds the segment.
            lock(&self.unsynced).insert(segment);
        }
        self.set(first, count, BlockState::Data)
    }

    /// Makes whole blocks zero and gives their space back.
    pub(crate) fn zero(&self, first: u64, count: u64) -> Result<(), BlockError> {
        self.check_usable()?;
        let mut at = first;
        while at < first + count {
            let (state, len) = self.run(at, first + count - at)?;
            if state != BlockState::Zero {
                self.set(at, len, BlockState::Zero)?;
            }
            if state == BlockState::Data {
                self.punch(at * BLOCK_BYTES, len * BLOCK_BYTES)?;
            }
            at += len;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len_bytes: u64) -> Result<(), BlockError> {
        let end = offset + len_bytes;
        let mut at = offset;
        while at < end {
            let segment = at / SEGMENT_BYTES;
            let len = end.min((segment + 1) * SEGMENT_BYTES) - at;
            if let Some(file) = self.segment(segment, false)? {
                match file.punch_hole(at % SEGMENT_BYTES, len) {
                    // The state says zero; the space is only not given back.
                    Err(e) if e.kind() != io::ErrorKind::Unsupported => return Err(self.write_failed(at, e)),
                    _ => {}
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Makes everything durable that returned before this call.
    pub(crate) fn flush(&self) -> Result<(), BlockError> {
        let _one_at_a_time = lock(&self.flushing);
        self.check_usable()?;
        let pages = self.map.write().unwrap_or_else(PoisonError::into_inner).take_dirty();
        let written = self.sync_data().and_then(|()| self.write_pages(&pages));
        self.map.write().unwrap_or_else(PoisonError::into_inner).finish_writing(written.is_ok());
        written
    }

    fn sync_data(&self) -> Result<(), BlockError> {
        let segments = std::mem::take(&mut *lock(&self.unsynced));
        for segment in segments {
            if let Some(file) = self.segment(segment, false)? {
                file.sync_data().map_err(|e| self.poison("cannot sync the overlay's data", e))?;
            }
        }
        Ok(())
    }

    fn write_pages(&self, pages: &[(u64, Box<MapPage>)]) -> Result<(), BlockError> {
        if pages.is_empty() {
            return Ok(());
        }
        let file = self.map_file_or_create()?;
        for (number, page) in pages {
            file.write_at(&page[..], number * BLOCK_BYTES).map_err(|e| self.write_failed(*number, e))?;
        }
        file.sync_data().map_err(|e| self.poison("cannot sync the overlay's map", e))
    }

    fn map_file_or_create(&self) -> Result<Arc<dyn StorageFile>, BlockError> {
        let mut slot = lock(&self.map_file);
        if let Some(file) = &*slot {
            return Ok(Arc::clone(file));
        }
        let file = self.directory.create("map").map_err(|e| io_error("cannot create the overlay's map", e))?;
        *slot = Some(Arc::clone(&file));
        Ok(file)
    }

    fn segment(&self, number: u64, create: bool) -> Result<Option<Arc<dyn StorageFile>>, BlockError> {
        if let Some(known) = self.segments.read().unwrap_or_else(PoisonError::into_inner).get(&number)
            && (known.is_some() || !create)
        {
            return Ok(known.clone());
        }
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        let name = format!("data.{number}");
        let slot = match segments.get(&number) {
            Some(known) => known.clone(),
            None => self.directory.open(&name).map_err(|e| io_error("cannot open the overlay's data", e))?,
        };
        let slot = match slot {
            None if create => {
                Some(self.directory.create(&name).map_err(|e| io_error("cannot create the overlay's data", e))?)
            }
            other => other,
        };
        segments.insert(number, slot.clone());
        Ok(slot)
    }

    /// Puts blocks into a state, page by page.
    fn set(&self, first: u64, count: u64, state: BlockState) -> Result<(), BlockError> {
        self.touched.store(true, Ordering::Release);
        let mut at = first;
        while at < first + count {
            let page = at / BLOCKS_PER_PAGE;
            let len = (first + count).min((page + 1) * BLOCKS_PER_PAGE) - at;
            let mut live = lock(&self.live);
            let change = self.map_with_page(page)?.set(at, len, state);
            if let Some(change) = change
                && let Err(error) = live.write(&*self.directory, &change)
            {
                self.map.write().unwrap_or_else(PoisonError::into_inner).take_back(&change);
                return Err(self.write_failed(at * BLOCK_BYTES, error));
            }
            at += len;
        }
        Ok(())
    }

    /// Locks the map with a page in memory; it is read under the lock, so that it cannot be stale.
    fn map_with_page(&self, number: u64) -> Result<RwLockWriteGuard<'_, BlockMap>, BlockError> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        // After the map is locked: a flush may just have made the file.
        let file = lock(&self.map_file).clone();
        if !map.has_page(number) {
            let mut page = [0; BLOCK_LEN];
            if let Some(file) = file {
                file.read_at(&mut page, number * BLOCK_BYTES)
                    .map_err(|e| io_error("cannot read the overlay's map", e))?;
            }
            map.load_page(number, page).map_err(damaged)?;
        }
        Ok(map)
    }

    pub(crate) fn check_usable(&self) -> Result<(), BlockError> {
        if self.poisoned.load(Ordering::Acquire) {
            let text = "an earlier write or sync of this volume failed; stop the instance and check the host's disk";
            return Err(BlockError::new(BlockErrorKind::Poisoned, text));
        }
        Ok(())
    }

    fn write_failed(&self, offset: u64, error: io::Error) -> BlockError {
        let message = format!("cannot write to the overlay at {offset:#x}");
        let error = io_error(message, error);
        if error.kind() != BlockErrorKind::NoSpace {
            self.poisoned.store(true, Ordering::Release);
        }
        error
    }

    fn poison(&self, message: &str, error: io::Error) -> BlockError {
        self.poisoned.store(true, Ordering::Release);
        BlockError::with_source(BlockErrorKind::Io, message, error)
    }
}

fn damaged(block: u64) -> BlockError {
    BlockError::new(BlockErrorKind::Io, format!("the overlay's map is damaged at block {block:#x}"))
}

pub(crate) fn io_error(message: impl Into<String>, error: io::Error) -> BlockError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            BlockErrorKind::NoSpace
        }
        _ => BlockErrorKind::Io,
    };
    BlockError::with_source(kind, message, error)
}

/// Cuts a range of the disk at the borders of data files: (file, offset in it, range of the buffer).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let room = usize::try_from(SEGMENT_BYTES - at % SEGMENT_BYTES).unwrap_or(usize::MAX);
        let start = done;
        done += room.min(len - done);
        Some((at / SEGMENT_BYTES, at % SEGMENT_BYTES, start..done))
    })
}
