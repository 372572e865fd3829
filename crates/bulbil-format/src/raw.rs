//! Raw images: the file is the disk.

use std::fmt;
use std::sync::Arc;

use crate::bytes::{to_u64, to_usize};
use crate::disk::{SECTOR_BYTES, check_range, check_size};
use crate::{Disk, DiskInfo, Extent, ExtentKind, Format, FormatError, ReadAt};

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

impl Disk for RawDisk {
    fn format(&self) -> Format {
        Format::Raw
    }

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

    fn info(&self) -> DiskInfo {
        DiskInfo {
            format: Format::Raw,
            size_bytes: self.size_bytes,
            file_bytes: self.file.len_bytes(),
            data_bytes: None,
            qcow2: None,
        }
    }
}
