//! Every field that can be wrong, and damage of all kinds.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{Format, OpenOptions, open_disk};

use super::image::{
    Block, DIFFERENCING, DYNAMIC, FIXED, HEADER_AT, PARENT_ID, TABLE_AT, fixed, footer, poke_footer, poke_header, put,
    sparse,
};
use super::support::{Rng, check_refused_at_once, content, open_bytes, open_path, read_all, write_sparse};
use super::{MIB, SEED};

const BLOCK: usize = 256 << 10;

/// A dynamic image of 1 MiB and a sector, of which the first two blocks and the last one are stored.
fn image() -> Vec<u8> {
    let mut rng = Rng(SEED);
    let mut block = |index| Block { index, bitmap: vec![0xff; 512], content: content(&mut rng, BLOCK) };
    sparse(DYNAMIC, MIB as u64 + 512, BLOCK, &[block(0), block(1), block(4)])
}

#[test]
fn wrong_footers_are_refused() {
    let image = image();
    let last = image.len() - 512;
    assert!(open_bytes(&image, None).is_ok());
    let zero = [0; 8];
    for (at, poke, message) in [
        (12, &0x0002_0000_u32.to_be_bytes()[..], "unsupported-format: VHD version 2.0"),
        (16, &u64::MAX.to_be_bytes(), "truncated at byte"),
        (16, &(1_u64 << 40).to_be_bytes(), "truncated at byte"),
        (16, &zero, "corrupt: no dynamic header where the footer says"),
        (48, &zero, "virtual-size: 0 bytes is an empty disk"),
        (48, &513_u64.to_be_bytes(), "virtual-size: 513 bytes is not a multiple of 512"),
        (48, &(65_u64 << 40).to_be_bytes(), "virtual-size: 71468255805440 bytes is more than the largest disk"),
        (48, &((2040_u64 << 30) + 512).to_be_bytes(), "virtual-size: 2190433321472 bytes is more than a dynamic VHD"),
        (48, &(2_u64 << 20).to_be_bytes(), "corrupt: block allocation table too small: 5 of 8 entries"),
        (60, &0_u32.to_be_bytes(), "unsupported-format: VHD of type 0"),
        (60, &5_u32.to_be_bytes(), "unsupported-format: VHD of type 5"),
        (60, &u32::MAX.to_be_bytes(), "unsupported-format: VHD of type 4294967295"),
        (60, &2_u32.to_be_bytes(), "corrupt: a fixed VHD begins with a footer"),
        (60, &4_u32.to_be_bytes(), "differencing: vhd with the parent \"\"; name the parent explicitly"),
    ] {
        let mut wrong = image.clone();
        for footer_at in [0, last] {
            poke_footer(&mut wrong, footer_at, at, poke);
        }
        check_refused_at_once(&wrong, message);
    }
}

#[test]
fn footers_that_differ_are_refused() {
    let image = image();
    let last = image.len() - 512;
    let differs = "corrupt: the copy of the footer at byte 0x0 says something else than the footer";
    for footer_at in [0, last] {
        for (at, poke) in [(16, &1024_u64.to_be_bytes()[..]), (48, &512_u64.to_be_bytes()), (68, &[0])] {
            let mut wrong = image.clone();
            poke_footer(&mut wrong, footer_at, at, poke);
            check_refused_at_once(&wrong, differs);
        }
        // Geometry, original size, creator and time may differ.
        for at in [24, 28, 40, 56] {
            let mut other = image.clone();
            poke_footer(&mut other, footer_at, at, &[1, 2, 3, 4]);
            assert!(open_bytes(&other, None).is_ok(), "{at}");
        }
        for at in [8, 63, 64, 200, 511] {
            let mut wrong = image.clone();
            wrong[footer_at + at] ^= 0x10;
            let what = if footer_at == 0 { "the copy of the footer at byte 0x0" } else { "the footer" };
            check_refused_at_once(&wrong, &format!("checksum: that of {what} is wrong"));
        }
    }
    let mut wrong = image.clone();
    put(&mut wrong, 0, b"xonectix");
    check_refused_at_once(&wrong, "corrupt: no copy of the footer at byte 0x0");
    let mut wrong = image.clone();
    poke_footer(&mut wrong, 0, 60, &4_u32.to_be_bytes());
    check_refused_at_once(&wrong, differs);
}

