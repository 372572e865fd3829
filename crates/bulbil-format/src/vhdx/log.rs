//! The log: what a program that did not close the file meant to write to its tables (MS-VHDX 2.3).
//!
//! ```text
//! log      sectors of 4 KiB, a ring
//! entry    0   4 "loge"         4  4 CRC-32C of the entry, this field as zeros    8  4 length   12  4 tail
//!         16   8 sequence      24  4 descriptors    32 16 log GUID
//!         48   8 length of the file when it was flushed    56  8 length of the file afterwards
//!         64  32 for each descriptor:
//!              0   4 "desc"     4  4 last bytes     8  8 first bytes    16  8 offset    24  8 sequence
//!              0   4 "zero"                         8  8 length         16  8 offset    24  8 sequence
//!         then, for each "desc", a sector:
//!              0   4 "data"     4  4 sequence, high     8  4084 content     4092  4 sequence, low
//! ```
//!
//! Entries of the current log GUID whose numbers follow each other are a sequence. The valid one that ends with the
//! highest number is active: its last entry, the head, says where the tail is, the first entry that may not have
//! reached the file. All entries from the tail to the head are laid over the file; the file itself stays as it is.
//!
//! An entry has exactly the sectors its descriptors need, and none but its first begins like an entry. So no two
//! entries overlap, and the search takes time in proportion to the log, whatever is in it.

use std::ops::Range;
use std::sync::Arc;

use super::guid::Guid;
use super::header::Header;
use super::overlay::{Overlay, Patches};
use super::{checksum_of, corrupt, read_vec};
use crate::bytes::{le_u32, le_u64, to_u64, to_usize};
use crate::error::need;
use crate::{FormatError, ReadAt};

pub(super) const SECTOR_BYTES: usize = 4096;
const ENTRY_HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;
/// Windows makes logs of 1 MiB; with QEMU the user may choose. It is kept in memory.
const MAX_LOG_BYTES: u64 = 64 << 20;
/// 20 MiB of memory. A log of 1 MiB has no room for more than 32768.
const MAX_DESCRIPTORS: usize = 1 << 18;

/// A file as it is with the log applied.
pub(super) struct Replayed {
    pub(super) file: Arc<dyn ReadAt>,
    /// How many entries were applied.
    pub(super) entries: usize,
}

/// Applies the log of a file in memory.
pub(super) fn replay(file: Arc<dyn ReadAt>, header: &Header) -> Result<Replayed, FormatError> {
    if header.log_version != 0 {
        let name = format!("VHDX with a log of version {}", header.log_version);
        return Err(FormatError::UnsupportedFormat { name });
    }
    let len = header.log.end - header.log.start;
    if len > MAX_LOG_BYTES {
        let what = format!("a log in use of {len} bytes");
        return Err(FormatError::TooLarge { what, limit: MAX_LOG_BYTES });
    }
    let mut log = Ring { bytes: read_vec(&*file, header.log.start, len)? };
    let Some(entries) = active_sequence(&log, header.log_guid) else {
        let what = "the log is in use, but has no valid sequence of entries; try `qemu-img check -r all` on a copy";
        return Err(corrupt(what));
    };
    let head = entries.last().map_or(0, |head| head.flushed_bytes);
    need(file.len_bytes(), head, "the file its log was written for")?;
    let len_bytes = entries.iter().map(|entry| entry.file_bytes).fold(file.len_bytes(), u64::max);
    let patches = collect(&mut log, &entries, len_bytes)?;
    let file = Overlay::new(file, len_bytes, log.bytes, patches);
    Ok(Replayed { file: Arc::new(file), entries: entries.len() })
}

/// The sectors of a log, the first of which follows the last.
struct Ring {
    bytes: Vec<u8>,
}

impl Ring {
    fn sectors(&self) -> usize {
        self.bytes.len() / SECTOR_BYTES
    }

