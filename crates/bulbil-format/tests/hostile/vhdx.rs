//! Hostile VHDX images.

use bulbil_format::Format;

use super::Case;
use super::images::*;

/// 2DC27766-F623-4200-9D64-115E9BFD4A08
const BAT: [u8; 16] = [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08];
const REGION_TABLES: [usize; 2] = [192 << 10, 256 << 10];
const MIB: usize = 1 << 20;

/// Blocks of 1 MiB; two of five are stored.
fn image() -> Vec<u8> {
    let mut content = small_content();
    content.resize(5 * MIB, 0);
    content[3 * MIB] = 1;
    qemu_of("vhdx", "-o block_size=1M", &content)
}

/// Where in the first region table the region of a kind is described.
fn region_entry(image: &[u8], kind: &[u8]) -> usize {
    REGION_TABLES[0] + find(&image[REGION_TABLES[0]..REGION_TABLES[1]], kind)
}

fn bat_at(image: &[u8]) -> usize {
    usize::try_from(le_u64_at(image, region_entry(image, &BAT) + 16)).unwrap()
}

/// With another field in an entry of the first region table, which is the one that counts.
fn with_region_field(kind: &[u8], at: usize, field: &[u8]) -> Vec<u8> {
    let image = image();
    let entry = region_entry(&image, kind);
    poked_vhdx(image, &[(entry + at, field)])
}

fn with_bat_entry(block: usize, entry: impl Fn(&[u8], usize) -> u64) -> Vec<u8> {
    let image = image();
    let bat = bat_at(&image);
    let entry = entry(&image, bat).to_le_bytes();
    poked(image, &[(bat + 8 * block, &entry)])
}

fn with_file_parameters(at: usize, field: &[u8]) -> Vec<u8> {
    let image = image();
    let parameters = vhdx_item_at(&image, &VHDX_FILE_PARAMETERS);
    poked(image, &[(parameters + at, field)])
}

fn with_disk_size(size_bytes: u64) -> Vec<u8> {
    let image = image();
    let at = vhdx_item_at(&image, &VHDX_DISK_SIZE);
    poked(image, &[(at, &size_bytes.to_le_bytes())])
}

/// 64 blocks of 256 MiB, all of them present in the part of the file that only the log speaks of.
fn log_makes_file_longer() -> Vec<u8> {
    let mut image = qemu_of("vhdx", "-o block_size=256M", &[0; 4096]);
    let size = vhdx_item_at(&image, &VHDX_DISK_SIZE);
    image[size..size + 8].copy_from_slice(&(16_u64 << 30).to_le_bytes());
    let bat = bat_at(&image);
    // After each 16 blocks there is an entry for their sector bitmaps.
    for (number, index) in (0..68).filter(|index| index % 17 != 16).enumerate() {
        let entry = (64 + 256 * number as u64) << 20 | 6;
        image[bat + 8 * index..bat + 8 * index + 8].copy_from_slice(&entry.to_le_bytes());
    }
    with_log_entry(image, 32 << 30)
}

fn with_log_of(len_bytes: u32) -> Vec<u8> {
    let mut image = image();
    for header in [64 << 10, 128 << 10] {
        image[header + 48..header + 64].fill(7);
        image[header + 68..header + 72].copy_from_slice(&len_bytes.to_le_bytes());
    }
    fix_vhdx_sums(&mut image);
    image
}

pub(crate) fn cases() -> Vec<Case> {
    [structures(), tables(), log()].into_iter().flatten().collect()
}

