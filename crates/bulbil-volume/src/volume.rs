//! A volume: a writable disk over an image.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bulbil_store::{Digest, Manifest, Store, StoreErrorKind};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN, MAX_DISK_BYTES, VolumeId};

use crate::base::Base;
use crate::cache::BaseCache;
use crate::device::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
use crate::error::{VolumeError, VolumeErrorKind};
use crate::map::BlockState;
use crate::overlay::Overlay;
use crate::storage::{HostDirectory, StorageDirectory};

const RECORD_NAME: &str = "volume.json";
const FORMAT_VERSION: u32 = 1;

/// What a volume is, as its directory says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeRecord {
    /// Version of the overlay's format.
    pub format_version: u32,
    /// The volume's id.
    pub id: VolumeId,
    /// Its size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Content of the image below; `None` for a disk of zeroes.
    pub base: Option<Digest>,
}

/// The directory that holds all volumes of a host, one directory each.
#[derive(Debug, Clone)]
pub struct VolumeDirectory {
    path: PathBuf,
}

impl VolumeDirectory {
    /// Uses a directory, which is made when it is missing.
    ///
    /// # Errors
    /// `Io` or `NoSpace`.
    pub fn open(path: &Path) -> Result<Self, VolumeError> {
        std::fs::create_dir_all(path).map_err(|e| VolumeError::io(format!("cannot create `{}`", path.display()), e))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Creates a volume: two small writes, whatever its size. Durable when this returns.
    ///
    /// # Errors
    /// `BadSize`; `Io` or `NoSpace`, and then there is no such volume.
    pub fn create(&self, id: &VolumeId, size_bytes: u64, base: Option<&Manifest>) -> Result<VolumeRecord, VolumeError> {
        let smallest = base.map_or(512, Manifest::size_bytes);
        if size_bytes < smallest || size_bytes > MAX_DISK_BYTES || !size_bytes.is_multiple_of(512) {
            let text = format!(
                "a volume of {size_bytes} bytes is not possible: it must be a multiple of 512 from {smallest} to {MAX_DISK_BYTES}"
            );
            return Err(VolumeError::new(VolumeErrorKind::BadSize, text));
        }
        let base = base.map(Manifest::digest);
        let record = VolumeRecord { format_version: FORMAT_VERSION, id: id.clone(), size_bytes, base };
        let directory = self.volume_path(id);
        let fail = |e| VolumeError::io(format!("cannot create volume {id}"), e);
        // By itself: what is there already is not ours to remove.
        std::fs::create_dir(&directory).map_err(fail)?;
        let write = || -> io::Result<()> {
            let mut file = File::create_new(directory.join(RECORD_NAME))?;
            file.write_all(&serde_json::to_vec(&record)?)?;
            file.sync_all()?;
            File::open(&directory)?.sync_all()?;
            File::open(&self.path)?.sync_all()
        };
        if let Err(error) = write() {
            drop(std::fs::remove_dir_all(&directory));
            return Err(fail(error));
        }
        Ok(record)
    }

    /// Reads what a volume is.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, `Io`.
    pub fn record(&self, id: &VolumeId) -> Result<VolumeRecord, VolumeError> {
        let bytes = std::fs::read(self.volume_path(id).join(RECORD_NAME))
            .map_err(|e| VolumeError::io(format!("cannot read volume {id}"), e))?;
        let record: VolumeRecord = serde_json::from_slice(&bytes).map_err(|e| {
            VolumeError::with_source(VolumeErrorKind::Corrupt, format!("the record of volume {id} cannot be read"), e)
        })?;
        if record.format_version != FORMAT_VERSION || record.size_bytes > MAX_DISK_BYTES {
            let text = format!("volume {id} was written by another version (format {})", record.format_version);
            return Err(VolumeError::new(VolumeErrorKind::Corrupt, text));
        }
        Ok(record)
    }

    /// Opens a volume for reading and writing; only one process can at a time.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `Corrupt`, `Io`.
    pub fn open_volume(
        &self,
        id: &VolumeId,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
    ) -> Result<Volume, VolumeError> {
        let record = self.record(id)?;
        let directory = self.volume_path(id);
        let lock = lock_volume(&directory.join(RECORD_NAME), id)?;
        let base = record.base.map(|digest| {
            let manifest = store.manifest(&digest).map_err(|error| {
                let kind = match error.kind() {
                    StoreErrorKind::NotFound | StoreErrorKind::Corrupt => VolumeErrorKind::Corrupt,
                    _ => VolumeErrorKind::Io,
                };
                VolumeError::with_source(kind, format!("the image below volume {id} cannot be read"), error)
            })?;
            Ok(Base::new(Arc::clone(store), Arc::clone(cache), manifest))
        });
        let storage = Arc::new(HostDirectory::new(&directory));
        let volume = Volume::new(record.size_bytes, base.transpose()?, storage)?;
        Ok(Volume { _lock: Some(lock), ..volume })
    }

    /// Whether a process has the volume open at this moment.
    #[must_use]
    pub fn is_in_use(&self, id: &VolumeId) -> bool {
        let lock = lock_volume(&self.volume_path(id).join(RECORD_NAME), id);
        lock.is_err_and(|e| e.kind() == VolumeErrorKind::InUse)
    }

    /// Removes a volume and everything written to it; one that is not there is fine.
    ///
    /// # Errors
    /// `InUse`, `Io`.
    pub fn remove(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let directory = self.volume_path(id);
        let lock = match lock_volume(&directory.join(RECORD_NAME), id) {
            Err(e) if e.kind() == VolumeErrorKind::NotFound => None,
            other => Some(other?),
        };
        let removed = std::fs::remove_dir_all(&directory);
        drop(lock);
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(VolumeError::io(format!("cannot remove volume {id}"), e))
            }
            _ => Ok(()),
        }
    }

    fn volume_path(&self, id: &VolumeId) -> PathBuf {
        self.path.join(id.as_str())
    }
}

