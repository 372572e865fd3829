//! The header of a VDI, version 1.1.
//!
//! ```text
//! offset  bytes  field                               offset  bytes  field
//!      0     64  text: who made it                      364      4  unused
//!     64      4  signature: 0xbeda107f                  368      8  size of the disk
//!     68      4  version: 0x00010001                    376      4  block size: 1 MiB
//!     72      4  length of the header, from here        380      4  further bytes of each block: 0
//!     76      4  type: 1 dynamic, 2 static              384      4  blocks in the disk
//!     80      4  flags                                  388      4  blocks stored
//!     84    256  comment                                392     16  identifier
//!    340      4  block map                              408     16  identifier of the last change
//!    344      4  blocks                                 424     16  identifier of the parent
//!    348     16  geometry; the last is the sector size  440     16  parent's identifier of the last change
//! ```
//!
//! All integers are little-endian. Written from the facts of VirtualBox's `VDICore.h` and QEMU's `block/vdi.c`.

use std::ops::Range;

use crate::bytes::{bytes_at, is_zero, le_u16, le_u32, le_u64};
use crate::disk::{SECTOR_BYTES, check_size};
use crate::error::need;
use crate::{FormatError, ReadAt};

pub(super) const HEADER_BYTES: u64 = 512;
/// The end of the last field of version 1.1, counted from [`LENGTH_AT`].
const MIN_LENGTH: u32 = 384;
pub(super) const LENGTH_AT: u64 = 72;
pub(super) const BLOCK_BYTES: u64 = 1 << 20;
pub(super) const ENTRY_BYTES: u64 = 4;
/// 64 MiB of block map, which stay in memory: disks up to 16 TiB.
pub(super) const MAX_BLOCKS: u64 = 1 << 24;

/// The kinds of VDI that hold a whole disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Dynamic,
    Static,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Static => "static",
        }
    }
}

/// A header whose every field is within its bounds and whose block map lies in the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) size_bytes: u64,
    pub(super) stored_blocks: u32,
    /// The part of the block map that the disk needs.
    pub(super) map: Range<u64>,
    pub(super) data_offset: u64,
    pub(super) identifier: [u8; 16],
    pub(super) creator: Option<String>,
}

impl Header {
    /// Reads and checks the header of a file.
    pub(super) fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        need(file.len_bytes(), HEADER_BYTES, "the header")?;
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, 0).map_err(FormatError::read(0))?;
        Self::parse(&bytes, file.len_bytes())
    }

    fn parse(bytes: &[u8], len_bytes: u64) -> Result<Self, FormatError> {
        let (major, minor) = (le_u16(bytes, 70), le_u16(bytes, 68));
        if (major, minor) != (1, 1) {
            return Err(unsupported(format!("VDI version {major}.{minor}")));
        }
        let kind = parse_kind(bytes)?;
        let length = le_u32(bytes, 72);
        if length < MIN_LENGTH {
            return Err(FormatError::corrupt(format!("header length of {length} bytes is below {MIN_LENGTH}")));
        }
        check_units(bytes)?;
        let size_bytes = le_u64(bytes, 368);
        check_size(size_bytes)?;
        let blocks = count_blocks(size_bytes, le_u32(bytes, 384))?;
        let stored_blocks = le_u32(bytes, 388);
        let header_end = LENGTH_AT + u64::from(length);
        let map = map_range(le_u32(bytes, 340), blocks, header_end, len_bytes)?;
        let data_offset = u64::from(le_u32(bytes, 344));
        if data_offset < map.end || !data_offset.is_multiple_of(SECTOR_BYTES) {
            return Err(FormatError::corrupt(format!(
                "blocks at {data_offset:#x} overlap the map or are not at a sector"
            )));
        }
        let creator = creator(bytes.get(..64).unwrap_or_default());
        Ok(Self { kind, size_bytes, stored_blocks, map, data_offset, identifier: bytes_at(bytes, 392), creator })
    }
}

fn unsupported(name: impl Into<String>) -> FormatError {
    FormatError::UnsupportedFormat { name: name.into() }
}

fn parse_kind(bytes: &[u8]) -> Result<Kind, FormatError> {
    let kind = match le_u32(bytes, 76) {
        1 => Kind::Dynamic,
        2 => Kind::Static,
        3 => return Err(unsupported("VDI that is an undo image")),
        4 => return Err(unsupported("VDI that is a differencing image; copy the disk as a whole with VirtualBox")),
        code => return Err(unsupported(format!("VDI of type {code}"))),
    };
    if is_zero(&bytes_at::<32>(bytes, 424)) {
        return Ok(kind);
    }
    Err(unsupported("VDI with a parent; copy the disk as a whole with VirtualBox"))
}

/// Checks the sizes that no program ever wrote in another way.
fn check_units(bytes: &[u8]) -> Result<(), FormatError> {
    let (sector, block, extra) = (le_u32(bytes, 360), le_u32(bytes, 376), le_u32(bytes, 380));
    if u64::from(sector) != SECTOR_BYTES {
        return Err(unsupported(format!("VDI with sectors of {sector} bytes")));
    }
    if u64::from(block) != BLOCK_BYTES {
        return Err(unsupported(format!("VDI with blocks of {block} bytes")));
    }
    if extra != 0 {
        return Err(unsupported(format!("VDI with {extra} further bytes in each block")));
    }
    Ok(())
}

fn count_blocks(size_bytes: u64, entries: u32) -> Result<u64, FormatError> {
    let blocks = size_bytes.div_ceil(BLOCK_BYTES);
    if u64::from(entries) < blocks {
        return Err(FormatError::corrupt(format!("block map too small: {entries} of {blocks} entries")));
    }
    if blocks > MAX_BLOCKS {
        return Err(FormatError::TooLarge { what: format!("a disk of {blocks} blocks"), limit: MAX_BLOCKS });
    }
    Ok(blocks)
}

fn map_range(offset: u32, blocks: u64, header_end: u64, len_bytes: u64) -> Result<Range<u64>, FormatError> {
    let offset = u64::from(offset);
    if offset < header_end || !offset.is_multiple_of(SECTOR_BYTES) {
        return Err(FormatError::corrupt(format!(
            "block map at {offset:#x} overlaps the header or is not at a sector"
        )));
    }
    let end = offset + blocks * ENTRY_BYTES;
    need(len_bytes, end, "the block map")?;
    Ok(offset..end)
}

/// Returns the text without the marks and the line break around it.
fn creator(text: &[u8]) -> Option<String> {
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let printable = text.iter().filter(|byte| byte.is_ascii_graphic() || **byte == b' ');
    let text: String = printable.map(|byte| char::from(*byte)).collect();
    let text = text.trim_matches(|c| matches!(c, '<' | '>' | ' '));
    (!text.is_empty()).then(|| text.to_owned())
}
