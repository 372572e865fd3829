//! The block allocation table: where each block of the disk is (MS-VHDX 2.5).
//!
//! ```text
//! entry   bits 0-2 state | 3-19 reserved | 20-63 offset in the file, in MiB
//! order   one entry for each block; after each `chunk ratio` of them, one for a sector bitmap
//! chunk ratio = 2^23 sectors / sectors in a block: 16 for blocks of 256 MiB with sectors of 512 bytes
//! ```
//!
//! Only a disk with a parent has sector bitmaps, but their entries are in the table of every disk. They are not looked
//! at here: `qemu-img` up to version 8.0 leaves anything in them.

use std::ops::Range;

use super::metadata::Metadata;
use super::{MIB, corrupt, read_vec};
use crate::bytes::to_u64;
use crate::claims::ClusterSet;
use crate::error::need;
use crate::mapped::{Run, Source};
use crate::{FormatError, ReadAt};

pub(super) const ENTRY_BYTES: u64 = 8;
/// How much of the table is read at once.
const PIECE_BYTES: u64 = 256 << 10;
/// 96 MiB of memory. Blocks that follow each other in disk and file are one run, so this is reached only by a disk
/// of more than 8 TiB that is cut into the smallest blocks in no order.
const MAX_RUNS: usize = 8 << 20;
/// Sectors that one sector bitmap, a block of 1 MiB, has bits for.
const SECTORS_IN_CHUNK: u64 = 1 << 23;
const RESERVED_MASK: u64 = 0x000f_fff8;

/// What the lowest bits of an entry say.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
pub(super) const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
pub(super) const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

/// Returns how many blocks there are between two entries of sector bitmaps.
pub(super) fn chunk_ratio(block_bytes: u64, sector_bytes: u64) -> u64 {
    SECTORS_IN_CHUNK * sector_bytes / block_bytes
}

/// Returns the index of a block's entry, and so, for the number of blocks less one, that of the last entry.
pub(super) fn entry_index(block: u64, chunk_ratio: u64) -> u64 {
    block + block / chunk_ratio
}

/// Blocks that follow each other on the disk and in the file.
#[derive(Debug, Clone, Copy)]
struct BlockRun {
    first_block: u32,
    blocks: u32,
    host_mib: u32,
}

/// The blocks that are present, in the order of the disk; all others are zeros.
#[derive(Debug)]
pub(super) struct BlockTable {
    runs: Vec<BlockRun>,
    block_bytes: u64,
    /// How much of the disk is in blocks that are present.
    pub(super) data_bytes: u64,
}

impl BlockTable {
    /// Reads the table and adds what it refers to, in MiB of the file, to `used`.
    pub(super) fn read(
        file: &dyn ReadAt,
        region: &Range<u64>,
        metadata: &Metadata,
        used: &mut ClusterSet,
    ) -> Result<Self, FormatError> {
        let chunk_ratio = chunk_ratio(metadata.block_bytes, metadata.sector_bytes);
        let blocks = metadata.size_bytes.div_ceil(metadata.block_bytes);
        let entries = entry_index(blocks - 1, chunk_ratio) + 1;
        let room = (region.end - region.start) / ENTRY_BYTES;
        if entries > room {
            return Err(corrupt(format!("BAT too small: {room} of {entries} entries")));
        }
        let table = Self { runs: Vec::new(), block_bytes: metadata.block_bytes, data_bytes: 0 };
        let mut builder = Builder { table, size_bytes: metadata.size_bytes, len_bytes: file.len_bytes(), used };
        for_each_entry(file, region.start, entries, |index, entry| {
            // Every chunk is its blocks and one sector bitmap.
            let (chunk, in_chunk) = (index / (chunk_ratio + 1), index % (chunk_ratio + 1));
            if in_chunk == chunk_ratio { Ok(()) } else { builder.take(chunk * chunk_ratio + in_chunk, entry) }
        })?;
        Ok(builder.table)
    }

