//! Hostile VHDs.

use std::path::Path;

use bulbil_format::Format;

use super::Case;
use super::images::*;

const FREE: u32 = u32::MAX;

/// Five blocks of 4 KiB, three of them stored; the table is at 1536.
fn image() -> Vec<u8> {
    vhd_dynamic(20 << 10, &[4, FREE, 13, FREE, 22])
}

/// With another word in both footers.
fn with_footer_word(image: Vec<u8>, at: usize, word: &[u8]) -> Vec<u8> {
    let last = image.len() - 512;
    let mut image = poked(image, &[(at, word), (last + at, word)]);
    fix_vhd_sum(&mut image[..512], 64);
    fix_vhd_sum(&mut image[last..], 64);
    image
}

fn with_header_word(at: usize, word: &[u8]) -> Vec<u8> {
    let mut image = poked(image(), &[(512 + at, word)]);
    fix_vhd_sum(&mut image[512..1536], 36);
    image
}

/// A child whose header and parent locator name a file.
fn differencing(parent: &Path) -> Vec<u8> {
    let name: Vec<u8> = parent.to_str().unwrap().encode_utf16().flat_map(u16::to_be_bytes).collect();
    let len = u32::try_from(name.len()).unwrap().to_be_bytes();
    let locator = [&b"W2ku"[..], &1_u32.to_be_bytes(), &len, &[0; 4], &2048_u64.to_be_bytes()].concat();
    let mut image = image();
    image[2560..2560 + name.len()].copy_from_slice(&name);
    image[512 + 64..512 + 64 + name.len()].copy_from_slice(&name);
    image[512 + 576..512 + 600].copy_from_slice(&locator);
    fix_vhd_sum(&mut image[512..1536], 36);
    with_footer_word(image, 60, &VHD_DIFFERENCING.to_be_bytes())
}

fn fixed(size_bytes: u64) -> Vec<u8> {
    [small_content(), vhd_footer(VHD_FIXED, size_bytes)].concat()
}

pub(crate) fn cases() -> Vec<Case> {
    [structures(), tables(), pretenders()].into_iter().flatten().collect()
}

fn structures() -> Vec<Case> {
    let garbage = "a child taken for the whole disk, a file of the host";
    vec![
        Case::new("vhd-differencing", 15, garbage, &["differencing"], differencing),
        Case::new("vhd-differencing-declared", 15, garbage, &["differencing"], differencing).declared(Format::Vhd),
        Case::new("vhd-footer-checksum", 15, "damage taken for content", &["checksum"], |_| {
            let image = image();
            let at = image.len() - 512 + 200;
            poked(image, &[(at, &[1])])
        }),
        Case::new("vhd-header-checksum", 15, "damage taken for tables", &["checksum"], |_| {
            poked(image(), &[(512 + 800, &[1])])
        }),
        Case::new("vhd-copy-differs", 15, "each reader sees another disk", &["corrupt"], |_| {
            let mut image = poked(image(), &[(48, &(1_u64 << 20).to_be_bytes())]);
            fix_vhd_sum(&mut image[..512], 64);
            image
        }),
        Case::new("vhd-no-footer-at-end", 11, "missing content", &["truncated"], |_| {
            let image = image();
            image[..image.len() - 512].to_vec()
        }),
        Case::new("vhd-type-7", 15, "a format not understood", &["unsupported-format"], |_| {
            with_footer_word(image(), 60, &7_u32.to_be_bytes())
        }),
        Case::new("vhd-size-overflows", 8, "CVE-2013-2096: larger than any flavor", &["virtual-size"], |_| {
            with_footer_word(image(), 48, &(u64::MAX - 511).to_be_bytes())
        }),
        Case::new("vhd-dynamic-over-2040-GiB", 8, "sectors of 32 bits that wrap", &["virtual-size"], |_| {
            with_footer_word(image(), 48, &(2041_u64 << 30).to_be_bytes())
        }),
        Case::new("vhd-header-past-end", 9, "reads past the file", &["truncated"], |_| {
            with_footer_word(image(), 16, &(u64::MAX - 1000).to_be_bytes())
        }),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        Case::new("vhd-block-of-3000-bytes", 15, "a division with a rest", &["corrupt"], |_| {
            with_header_word(32, &3000_u32.to_be_bytes())
        }),
        Case::new("vhd-block-of-0-bytes", 15, "a division by zero", &["corrupt"], |_| with_header_word(32, &[0; 4])),
        Case::new("vhd-table-too-small", 15, "reads past the table", &["corrupt"], |_| {
            with_footer_word(image(), 48, &(1_u64 << 40).to_be_bytes())
        }),
        Case::new("vhd-table-too-large", 9, "CVE-2014-0222: memory for a table", &["corrupt"], |_| {
            with_header_word(28, &0x4000_0001_u32.to_be_bytes())
        }),
        Case::new("vhd-table-past-end", 9, "reads past the file", &["truncated"], |_| {
            with_header_word(16, &(1_u64 << 40).to_be_bytes())
        }),
        Case::new("vhd-table-of-32-MiB", 10, "CVE-2015-5162: memory for a table of holes", &["corrupt"], |_| {
            let footer = with_footer_word(image(), 48, &(2040_u64 << 30).to_be_bytes());
            let mut header = poked(vhd_header(1 << 23, 256 << 10), &[(16, &4096_u64.to_be_bytes())]);
            fix_vhd_sum(&mut header, 36);
            let mut image = [&footer[..512], &header].concat();
            image.resize(33 << 20, 0);
            [image, footer[..512].to_vec()].concat()
        }),
        Case::new("vhd-block-twice", 10, "more content than the file has", &["corrupt"], |_| {
            vhd_dynamic(20 << 10, &[4, FREE, 4, FREE, 22])
        }),
        Case::new("vhd-blocks-overlap", 10, "more content than the file has", &["corrupt"], |_| {
            vhd_dynamic(20 << 10, &[4, FREE, 5, FREE, 22])
        }),
        Case::new("vhd-block-is-the-header", 10, "content that is metadata", &["corrupt"], |_| {
            vhd_dynamic(20 << 10, &[1, FREE, 13, FREE, 22])
        }),
        Case::new("vhd-block-past-end", 11, "reads past the file", &["truncated"], |_| {
            vhd_dynamic(20 << 10, &[4, FREE, 0x7fff_ffff, FREE, 22])
        }),
    ]
}

fn pretenders() -> Vec<Case> {
    vec![
        Case::new("vhd-fixed-declared-raw", 7, "the footer becomes content", &["format-mismatch"], |_| fixed(64 << 10))
            .declared(Format::Raw),
        Case::new("vhd-dynamic-declared-raw", 7, "CVE-2024-44082", &["format-mismatch"], |_| image())
            .declared(Format::Raw),
        Case::new("vhd-fixed-larger-than-file", 11, "reads past the file", &["truncated"], |_| fixed(1 << 30)),
        Case::new("vhd-fixed-size-odd", 8, "half of a sector", &["virtual-size"], |_| fixed((64 << 10) - 1)),
        Case::new("vhd-fixed-of-qcow2", 7, "a container in a container", &["ambiguous-format"], |_| {
            [qemu("qcow2", "-o cluster_size=512"), vhd_footer(VHD_FIXED, 4096)].concat()
        }),
    ]
}
