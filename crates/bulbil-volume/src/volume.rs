//! A volume: a writable disk over an image.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bulbil_store::{Manifest, Store, make_directory};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN, VolumeId};

use crate::base::Base;
use crate::cache::BaseCache;
use crate::clone::check_complete;
use crate::device::{BlockDevice, BlockError, BlockErrorKind, StatusExtent};
use crate::encrypted::open_for_store;
use crate::error::{VolumeError, VolumeErrorKind};
use crate::link::forget_record;
use crate::map::BlockState;
use crate::overlay::Overlay;
use crate::read_stats::ReadStats;
use crate::record::{RECORD_NAME, VolumeRecord, check_size};
use crate::resize::Listeners;
use crate::stack::{Layer, Layers, Place, Stack, remove_files, remove_leftovers};
use crate::storage::{HostDirectory, StorageDirectory, sync_directory};

/// The directory that holds all volumes of a host, one directory each.
#[derive(Debug, Clone)]
pub struct VolumeDirectory {
    pub(crate) path: PathBuf,
}

impl VolumeDirectory {
    /// Uses a directory, which is made when it is missing. Its name is durable when this returns.
    ///
    /// # Errors
    /// `Io` or `NoSpace`.
    pub fn open(path: &Path) -> Result<Self, VolumeError> {
        make_directory(path).map_err(|e| VolumeError::io(format!("cannot create `{}`", path.display()), e))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Creates a volume: two small writes, whatever its size. Durable when this returns.
    ///
    /// # Errors
    /// `BadSize`; `Io` or `NoSpace`, and then there is no such volume.
    pub fn create(&self, id: &VolumeId, size_bytes: u64, base: Option<&Manifest>) -> Result<VolumeRecord, VolumeError> {
        check_size(size_bytes, base.map_or(512, Manifest::size_bytes))?;
        let record = VolumeRecord::new(id, size_bytes, base.map(Manifest::digest));
        let directory = self.volume_path(id);
        let fail = |e| VolumeError::io(format!("cannot create volume {id}"), e);
        // By itself: what is there already is not ours to remove.
        std::fs::create_dir(&directory).map_err(fail)?;
        if let Err(error) = self.write_first_record(&directory, &record) {
            drop(std::fs::remove_dir_all(&directory));
            return Err(fail(error));
        }
        Ok(record)
    }

    /// Writes the record and syncs it with its name and its directory's name, all at the same time: a
    /// file system that keeps a journal then commits once. Which of them a crash leaves does not
    /// matter, since a directory without a whole record is no volume.
    fn write_first_record(&self, directory: &Path, record: &VolumeRecord) -> io::Result<()> {
        let mut file = File::create_new(directory.join(RECORD_NAME))?;
        file.write_all(&record.encode())?;
        std::thread::scope(|scope| {
            let spawn = |path| std::thread::Builder::new().spawn_scoped(scope, move || sync_directory(path));
            let names = [spawn(directory)?, spawn(&self.path)?];
            let written = file.sync_all();
            let named = names.map(|sync| sync.join().expect("a sync does not panic"));
            written.and(named.into_iter().collect())
        })
    }

    /// Reads what a volume is.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Io`.
    pub fn record(&self, id: &VolumeId) -> Result<VolumeRecord, VolumeError> {
        let bytes = std::fs::read(self.volume_path(id).join(RECORD_NAME))
            .map_err(|e| VolumeError::io(format!("cannot read volume {id}"), e))?;
        let record = VolumeRecord::parse(&bytes, id.as_str())?;
        check_complete(&HostDirectory::new(&self.volume_path(id)), &record).map(|()| record)
    }

    /// Opens a volume for reading and writing; only one process can at a time.
    ///
    /// Who is going to boot from it calls [`Volume::expect_boot`] next.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `Corrupt`, `Io`.
    pub fn open_volume(
        &self,
        id: &VolumeId,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
    ) -> Result<Volume, VolumeError> {
        let directory = self.volume_path(id);
        let lock = lock_volume(&directory, id)?;
        let record = self.record(id)?;
        let storage = open_for_store(Arc::new(HostDirectory::new(&directory)), store)?;
        let volume = Volume::open(record, storage, store, cache)?;
        Ok(Volume { _lock: Some(lock), ..volume })
    }

    /// Whether a process has the volume open at this moment.
    #[must_use]
    pub fn is_in_use(&self, id: &VolumeId) -> bool {
        let lock = lock_volume(&self.volume_path(id), id);
        lock.is_err_and(|e| e.kind() == VolumeErrorKind::InUse)
    }

    /// Removes a volume and everything written to it; one that is not there is fine.
    ///
    /// # Errors
    /// `InUse`, `Io`.
    pub fn remove(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let directory = self.volume_path(id);
        let lock = match lock_volume(&directory, id) {
            Err(e) if e.kind() == VolumeErrorKind::NotFound => None,
            other => Some(other?),
        };
        // First it is no volume any more, durably: from then on others may write to files that it has shared.
        forget_record(&directory).map_err(|e| VolumeError::io(format!("cannot remove volume {id}"), e))?;
        let mut removed = std::fs::remove_dir_all(&directory);
        // A layer that is being freed beside this may be gone before its turn comes.
        while removed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) && directory.exists() {
            removed = std::fs::remove_dir_all(&directory);
        }
        drop(lock);
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(VolumeError::io(format!("cannot remove volume {id}"), e))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn volume_path(&self, id: &VolumeId) -> PathBuf {
        self.path.join(id.as_str())
    }
}

/// Locks a volume's directory: its record is replaced now and then, and a lock on that would be lost.
pub(crate) fn lock_volume(directory: &Path, id: &VolumeId) -> Result<File, VolumeError> {
    let file = OpenOptions::new()
        .read(true)
        .open(directory)
        .map_err(|e| VolumeError::io(format!("cannot open volume {id}"), e))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(VolumeError::new(VolumeErrorKind::InUse, format!("volume {id} is in use by another process")))
        }
        Err(errno) => Err(VolumeError::io(format!("cannot lock volume {id}"), errno.into())),
    }
}

