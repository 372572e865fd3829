//! Hostile VMDKs: descriptors first of all.

use std::path::Path;

use bulbil_format::Format;

use super::Case;
use super::images::*;

const NO_PARENT: &str = "ffffffff";

fn flat(name: &str) -> Vec<u8> {
    vmdk_descriptor("monolithicFlat", NO_PARENT, &format!("RW 128 FLAT \"{name}\" 0"))
}

fn flat_of(path: &Path) -> Vec<u8> {
    flat(path.to_str().unwrap())
}

/// 64 MiB, so that there are two grain tables, with something in the first two grains.
fn sparse() -> Vec<u8> {
    let mut content = [small_content(), small_content()].concat();
    content.resize(64 << 20, 0);
    content[40 << 20] = 1;
    qemu_of("vmdk", "-o subformat=monolithicSparse", &content)
}

fn stream() -> Vec<u8> {
    qemu("vmdk", "-o subformat=streamOptimized")
}

/// A sector number in the header, as a place in the file.
fn sector_field(image: &[u8], at: usize) -> usize {
    usize::try_from(le_u64_at(image, at)).unwrap() * 512
}

fn directory_at(image: &[u8]) -> usize {
    sector_field(image, 56)
}

fn table_at(image: &[u8]) -> usize {
    le_u32_at(image, directory_at(image)) as usize * 512
}

fn with_table_entry(image: Vec<u8>, index: usize, entry: u32) -> Vec<u8> {
    let at = table_at(&image) + 4 * index;
    poked(image, &[(at, &entry.to_le_bytes())])
}

/// A sparse image whose descriptor is another one.
fn with_descriptor(descriptor: &[u8]) -> Vec<u8> {
    let mut image = sparse();
    let (at, len) = (sector_field(&image, 28), sector_field(&image, 36));
    image[at..at + len].fill(0);
    image[at..at + descriptor.len()].copy_from_slice(descriptor);
    image
}

pub(crate) fn cases() -> Vec<Case> {
    [names(), descriptors(), headers(), tables(), pretenders()].into_iter().flatten().collect()
}

fn names() -> Vec<Case> {
    let attack = "CVE-2022-47951: the extent is a file of the host";
    let refused = &["external-extent"];
    vec![
        Case::new("vmdk-flat-absolute", 14, attack, refused, flat_of),
        Case::new("vmdk-flat-absolute-declared", 14, attack, refused, flat_of).declared(Format::Vmdk),
        Case::new("vmdk-flat-dot-dot", 14, attack, refused, |_| flat("../canary")),
        Case::new("vmdk-flat-beside", 14, attack, refused, |_| flat("canary")),
        Case::new("vmdk-flat-backslash", 14, attack, refused, |_| flat("..\\canary")),
        Case::new("vmdk-flat-json", 19, "a name that is a program", refused, |_| {
            flat("json:{'driver':'file','filename':'/etc/passwd'}")
        }),
        Case::new("vmdk-flat-nbd", 19, "a name that is an address", refused, |_| flat("nbd:127.0.0.1:10809")),
        Case::new("vmdk-flat-fd", 19, "a name that is a descriptor", refused, |_| flat("fd:0")),
        Case::new("vmdk-vmfs", 14, attack, refused, |canary| {
            vmdk_descriptor("vmfs", NO_PARENT, &format!("RW 128 VMFS \"{}\"", canary.display()))
        }),
        Case::new("vmdk-split-sparse", 14, attack, refused, |canary| {
            let extents = format!("RW 128 SPARSE \"{}\"", canary.display());
            vmdk_descriptor("twoGbMaxExtentSparse", NO_PARENT, &extents)
        }),
        Case::new("vmdk-sparse-names-flat", 14, attack, refused, |canary| with_descriptor(&flat_of(canary))),
        Case::new("vmdk-padded-descriptor", 14, "a text that passes for raw", refused, |canary| {
            let mut descriptor = flat_of(canary);
            descriptor.resize(64 << 10, 0);
            descriptor
        }),
        Case::new(
            "vmdk-device",
            14,
            "CVE-2022-47951: the extent is a disk of the host",
            &["unsupported-format"],
            |_| vmdk_descriptor("fullDevice", NO_PARENT, "RW 128 FLAT \"/dev/sda\" 0"),
        ),
    ]
}

