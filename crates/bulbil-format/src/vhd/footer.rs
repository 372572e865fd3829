//! The footer: what every VHD ends with, and what all but fixed ones begin with.
//!
//! ```text
//! offset  bytes  field                                offset  bytes  field
//!      0      8  "conectix"                               48      8  current size
//!      8      4  features: 2 is always set                56      4  geometry: cylinders u16, heads, sectors u8
//!     12      4  version: 0x00010000                      60      4  type: 2 fixed, 3 dynamic, 4 differencing
//!     16      8  dynamic header; ff.. if fixed            64      4  checksum
//!     24      4  made at, seconds since 2000              68     16  identifier
//!     28      4  creator application                      84      1  1 if the machine is in saved state
//!     32      4  creator version                          85    427  0
//!     36      4  creator's operating system
//!     40      8  original size                           511         Virtual PC before 2004 ended here
//! ```
//!
//! All integers are big-endian. The checksum is the complement of the sum of all bytes, its own taken as zeros.
//! Microsoft Virtual Hard Disk Image Format Specification, version 1.0, "Hard Disk Footer Format".

use crate::bytes::{be_u32, be_u64, bytes_at, put, to_u64, to_usize};
use crate::disk::{SECTOR_BYTES, check_size};
use crate::error::need;
use crate::{FormatError, Identity, ReadAt};

pub(super) const FOOTER_BYTES: u64 = 512;
/// The footer without its last byte, as Virtual PC before 2004 wrote it.
const SHORT_FOOTER_BYTES: u64 = 511;
const COOKIE: &[u8; 8] = b"conectix";
const CHECKSUM_AT: usize = 64;
/// The major version is in the upper half; minor ones are compatible.
const MAJOR_VERSION: u32 = 1;

/// The kinds of VHD there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
    Differencing,
}

impl Kind {
    fn parse(code: u32) -> Result<Self, FormatError> {
        match code {
            2 => Ok(Self::Fixed),
            3 => Ok(Self::Dynamic),
            4 => Ok(Self::Differencing),
            _ => Err(FormatError::UnsupportedFormat { name: format!("VHD of type {code}") }),
        }
    }

    fn code(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// A footer of which every field that is used was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) kind: Kind,
    pub(super) size_bytes: u64,
    /// Where the dynamic header is; without meaning for a fixed disk.
    pub(super) header_offset: u64,
    pub(super) identifier: [u8; 16],
    pub(super) creator: Option<String>,
    pub(super) saved_state: bool,
}

impl Footer {
    /// Reads the footer at the end of a file; returns it and where it begins.
    pub(super) fn read_last(file: &dyn ReadAt) -> Result<(Self, u64), FormatError> {
        let len_bytes = file.len_bytes();
        for footer_bytes in [FOOTER_BYTES, SHORT_FOOTER_BYTES] {
            let Some(offset) = len_bytes.checked_sub(footer_bytes) else { continue };
            let bytes = read_at(file, offset)?;
            if bytes.starts_with(COOKIE) {
                return Ok((Self::parse(&bytes, "the footer")?, offset));
            }
        }
        // Whatever brought the caller here was at the beginning: that of a dynamic disk of which the end is missing.
        need(len_bytes, len_bytes.saturating_add(FOOTER_BYTES), "the footer")?;
        Err(FormatError::corrupt("no footer"))
    }

    /// Reads what a file begins with if that is a footer.
    pub(super) fn read_first(file: &dyn ReadAt) -> Result<Option<Self>, FormatError> {
        let bytes = read_at(file, 0)?;
        let is_footer = bytes.starts_with(COOKIE);
        is_footer.then(|| Self::parse(&bytes, "the copy of the footer at byte 0x0")).transpose()
    }

