//! Reading frames that lie near each other in a pack with one request.
//!
//! A [`PackLayout`] says where frames lie, so that a reader can decide which ones to join. A
//! [`FrameRun`] holds the stored bytes of neighbours; each frame is decoded and verified by itself,
//! on any thread, so that a damaged one does not spoil the others.

use std::ops::Range;
use std::sync::Arc;

use crate::error::StoreError;
use crate::manifest::PackRef;
use crate::pack::{Footer, PackId};
use crate::store::Store;

/// The most stored bytes that one run may have; a single frame has at most 128 KiB.
const MAX_RUN_BYTES: u64 = 4 << 20;

/// Where the frames of a pack lie in its object.
#[derive(Debug, Clone)]
pub struct PackLayout {
    footer: Arc<Footer>,
}

impl PackLayout {
    /// The number of frames.
    #[must_use]
    pub fn frames(&self) -> u32 {
        u32::try_from(self.footer.frames.len()).unwrap_or(u32::MAX)
    }

    /// The bytes of the object that hold a frame; `None` when the pack has no such frame.
    #[must_use]
    pub fn stored_range(&self, frame: u32) -> Option<Range<u64>> {
        let record = self.footer.frames.get(frame as usize)?;
        Some(record.offset..record.offset + u64::from(record.stored_bytes))
    }
}

/// The stored bytes of neighbouring frames of one pack, not verified yet.
#[derive(Debug)]
pub struct FrameRun {
    pack: PackId,
    frames: Range<u32>,
    /// Where `stored` begins in the object.
    offset: u64,
    stored: Vec<u8>,
    footer: Arc<Footer>,
}

impl FrameRun {
    /// The frames that the run holds.
    #[must_use]
    pub fn frames(&self) -> Range<u32> {
        self.frames.clone()
    }

    /// Bytes that were read from the store.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.stored.len() as u64
    }
}

impl Store {
    /// Whether each read crosses a network: readers then ask for more at once, and ahead.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.objects.is_remote()
    }

    /// Reads where the frames of a pack lie; the next time it is known without a request.
    ///
    /// # Errors
    /// `Corrupt` when the pack is not the one that the manifest names; `NotFound`, `Io`, `Timeout`.
    pub fn pack_layout(&self, pack: &PackRef) -> Result<PackLayout, StoreError> {
        Ok(PackLayout { footer: self.verified_footer(pack)? })
    }

    /// Reads the stored bytes of neighbouring frames with one request.
    ///
    /// # Errors
    /// `Corrupt` when the range is empty, not in the pack or over 4 MiB, or when the pack is not the one
    /// that the manifest names; `NotFound`, `Io`, `Timeout`.
    pub fn read_run(&self, pack: &PackRef, frames: Range<u32>) -> Result<FrameRun, StoreError> {
        let footer = self.verified_footer(pack)?;
        let outside = || StoreError::corrupt(format!("pack {}: no frames {} to {}", pack.id, frames.start, frames.end));
        let records = footer.frames.get(frames.start as usize..frames.end as usize).ok_or_else(outside)?;
        let (first, last) = records.first().zip(records.last()).ok_or_else(outside)?;
        let end = last.offset + u64::from(last.stored_bytes);
        let len_bytes = end.checked_sub(first.offset).filter(|len| *len <= MAX_RUN_BYTES).ok_or_else(outside)?;
        let len = usize::try_from(len_bytes).map_err(|_| outside())?;
        let stored = self.objects.get_range(&pack.id.object_name(), first.offset, len)?;
        let offset = first.offset;
        Ok(FrameRun { pack: pack.id, frames, offset, stored, footer })
    }

    /// Decodes and verifies one frame of a run; returns its plain bytes, whole blocks.
    ///
    /// # Errors
    /// `Corrupt` with the pack's and the frame's name when its bytes do not verify or it is not in the run.
    pub fn decode_frame(&self, run: &FrameRun, frame: u32) -> Result<Vec<u8>, StoreError> {
        let missing = || StoreError::corrupt(format!("pack {}: frame {frame} is not in what was read", run.pack));
        let record = run.footer.frames.get(frame as usize).filter(|_| run.frames.contains(&frame));
        let record = record.ok_or_else(missing)?;
        let start =
            record.offset.checked_sub(run.offset).and_then(|at| usize::try_from(at).ok()).ok_or_else(missing)?;
        let stored = run.stored.get(start..start.saturating_add(record.stored_bytes as usize)).ok_or_else(missing)?;
        run.footer.decode_frame(frame, stored).map_err(|error| {
            StoreError::with_source(error.kind(), format!("pack {}, frame {frame} is damaged", run.pack), error)
        })
    }

    /// The pack's footer, when it is the one that the manifest names.
    pub(crate) fn verified_footer(&self, pack: &PackRef) -> Result<Arc<Footer>, StoreError> {
        let footer = self.footer(pack.id, pack.len_bytes)?;
        if footer.digest != pack.footer_digest {
            return Err(StoreError::corrupt(format!("pack {}: not the pack that the manifest names", pack.id)));
        }
        Ok(footer)
    }
}
