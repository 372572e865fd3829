//! What must not be opened is refused, with the reason and without delay.

use std::time::{Duration, Instant};

use bulbil_format::{Format, OpenOptions, open_disk};
use std::sync::Arc;

use crate::image::{
    BAT, DISK_ID, DISK_SIZE, FILE_PARAMETERS, HEADERS, Image, LOGICAL_SECTOR, METADATA, MIB, NEXT_ITEM_ENTRY,
    PHYSICAL_SECTOR, REGION_TABLES, entry, guid, image, utf16,
};
use crate::support::{check_content, open_bytes};

#[track_caller]
fn check_refused(bytes: &[u8], message: &str) {
    let start = Instant::now();
    let error = open_bytes(bytes, None).map(|_| ()).expect_err(message);
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
    assert!(message.starts_with(error.code()), "{}: {message}", error.code());
    assert!(start.elapsed() < Duration::from_secs(1), "{message}: {:?}", start.elapsed());
}

#[track_caller]
fn check_opens(image: &Image) {
    let disk = open_bytes(&image.bytes, Some(Format::Vhdx)).unwrap_or_else(|error| panic!("{error}"));
    check_content(&*disk, &image.content);
}

/// An image with some bytes changed and the checksums made right.
fn poked(at: usize, value: &[u8]) -> Image {
    let mut image = image();
    image.put(at, value);
    image.seal();
    image
}

fn poked_both(places: [usize; 2], at: usize, value: &[u8]) -> Image {
    let mut image = image();
    image.put_both(places, at, value);
    image.seal();
    image
}

#[test]
fn header_fields_out_of_bounds_are_refused() {
    for (at, value, message) in [
        (0, &b"neck"[..], "corrupt: there is no header at 0x10000 or 0x20000"),
        (66, &[2, 0], "unsupported-format: VHDX version 2"),
        (66, &[0, 0], "unsupported-format: VHDX version 0"),
        (8, &8_u64.to_le_bytes(), ""),
        (72, &0_u64.to_le_bytes(), "corrupt: log at 0x0 to 0x100000 is not at a multiple of 1 MiB"),
        (72, &0x10_0200_u64.to_le_bytes(), "corrupt: log at 0x100200 to 0x200200 is not at"),
        (72, &u64::MAX.to_le_bytes(), "corrupt: log at 0xffffffffffffffff to"),
        (72, &(1_u64 << 62).to_le_bytes(), "truncated at byte 6292992: the log ends at byte"),
        (72, &(2_u64 << 20).to_le_bytes(), "corrupt: cluster 0x200000 referenced twice"),
        (68, &1_u32.to_le_bytes(), "corrupt: log at 0x100000 to 0x100001 is not at"),
        (68, &(3_u32 << 20).to_le_bytes(), "corrupt: cluster 0x300000 referenced twice"),
        (68, &(8_u32 << 20).to_le_bytes(), "truncated at byte 6292992: the log ends at byte 9437184"),
    ] {
        let image = poked_both(HEADERS, at, value);
        if message.is_empty() { check_opens(&image) } else { check_refused(&image.bytes, message) }
    }
    let mut image = image();
    image.put_both(HEADERS, 100, &[1]);
    check_refused(&image.bytes, "checksum: that of both headers is wrong");
    for len in [8, 519, 520, 0x1_0000, MIB - 1] {
        check_refused(&image.bytes[..len], "truncated at byte");
    }
}

#[test]
fn one_header_is_enough_and_the_newer_one_counts() {
    let elsewhere = 0x10_0200_u64.to_le_bytes();
    for (valid, other) in [(0, 1), (1, 0)] {
        let mut image = image();
        image.put(HEADERS[other] + 72, &elsewhere);
        check_opens(&image);
        image.put(HEADERS[other], &[0; 4096]);
        check_opens(&image);
        let mut image = crate::image::image();
        image.put(HEADERS[valid] + 8, &u64::MAX.to_le_bytes());
        image.put(HEADERS[other] + 72, &elsewhere);
        image.seal();
        check_opens(&image);
    }
}

#[test]
fn equal_sequence_numbers_are_accepted_where_the_headers_agree() {
    let mut image = poked_both(HEADERS, 8, &1_u64.to_le_bytes());
    check_opens(&image);
    image.put(HEADERS[1] + 68, &0_u32.to_le_bytes());
    image.seal();
    check_refused(&image.bytes, "corrupt: two different headers of sequence number 1");
}

