//! The metadata region: what kind of disk this is (MS-VHDX 2.6).
//!
//! ```text
//! table, 64 KiB      0   8 "metadata"    10   2 items    32   32 for each item:
//!                      0  16 kind    16   4 offset in the region    20   4 length
//!                     24   4 bit 0: of a user, bit 1: of the disk, bit 2: required
//! file parameters    0   4 block size     4   4 bit 0: blocks stay allocated (fixed), bit 1: has a parent
//! disk size          0   8 bytes
//! sector sizes       0   4 bytes          one item for the logical, one for the physical size
//! disk identifier    0  16 GUID           "page 83 data", what SCSI tells a guest
//! parent locator     0  16 kind          18   2 pairs    20   12 for each pair:
//!                      0   4 offset of the key    4   4 offset of the value    8   2, 10   2 their lengths; UTF-16
//! ```

use std::ops::Range;

use super::guid::Guid;
use super::header::utf16;
use super::{corrupt, read_vec};
use crate::bytes::{le_u16, le_u32, le_u64, to_usize};
use crate::disk::check_size;
use crate::{Format, FormatError, OpenOptions, ReadAt};

pub(super) const TABLE_BYTES: u64 = 64 << 10;
pub(super) const TABLE_ENTRY_BYTES: usize = 32;
const MAX_ITEMS: u16 = 2047;
/// The specification's own limit.
const MAX_ITEM_BYTES: u64 = 1 << 20;
const USER_ITEM: u32 = 1 << 0;
pub(super) const DISK_ITEM: u32 = 1 << 1;
pub(super) const REQUIRED_ITEM: u32 = 1 << 2;
const REQUIRED_ITEM_BIT: u32 = 2;