/// An open volume.
#[derive(Debug)]
pub struct Volume {
    pub(crate) size_bytes: AtomicU64,
    /// Replaced as a whole; a request goes on with the one it has found.
    pub(crate) stack: RwLock<Arc<Stack>>,
    /// Held shared by writes of whole blocks, alone by a write that merges with what is there:
    /// otherwise a merge could put back what another request has just replaced. Held alone as well
    /// where the newest layer or the size changes, so that no write is in two of them.
    pub(crate) merging: RwLock<()>,
    pub(crate) directory: Arc<dyn StorageDirectory>,
    pub(crate) images: Option<(Arc<Store>, Arc<BaseCache>)>,
    pub(crate) poisoned: Arc<AtomicBool>,
    /// What the record on disk says, or will say when the newest layer is settled; locked by who
    /// changes it, from the decision to the end.
    pub(crate) record: Mutex<VolumeRecord>,
    pub(crate) snapshot_running: Arc<AtomicBool>,
    /// Frames that were fetched for images that were below it before.
    pub(crate) stats_before: Mutex<ReadStats>,
    pub(crate) listeners: Listeners,
    /// Layers that no record names any more; those that no request reads go when somebody looks.
    pub(crate) retired: Mutex<Vec<Arc<Layer>>>,
    /// Held for its lifetime: only one process may have the volume open.
    _lock: Option<File>,
}

impl Volume {
    /// A volume over any directory; tests give one that forgets what was not synced.
    ///
    /// # Errors
    /// `Io` when the overlay cannot be opened.
    pub fn without_base(size_bytes: u64, directory: Arc<dyn StorageDirectory>) -> Result<Self, VolumeError> {
        Self::new(VolumeRecord::new(&VolumeId::random(), size_bytes, None), None, None, directory)
    }