    /// Returns where the bytes from `offset` on are.
    pub(super) fn run_at(&self, offset: u64) -> Run {
        let start_of = |run: &BlockRun| u64::from(run.first_block).saturating_mul(self.block_bytes);
        let len_of = |run: &BlockRun| u64::from(run.blocks).saturating_mul(self.block_bytes);
        let before = self.runs.partition_point(|run| start_of(run).saturating_add(len_of(run)) <= offset);
        let Some(run) = self.runs.get(before) else { return Run { len_bytes: u64::MAX, source: Source::Zero } };
        match offset.checked_sub(start_of(run)) {
            None => Run { len_bytes: start_of(run) - offset, source: Source::Zero },
            Some(skip) => {
                Run { len_bytes: len_of(run) - skip, source: Source::Host(u64::from(run.host_mib) * MIB + skip) }
            }
        }
    }
}

/// Calls `check` with every entry that is not zero. Holes of the file are not read: they cost nothing.
fn for_each_entry(
    file: &dyn ReadAt,
    table: u64,
    entries: u64,
    mut check: impl FnMut(u64, u64) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let end = table + entries * ENTRY_BYTES;
    let mut next = table;
    while next < end {
        let data = file.next_data(next);
        let data = data.map_err(|source| FormatError::Io { operation: "map", offset_bytes: next, source })?;
        let Some((data_start, data_end)) = data.filter(|(start, _)| *start < end) else { break };
        let start = data_start - data_start % ENTRY_BYTES;
        let until = data_end.min(end).min(start + PIECE_BYTES).next_multiple_of(ENTRY_BYTES);
        let bytes = read_vec(file, start, until - start)?;
        for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_le_bytes(*word);
            if entry != 0 {
                check((start - table) / ENTRY_BYTES + to_u64(index), entry)?;
            }
        }
        next = until;
    }
    Ok(())
}

struct Builder<'a> {
    table: BlockTable,
    size_bytes: u64,
    len_bytes: u64,
    used: &'a mut ClusterSet,
}

impl Builder<'_> {
    fn take(&mut self, block: u64, entry: u64) -> Result<(), FormatError> {
        let bad = |what: &str| corrupt(format!("BAT entry {entry:#x} of block {block}: {what}"));
        match entry & 7 {
            NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED => Ok(()),
            FULLY_PRESENT if entry & RESERVED_MASK != 0 => Err(bad("reserved bits are set")),
            FULLY_PRESENT => self.take_present(block, entry >> 20),
            PARTIALLY_PRESENT => Err(bad("partially present without a parent")),
            _ => Err(bad("unknown state")),
        }
    }

    fn take_present(&mut self, block: u64, host_mib: u64) -> Result<(), FormatError> {
        let block_bytes = self.table.block_bytes;
        // The file may end within the last block, after the part of it that is in the disk.
        let in_disk = block_bytes.min(self.size_bytes.saturating_sub(block * block_bytes));
        // 44 bits of MiB are 64 bits of bytes.
        need(self.len_bytes, (host_mib << 20).saturating_add(in_disk), "a block")?;
        for mib in host_mib..host_mib + block_bytes / MIB {
            self.used.claim(mib << 20, MIB.trailing_zeros())?;
        }
        self.table.data_bytes += in_disk;
        self.push(block, host_mib)
    }

    fn push(&mut self, block: u64, host_mib: u64) -> Result<(), FormatError> {
        let narrow = |number: u64| u32::try_from(number).map_err(|_| corrupt(format!("block {block} is too far")));
        let (block, host_mib) = (narrow(block)?, narrow(host_mib)?);
        let mib_in_block = self.table.block_bytes / MIB;
        if let Some(last) = self.table.runs.last_mut() {
            let host_end = u64::from(last.host_mib) + u64::from(last.blocks) * mib_in_block;
            if last.first_block + last.blocks == block && host_end == u64::from(host_mib) {
                last.blocks += 1;
                return Ok(());
            }
        }
        if self.table.runs.len() == MAX_RUNS {
            return Err(FormatError::TooLarge {
                what: "the number of scattered blocks".to_owned(),
                limit: to_u64(MAX_RUNS),
            });
        }
        self.table.runs.push(BlockRun { first_block: block, blocks: 1, host_mib });
        Ok(())
    }
}
