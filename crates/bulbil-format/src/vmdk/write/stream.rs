//! Writes a streamOptimized image.
//!
//! ```text
//! header │ descriptor │ grains, table │ grains, table │ … │ directory │ footer │ end of stream
//! 0      1            128              each behind a marker, at a sector
//! ```
//!
//! A table follows its grains and the directory the last table, so that whoever receives the image needs to keep no
//! more than one table and the directory. Only the footer knows where the directory is.

use libdeflater::{CompressionLvl, Compressor};

use crate::bytes::{is_zero, to_u64, to_usize};
use crate::convert::{Identity, Writer, write_at};
use crate::disk::SECTOR_BYTES;
use crate::{ConvertError, WriteAt};

use super::super::descriptor::CreateType;
use super::super::grain::{MARKER_DIRECTORY, MARKER_EOS, MARKER_FOOTER, MARKER_TABLE};
use super::super::header::{DIRECTORY_AT_END, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINES, Header, TABLE_ENTRIES};
use super::sparse::{check_end, entry};
use super::{DESCRIPTOR_SECTOR, DESCRIPTOR_SECTORS, GRAIN_BYTES, GRAIN_SECTORS, PIECE_BYTES, descriptor};

/// Of programs and libraries this makes 1 % more than QEMU does with zlib's level 6, in less than a third of the time.
const DEFLATE_LEVEL: i32 = 4;
/// Header and descriptor, rounded up to a grain.
const OVERHEAD_SECTORS: u64 = 128;

/// Writes a streamOptimized image.
#[derive(Debug)]
pub(crate) struct StreamWriter {
    header: Header,
    descriptor: Vec<u8>,
}

/// What is known of the stream so far.
#[derive(Debug)]
pub(crate) struct Placed {
    end_sector: u64,
    /// The sectors of the tables that were given their place.
    directory: Vec<u32>,
    table: Table,
}

/// The table of the grains placed last.
#[derive(Debug)]
struct Table {
    index: u64,
    entries: Vec<u32>,
}

impl Table {
    fn new(index: u64) -> Self {
        Self { index, entries: vec![0; to_usize(TABLE_ENTRIES)] }
    }

    fn set(&mut self, grain: u64, sector: u64) {
        if let Some(to) = self.entries.get_mut(to_usize(grain % TABLE_ENTRIES)) {
            *to = entry(sector);
        }
    }

    fn is_empty(&self) -> bool {
        self.entries.iter().all(|sector| *sector == 0)
    }
}

/// The compressed grains of a piece, with their markers, each padded to a sector.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    packed: Vec<u8>,
    /// The number of each grain on the disk, and its sector in `packed`.
    grains: Vec<(u64, u64)>,
    host_offset: u64,
    /// A table that is now complete, with its marker, and where it goes.
    table: Option<(u64, Vec<u8>)>,
}

impl StreamWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Self {
        let header = Header {
            version: 3,
            flags: FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity_sectors: size_bytes / SECTOR_BYTES,
            grain_sectors: GRAIN_SECTORS,
            descriptor_sector: DESCRIPTOR_SECTOR,
            descriptor_sectors: DESCRIPTOR_SECTORS,
            redundant_sector: 0,
            directory_sector: DIRECTORY_AT_END,
            overhead_sectors: OVERHEAD_SECTORS,
            unclean: false,
        };
        Self { header, descriptor: descriptor(CreateType::StreamOptimized, size_bytes, identity) }
    }
}

impl Placed {
    /// Gives the table its place, if it has grains, and begins the next one.
    fn end_table(&mut self, next_index: u64) -> Result<Option<(u64, Vec<u8>)>, ConvertError> {
        let table = std::mem::replace(&mut self.table, Table::new(next_index));
        if table.is_empty() {
            return Ok(None);
        }
        let marker_sector = self.end_sector;
        let words: Vec<u8> = table.entries.iter().flat_map(|sector| sector.to_le_bytes()).collect();
        let bytes = marked(MARKER_TABLE, &words);
        self.advance(to_u64(bytes.len()) / SECTOR_BYTES)?;
        self.directory.resize(to_usize(table.index), 0);
        self.directory.push(entry(marker_sector + 1));
        Ok(Some((marker_sector * SECTOR_BYTES, bytes)))
    }

    fn advance(&mut self, sectors: u64) -> Result<(), ConvertError> {
        self.end_sector += sectors;
        check_end(self.end_sector)
    }
}

/// Puts a marker before a part of the stream that is no grain, and zeros behind up to a sector.
fn marked(kind: u32, bytes: &[u8]) -> Vec<u8> {
    let sectors = to_u64(bytes.len()).div_ceil(SECTOR_BYTES);
    let mut part = marker(sectors, kind);
    part.extend_from_slice(bytes);
    part.resize(to_usize((sectors + 1) * SECTOR_BYTES), 0);
    part
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut marker = [&sectors.to_le_bytes()[..], &0_u32.to_le_bytes(), &kind.to_le_bytes()].concat();
    marker.resize(to_usize(SECTOR_BYTES), 0);
    marker
}