#[test]
fn region_tables_out_of_bounds_are_refused() {
    let truncated = "truncated at byte 6292992: a region ends at byte";
    for (at, value, message) in [
        (0, &b"rego"[..], "corrupt: there is no region table at 0x30000 or 0x40000"),
        (8, &0_u32.to_le_bytes(), "corrupt: there is no region for the BAT"),
        (8, &1_u32.to_le_bytes(), "corrupt: there is no region for metadata"),
        (8, &2048_u32.to_le_bytes(), "corrupt: region table too large: 2048 regions"),
        (8, &3_u32.to_le_bytes(), "corrupt: region at 0x0 of 0x0 bytes is not at a multiple of 1 MiB"),
        (32, &0_u64.to_le_bytes(), "corrupt: region at 0x0 of 0x100000 bytes is not at"),
        (32, &0x30_1000_u64.to_le_bytes(), "corrupt: region at 0x301000 of 0x100000 bytes is not at"),
        (32, &(METADATA as u64).to_le_bytes(), "corrupt: cluster 0x200000 referenced twice"),
        (32, &(MIB as u64).to_le_bytes(), "corrupt: cluster 0x100000 referenced twice"),
        (32, &(1_u64 << 63).to_le_bytes(), truncated),
        (32, &(u64::MAX - 0xf_ffff).to_le_bytes(), truncated),
        (40, &0_u32.to_le_bytes(), "corrupt: region at 0x300000 of 0x0 bytes is not at"),
        (40, &u32::MAX.to_le_bytes(), "corrupt: region at 0x300000 of 0xffffffff bytes is not at"),
        (40, &0xfff0_0000_u32.to_le_bytes(), truncated),
        (16, &guid("8B7CA206-4790-4B9A-B8FE-575F050F886E"), "corrupt: two regions of kind 8b7ca206-4790-"),
        (16, &[0x11; 16], "unsupported-feature: bit 0 (required region 11111111-1111-1111-1111-111111111111)"),
    ] {
        check_refused(&poked_both(REGION_TABLES, at, value).bytes, message);
    }
    let mut image = image();
    image.put_both(REGION_TABLES, 60_000, &[1]);
    check_refused(&image.bytes, "checksum: that of both region tables is wrong");
}

#[test]
fn one_region_table_is_enough() {
    for table in REGION_TABLES {
        let mut image = image();
        image.put(table + 16, &[0xff; 64]);
        check_opens(&image);
    }
}

#[test]
fn regions_that_are_not_understood_are_left_alone_unless_required() {
    let mut image = image();
    // Behind the blocks.
    image.bytes.resize(8 * MIB, 0);
    let kind = "01234567-89ab-cdef-0123-456789abcdef";
    for (required, mib) in [(false, 7), (true, 7), (false, 6)] {
        for table in REGION_TABLES {
            image.put(table + 8, &3_u32.to_le_bytes());
            image.put_region(table + 80, kind, mib * MIB, required);
        }
        image.seal();
        match (required, mib) {
            (true, _) => check_refused(&image.bytes, &format!("unsupported-feature: bit 0 (required region {kind})")),
            (false, 7) => check_opens(&image),
            (false, _) => check_refused(&image.bytes, "corrupt: cluster 0x600000 referenced twice"),
        }
    }
}

