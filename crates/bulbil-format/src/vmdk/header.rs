//! The header of a sparse extent, its copy in the footer, and their bounds.
//!
//! All integers are little endian; offsets and sizes are in sectors of 512 bytes (Virtual Disk Format 5.0, "Hosted
//! Sparse Extents" and "Stream-Optimized Compressed Sparse Extents").
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | `KDMV` |
//! | 4 | 4 | version: 1, 2 (zero grains), 3 (compressed, or with a changed-block file) |
//! | 8 | 4 | flags: 0 newline test, 1 second grain directory, 2 zero grains, 16 compressed, 17 markers |
//! | 12 | 8 | capacity of the extent |
//! | 20 | 8 | grain size, a power of two |
//! | 28 | 16 | offset and size of the embedded descriptor; zeros if there is none |
//! | 44 | 4 | entries of a grain table, 512 |
//! | 48 | 8 | offset of the redundant grain directory |
//! | 56 | 8 | offset of the grain directory; all ones if only the footer knows it |
//! | 64 | 8 | sectors of all metadata in front of the first grain |
//! | 72 | 1 | not closed cleanly |
//! | 73 | 4 | `\n`, space, `\r\n`: what a transfer as text would have changed |
//! | 77 | 2 | compression: 0 none, 1 deflate |

use std::ops::Range;

use crate::bytes::{bytes_at, le_u16, le_u32, le_u64, to_usize};
use crate::disk::{SECTOR_BYTES, check_size};
use crate::error::need;
use crate::{FormatError, ReadAt};

use super::grain::{MARKER_EOS, MARKER_FOOTER};

pub(super) const MAGIC: [u8; 4] = *b"KDMV";
pub(super) const NEWLINES: [u8; 4] = *b"\n \r\n";
pub(super) const FLAG_NEWLINES: u32 = 1;
pub(super) const FLAG_REDUNDANT: u32 = 1 << 1;
pub(super) const FLAG_ZERO_GRAINS: u32 = 1 << 2;
pub(super) const FLAG_COMPRESSED: u32 = 1 << 16;
pub(super) const FLAG_MARKERS: u32 = 1 << 17;
const KNOWN_FLAGS: u32 = FLAG_NEWLINES | FLAG_REDUNDANT | FLAG_ZERO_GRAINS | FLAG_COMPRESSED | FLAG_MARKERS;

/// The grain directory is where the footer says.
pub(super) const DIRECTORY_AT_END: u64 = u64::MAX;
/// Entries of a grain table; the format has the field, but nobody writes another number.
pub(super) const TABLE_ENTRIES: u64 = 512;
/// A grain table is of four sectors.
pub(super) const TABLE_BYTES: u64 = TABLE_ENTRIES * 4;
pub(super) const DEFLATE: u16 = 1;
/// 4 KiB to 2 MiB; the usual grain is 64 KiB.
const GRAIN_SECTORS: std::ops::RangeInclusive<u64> = 8..=4096;
/// Enough for 64 TiB with grains of 16 KiB.
const MAX_DIRECTORY_BYTES: u64 = 32 << 20;
/// Entries of tables have 32 bits, so nothing lies beyond this sector: 2 TiB.
pub(super) const MAX_SECTORS: u64 = 1 << 32;
/// Footer marker, footer, end-of-stream marker.
const FOOTER_BYTES: u64 = 3 * SECTOR_BYTES;

/// A header of which every field was checked on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) capacity_sectors: u64,
    pub(super) grain_sectors: u64,
    pub(super) descriptor_sector: u64,
    pub(super) descriptor_sectors: u64,
    pub(super) redundant_sector: u64,
    pub(super) directory_sector: u64,
    pub(super) overhead_sectors: u64,
    pub(super) unclean: bool,
}