fn lock_volume(record: &Path, id: &VolumeId) -> Result<File, VolumeError> {
    let file = OpenOptions::new()
        .read(true)
        .open(record)
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
    size_bytes: u64,
    base: Option<Base>,
    overlay: Overlay,
    /// Held shared by writes of whole blocks, alone by a write that merges with what is there:
    /// otherwise a merge could put back what another request has just replaced.
    merging: RwLock<()>,
    /// Held for its lifetime: only one process may have the volume open.
    _lock: Option<File>,
}

impl Volume {
    /// A volume over any directory; tests give one that forgets what was not synced.
    ///
    /// # Errors
    /// `Io` when the overlay cannot be opened.
    pub fn without_base(size_bytes: u64, directory: Arc<dyn StorageDirectory>) -> Result<Self, VolumeError> {
        Self::new(size_bytes, None, directory)
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
        Self::new(size_bytes, Some(Base::new(Arc::clone(store), Arc::clone(cache), manifest)), directory)
    }

    fn new(size_bytes: u64, base: Option<Base>, directory: Arc<dyn StorageDirectory>) -> Result<Self, VolumeError> {
        let overlay = Overlay::open(directory, size_bytes)
            .map_err(|e| VolumeError::with_source(VolumeErrorKind::Io, "cannot open the volume's overlay", e))?;
        Ok(Self { size_bytes, base, overlay, merging: RwLock::new(()), _lock: None })
    }

    /// Frames that were fetched from the store because they were not in the base cache.
    #[must_use]
    pub fn frames_fetched(&self) -> u64 {
        self.base.as_ref().map_or(0, Base::frames_fetched)
    }

