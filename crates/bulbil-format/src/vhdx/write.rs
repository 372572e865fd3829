//! Writes a dynamic VHDX.
//!
//! ```text
//! 0          file identifier, headers with the sequence numbers 1 and 2, two region tables
//! 1 MiB      log, empty, 1 MiB
//! 2 MiB      metadata, 1 MiB
//! 3 MiB      BAT, 1 to 9 MiB
//! then       blocks in the order of the disk
//! ```
//!
//! Blocks without content are in the state ZERO. The other choice, NOT_PRESENT, lets a reader return anything, and lets
//! a program that writes a part of such a block leave anything in the rest (MS-VHDX 2.5.1.1).

use std::ops::Range;

use super::bat::{ENTRY_BYTES, FULLY_PRESENT, ZERO, chunk_ratio, entry_index};
use super::guid::Guid;
use super::{CHECKSUM, MIB, checksum, header, metadata};
use crate::bytes::{to_u64, to_usize};
use crate::convert::Writer;
use crate::raw::content_ranges;
use crate::{ConvertError, Identity, WriteAt};

const CREATOR: &str = "Bulbil";
const LOGICAL_SECTOR_BYTES: u32 = 512;
const PHYSICAL_SECTOR_BYTES: u32 = 4096;
/// Small blocks waste little where content is thin.
const MIN_BLOCK_BYTES: u64 = 2 << 20;
/// Keeps the BAT below 9 MiB: blocks are larger where there would be more of them, up to 64 MiB on a disk of 64 TiB.
const MAX_BLOCKS: u64 = 1 << 20;
/// No more than a block; so several pieces share a large one, and buffers stay small.
const PIECE_BYTES: u64 = MIN_BLOCK_BYTES;
/// Zeros within blocks become holes of the file in this unit, that of file systems.
const HOLE_BYTES: usize = 4096;

const LOG: Range<u64> = MIB..2 * MIB;
const METADATA: Range<u64> = 2 * MIB..3 * MIB;
const BAT_OFFSET: u64 = 3 * MIB;
/// Where items begin, in the metadata region.
const ITEMS_OFFSET: u32 = 64 << 10;

/// Writes a dynamic VHDX.
#[derive(Debug)]
pub(crate) struct VhdxWriter {
    size_bytes: u64,
    block_bytes: u64,
    identity: Identity,
}

/// What is known of the file so far.
#[derive(Debug)]
pub(crate) struct State {
    bat: Vec<u64>,
    /// The MiB after the last block.
    end_mib: u64,
    /// The block placed last, with its offset in the file.
    last: Option<(u64, u64)>,
}

/// Where the content of a piece goes.
#[derive(Debug)]
pub(crate) struct Placed {
    /// Parts of the piece that are not zeros.
    ranges: Vec<Range<usize>>,
    host_offset: u64,
}