/// Adds a grain with its marker to `packed`. A short one, at the end of the disk, is filled up with zeros: some readers
/// want all grains whole.
fn pack_grain(
    deflate: &mut Compressor,
    disk_offset: u64,
    grain: &[u8],
    packed: &mut Vec<u8>,
) -> Result<(), ConvertError> {
    let mut whole = Vec::new();
    let grain = if to_u64(grain.len()) < GRAIN_BYTES {
        whole.extend_from_slice(grain);
        whole.resize(to_usize(GRAIN_BYTES), 0);
        &whole
    } else {
        grain
    };
    let start = packed.len();
    packed.extend_from_slice(&(disk_offset / SECTOR_BYTES).to_le_bytes());
    packed.extend_from_slice(&[0; 4]);
    let data = packed.len();
    packed.resize(data + deflate.zlib_compress_bound(grain.len()), 0);
    let len = deflate.zlib_compress(grain, packed.get_mut(data..).unwrap_or_default());
    let len = len.map_err(|error| ConvertError::Compress { reason: error.to_string() })?;
    let stored_len = u32::try_from(len).map_err(|error| ConvertError::Compress { reason: error.to_string() })?;
    if let Some(to) = packed.get_mut(start + 8..data) {
        to.copy_from_slice(&stored_len.to_le_bytes());
    }
    packed.truncate(data + len);
    packed.resize((data + len).next_multiple_of(to_usize(SECTOR_BYTES)), 0);
    Ok(())
}

impl Writer for StreamWriter {
    type Worker = Compressor;
    type Prepared = Piece;
    type State = Placed;

    fn piece_bytes(&self) -> u64 {
        PIECE_BYTES
    }

    fn worker(&self) -> Result<Compressor, ConvertError> {
        let level = CompressionLvl::new(DEFLATE_LEVEL);
        let no_level = |_| ConvertError::Compress { reason: format!("there is no level {DEFLATE_LEVEL} of deflate") };
        Ok(Compressor::new(level.map_err(no_level)?))
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<Placed, ConvertError> {
        Ok(Placed { end_sector: OVERHEAD_SECTORS, directory: Vec::new(), table: Table::new(0) })
    }

    fn prepare(&self, deflate: &mut Compressor, offset: u64, piece: &[u8]) -> Result<Piece, ConvertError> {
        let mut prepared = Piece::default();
        for (index, grain) in piece.chunks(to_usize(GRAIN_BYTES)).enumerate() {
            if !is_zero(grain) {
                let disk_offset = offset + to_u64(index) * GRAIN_BYTES;
                prepared.grains.push((disk_offset / GRAIN_BYTES, to_u64(prepared.packed.len()) / SECTOR_BYTES));
                pack_grain(deflate, disk_offset, grain, &mut prepared.packed)?;
            }
        }
        Ok(prepared)
    }

    fn place(&self, placed: &mut Placed, offset: u64, piece: &mut Piece) -> Result<(), ConvertError> {
        let table_index = offset / (GRAIN_BYTES * TABLE_ENTRIES);
        if table_index != placed.table.index {
            piece.table = placed.end_table(table_index)?;
        }
        let first_sector = placed.end_sector;
        piece.host_offset = first_sector * SECTOR_BYTES;
        placed.advance(to_u64(piece.packed.len()) / SECTOR_BYTES)?;
        for (grain, sector) in &piece.grains {
            placed.table.set(*grain, first_sector + sector);
        }
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, _bytes: &[u8], piece: &Piece) -> Result<(), ConvertError> {
        if let Some((offset, table)) = &piece.table {
            write_at(file, table, *offset)?;
        }
        write_at(file, &piece.packed, piece.host_offset)
    }

    fn finish(&self, file: &dyn WriteAt, mut placed: Placed) -> Result<(), ConvertError> {
        if let Some((offset, table)) = placed.end_table(u64::MAX)? {
            write_at(file, &table, offset)?;
        }
        placed.directory.resize(to_usize(self.header.directory_entries()), 0);
        let words: Vec<u8> = placed.directory.iter().flat_map(|sector| sector.to_le_bytes()).collect();
        let footer = Header { directory_sector: placed.end_sector + 1, ..self.header.clone() };
        let mut end = marked(MARKER_DIRECTORY, &words);
        end.extend(marked(MARKER_FOOTER, &footer.encode()));
        end.extend(marker(0, MARKER_EOS));
        let offset = placed.end_sector * SECTOR_BYTES;
        placed.advance(to_u64(end.len()) / SECTOR_BYTES)?;
        write_at(file, &end, offset)?;
        write_at(file, &self.descriptor, DESCRIPTOR_SECTOR * SECTOR_BYTES)?;
        write_at(file, &self.header.encode(), 0)?;
        let end_bytes = placed.end_sector * SECTOR_BYTES;
        file.set_len(end_bytes).map_err(ConvertError::write(end_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::header::MAX_SECTORS;
    use super::*;

    #[test]
    fn a_table_that_has_no_room_is_an_error() {
        for (end_sector, fits) in [(MAX_SECTORS - 5, true), (MAX_SECTORS - 4, false), (MAX_SECTORS, false)] {
            let mut placed = Placed { end_sector, directory: Vec::new(), table: Table::new(0) };
            placed.table.set(0, OVERHEAD_SECTORS);
            assert_eq!(placed.end_table(1).is_ok(), fits, "{end_sector:#x}");
        }
    }
}