    fn parse(bytes: &[u8], what: &'static str) -> Result<Self, FormatError> {
        if be_u32(bytes, CHECKSUM_AT) != checksum(bytes, CHECKSUM_AT) {
            return Err(FormatError::checksum(what));
        }
        let version = be_u32(bytes, 12);
        if version >> 16 != MAJOR_VERSION {
            let name = format!("VHD version {}.{}", version >> 16, version & 0xffff);
            return Err(FormatError::UnsupportedFormat { name });
        }
        let kind = Kind::parse(be_u32(bytes, 60))?;
        let size_bytes = be_u64(bytes, 48);
        check_size(size_bytes)?;
        Ok(Self {
            kind,
            size_bytes,
            header_offset: be_u64(bytes, 16),
            identifier: bytes_at(bytes, 68),
            creator: printable(&bytes_at::<4>(bytes, 28)),
            saved_state: bytes.get(84).is_some_and(|state| *state != 0),
        })
    }
}

/// Reads a footer's length from an offset; past the end of the file there are zeros.
fn read_at(file: &dyn ReadAt, offset: u64) -> Result<[u8; 512], FormatError> {
    let mut bytes = [0; 512];
    let in_file = file.len_bytes().saturating_sub(offset).min(to_u64(bytes.len()));
    let (stored, _) = bytes.split_at_mut(to_usize(in_file));
    file.read_exact_at(stored, offset).map_err(FormatError::read(offset))?;
    Ok(bytes)
}

/// Computes the checksum of a structure that keeps it at `checksum_at`.
pub(super) fn checksum(bytes: &[u8], checksum_at: usize) -> u32 {
    let covered = |(at, _): &(usize, &u8)| !(checksum_at..checksum_at + 4).contains(at);
    let sum = bytes.iter().enumerate().filter(covered).fold(0_u32, |sum, (_, byte)| sum.wrapping_add((*byte).into()));
    !sum
}

fn printable(bytes: &[u8]) -> Option<String> {
    let text: String = bytes.iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect();
    (!text.is_empty()).then_some(text)
}

/// From 1970 to 2000, where the times of VHDs begin.
const EPOCH_UNIX_S: u64 = 946_684_800;

/// Makes the footer of a new image.
pub(super) fn encode(kind: Kind, size_bytes: u64, header_offset: u64, identity: &Identity) -> [u8; 512] {
    let made_at = u32::try_from(identity.created_unix_s.saturating_sub(EPOCH_UNIX_S)).unwrap_or(u32::MAX);
    let mut bytes = [0; 512];
    put(&mut bytes, 0, *COOKIE);
    put(&mut bytes, 8, 2_u32.to_be_bytes());
    put(&mut bytes, 12, 0x0001_0000_u32.to_be_bytes());
    put(&mut bytes, 16, header_offset.to_be_bytes());
    put(&mut bytes, 24, made_at.to_be_bytes());
    // QEMU takes the geometry for the size, which is too small, unless the creator is one that it knows: `win `,
    // `qem2`, `d2v `, `tap` or `CTXS`. This is Hyper-V's, with the version and system of Windows 10.
    put(&mut bytes, 28, *b"win ");
    put(&mut bytes, 32, 0x000a_0000_u32.to_be_bytes());
    put(&mut bytes, 36, *b"Wi2k");
    put(&mut bytes, 40, size_bytes.to_be_bytes());
    put(&mut bytes, 48, size_bytes.to_be_bytes());
    put(&mut bytes, 56, geometry(size_bytes));
    put(&mut bytes, 60, kind.code().to_be_bytes());
    put(&mut bytes, 68, identity.derive(0));
    let sum = checksum(&bytes, CHECKSUM_AT);
    put(&mut bytes, CHECKSUM_AT, sum.to_be_bytes());
    bytes
}

/// Computes cylinders, heads and sectors as the appendix "CHS Calculation" of the specification does: the largest
/// geometry that fits in the disk.
fn geometry(size_bytes: u64) -> [u8; 4] {
    let sectors = (size_bytes / SECTOR_BYTES).min(65535 * 16 * 255);
    let (heads, per_track) = if sectors >= 65535 * 16 * 63 {
        (16, 255)
    } else {
        let few = (sectors / 17).div_ceil(1024).max(4);
        if few <= 16 && sectors / 17 < few * 1024 {
            (few, 17)
        } else if sectors / 31 < 16 * 1024 {
            (16, 31)
        } else {
            (16, 63)
        }
    };
    let [.., high, low] = (sectors / per_track / heads).to_be_bytes();
    let ([.., heads], [.., per_track]) = (heads.to_be_bytes(), per_track.to_be_bytes());
    [high, low, heads, per_track]
}
