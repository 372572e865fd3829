//! The members of a tar archive: POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU.
//!
//! Each member is a header of 512 bytes and its content, padded to 512. A block of zeros ends the archive.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 100 | name |
//! | 124 | 12 | size: octal digits, or a big-endian number if the first bit is set |
//! | 148 | 8 | sum of all bytes, with spaces for these eight |
//! | 156 | 1 | type: `0` file, `5` folder, `x` and `g` pax records, `L` long name (GNU), `S` file with holes (GNU) |
//! | 257 | 8 | `ustar`, NUL, `00`; or `ustar`, two spaces, NUL for GNU |
//! | 345 | 155 | what comes before the name, with a slash (ustar) |
//! | 386 | 4 × 24 | where content is in a file with holes (GNU): offset and length |
//! | 482 | 1 | whether blocks of 21 further such pairs follow |
//! | 483 | 12 | size of the file with its holes (GNU) |

use std::sync::Arc;

use crate::bytes::{bytes_at, is_zero, to_usize};
use crate::error::need;
use crate::{FormatError, ReadAt};

use super::bad;
use super::section::{Section, Segment};

const BLOCK_BYTES: u64 = 512;
/// An OVA has a handful of members.
const MAX_MEMBERS: usize = 1024;
/// A long name, or the pax records of one member.
const MAX_RECORD_BYTES: u64 = 64 << 10;
/// Stored ranges of all files with holes; 24 MiB in memory.
const MAX_SEGMENTS: usize = 1 << 20;

/// A regular file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// The name as it is stored, without a leading `./`.
    pub(super) name: String,
    pub(super) len_bytes: u64,
    segments: Vec<Segment>,
}

impl Member {
    /// Returns the content as a file.
    pub(super) fn open(&self, file: &Arc<dyn ReadAt>) -> Arc<dyn ReadAt> {
        Arc::new(Section::new(Arc::clone(file), self.segments.clone(), self.len_bytes))
    }

    /// Reads the whole content, if it is no more than `limit_bytes`.
    pub(super) fn read(&self, file: &Arc<dyn ReadAt>, limit_bytes: u64) -> Result<Vec<u8>, FormatError> {
        if self.len_bytes > limit_bytes {
            return Err(FormatError::TooLarge { what: format!("{:?} in the archive", self.name), limit: limit_bytes });
        }
        let mut bytes = vec![0; to_usize(self.len_bytes)];
        self.open(file).read_exact_at(&mut bytes, 0).map_err(FormatError::read(0))?;
        Ok(bytes)
    }
}

/// Lists the regular files of an archive.
pub(super) fn members(file: &dyn ReadAt) -> Result<Vec<Member>, FormatError> {
    let mut walk = Walk { file, at: 0, long_name: None, pax: Pax::default(), segments: 0 };
    let mut members = Vec::new();
    for _ in 0..MAX_MEMBERS {
        match walk.next()? {
            Step::End => return Ok(members),
            Step::Member(member) => members.push(member),
            Step::Other => {}
        }
    }
    Err(FormatError::TooLarge { what: "the number of members of the archive".to_owned(), limit: MAX_MEMBERS as u64 })
}

enum Step {
    Member(Member),
    /// A folder, or something about the next member.
    Other,
    End,
}

struct Walk<'a> {
    file: &'a dyn ReadAt,
    /// The next header.
    at: u64,
    long_name: Option<String>,
    pax: Pax,
    /// Stored ranges of files with holes up to here.
    segments: usize,
}

/// What pax records say about the next member.
#[derive(Debug, Default)]
struct Pax {
    path: Option<String>,
    size: Option<u64>,
}