    fn check_range(&self, offset: u64, len_bytes: u64) -> Result<(), BlockError> {
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(BlockError::new(
                BlockErrorKind::OutOfRange,
                format!("{len_bytes} bytes at {offset:#x} are not in a disk of {} bytes", self.size_bytes),
            )),
        }
    }

    /// Calls `each` with every run of one state: (state, offset, length), cut at the range's ends.
    fn for_each_run(
        &self,
        offset: u64,
        len_bytes: u64,
        mut each: impl FnMut(BlockState, u64, u64) -> Result<bool, BlockError>,
    ) -> Result<(), BlockError> {
        let end = offset + len_bytes;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let (state, blocks) = self.overlay.run(block, end.div_ceil(BLOCK_BYTES) - block)?;
            let run_end = end.min((block + blocks) * BLOCK_BYTES);
            if !each(state, at, run_end - at)? {
                break;
            }
            at = run_end;
        }
        Ok(())
    }

    fn read_base(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        match &self.base {
            Some(base) => base.read(buf, offset),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn read_any(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.for_each_run(offset, buf.len() as u64, |state, at, len| {
            let part = &mut buf[usize_of(at - offset)..usize_of(at - offset + len)];
            match state {
                BlockState::Base => self.read_base(part, at)?,
                BlockState::Data => self.overlay.read(part, at)?,
                BlockState::Zero => part.fill(0),
            }
            Ok(true)
        })
    }

    /// Writes a range that lies within one block and does not cover it.
    fn write_part(&self, buf: &[u8], offset: u64) -> Result<(), BlockError> {
        let block = offset / BLOCK_BYTES;
        {
            let _shared = self.merging.read().unwrap_or_else(PoisonError::into_inner);
            if self.overlay.run(block, 1)?.0 == BlockState::Data {
                return self.overlay.write(buf, offset);
            }
        }
        let _alone = self.merging.write().unwrap_or_else(PoisonError::into_inner);
        let mut merged = [0; BLOCK_LEN];
        let start = block * BLOCK_BYTES;
        // The last block of a disk may be short; what lies past the end stays zero.
        let len = usize_of(BLOCK_BYTES.min(self.size_bytes - start));
        self.read_any(&mut merged[..len], start)?;
        let within = usize_of(offset - start);
        merged[within..within + buf.len()].copy_from_slice(buf);
        self.overlay.write(&merged, start)
    }

    fn zero_range(&self, offset: u64, len_bytes: u64, whole_blocks_only: bool) -> Result<(), BlockError> {
        let end = offset + len_bytes;
        let first_whole = offset.next_multiple_of(BLOCK_BYTES).min(end);
        let past_whole = match end {
            // The range lies within one block.
            _ if !first_whole.is_multiple_of(BLOCK_BYTES) => first_whole,
            // The last block of the disk may be short, and is covered all the same.
            end if end == self.size_bytes => end.next_multiple_of(BLOCK_BYTES),
            end => (end / BLOCK_BYTES * BLOCK_BYTES).max(first_whole),
        };
        if !whole_blocks_only {
            const ZEROES: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
            for (from, to) in [(offset, first_whole), (past_whole.min(end), end)] {
                if from < to {
                    self.write_part(&ZEROES[..usize_of(to - from)], from)?;
                }
            }
        }
        let _shared = self.merging.read().unwrap_or_else(PoisonError::into_inner);
        let (mut block, last) = (first_whole / BLOCK_BYTES, past_whole / BLOCK_BYTES);
        while block < last {
            let (state, blocks) = self.overlay.run(block, last - block)?;
            let blocks = match (state, &self.base) {
                // Zero already, and nothing would be gained by saying so in the overlay.
                (BlockState::Base, None) | (BlockState::Zero, _) => blocks,
                (BlockState::Base, Some(base)) => match base.hole_run(block, blocks) {
                    (true, hole) => hole,
                    (false, data) => {
                        self.overlay.zero(block, data)?;
                        data
                    }
                },
                (BlockState::Data, _) => {
                    self.overlay.zero(block, blocks)?;
                    blocks
                }
            };
            block += blocks;
        }
        Ok(())
    }

    fn finish(&self, fua: bool) -> Result<(), BlockError> {
        if fua { self.overlay.flush() } else { Ok(()) }
    }
}

fn usize_of(len_bytes: u64) -> usize {
    usize::try_from(len_bytes).expect("the length of a part of a buffer")
}

impl BlockDevice for Volume {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check_range(offset, buf.len() as u64)?;
        self.read_any(buf, offset)
    }

    fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        let mut fast = true;
        let looked = self.check_range(offset, len_bytes).and_then(|()| {
            self.for_each_run(offset, len_bytes, |state, at, len| {
                let base_is_slow = |base: &Base| state == BlockState::Base && !base.is_fast(at, len);
                fast = !self.base.as_ref().is_some_and(base_is_slow);
                Ok(fast)
            })
        });
        looked.is_ok() && fast
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
            self.overlay.write(&buf[head..tail_start], offset + head as u64)?;
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
        self.overlay.flush()
    }

    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        self.check_range(offset, len_bytes)?;
        let mut runs: Vec<StatusExtent> = Vec::new();
        let mut add = |len_bytes: u64, kind: ExtentKind| {
            let room = runs.len() < max_extents.max(1);
            match runs.last_mut() {
                Some(last) if last.kind == kind => last.len_bytes += len_bytes,
                _ if room => runs.push(StatusExtent { len_bytes, kind }),
                _ => return false,
            }
            true
        };
        self.for_each_run(offset, len_bytes, |state, at, len| match (state, &self.base) {
            (BlockState::Data, _) => Ok(add(len, ExtentKind::Data)),
            (BlockState::Base, Some(base)) => {
                let mut from = at;
                while from < at + len {
                    let block = from / BLOCK_BYTES;
                    let (hole, blocks) = base.hole_run(block, (at + len).div_ceil(BLOCK_BYTES) - block);
                    let to = (at + len).min((block + blocks) * BLOCK_BYTES);
                    if !add(to - from, if hole { ExtentKind::Hole } else { ExtentKind::Data }) {
                        return Ok(false);
                    }
                    from = to;
                }
                Ok(true)
            }
            (BlockState::Zero | BlockState::Base, _) => Ok(add(len, ExtentKind::Hole)),
        })?;
        Ok(runs)
    }
}
