//! The disk of a stored image, read from the store: no volume, no cache on the disk.

use std::collections::HashMap;
use std::io;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulbil_format::{DiskContent, Extent, ExtentKind, FormatError};
use bulbil_store::{Manifest, Store, StoreError};
use bulbil_types::{BLOCK_BYTES, FRAME_BYTES};

/// Decoded frames in memory: 32 MiB, since images that share blocks with others refer to parts of many frames.
const FRAMES_KEPT: usize = 256;

/// A manifest and the store that holds its frames.
pub(crate) struct ImageContent {
    store: Arc<Store>,
    manifest: Manifest,
    frames: FrameCache,
}

impl ImageContent {
    pub(crate) fn new(store: Arc<Store>, manifest: Manifest) -> Self {
        Self { store, manifest, frames: FrameCache::default() }
    }

    /// The bytes from `offset` on that lie in one frame or in none, at most `limit_bytes`.
    fn part_at(&self, offset: u64, limit_bytes: u64) -> Part {
        let hole = |len_bytes: u64| Part { len_bytes: len_bytes.min(limit_bytes), frame: None };
        match self.manifest.extent_at_or_after(offset / BLOCK_BYTES) {
            None => hole(u64::MAX),
            Some(extent) if extent.first_block * BLOCK_BYTES > offset => {
                hole(extent.first_block * BLOCK_BYTES - offset)
            }
            Some(extent) => {
                let in_extent = offset - extent.first_block * BLOCK_BYTES;
                let in_pack = u64::from(extent.block_in_pack) * BLOCK_BYTES + in_extent;
                let offset_in_frame = in_pack % FRAME_BYTES;
                let rest_of_extent = u64::from(extent.blocks) * BLOCK_BYTES - in_extent;
                Part {
                    len_bytes: (FRAME_BYTES - offset_in_frame).min(rest_of_extent).min(limit_bytes),
                    frame: Some((FrameKey { pack: extent.pack, frame: in_pack / FRAME_BYTES }, offset_in_frame)),
                }
            }
        }
    }

    fn read_part(&self, part: &Part, buf: &mut [u8]) -> Result<(), StoreError> {
        let Some((key, offset_in_frame)) = part.frame else {
            buf.fill(0);
            return Ok(());
        };
        let frame = self.frames.get_or_load(key, || {
            let number = u32::try_from(key.frame).expect("a pack holds 2048 frames");
            self.store.read_frame(&self.manifest.packs()[key.pack as usize], number)
        })?;
        let start = usize::try_from(offset_in_frame).expect("a frame is 128 KiB");
        match frame.get(start..start + buf.len()) {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => return Err(StoreError::outside_frame(self.manifest.packs()[key.pack as usize].id)),
        }
        Ok(())
    }
}

/// Bytes that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    len_bytes: u64,
    /// The frame and the first byte in it; `None` for zeros.
    frame: Option<(FrameKey, u64)>,
}

/// A frame of a pack of the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FrameKey {
    pack: u32,
    frame: u64,
}

impl std::fmt::Debug for ImageContent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageContent").field("digest", &self.manifest.digest()).finish_non_exhaustive()
    }
}

impl DiskContent for ImageContent {
    fn size_bytes(&self) -> u64 {
        self.manifest.size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        let (size_bytes, end_bytes) = (self.size_bytes(), offset_bytes.saturating_add(buf.len() as u64));
        if end_bytes > size_bytes {
            return Err(FormatError::OutOfRange { offset_bytes, end_bytes, size_bytes });
        }
        let (mut rest, mut offset) = (buf, offset_bytes);
        while !rest.is_empty() {
            let part = self.part_at(offset, rest.len() as u64);
            let len = usize::try_from(part.len_bytes).expect("at most the buffer's length");
            let (bytes, after) = rest.split_at_mut(len);
            self.read_part(&part, bytes).map_err(|error| FormatError::Io {
                operation: "read",
                offset_bytes: offset,
                source: io::Error::other(error),
            })?;
            (rest, offset) = (after, offset + part.len_bytes);
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let size_bytes = self.size_bytes();
        if offset_bytes >= size_bytes {
            return Ok(None);
        }
        let extents = self.manifest.extents();
        let first = extents.partition_point(|extent| extent.end_block() * BLOCK_BYTES <= offset_bytes);
        let mut following = extents[first..].iter();
        let (kind, end_bytes) = match following.next() {
            None => (ExtentKind::Zero, size_bytes),
            Some(extent) if extent.first_block * BLOCK_BYTES > offset_bytes => {
                (ExtentKind::Zero, extent.first_block * BLOCK_BYTES)
            }
            Some(extent) => {
                // Neighbours are one extent of the disk, wherever they are stored.
                let mut end_block = extent.end_block();
                for next in following {
                    if next.first_block != end_block {
                        break;
                    }
                    end_block = next.end_block();
                }
                (ExtentKind::Data, end_block * BLOCK_BYTES)
            }
        };
        let len_bytes = end_bytes.min(size_bytes) - offset_bytes;
        Ok(Some(Extent { offset_bytes, len_bytes, kind }))
    }
}

/// A place for one frame; locked while it is being read, so that it is read once.
type Slot = Arc<Mutex<Option<Arc<Vec<u8>>>>>;

/// Frames that were read last, in two generations: when the young one is full, the old one goes.
#[derive(Default)]
struct FrameCache {
    generations: Mutex<[HashMap<FrameKey, Slot>; 2]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FrameCache {
    fn get_or_load(
        &self,
        key: FrameKey,
        load: impl FnOnce() -> Result<Vec<u8>, StoreError>,
    ) -> Result<Arc<Vec<u8>>, StoreError> {
        let slot = self.slot(key);
        let mut kept = lock(&slot);
        if let Some(frame) = &*kept {
            return Ok(Arc::clone(frame));
        }
        let frame = Arc::new(load()?);
        *kept = Some(Arc::clone(&frame));
        Ok(frame)
    }

    fn slot(&self, key: FrameKey) -> Slot {
        let mut generations = lock(&self.generations);
        let [young, old] = &mut *generations;
        if let Some(slot) = young.get(&key) {
            return Arc::clone(slot);
        }
        let slot = old.remove(&key).unwrap_or_default();
        if young.len() >= FRAMES_KEPT / 2 {
            *old = mem::take(young);
        }
        young.insert(key, Arc::clone(&slot));
        slot
    }
}