#[test]
fn files_that_are_cut_are_refused() {
    let image = image();
    for cut in (0..image.len() - 1).step_by(511).filter(|cut| *cut > 512) {
        check_refused_at_once(
            &image[..cut],
            &format!("truncated at byte {cut}: the footer ends at byte {}", cut + 512),
        );
    }
    // The footer is there, but blocks before it are missing.
    let mut short = image[..image.len() - 512 - BLOCK].to_vec();
    short.extend_from_slice(&image[image.len() - 512..]);
    check_refused_at_once(&short, "truncated at byte");
    let disk = content(&mut Rng(SEED), MIB);
    let short = [&disk[..MIB - 512], &footer(FIXED, MIB as u64, b"win ")].concat();
    check_refused_at_once(&short, "truncated at byte 1048576: a fixed disk with its footer ends at byte 1049088");
    let nothing_before = footer(FIXED, 512, b"win ");
    check_refused_at_once(&nothing_before, "corrupt: a fixed VHD begins with a footer");
}

#[test]
fn wrong_dynamic_headers_are_refused() {
    let image = image();
    for (at, poke, message) in [
        (0, &b"cxsparsf"[..], "corrupt: no dynamic header where the footer says"),
        (16, &u64::MAX.to_be_bytes(), "corrupt: block allocation table at 0xffffffffffffffff is not at a sector"),
        (16, &(u64::MAX - 511).to_be_bytes(), "truncated at byte"),
        (16, &1537_u64.to_be_bytes(), "corrupt: block allocation table at 0x601 is not at a sector"),
        (16, &(1_u64 << 40).to_be_bytes(), "truncated at byte"),
        (16, &0_u64.to_be_bytes(), "corrupt: the block allocation table overlaps the copy of the footer"),
        (16, &512_u64.to_be_bytes(), "corrupt: the block allocation table overlaps the dynamic header"),
        (24, &0x0002_0001_u32.to_be_bytes(), "unsupported-format: VHD with a dynamic header of version 2.1"),
        (28, &0_u32.to_be_bytes(), "corrupt: block allocation table too small: 0 of 5 entries"),
        (28, &4_u32.to_be_bytes(), "corrupt: block allocation table too small: 4 of 5 entries"),
        (28, &0x4000_0001_u32.to_be_bytes(), "corrupt: block allocation table too large: 1073741825 entries"),
        (28, &u32::MAX.to_be_bytes(), "corrupt: block allocation table too large: 4294967295 entries"),
        (28, &1024_u32.to_be_bytes(), "corrupt: block at 0x800 overlaps the block allocation table"),
        (32, &0_u32.to_be_bytes(), "corrupt: block size of 0 bytes is not a power of two"),
        (32, &256_u32.to_be_bytes(), "corrupt: block size of 256 bytes is not a power of two"),
        (32, &0x3_0000_u32.to_be_bytes(), "corrupt: block size of 196608 bytes is not a power of two"),
        (32, &(512_u32 << 20).to_be_bytes(), "corrupt: block size of 536870912 bytes is not a power of two"),
        (32, &(64_u32 << 10).to_be_bytes(), "corrupt: block allocation table too small: 5 of 17 entries"),
        (32, &(16_u32 << 20).to_be_bytes(), "truncated at byte"),
    ] {
        let mut wrong = image.clone();
        poke_header(&mut wrong, at, poke);
        check_refused_at_once(&wrong, message);
    }
    for at in [8, 36, 40, 1000] {
        let mut wrong = image.clone();
        wrong[HEADER_AT + at] ^= 1;
        check_refused_at_once(&wrong, "checksum: that of the dynamic header is wrong");
    }
}

#[test]
fn blocks_in_the_wrong_place_are_refused() {
    let image = image();
    let last_sector = u32::try_from(image.len() / 512).unwrap() - 1;
    let sectors = u32::try_from(BLOCK / 512).unwrap() + 1;
    let first = u32::from_be_bytes(image[TABLE_AT..TABLE_AT + 4].try_into().unwrap());
    for (index, entry, message) in [
        (1, first, "corrupt: block 0x800 referenced twice"),
        (2, first + sectors, "corrupt: block 0x40a00 referenced twice"),
        (1, first + 1, "corrupt: block at 0xa00 overlaps another block"),
        (3, first + 1, "corrupt: block at 0xa00 overlaps another block"),
        (1, 0, "corrupt: block at 0x0 overlaps the copy of the footer"),
        (1, 2, "corrupt: block at 0x400 overlaps the dynamic header"),
        (1, 3, "corrupt: block at 0x600 overlaps the block allocation table"),
        (1, last_sector - sectors + 1, "corrupt: block at 0x80e00 overlaps the footer"),
        (1, last_sector, "truncated at byte"),
        (1, u32::MAX - 1, "truncated at byte"),
        (4, 1 << 31, "truncated at byte"),
    ] {
        let mut wrong = image.clone();
        put(&mut wrong, TABLE_AT + index * 4, &entry.to_be_bytes());
        check_refused_at_once(&wrong, message);
    }
    // Entries past the end of the disk are never read.
    let mut other = image.clone();
    poke_header(&mut other, 28, &6_u32.to_be_bytes());
    put(&mut other, TABLE_AT + 20, &first.to_be_bytes());
    assert!(open_bytes(&other, None).is_ok());
}

