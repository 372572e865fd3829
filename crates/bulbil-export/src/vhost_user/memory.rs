//! The guest's memory, and copies between it and buffers.
//!
//! Everything goes through copies by vm-memory: the guest may change its memory at any moment, so no reference into it
//! is ever made. What a decision rests on is copied first and then looked at.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::wire::Region;

/// The memory of the guest as this process maps it.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Memory that cannot be mapped or was not told about.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("a memory region ends behind its file")]
    ShortFile,
    #[error("cannot map a memory region")]
    Map(#[source] io::Error),
    #[error("memory regions overlap or wrap")]
    Overlap,
}

/// Maps a file shared, after a check that it is long enough: a mapping behind the end would end this process when it is
/// touched. (A file that shrinks later does so too; the frontend, whose file it is, can do that to its own machine.)
pub(super) fn map(file: OwnedFd, offset: u64, len_bytes: u64) -> Result<MmapRegion<()>, MemoryError> {
    let file = File::from(file);
    let file_bytes = file.metadata().map_err(MemoryError::Map)?.len();
    if offset.checked_add(len_bytes).is_none_or(|end| end > file_bytes) {
        return Err(MemoryError::ShortFile);
    }
    let len = usize::try_from(len_bytes).map_err(|_| MemoryError::ShortFile)?;
    MmapRegion::from_file(FileOffset::new(file, offset), len)
        .map_err(|error| MemoryError::Map(io::Error::other(error.to_string())))
}

/// Maps a memory table.
pub(super) fn map_table(table: &[Region], files: Vec<OwnedFd>) -> Result<Memory, MemoryError> {
    let mut regions = Vec::with_capacity(table.len());
    for (region, file) in table.iter().zip(files) {
        let mapped = map(file, region.file_offset, region.len_bytes)?;
        let region = GuestRegionMmap::new(mapped, GuestAddress(region.guest_address)).ok_or(MemoryError::Overlap)?;
        regions.push(region);
    }
    // Sorted, because the table need not be.
    regions.sort_by_key(GuestMemoryRegion::start_addr);
    Memory::from_regions(regions).map_err(|_| MemoryError::Overlap)
}

/// Where the guest sees an address of the frontend.
pub(super) fn to_guest_address(table: &[Region], user_address: u64) -> Option<u64> {
    table.iter().find_map(|region| {
        let offset = user_address.checked_sub(region.user_address)?;
        (offset < region.len_bytes).then_some(region.guest_address + offset)
    })
}

/// A piece of the guest's memory, as a descriptor names it: nothing about it has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) len_bytes: u32,
}

/// The address is not memory of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadAddress;

/// Segments as one stream of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind.
    done: u32,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(segments: &'a [Segment]) -> Self {
        Self { segments, done: 0 }
    }

    /// Copies out of the guest's memory until `buf` is full.
    pub(super) fn read(&mut self, memory: &Memory, buf: &mut [u8]) -> Result<(), BadAddress> {
        let mut filled = 0;
        while filled < buf.len() {
            let (address, len) = self.next_piece(buf.len() - filled).ok_or(BadAddress)?;
            memory.read_slice(&mut buf[filled..filled + len], address).map_err(|_| BadAddress)?;
            filled += len;
        }
        Ok(())
    }

    /// Copies all of `buf` into the guest's memory.
    pub(super) fn write(&mut self, memory: &Memory, buf: &[u8]) -> Result<(), BadAddress> {
        let mut written = 0;
        while written < buf.len() {
            let (address, len) = self.next_piece(buf.len() - written).ok_or(BadAddress)?;
            memory.write_slice(&buf[written..written + len], address).map_err(|_| BadAddress)?;
            written += len;
        }
        Ok(())
    }

    /// Goes past at most `limit` bytes of one segment.
    fn next_piece(&mut self, limit: usize) -> Option<(GuestAddress, usize)> {
        loop {
            let (first, rest) = self.segments.split_first()?;
            let left = first.len_bytes - self.done;
            if left == 0 {
                (self.segments, self.done) = (rest, 0);
                continue;
            }
            let len = left.min(u32::try_from(limit).unwrap_or(u32::MAX));
            let address = GuestAddress(first.address.0.checked_add(u64::from(self.done))?);
            self.done += len;
            return Some((address, len as usize));
        }
    }
}
