//! A disk below another one.

use std::fmt;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use crate::bytes::{to_u64, to_usize};
use crate::{DiskContent, Extent, ExtentKind, FormatError};

/// A disk that is asked about ranges of its extents in rising order, and that goes on with zeros past its end.
///
/// The extents of two disks end at different places. Without the memory of the last one, a long extent would be
/// followed to its end once for each short one of the other disk.
pub(crate) struct Layer<P> {
    content: P,
    last: Mutex<Option<Extent>>,
}

impl<P: fmt::Debug> fmt::Debug for Layer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.content.fmt(f)
    }
}

impl<'a, P: Deref<Target = dyn DiskContent + 'a>> Layer<P> {
    pub(crate) fn new(content: P) -> Self {
        Self { content, last: Mutex::new(None) }
    }

    pub(crate) fn content(&self) -> &P {
        &self.content
    }

    /// Returns the kind of what is at `offset`, and how far it goes.
    pub(crate) fn kind_at(&self, offset: u64) -> Result<(u64, ExtentKind), FormatError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let extent = match *last {
            Some(extent) if (extent.offset_bytes..extent.end_bytes()).contains(&offset) => Some(extent),
            _ => self.content.next_extent(offset)?,
        };
        *last = extent;
        Ok(extent.map_or((u64::MAX, ExtentKind::Zero), |extent| (extent.end_bytes() - offset, extent.kind)))
    }

    /// Fills `buf` with what is at `offset`.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
        let there = self.content.size_bytes().saturating_sub(offset).min(to_u64(buf.len()));
        let (stored, past_end) = buf.split_at_mut(to_usize(there));
        past_end.fill(0);
        if stored.is_empty() { Ok(()) } else { self.content.read_exact_at(stored, offset) }
    }
}
