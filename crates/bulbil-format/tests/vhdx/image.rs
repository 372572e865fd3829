//! Images made by hand: what `qemu-img` does not write.
//!
//! ```text
//! 0 headers   1 MiB log   2 MiB metadata   3 MiB BAT   4 MiB blocks of 1 MiB
//! block of the disk   0        1     2            3        4         5
//! state               present  ZERO  NOT_PRESENT  present  UNMAPPED  present, of which 1536 bytes are in the disk
//! offset in the file  5 MiB    -     -            4 MiB    (5 MiB)   6 MiB, where the file ends with the disk
//! ```

use crate::support::{Rng, content};

pub(crate) const MIB: usize = 1 << 20;
pub(crate) const HEADERS: [usize; 2] = [0x1_0000, 0x2_0000];
pub(crate) const REGION_TABLES: [usize; 2] = [0x3_0000, 0x4_0000];
pub(crate) const LOG: usize = MIB;
pub(crate) const METADATA: usize = 2 * MIB;
pub(crate) const BAT: usize = 3 * MIB;
/// Where the items are, in the order of the table.
pub(crate) const FILE_PARAMETERS: usize = METADATA + 0x1_0000;
pub(crate) const DISK_SIZE: usize = FILE_PARAMETERS + 0x1000;
pub(crate) const LOGICAL_SECTOR: usize = FILE_PARAMETERS + 0x2000;
pub(crate) const PHYSICAL_SECTOR: usize = FILE_PARAMETERS + 0x3000;
pub(crate) const DISK_ID: usize = FILE_PARAMETERS + 0x4000;
/// The entry that is free for one more item, and the place for it.
pub(crate) const NEXT_ITEM_ENTRY: usize = METADATA + 32 + 5 * 32;
pub(crate) const NEXT_ITEM: usize = FILE_PARAMETERS + 0x5000;

pub(crate) const DISK_BYTES: usize = 5 * MIB + 1536;
pub(crate) const DISK_ID_TEXT: &str = "00112233-4455-6677-8899-aabbccddeeff";

/// Turns the digits of a GUID into its bytes in the file.
pub(crate) fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let mut bytes = u128::from_str_radix(&digits, 16).unwrap().to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

pub(crate) fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content: Vec<u8>,
}

/// The image in the picture above.
pub(crate) fn image() -> Image {
    let mut disk = content(&mut Rng(7), DISK_BYTES);
    for block in [1, 2, 4] {
        disk[block * MIB..(block + 1) * MIB].fill(0);
    }
    let mut image = Image { bytes: vec![0; 6 * MIB + 1536], content: disk };
    image.put(0, b"vhdxfile");
    image.put(8, &utf16("By \u{1b}[31mhand \u{202e}1.0"));
    for (at, sequence) in HEADERS.into_iter().zip([8_u64, 7]) {
        image.put(at, b"head");
        image.put(at + 8, &sequence.to_le_bytes());
        image.put(at + 32, &[0xdd; 16]);
        image.put(at + 66, &1_u16.to_le_bytes());
        image.put(at + 68, &u32::try_from(MIB).unwrap().to_le_bytes());
        image.put(at + 72, &(LOG as u64).to_le_bytes());
    }
    for at in REGION_TABLES {
        image.put(at, b"regi");
        image.put(at + 8, &2_u32.to_le_bytes());
        image.put_region(at + 16, "2DC27766-F623-4200-9D64-115E9BFD4A08", BAT, true);
        image.put_region(at + 48, "8B7CA206-4790-4B9A-B8FE-575F050F886E", METADATA, true);
    }
    image.put(METADATA, b"metadata");
    image.put(METADATA + 10, &5_u16.to_le_bytes());
    let disk_id = guid(DISK_ID_TEXT);
    let items: [(&str, usize, &[u8]); 5] = [
        ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", FILE_PARAMETERS, &(MIB as u64).to_le_bytes()),
        ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", DISK_SIZE, &(DISK_BYTES as u64).to_le_bytes()),
        ("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", LOGICAL_SECTOR, &512_u32.to_le_bytes()),
        ("CDA348C7-445D-4471-9CC9-E9885251C556", PHYSICAL_SECTOR, &4096_u32.to_le_bytes()),
        ("BECA12AB-B2E6-4523-93EF-C309E000C746", DISK_ID, &disk_id),
    ];
    for (index, (kind, at, value)) in items.into_iter().enumerate() {
        image.put_item(METADATA + 32 + index * 32, kind, 4, at, value);
    }
    for (block, entry) in [(0, entry(5)), (1, 2), (3, entry(4)), (4, 5 << 20 | 3), (5, entry(6))] {
        image.put(BAT + 8 * block, &u64::to_le_bytes(entry));
    }
    for (block, mib) in [(0, 5), (3, 4), (5, 6)] {
        let end = ((block + 1) * MIB).min(DISK_BYTES);
        let bytes = image.content[block * MIB..end].to_vec();
        image.put(mib * MIB, &bytes);
    }
    image.seal();
    image
}

/// The BAT entry of a block that is present.
pub(crate) fn entry(host_mib: u64) -> u64 {
    host_mib << 20 | 6
}

impl Image {
    pub(crate) fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Writes both region tables or both headers alike: `at` is an offset in each.
    pub(crate) fn put_both(&mut self, places: [usize; 2], at: usize, value: &[u8]) {
        places.into_iter().for_each(|place| self.put(place + at, value));
    }

    /// Writes the entry of a region of 1 MiB.
    pub(crate) fn put_region(&mut self, at: usize, kind: &str, offset: usize, required: bool) {
        self.put(at, &guid(kind));
        self.put(at + 16, &(offset as u64).to_le_bytes());
        self.put(at + 24, &u32::try_from(MIB).unwrap().to_le_bytes());
        self.put(at + 28, &u32::from(required).to_le_bytes());
    }

    /// Writes the table entry of an item, and the item.
    pub(crate) fn put_item(&mut self, entry: usize, kind: &str, flags: u32, at: usize, value: &[u8]) {
        self.put(entry, &guid(kind));
        self.put(entry + 16, &u32::try_from(at - METADATA).unwrap().to_le_bytes());
        self.put(entry + 20, &u32::try_from(value.len()).unwrap().to_le_bytes());
        self.put(entry + 24, &flags.to_le_bytes());
        self.put(at, value);
    }

    /// Adds an item to the table.
    pub(crate) fn add_item(&mut self, kind: &str, flags: u32, value: &[u8]) {
        self.put(METADATA + 10, &6_u16.to_le_bytes());
        self.put_item(NEXT_ITEM_ENTRY, kind, flags, NEXT_ITEM, value);
    }

    /// Makes the checksums right.
    pub(crate) fn seal(&mut self) {
        for (place, len) in sums() {
            seal(&mut self.bytes[place..place + len]);
        }
    }
}

/// The structures at fixed places that have a checksum.
pub(crate) fn sums() -> impl Iterator<Item = (usize, usize)> {
    HEADERS.map(|at| (at, 4096)).into_iter().chain(REGION_TABLES.map(|at| (at, 0x1_0000)))
}

/// Makes the checksum of a structure right.
pub(crate) fn seal(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}