impl Walk<'_> {
    fn next(&mut self) -> Result<Step, FormatError> {
        let header_at = self.at;
        // An archive without the blocks of zeros is not the worse for it.
        if header_at >= self.file.len_bytes() {
            return Ok(Step::End);
        }
        let header = self.read_block()?;
        if is_zero(&header) {
            return Ok(Step::End);
        }
        check_header(&header, header_at)?;
        let stored_bytes =
            number(&header, 124).ok_or_else(|| bad(format!("the header at {header_at:#x} has no size")))?;
        match bytes_at::<1>(&header, 156) {
            [b'x'] => self.pax = Pax::parse(&self.read_record(stored_bytes)?)?,
            [b'g'] => Pax::parse(&self.read_record(stored_bytes)?)?.check_empty()?,
            [b'L'] => self.long_name = Some(text(&self.read_record(stored_bytes)?)),
            [b'5'] => {
                // What was said of the folder is not for the file that follows.
                self.take_name(&header);
                self.pax = Pax::default();
                self.skip(stored_bytes)?;
            }
            [b'0' | b'7' | 0] => {
                let name = self.take_name(&header);
                let len_bytes = std::mem::take(&mut self.pax).size.unwrap_or(stored_bytes);
                let segment = Segment { start_bytes: 0, len_bytes, host_offset: self.at };
                self.skip(len_bytes)?;
                let segments = if len_bytes == 0 { Vec::new() } else { vec![segment] };
                return Ok(Step::Member(Member { name, len_bytes, segments }));
            }
            [b'S'] => return self.take_sparse(&header, stored_bytes).map(Step::Member),
            [kind] => {
                let (name, kind) = (self.take_name(&header), char::from(kind));
                return Err(bad(format!("{name:?} is not a file, but a link or device of type {kind:?}")));
            }
        }
        Ok(Step::Other)
    }

    fn read_block(&mut self) -> Result<[u8; 512], FormatError> {
        let end_bytes = self.at.saturating_add(BLOCK_BYTES);
        need(self.file.len_bytes(), end_bytes, "a header of the archive")?;
        let mut block = [0; 512];
        self.file.read_exact_at(&mut block, self.at).map_err(FormatError::read(self.at))?;
        self.at = end_bytes;
        Ok(block)
    }

    fn read_record(&mut self, len_bytes: u64) -> Result<Vec<u8>, FormatError> {
        if len_bytes > MAX_RECORD_BYTES {
            let what = format!("a name of {len_bytes} bytes in the archive");
            return Err(FormatError::TooLarge { what, limit: MAX_RECORD_BYTES });
        }
        let start = self.at;
        self.skip(len_bytes)?;
        let mut record = vec![0; to_usize(len_bytes)];
        self.file.read_exact_at(&mut record, start).map_err(FormatError::read(start))?;
        Ok(record)
    }

    /// Moves on to the header after content; the padding of the last member may be missing.
    fn skip(&mut self, len_bytes: u64) -> Result<(), FormatError> {
        let end_bytes = self.at.saturating_add(len_bytes);
        need(self.file.len_bytes(), end_bytes, "a member of the archive")?;
        self.at = end_bytes.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
        Ok(())
    }

    fn take_name(&mut self, header: &[u8; 512]) -> String {
        let long = self.long_name.take();
        let name = self.pax.path.take().or(long).unwrap_or_else(|| stored_name(header));
        name.strip_prefix("./").map(str::to_owned).unwrap_or(name)
    }

    /// Reads the map of a file with holes, which `tar -S` of GNU writes.
    fn take_sparse(&mut self, header: &[u8; 512], stored_bytes: u64) -> Result<Member, FormatError> {
        let name = self.take_name(header);
        let damaged = || bad(format!("the map of holes of {name:?} makes no sense"));
        let len_bytes = number(header, 483).ok_or_else(damaged)?;
        let mut pairs = pairs(header, 386, 4);
        let mut more = bytes_at::<1>(header, 482) != [0];
        while more {
            let block = self.read_block()?;
            pairs.extend(self::pairs(&block, 0, 21));
            more = bytes_at::<1>(&block, 504) != [0];
            if self.segments + pairs.len() > MAX_SEGMENTS {
                let what = format!("the number of holes up to those of {name:?}");
                return Err(FormatError::TooLarge { what, limit: MAX_SEGMENTS as u64 });
            }
        }
        self.segments += pairs.len();
        let segments = place_segments(&pairs, self.at, stored_bytes, len_bytes).ok_or_else(damaged)?;
        self.pax = Pax::default();
        self.skip(stored_bytes)?;
        Ok(Member { name, len_bytes, segments })
    }
}

/// Reads pairs of offset and length; `None` for one that is not a number.
fn pairs(block: &[u8], at: usize, count: usize) -> Vec<Option<(u64, u64)>> {
    let pair = |at: usize| number(block, at).zip(number(block, at + 12));
    // An entry of zeros is not used.
    let used = |at: &usize| bytes_at::<24>(block, *at) != [0; 24];
    (0..count).map(|index| at + 24 * index).filter(used).map(pair).collect()
}

