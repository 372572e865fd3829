//! A disk beside the one below it: where either has content, there may be a difference.

use crate::layer::Layer;
use crate::{DiskContent, Extent, FormatError};

/// The content of one disk, with the extents of two.
#[derive(Debug)]
pub(super) struct Changed<'a> {
    disk: Layer<&'a dyn DiskContent>,
    below: Layer<&'a dyn DiskContent>,
}

impl<'a> Changed<'a> {
    pub(super) fn new(disk: &'a dyn DiskContent, below: &'a dyn DiskContent) -> Self {
        Self { disk: Layer::new(disk), below: Layer::new(below) }
    }
}

impl DiskContent for Changed<'_> {
    fn size_bytes(&self) -> u64 {
        self.disk.content().size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        self.disk.content().read_exact_at(buf, offset_bytes)
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let rest_of_disk = self.size_bytes().saturating_sub(offset_bytes);
        if rest_of_disk == 0 {
            return Ok(None);
        }
        let (len_bytes, kind) = self.disk.kind_at(offset_bytes)?;
        let (len_below, kind_below) = self.below.kind_at(offset_bytes)?;
        let kind = if kind.has_content() { kind } else { kind_below };
        let len_bytes = len_bytes.min(len_below).min(rest_of_disk);
        Ok(Some(Extent { offset_bytes, len_bytes, kind }))
    }
}
