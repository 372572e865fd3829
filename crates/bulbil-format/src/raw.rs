//! Raw images: the file is the disk.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::bytes::{is_zero, to_u64, to_usize};
use crate::convert::Writer;
use crate::disk::{SECTOR_BYTES, check_range, check_size};
use crate::{ConvertError, Disk, DiskContent, DiskInfo, Extent, ExtentKind, Format, FormatError, ReadAt, WriteAt};

/// A raw image; holes of the file are zero extents.
pub(crate) struct RawDisk {
    file: Arc<dyn ReadAt>,
    size_bytes: u64,
}

impl RawDisk {
    /// Takes a file as a disk. With `pad`, a length that is no multiple of 512 is rounded up with zeros; otherwise it
    /// is refused.
    pub(crate) fn open(file: Arc<dyn ReadAt>, pad: bool) -> Result<Self, FormatError> {
        let len_bytes = file.len_bytes();
        let size_bytes = if pad { len_bytes.checked_next_multiple_of(SECTOR_BYTES) } else { Some(len_bytes) };
        let size_bytes = size_bytes.unwrap_or(len_bytes);
        check_size(size_bytes)?;
        Ok(Self { file, size_bytes })
    }
}

impl fmt::Debug for RawDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawDisk").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

impl DiskContent for RawDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        check_range(buf.len(), offset_bytes, self.size_bytes)?;
        let in_file = self.file.len_bytes().saturating_sub(offset_bytes).min(to_u64(buf.len()));
        let (stored, padding) = buf.split_at_mut(to_usize(in_file));
        padding.fill(0);
        self.file.read_exact_at(stored, offset_bytes).map_err(FormatError::read(offset_bytes))
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        if offset_bytes >= self.size_bytes {
            return Ok(None);
        }
        let next = self.file.next_data(offset_bytes);
        let next = next.map_err(|source| FormatError::Io { operation: "map", offset_bytes, source })?;
        let (kind, end_bytes) = match next {
            None => (ExtentKind::Zero, self.size_bytes),
            Some((start, _)) if start > offset_bytes => (ExtentKind::Zero, start),
            Some((_, end)) if end == self.file.len_bytes() => (ExtentKind::Data, self.size_bytes),
            Some((_, end)) => (ExtentKind::Data, end),
        };
        Ok(Some(Extent { offset_bytes, len_bytes: end_bytes.saturating_sub(offset_bytes), kind }))
    }
}

impl Disk for RawDisk {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn info(&self) -> DiskInfo {
        DiskInfo::new(Format::Raw, self.size_bytes, self.file.len_bytes())
    }
}

/// Writes a raw image: every block that is not zero, at its place.
#[derive(Debug)]
pub(crate) struct RawWriter {
    size_bytes: u64,
}

/// Zeros are left out in this unit, that of file systems.
pub(crate) const HOLE_BYTES: usize = 4096;

impl RawWriter {
    pub(crate) fn new(size_bytes: u64) -> Self {
        Self { size_bytes }
    }
}

/// Returns the ranges of `piece` that are not zeros, in units of `unit_bytes`, neighbours joined.
pub(crate) fn content_ranges(piece: &[u8], unit_bytes: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for unit in piece.chunks(unit_bytes) {
        let end = at + unit.len();
        if !is_zero(unit) {
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => ranges.push(at..end),
            }
        }
        at = end;
    }
    ranges
}

impl Writer for RawWriter {
    type Worker = ();
    type Prepared = Vec<Range<usize>>;
    type State = ();

    fn piece_bytes(&self) -> u64 {
        2 << 20
    }

    fn worker(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn begin(&self, file: &dyn WriteAt) -> Result<(), ConvertError> {
        file.set_len(self.size_bytes).map_err(ConvertError::write(self.size_bytes))
    }

    fn prepare(&self, (): &mut (), _offset: u64, piece: &[u8]) -> Result<Self::Prepared, ConvertError> {
        Ok(content_ranges(piece, HOLE_BYTES))
    }

    fn place(&self, (): &mut (), _offset: u64, _prepared: &mut Self::Prepared) -> Result<(), ConvertError> {
        Ok(())
    }

    fn write(
        &self,
        file: &dyn WriteAt,
        offset: u64,
        piece: &[u8],
        ranges: &Self::Prepared,
    ) -> Result<(), ConvertError> {
        for range in ranges {
            let at = offset + to_u64(range.start);
            let bytes = piece.get(range.clone()).unwrap_or_default();
            file.write_all_at(bytes, at).map_err(ConvertError::write(at))?;
        }
        Ok(())
    }

    fn finish(&self, _file: &dyn WriteAt, (): ()) -> Result<(), ConvertError> {
        Ok(())
    }
}
