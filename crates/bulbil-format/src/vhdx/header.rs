//! What lies at fixed places: the file identifier, two headers and two region tables (MS-VHDX 2.2).
//!
//! ```text
//! 0        file identifier    0   8 "vhdxfile"        8  512 creator, UTF-16
//! 0x10000  header 1           0   4 "head"            4    4 CRC-32C of 4 KiB, this field as zeros
//! 0x20000  header 2           8   8 sequence number  16   16 file write GUID     32  16 data write GUID
//!                            48  16 log GUID         64    2 log version         66   2 version, 1
//!                            68   4 log length       72    8 log offset
//! 0x30000  region table 1     0   4 "regi"            4    4 CRC-32C of 64 KiB, this field as zeros
//! 0x40000  region table 2     8   4 regions          16   32 for each region:
//!            0  16 kind      16   8 offset           24    4 length              28   4 bit 0: required
//! 0x100000 log, regions and blocks, each at a multiple of 1 MiB
//! ```
//!
//! Of the headers the valid one with the higher sequence number counts. Both have the same number when Disk2VHD wrote
//! them; that is accepted as long as they say the same. Of the region tables the first valid one counts.

use std::ops::Range;

use super::guid::Guid;
use super::{MIB, checksum, corrupt, read_vec};
use crate::bytes::{le_u16, le_u32, le_u64, to_usize};
use crate::error::need;
use crate::{FormatError, ReadAt};

pub(super) const IDENTIFIER_BYTES: u64 = 520;
pub(super) const HEADER_OFFSETS: [u64; 2] = [0x1_0000, 0x2_0000];
pub(super) const HEADER_BYTES: usize = 4096;
pub(super) const REGION_TABLE_OFFSETS: [u64; 2] = [0x3_0000, 0x4_0000];
pub(super) const REGION_TABLE_BYTES: usize = 64 << 10;
pub(super) const REGION_ENTRY_BYTES: usize = 32;
/// As many as fit beside the head of the table.
const MAX_REGIONS: u32 = 2047;
pub(super) const REQUIRED_REGION: u32 = 1;

pub(super) const BAT_REGION: Guid = Guid::from_digits(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
pub(super) const METADATA_REGION: Guid = Guid::from_digits(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

/// Reads the name of the program that made the file; only letters, digits, punctuation and spaces are kept.
pub(super) fn read_creator(file: &dyn ReadAt) -> Result<Option<String>, FormatError> {
    need(file.len_bytes(), IDENTIFIER_BYTES, "the file identifier")?;
    let bytes = read_vec(file, 8, IDENTIFIER_BYTES - 8)?;
    let name = utf16(&bytes);
    let plain = |c: &char| c.is_alphanumeric() || c.is_ascii_graphic() || *c == ' ';
    let name: String = name.chars().filter(plain).collect();
    Ok(Some(name.trim().to_owned()).filter(|name| !name.is_empty()))
}

/// Decodes UTF-16 up to the first zero.
pub(super) fn utf16(bytes: &[u8]) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let text = char::decode_utf16(units.take_while(|unit| *unit != 0));
    text.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// The header that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    sequence: u64,
    version: u16,
    pub(super) data_write_guid: Guid,
    /// Zero if there is nothing in the log.
    pub(super) log_guid: Guid,
    pub(super) log_version: u16,
    pub(super) log: Range<u64>,
}

impl Header {
    /// Reads both headers and chooses.
    pub(super) fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        need(file.len_bytes(), MIB, "the header section")?;
        let [first, second] = HEADER_OFFSETS.map(|offset| read_vec(file, offset, HEADER_BYTES as u64));
        let header = match (Self::parse(&first?), Self::parse(&second?)) {
            (Copy::Valid(first), Copy::Valid(second)) => Self::choose(first, second)?,
            (Copy::Valid(header), _) | (_, Copy::Valid(header)) => header,
            (Copy::Absent, Copy::Absent) => return Err(corrupt("there is no header at 0x10000 or 0x20000")),
            _ => return Err(FormatError::checksum("both headers")),
        };
        if header.version != 1 {
            return Err(FormatError::UnsupportedFormat { name: format!("VHDX version {}", header.version) });
        }
        let log = &header.log;
        if log.start < MIB || !log.start.is_multiple_of(MIB) || !log.end.is_multiple_of(MIB) {
            return Err(corrupt(format!("log at {:#x} to {:#x} is not at a multiple of 1 MiB", log.start, log.end)));
        }
        need(file.len_bytes(), log.end, "the log")?;
        Ok(header)
    }

    fn parse(bytes: &[u8]) -> Copy<Self> {
        if !bytes.starts_with(b"head") {
            return Copy::Absent;
        }
        if checksum(bytes) != le_u32(bytes, 4) {
            return Copy::Damaged;
        }
        let log_offset = le_u64(bytes, 72);
        Copy::Valid(Self {
            sequence: le_u64(bytes, 8),
            version: le_u16(bytes, 66),
            data_write_guid: Guid::read(bytes, 32),
            log_guid: Guid::read(bytes, 48),
            log_version: le_u16(bytes, 64),
            // An offset that overflows is at no multiple of 1 MiB.
            log: log_offset..log_offset.saturating_add(u64::from(le_u32(bytes, 68))),
        })
    }

    fn choose(first: Self, second: Self) -> Result<Self, FormatError> {
        match first.sequence.cmp(&second.sequence) {
            std::cmp::Ordering::Less => Ok(second),
            std::cmp::Ordering::Greater => Ok(first),
            std::cmp::Ordering::Equal if first == second => Ok(first),
            std::cmp::Ordering::Equal => {
                Err(corrupt(format!("two different headers of sequence number {}", first.sequence)))
            }
        }
    }
}