#[test]
fn a_table_of_too_many_blocks_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vhd");
    let (size_bytes, entries) = (16_u64 << 30, 32_u32 << 20);
    let mut bytes = sparse(DYNAMIC, 512, 512, &[]);
    bytes.truncate(TABLE_AT);
    poke_footer(&mut bytes, 0, 48, &size_bytes.to_be_bytes());
    poke_header(&mut bytes, 28, &entries.to_be_bytes());
    write_sparse(&path, &bytes);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[..512], 1 << 30).unwrap();
    let error = open_path(&path, None).unwrap_err();
    assert_eq!(error.to_string(), "too-large: a disk of 33554432 blocks is over the limit of 8388608");
}

#[test]
fn another_format_is_not_taken_for_a_vhd() {
    let image = image();
    let error = open_bytes(&image, Some(Format::Raw)).unwrap_err();
    assert_eq!(error.to_string(), "format-mismatch: declared raw, found VHD");
    let disk = content(&mut Rng(SEED), MIB);
    let error = open_bytes(&disk, Some(Format::Vhd)).unwrap_err();
    assert_eq!(error.code(), "format-mismatch");
    let error = open_path(Path::new("/dev/null"), Some(Format::Vhd)).unwrap_err();
    assert_eq!(error.code(), "not-a-file");
}

/// Changes a few bytes, mostly where they matter, and mostly with the checksums made right again.
fn damage(rng: &mut Rng, image: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    let last = image.len() - 512;
    let is_fixed = !image.starts_with(b"conectix");
    for _ in 0..=rng.below(3) {
        let byte = [0, 0xff, rng.next().to_le_bytes()[0], 1 << rng.below(8)][rng.index(4)];
        match rng.below(8) {
            0 => {
                let at = rng.index(image.len());
                image[at] = byte;
            }
            1 | 2 if !is_fixed => poke_header(&mut image, rng.index(64), &[byte]),
            3 | 4 if !is_fixed => image[TABLE_AT + rng.index(24)] = byte,
            5 => poke_footer(&mut image, last, rng.index(100), &[byte]),
            _ => {
                let at = 8 + rng.index(80);
                for footer_at in [0, last].into_iter().skip(usize::from(is_fixed)) {
                    poke_footer(&mut image, footer_at, at, &[byte]);
                }
            }
        }
    }
    if rng.below(20) == 0 {
        image.truncate(rng.index(image.len()));
    }
    image
}

#[test]
fn random_damage_is_refused_or_read_within_bounds() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let disk = content(&mut rng, MIB + 512);
    let mut parent = fixed(&disk, b"win ");
    poke_footer(&mut parent, disk.len(), 68, &PARENT_ID);
    let parent = Arc::from(open_bytes(&parent, None).unwrap());
    let block = Block { index: 2, bitmap: vec![0x5a; 512], content: disk[..BLOCK].to_vec() };
    let child = sparse(DIFFERENCING, disk.len() as u64, BLOCK, &[block]);
    let with_parent = OpenOptions { parent: Some(parent), ..OpenOptions::default() };
    let alone = OpenOptions::default();
    let images = [(image(), &alone), (fixed(&disk[..64 << 10], b"win "), &alone), (child, &with_parent)];
    for (image, options) in images {
        let mut opened = 0;
        for number in 0..1000 {
            let start = Instant::now();
            if let Ok(disk) = open_disk(Arc::new(damage(&mut rng, &image)), options) {
                opened += 1;
                let ends: Vec<u64> = disk.data_extents().take(1000).map(|extent| extent.unwrap().end_bytes()).collect();
                assert!(ends.is_sorted() && ends.last().is_none_or(|end| *end <= disk.size_bytes()));
                let mut piece = vec![0; usize::try_from(disk.size_bytes().min(100_000)).unwrap()];
                let len = piece.len() as u64;
                for at in [0, rng.below(disk.size_bytes() - len + 1), disk.size_bytes() - len] {
                    disk.read_exact_at(&mut piece, at).unwrap();
                }
                if disk.size_bytes() < 4 << 20 {
                    read_all(&*disk, 1 << 20).unwrap();
                }
            }
            assert!(start.elapsed() < Duration::from_secs(1), "mutation {number} takes {:?}", start.elapsed());
        }
        println!("{opened} opened");
        assert!(opened > 100, "the damage is too heavy to test anything");
        assert!(opened < 950, "the damage is too light to test anything");
    }
}