#[test]
fn metadata_out_of_bounds_are_refused() {
    let item = |index: usize, field: usize| METADATA + 32 + 32 * index + field;
    let not_there = "corrupt: metadata 2fa54224-cd1b-4876-b211-5dbed83bf4b8 at";
    for (at, value, message) in [
        (METADATA, &b"M"[..], "corrupt: there is no metadata table at 0x200000"),
        (METADATA + 10, &2048_u16.to_le_bytes(), "corrupt: metadata table too large: 2048 items"),
        (METADATA + 10, &0_u16.to_le_bytes(), "corrupt: the metadata lack the file parameters"),
        (METADATA + 10, &1_u16.to_le_bytes(), "corrupt: the metadata lack the size of the disk"),
        (METADATA + 10, &2_u16.to_le_bytes(), "corrupt: the metadata lack the logical sector size"),
        (item(1, 16), &0_u32.to_le_bytes(), not_there),
        (item(1, 16), &0xffff_u32.to_le_bytes(), not_there),
        (item(1, 16), &0xf_fff9_u32.to_le_bytes(), not_there),
        (item(1, 16), &u32::MAX.to_le_bytes(), not_there),
        (item(1, 20), &u32::MAX.to_le_bytes(), not_there),
        (item(1, 20), &0_u32.to_le_bytes(), "corrupt: metadata 2fa54224-cd1b-4876-b211-5dbed83bf4b8 has 0 of 8 bytes"),
        (item(1, 20), &7_u32.to_le_bytes(), "corrupt: metadata 2fa54224-cd1b-4876-b211-5dbed83bf4b8 has 7 of 8 bytes"),
        (item(1, 24), &5_u32.to_le_bytes(), "unsupported-feature: bit 2 (required metadata 2fa54224-"),
        (item(4, 0), &guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8"), "corrupt: metadata 2fa54224-"),
        (item(4, 0), &[0x22; 16], "unsupported-feature: bit 2 (required metadata 22222222-2222-"),
        (FILE_PARAMETERS, &0_u32.to_le_bytes(), "corrupt: block size of 0 bytes is not 1 to 256 MiB"),
        (FILE_PARAMETERS, &(1_u32 << 19).to_le_bytes(), "corrupt: block size of 524288 bytes"),
        (FILE_PARAMETERS, &(1_u32 << 29).to_le_bytes(), "corrupt: block size of 536870912 bytes"),
        (FILE_PARAMETERS, &(3_u32 << 20).to_le_bytes(), "corrupt: block size of 3145728 bytes"),
        (DISK_SIZE, &0_u64.to_le_bytes(), "virtual-size: 0 bytes is an empty disk"),
        (DISK_SIZE, &513_u64.to_le_bytes(), "virtual-size: 513 bytes is not a multiple of 512"),
        (DISK_SIZE, &u64::MAX.to_le_bytes(), "virtual-size: 18446744073709551615 bytes is more than"),
        (DISK_SIZE, &((64_u64 << 40) + 512).to_le_bytes(), "virtual-size: 70368744178176 bytes is more than"),
        // 131072 blocks, and a sector bitmap after each 4096 of them but the last.
        (DISK_SIZE, &(1_u64 << 37).to_le_bytes(), "corrupt: BAT too small: 131072 of 131103 entries"),
        (LOGICAL_SECTOR, &1024_u32.to_le_bytes(), "corrupt: logical sectors of 1024 bytes"),
        (LOGICAL_SECTOR, &0_u32.to_le_bytes(), "corrupt: logical sectors of 0 bytes"),
        (LOGICAL_SECTOR, &4096_u32.to_le_bytes(), "virtual-size: 5244416 bytes is not a multiple of the logical"),
        (PHYSICAL_SECTOR, &1_u32.to_le_bytes(), "corrupt: physical sectors of 1 bytes"),
    ] {
        check_refused(&poked(at, value).bytes, message);
    }
}

#[test]
fn metadata_that_are_not_understood_are_left_alone_unless_required() {
    for (flags, required) in [(0, false), (1, false), (2, false), (4, true), (5, true)] {
        let mut image = image();
        image.add_item("01234567-89ab-cdef-0123-456789abcdef", flags, b"who knows");
        if required {
            check_refused(&image.bytes, "unsupported-feature: bit 2 (required metadata 01234567-89ab-cdef-");
        } else {
            check_opens(&image);
        }
    }
    // An item of a user is not one of the format, whatever its name.
    let mut image = image();
    image.add_item("2FA54224-CD1B-4876-B211-5DBED83BF4B8", 1, &[0xff; 8]);
    check_opens(&image);
    // Without an identifier of its own a disk has that of its content.
    image.put(NEXT_ITEM_ENTRY - 32, &guid("01234567-89ab-cdef-0123-456789abcdef"));
    image.put(NEXT_ITEM_ENTRY - 32 + 24, &0_u32.to_le_bytes());
    image.put(DISK_ID, &[0; 16]);
    check_opens(&image);
    let disk = open_bytes(&image.bytes, None).unwrap();
    assert_eq!(disk.info().identifier.as_deref(), Some("dddddddd-dddd-dddd-dddd-dddddddddddd"));
}

#[test]
fn bat_entries_out_of_bounds_are_refused() {
    for (block, value, message) in [
        (0, 7_u64, "corrupt: BAT entry 0x7 of block 0: partially present without a parent"),
        (1, entry(4) | 7, "corrupt: BAT entry 0x400007 of block 1: partially present without a parent"),
        (1, 4, "corrupt: BAT entry 0x4 of block 1: unknown state"),
        (1, 5, "corrupt: BAT entry 0x5 of block 1: unknown state"),
        (1, entry(4) | 8, "corrupt: BAT entry 0x40000e of block 1: reserved bits are set"),
        (0, entry(4) | 1 << 19, "corrupt: BAT entry 0x480006 of block 0: reserved bits are set"),
        (0, entry(0), "corrupt: cluster 0x0 referenced twice"),
        (0, entry(1), "corrupt: cluster 0x100000 referenced twice"),
        (0, entry(2), "corrupt: cluster 0x200000 referenced twice"),
        (0, entry(3), "corrupt: cluster 0x300000 referenced twice"),
        (0, entry(4), "corrupt: cluster 0x400000 referenced twice"),
        (1, entry(5), "corrupt: cluster 0x500000 referenced twice"),
        // Only the last block may be cut off, and only behind the disk.
        (1, entry(6), "truncated at byte 6292992: a block ends at byte 7340032"),
        (5, entry(7), "truncated at byte 6292992: a block ends at byte 7341568"),
        (1, entry((1 << 44) - 1), "truncated at byte 6292992: a block ends at byte"),
    ] {
        check_refused(&poked(BAT + 8 * block, &value.to_le_bytes()).bytes, message);
    }
    let short = image();
    check_refused(&short.bytes[..short.bytes.len() - 1], "truncated at byte 6292991: a block ends at byte 6292992");
    // Behind the last entry that is needed there may be anything.
    check_opens(&poked(BAT + 8 * 6, &[0xff; 4096]));
}

#[test]
fn a_parent_is_named_and_never_opened() {
    let locator = |pairs: &[(&str, &str)]| {
        let mut bytes = vec![0; 20 + 12 * pairs.len()];
        bytes[..16].copy_from_slice(&guid("B04AEFB7-D19E-4A81-B789-25B8E9445913"));
        bytes[18..20].copy_from_slice(&u16::try_from(pairs.len()).unwrap().to_le_bytes());
        for (index, (key, value)) in pairs.iter().enumerate() {
            let at = 20 + 12 * index;
            for (field, text) in [(0, utf16(key)), (1, utf16(value))] {
                let place = u32::try_from(bytes.len()).unwrap();
                bytes[at + 4 * field..at + 4 * field + 4].copy_from_slice(&place.to_le_bytes());
                let len = u16::try_from(text.len()).unwrap();
                bytes[at + 8 + 2 * field..at + 10 + 2 * field].copy_from_slice(&len.to_le_bytes());
                bytes.extend(text);
            }
        }
        bytes
    };
    let child = |locator: &[u8]| {
        let mut image = poked(FILE_PARAMETERS + 4, &2_u32.to_le_bytes());
        image.add_item("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", 4, locator);
        image.bytes
    };
    let linkage = ("parent_linkage", "{83ed0ec3-24c8-49a6-a959-5e4bd1288015}");
    let absolute = ("absolute_win32_path", r"C:\vm\base.vhdx");
    let relative = ("relative_path", ".\\base\u{1b}[31m.vhdx");
    for (pairs, name) in [
        (&[linkage, absolute, relative][..], r".\\base\u{1b}[31m.vhdx"),
        (&[linkage, absolute], r"C:\\vm\\base.vhdx"),
        (&[linkage], "{83ed0ec3-24c8-49a6-a959-5e4bd1288015}"),
        (&[("color", "red")], ""),
        (&[], ""),
    ] {
        check_refused(&child(&locator(pairs)), &format!("differencing: vhdx with the parent \"{name}\"; name"));
    }
    let bytes = child(&[&[0xff; 20][..], &[0xff; 100]].concat());
    check_refused(&bytes, "differencing: vhdx with the parent \"\"");
    check_refused(&poked(FILE_PARAMETERS + 4, &3_u32.to_le_bytes()).bytes, "differencing: vhdx with the parent \"\"");

    let parent: Arc<dyn bulbil_format::Disk> = Arc::from(open_bytes(&image().bytes, None).unwrap());
    let options = OpenOptions { parent: Some(parent), ..OpenOptions::default() };
    let error = open_disk(Arc::new(bytes), &options).unwrap_err();
    assert_eq!(error.code(), "unsupported-feature");
    let error = open_disk(Arc::new(image().bytes), &options).unwrap_err();
    assert_eq!(error.code(), "parent-mismatch");
}

#[test]
fn a_parent_locator_of_many_long_pairs_is_read_quickly() {
    let (pairs, text_bytes) = (60_000_u32, 65_534_u16);
    let mut locator = vec![0; 18];
    locator.extend([0xff; 2]);
    let text_at = 20 + pairs * 12;
    for _ in 0..pairs {
        locator.extend([text_at.to_le_bytes(); 2].concat());
        locator.extend([text_bytes.to_le_bytes(); 2].concat());
    }
    locator.extend(utf16(&"x".repeat(usize::from(text_bytes) / 2)));
    let mut image = poked(FILE_PARAMETERS + 4, &2_u32.to_le_bytes());
    image.add_item("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", 4, &locator);
    let start = std::time::Instant::now();
    check_refused(&image.bytes, "differencing: vhdx with the parent \"\"");
    assert!(start.elapsed().as_secs() < 1, "{:?}", start.elapsed());
}