    /// Returns where a sector is that may lie behind the end.
    fn position(&self, sector: usize) -> usize {
        sector.checked_rem(self.sectors()).unwrap_or_default() * SECTOR_BYTES
    }

    /// Returns a sector, or nothing if the log is empty.
    fn sector(&self, sector: usize) -> &[u8] {
        let at = self.position(sector);
        self.bytes.get(at..at + SECTOR_BYTES).unwrap_or_default()
    }
}

/// An entry that is whole.
#[derive(Debug, Clone, Copy)]
struct Entry {
    first_sector: usize,
    sectors: usize,
    tail_sector: usize,
    sequence: u64,
    descriptors: usize,
    flushed_bytes: u64,
    file_bytes: u64,
}

/// What one descriptor says.
enum Descriptor {
    Zero(Range<u64>),
    Data { offset: u64, first: [u8; 8], last: [u8; 4] },
}

impl Entry {
    /// Returns the entry that begins at a sector, if there is one and all of it is there.
    fn parse(log: &Ring, first_sector: usize, guid: Guid) -> Option<Self> {
        let head = log.sector(first_sector);
        let (len, tail) = (to_usize(le_u32(head, 8).into()), to_usize(le_u32(head, 12).into()));
        let entry = Self {
            first_sector,
            sectors: len / SECTOR_BYTES,
            tail_sector: tail / SECTOR_BYTES,
            sequence: le_u64(head, 16),
            descriptors: to_usize(le_u32(head, 24).into()),
            flushed_bytes: le_u64(head, 48),
            file_bytes: le_u64(head, 56),
        };
        let fields = head.starts_with(b"loge")
            && Guid::read(head, 32) == guid
            && len.is_multiple_of(SECTOR_BYTES)
            && (1..=log.sectors()).contains(&entry.sectors)
            && tail.is_multiple_of(SECTOR_BYTES)
            && entry.tail_sector < log.sectors()
            && entry.sequence != 0
            && entry.descriptor_sectors() <= entry.sectors;
        // In this order: the checksum is looked at only where no other entry can begin in between.
        (fields && entry.has_its_parts(log) && entry.checksum(log) == le_u32(head, 4)).then_some(entry)
    }

    fn descriptor_sectors(&self) -> usize {
        (ENTRY_HEADER_BYTES + self.descriptors * DESCRIPTOR_BYTES).div_ceil(SECTOR_BYTES)
    }

    fn descriptor(&self, log: &Ring, number: usize) -> Option<Descriptor> {
        let at = ENTRY_HEADER_BYTES + number * DESCRIPTOR_BYTES;
        let bytes = log.sector(self.first_sector + at / SECTOR_BYTES).get(at % SECTOR_BYTES..)?;
        let (offset, zeros) = (le_u64(bytes, 16), le_u64(bytes, 8));
        let sector_bytes = to_u64(SECTOR_BYTES);
        if le_u64(bytes, 24) != self.sequence || !offset.is_multiple_of(sector_bytes) {
            return None;
        }
        match bytes.get(..4)? {
            b"zero" if zeros.is_multiple_of(sector_bytes) => Some(Descriptor::Zero(offset..offset.checked_add(zeros)?)),
            b"desc" => {
                let (last, first) = (le_u32(bytes, 4).to_le_bytes(), le_u64(bytes, 8).to_le_bytes());
                Some(Descriptor::Data { offset, first, last })
            }
            _ => None,
        }
    }

    /// Whether every descriptor and every data sector says that it is one of this entry.
    fn has_its_parts(&self, log: &Ring) -> bool {
        let mut next = self.descriptor_sectors();
        for number in 0..self.descriptors {
            match self.descriptor(log, number) {
                None => return false,
                Some(Descriptor::Zero(_)) => {}
                Some(Descriptor::Data { .. }) => next += 1,
            }
        }
        let is_data = |sector| {
            let bytes = log.sector(self.first_sector + sector);
            let sequence = u64::from(le_u32(bytes, 4)) << 32 | u64::from(le_u32(bytes, SECTOR_BYTES - 4));
            bytes.starts_with(b"data") && sequence == self.sequence
        };
        next == self.sectors && (self.descriptor_sectors()..self.sectors).all(is_data)
    }

