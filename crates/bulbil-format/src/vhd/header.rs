//! The dynamic disk header: where the block allocation table is, and who the parent is.
//!
//! ```text
//! offset  bytes  field                                offset  bytes  field
//!      0      8  "cxsparse"                               40     16  parent's identifier
//!      8      8  unused, ff..                             56      4  parent's time of change
//!     16      8  block allocation table                   60      4  0
//!     24      4  version: 0x00010000                      64    512  parent's name, UTF-16
//!     28      4  entries of the table                    576    192  8 parent locators of 24 bytes
//!     32      4  block size                              768    256  0
//!     36      4  checksum
//! ```
//!
//! All integers, and the name's characters, are big-endian. Parent locators hold paths on somebody's machine; nothing
//! here looks at them. Microsoft Virtual Hard Disk Image Format Specification, version 1.0, "Dynamic Disk Header
//! Format".

use std::ops::{Range, RangeInclusive};

use super::footer::{Footer, checksum};
use crate::bytes::{be_u16, be_u32, be_u64, bytes_at};
use crate::disk::SECTOR_BYTES;
use crate::error::need;
use crate::{FormatError, ReadAt};

pub(super) const HEADER_BYTES: u64 = 1024;
pub(super) const COOKIE: &[u8; 8] = b"cxsparse";
pub(super) const CHECKSUM_AT: usize = 36;
const MAJOR_VERSION: u32 = 1;
/// Every program writes 512 KiB or 2 MiB.
const BLOCK_BYTES: RangeInclusive<u32> = 512..=256 << 20;
/// What sector numbers of 32 bits reach, less some for tables: the limit of Windows and of QEMU.
pub(super) const MAX_SIZE_BYTES: u64 = 2040 << 30;
/// What blocks of 256 KiB need for the largest disk: 32 MiB of table, which stay in memory.
const MAX_BLOCKS: u64 = 1 << 23;
const ENTRY_BYTES: u64 = 4;

/// A dynamic disk header whose table lies in the file and is large enough for the disk.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// The whole table, which may have more entries than the disk needs.
    pub(super) table: Range<u64>,
    /// How many blocks the disk has.
    pub(super) blocks: u64,
    pub(super) block_bytes: u64,
    pub(super) parent_identifier: [u8; 16],
    pub(super) parent_name: String,
}

impl Header {
    pub(super) fn read(file: &dyn ReadAt, footer: &Footer) -> Result<Self, FormatError> {
        let offset = footer.header_offset;
        need(file.len_bytes(), offset.saturating_add(HEADER_BYTES), "the dynamic header")?;
        let mut bytes = [0; 1024];
        file.read_exact_at(&mut bytes, offset).map_err(FormatError::read(offset))?;
        Self::parse(&bytes, footer.size_bytes, file.len_bytes())
    }

    fn parse(bytes: &[u8], size_bytes: u64, len_bytes: u64) -> Result<Self, FormatError> {
        if !bytes.starts_with(COOKIE) {
            return Err(FormatError::corrupt("no dynamic header where the footer says"));
        }
        if be_u32(bytes, CHECKSUM_AT) != checksum(bytes, CHECKSUM_AT) {
            return Err(FormatError::checksum("the dynamic header"));
        }
        let version = be_u32(bytes, 24);
        if version >> 16 != MAJOR_VERSION {
            let name = format!("VHD with a dynamic header of version {}.{}", version >> 16, version & 0xffff);
            return Err(FormatError::UnsupportedFormat { name });
        }
        let block_bytes = be_u32(bytes, 32);
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            let what = format!("block size of {block_bytes} bytes is not a power of two of 512 B to 256 MiB");
            return Err(FormatError::corrupt(what));
        }
        let block_bytes = u64::from(block_bytes);
        let entries = u64::from(be_u32(bytes, 28));
        Ok(Self {
            blocks: count_blocks(size_bytes, block_bytes, entries)?,
            table: table_range(be_u64(bytes, 16), entries, len_bytes)?,
            block_bytes,
            parent_identifier: bytes_at(bytes, 40),
            parent_name: utf16_name(bytes.get(64..576).unwrap_or_default()),
        })
    }

    /// The length of the map of sectors before each block: a bit each, in whole sectors.
    pub(super) fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.block_bytes)
    }
}

/// Returns the length of the map of sectors before a block of a given length.
pub(super) fn bitmap_bytes(block_bytes: u64) -> u64 {
    (block_bytes / SECTOR_BYTES).div_ceil(8).next_multiple_of(SECTOR_BYTES)
}

fn count_blocks(size_bytes: u64, block_bytes: u64, entries: u64) -> Result<u64, FormatError> {
    if size_bytes > MAX_SIZE_BYTES {
        return Err(FormatError::VirtualSize { size_bytes, reason: "is more than a dynamic VHD can have, 2040 GiB" });
    }
    let blocks = size_bytes.div_ceil(block_bytes);
    if entries < blocks {
        return Err(FormatError::corrupt(format!("block allocation table too small: {entries} of {blocks} entries")));
    }
    if blocks > MAX_BLOCKS {
        return Err(FormatError::TooLarge { what: format!("a disk of {blocks} blocks"), limit: MAX_BLOCKS });
    }
    Ok(blocks)
}

fn table_range(offset: u64, entries: u64, len_bytes: u64) -> Result<Range<u64>, FormatError> {
    if !offset.is_multiple_of(SECTOR_BYTES) {
        return Err(FormatError::corrupt(format!("block allocation table at {offset:#x} is not at a sector")));
    }
    let table_bytes = entries * ENTRY_BYTES;
    if table_bytes > len_bytes {
        return Err(FormatError::corrupt(format!("block allocation table too large: {entries} entries")));
    }
    let end = offset.saturating_add(table_bytes);
    need(len_bytes, end, "the block allocation table")?;
    Ok(offset..end)
}

/// Reads a name that ends at the first zero.
fn utf16_name(bytes: &[u8]) -> String {
    let units = (0..bytes.len()).step_by(2).map(|at| be_u16(bytes, at)).take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}