impl VhdxWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Self {
        let mut block_bytes = MIN_BLOCK_BYTES;
        while size_bytes.div_ceil(block_bytes) > MAX_BLOCKS {
            block_bytes *= 2;
        }
        Self { size_bytes, block_bytes, identity: *identity }
    }

    fn chunk_ratio(&self) -> u64 {
        chunk_ratio(self.block_bytes, LOGICAL_SECTOR_BYTES.into())
    }

    fn bat_entries(&self) -> u64 {
        entry_index(self.size_bytes.div_ceil(self.block_bytes).saturating_sub(1), self.chunk_ratio()) + 1
    }

    fn bat(&self) -> Range<u64> {
        BAT_OFFSET..BAT_OFFSET + (self.bat_entries() * ENTRY_BYTES).next_multiple_of(MIB)
    }

    fn guid(&self, number: u8) -> Guid {
        Guid::from_bytes(self.identity.derive(number))
    }

    fn identifier(&self) -> Vec<u8> {
        let creator = CREATOR.encode_utf16().flat_map(u16::to_le_bytes);
        b"vhdxfile".iter().copied().chain(creator).collect()
    }

    fn header(&self, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; header::HEADER_BYTES];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 8, &sequence.to_le_bytes());
        put(&mut bytes, 16, self.guid(1).as_bytes());
        put(&mut bytes, 32, self.guid(2).as_bytes());
        put(&mut bytes, 66, &1_u16.to_le_bytes());
        put(&mut bytes, 68, &length(&LOG).to_le_bytes());
        put(&mut bytes, 72, &LOG.start.to_le_bytes());
        with_checksum(bytes)
    }

    fn region_table(&self) -> Vec<u8> {
        let mut bytes = vec![0; header::REGION_TABLE_BYTES];
        let regions = [(header::BAT_REGION, self.bat()), (header::METADATA_REGION, METADATA)];
        put(&mut bytes, 0, b"regi");
        put(&mut bytes, 8, &2_u32.to_le_bytes());
        for (index, (kind, range)) in regions.iter().enumerate() {
            let at = 16 + index * header::REGION_ENTRY_BYTES;
            put(&mut bytes, at, kind.as_bytes());
            put(&mut bytes, at + 16, &range.start.to_le_bytes());
            put(&mut bytes, at + 24, &length(range).to_le_bytes());
            put(&mut bytes, at + 28, &header::REQUIRED_REGION.to_le_bytes());
        }
        with_checksum(bytes)
    }

    /// Returns the metadata table and the items behind it.
    fn metadata(&self) -> Vec<u8> {
        let of_disk = metadata::REQUIRED_ITEM | metadata::DISK_ITEM;
        // The flags are zeros: blocks need not stay allocated, and there is no parent.
        let parameters = self.block_bytes.to_le_bytes();
        let (size, disk_id) = (self.size_bytes.to_le_bytes(), self.guid(3));
        let (logical, physical) = (LOGICAL_SECTOR_BYTES.to_le_bytes(), PHYSICAL_SECTOR_BYTES.to_le_bytes());
        let items: [(Guid, u32, &[u8]); 5] = [
            (metadata::FILE_PARAMETERS, metadata::REQUIRED_ITEM, &parameters),
            (metadata::DISK_SIZE, of_disk, &size),
            (metadata::DISK_ID, of_disk, disk_id.as_bytes()),
            (metadata::LOGICAL_SECTOR, of_disk, &logical),
            (metadata::PHYSICAL_SECTOR, of_disk, &physical),
        ];
        let mut bytes = vec![0; to_usize(ITEMS_OFFSET.into())];
        put(&mut bytes, 0, b"metadata");
        put(&mut bytes, 10, &5_u16.to_le_bytes());
        for (index, (kind, flags, value)) in items.iter().enumerate() {
            let at = 32 + index * metadata::TABLE_ENTRY_BYTES;
            let offset = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
            put(&mut bytes, at, kind.as_bytes());
            put(&mut bytes, at + 16, &offset.to_le_bytes());
            put(&mut bytes, at + 20, &len.to_le_bytes());
            put(&mut bytes, at + 24, &flags.to_le_bytes());
            bytes.extend_from_slice(value);
        }
        bytes
    }

    /// Gives a block its place in the file.
    fn allocate(&self, state: &mut State, block: u64) -> u64 {
        let host_offset = state.end_mib * MIB;
        state.end_mib += self.block_bytes / MIB;
        state.last = Some((block, host_offset));
        if let Some(entry) = state.bat.get_mut(to_usize(entry_index(block, self.chunk_ratio()))) {
            *entry = host_offset | FULLY_PRESENT;
        }
        host_offset
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

fn with_checksum(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = checksum(&bytes);
    put(&mut bytes, CHECKSUM.start, &checksum.to_le_bytes());
    bytes
}

/// The length of a region, at most 9 MiB.
fn length(range: &Range<u64>) -> u32 {
    u32::try_from(range.end - range.start).unwrap_or(u32::MAX)
}

impl Writer for VhdxWriter {
    type Worker = ();
    type Prepared = Placed;
    type State = State;

    fn piece_bytes(&self) -> u64 {
        PIECE_BYTES
    }

    fn worker(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<State, ConvertError> {
        // After the entries of each chunk there is one for a sector bitmap, and there are none of those.
        let is_block = |index: u64| index % (self.chunk_ratio() + 1) != self.chunk_ratio();
        let bat = (0..self.bat_entries()).map(|index| if is_block(index) { ZERO } else { 0 }).collect();
        Ok(State { bat, end_mib: self.bat().end / MIB, last: None })
    }

    fn prepare(&self, (): &mut (), _offset: u64, piece: &[u8]) -> Result<Placed, ConvertError> {
        Ok(Placed { ranges: content_ranges(piece, HOLE_BYTES), host_offset: 0 })
    }

    fn place(&self, state: &mut State, offset: u64, placed: &mut Placed) -> Result<(), ConvertError> {
        if placed.ranges.is_empty() {
            return Ok(());
        }
        let block = offset / self.block_bytes;
        let host_offset = match state.last {
            Some((last, host_offset)) if last == block => host_offset,
            _ => self.allocate(state, block),
        };
        placed.host_offset = host_offset + offset % self.block_bytes;
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, piece: &[u8], placed: &Placed) -> Result<(), ConvertError> {
        for range in &placed.ranges {
            let at = placed.host_offset + to_u64(range.start);
            let bytes = piece.get(range.clone()).unwrap_or_default();
            file.write_all_at(bytes, at).map_err(ConvertError::write(at))?;
        }
        Ok(())
    }

    fn finish(&self, file: &dyn WriteAt, state: State) -> Result<(), ConvertError> {
        let write = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).map_err(ConvertError::write(at));
        let len_bytes = state.end_mib * MIB;
        file.set_len(len_bytes).map_err(ConvertError::write(len_bytes))?;
        let bat: Vec<u8> = state.bat.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        write(&bat, BAT_OFFSET)?;
        write(&self.metadata(), METADATA.start)?;
        for offset in header::REGION_TABLE_OFFSETS {
            write(&self.region_table(), offset)?;
        }
        for (offset, sequence) in header::HEADER_OFFSETS.into_iter().zip(1..) {
            write(&self.header(sequence), offset)?;
        }
        write(&self.identifier(), 0)
    }
}
