//! Writes fixed and dynamic VHDs.
//!
//! The size is rounded up to 1 MiB: Azure and Alibaba Cloud take nothing else. A dynamic disk has the place of every
//! block chosen so that its content begins at a multiple of 4 KiB, as Hyper-V does it for disks with such sectors; the
//! map of sectors is the sector before.

use std::ops::Range;

use super::footer::{FOOTER_BYTES, Kind, checksum, encode};
use super::header::{self, HEADER_BYTES, MAX_SIZE_BYTES};
use crate::bytes::{put, to_u64, to_usize};
use crate::convert::Writer;
use crate::disk::SECTOR_BYTES;
use crate::raw::{HOLE_BYTES, RawWriter, content_ranges};
use crate::{ConvertError, Identity, WriteAt};

/// Clouds refuse sizes that are no multiple of it.
const SIZE_UNIT_BYTES: u64 = 1 << 20;
/// The block size that every program expects.
const BLOCK_BYTES: u64 = 2 << 20;
/// What the content of blocks is aligned to.
const ALIGNMENT_BYTES: u64 = 4096;
const HEADER_OFFSET: u64 = FOOTER_BYTES;
const TABLE_OFFSET: u64 = HEADER_OFFSET + HEADER_BYTES;
const UNALLOCATED: u32 = u32::MAX;

/// Returns the size of the VHD for a disk.
fn vhd_size(size_bytes: u64) -> Result<u64, ConvertError> {
    let rounded = size_bytes.checked_next_multiple_of(SIZE_UNIT_BYTES).filter(|rounded| *rounded <= MAX_SIZE_BYTES);
    rounded.ok_or_else(|| ConvertError::unsupported(format!("a VHD has at most 2040 GiB, the disk {size_bytes} bytes")))
}

/// Writes a fixed VHD: a raw image and a footer.
#[derive(Debug)]
pub(crate) struct FixedWriter {
    raw: RawWriter,
    size_bytes: u64,
    footer: [u8; 512],
}

impl FixedWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Result<Self, ConvertError> {
        let size_bytes = vhd_size(size_bytes)?;
        let footer = encode(Kind::Fixed, size_bytes, u64::MAX, identity);
        Ok(Self { raw: RawWriter::new(size_bytes), size_bytes, footer })
    }
}

impl Writer for FixedWriter {
    type Worker = <RawWriter as Writer>::Worker;
    type Prepared = <RawWriter as Writer>::Prepared;
    type State = <RawWriter as Writer>::State;

    fn piece_bytes(&self) -> u64 {
        self.raw.piece_bytes()
    }

    fn worker(&self) -> Result<Self::Worker, ConvertError> {
        self.raw.worker()
    }

    fn begin(&self, file: &dyn WriteAt) -> Result<Self::State, ConvertError> {
        self.raw.begin(file)
    }

    fn prepare(&self, worker: &mut Self::Worker, offset: u64, piece: &[u8]) -> Result<Self::Prepared, ConvertError> {
        self.raw.prepare(worker, offset, piece)
    }

    fn place(&self, state: &mut Self::State, offset: u64, prepared: &mut Self::Prepared) -> Result<(), ConvertError> {
        self.raw.place(state, offset, prepared)
    }

    fn write(
        &self,
        file: &dyn WriteAt,
        offset: u64,
        piece: &[u8],
        prepared: &Self::Prepared,
    ) -> Result<(), ConvertError> {
        self.raw.write(file, offset, piece, prepared)
    }

    fn finish(&self, file: &dyn WriteAt, state: Self::State) -> Result<(), ConvertError> {
        self.raw.finish(file, state)?;
        file.write_all_at(&self.footer, self.size_bytes).map_err(ConvertError::write(self.size_bytes))
    }
}

/// Writes a dynamic VHD: tables, then the blocks that are not zeros in the order of the disk, then the footer.
#[derive(Debug)]
pub(crate) struct DynamicWriter {
    size_bytes: u64,
    footer: [u8; 512],
}

/// What is written of a block, and where.
#[derive(Debug)]
pub(crate) struct Block {
    /// The parts that are not zeros; none if the block is not stored.
    content: Vec<Range<usize>>,
    /// Where its map of sectors is.
    host_offset: u64,
}

/// The table so far.
#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<u32>,
    stored: u64,
}