/// What became of one of two copies.
enum Copy<T> {
    Valid(T),
    /// The checksum is wrong.
    Damaged,
    /// Not even the signature is there.
    Absent,
}

/// The regions of the file.
#[derive(Debug, Clone)]
pub(super) struct Regions {
    pub(super) bat: Range<u64>,
    pub(super) metadata: Range<u64>,
    /// These two and those that are not understood.
    pub(super) all: Vec<Range<u64>>,
}

impl Regions {
    /// Reads the region tables; every region is in the file at a multiple of 1 MiB.
    pub(super) fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        let mut damaged = false;
        for offset in REGION_TABLE_OFFSETS {
            let bytes = read_vec(file, offset, REGION_TABLE_BYTES as u64)?;
            if !bytes.starts_with(b"regi") {
                continue;
            }
            if checksum(&bytes) == le_u32(&bytes, 4) {
                return Self::parse(&bytes, file.len_bytes());
            }
            damaged = true;
        }
        if damaged {
            return Err(FormatError::checksum("both region tables"));
        }
        Err(corrupt("there is no region table at 0x30000 or 0x40000"))
    }

    fn parse(bytes: &[u8], len_bytes: u64) -> Result<Self, FormatError> {
        let count = le_u32(bytes, 8);
        if count > MAX_REGIONS {
            return Err(corrupt(format!("region table too large: {count} regions")));
        }
        let (mut bat, mut metadata, mut all) = (None, None, Vec::new());
        let entries = bytes.get(16..).unwrap_or_default().chunks_exact(REGION_ENTRY_BYTES);
        for entry in entries.take(to_usize(count.into())) {
            let kind = Guid::read(entry, 0);
            let range = region_range(entry, len_bytes)?;
            let known = match kind {
                BAT_REGION => bat.replace(range.clone()),
                METADATA_REGION => metadata.replace(range.clone()),
                _ if le_u32(entry, 28) & REQUIRED_REGION != 0 => {
                    return Err(FormatError::UnsupportedFeature { bit: 0, name: format!("required region {kind}") });
                }
                _ => None,
            };
            if known.is_some() {
                return Err(corrupt(format!("two regions of kind {kind}")));
            }
            all.push(range);
        }
        let bat = bat.ok_or_else(|| corrupt("there is no region for the BAT"))?;
        let metadata = metadata.ok_or_else(|| corrupt("there is no region for metadata"))?;
        Ok(Self { bat, metadata, all })
    }
}

fn region_range(entry: &[u8], len_bytes: u64) -> Result<Range<u64>, FormatError> {
    let (offset, len) = (le_u64(entry, 16), u64::from(le_u32(entry, 24)));
    if offset < MIB || !offset.is_multiple_of(MIB) || len == 0 || !len.is_multiple_of(MIB) {
        return Err(corrupt(format!("region at {offset:#x} of {len:#x} bytes is not at a multiple of 1 MiB")));
    }
    need(len_bytes, offset.saturating_add(len), "a region")?;
    Ok(offset..offset.saturating_add(len))
}
