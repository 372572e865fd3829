//! Markers of a stream, and compressed grains: bytes in, exactly one grain out.
//!
//! Every part of a streamOptimized extent begins at a sector with a marker:
//!
//! | offset | bytes | grain | other part |
//! |---|---|---|---|
//! | 0 | 8 | first sector on the disk | sectors that follow the marker's own |
//! | 8 | 4 | length of the compressed bytes | 0 |
//! | 12 | | compressed bytes: zlib, RFC 1950 | 4 bytes: 0 end of stream, 1 grain table, 2 grain directory, 3 footer |

use std::sync::{Mutex, PoisonError};

use libdeflater::{DecompressionError, Decompressor};

use crate::bytes::{le_u32, le_u64, to_u64, to_usize};
use crate::error::need;
use crate::{FormatError, ReadAt};

pub(super) const MARKER_EOS: u32 = 0;
pub(super) const MARKER_TABLE: u32 = 1;
pub(super) const MARKER_DIRECTORY: u32 = 2;
pub(super) const MARKER_FOOTER: u32 = 3;
/// The marker of a grain; the compressed bytes follow.
pub(super) const GRAIN_MARKER_BYTES: u64 = 12;

/// The marker in front of a compressed grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GrainMarker {
    pub(super) disk_sector: u64,
    pub(super) len_bytes: u64,
}

impl GrainMarker {
    fn parse(bytes: &[u8]) -> Self {
        Self { disk_sector: le_u64(bytes, 0), len_bytes: u64::from(le_u32(bytes, 8)) }
    }

    /// Checks that the compressed bytes, with their marker at `host_offset`, have a length that makes sense and are in
    /// the file. As in QEMU, twice the grain is the limit; deflate itself never needs that much.
    pub(super) fn check(self, host_offset: u64, grain_bytes: u64, len_bytes: u64) -> Result<(), FormatError> {
        if self.len_bytes == 0 || self.len_bytes > 2 * grain_bytes {
            let len_bytes = self.len_bytes;
            return Err(FormatError::corrupt(format!("compressed grain at {host_offset:#x} of {len_bytes} bytes")));
        }
        let end_bytes = host_offset.saturating_add(GRAIN_MARKER_BYTES + self.len_bytes);
        need(len_bytes, end_bytes, "a compressed grain")
    }
}

/// The most that is read ahead for markers.
const MAX_WINDOW_BYTES: u64 = 256 << 10;
const MIN_WINDOW_BYTES: u64 = 512;

/// Reads the markers of grains, many at once where they follow each other.
///
/// In the usual stream each grain lies right behind the one before, so that reading ahead costs less than a call for
/// each marker. The window doubles with each hit and begins anew with a miss: out of order, little is read in vain.
pub(super) struct MarkerReader<'a> {
    file: &'a dyn ReadAt,
    window: Vec<u8>,
    window_offset: u64,
    window_bytes: u64,
}

impl<'a> MarkerReader<'a> {
    pub(super) fn new(file: &'a dyn ReadAt) -> Self {
        Self { file, window: Vec::new(), window_offset: 0, window_bytes: MIN_WINDOW_BYTES }
    }

    /// Returns the marker at a host offset.
    pub(super) fn marker_at(&mut self, host_offset: u64) -> Result<GrainMarker, FormatError> {
        need(self.file.len_bytes(), host_offset.saturating_add(GRAIN_MARKER_BYTES), "a compressed grain")?;
        if let Some(bytes) = self.in_window(host_offset) {
            return Ok(GrainMarker::parse(bytes));
        }
        // A marker that the window nearly reached is still in order.
        let window_end = self.window_offset.saturating_add(to_u64(self.window.len()));
        let ahead = host_offset.checked_sub(window_end).is_some_and(|gap| gap < self.window_bytes);
        self.window_bytes = if ahead { (self.window_bytes * 2).min(MAX_WINDOW_BYTES) } else { MIN_WINDOW_BYTES };
        let len_bytes = self.window_bytes.min(self.file.len_bytes() - host_offset);
        self.window.resize(to_usize(len_bytes), 0);
        self.window_offset = host_offset;
        self.file.read_exact_at(&mut self.window, host_offset).map_err(FormatError::read(host_offset))?;
        Ok(GrainMarker::parse(&self.window))
    }

    fn in_window(&self, host_offset: u64) -> Option<&[u8]> {
        let start = to_usize(host_offset.checked_sub(self.window_offset)?);
        self.window.get(start..start.checked_add(to_usize(GRAIN_MARKER_BYTES))?)
    }
}

/// Decoders at rest, at most one for each thread that ever decoded at the same time.
#[derive(Default)]
pub(super) struct DecoderPool {
    idle: Mutex<Vec<Decoder>>,
}

struct Decoder {
    inflate: Decompressor,
    input: Vec<u8>,
}

impl DecoderPool {
    /// Decodes the grain whose marker is at `host_offset`. `grain` is as long as a grain; `tail_bytes` is how
    /// much of it the disk has where that is less: some writers end the last grain there, others fill it up.
    pub(super) fn decode(
        &self,
        file: &dyn ReadAt,
        host_offset: u64,
        grain: &mut [u8],
        tail_bytes: Option<u64>,
    ) -> Result<(), FormatError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut decoder = idle.unwrap_or_else(|| Decoder { inflate: Decompressor::new(), input: Vec::new() });
        let result = decoder.decode(file, host_offset, grain, tail_bytes);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
        result
    }
}

impl Decoder {
    fn decode(
        &mut self,
        file: &dyn ReadAt,
        host_offset: u64,
        grain: &mut [u8],
        tail_bytes: Option<u64>,
    ) -> Result<(), FormatError> {
        let mut marker = [0; 12];
        file.read_exact_at(&mut marker, host_offset).map_err(FormatError::read(host_offset))?;
        let marker = GrainMarker::parse(&marker);
        marker.check(host_offset, to_u64(grain.len()), file.len_bytes())?;
        self.input.resize(to_usize(marker.len_bytes), 0);
        let data_offset = host_offset + GRAIN_MARKER_BYTES;
        file.read_exact_at(&mut self.input, data_offset).map_err(FormatError::read(data_offset))?;
        let failed = |reason: String| FormatError::corrupt(format!("compressed grain at {host_offset:#x}: {reason}"));
        let len_bytes = match self.inflate.zlib_decompress(&self.input, grain) {
            Ok(len) => to_u64(len),
            Err(DecompressionError::BadData) => return Err(failed("it does not decode".to_owned())),
            Err(DecompressionError::InsufficientSpace) => return Err(failed("it is longer than a grain".to_owned())),
        };
        let wanted_bytes = tail_bytes.unwrap_or(to_u64(grain.len()));
        if len_bytes < wanted_bytes {
            return Err(failed(format!("it has {len_bytes} bytes instead of {wanted_bytes}")));
        }
        grain.get_mut(to_usize(len_bytes)..).unwrap_or_default().fill(0);
        Ok(())
    }
}
