//! A fixed disk: its bytes as they are, then the footer.

use std::fmt;
use std::sync::Arc;

use super::footer::Footer;
use super::map::info_of;
use crate::disk::check_range;
use crate::error::need;
use crate::{Disk, DiskContent, DiskInfo, Extent, ExtentKind, Format, FormatError, ReadAt};

/// A fixed VHD; holes of the file are zero extents.
pub(super) struct FixedDisk {
    file: Arc<dyn ReadAt>,
    footer: Footer,
}

impl FixedDisk {
    /// Takes a file of which the footer was read; `has_copy` if it begins with one as well.
    pub(super) fn open(
        file: Arc<dyn ReadAt>,
        footer: Footer,
        footer_offset: u64,
        has_copy: bool,
    ) -> Result<Self, FormatError> {
        if has_copy {
            // Readers that look at the beginning first would see another disk.
            return Err(FormatError::corrupt("a fixed VHD begins with a footer"));
        }
        let footer_bytes = file.len_bytes().saturating_sub(footer_offset);
        need(file.len_bytes(), footer.size_bytes.saturating_add(footer_bytes), "a fixed disk with its footer")?;
        Ok(Self { file, footer })
    }
}

impl fmt::Debug for FixedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FixedDisk").field("footer", &self.footer).finish_non_exhaustive()
    }
}

impl DiskContent for FixedDisk {
    fn size_bytes(&self) -> u64 {
        self.footer.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        check_range(buf.len(), offset_bytes, self.footer.size_bytes)?;
        self.file.read_exact_at(buf, offset_bytes).map_err(FormatError::read(offset_bytes))
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let size_bytes = self.footer.size_bytes;
        if offset_bytes >= size_bytes {
            return Ok(None);
        }
        let next = self.file.next_data(offset_bytes);
        let next = next.map_err(|source| FormatError::Io { operation: "map", offset_bytes, source })?;
        let (kind, end_bytes) = match next {
            None => (ExtentKind::Zero, size_bytes),
            Some((start, _)) if start > offset_bytes => (ExtentKind::Zero, start.min(size_bytes)),
            Some((_, end)) => (ExtentKind::Data, end.min(size_bytes)),
        };
        Ok(Some(Extent { offset_bytes, len_bytes: end_bytes.saturating_sub(offset_bytes), kind }))
    }
}

impl Disk for FixedDisk {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn info(&self) -> DiskInfo {
        info_of(&self.footer, self.file.len_bytes())
    }
}
