//! Hostile qcow2 images, and disks that pretend to be one.

use std::path::Path;

use bulbil_format::Format;

use super::Case;
use super::images::*;

/// Clusters of 4 KiB: the header, its extensions at 112, and room for names at 0x800.
fn image() -> Vec<u8> {
    qemu("qcow2", "-o cluster_size=4k")
}

fn with_backing(name: &[u8]) -> Vec<u8> {
    let len = u32::try_from(name.len()).unwrap();
    poked(image(), &[(8, &0x800_u64.to_be_bytes()), (16, &len.to_be_bytes()), (0x800, name)])
}

/// With the incompatible feature bit and the header extension that names the file.
fn with_data_file(name: &[u8], feature: u8) -> Vec<u8> {
    let extension = [&0x4441_5441_u32.to_be_bytes()[..], &u32::try_from(name.len()).unwrap().to_be_bytes(), name];
    poked(image(), &[(79, &[feature]), (112, &extension.concat())])
}

/// A disk that the guest inside wrote a header on.
fn raw_disk_with_header(canary: &Path) -> Vec<u8> {
    let mut disk = small_content();
    let header = with_backing(canary.as_os_str().as_encoded_bytes());
    disk[..4096].copy_from_slice(&header[..4096]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// All L1 entries are one table, all entries of the table one cluster: 384 KiB for 4 TiB.
fn alias_bomb() -> Vec<u8> {
    let mut bomb = qcow2_header(4 << 40, 8192);
    fill_be(&mut bomb, 2 << 16..3 << 16, COPIED | 3 << 16);
    fill_be(&mut bomb, 3 << 16..4 << 16, COPIED | 4 << 16);
    bomb
}

/// One compressed cluster that is all of the disk.
fn compressed_alias_bomb() -> Vec<u8> {
    let mut bomb = qcow2_header(512 << 20, 1);
    fill_be(&mut bomb, 2 << 16..(2 << 16) + 8, COPIED | 3 << 16);
    fill_be(&mut bomb, 3 << 16..4 << 16, 1 << 62 | 4 << 16);
    bomb
}

/// Compressed clusters of 2 MiB that begin at each byte of some KiB: no two at the same, 512 GiB in all.
fn overlapping_compressed_bomb() -> Vec<u8> {
    let mut bomb = vec![0; 5 << 21];
    bomb[..104].copy_from_slice(&qcow2_header(512 << 30, 1)[..104]);
    bomb[20..24].copy_from_slice(&21_u32.to_be_bytes());
    fill_be(&mut bomb, 40..48, 2 << 21);
    fill_be(&mut bomb, 48..56, 1 << 21);
    fill_be(&mut bomb, 2 << 21..(2 << 21) + 8, COPIED | 3 << 21);
    for index in 0..1_usize << 18 {
        let at = (3 << 21) + 8 * index;
        fill_be(&mut bomb, at..at + 8, 1 << 62 | ((4 << 21) + index as u64));
    }
    bomb
}

/// The last compressed byte is followed by more: what comes out is longer than a cluster.
fn oversized_zstd() -> Vec<u8> {
    let mut image = qemu_of("qcow2", "-c -o compression_type=zstd", &vec![0x11; 1 << 20]);
    let l2 = qcow2_l2_at(&image);
    let at = usize::try_from(be_u64_at(&image, l2) & ((1 << 50) - 1)).unwrap();
    let frame = zstd(&vec![0x11; 1 << 20]);
    image[at..at + frame.len()].copy_from_slice(&frame);
    image
}

fn damaged_zlib() -> Vec<u8> {
    let mut image = qemu_of("qcow2", "-c", &small_content());
    let l2 = qcow2_l2_at(&image);
    let at = usize::try_from(be_u64_at(&image, l2) & ((1 << 50) - 1)).unwrap();
    image[at..at + 16].fill(0xff);
    image
}

fn with_l2_entry(entry: impl Fn(&[u8]) -> u64) -> Vec<u8> {
    let mut image = image();
    let (l2, entry) = (qcow2_l2_at(&image), entry(&image));
    fill_be(&mut image, l2..l2 + 8, entry);
    image
}

pub(crate) fn cases() -> Vec<Case> {
    [references(), features(), pretenders(), sizes(), tables(), content()].into_iter().flatten().collect()
}

fn references() -> Vec<Case> {
    let backed: fn(&Path) -> Vec<u8> = |canary| with_backing(canary.as_os_str().as_encoded_bytes());
    let name = "CVE-2015-5163: the backing file is a file of the host";
    vec![
        Case::new("qcow2-backing-file", 1, name, &["has-backing-file"], backed),
        Case::new("qcow2-backing-file-declared", 1, name, &["has-backing-file"], backed).declared(Format::Qcow2),
        Case::new("qcow2-backing-file-of-length-0", 1, name, &["has-backing-file"], |_| {
            poked(image(), &[(8, &0x800_u64.to_be_bytes())])
        }),
        Case::new("qcow2-backing-file-json", 19, "a name that is a program", &["has-backing-file"], |_| {
            with_backing(br#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}"#)
        }),
        Case::new("qcow2-backing-file-nbd", 19, "a name that is an address", &["has-backing-file"], |_| {
            with_backing(b"nbd:127.0.0.1:10809:exportname=secret")
        }),
        Case::new("qcow2-data-file", 2, "CVE-2024-32498: data of the host", &["external-data-file"], |canary| {
            with_data_file(canary.as_os_str().as_encoded_bytes(), 4)
        }),
        Case::new("qcow2-data-file-declared", 2, "CVE-2024-32498", &["external-data-file"], |canary| {
            with_data_file(canary.as_os_str().as_encoded_bytes(), 4)
        })
        .declared(Format::Qcow2),
        Case::new("qcow2-data-file-json", 19, "CVE-2024-4467: opened to be described", &["external-data-file"], |_| {
            with_data_file(br#"json:{"driver":"nbd","host":"127.0.0.1"}"#, 4)
        }),
        Case::new("qcow2-data-file-without-bit", 2, "CVE-2024-32498", &["external-data-file"], |canary| {
            with_data_file(canary.as_os_str().as_encoded_bytes(), 0)
        }),
    ]
}

fn features() -> Vec<Case> {
    vec![
        Case::new("qcow2-encrypted-aes", 3, "ciphertext taken for content", &["encrypted"], |_| {
            poked(image(), &[(32, &1_u32.to_be_bytes())])
        }),
        Case::new("qcow2-encrypted-luks", 3, "ciphertext taken for content", &["encrypted"], |_| {
            poked(image(), &[(32, &2_u32.to_be_bytes())])
        }),
        Case::new("qcow2-unknown-feature", 4, "a format not understood", &["unsupported-feature"], |_| {
            poked(image(), &[(72, &[0x80])])
        }),
        Case::new("qcow2-marked-corrupt", 5, "content known to be wrong", &["marked-corrupt"], |_| {
            poked(image(), &[(79, &[2])])
        }),
        Case::new("qcow2-version-4", 6, "a format not understood", &["unsupported-format"], |_| {
            poked(image(), &[(4, &4_u32.to_be_bytes())])
        }),
        Case::new("qcow1", 6, "CVE-2014-0222: L2 size of qcow version 1", &["unsupported-format"], |_| {
            poked(image(), &[(4, &1_u32.to_be_bytes()), (32, &[0xff; 16])])
        }),
    ]
}

fn pretenders() -> Vec<Case> {
    vec![
        Case::new("qcow2-declared-raw", 7, "CVE-2024-40767, CVE-2024-44082", &["format-mismatch"], |canary| {
            with_backing(canary.as_os_str().as_encoded_bytes())
        })
        .declared(Format::Raw),
        Case::new("guest-wrote-header", 7, "CVE-2014-3641: probed again", &["has-backing-file"], raw_disk_with_header),
        Case::new("guest-wrote-header-raw", 7, "CVE-2014-3641", &["format-mismatch"], raw_disk_with_header)
            .declared(Format::Raw),
        Case::new("guest-header-before-resize", 7, "CVE-2026-24708", &["format-mismatch"], |_| {
            poked(small_content(), &[(0, &qcow2_header(1 << 40, 1 << 11)[..104])])
        })
        .declared(Format::Raw),
        Case::new("qcow2-and-iso", 7, "each scanner sees another file", &["ambiguous-format"], |_| {
            let mut both = qemu("qcow2", "");
            both[0x8001..0x8006].copy_from_slice(b"CD001");
            both
        }),
        Case::new("qcow2-and-vhd", 7, "each scanner sees another file", &["ambiguous-format"], |_| {
            [image(), vhd_footer(VHD_FIXED, 1 << 20)].concat()
        }),
        Case::new("qcow2-and-vhd-declared", 7, "each scanner sees another file", &["ambiguous-format"], |_| {
            [image(), vhd_footer(VHD_FIXED, 1 << 20)].concat()
        })
        .declared(Format::Qcow2),
        Case::new("qcow2-declared-vmdk", 7, "a reader for another format", &["format-mismatch"], |_| image())
            .declared(Format::Vmdk),
    ]
}

fn sizes() -> Vec<Case> {
    vec![
        Case::new("qcow2-size-0", 8, "a division by the size", &["virtual-size"], |_| poked(image(), &[(24, &[0; 8])])),
        Case::new("qcow2-size-64-TiB-and-more", 8, "CVE-2013-2096: larger than any flavor", &["virtual-size"], |_| {
            poked(image(), &[(24, &((64_u64 << 40) + 512).to_be_bytes())])
        }),
        Case::new("qcow2-size-overflows", 8, "CVE-2014-0223: size times anything", &["virtual-size"], |_| {
            poked(image(), &[(24, &(u64::MAX - 511).to_be_bytes())])
        }),
        Case::new("qcow2-size-odd", 8, "half of a sector", &["virtual-size"], |_| {
            poked(image(), &[(24, &513_u64.to_be_bytes())])
        }),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        Case::new("qcow2-l1-too-large", 9, "CVE-2014-0222: memory for a table", &["corrupt"], |_| {
            poked(image(), &[(36, &u32::MAX.to_be_bytes())])
        }),
        Case::new("qcow2-l1-past-end", 9, "memory for a table", &["truncated"], |_| {
            poked(image(), &[(36, &(4_u32 << 20).to_be_bytes())])
        }),
        Case::new("qcow2-l1-end-overflows", 9, "an offset that wraps", &["corrupt"], |_| {
            poked(image(), &[(40, &u64::MAX.to_be_bytes())])
        }),
        Case::new("qcow2-l1-misaligned", 9, "a table in the midst of another", &["corrupt"], |_| {
            poked(image(), &[(40, &0x1200_u64.to_be_bytes())])
        }),
        Case::new("qcow2-l1-too-small", 9, "CVE-2014-0223: reads past the table", &["corrupt"], |_| {
            poked(image(), &[(24, &(1_u64 << 40).to_be_bytes())])
        }),
        Case::new("qcow2-refcounts-too-large", 9, "memory for a table", &["corrupt"], |_| {
            poked(image(), &[(56, &u32::MAX.to_be_bytes())])
        }),
        Case::new("qcow2-snapshots-too-many", 9, "memory for a table", &["corrupt"], |_| {
            poked(image(), &[(60, &u32::MAX.to_be_bytes())])
        }),
        Case::new("qcow2-snapshots-past-end", 9, "reads past the file", &["truncated"], |_| {
            poked(image(), &[(60, &1_u32.to_be_bytes()), (64, &(1_u64 << 40).to_be_bytes())])
        }),
        Case::new("qcow2-cluster-2-to-the-200", 9, "a shift past the word", &["corrupt"], |_| {
            poked(image(), &[(20, &200_u32.to_be_bytes())])
        }),
        Case::new("qcow2-l1-of-32-MiB", 10, "CVE-2015-5162: memory for a table of holes", &["corrupt"], |_| {
            // Clusters of 4 KiB: 2 MiB for each entry. The last two are one table.
            let mut image = vec![0; 33 << 20];
            image[..104].copy_from_slice(&qcow2_header(8 << 40, 4 << 20)[..104]);
            image[20..24].copy_from_slice(&12_u32.to_be_bytes());
            fill_be(&mut image, 40..48, 64 << 10);
            fill_be(&mut image, 48..56, 4096);
            let end = (64 << 10) + (32 << 20);
            fill_be(&mut image, end - 16..end, COPIED | (end as u64 + 4096));
            image
        })
        .largest_table(),
        Case::new("qcow2-l2-tables-in-a-hole", 9, "CVE-2015-5162: reading 16 GiB of nothing", &["corrupt"], |_| {
            let mut image = vec![0; 33 << 20];
            image[..104].copy_from_slice(&qcow2_header(8 << 40, 4 << 20)[..104]);
            image[20..24].copy_from_slice(&12_u32.to_be_bytes());
            fill_be(&mut image, 40..48, 64 << 10);
            fill_be(&mut image, 48..56, 4096);
            let end = (64 << 10) + (32 << 20);
            for n in 0..4 << 20 {
                let at = (64 << 10) + 8 * n;
                fill_be(&mut image, at..at + 8, COPIED | (end as u64 + 4096 * (n as u64 + 1)));
            }
            // The last one is not in the hole, and damaged.
            fill_be(&mut image, end - 8..end, COPIED | end as u64);
            fill_be(&mut image, end..end + 8, 2);
            image
        })
        .file_bytes((34 << 20) + (16 << 30))
        .largest_table(),
        Case::new("qcow2-terabytes-of-512", 9, "CVE-2015-5162: memory by file length", &["too-large"], |_| {
            qemu("qcow2", "-o cluster_size=512")
        })
        .file_bytes(1 << 42),
    ]
}

fn content() -> Vec<Case> {
    vec![
        Case::new("qcow2-alias-bomb", 10, "CVE-2015-5162: 384 KiB are 4 TiB", &["corrupt"], |_| alias_bomb()),
        Case::new("qcow2-compressed-alias-bomb", 10, "CVE-2013-4463, CVE-2013-4469", &["corrupt"], |_| {
            compressed_alias_bomb()
        }),
        Case::new("qcow2-compressed-overlap-bomb", 13, "CVE-2013-4463: 10 MiB are 512 GiB", &["too-much-data"], |_| {
            overlapping_compressed_bomb()
        }),
        Case::new("qcow2-cluster-is-a-table", 10, "content that is metadata", &["corrupt"], |_| {
            with_l2_entry(|image| COPIED | qcow2_l2_at(image) as u64)
        }),
        Case::new("qcow2-cluster-is-the-header", 10, "content that is metadata", &["corrupt"], |_| {
            with_l2_entry(|_| 1 << 62 | 17)
        }),
        Case::new("qcow2-cluster-past-end", 11, "reads past the file", &["truncated"], |_| {
            with_l2_entry(|_| COPIED | 1 << 50)
        }),
        Case::new("qcow2-reserved-bits", 9, "an entry not understood", &["corrupt"], |_| {
            with_l2_entry(|image| be_u64_at(image, qcow2_l2_at(image)) | 2)
        }),
        Case::new("qcow2-cut-in-half", 11, "missing content read as zeros", &["truncated"], |_| {
            let image = image();
            image[..image.len() / 2].to_vec()
        }),
        Case::new("qcow2-cut-in-header", 11, "reads past the file", &["truncated"], |_| image()[..80].to_vec()),
        Case::new("qcow2-damaged-zlib", 12, "content of the decoder's memory", &["corrupt"], |_| damaged_zlib()),
        Case::new("qcow2-oversized-zstd", 12, "a decoder past its buffer", &["corrupt"], |_| oversized_zstd()),
    ]
}