pub(super) const FILE_PARAMETERS: Guid = Guid::from_digits(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
pub(super) const DISK_SIZE: Guid = Guid::from_digits(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
pub(super) const DISK_ID: Guid = Guid::from_digits(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
pub(super) const LOGICAL_SECTOR: Guid = Guid::from_digits(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
pub(super) const PHYSICAL_SECTOR: Guid = Guid::from_digits(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = Guid::from_digits(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
const KNOWN: [Guid; 6] = [FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];

const FIXED: u32 = 1 << 0;
const HAS_PARENT: u32 = 1 << 1;
const HAS_PARENT_BIT: u32 = 1;
/// The names a parent has, the one that says most to a person first.
const PARENT_KEYS: [&str; 4] = ["relative_path", "absolute_win32_path", "volume_path", "parent_linkage"];
/// More than the longest of them has in UTF-16.
const MAX_PARENT_KEY_BYTES: u16 = 64;

/// What the metadata say; every field is within its bounds.
#[derive(Debug, Clone)]
pub(super) struct Metadata {
    /// A power of two, 1 to 256 MiB.
    pub(super) block_bytes: u64,
    pub(super) fixed: bool,
    pub(super) size_bytes: u64,
    /// 512 or 4096.
    pub(super) sector_bytes: u64,
    pub(super) disk_id: Option<Guid>,
}

impl Metadata {
    /// Reads the metadata of a disk without a parent; a disk with one is refused.
    pub(super) fn read(file: &dyn ReadAt, region: &Range<u64>, options: &OpenOptions) -> Result<Self, FormatError> {
        let items = Items::read(file, region)?;
        let parameters = items.required(FILE_PARAMETERS, 8, "file parameters")?;
        if le_u32(&parameters, 4) & HAS_PARENT != 0 {
            return Err(refuse_parent(&items, options)?);
        }
        let sector = |bytes: &[u8], what: &str| match le_u32(bytes, 0) {
            size @ (512 | 4096) => Ok(u64::from(size)),
            size => Err(corrupt(format!("{what} sectors of {size} bytes"))),
        };
        if let Some(bytes) = items.get(PHYSICAL_SECTOR, 4)? {
            sector(&bytes, "physical")?;
        }
        let metadata = Self {
            block_bytes: u64::from(le_u32(&parameters, 0)),
            fixed: le_u32(&parameters, 4) & FIXED != 0,
            size_bytes: le_u64(&items.required(DISK_SIZE, 8, "size of the disk")?, 0),
            sector_bytes: sector(&items.required(LOGICAL_SECTOR, 4, "logical sector size")?, "logical")?,
            disk_id: items.get(DISK_ID, 16)?.map(|bytes| Guid::read(&bytes, 0)),
        };
        metadata.check()?;
        Ok(metadata)
    }

    fn check(&self) -> Result<(), FormatError> {
        let block_bytes = self.block_bytes;
        if !block_bytes.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block_bytes) {
            return Err(corrupt(format!("block size of {block_bytes} bytes is not 1 to 256 MiB")));
        }
        check_size(self.size_bytes)?;
        if !self.size_bytes.is_multiple_of(self.sector_bytes) {
            let reason = "is not a multiple of the logical sector size";
            return Err(FormatError::VirtualSize { size_bytes: self.size_bytes, reason });
        }
        Ok(())
    }
}

/// Returns why a disk with a parent is not opened.
fn refuse_parent(items: &Items<'_>, options: &OpenOptions) -> Result<FormatError, FormatError> {
    if options.parent.is_some() {
        let name = "HasParent: differencing VHDX, not even with the parent at hand".to_owned();
        return Ok(FormatError::UnsupportedFeature { bit: HAS_PARENT_BIT, name });
    }
    let locator = items.get(PARENT_LOCATOR, 0)?.unwrap_or_default();
    Ok(FormatError::Differencing { format: Format::Vhdx, name: parent_name(&locator) })
}

fn parent_name(locator: &[u8]) -> String {
    let count = to_usize(le_u16(locator, 18).into());
    let pairs = locator.get(20..).unwrap_or_default().chunks_exact(12).take(count);
    let text = |at: u32, len: u16| {
        let bytes = locator.get(to_usize(at.into())..).unwrap_or_default();
        utf16(bytes.get(..usize::from(len)).unwrap_or_default())
    };
    // Of tens of thousands of pairs only short keys and one value are decoded.
    let key = |pair: &[u8]| text(le_u32(pair, 0), le_u16(pair, 8).min(MAX_PARENT_KEY_BYTES));
    let rank = |pair: &[u8]| PARENT_KEYS.iter().position(|known| *known == key(pair));
    let named = pairs.filter_map(|pair| Some((rank(pair)?, pair)));
    let best = named.min_by_key(|(rank, _)| *rank);
    best.map(|(_, pair)| text(le_u32(pair, 4), le_u16(pair, 10))).unwrap_or_default()
}

/// The items that are understood.
struct Items<'a> {
    file: &'a dyn ReadAt,
    /// Each kind once, with its place in the file.
    items: Vec<(Guid, Range<u64>)>,
}

impl<'a> Items<'a> {
    fn read(file: &'a dyn ReadAt, region: &Range<u64>) -> Result<Self, FormatError> {
        let table = read_vec(file, region.start, TABLE_BYTES)?;
        if !table.starts_with(b"metadata") {
            return Err(corrupt(format!("there is no metadata table at {:#x}", region.start)));
        }
        let count = le_u16(&table, 10);
        if count > MAX_ITEMS {
            return Err(corrupt(format!("metadata table too large: {count} items")));
        }
        let mut items = Self { file, items: Vec::new() };
        let entries = table.get(32..).unwrap_or_default().chunks_exact(TABLE_ENTRY_BYTES);
        for entry in entries.take(usize::from(count)) {
            items.take(entry, region)?;
        }
        Ok(items)
    }

    fn take(&mut self, entry: &[u8], region: &Range<u64>) -> Result<(), FormatError> {
        let (kind, flags) = (Guid::read(entry, 0), le_u32(entry, 24));
        if flags & USER_ITEM != 0 || !KNOWN.contains(&kind) {
            if flags & REQUIRED_ITEM == 0 {
                return Ok(());
            }
            let name = format!("required metadata {kind}");
            return Err(FormatError::UnsupportedFeature { bit: REQUIRED_ITEM_BIT, name });
        }
        if self.items.iter().any(|(other, _)| *other == kind) {
            return Err(corrupt(format!("metadata {kind} is there twice")));
        }
        let (offset, len) = (u64::from(le_u32(entry, 16)), u64::from(le_u32(entry, 20)));
        if offset < TABLE_BYTES || len > MAX_ITEM_BYTES || offset + len > region.end - region.start {
            return Err(corrupt(format!("metadata {kind} at {offset:#x} of {len} bytes is not in its region")));
        }
        self.items.push((kind, region.start + offset..region.start + offset + len));
        Ok(())
    }

    /// Reads an item of at least `min_bytes`, if it is there.
    fn get(&self, kind: Guid, min_bytes: u64) -> Result<Option<Vec<u8>>, FormatError> {
        let Some((_, range)) = self.items.iter().find(|(other, _)| *other == kind) else { return Ok(None) };
        let len = range.end - range.start;
        if len < min_bytes {
            return Err(corrupt(format!("metadata {kind} has {len} of {min_bytes} bytes")));
        }
        read_vec(self.file, range.start, len).map(Some)
    }

    fn required(&self, kind: Guid, min_bytes: u64, what: &str) -> Result<Vec<u8>, FormatError> {
        self.get(kind, min_bytes)?.ok_or_else(|| corrupt(format!("the metadata lack the {what}")))
    }
}