    /// A volume over an image and any directory.
    ///
    /// # Errors
    /// `Io` when the overlay cannot be opened.
    pub fn over_image(
        size_bytes: u64,
        manifest: Manifest,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
        directory: Arc<dyn StorageDirectory>,
    ) -> Result<Self, VolumeError> {
        let record = VolumeRecord::new(&VolumeId::random(), size_bytes, Some(manifest.digest()));
        let images = (Arc::clone(store), Arc::clone(cache));
        let base = Base::new(Arc::clone(store), Arc::clone(cache), manifest);
        Self::new(record, Some(base), Some(images), directory)
    }

    /// Makes a volume in any directory, which must be empty. Durable when this returns.
    ///
    /// # Errors
    /// `BadSize`, `Io`, `NoSpace`.
    pub fn create_in(
        directory: &dyn StorageDirectory,
        id: &VolumeId,
        size_bytes: u64,
        base: Option<&Manifest>,
    ) -> Result<(), VolumeError> {
        check_size(size_bytes, base.map_or(512, Manifest::size_bytes))?;
        let record = VolumeRecord::new(id, size_bytes, base.map(Manifest::digest));
        directory
            .replace(RECORD_NAME, &record.encode())
            .map_err(|e| VolumeError::io(format!("cannot create volume {id}"), e))
    }

    /// Opens the volume in any directory; the caller sees to it that nobody else does.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Io`.
    pub fn open_in(
        directory: Arc<dyn StorageDirectory>,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
    ) -> Result<Self, VolumeError> {
        Self::open(VolumeRecord::read(&*directory)?, directory, store, cache)
    }

    fn open(
        record: VolumeRecord,
        directory: Arc<dyn StorageDirectory>,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
    ) -> Result<Self, VolumeError> {
        let base = record.base.map(|digest| {
            let manifest = store.manifest(&digest).map_err(|error| {
                VolumeError::store(format!("the image below volume {} cannot be read", record.id), error)
            })?;
            Ok(Base::new(Arc::clone(store), Arc::clone(cache), manifest))
        });
        // What is shown to a guest from here on rests on the record, which a killed process may not have synced.
        directory.sync().map_err(|e| VolumeError::io(format!("cannot sync volume {}", record.id), e))?;
        // What a snapshot that was killed had begun or not taken away yet.
        remove_files(&*directory, |number| !record.layers.contains(&number))
            .and_then(|()| remove_leftovers(&*directory))
            .map_err(|e| VolumeError::io(format!("cannot tidy up volume {}", record.id), e))?;
        // All names are durable from here on, so nothing has to be compared any more.
        let record = VolumeRecord { linked: Vec::new(), ..record };
        let volume = Self::new(record, base.transpose()?, Some((Arc::clone(store), Arc::clone(cache))), directory)?;
        volume.leave_shared_layer()?;
        Ok(volume)
    }

    fn new(
        record: VolumeRecord,
        base: Option<Base>,
        images: Option<(Arc<Store>, Arc<BaseCache>)>,
        directory: Arc<dyn StorageDirectory>,
    ) -> Result<Self, VolumeError> {
        let poisoned = Arc::new(AtomicBool::new(false));
        // Frozen layers are synced as well: a merge into one of them may have been killed.
        let open = |number: &u64| {
            let files = Layer::directory(&directory, *number);
            if *number > 0 {
                files.sync().map_err(|e| VolumeError::io("cannot sync a layer of the volume", e))?;
            }
            let overlay = Overlay::open(files, record.size_bytes, Arc::clone(&poisoned))
                .map_err(|e| VolumeError::block("cannot open the volume's overlay", e))?;
            Ok(Layer::new(*number, overlay, &directory))
        };
        let layers = record.layers.iter().map(open).collect::<Result<_, VolumeError>>()?;
        let layers = Layers { layers, base: base.map(Arc::new) };
        Ok(Self {
            size_bytes: AtomicU64::new(record.size_bytes),
            stack: RwLock::new(Arc::new(Stack { layers, rotation: None })),
            merging: RwLock::new(()),
            directory,
            images,
            poisoned,
            record: Mutex::new(record),
            snapshot_running: Arc::default(),
            stats_before: Mutex::default(),
            listeners: Listeners::default(),
            retired: Mutex::default(),
            _lock: None,
        })
    }

