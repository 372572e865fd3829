//! The image below a volume: a manifest, read through the base cache.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use bulbil_store::{Extent, Manifest, PackRef, Store};
use bulbil_types::{BLOCK_BYTES, BLOCKS_PER_FRAME};

use crate::cache::{BaseCache, CacheCounters, CacheFile, read_uncached};
use crate::device::{BlockError, BlockErrorKind};

#[derive(Debug)]
pub(crate) struct Base {
    store: Arc<Store>,
    cache: Arc<BaseCache>,
    manifest: Manifest,
    files: Vec<OnceLock<Arc<CacheFile>>>,
    counters: CacheCounters,
}

/// A part of an extent that lies in one frame.
struct Piece<'a> {
    pack: &'a PackRef,
    file: &'a OnceLock<Arc<CacheFile>>,
    frame: u32,
    offset_in_frame: u64,
    len_bytes: u64,
}

impl Base {
    pub(crate) fn new(store: Arc<Store>, cache: Arc<BaseCache>, manifest: Manifest) -> Self {
        let files = manifest.packs().iter().map(|_| OnceLock::new()).collect();
        Self { store, cache, manifest, files, counters: CacheCounters::default() }
    }

    pub(crate) fn frames_fetched(&self) -> u64 {
        self.counters.fetched.load(Ordering::Relaxed)
    }

    /// Whether a block is in no extent and how many blocks from it, at most `limit`, are alike.
    pub(crate) fn hole_run(&self, block: u64, limit: u64) -> (bool, u64) {
        match self.manifest.extent_at_or_after(block) {
            None => (true, limit),
            Some(extent) if extent.first_block > block => (true, limit.min(extent.first_block - block)),
            Some(extent) => (false, limit.min(extent.end_block() - block)),
        }
    }

    /// Fills `buf` from `offset`; zeroes past the end of the image.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let left = buf.len() - done;
            let len = match self.manifest.extent_at_or_after(at / BLOCK_BYTES) {
                Some(extent) if extent.first_block * BLOCK_BYTES <= at => {
                    let piece = self.piece(extent, at, left as u64);
                    let len = usize::try_from(piece.len_bytes).unwrap_or(left).min(left);
                    self.read_piece(&piece, &mut buf[done..done + len])?;
                    len
                }
                next => {
                    let hole = next.map_or(u64::MAX, |extent| extent.first_block * BLOCK_BYTES - at);
                    let len = usize::try_from(hole).unwrap_or(left).min(left);
                    buf[done..done + len].fill(0);
                    len
                }
            };
            done += len;
        }
        Ok(())
    }

    /// Whether every frame of the range is in the cache.
    pub(crate) fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        let mut at = offset;
        while at < offset + len_bytes {
            let left = offset + len_bytes - at;
            match self.manifest.extent_at_or_after(at / BLOCK_BYTES) {
                Some(extent) if extent.first_block * BLOCK_BYTES <= at => {
                    let piece = self.piece(extent, at, left);
                    if !piece.file.get().is_some_and(|file| file.has(piece.frame)) {
                        return false;
                    }
                    at += piece.len_bytes;
                }
                Some(extent) => at = extent.first_block * BLOCK_BYTES,
                None => return true,
            }
        }
        true
    }

    fn piece(&self, extent: &Extent, at: u64, limit_bytes: u64) -> Piece<'_> {
        let in_extent = at - extent.first_block * BLOCK_BYTES;
        let in_pack = u64::from(extent.block_in_pack) * BLOCK_BYTES + in_extent;
        let frame_bytes = BLOCKS_PER_FRAME * BLOCK_BYTES;
        let offset_in_frame = in_pack % frame_bytes;
        let in_frame = frame_bytes - offset_in_frame;
        let extent_left = u64::from(extent.blocks) * BLOCK_BYTES - in_extent;
        Piece {
            pack: &self.manifest.packs()[extent.pack as usize],
            file: &self.files[extent.pack as usize],
            frame: u32::try_from(in_pack / frame_bytes).expect("a pack holds 2048 frames"),
            offset_in_frame,
            len_bytes: in_frame.min(extent_left).min(limit_bytes),
        }
    }

    fn read_piece(&self, piece: &Piece<'_>, buf: &mut [u8]) -> Result<(), BlockError> {
        let read = match self.cache_file(piece) {
            Some(file) => file.read(&self.store, piece.pack, piece.frame, piece.offset_in_frame, buf, &self.counters),
            None => read_uncached(&self.store, piece.pack, piece.frame, piece.offset_in_frame, buf),
        };
        read.map_err(|error| {
            tracing::error!(pack = %piece.pack.id, frame = piece.frame, image = %self.manifest.digest(), %error,
                "cannot read a frame of an image");
            BlockError::with_source(
                BlockErrorKind::Io,
                format!("cannot read the image {}", self.manifest.digest()),
                error,
            )
        })
    }

    /// The pack's file in the cache; `None` when the host cannot give one now.
    fn cache_file<'a>(&self, piece: &'a Piece<'_>) -> Option<&'a Arc<CacheFile>> {
        if let Some(file) = piece.file.get() {
            return Some(file);
        }
        match self.cache.file(piece.pack) {
            Ok(opened) => Some(piece.file.get_or_init(|| opened)),
            Err(error) => {
                tracing::warn!(pack = %piece.pack.id, %error, "cannot open the base cache; reading from the store");
                None
            }
        }
    }
}
