//! Every field that can be wrong, and damage of all kinds.

use std::time::{Duration, Instant};

use bulbil_format::{Format, OpenOptions, open_disk};

use super::support::{Rng, check_refused_at_once, content, open_bytes, open_path, read_all, write_sparse};
use super::{MIB, SEED, image};

fn good() -> Vec<u8> {
    let disk = content(&mut Rng(SEED), 2 * MIB);
    image(1, 2 * MIB as u64 + 512, &[1, u32::MAX, 0], &disk)
}

fn poked(bytes: &[u8], at: usize, poke: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + poke.len()].copy_from_slice(poke);
    bytes
}

#[test]
fn wrong_fields_are_refused() {
    let image = good();
    assert!(open_bytes(&image, None).is_ok());
    for (at, value, message) in [
        (68, 0x0001_0000, "unsupported-format: VDI version 1.0"),
        (68, 1, "unsupported-format: VDI version 0.1"),
        (68, 0x0002_0001, "unsupported-format: VDI version 2.1"),
        (72, 0, "corrupt: header length of 0 bytes is below 384"),
        (72, 383, "corrupt: header length of 383 bytes is below 384"),
        (72, 441, "corrupt: block map at 0x200 overlaps the header"),
        (72, u32::MAX, "corrupt: block map at 0x200 overlaps the header"),
        (76, 0, "unsupported-format: VDI of type 0"),
        (76, 3, "unsupported-format: VDI that is an undo image"),
        (76, 4, "unsupported-format: VDI that is a differencing image; copy the disk as a whole"),
        (76, u32::MAX, "unsupported-format: VDI of type 4294967295"),
        (340, 0, "corrupt: block map at 0x0 overlaps the header"),
        (340, 513, "corrupt: block map at 0x201 overlaps the header or is not at a sector"),
        (340, 1024, "corrupt: blocks at 0x400 overlap the map"),
        (340, 0xffff_fe00, "truncated at byte"),
        (344, 512, "corrupt: blocks at 0x200 overlap the map"),
        (344, 1025, "corrupt: blocks at 0x401 overlap the map or are not at a sector"),
        (344, 1536, "truncated at byte 2098176: a block ends at byte 2098688"),
        (344, 0xffff_fe00, "truncated at byte"),
        (360, 4096, "unsupported-format: VDI with sectors of 4096 bytes"),
        (368, 513, "virtual-size: 513 bytes is not a multiple of 512"),
        (372, 0xffff, "virtual-size: 281470683841024 bytes is more than the largest disk"),
        (376, 0, "unsupported-format: VDI with blocks of 0 bytes"),
        (376, 2 << 20, "unsupported-format: VDI with blocks of 2097152 bytes"),
        (380, 512, "unsupported-format: VDI with 512 further bytes in each block"),
        (384, 0, "corrupt: block map too small: 0 of 3 entries"),
        (384, 2, "corrupt: block map too small: 2 of 3 entries"),
        (388, 0, "corrupt: block 1 for disk offset 0x0 is none of 0"),
        (388, 1, "corrupt: block 1 for disk offset 0x0 is none of 1"),
        (424, 1, "unsupported-format: VDI with a parent"),
        (440, 1, "unsupported-format: VDI with a parent"),
        (452, 1, "unsupported-format: VDI with a parent"),
        // The block map.
        (512, 2, "corrupt: block 2 for disk offset 0x0 is none of 2"),
        (512, u32::MAX - 2, "corrupt: block 4294967293 for disk offset 0x0 is none of 2"),
        (516, 0, "corrupt: block 0x400 referenced twice"),
        (520, 1, "corrupt: block 0x100400 referenced twice"),
    ] {
        check_refused_at_once(&poked(&image, at, &u32::to_le_bytes(value)), message);
    }
    check_refused_at_once(&poked(&image, 368, &[0; 8]), "virtual-size: 0 bytes is an empty disk");
    // The count of stored blocks is no promise that they are there.
    let many = poked(&poked(&image, 388, &u32::MAX.to_le_bytes()), 512, &2_u32.to_le_bytes());
    check_refused_at_once(&many, "truncated at byte 2098176: a block ends at byte 3146752");
    let far = poked(&many, 512, &(u32::MAX - 2).to_le_bytes());
    check_refused_at_once(&far, "truncated at byte 2098176: a block ends at byte 4503599625274368");
}

#[test]
fn entries_past_the_end_of_the_disk_are_never_read() {
    let mut image = good();
    image[384] = 5;
    image[524] = 1;
    assert!(open_bytes(&image, None).is_ok());
}

#[test]
fn files_that_are_cut_are_refused() {
    let image = good();
    for cut in (0..image.len()).step_by(4093).chain([68, 72, 511, 512, 523, 1024, image.len() - 1]) {
        if cut >= 68 {
            check_refused_at_once(&image[..cut], &format!("truncated at byte {cut}: "));
        }
    }
}

#[test]
fn a_map_of_too_many_blocks_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vdi");
    let size = poked(&good(), 368, &(32_u64 << 40).to_le_bytes());
    write_sparse(&path, &poked(&size, 384, &u32::MAX.to_le_bytes()));
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    let error = open_path(&path, None).unwrap_err();
    assert_eq!(error.to_string(), "too-large: a disk of 33554432 blocks is over the limit of 16777216");
    // The same without the file behind it.
    let small = poked(&poked(&good(), 368, &(8_u64 << 40).to_le_bytes()), 384, &u32::MAX.to_le_bytes());
    check_refused_at_once(&small, "truncated at byte 2098176: the block map ends at byte 33554944");
}

#[test]
fn a_parent_or_another_format_is_refused() {
    let parent = open_bytes(&good(), None).unwrap();
    let options = OpenOptions { parent: Some(parent.into()), ..OpenOptions::default() };
    let error = open_disk(std::sync::Arc::new(good()), &options).unwrap_err();
    assert_eq!(error.to_string(), "parent-mismatch: a vdi image has no parent");
    let error = open_bytes(&good(), Some(Format::Raw)).unwrap_err();
    assert_eq!(error.to_string(), "format-mismatch: declared raw, found VDI");
}

#[test]
fn random_damage_is_refused_or_read_within_bounds() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let image = good();
    let mut opened = 0;
    for number in 0..2000 {
        let mut damaged = image.clone();
        for _ in 0..=rng.below(3) {
            let at = match rng.below(8) {
                0 => rng.index(image.len()),
                1 | 2 => 512 + rng.index(16),
                _ => 64 + rng.index(460),
            };
            damaged[at] = [0, 0xff, rng.next().to_le_bytes()[0], 1 << rng.below(8)][rng.index(4)];
        }
        if rng.below(20) == 0 {
            damaged.truncate(rng.index(image.len()));
        }
        let start = Instant::now();
        if let Ok(disk) = open_bytes(&damaged, None) {
            opened += 1;
            let ends: Vec<u64> = disk.data_extents().take(1000).map(|extent| extent.unwrap().end_bytes()).collect();
            assert!(ends.is_sorted() && ends.last().is_none_or(|end| *end <= disk.size_bytes()));
            let mut sector = [0; 512];
            disk.read_exact_at(&mut sector, disk.size_bytes() - 512).unwrap();
            if disk.size_bytes() < 4 << 20 {
                read_all(&*disk, 1 << 20).unwrap();
            }
        }
        assert!(start.elapsed() < Duration::from_secs(1), "mutation {number} takes {:?}", start.elapsed());
    }
    println!("{opened} opened");
    assert!((100..1950).contains(&opened), "the damage is too heavy or too light to test anything");
}