impl Header {
    /// Reads the header of an extent, with the place of the grain directory from the footer if it is there.
    pub(super) fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        need(file.len_bytes(), SECTOR_BYTES, "the header")?;
        let header = Self::parse(&read_sector(file, 0)?)?;
        let header = header.with_footer(file)?;
        header.check_directory(file.len_bytes())?;
        Ok(header)
    }

    fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let header = Self {
            version: le_u32(bytes, 4),
            flags: le_u32(bytes, 8),
            capacity_sectors: le_u64(bytes, 12),
            grain_sectors: le_u64(bytes, 20),
            descriptor_sector: le_u64(bytes, 28),
            descriptor_sectors: le_u64(bytes, 36),
            redundant_sector: le_u64(bytes, 48),
            directory_sector: le_u64(bytes, 56),
            overhead_sectors: le_u64(bytes, 64),
            unclean: bytes_at::<1>(bytes, 72) != [0],
        };
        if bytes_at(bytes, 0) != MAGIC {
            return Err(FormatError::corrupt("the header has no signature"));
        }
        header.check_version_and_flags(bytes)?;
        check_size(header.capacity_sectors.saturating_mul(SECTOR_BYTES))?;
        header.check_geometry(le_u32(bytes, 44))?;
        Ok(header)
    }

    fn check_version_and_flags(&self, bytes: &[u8]) -> Result<(), FormatError> {
        if !matches!(self.version, 1..=3) {
            return Err(FormatError::UnsupportedFormat {
                name: format!("VMDK sparse extent version {}", self.version),
            });
        }
        let unknown = self.flags & !KNOWN_FLAGS;
        if unknown != 0 {
            return Err(FormatError::UnsupportedFeature { bit: unknown.trailing_zeros(), name: "unknown".to_owned() });
        }
        if self.flags & FLAG_NEWLINES != 0 && bytes_at(bytes, 73) != NEWLINES {
            return Err(FormatError::corrupt("the file was changed by a transfer as text"));
        }
        match (le_u16(bytes, 77), self.is_compressed(), self.flags & FLAG_MARKERS != 0) {
            (0, false, false) | (DEFLATE, true, true) => Ok(()),
            (0 | DEFLATE, ..) => {
                let flags = self.flags;
                Err(FormatError::corrupt(format!("flags and compression do not go together: {flags:#x}")))
            }
            (algorithm, ..) => {
                let name = format!("compression algorithm {algorithm}");
                Err(FormatError::UnsupportedFeature { bit: FLAG_COMPRESSED.trailing_zeros(), name })
            }
        }
    }

    fn check_geometry(&self, table_entries: u32) -> Result<(), FormatError> {
        if !self.grain_sectors.is_power_of_two() || !GRAIN_SECTORS.contains(&self.grain_sectors) {
            return Err(FormatError::corrupt(format!("grain of {} sectors", self.grain_sectors)));
        }
        if u64::from(table_entries) != TABLE_ENTRIES {
            return Err(FormatError::corrupt(format!("grain tables of {table_entries} entries")));
        }
        let directory_bytes = self.directory_entries() * 4;
        if directory_bytes > MAX_DIRECTORY_BYTES {
            return Err(FormatError::corrupt(format!("grain directory too large: {directory_bytes} bytes")));
        }
        Ok(())
    }

    /// Takes the place of the grain directory from the footer, of which all else must be as in the header.
    ///
    /// A footer that is not needed must agree as well: others may read that one.
    fn with_footer(self, file: &dyn ReadAt) -> Result<Self, FormatError> {
        let at_end = self.directory_sector == DIRECTORY_AT_END;
        let Some(footer) = Footer::read(file)? else {
            if !at_end {
                return Ok(self);
            }
            let at_bytes = file.len_bytes();
            let needed_bytes = at_bytes.saturating_add(FOOTER_BYTES);
            return Err(FormatError::Truncated { at_bytes, needed_bytes, what: "the footer" });
        };
        let footer = Self::parse(&footer.header)?;
        let as_header = Self { directory_sector: self.directory_sector, ..footer.clone() };
        if as_header != self || (!at_end && footer.directory_sector != self.directory_sector) {
            return Err(FormatError::corrupt("the footer contradicts the header"));
        }
        Ok(footer)
    }

    fn check_directory(&self, len_bytes: u64) -> Result<(), FormatError> {
        let range = self.directory_range();
        if range.start == 0 || range.end > MAX_SECTORS {
            return Err(FormatError::corrupt(format!("grain directory at sector {:#x}", self.directory_sector)));
        }
        let end_bytes = range.start * SECTOR_BYTES + self.directory_entries() * 4;
        need(len_bytes, end_bytes, "the grain directory")
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }

    pub(super) fn has_zero_grains(&self) -> bool {
        self.flags & FLAG_ZERO_GRAINS != 0
    }

    /// The size of the extent as the header has it.
    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors.saturating_mul(SECTOR_BYTES)
    }

    /// The size of a grain: 4 KiB to 2 MiB.
    pub(super) fn grain_bytes(&self) -> u64 {
        self.grain_sectors * SECTOR_BYTES
    }

    /// How much of the disk one grain table maps: at most 1 GiB.
    pub(super) fn table_coverage_bytes(&self) -> u64 {
        self.grain_bytes() * TABLE_ENTRIES
    }

    /// How many grain tables the extent needs.
    pub(super) fn directory_entries(&self) -> u64 {
        self.capacity_bytes().div_ceil(self.table_coverage_bytes())
    }

    /// The sectors of the grain directory.
    pub(super) fn directory_range(&self) -> Range<u64> {
        let sectors = (self.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        self.directory_sector..self.directory_sector.saturating_add(sectors)
    }

    /// The sectors of the embedded descriptor; empty if there is none.
    pub(super) fn descriptor_range(&self) -> Range<u64> {
        self.descriptor_sector..self.descriptor_sector.saturating_add(self.descriptor_sectors)
    }

    /// The header as it is stored.
    pub(super) fn encode(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        let algorithm = if self.is_compressed() { DEFLATE } else { 0 };
        let fields: [&[u8]; 14] = [
            &MAGIC,
            &self.version.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.capacity_sectors.to_le_bytes(),
            &self.grain_sectors.to_le_bytes(),
            &self.descriptor_sector.to_le_bytes(),
            &self.descriptor_sectors.to_le_bytes(),
            &512_u32.to_le_bytes(),
            &self.redundant_sector.to_le_bytes(),
            &self.directory_sector.to_le_bytes(),
            &self.overhead_sectors.to_le_bytes(),
            &[u8::from(self.unclean)],
            &NEWLINES,
            &algorithm.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.concat()) {
            *to = from;
        }
        bytes
    }
}

fn read_sector(file: &dyn ReadAt, offset_bytes: u64) -> Result<[u8; 512], FormatError> {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, offset_bytes).map_err(FormatError::read(offset_bytes))?;
    Ok(bytes)
}

/// The last three sectors of a stream.
struct Footer {
    header: [u8; 512],
}

impl Footer {
    /// Returns the footer if the file ends with one.
    fn read(file: &dyn ReadAt) -> Result<Option<Self>, FormatError> {
        let Some(start) = file.len_bytes().checked_sub(FOOTER_BYTES).filter(|start| *start >= SECTOR_BYTES) else {
            return Ok(None);
        };
        let mut bytes = vec![0; to_usize(FOOTER_BYTES)];
        file.read_exact_at(&mut bytes, start).map_err(FormatError::read(start))?;
        let marker_kind = |at: usize| (le_u32(&bytes, at + 8), le_u32(&bytes, at + 12));
        let found = marker_kind(0) == (0, MARKER_FOOTER)
            && bytes_at(&bytes, 512) == MAGIC
            && (le_u64(&bytes, 1024), marker_kind(1024)) == (0, (0, MARKER_EOS));
        Ok(found.then(|| Self { header: bytes_at(&bytes, 512) }))
    }
}