    fn checksum(&self, log: &Ring) -> u32 {
        checksum_of((0..self.sectors).map(|sector| log.sector(self.first_sector + sector)))
    }
}

/// Returns the entries from the tail to the head of the active sequence.
fn active_sequence(log: &Ring, guid: Guid) -> Option<Vec<Entry>> {
    let entries: Vec<_> = (0..log.sectors()).map(|sector| Entry::parse(log, sector, guid)).collect();
    let (mut active, mut sector): (Option<Vec<Entry>>, _) = (None, 0);
    while sector < entries.len() {
        let sequence = sequence_from(&entries, sector);
        // What begins within a sequence has the same head and is no longer.
        sector += sequence.iter().map(|entry| entry.sectors).sum::<usize>().max(1);
        let Some(head) = sequence.last() else { continue };
        let tail = sequence.iter().position(|entry| entry.first_sector == head.tail_sector);
        let newest = active.as_ref().and_then(|active| active.last()).map_or(0, |head| head.sequence);
        if let Some(tail) = tail.filter(|_| head.sequence > newest) {
            active = sequence.get(tail..).map(<[Entry]>::to_vec);
        }
    }
    active
}

/// Returns the entries whose numbers follow each other, from a sector on.
fn sequence_from(entries: &[Option<Entry>], first_sector: usize) -> Vec<Entry> {
    let at = |sector: usize| entries.get(sector % entries.len().max(1)).copied().flatten();
    let next = |entry: &Entry| {
        let follower = at(entry.first_sector + entry.sectors)?;
        (entry.sequence.checked_add(1) == Some(follower.sequence)).then_some(follower)
    };
    std::iter::successors(at(first_sector), next).collect()
}

/// Lists what entries write, the last word on each byte; content stays in the log, made whole.
fn collect(log: &mut Ring, entries: &[Entry], len_bytes: u64) -> Result<Patches, FormatError> {
    let count: usize = entries.iter().map(|entry| entry.descriptors).sum();
    if count > MAX_DESCRIPTORS {
        let what = format!("a log of {count} descriptors");
        return Err(FormatError::TooLarge { what, limit: to_u64(MAX_DESCRIPTORS) });
    }
    let mut patches = Patches::default();
    for entry in entries {
        let mut data_sector = entry.first_sector + entry.descriptor_sectors();
        let descriptors: Vec<_> = (0..entry.descriptors).filter_map(|number| entry.descriptor(log, number)).collect();
        for descriptor in descriptors {
            match descriptor {
                Descriptor::Zero(range) => patches.zero(in_file(range, len_bytes)?),
                Descriptor::Data { offset, first, last } => {
                    let range = in_file(offset..offset.saturating_add(to_u64(SECTOR_BYTES)), len_bytes)?;
                    let position = log.position(data_sector);
                    restore(log.bytes.get_mut(position..position + SECTOR_BYTES).unwrap_or_default(), first, last);
                    patches.copy(range, position);
                    data_sector += 1;
                }
            }
        }
    }
    Ok(patches)
}

fn in_file(range: Range<u64>, len_bytes: u64) -> Result<Range<u64>, FormatError> {
    if range.end <= len_bytes {
        return Ok(range);
    }
    Err(corrupt(format!("the log writes up to {:#x} in a file of {len_bytes:#x} bytes", range.end)))
}

/// Puts back the bytes of a data sector that its marks took the place of.
fn restore(sector: &mut [u8], first: [u8; 8], last: [u8; 4]) {
    if let Some(start) = sector.first_chunk_mut() {
        *start = first;
    }
    if let Some(end) = sector.last_chunk_mut() {
        *end = last;
    }
}
