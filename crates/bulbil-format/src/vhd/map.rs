//! The map of a dynamic or differencing disk: the block allocation table, checked once at open.
//!
//! What the check proves: every block that the disk needs lies in the file before the footer, and shares no byte with
//! another block, the copy of the footer, the dynamic header or the table. Entries past the end of the disk are never
//! read and not looked at.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::footer::{FOOTER_BYTES, Footer, Kind};
use super::header::{HEADER_BYTES, Header};
use crate::bytes::{to_u64, to_usize, uuid_text};
use crate::cache::SharedCache;
use crate::disk::SECTOR_BYTES;
use crate::error::need;
use crate::mapped::{BlockMap, CompressedRange, Mapped, Run, Source};
use crate::table::read_u32_table;
use crate::{DiskContent, DiskInfo, Format, FormatError, ReadAt};

const UNALLOCATED: u32 = u32::MAX;
/// Memory for maps of sectors; with blocks of 2 MiB they cover 32 GiB of stored blocks.
const BITMAP_CACHE_BYTES: u64 = 8 << 20;
/// Entries of that cache, so that small blocks do not make it mostly bookkeeping.
const MAX_CACHE_ENTRIES: u64 = 16384;

/// The tables of a dynamic or differencing image.
pub(super) struct VhdMap {
    footer: Footer,
    header: Header,
    /// The entries the disk needs.
    table: Box<[u32]>,
    allocated_blocks: u64,
    /// Maps of sectors by host offset; used for a differencing disk alone.
    bitmaps: SharedCache<Vec<u8>>,
}

impl fmt::Debug for VhdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdMap").field("footer", &self.footer).field("header", &self.header).finish_non_exhaustive()
    }
}

impl VhdMap {
    /// Reads and checks the table of a file.
    pub(super) fn open(
        file: Arc<dyn ReadAt>,
        footer: Footer,
        footer_offset: u64,
        header: Header,
        parent: Option<Arc<dyn DiskContent>>,
    ) -> Result<Mapped<Self>, FormatError> {
        let len_bytes = file.len_bytes();
        let tables = Tables::new(&footer, footer_offset..len_bytes, &header)?;
        let stored_bytes = header.bitmap_bytes() + header.block_bytes;
        let mut starts = Vec::new();
        let table = read_u32_table(&*file, header.table.start, header.blocks, u32::from_be_bytes, |_, entry| {
            if entry == UNALLOCATED {
                return Ok(());
            }
            let block = block_range(entry, stored_bytes);
            need(len_bytes, block.end, "a block")?;
            starts.push(entry);
            tables.check_block(&block)
        })?;
        let allocated_blocks = to_u64(starts.len());
        check_sharing(starts, stored_bytes)?;
        let bitmaps = (BITMAP_CACHE_BYTES / header.bitmap_bytes()).min(MAX_CACHE_ENTRIES);
        let map = Self { footer, header, table, allocated_blocks, bitmaps: SharedCache::new(to_usize(bitmaps)) };
        Ok(Mapped::new(file, map, parent))
    }

    /// Returns where a block begins, with its map of sectors; `None` if it is not stored.
    fn block_offset(&self, index: u64) -> Option<u64> {
        let entry = self.table.get(to_usize(index)).copied().unwrap_or(UNALLOCATED);
        (entry != UNALLOCATED).then(|| u64::from(entry) * SECTOR_BYTES)
    }

    /// What a block that is not stored stands for.
    fn absent(&self) -> Source {
        if self.footer.kind == Kind::Differencing { Source::Parent } else { Source::Zero }
    }

    /// Counts the bytes from `offset` to the next block that is stored, up to a little more than `wanted_bytes`.
    fn absent_bytes(&self, offset: u64, wanted_bytes: u64) -> u64 {
        let last = offset.saturating_add(wanted_bytes) / self.header.block_bytes;
        let mut index = offset / self.header.block_bytes + 1;
        while index < self.header.blocks && index <= last && self.block_offset(index).is_none() {
            index += 1;
        }
        index * self.header.block_bytes - offset
    }

    /// Returns the run of sectors of a stored block that are all here or all the parent's, up to a little more than
    /// `wanted_bytes`.
    fn run_in_differencing(
        &self,
        file: &dyn ReadAt,
        block: u64,
        in_block: u64,
        wanted_bytes: u64,
    ) -> Result<Run, FormatError> {
        let bitmap = self.bitmaps.get_or_load(block, || {
            let mut bitmap = vec![0; to_usize(self.header.bitmap_bytes())];
            file.read_exact_at(&mut bitmap, block).map_err(FormatError::read(block)).map(|()| bitmap)
        })?;
        let wanted_end = in_block.saturating_add(wanted_bytes).div_ceil(SECTOR_BYTES);
        let sectors = (self.header.block_bytes / SECTOR_BYTES).min(wanted_end);
        let first = in_block / SECTOR_BYTES;
        let here = is_set(&bitmap, first);
        let end = (first + 1..sectors).find(|sector| is_set(&bitmap, *sector) != here).unwrap_or(sectors);
        let source = if here { Source::Host(block + self.header.bitmap_bytes() + in_block) } else { Source::Parent };
        Ok(Run { len_bytes: end * SECTOR_BYTES - in_block, source })
    }
}

