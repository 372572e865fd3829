//! Hostile VDIs.

use bulbil_format::Format;

use super::Case;
use super::images::*;

const MAP: usize = 512;

/// Three blocks of 1 MiB, the first and the last stored.
fn image() -> Vec<u8> {
    let mut content = small_content();
    content.resize(3 << 20, 0);
    content[2 << 20] = 1;
    qemu_of("vdi", "", &content)
}

fn with_u32(at: usize, word: u32) -> Vec<u8> {
    poked(image(), &[(at, &word.to_le_bytes())])
}

fn with_size(size_bytes: u64) -> Vec<u8> {
    poked(image(), &[(368, &size_bytes.to_le_bytes())])
}

pub(crate) fn cases() -> Vec<Case> {
    let unsupported = &["unsupported-format"];
    vec![
        Case::new("vdi-differencing", 17, "a child taken for the whole disk", unsupported, |_| with_u32(76, 4)),
        Case::new("vdi-undo", 17, "a child taken for the whole disk", unsupported, |_| with_u32(76, 3)),
        Case::new("vdi-parent-identifier", 17, "a child taken for the whole disk", unsupported, |_| {
            poked(image(), &[(424, &[7; 16])])
        }),
        Case::new("vdi-block-of-2-MiB", 17, "offsets that others see otherwise", unsupported, |_| {
            with_u32(376, 2 << 20)
        }),
        Case::new("vdi-block-of-0", 17, "a division by zero", unsupported, |_| with_u32(376, 0)),
        Case::new("vdi-version-2", 6, "a format not understood", unsupported, |_| with_u32(68, 0x0002_0000)),
        Case::new("vdi-size-0", 8, "numbers below zero", &["virtual-size"], |_| with_size(0)),
        Case::new("vdi-size-overflows", 8, "CVE-2013-2096: larger than any flavor", &["virtual-size"], |_| {
            with_size(u64::MAX - 511)
        }),
        Case::new("vdi-map-too-small", 9, "reads past the map", &["corrupt"], |_| with_size(1 << 40)),
        Case::new("vdi-map-past-end", 9, "reads past the file", &["truncated"], |_| with_u32(340, 0x7fff_fe00)),
        Case::new("vdi-map-is-the-header", 9, "content that is metadata", &["corrupt"], |_| with_u32(340, 0)),
        Case::new("vdi-blocks-are-the-map", 10, "content that is metadata", &["corrupt"], |_| with_u32(344, 512)),
        Case::new("vdi-block-twice", 10, "more content than the file has", &["corrupt"], |_| with_u32(MAP + 8, 0)),
        Case::new("vdi-block-not-stored", 17, "reads past the blocks", &["corrupt"], |_| with_u32(MAP + 8, 2)),
        Case::new("vdi-cut-in-half", 11, "missing content read as zeros", &["truncated"], |_| {
            let image = image();
            image[..image.len() / 2].to_vec()
        }),
        Case::new("vdi-cut-in-header", 11, "reads past the file", &["truncated"], |_| image()[..200].to_vec()),
        Case::new("vdi-map-of-64-MiB", 10, "CVE-2015-5162: memory for a map of holes", &["corrupt"], |_| {
            let image = poked(with_size(16 << 40), &[(384, &(1_u32 << 24).to_le_bytes())]);
            poked(image, &[(344, &(65_u32 << 20).to_le_bytes()), (MAP, &[0; 8])])[..1024].to_vec()
        })
        .file_bytes(256 << 20),
        Case::new("vdi-declared-raw", 7, "CVE-2024-44082", &["format-mismatch"], |_| image()).declared(Format::Raw),
        Case::new("vdi-and-qcow2", 7, "each scanner sees another file", &["ambiguous-format"], |_| {
            poked(image(), &[(0, b"QFI\xfb\0\0\0\x03")])
        }),
    ]
}