    /// What requests go to at this moment.
    pub(crate) fn stack(&self) -> Arc<Stack> {
        Arc::clone(&self.stack.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Frames that were fetched from the store because they were not in the base cache.
    #[must_use]
    pub fn frames_fetched(&self) -> u64 {
        let stats = self.read_stats();
        stats.demand_frames + stats.prefetched_frames
    }

    /// What reads of the image have cost since the volume was opened.
    #[must_use]
    pub fn read_stats(&self) -> ReadStats {
        let before = *self.stats_before.lock().unwrap_or_else(PoisonError::into_inner);
        self.stack().layers.base.as_ref().map_or(before, |base| before.plus(&base.stats()))
    }

    /// Begins to fetch what earlier boots of the image have touched, in the background, and to record what this one
    /// touches first.
    ///
    /// For volumes that a machine starts from: other readers touch other things, and what they touch is no boot.
    /// Reads never wait for it. It ends with the volume; a second call fetches nothing again and records anew.
    pub fn expect_boot(&self) {
        if let Some(base) = &self.stack().layers.base {
            base.start_prefetch();
            base.start_recording();
        }
    }

    /// Ends the recording, since the boot is over, and keeps it with the image. Returns whether it was
    /// written: it is not when the image had one that was good enough.
    ///
    /// # Errors
    /// `Io` when the store cannot read or write; the volume is usable all the same.
    pub fn finish_recording(&self) -> Result<bool, VolumeError> {
        let base = self.stack().layers.base.clone();
        let kept = base.map_or(Ok(false), |base| base.finish_recording());
        kept.map_err(|e| VolumeError::with_source(VolumeErrorKind::Io, "cannot keep the boot trace", e))
    }

    fn check_range(&self, offset: u64, len_bytes: u64) -> Result<(), BlockError> {
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(BlockError::new(
                BlockErrorKind::OutOfRange,
                format!("{len_bytes} bytes at {offset:#x} are not in a disk of {} bytes", self.size_bytes()),
            )),
        }
    }

    /// Writes a range that lies within one block and does not cover it.
    fn write_part(&self, buf: &[u8], offset: u64) -> Result<(), BlockError> {
        let block = offset / BLOCK_BYTES;
        {
            let _shared = self.merging.read().unwrap_or_else(PoisonError::into_inner);
            let stack = self.stack();
            if stack.top().run(block, 1)?.0 == BlockState::Data {
                return stack.top().write(buf, offset);
            }
        }
        let _alone = self.merging.write().unwrap_or_else(PoisonError::into_inner);
        let stack = self.stack();
        let mut merged = [0; BLOCK_LEN];
        let start = block * BLOCK_BYTES;
        // The last block of a disk may be short; what lies past the end stays zero.
        let len = usize_of(BLOCK_BYTES.min(self.size_bytes() - start));
        stack.layers.read(&mut merged[..len], start)?;
        let within = usize_of(offset - start);
        merged[within..within + buf.len()].copy_from_slice(buf);
        stack.top().write(&merged, start)
    }

    fn zero_range(&self, offset: u64, len_bytes: u64, whole_blocks_only: bool) -> Result<(), BlockError> {
        loop {
            let size_bytes = self.size_bytes();
            let (first_whole, past_whole) = whole_blocks(offset, offset + len_bytes, size_bytes);
            if !whole_blocks_only {
                const ZEROES: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
                let end = offset + len_bytes;
                for (from, to) in [(offset, first_whole.min(end)), (past_whole.min(end), end)] {
                    if from < to {
                        self.write_part(&ZEROES[..usize_of(to - from)], from)?;
                    }
                }
            }
            let _shared = self.merging.read().unwrap_or_else(PoisonError::into_inner);
            // Where the disk has grown meanwhile, its last block may be written to by others.
            if self.size_bytes() == size_bytes {
                return self.zero_blocks(first_whole / BLOCK_BYTES, past_whole / BLOCK_BYTES);
            }
        }
    }

    /// Makes blocks zero; the caller holds `merging`.
    fn zero_blocks(&self, first: u64, end: u64) -> Result<(), BlockError> {
        let stack = self.stack();
        let mut block = first;
        while block < end {
            let (place, blocks) = stack.layers.run(block, end - block)?;
            block += match (place, &stack.layers.base) {
                // Zero already, and nothing would be gained by saying so in the overlay.
                (Place::Base, None) | (Place::Zero, _) => blocks,
                (Place::Base, Some(base)) => match base.hole_run(block, blocks) {
                    (true, hole) => hole,
                    (false, data) => {
                        stack.top().zero(block, data)?;
                        data
                    }
                },
                (Place::Data(_), _) => {
                    stack.top().zero(block, blocks)?;
                    blocks
                }
            };
        }
        Ok(())
    }

    fn finish(&self, fua: bool) -> Result<(), BlockError> {
        if fua { self.flush() } else { Ok(()) }
    }
}

/// The whole blocks in a range of bytes: (start, end); an end at the end of the disk covers its short block.
fn whole_blocks(offset: u64, end: u64, size_bytes: u64) -> (u64, u64) {
    let first_whole = offset.next_multiple_of(BLOCK_BYTES).min(end);
    let past_whole = match end {
        // The range lies within one block.
        _ if !first_whole.is_multiple_of(BLOCK_BYTES) => first_whole,
        // The last block of the disk may be short, and is covered all the same.
        end if end == size_bytes => end.next_multiple_of(BLOCK_BYTES),
        end => (end / BLOCK_BYTES * BLOCK_BYTES).max(first_whole),
    };
    (first_whole, past_whole)
}

pub(crate) fn usize_of(len_bytes: u64) -> usize {
    usize::try_from(len_bytes).expect("the length of a part of a buffer")
}

impl BlockDevice for Volume {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn on_resize(&self, listener: Box<dyn Fn(u64) + Send + Sync>) {
        self.listeners.add(listener);
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check_range(offset, buf.len() as u64)?;
        self.stack().layers.read(buf, offset)
    }

    fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        self.check_range(offset, len_bytes).is_ok() && self.stack().layers.is_fast(offset, len_bytes)
    }

    fn write_at(&self, buf: &[u8], offset: u64, fua: bool) -> Result<(), BlockError> {
        self.check_range(offset, buf.len() as u64)?;
        let head = buf.len().min(usize_of(offset.next_multiple_of(BLOCK_BYTES) - offset));
        let tail_start = head + (buf.len() - head) / BLOCK_LEN * BLOCK_LEN;
        if head > 0 {
            self.write_part(&buf[..head], offset)?;
        }
        if tail_start > head {
            let _shared = self.merging.read().unwrap_or_else(PoisonError::into_inner);
            self.stack().top().write(&buf[head..tail_start], offset + head as u64)?;
        }
        if tail_start < buf.len() {
            self.write_part(&buf[tail_start..], offset + tail_start as u64)?;
        }
        self.finish(fua)
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.check_range(offset, len_bytes)?;
        self.zero_range(offset, len_bytes, false)?;
        self.finish(fua)
    }

    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.check_range(offset, len_bytes)?;
        self.zero_range(offset, len_bytes, true)?;
        self.finish(fua)
    }

    fn flush(&self) -> Result<(), BlockError> {
        let stack = self.stack();
        self.settle(&stack)?;
        stack.top().flush()
    }

    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        self.check_range(offset, len_bytes)?;
        self.stack().layers.status(offset, len_bytes, max_extents)
    }
}