/// Whether the bit of a sector is set; the first sector has the highest bit of the first byte.
fn is_set(bitmap: &[u8], sector: u64) -> bool {
    bitmap.get(to_usize(sector / 8)).is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
}

/// The parts of the file that no block may share a byte with.
struct Tables([(&'static str, Range<u64>); 4]);

impl Tables {
    fn new(footer: &Footer, footer_at: Range<u64>, header: &Header) -> Result<Self, FormatError> {
        let tables = [
            ("the copy of the footer", 0..FOOTER_BYTES),
            ("the dynamic header", footer.header_offset..footer.header_offset.saturating_add(HEADER_BYTES)),
            ("the block allocation table", header.table.clone()),
            ("the footer", footer_at),
        ];
        for (number, (what, range)) in tables.iter().enumerate() {
            if let Some((other, _)) = tables.iter().take(number).find(|(_, other)| overlap(other, range)) {
                return Err(FormatError::corrupt(format!("{what} overlaps {other}")));
            }
        }
        Ok(Self(tables))
    }

    fn check_block(&self, block: &Range<u64>) -> Result<(), FormatError> {
        match self.0.iter().find(|(_, range)| overlap(block, range)) {
            None => Ok(()),
            Some((what, _)) => Err(FormatError::corrupt(format!("block at {:#x} overlaps {what}", block.start))),
        }
    }
}

/// Checks that no two blocks share a byte; `starts` are their first sectors, in any order.
fn check_sharing(mut starts: Vec<u32>, stored_bytes: u64) -> Result<(), FormatError> {
    starts.sort_unstable();
    let range = |start: u32| block_range(start, stored_bytes);
    match starts.array_windows().find(|[a, b]| range(*a).end > range(*b).start) {
        None => Ok(()),
        Some([a, b]) if a == b => Err(FormatError::corrupt(format!("block {:#x} referenced twice", range(*b).start))),
        Some([_, b]) => Err(FormatError::corrupt(format!("block at {:#x} overlaps another block", range(*b).start))),
    }
}

fn block_range(start: u32, stored_bytes: u64) -> Range<u64> {
    let start = u64::from(start) * SECTOR_BYTES;
    start..start + stored_bytes
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// What a footer says of an image.
pub(super) fn info_of(footer: &Footer, file_bytes: u64) -> DiskInfo {
    let mut info = DiskInfo::new(Format::Vhd, footer.size_bytes, file_bytes);
    info.variant = Some(footer.kind.name().to_owned());
    info.identifier = Some(uuid_text(&footer.identifier));
    info.creator.clone_from(&footer.creator);
    if footer.saved_state {
        info.notes.push("the virtual machine was saved, not shut down".to_owned());
    }
    info
}

impl BlockMap for VhdMap {
    const FORMAT: Format = Format::Vhd;

    fn info(&self, file_bytes: u64) -> DiskInfo {
        let mut info = info_of(&self.footer, file_bytes);
        info.cluster_bytes = Some(self.header.block_bytes);
        if self.footer.kind == Kind::Dynamic {
            let past_end = (self.header.blocks * self.header.block_bytes).saturating_sub(self.footer.size_bytes);
            let last_is_stored = self.block_offset(self.header.blocks - 1).is_some();
            let stored_bytes = self.allocated_blocks * self.header.block_bytes;
            info.data_bytes = Some(stored_bytes - if last_is_stored { past_end } else { 0 });
        }
        info
    }

    fn size_bytes(&self) -> u64 {
        self.footer.size_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.block_bytes
    }

    fn run_at(&self, file: &dyn ReadAt, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let in_block = offset % self.header.block_bytes;
        let Some(block) = self.block_offset(offset / self.header.block_bytes) else {
            return Ok(Run { len_bytes: self.absent_bytes(offset, wanted_bytes), source: self.absent() });
        };
        if self.footer.kind == Kind::Differencing {
            return self.run_in_differencing(file, block, in_block, wanted_bytes);
        }
        let source = Source::Host(block + self.header.bitmap_bytes() + in_block);
        Ok(Run { len_bytes: self.header.block_bytes - in_block, source })
    }

    fn decode(&self, _file: &dyn ReadAt, range: CompressedRange, _block: &mut [u8]) -> Result<(), FormatError> {
        Err(FormatError::corrupt(format!("compressed block at {:#x} in a format without", range.host_offset)))
    }
}