fn descriptors() -> Vec<Case> {
    vec![
        Case::new("vmdk-child", 14, "a child taken for the whole disk", &["differencing"], |canary| {
            let descriptor = vmdk_descriptor("monolithicFlat", "12345678", "RW 128 FLAT \"a\" 0");
            [&descriptor[..], format!("parentFileNameHint=\"{}\"\n", canary.display()).as_bytes()].concat()
        }),
        Case::new("vmdk-sparse-child", 14, "a child taken for the whole disk", &["differencing"], |_| {
            with_descriptor(&vmdk_descriptor("monolithicSparse", "12345678", "RW 131072 SPARSE \"disk.vmdk\""))
        }),
        Case::new("vmdk-zero-byte-inside", 14, "each reader sees another text", &["bad-descriptor"], |_| {
            let descriptor = vmdk_descriptor("monolithicSparse", NO_PARENT, "RW 131072 SPARSE \"disk.vmdk\"");
            with_descriptor(&[&descriptor[..], b"\0RW 1 FLAT \"/etc/passwd\" 0\n"].concat())
        }),
        Case::new("vmdk-unknown-line", 14, "a line that others obey", &["bad-descriptor"], |_| {
            [&flat("a")[..], b"include \"/etc/passwd\"\n"].concat()
        }),
        Case::new("vmdk-control-characters", 14, "a message for the terminal", &["bad-descriptor"], |_| {
            [&flat("a")[..], b"ddb.comment = \"\x1b]0;owned\x07\"\n"].concat()
        }),
        Case::new("vmdk-no-extent", 14, "a disk of nothing", &["bad-descriptor"], |_| {
            vmdk_descriptor("monolithicFlat", NO_PARENT, "")
        }),
        Case::new("vmdk-extents-that-overflow", 8, "CVE-2013-2096: sizes that wrap", &["virtual-size"], |_| {
            let extents = format!("RW {} ZERO\nRW {0} ZERO", u64::MAX);
            vmdk_descriptor("twoGbMaxExtentFlat", NO_PARENT, &extents)
        }),
        Case::new("vmdk-5000-extents", 9, "work for each line", &["bad-descriptor"], |_| {
            vmdk_descriptor("twoGbMaxExtentFlat", NO_PARENT, &"RW 8 ZERO\n".repeat(5000))
        }),
        Case::new("vmdk-descriptor-of-2-MiB", 9, "memory for the text", &["too-large"], |_| flat("a"))
            .file_bytes(2 << 20),
        Case::new("vmdk-two-sizes", 9, "reads past the tables", &["bad-descriptor"], |_| {
            with_descriptor(&vmdk_descriptor("monolithicSparse", NO_PARENT, "RW 262144 SPARSE \"disk.vmdk\""))
        }),
        Case::new("vmdk-encrypted", 3, "ciphertext taken for content", &["encrypted"], |_| {
            let descriptor = vmdk_descriptor("monolithicSparse", NO_PARENT, "RW 131072 SPARSE \"disk.vmdk\"");
            with_descriptor(&[&descriptor[..], b"encryption.keySafe = \"vmware:key/list/\"\n"].concat())
        }),
        Case::new("vmdk-empty-descriptor", 14, "an extent taken for the whole disk", &["bad-descriptor"], |_| {
            with_descriptor(b"")
        }),
    ]
}

