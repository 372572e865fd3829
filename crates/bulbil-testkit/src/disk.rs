//! A disk in memory, to import.

use std::ops::Range;

use bulbil_store::{DiskSource, ImportObserver, SourceError};

/// A disk whose whole content is one vector.
#[derive(Debug, Clone)]
pub struct MemoryDisk(pub Vec<u8>);

impl DiskSource for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let end = self.0.len() as u64;
        Ok((offset < end).then_some(offset..end))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let start = offset as usize;
        buf.copy_from_slice(&self.0[start..start + buf.len()]);
        Ok(())
    }
}

/// Listens to nothing.
impl ImportObserver for MemoryDisk {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64, _stored_bytes: u64) {}
}