fn structures() -> Vec<Case> {
    vec![
        Case::new("vhdx-has-parent", 16, "a child taken for the whole disk", &["differencing"], |_| {
            with_file_parameters(4, &[2])
        }),
        Case::new("vhdx-has-parent-declared", 16, "a child taken for the whole disk", &["differencing"], |_| {
            with_file_parameters(4, &[2])
        })
        .declared(Format::Vhdx),
        Case::new("vhdx-header-checksums", 16, "damage taken for tables", &["checksum"], |_| {
            poked(image(), &[((64 << 10) + 100, &[1]), ((128 << 10) + 100, &[1])])
        }),
        Case::new("vhdx-region-checksums", 16, "damage taken for tables", &["checksum"], |_| {
            poked(image(), &[(REGION_TABLES[0] + 1000, &[1]), (REGION_TABLES[1] + 1000, &[1])])
        }),
        Case::new("vhdx-regions-overlap", 10, "content that is metadata", &["corrupt"], |_| {
            let metadata = find(&image(), b"metadata") as u64;
            with_region_field(&BAT, 16, &metadata.to_le_bytes())
        }),
        Case::new("vhdx-region-is-the-header", 9, "content that is metadata", &["corrupt"], |_| {
            with_region_field(&BAT, 16, &[0; 8])
        }),
        Case::new("vhdx-region-past-end", 9, "reads past the file", &["truncated"], |_| {
            with_region_field(&BAT, 16, &(1_u64 << 60).to_le_bytes())
        }),
        Case::new("vhdx-too-many-regions", 9, "reads past the table", &["corrupt"], |_| {
            poked_vhdx(image(), &[(REGION_TABLES[0] + 8, &u32::MAX.to_le_bytes())])
        }),
        Case::new("vhdx-unknown-region", 16, "a format not understood", &["unsupported-feature"], |_| {
            let image = image();
            let entry = region_entry(&image, &BAT);
            poked_vhdx(image, &[(entry, &[0x77; 16]), (entry + 28, &[1])])
        }),
        Case::new("vhdx-unknown-metadata", 16, "a format not understood", &["unsupported-feature"], |_| {
            let image = image();
            let metadata = find(&image, b"metadata");
            let entry = metadata + find(&image[metadata..], &VHDX_DISK_SIZE);
            poked(image, &[(entry, &[0x77; 16])])
        }),
        Case::new("vhdx-declared-raw", 7, "CVE-2024-44082", &["format-mismatch"], |_| image()).declared(Format::Raw),
        Case::new("vhdx-cut-after-headers", 11, "reads past the file", &["truncated"], |_| image()[..MIB].to_vec()),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        Case::new("vhdx-block-of-512-MiB", 9, "numbers that wrap", &["corrupt"], |_| {
            with_file_parameters(0, &(512_u32 << 20).to_le_bytes())
        }),
        Case::new("vhdx-block-of-0-bytes", 9, "a division by zero", &["corrupt"], |_| with_file_parameters(0, &[0; 4])),
        Case::new("vhdx-size-over-64-TiB", 8, "CVE-2013-2096: larger than any flavor", &["virtual-size"], |_| {
            with_disk_size((64 << 40) + 512)
        }),
        Case::new("vhdx-size-0", 8, "numbers below zero", &["virtual-size"], |_| with_disk_size(0)),
        Case::new("vhdx-bat-too-small", 9, "reads past the table", &["corrupt"], |_| with_disk_size(64 << 40)),
        Case::new("vhdx-partially-present", 16, "sectors of a parent", &["corrupt"], |_| {
            with_bat_entry(0, |image, bat| le_u64_at(image, bat) | 7)
        }),
        Case::new("vhdx-block-twice", 10, "more content than the file has", &["corrupt"], |_| {
            with_bat_entry(1, le_u64_at)
        }),
        Case::new("vhdx-block-is-a-table", 10, "content that is metadata", &["corrupt"], |_| {
            with_bat_entry(1, |_, bat| bat as u64 | 6)
        }),
        Case::new("vhdx-block-past-end", 11, "reads past the file", &["truncated"], |_| {
            with_bat_entry(1, |_, _| 1 << 50 | 6)
        }),
    ]
}

fn log() -> Vec<Case> {
    vec![
        Case::new("vhdx-log-damaged", 16, "stale tables", &["corrupt"], |_| {
            let image = vhdx_dirty();
            let log = find(&image, b"loge");
            poked(image, &[(log + 5000, &[1])])
        }),
        Case::new("vhdx-log-writes-past-end", 16, "memory for the file", &["corrupt"], |_| {
            let mut image = vhdx_dirty();
            let (log, end) = (find(&image, b"loge"), image.len() as u64);
            image[log + 80..log + 88].copy_from_slice(&end.to_le_bytes());
            image[log + 4..log + 8].fill(0);
            let sum = crc32c::crc32c(&image[log..log + 8192]).to_le_bytes();
            poked(image, &[(log + 4, &sum)])
        }),
        Case::new("vhdx-log-makes-file-longer", 13, "8 MiB are 16 GiB", &["too-much-data"], |_| {
            log_makes_file_longer()
        }),
        Case::new("vhdx-log-of-128-MiB", 9, "CVE-2015-5162: memory for the log", &["too-large"], |_| {
            with_log_of(128 << 20)
        })
        .file_bytes(256 << 20),
        Case::new("vhdx-log-past-end", 9, "reads past the file", &["truncated"], |_| with_log_of(0xfff0_0000)),
    ]
}