/// Finds the stored bytes of each range: they follow each other from `host_offset` on, `stored_bytes` in all.
fn place_segments(
    pairs: &[Option<(u64, u64)>],
    host_offset: u64,
    stored_bytes: u64,
    len_bytes: u64,
) -> Option<Vec<Segment>> {
    let (mut segments, mut end_bytes, mut host) = (Vec::with_capacity(pairs.len()), 0, host_offset);
    for pair in pairs {
        let (start_bytes, segment_bytes) = (*pair)?;
        if start_bytes < end_bytes {
            return None;
        }
        end_bytes = start_bytes.checked_add(segment_bytes).filter(|end| *end <= len_bytes)?;
        // The last pair of GNU tar is empty and says where the file ends.
        if segment_bytes > 0 {
            segments.push(Segment { start_bytes, len_bytes: segment_bytes, host_offset: host });
        }
        host = host.checked_add(segment_bytes)?;
    }
    (host - host_offset == stored_bytes).then_some(segments)
}

fn check_header(header: &[u8; 512], at: u64) -> Result<(), FormatError> {
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let stored: u64 = header.iter().skip(148).take(8).map(|byte| u64::from(*byte)).sum();
    if number_of(&bytes_at::<8>(header, 148)) == Some(sum - stored + 8 * u64::from(b' ')) {
        return Ok(());
    }
    Err(FormatError::checksum(format!("the header of the archive at {at:#x}")))
}

fn number(block: &[u8], at: usize) -> Option<u64> {
    number_of(&bytes_at::<12>(block, at))
}

/// Reads a number in octal digits, or in binary if the first bit is set.
fn number_of(field: &[u8]) -> Option<u64> {
    if let Some((first @ 0x80.., rest)) = field.split_first() {
        // Negative numbers begin with 0xff.
        let (high, low) = rest.split_at(rest.len().checked_sub(8)?);
        let small = *first == 0x80 && is_zero(high);
        return small.then(|| low.first_chunk().copied().map(u64::from_be_bytes)).flatten();
    }
    let digits = field.iter().position(|byte| *byte == 0).map_or(field, |end| field.get(..end).unwrap_or_default());
    let digits = digits.trim_ascii();
    let plain = !digits.is_empty() && digits.iter().all(|digit| (b'0'..=b'7').contains(digit));
    plain
        .then(|| digits.iter().try_fold(0_u64, |sum, digit| sum.checked_mul(8)?.checked_add(u64::from(digit - b'0'))))?
}

/// The bytes before the first zero, as text.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn stored_name(header: &[u8; 512]) -> String {
    let name = text(&bytes_at::<100>(header, 0));
    let prefix = text(&bytes_at::<155>(header, 345));
    let is_posix = bytes_at(header, 257) == *b"ustar\0";
    if is_posix && !prefix.is_empty() { format!("{prefix}/{name}") } else { name }
}

impl Pax {
    /// Parses records of the form `length key=value\n`.
    fn parse(mut records: &[u8]) -> Result<Self, FormatError> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) = split_record(records).ok_or_else(|| bad("pax records that make no sense"))?;
            match key {
                "path" => pax.path = Some(String::from_utf8_lossy(value).into_owned()),
                "size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
                    pax.size = Some(size.ok_or_else(|| bad("a pax record with a size that is no number"))?);
                }
                key if key.starts_with("GNU.sparse.") => {
                    return Err(bad("a file with holes in the format of pax; make the archive with --format=gnu"));
                }
                _ => {}
            }
            records = rest;
        }
        Ok(pax)
    }

    fn check_empty(&self) -> Result<(), FormatError> {
        if self.path.is_none() && self.size.is_none() { Ok(()) } else { Err(bad("pax records name every member")) }
    }
}

fn split_record(records: &[u8]) -> Option<(&str, &[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let len: usize = std::str::from_utf8(records.get(..space)?).ok()?.parse().ok()?;
    let (record, rest) = records.split_at_checked(len)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = record.split_at_checked(equals)?;
    Some((std::str::from_utf8(key).ok()?, value.get(1..)?, rest))
}
