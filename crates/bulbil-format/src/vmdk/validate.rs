//! The check of a whole extent at open: every directory and table entry, once, in bounded memory.
//!
//! What it proves, so that readers may rely on it: every grain table and grain that the disk needs lies in the file;
//! no sector is used twice, neither by two grains nor by a grain and a table, the header or the descriptor; the marker
//! of every compressed grain says where the grain belongs.
//!
//! The redundant grain directory is not followed: nothing here uses it. Entries beyond the end of the disk are not
//! looked at, as they are never read.

use crate::bytes::{le_u32, to_u64, to_usize};
use crate::disk::SECTOR_BYTES;
use crate::error::need;
use crate::holes::Holes;
use crate::{FormatError, ReadAt};

use super::grain::{GRAIN_MARKER_BYTES, MarkerReader};
use super::header::{Header, TABLE_BYTES};
use super::sectors::SectorSet;

/// What an entry of a grain table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grain {
    Zero,
    /// The grain, or the marker in front of it, is at this byte of the file.
    At(u64),
}

/// Returns what an entry of a grain table says.
pub(super) fn parse_entry(header: &Header, entry: u32) -> Grain {
    match entry {
        0 => Grain::Zero,
        1 if header.has_zero_grains() => Grain::Zero,
        sector => Grain::At(u64::from(sector) * SECTOR_BYTES),
    }
}

/// What an extent contains.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Census {
    pub(super) data_bytes: u64,
    pub(super) grains: u64,
    /// Where the last grain is, if the extent ends in it and it is stored.
    pub(super) tail_offset: Option<u64>,
}

/// Reads 32-bit words.
pub(super) fn read_words(file: &dyn ReadAt, offset: u64, len_bytes: u64) -> Result<Box<[u32]>, FormatError> {
    let mut bytes = vec![0; to_usize(len_bytes)];
    file.read_exact_at(&mut bytes, offset).map_err(FormatError::read(offset))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|word| le_u32(word, 0)).collect())
}

/// Checks all tables of an extent of which `size_bytes` are read, and takes those without grains off the directory:
/// most writers make every table beforehand, and listing the extents of an empty disk should not read them all again.
pub(super) fn validate(
    file: &dyn ReadAt,
    header: &Header,
    size_bytes: u64,
    directory: &mut [u32],
) -> Result<Census, FormatError> {
    let mut validator = Validator {
        file,
        header,
        size_bytes,
        sectors: SectorSet::new(file.len_bytes()),
        markers: MarkerReader::new(file),
        census: Census::default(),
    };
    validator.claim_metadata(directory)?;
    let mut holes = Holes::new(file);
    for (index, entry) in directory.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
        let grains = validator.census.grains;
        let start = u64::from(*entry) * SECTOR_BYTES;
        if !holes.cover(start..start + TABLE_BYTES)? {
            validator.take_table(to_u64(index) * header.table_coverage_bytes(), *entry)?;
        }
        if validator.census.grains == grains {
            *entry = 0;
        }
    }
    Ok(validator.census)
}

struct Validator<'a> {
    file: &'a dyn ReadAt,
    header: &'a Header,
    size_bytes: u64,
    sectors: SectorSet,
    markers: MarkerReader<'a>,
    census: Census,
}

impl Validator<'_> {
    fn claim_metadata(&mut self, directory: &[u32]) -> Result<(), FormatError> {
        self.sectors.claim(0..1)?;
        self.sectors.claim(self.header.descriptor_range())?;
        self.sectors.claim(self.header.directory_range())?;
        for sector in directory.iter().copied().filter(|sector| *sector != 0).map(u64::from) {
            need(self.file.len_bytes(), sector * SECTOR_BYTES + TABLE_BYTES, "a grain table")?;
            self.sectors.claim(sector..sector + TABLE_BYTES / SECTOR_BYTES)?;
        }
        Ok(())
    }

    fn take_table(&mut self, disk_offset: u64, sector: u32) -> Result<(), FormatError> {
        let table = read_words(self.file, u64::from(sector) * SECTOR_BYTES, TABLE_BYTES)?;
        let offsets = (disk_offset..self.size_bytes).step_by(to_usize(self.header.grain_bytes()));
        for (entry, offset) in table.iter().zip(offsets) {
            if let Grain::At(host_offset) = parse_entry(self.header, *entry) {
                self.take_grain(offset, host_offset)?;
            }
        }
        Ok(())
    }

    fn take_grain(&mut self, disk_offset: u64, host_offset: u64) -> Result<(), FormatError> {
        let grain_bytes = self.header.grain_bytes();
        let on_disk_bytes = grain_bytes.min(self.size_bytes - disk_offset);
        let stored_bytes = if self.header.is_compressed() {
            self.marked_bytes(disk_offset, host_offset)?
        } else {
            need(self.file.len_bytes(), host_offset + on_disk_bytes, "a grain")?;
            on_disk_bytes
        };
        let sector = host_offset / SECTOR_BYTES;
        self.sectors.claim(sector..sector + stored_bytes.div_ceil(SECTOR_BYTES))?;
        self.census.data_bytes += on_disk_bytes;
        self.census.grains += 1;
        if on_disk_bytes < grain_bytes {
            self.census.tail_offset = Some(host_offset);
        }
        Ok(())
    }

    /// Checks the marker of a compressed grain; returns the length of both.
    fn marked_bytes(&mut self, disk_offset: u64, host_offset: u64) -> Result<u64, FormatError> {
        let marker = self.markers.marker_at(host_offset)?;
        if marker.disk_sector != disk_offset / SECTOR_BYTES {
            let found = marker.disk_sector;
            let what =
                format!("grain at {host_offset:#x} is that of disk sector {found:#x}, not of byte {disk_offset:#x}");
            return Err(FormatError::corrupt(what));
        }
        marker.check(host_offset, self.header.grain_bytes(), self.file.len_bytes())?;
        Ok(GRAIN_MARKER_BYTES + marker.len_bytes)
    }
}