fn headers() -> Vec<Case> {
    vec![
        Case::new("vmdk-128-PiB", 8, "CVE-2015-5162: memory for the directory", &["virtual-size"], |_| {
            poked(sparse(), &[(12, &(1_u64 << 48).to_le_bytes())])
        }),
        Case::new("vmdk-directory-too-large", 9, "CVE-2014-0222: memory for a table", &["corrupt"], |_| {
            poked(sparse(), &[(12, &(1_u64 << 37).to_le_bytes()), (20, &8_u64.to_le_bytes())])
        }),
        Case::new("vmdk-directory-of-32-MiB", 10, "CVE-2015-5162: memory for a table of holes", &["corrupt"], |_| {
            // Grains of 4 KiB: 2 MiB for each entry. The last two are one table.
            let descriptor = vmdk_descriptor("monolithicSparse", NO_PARENT, "RW 34359738368 SPARSE \"disk.vmdk\"");
            let mut image = with_descriptor(&descriptor);
            image[12..20].copy_from_slice(&(1_u64 << 35).to_le_bytes());
            image[20..28].copy_from_slice(&8_u64.to_le_bytes());
            image[56..64].copy_from_slice(&2048_u64.to_le_bytes());
            image.resize(34 << 20, 0);
            let end = (1 << 20) + (32 << 20);
            image[end - 8..end].copy_from_slice(&[0, 8, 1, 0, 0, 8, 1, 0]);
            image
        })
        .largest_table(),
        Case::new("vmdk-tables-in-a-hole", 9, "CVE-2015-5162: reading 16 GiB of nothing", &["truncated"], |_| {
            let descriptor = vmdk_descriptor("monolithicSparse", NO_PARENT, "RW 34359738368 SPARSE \"disk.vmdk\"");
            let mut image = with_descriptor(&descriptor);
            image[12..20].copy_from_slice(&(1_u64 << 35).to_le_bytes());
            image[20..28].copy_from_slice(&8_u64.to_le_bytes());
            image[56..64].copy_from_slice(&2048_u64.to_le_bytes());
            image.resize(34 << 20, 0);
            let (start, end) = (1 << 20, 33 << 20);
            for (index, entry) in image[start..end].chunks_exact_mut(4).enumerate() {
                entry.copy_from_slice(&(u32::try_from(index).unwrap() * 4 + (34 << 11)).to_le_bytes());
            }
            // The last one is not in the hole, and names a grain past the end.
            image[end - 4..end].copy_from_slice(&(33_u32 << 11).to_le_bytes());
            image[end..end + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            image
        })
        .file_bytes((34 << 20) + (16 << 30))
        .largest_table(),
        Case::new("vmdk-directory-past-end", 9, "reads past the file", &["truncated"], |_| {
            poked(sparse(), &[(56, &0x4000_0000_u64.to_le_bytes())])
        }),
        Case::new("vmdk-directory-overflows", 9, "an offset that wraps", &["corrupt", "truncated"], |_| {
            poked(sparse(), &[(56, &(u64::MAX - 3).to_le_bytes())])
        }),
        Case::new("vmdk-grain-of-0", 9, "a division by zero", &["corrupt"], |_| poked(sparse(), &[(20, &[0; 8])])),
        Case::new("vmdk-grain-of-2-to-the-63", 9, "numbers that wrap", &["corrupt"], |_| {
            poked(sparse(), &[(20, &(1_u64 << 63).to_le_bytes())])
        }),
        Case::new("vmdk-table-of-0-entries", 9, "a division by zero", &["corrupt"], |_| {
            poked(sparse(), &[(44, &[0; 4])])
        }),
        Case::new("vmdk-version-9", 6, "a format not understood", &["unsupported-format"], |_| {
            poked(sparse(), &[(4, &9_u32.to_le_bytes())])
        }),
        Case::new("vmdk-unknown-flag", 4, "a format not understood", &["unsupported-feature"], |_| {
            poked(sparse(), &[(8, &(1_u32 << 30 | 3).to_le_bytes())])
        }),
        Case::new("vmdk-descriptor-past-end", 9, "reads past the file", &["truncated"], |_| {
            poked(sparse(), &[(28, &(1_u64 << 40).to_le_bytes())])
        }),
        Case::new("vmdk-line-ends-changed", 9, "damage by a transfer as text", &["corrupt"], |_| {
            poked(sparse(), &[(73, b"\n\n\n\n")])
        }),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        Case::new("vmdk-table-twice", 10, "CVE-2013-4463: more content than the file", &["corrupt"], |_| {
            let image = sparse();
            let directory = directory_at(&image);
            let first = le_u32_at(&image, directory).to_le_bytes();
            poked(image, &[(directory + 4, &first)])
        }),
        Case::new("vmdk-grain-twice", 10, "CVE-2013-4463: more content than the file", &["corrupt"], |_| {
            let image = sparse();
            let first = le_u32_at(&image, table_at(&image));
            with_table_entry(image, 1, first)
        }),
        Case::new("vmdk-grain-is-a-table", 10, "content that is metadata", &["corrupt"], |_| {
            let image = sparse();
            let table = u32::try_from(table_at(&image) / 512).unwrap();
            with_table_entry(image, 1, table)
        }),
        Case::new("vmdk-grain-past-end", 11, "reads past the file", &["truncated"], |_| {
            with_table_entry(sparse(), 0, 0x7fff_ffff)
        }),
        Case::new("vmdk-cut-in-half", 11, "missing content read as zeros", &["truncated"], |_| {
            let image = sparse();
            image[..image.len() / 2].to_vec()
        }),
        Case::new("vmdk-stream-without-footer", 11, "missing tables", &["truncated"], |_| {
            poked(stream(), &[(56, &u64::MAX.to_le_bytes())])
        }),
        Case::new("vmdk-stream-damaged", 12, "content of the decoder's memory", &["corrupt"], |_| {
            let image = stream();
            let grain = le_u32_at(&image, table_at(&image)) as usize * 512;
            poked(image, &[(grain + 12, &[0xff; 32])])
        }),
        Case::new("vmdk-stream-of-another-place", 10, "content at two places", &["corrupt"], |_| {
            let image = stream();
            let grain = le_u32_at(&image, table_at(&image)) as usize * 512;
            poked(image, &[(grain, &128_u64.to_le_bytes())])
        }),
        Case::new("vmdk-stream-grain-too-long", 12, "memory for a grain", &["corrupt"], |_| {
            let image = stream();
            let grain = le_u32_at(&image, table_at(&image)) as usize * 512;
            poked(image, &[(grain + 8, &u32::MAX.to_le_bytes())])
        }),
    ]
}

fn pretenders() -> Vec<Case> {
    vec![
        Case::new("vmdk-declared-raw", 7, "CVE-2024-40767, CVE-2024-44082", &["format-mismatch"], |_| sparse())
            .declared(Format::Raw),
        Case::new("vmdk-descriptor-declared-raw", 7, "CVE-2024-40767", &["format-mismatch"], flat_of)
            .declared(Format::Raw),
        Case::new("vmdk-and-iso", 7, "each scanner sees another file", &["ambiguous-format"], |_| {
            let mut both = sparse();
            both[0x8001..0x8006].copy_from_slice(b"CD001");
            both
        }),
        Case::new("vmdk-descriptor-and-vhd", 7, "each scanner sees another file", &["ambiguous-format"], |canary| {
            let mut both = flat_of(canary);
            both.resize(4096, 0);
            [both, vhd_footer(VHD_FIXED, 4096)].concat()
        }),
    ]
}
