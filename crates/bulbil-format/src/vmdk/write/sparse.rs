//! Writes a monolithicSparse image.
//!
//! ```text
//! header │ descriptor │ second directory, its tables │ directory, its tables │ grains in the order of the disk
//! 0      1            21                                                     a multiple of 128
//! ```
//!
//! Both sets of tables have their place from the start, as in the images of VMware and QEMU; tables without grains are
//! holes.

use crate::bytes::{to_u64, to_usize};
use crate::convert::{Identity, Writer, write_at};
use crate::disk::SECTOR_BYTES;
use crate::raw::content_ranges;
use crate::{ConvertError, WriteAt};

use super::super::descriptor::CreateType;
use super::super::header::{FLAG_NEWLINES, FLAG_REDUNDANT, Header, MAX_SECTORS, TABLE_BYTES, TABLE_ENTRIES};
use super::{DESCRIPTOR_SECTOR, DESCRIPTOR_SECTORS, GRAIN_BYTES, GRAIN_SECTORS, PIECE_BYTES, descriptor};

const TABLE_SECTORS: u64 = TABLE_BYTES / SECTOR_BYTES;

/// Writes a monolithicSparse image.
#[derive(Debug)]
pub(crate) struct SparseWriter {
    header: Header,
    descriptor: Vec<u8>,
}

/// The grains written so far.
#[derive(Debug)]
pub(crate) struct Placed {
    end_sector: u64,
    /// The number of each grain on the disk, ascending, and its sector in the file.
    grains: Vec<(u32, u32)>,
}

/// The grains of a piece that are not zeros, and where the first of them goes; the others follow it.
#[derive(Debug)]
pub(crate) struct Piece {
    ranges: Vec<std::ops::Range<usize>>,
    host_offset: u64,
}

impl SparseWriter {
    pub(crate) fn new(size_bytes: u64, identity: &Identity) -> Self {
        let mut header = Header {
            version: 1,
            flags: FLAG_NEWLINES | FLAG_REDUNDANT,
            capacity_sectors: size_bytes / SECTOR_BYTES,
            grain_sectors: GRAIN_SECTORS,
            descriptor_sector: DESCRIPTOR_SECTOR,
            descriptor_sectors: DESCRIPTOR_SECTORS,
            redundant_sector: DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS,
            directory_sector: 0,
            overhead_sectors: 0,
            unclean: false,
        };
        let directory_sectors = (header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        let set_sectors = directory_sectors + header.directory_entries() * TABLE_SECTORS;
        header.directory_sector = header.redundant_sector + set_sectors;
        header.overhead_sectors = (header.directory_sector + set_sectors).next_multiple_of(GRAIN_SECTORS);
        let descriptor = descriptor(CreateType::MonolithicSparse, size_bytes, identity);
        Self { header, descriptor }
    }

    /// The sector of the first table of the set whose directory is at a sector.
    fn first_table(&self, directory_sector: u64) -> u64 {
        directory_sector + (self.header.directory_entries() * 4).div_ceil(SECTOR_BYTES)
    }

    /// Writes the directory at a sector and the tables that have grains.
    fn write_tables(&self, file: &dyn WriteAt, directory_sector: u64, placed: &Placed) -> Result<(), ConvertError> {
        let first_table = self.first_table(directory_sector);
        let sectors = (0..self.header.directory_entries()).map(|index| first_table + index * TABLE_SECTORS);
        let directory: Vec<u8> = sectors.flat_map(|sector| entry(sector).to_le_bytes()).collect();
        write_at(file, &directory, directory_sector * SECTOR_BYTES)?;
        let table_of = |grain: &(u32, u32)| u64::from(grain.0) / TABLE_ENTRIES;
        for grains in placed.grains.chunk_by(|a, b| table_of(a) == table_of(b)) {
            let mut table = vec![0; to_usize(TABLE_BYTES)];
            for (number, sector) in grains {
                let at = to_usize(u64::from(*number) % TABLE_ENTRIES * 4);
                if let Some(to) = table.get_mut(at..at + 4) {
                    to.copy_from_slice(&sector.to_le_bytes());
                }
            }
            let index = grains.first().map(table_of).unwrap_or_default();
            write_at(file, &table, (first_table + index * TABLE_SECTORS) * SECTOR_BYTES)?;
        }
        Ok(())
    }
}

/// A sector as an entry of a table. Only sectors below [`MAX_SECTORS`] are ever placed.
pub(super) fn entry(sector: u64) -> u32 {
    u32::try_from(sector).expect("place refuses sectors that an entry cannot hold")
}

/// Fails if the file is about to become longer than an entry can say.
pub(super) fn check_end(end_sector: u64) -> Result<(), ConvertError> {
    if end_sector <= MAX_SECTORS {
        return Ok(());
    }
    Err(ConvertError::unsupported("a VMDK file of more than 2 TiB; another format can hold this much"))
}

impl Writer for SparseWriter {
    type Worker = ();
    type Prepared = Piece;
    type State = Placed;

    fn piece_bytes(&self) -> u64 {
        PIECE_BYTES
    }

    fn worker(&self) -> Result<(), ConvertError> {
        Ok(())
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<Placed, ConvertError> {
        check_end(self.header.overhead_sectors)?;
        Ok(Placed { end_sector: self.header.overhead_sectors, grains: Vec::new() })
    }

    fn prepare(&self, (): &mut (), _offset: u64, piece: &[u8]) -> Result<Piece, ConvertError> {
        Ok(Piece { ranges: content_ranges(piece, to_usize(GRAIN_BYTES)), host_offset: 0 })
    }

    fn place(&self, placed: &mut Placed, offset: u64, piece: &mut Piece) -> Result<(), ConvertError> {
        piece.host_offset = placed.end_sector * SECTOR_BYTES;
        for range in &piece.ranges {
            for start in range.clone().step_by(to_usize(GRAIN_BYTES)) {
                let number = (offset + to_u64(start)) / GRAIN_BYTES;
                let number = u32::try_from(number).expect("a disk of 64 TiB has 2^30 grains");
                check_end(placed.end_sector + GRAIN_SECTORS)?;
                placed.grains.push((number, entry(placed.end_sector)));
                placed.end_sector += GRAIN_SECTORS;
            }
        }
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, bytes: &[u8], piece: &Piece) -> Result<(), ConvertError> {
        let mut host_offset = piece.host_offset;
        for range in &piece.ranges {
            write_at(file, bytes.get(range.clone()).unwrap_or_default(), host_offset)?;
            host_offset += to_u64(range.len()).next_multiple_of(GRAIN_BYTES);
        }
        Ok(())
    }

    fn finish(&self, file: &dyn WriteAt, placed: Placed) -> Result<(), ConvertError> {
        let end_bytes = placed.end_sector * SECTOR_BYTES;
        // The last grain may end with the disk; in the file it is whole.
        file.set_len(end_bytes).map_err(ConvertError::write(end_bytes))?;
        self.write_tables(file, self.header.redundant_sector, &placed)?;
        self.write_tables(file, self.header.directory_sector, &placed)?;
        write_at(file, &self.descriptor, DESCRIPTOR_SECTOR * SECTOR_BYTES)?;
        write_at(file, &self.header.encode(), 0)
    }
}
