//! Writes dynamic VDIs.
//!
//! ```text
//! 0 header ─ 512 block map ─ multiple of 1 MiB: the blocks that are not zeros, in the order of the disk
//! ```

use std::ops::Range;

use super::header::{BLOCK_BYTES, ENTRY_BYTES, HEADER_BYTES, MAX_BLOCKS};
use super::{FREE, swap_uuid};
use crate::bytes::{put, to_u64, to_usize};
use crate::convert::Writer;
use crate::raw::{HOLE_BYTES, content_ranges};
use crate::{ConvertError, Identity, WriteAt};

const MAP_OFFSET: u64 = HEADER_BYTES;
/// With the second geometry at its end, as VirtualBox writes it.
const HEADER_LENGTH: u32 = 400;
const SECTOR: u32 = 512;

/// Writes a dynamic VDI.
#[derive(Debug)]
pub(crate) struct VdiWriter {
    size_bytes: u64,
    /// Below 2^32: there are at most 64 MiB of map before.
    data_offset: u32,
    identifier: [u8; 16],
    change_identifier: [u8; 16],
}

/// What is written of a block, and where.
#[derive(Debug)]
pub(crate) struct Block {
    /// The parts that are not zeros; none if the block is not stored.
    content: Vec<Range<usize>>,
    host_offset: u64,
}

/// The block map so far.
#[derive(Debug)]
pub(crate) struct Map {
    entries: Vec<u32>,
    stored: u32,
}

impl VdiWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Result<Self, ConvertError> {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        let data_offset = (MAP_OFFSET + blocks.saturating_mul(ENTRY_BYTES)).next_multiple_of(BLOCK_BYTES);
        let data_offset = u32::try_from(data_offset).ok().filter(|_| blocks <= MAX_BLOCKS).ok_or_else(|| {
            ConvertError::unsupported(format!("a VDI has at most 16 TiB, the disk {size_bytes} bytes"))
        })?;
        Ok(Self {
            size_bytes,
            data_offset,
            identifier: swap_uuid(identity.derive(0)),
            change_identifier: swap_uuid(identity.derive(1)),
        })
    }

    fn host_offset(&self, number: u32) -> u64 {
        u64::from(self.data_offset) + u64::from(number) * BLOCK_BYTES
    }

    fn encode_header(&self, map: &Map) -> [u8; 512] {
        let mut bytes = [0; 512];
        put(&mut bytes, 0, *b"<<< Bulbil Virtual Disk Image >>>\n");
        put(&mut bytes, 64, 0xbeda_107f_u32.to_le_bytes());
        put(&mut bytes, 68, 0x0001_0001_u32.to_le_bytes());
        put(&mut bytes, 72, HEADER_LENGTH.to_le_bytes());
        put(&mut bytes, 76, 1_u32.to_le_bytes());
        put(&mut bytes, 340, SECTOR.to_le_bytes());
        put(&mut bytes, 344, self.data_offset.to_le_bytes());
        put(&mut bytes, 360, SECTOR.to_le_bytes());
        put(&mut bytes, 368, self.size_bytes.to_le_bytes());
        put(&mut bytes, 376, (1_u32 << 20).to_le_bytes());
        put(&mut bytes, 384, u32::try_from(map.entries.len()).unwrap_or(u32::MAX).to_le_bytes());
        put(&mut bytes, 388, map.stored.to_le_bytes());
        put(&mut bytes, 392, self.identifier);
        put(&mut bytes, 408, self.change_identifier);
        // Of the second geometry, which is zeros until VirtualBox has looked at the partition table.
        put(&mut bytes, 468, SECTOR.to_le_bytes());
        bytes
    }
}

impl Writer for VdiWriter {
    type Worker = ();
    type Prepared = Block;
    type State = Map;

    fn piece_bytes(&self) -> u64 {
        BLOCK_BYTES
    }

    fn worker(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<Map, ConvertError> {
        Ok(Map { entries: vec![FREE; to_usize(self.size_bytes.div_ceil(BLOCK_BYTES))], stored: 0 })
    }

    fn prepare(&self, (): &mut (), _offset: u64, piece: &[u8]) -> Result<Block, ConvertError> {
        Ok(Block { content: content_ranges(piece, HOLE_BYTES), host_offset: 0 })
    }

    fn place(&self, map: &mut Map, offset: u64, block: &mut Block) -> Result<(), ConvertError> {
        if block.content.is_empty() {
            return Ok(());
        }
        block.host_offset = self.host_offset(map.stored);
        if let Some(entry) = map.entries.get_mut(to_usize(offset / BLOCK_BYTES)) {
            *entry = map.stored;
        }
        map.stored += 1;
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, piece: &[u8], block: &Block) -> Result<(), ConvertError> {
        for range in &block.content {
            let at = block.host_offset + to_u64(range.start);
            let bytes = piece.get(range.clone()).unwrap_or_default();
            file.write_all_at(bytes, at).map_err(ConvertError::write(at))?;
        }
        Ok(())
    }

    fn finish(&self, file: &dyn WriteAt, map: Map) -> Result<(), ConvertError> {
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at).map_err(ConvertError::write(at));
        let end = self.host_offset(map.stored);
        file.set_len(end).map_err(ConvertError::write(end))?;
        let entries: Vec<u8> = map.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        write(&self.encode_header(&map), 0)?;
        write(&entries, MAP_OFFSET)
    }
}
