//! VDIs of VirtualBox, version 1.1: dynamic and static disks are read, dynamic ones written.
//!
//! ```text
//! header ─ block map ─ blocks of 1 MiB, in any order
//!          └ number of the block in the file | ffffffff never written | fffffffe reads as zeros
//! ```
//!
//! Every entry is checked at open: it is below the header's count of stored blocks, no two are the same, and the block
//! lies in the file. Entries past the end of the disk are never read and not looked at. VirtualBox's names for the two
//! marks are "free" and "zero": the first would show a parent, of which there is none here.

use std::fmt;
use std::sync::Arc;

use crate::bytes::{to_usize, uuid_text};
use crate::claims::ClusterSet;
use crate::error::need;
use crate::mapped::{BlockMap, CompressedRange, Mapped, Run, Source};
use crate::table::read_u32_table;
use crate::{Disk, DiskInfo, Format, FormatError, OpenOptions, ReadAt};

mod header;
mod write;

use header::{BLOCK_BYTES, Header};
pub(crate) use write::VdiWriter;

const FREE: u32 = u32::MAX;
const ZERO: u32 = u32::MAX - 1;

/// Opens an image.
pub(crate) fn open(file: Arc<dyn ReadAt>, _options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let header = Header::read(&*file)?;
    let mut census = Census::new(&header, file.len_bytes());
    let map = read_u32_table(&*file, header.map.start, header.blocks(), u32::from_le_bytes, |index, entry| {
        if is_absent(entry) { Ok(()) } else { census.take(index, entry) }
    })?;
    let data_bytes = census.data_bytes;
    Ok(Box::new(Mapped::new(file, VdiMap { header, map, data_bytes }, None)))
}

/// What the entries so far refer to.
struct Census<'a> {
    header: &'a Header,
    len_bytes: u64,
    used: ClusterSet,
    /// How much of the disk is stored.
    data_bytes: u64,
}

impl<'a> Census<'a> {
    fn new(header: &'a Header, len_bytes: u64) -> Self {
        let in_file = len_bytes.saturating_sub(header.data_offset).div_ceil(BLOCK_BYTES);
        let used = ClusterSet::new(in_file.min(header.stored_blocks.into()));
        Self { header, len_bytes, used, data_bytes: 0 }
    }

    /// Checks the place of the block that `entry` of the map refers to.
    fn take(&mut self, index: u64, entry: u32) -> Result<(), FormatError> {
        let offset = index * BLOCK_BYTES;
        if entry >= self.header.stored_blocks {
            let what = format!("block {entry} for disk offset {offset:#x} is none of {}", self.header.stored_blocks);
            return Err(FormatError::corrupt(what));
        }
        let host_offset = self.header.host_offset(entry);
        need(self.len_bytes, host_offset + BLOCK_BYTES, "a block")?;
        if !self.used.insert(entry.into()) {
            return Err(FormatError::corrupt(format!("block {host_offset:#x} referenced twice")));
        }
        self.data_bytes += BLOCK_BYTES.min(self.header.size_bytes - offset);
        Ok(())
    }
}

fn is_absent(entry: u32) -> bool {
    matches!(entry, FREE | ZERO)
}

impl Header {
    /// How many blocks the disk has.
    fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }

    /// Where a block of the file begins: below 2^53.
    fn host_offset(&self, number: u32) -> u64 {
        self.data_offset + u64::from(number) * BLOCK_BYTES
    }
}

/// The block map of an image.
struct VdiMap {
    header: Header,
    /// The entries the disk needs.
    map: Box<[u32]>,
    data_bytes: u64,
}

impl fmt::Debug for VdiMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VdiMap").field("header", &self.header).finish_non_exhaustive()
    }
}

impl VdiMap {
    fn source_at(&self, offset: u64) -> Source {
        match self.map.get(to_usize(offset / BLOCK_BYTES)).copied() {
            Some(entry) if !is_absent(entry) => Source::Host(self.header.host_offset(entry) + offset % BLOCK_BYTES),
            _ => Source::Zero,
        }
    }
}

impl BlockMap for VdiMap {
    const FORMAT: Format = Format::Vdi;

    fn info(&self, file_bytes: u64) -> DiskInfo {
        let mut info = DiskInfo::new(Format::Vdi, self.header.size_bytes, file_bytes);
        info.variant = Some(self.header.kind.name().to_owned());
        info.data_bytes = Some(self.data_bytes);
        info.cluster_bytes = Some(BLOCK_BYTES);
        info.identifier = Some(uuid(&self.header.identifier));
        info.creator.clone_from(&self.header.creator);
        info
    }

    fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        BLOCK_BYTES
    }

    fn run_at(&self, _file: &dyn ReadAt, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let source = self.source_at(offset);
        let mut len_bytes = BLOCK_BYTES - offset % BLOCK_BYTES;
        while len_bytes < wanted_bytes
            && offset + len_bytes < self.header.size_bytes
            && source.is_followed_by(len_bytes, self.source_at(offset + len_bytes))
        {
            len_bytes += BLOCK_BYTES;
        }
        Ok(Run { len_bytes, source })
    }

    fn decode(&self, _file: &dyn ReadAt, range: CompressedRange, _block: &mut [u8]) -> Result<(), FormatError> {
        Err(FormatError::corrupt(format!("compressed block at {:#x} in a format without", range.host_offset)))
    }
}

/// Writes an identifier as VirtualBox does: its first three numbers are little-endian.
fn uuid(bytes: &[u8; 16]) -> String {
    uuid_text(&swap_uuid(*bytes))
}

/// Turns an identifier as it is stored into one with its bytes in order, and back.
fn swap_uuid(bytes: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}
