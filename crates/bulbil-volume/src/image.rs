//! One edition of an image: its manifest, and what this process knows of the packs below it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use bulbil_store::{Manifest, PackRef, Store};
use bulbil_types::{BLOCK_BYTES, BLOCKS_PER_FRAME, FRAME_BYTES};

use crate::cache::{CacheRead, CacheShared, PackHandle};
use crate::cache_file::MAX_FRAMES;
use crate::read_stats::Counters;

/// The volume has read something of the frame.
const TOUCHED: u8 = 1;
/// The frame was fetched for this volume before it was asked for.
const FETCHED_AHEAD: u8 = 2;

/// A frame: the pack's position in the manifest, and the frame's in the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FrameAt {
    pub(crate) pack: u32,
    pub(crate) frame: u32,
}

/// A part of a range of the disk: a hole, or bytes that lie in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Hole { len_bytes: u64 },
    Data { at: FrameAt, offset_in_frame: u64, len_bytes: u64 },
}

impl Part {
    pub(crate) fn len_bytes(&self) -> u64 {
        match self {
            Self::Hole { len_bytes } | Self::Data { len_bytes, .. } => *len_bytes,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) store: Arc<Store>,
    pub(crate) cache: Arc<CacheShared>,
    pub(crate) manifest: Manifest,
    pub(crate) counters: Arc<Counters>,
    packs: Vec<PackState>,
}

#[derive(Debug)]
struct PackState {
    handle: OnceLock<Arc<PackHandle>>,
    /// One byte for each frame that the manifest refers to.
    frames: Box<[AtomicU8]>,
}

impl Image {
    pub(crate) fn new(
        store: Arc<Store>,
        cache: Arc<CacheShared>,
        manifest: Manifest,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let mut frames = vec![0_usize; manifest.packs().len()];
        for extent in manifest.extents() {
            let end = u64::from(extent.block_in_pack + extent.blocks).div_ceil(BLOCKS_PER_FRAME);
            let count = &mut frames[extent.pack as usize];
            *count = (*count).max(usize::try_from(end).unwrap_or(MAX_FRAMES).min(MAX_FRAMES));
        }
        let packs = frames
            .into_iter()
            .map(|count| PackState { handle: OnceLock::new(), frames: (0..count).map(|_| AtomicU8::new(0)).collect() });
        let packs = packs.collect();
        Arc::new(Self { store, cache, manifest, counters, packs })
    }

    pub(crate) fn pack(&self, pack: u32) -> &PackRef {
        &self.manifest.packs()[pack as usize]
    }

    pub(crate) fn handle(&self, pack: u32) -> &Arc<PackHandle> {
        self.packs[pack as usize].handle.get_or_init(|| self.cache.handle(&self.store, self.pack(pack)))
    }

    /// What lies at a byte of the disk, at most `limit_bytes` of it.
    pub(crate) fn part_at(&self, at: u64, limit_bytes: u64) -> Part {
        match self.manifest.extent_at_or_after(at / BLOCK_BYTES) {
            Some(extent) if extent.first_block * BLOCK_BYTES <= at => {
                let in_extent = at - extent.first_block * BLOCK_BYTES;
                let in_pack = u64::from(extent.block_in_pack) * BLOCK_BYTES + in_extent;
                let offset_in_frame = in_pack % FRAME_BYTES;
                let extent_left = u64::from(extent.blocks) * BLOCK_BYTES - in_extent;
                let frame = u32::try_from(in_pack / FRAME_BYTES).expect("a pack holds 2048 frames");
                Part::Data {
                    at: FrameAt { pack: extent.pack, frame },
                    offset_in_frame,
                    len_bytes: (FRAME_BYTES - offset_in_frame).min(extent_left).min(limit_bytes),
                }
            }
            Some(extent) => Part::Hole { len_bytes: (extent.first_block * BLOCK_BYTES - at).min(limit_bytes) },
            None => Part::Hole { len_bytes: limit_bytes },
        }
    }

    /// Calls `each` with every part of a range and its first byte, until it returns `false`.
    pub(crate) fn for_each_part(&self, offset: u64, len_bytes: u64, mut each: impl FnMut(Part, u64) -> bool) {
        let end = offset.saturating_add(len_bytes);
        let mut at = offset;
        while at < end {
            let part = self.part_at(at, end - at);
            if !each(part, at) {
                return;
            }
            at += part.len_bytes();
        }
    }

    /// Fills the beginning of `buf` as far as frames are in cache files; returns how many bytes that is.
    pub(crate) fn read_warm(&self, buf: &mut [u8], offset: u64) -> usize {
        let mut done = 0;
        while done < buf.len() {
            let left = &mut buf[done..];
            let part = self.part_at(offset + done as u64, left.len() as u64);
            let len = usize::try_from(part.len_bytes()).expect("at most the length of a buffer");
            match part {
                Part::Hole { .. } => left[..len].fill(0),
                Part::Data { at, offset_in_frame, .. } => {
                    let handle = self.packs[at.pack as usize].handle.get();
                    let read = handle.map(|handle| handle.read(at.frame, offset_in_frame, &mut left[..len]));
                    if read != Some(CacheRead::Done) {
                        return done;
                    }
                    self.touch(at);
                }
            }
            done += len;
        }
        done
    }

    /// Notes that the volume has read something of a frame.
    pub(crate) fn touch(&self, at: FrameAt) {
        let Some(flags) = self.packs[at.pack as usize].frames.get(at.frame as usize) else { return };
        if flags.load(Ordering::Relaxed) & TOUCHED == 0 {
            let before = flags.fetch_or(TOUCHED, Ordering::Relaxed);
            if before & (TOUCHED | FETCHED_AHEAD) == FETCHED_AHEAD {
                self.counters.hit_frames.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Notes that a frame was fetched for this volume before it was asked for.
    pub(crate) fn note_fetched_ahead(&self, at: FrameAt) {
        let Some(flags) = self.packs[at.pack as usize].frames.get(at.frame as usize) else { return };
        let before = flags.fetch_or(FETCHED_AHEAD, Ordering::Relaxed);
        if before & (TOUCHED | FETCHED_AHEAD) == TOUCHED {
            // Asked for while it was on its way.
            self.counters.hit_frames.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether every frame of the range is in the cache or in memory.
    pub(crate) fn is_near(&self, offset: u64, len_bytes: u64) -> bool {
        let mut near = true;
        self.for_each_part(offset, len_bytes, |part, _| {
            if let Part::Data { at, .. } = part {
                near = self.packs[at.pack as usize].handle.get().is_some_and(|handle| handle.is_near(at.frame));
            }
            near
        });
        near
    }

    /// Whether the block is in no extent and how many blocks from it, at most `limit`, are alike.
    pub(crate) fn hole_run(&self, block: u64, limit: u64) -> (bool, u64) {
        match self.manifest.extent_at_or_after(block) {
            None => (true, limit),
            Some(extent) if extent.first_block > block => (true, limit.min(extent.first_block - block)),
            Some(extent) => (false, limit.min(extent.end_block() - block)),
        }
    }
}