impl DynamicWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Result<Self, ConvertError> {
        let size_bytes = vhd_size(size_bytes)?;
        let footer = encode(Kind::Dynamic, size_bytes, HEADER_OFFSET, identity);
        Ok(Self { size_bytes, footer })
    }

    fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }

    /// The end of the table, which is filled up to whole sectors.
    fn table_end(&self) -> u64 {
        TABLE_OFFSET + (self.blocks() * 4).next_multiple_of(SECTOR_BYTES)
    }

    /// Returns where the map of sectors of the `number`th stored block is.
    fn block_offset(&self, number: u64) -> u64 {
        let bitmap_bytes = header::bitmap_bytes(BLOCK_BYTES);
        let first_content = (self.table_end() + bitmap_bytes).next_multiple_of(ALIGNMENT_BYTES);
        first_content - bitmap_bytes + number * (BLOCK_BYTES + ALIGNMENT_BYTES)
    }

    /// Returns where the footer is: right behind the last block, which is where writers put the next one.
    fn footer_offset(&self, stored: u64) -> u64 {
        match stored.checked_sub(1) {
            None => self.table_end(),
            Some(last) => self.block_offset(last) + header::bitmap_bytes(BLOCK_BYTES) + BLOCK_BYTES,
        }
    }

    fn encode_header(&self) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        let entries = u32::try_from(self.blocks()).unwrap_or(u32::MAX);
        put(&mut bytes, 0, *header::COOKIE);
        put(&mut bytes, 8, u64::MAX.to_be_bytes());
        put(&mut bytes, 16, TABLE_OFFSET.to_be_bytes());
        put(&mut bytes, 24, 0x0001_0000_u32.to_be_bytes());
        put(&mut bytes, 28, entries.to_be_bytes());
        put(&mut bytes, 32, (2_u32 << 20).to_be_bytes());
        let sum = checksum(&bytes, header::CHECKSUM_AT);
        put(&mut bytes, header::CHECKSUM_AT, sum.to_be_bytes());
        bytes
    }

    fn encode_table(&self, table: &Table) -> Vec<u8> {
        let mut bytes: Vec<u8> = table.entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(to_usize(self.table_end() - TABLE_OFFSET), 0xff);
        bytes
    }
}

impl Writer for DynamicWriter {
    type Worker = ();
    type Prepared = Block;
    type State = Table;

    fn piece_bytes(&self) -> u64 {
        BLOCK_BYTES
    }

    fn worker(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<Table, ConvertError> {
        Ok(Table { entries: vec![UNALLOCATED; to_usize(self.blocks())], stored: 0 })
    }

    fn prepare(&self, (): &mut (), _offset: u64, piece: &[u8]) -> Result<Block, ConvertError> {
        Ok(Block { content: content_ranges(piece, HOLE_BYTES), host_offset: 0 })
    }

    fn place(&self, table: &mut Table, offset: u64, block: &mut Block) -> Result<(), ConvertError> {
        if block.content.is_empty() {
            return Ok(());
        }
        block.host_offset = self.block_offset(table.stored);
        table.stored += 1;
        let sector = u32::try_from(block.host_offset / SECTOR_BYTES).ok().filter(|sector| *sector != UNALLOCATED);
        let sector = sector.ok_or_else(|| ConvertError::unsupported("a VHD file has at most 2 TiB"))?;
        if let Some(entry) = table.entries.get_mut(to_usize(offset / BLOCK_BYTES)) {
            *entry = sector;
        }
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, piece: &[u8], block: &Block) -> Result<(), ConvertError> {
        if block.content.is_empty() {
            return Ok(());
        }
        // All sectors are said to be written: some programs do not read those that are not.
        let bitmap = [0xff; 512];
        file.write_all_at(&bitmap, block.host_offset).map_err(ConvertError::write(block.host_offset))?;
        for range in &block.content {
            let at = block.host_offset + to_u64(bitmap.len()) + to_u64(range.start);
            let bytes = piece.get(range.clone()).unwrap_or_default();
            file.write_all_at(bytes, at).map_err(ConvertError::write(at))?;
        }
        Ok(())
    }

    fn finish(&self, file: &dyn WriteAt, table: Table) -> Result<(), ConvertError> {
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at).map_err(ConvertError::write(at));
        write(&self.footer, 0)?;
        write(&self.encode_header(), HEADER_OFFSET)?;
        write(&self.encode_table(&table), TABLE_OFFSET)?;
        write(&self.footer, self.footer_offset(table.stored))
    }
}
