//! Makes the checksums of a damaged image right again.
//!
//! Mutations break checksums, and a reader that finds one broken looks no further: without this, everything behind the
//! checksum would remain untested.

use bulbil_format::{Format, ReadAt as _};

use super::SparseFile;
use super::options::Options;

/// Recomputes what the format has of checksums; without a format, those of a tar archive.
pub(crate) fn fix(format: Option<Format>, file: &mut SparseFile, options: Options) {
    match format {
        Some(Format::Vhd) => fix_vhd(file, options),
        Some(Format::Vhdx) => fix_vhdx(file),
        None => fix_tar(file),
        _ => {}
    }
}

/// The footer at the end, its copy at the beginning, the header of a dynamic disk.
fn fix_vhd(file: &mut SparseFile, options: Options) {
    let Some(last) = file.len_bytes().checked_sub(512) else { return };
    let first: [u8; 512] = file.read(0);
    let dynamic_header = u64::from_be_bytes(file.read(16));
    if first.starts_with(b"conectix") {
        fix_sum::<512>(file, 0, 64);
        if options.copies_footer() {
            let first: [u8; 512] = file.read(0);
            file.write(last, &first);
        }
    }
    if file.read(last) == *b"conectix" {
        fix_sum::<512>(file, last, 64);
    }
    if dynamic_header <= file.len_bytes().saturating_sub(1024) && file.read(dynamic_header) == *b"cxsparse" {
        fix_sum::<1024>(file, dynamic_header, 36);
    }
}

/// The ones' complement of the sum of all bytes, those of the checksum left out.
fn fix_sum<const N: usize>(file: &mut SparseFile, offset: u64, field: usize) {
    let mut bytes: [u8; N] = file.read(offset);
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    file.write(offset + field as u64, &(!sum).to_be_bytes());
}

/// The footer of a fixed disk.
pub(crate) fn vhd_fixed_footer(size_bytes: [u8; 8], identifier: [u8; 16]) -> Vec<u8> {
    let mut file = SparseFile::default();
    let fields: [(u64, &[u8]); 7] = [
        (0, b"conectix"),
        (12, &[0, 1]),
        (16, &[0xff; 8]),
        (48, &size_bytes),
        (60, &[0, 0, 0, 2]),
        (68, &identifier),
        (511, &[0]),
    ];
    fields.iter().for_each(|(at, field)| file.write(*at, field));
    fix_sum::<512>(&mut file, 0, 64);
    file.read::<512>(0).to_vec()
}

const VHDX_HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const VHDX_REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const MAX_LOG_ENTRIES: usize = 16;

/// Both headers, both region tables, and the entries of the log that the headers name.
fn fix_vhdx(file: &mut SparseFile) {
    // A file that was cut keeps its length.
    if file.len_bytes() < 320 << 10 {
        return;
    }
    for offset in VHDX_HEADERS {
        fix_crc(file, offset, 4 << 10);
    }
    for offset in VHDX_REGION_TABLES {
        fix_crc(file, offset, 64 << 10);
    }
    let log_bytes = u64::from(u32::from_le_bytes(file.read(VHDX_HEADERS[0] + 68)));
    let log_offset = u64::from_le_bytes(file.read(VHDX_HEADERS[0] + 72));
    let log_end = log_offset.saturating_add(log_bytes).min(file.len_bytes());
    let mut at = log_offset;
    for _ in 0..MAX_LOG_ENTRIES {
        if at >= log_end || file.read(at) != *b"loge" {
            break;
        }
        let len = u64::from(u32::from_le_bytes(file.read(at + 8)));
        if len < 4096 || at + len > log_end {
            break;
        }
        fix_crc(file, at, len);
        at += len;
    }
}

/// CRC-32C over `len` bytes, the field of four bytes at the fourth taken as zeros.
fn fix_crc(file: &mut SparseFile, offset: u64, len: u64) {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.copy_to(&mut bytes, offset);
    bytes[4..8].fill(0);
    file.write(offset + 4, &crc32c::crc32c(&bytes).to_le_bytes());
}

const MAX_MEMBERS: usize = 16;

/// The header of every member: the sum of its bytes, with spaces for the sum itself.
fn fix_tar(file: &mut SparseFile) {
    let mut at = 0;
    for _ in 0..MAX_MEMBERS {
        if at + 512 > file.len_bytes() {
            break;
        }
        let mut header: [u8; 512] = file.read(at);
        if !header[257..].starts_with(b"ustar") {
            break;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        file.write(at + 148, format!("{sum:06o}\0 ").as_bytes());
        let size = header[124..135].iter().filter(|byte| (b'0'..=b'7').contains(*byte));
        let size = size.fold(0_u64, |size, digit| size << 3 | u64::from(digit - b'0'));
        at += 512 + size.next_multiple_of(512);
    }
}
