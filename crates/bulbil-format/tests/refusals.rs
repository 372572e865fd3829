//! What must not be opened is refused, with the reason.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;

use bulbil_format::{Format, FormatError};
use support::{Rng, content, open_bytes, open_path, read_all, run, write_sparse};

const SEED: u64 = 0x5eed_0002;
const DISK_BYTES: usize = 1 << 20;

/// Converts seeded content with `qemu-img`; returns the content and the bytes of the qcow2 image.
fn qcow2(args: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    let disk = content(&mut Rng(SEED), DISK_BYTES);
    write_sparse(&raw, &disk);
    run("qemu-img", &[&["convert", "-O", "qcow2"], args, &[raw.to_str().unwrap(), image.to_str().unwrap()]].concat());
    (disk, std::fs::read(image).unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn index_at(bytes: &[u8], at: usize, mask: u64) -> usize {
    usize::try_from(u64_at(bytes, at) & mask).unwrap()
}

/// Where the L1 table is.
fn l1_at(bytes: &[u8]) -> usize {
    index_at(bytes, 40, u64::MAX)
}

/// Where the first L2 table is.
fn l2_at(bytes: &[u8]) -> usize {
    index_at(bytes, l1_at(bytes), OFFSET)
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

fn poked(bytes: &[u8], at: usize, poke: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + poke.len()].copy_from_slice(poke);
    bytes
}

#[track_caller]
fn check_refused(bytes: &[u8], message: &str) {
    let error = open_bytes(bytes, None).map(|_| ()).expect_err(message);
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
    let code = error.code();
    assert!(message.starts_with(code) || matches!(code, "not-a-disk" | "truncated"), "{code}: {message}");
}

#[test]
fn header_fields_out_of_bounds_are_refused() {
    let (_, image) = qcow2(&["-o", "cluster_size=4k"]);
    let name = [&b"/etc/passwd\x1b[31m"[..], &[0; 8]].concat();
    let mut backed = poked(&image, 8, &0x800_u64.to_be_bytes());
    backed = poked(&backed, 16, &16_u32.to_be_bytes());
    check_refused(&poked(&backed, 0x800, &name), r#"has-backing-file: "/etc/passwd\u{1b}[31m"; import the parent"#);
    for (at, poke, message) in [
        (4, &[0, 0, 0, 1][..], "unsupported-format: qcow version 1"),
        (4, &[0, 0, 0, 4], "unsupported-format: qcow2 version 4"),
        (8, &[0xff; 8], "has-backing-file: \"\""),
        (8, &0x200_u64.to_be_bytes(), "has-backing-file: \"\""),
        (16, &u32::MAX.to_be_bytes(), "has-backing-file: \"QFI"),
        (20, &8_u32.to_be_bytes(), "corrupt: cluster size of 2^8"),
        (20, &22_u32.to_be_bytes(), "corrupt: cluster size of 2^22"),
        (20, &u32::MAX.to_be_bytes(), "corrupt: cluster size of 2^4294967295"),
        (24, &0_u64.to_be_bytes(), "virtual-size: 0 bytes is an empty disk"),
        (24, &513_u64.to_be_bytes(), "virtual-size: 513 bytes is not a multiple of 512"),
        (24, &((64_u64 << 40) + 512).to_be_bytes(), "virtual-size: 70368744178176 bytes is more than"),
        (24, &(3_u64 << 20).to_be_bytes(), "corrupt: L1 table too small: 1 of 2 entries"),
        (32, &1_u32.to_be_bytes(), "encrypted: the content, with AES"),
        (32, &2_u32.to_be_bytes(), "encrypted: the content, with LUKS"),
        (36, &0_u32.to_be_bytes(), "corrupt: L1 table too small: 0 of 1 entries"),
        (36, &u32::MAX.to_be_bytes(), "corrupt: L1 table too large"),
        (36, &(4_u32 << 20).to_be_bytes(), "truncated at byte"),
        (40, &0_u64.to_be_bytes(), "corrupt: L1 table at 0x0 is not at a cluster"),
        (40, &0x1200_u64.to_be_bytes(), "corrupt: L1 table at 0x1200 is not at a cluster"),
        (40, &(1_u64 << 62).to_be_bytes(), "truncated at byte"),
        (40, &u64::MAX.to_be_bytes(), "corrupt: table at 0xffffffffffffffff does not end"),
        (48, &0_u64.to_be_bytes(), "corrupt: refcount table at 0x0 is not at a cluster"),
        (48, &0x1001_u64.to_be_bytes(), "corrupt: refcount table at 0x1001 is not at a cluster"),
        (56, &0_u32.to_be_bytes(), "corrupt: no refcount table"),
        (56, &u32::MAX.to_be_bytes(), "corrupt: refcount table too large"),
        (60, &65537_u32.to_be_bytes(), "corrupt: snapshot table too large: 65537 snapshots"),
        (60, &1_u32.to_be_bytes(), "corrupt: snapshot table at 0x0 is not at a cluster"),
        (79, &[2], "marked-corrupt"),
        (79, &[4], "external-data-file"),
        (79, &[0x20], "unsupported-feature: bit 5 (unknown)"),
        (72, &[0x80], "unsupported-feature: bit 63 (unknown)"),
        (79, &[8], "corrupt: compression type 0 with the compression type feature bit"),
        (104, &[1], "corrupt: compression type 1 without the compression type feature bit"),
        (104, &[2], "unsupported-feature: bit 3 (compression type 2)"),
        (79, &[0x10], "corrupt: extended L2 entries with clusters below 16 KiB"),
        (96, &7_u32.to_be_bytes(), "corrupt: refcount order 7 is over 6"),
        (100, &96_u32.to_be_bytes(), "corrupt: header length of 96 bytes"),
        (100, &105_u32.to_be_bytes(), "corrupt: header length of 105 bytes"),
        (100, &8192_u32.to_be_bytes(), "corrupt: header of 8192 bytes is larger than a cluster"),
        (100, &u32::MAX.to_be_bytes(), "corrupt: header length of 4294967295 bytes"),
        // Header extensions begin here: type and length.
        (112, &0x4441_5441_0000_0000_u64.to_be_bytes(), "external-data-file"),
        (112, &0x0537_be77_0000_0010_u64.to_be_bytes(), "encrypted: the content, with LUKS"),
        (112, &0x6803_f857_ffff_ffff_u64.to_be_bytes(), "corrupt: header extension 0x6803f857 at 0x70 is larger than"),
        (112, &0x1234_5678_0000_0f89_u64.to_be_bytes(), "corrupt: header extension 0x12345678 at 0x70 is larger than"),
    ] {
        check_refused(&poked(&image, at, poke), message);
    }
}

#[test]
fn an_unknown_feature_is_named_as_the_image_names_it() {
    let (_, image) = qcow2(&[]);
    let image = poked(&image, 79, &[0x20]);
    // Incompatible, bit 5.
    let entry = [&[0, 5][..], b"time travel\0"].concat();
    check_refused(&poked(&image, 120, &entry), "unsupported-feature: bit 5 (time travel)");
}

#[test]
fn what_qemu_makes_with_other_files_or_keys_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, overlay) = (path("base.raw"), path("overlay.qcow2"));
    run("qemu-img", &["create", "-f", "raw", &base, "1M"]);
    let check = |image: &str, message: &str| {
        let error = open_path(Path::new(image), None).unwrap_err().to_string();
        assert!(error.starts_with(message), "expected: {message}\n   found: {error}");
    };
    for compat in ["compat=0.10", "compat=1.1"] {
        run("qemu-img", &["create", "-f", "qcow2", "-o", compat, "-b", &base, "-F", "raw", &overlay]);
        check(&overlay, &format!("has-backing-file: {base:?}; import the parent and name it explicitly, or flatten"));
    }
    let (image, data) = (path("external.qcow2"), path("external.data"));
    run("qemu-img", &["create", "-f", "qcow2", "-o", &format!("data_file={data}"), &image, "1M"]);
    check(&image, &format!("external-data-file: the content is in {data:?}"));
    let luks = path("luks.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let args = ["create", "--object", "secret,id=key,data=abc", "-f", "qcow2", "-o", options, &luks, "1M"];
    let output = support::try_run("qemu-img", &args);
    if String::from_utf8_lossy(&output.stderr).contains("Unable to get accurate CPU usage") {
        // Where the kernel counts CPU time in ticks, QEMU cannot calibrate its key derivation. The same header is
        // tested byte for byte in `header_fields_out_of_bounds_are_refused`.
        println!("skipped: qemu-img cannot make LUKS images on this machine");
    } else {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        check(&luks, "encrypted: the content, with LUKS");
    }
}

#[test]
fn other_formats_are_named_and_never_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let image = path.to_str().unwrap();
    let check = |declared, message: &str| assert_eq!(open_path(&path, declared).unwrap_err().to_string(), message);
    for (format, options, name) in [
        ("vpc", "subformat=dynamic", "VHD"),
        ("vpc", "subformat=fixed", "VHD"),
        ("vhdx", "subformat=dynamic", "VHDX"),
        ("vmdk", "subformat=monolithicSparse", "VMDK"),
        ("vmdk", "subformat=streamOptimized", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK (descriptor)"),
        ("vdi", "static=off", "VDI"),
        ("qed", "cluster_size=64k", "QED"),
        ("parallels", "cluster_size=1M", "Parallels"),
    ] {
        run("qemu-img", &["create", "-q", "-f", format, "-o", options, image, "4M"]);
        check(Some(Format::Raw), &format!("format-mismatch: declared raw, found {name}"));
        check(Some(Format::Qcow2), &format!("format-mismatch: declared qcow2, found {name}"));
        if matches!(format, "qed" | "parallels") {
            check(None, &format!("unsupported-format: {name}"));
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// A file of 64 KiB with the given bytes at the given places.
fn file(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 128 << 10];
    for (at, part) in parts {
        bytes[*at..at + part.len()].copy_from_slice(part);
    }
    bytes
}

const BOOT: (usize, &[u8]) = (510, b"\x55\xaa");

#[test]
fn files_that_are_no_disks_are_refused_by_name_but_may_be_declared_raw() {
    for (at, magic, message) in [
        (0x8001, &b"CD001"[..], "unsupported-format: ISO 9660"),
        (0, b"BZh9", "unsupported-format: bzip2 archive"),
        (0, b"PK\x03\x04", "unsupported-format: zip archive"),
        (0, b"\x7fELF\x02", "unsupported-format: ELF program"),
        (0, b"#!/bin/sh\n", "unsupported-format: script"),
        (0, b"LUKS\xba\xbe\0\x02", "encrypted: a LUKS container"),
        (0, b"", "not a disk image: it has no partition table, boot sector or known file system"),
    ] {
        let bytes = file(&[(at, magic)]);
        check_refused(&bytes, message);
        let disk = open_bytes(&bytes, Some(Format::Raw)).unwrap();
        assert_eq!(read_all(&*disk, 4096).unwrap(), bytes);
    }
    let tar = file(&[(257, b"ustar\0")]);
    assert!(open_bytes(&tar, None).is_err() && open_bytes(&tar, Some(Format::Qcow2)).is_err());
    assert_eq!(read_all(&*open_bytes(&tar, Some(Format::Raw)).unwrap(), 4096).unwrap(), tar);
    check_refused(&file(&[(0, b"#!/bin/sh\n#V2.0 Format\n")]), "unsupported-format: cloop");
    check_refused(&file(&[BOOT, (0x8001, b"CD001")]), "unsupported-format: ISO 9660");
    check_refused(b"dear diary\n", "not a disk image: it is a text file");
    check_refused("žluťoučký kůň\n".repeat(999).as_bytes(), "not a disk image: it is a text file");
    check_refused(b"", "virtual-size: 0 bytes is an empty file");
    let mut rng = Rng(SEED);
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(100_000).collect();
    check_refused(&noise, "not a disk image");
}

#[test]
fn compressed_files_need_room_and_are_never_raw() {
    for (magic, name) in
        [(&b"\x1f\x8b\x08\0"[..], "gzip file"), (b"\xfd7zXZ\0", "xz file"), (b"\x28\xb5\x2f\xfd", "Zstandard file")]
    {
        let bytes = file(&[(0, magic)]);
        for declared in [None, Some(Format::Qcow2)] {
            let error = open_bytes(&bytes, declared).unwrap_err().to_string();
            assert!(error.starts_with(&format!("no-scratch: this is a {name}")), "{error}");
        }
        let error = open_bytes(&bytes, Some(Format::Raw)).unwrap_err().to_string();
        assert_eq!(error, format!("format-mismatch: declared raw, found {name}"));
    }
}

#[test]
fn files_of_two_formats_are_refused() {
    check_refused(
        &file(&[(0, b"QFI\xfb\0\0\0\x03"), (0x8001, b"CD001")]),
        "ambiguous-format: the file is both qcow2 and ISO",
    );
    check_refused(
        &file(&[(0, b"KDMV"), (0x40, b"\x7f\x10\xda\xbe")]),
        "ambiguous-format: the file is both VMDK and VDI",
    );
    let end = (128 << 10) - 512;
    let polyglot = file(&[(0, b"QFI\xfb\0\0\0\x03"), (end, b"conectix")]);
    check_refused(&polyglot, "ambiguous-format: the file is both qcow2 and VHD");
    for (declared, code) in [(Format::Qcow2, "ambiguous-format"), (Format::Raw, "format-mismatch")] {
        assert_eq!(open_bytes(&polyglot, Some(declared)).unwrap_err().code(), code);
    }
    let raw = file(&[BOOT]);
    let error = open_bytes(&raw, Some(Format::Qcow2)).unwrap_err().to_string();
    assert_eq!(error, "format-mismatch: declared qcow2, found no header of it");
}

#[test]
fn a_raw_disk_is_known_by_what_is_on_it() {
    for evidence in [
        BOOT,
        (512, b"EFI PART"),
        (4096, b"EFI PART"),
        (0x438, b"\x53\xef"),
        (0, b"XFSB"),
        (0x10040, b"_BHRfS_M"),
        (512, b"LABELONE"),
    ] {
        let bytes = file(&[evidence]);
        let disk = open_bytes(&bytes, None).unwrap();
        assert_eq!(disk.format(), Format::Raw);
        support::check_content(&*disk, &bytes);
    }
}

#[test]
fn a_raw_disk_of_an_odd_length_is_padded_only_if_declared() {
    let mut bytes = file(&[BOOT, (5000, &[7; 100])]);
    bytes.truncate(5050);
    check_refused(&bytes, "virtual-size: 5050 bytes is not a multiple of 512");
    let disk = open_bytes(&bytes, Some(Format::Raw)).unwrap();
    bytes.resize(5120, 0);
    support::check_content(&*disk, &bytes);
}

#[test]
fn holes_of_a_raw_file_are_zero_extents() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let mut expected = vec![0; 40 << 20];
    let disk = content(&mut Rng(SEED), 1 << 20);
    expected[..1 << 20].copy_from_slice(&disk);
    expected[30 << 20..31 << 20].copy_from_slice(&disk);
    write_sparse(&path, &expected);
    let disk = open_path(&path, None).unwrap();
    let data = support::check_content(&*disk, &expected);
    let data_bytes: u64 = data.iter().map(|(_, len)| len).sum();
    assert!(data_bytes <= 3 << 20, "{data_bytes} bytes of data in a sparse file");
}

#[test]
fn a_truncated_image_is_refused_or_complete() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    for args in [&["-o", "cluster_size=4k"][..], &["-c"], &["-c", "-o", "compression_type=zstd,cluster_size=4k"]] {
        let (disk, image) = qcow2(args);
        let cuts = (0..image.len() / 512).map(|n| n * 512).chain((0..300).map(|_| rng.index(image.len())));
        let mut refused = 0;
        for cut in cuts {
            let opened = open_bytes(&image[..cut], Some(Format::Qcow2));
            match opened.and_then(|opened| read_all(&*opened, 1 << 20)) {
                Err(_) => refused += 1,
                Ok(bytes) => assert!(bytes == disk, "cut at {cut}"),
            }
        }
        assert!(refused > image.len() / 512 / 2);
        let cut = image.len() / 2;
        let error = open_bytes(&image[..cut], None).unwrap_err();
        assert!(matches!(error, FormatError::Truncated { at_bytes, .. } if at_bytes == cut as u64), "{error}");
    }
}

#[test]
fn entries_that_make_no_sense_are_refused() {
    let (_, image) = qcow2(&["-o", "cluster_size=4k"]);
    let (l1, l2) = (l1_at(&image), l2_at(&image));
    let (l1_entry, l2_entry) = (u64_at(&image, l1), u64_at(&image, l2));
    for (at, entry, message) in [
        (l1, l1_entry | 1, "corrupt: L1 entry for disk offset 0x0: reserved bits are set"),
        (l1, l1_entry | 1 << 60, "corrupt: L1 entry for disk offset 0x0: reserved bits are set"),
        (l1, l1_entry | 0x200, "corrupt: L1 entry for disk offset 0x0: the L2 table is not at a cluster"),
        (l1, COPIED | 1 << 50, "truncated at byte"),
        (l2, l2_entry | 2, "corrupt: L2 entry for disk offset 0x0: reserved bits are set"),
        (l2 + 8, l2_entry | 0x200, "corrupt: L2 entry for disk offset 0x1000: the cluster is not at a multiple"),
        (l2, COPIED | 1 << 50, "truncated at byte"),
        (l2, COPIED | (image.len() as u64).next_multiple_of(4096), "truncated at byte"),
        (l2, 1 << 62 | image.len() as u64, "truncated at byte"),
        // 16 further sectors at the last one of the file.
        (l2, 1 << 62 | 15 << 58 | (image.len() as u64 - 512), "truncated at byte"),
    ] {
        check_refused(&poked(&image, at, &entry.to_be_bytes()), message);
    }
    let (_, old) = qcow2(&["-o", "cluster_size=4k,compat=0.10"]);
    let l2 = l2_at(&old);
    check_refused(
        &poked(&old, l2, &1_u64.to_be_bytes()),
        "corrupt: L2 entry for disk offset 0x0: a zero cluster in a version 2 image",
    );
}

#[test]
fn clusters_referenced_twice_are_refused() {
    let (_, image) = qcow2(&["-o", "cluster_size=512"]);
    let (l1, l2) = (l1_at(&image), l2_at(&image));
    let first = u64_at(&image, l2);
    assert_ne!(first, 0);
    let reftable = u64_at(&image, 48);
    for (at, entry) in [
        // Two tables, two clusters, a cluster and each of the tables.
        (l1 + 8, u64_at(&image, l1)),
        (l2 + 8, first),
        (l2 + 8, first | 1),
        (l2, COPIED | l1 as u64),
        (l2, COPIED | l2 as u64),
        (l2, COPIED | reftable),
        // Compressed bytes in a cluster that is used as it is, in a table, in the header.
        (l2 + 8, 1 << 62 | first & OFFSET),
        (l2 + 8, 1 << 62 | (l2 as u64 + 17)),
        (l2 + 8, 1 << 62 | 17),
    ] {
        let error = open_bytes(&poked(&image, at, &entry.to_be_bytes()), None).unwrap_err().to_string();
        assert!(error.contains("referenced twice"), "{error}");
    }
}

#[test]
fn compressed_clusters_may_share_a_cluster_but_not_an_offset() {
    for kind in ["zlib", "zstd"] {
        let (disk, image) = qcow2(&["-c", "-o", &format!("compression_type={kind}")]);
        let opened = open_bytes(&image, None).unwrap();
        assert!(read_all(&*opened, 1 << 20).unwrap() == disk);
        let l2 = l2_at(&image);
        let error = open_bytes(&poked(&image, l2 + 8, &image[l2..l2 + 8]), None).unwrap_err().to_string();
        assert!(
            error.starts_with("corrupt: compressed cluster at 0x") && error.ends_with("referenced twice"),
            "{error}"
        );
    }
}

/// A version 3 header with clusters of 64 KiB, the refcount table in the second and the L1 table in the third.
fn header(size_bytes: u64, l1_entries: u32) -> Vec<u8> {
    let mut bytes = vec![0; 6 << 16];
    for (at, word) in [(0, 0x5146_49fb_0000_0003), (24, size_bytes), (40, 2 << 16), (48, 1 << 16)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(word));
    }
    for (at, word) in [(20, 16), (36, l1_entries), (56, 1), (96, 4), (100, 104)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    bytes
}

#[test]
fn small_files_that_claim_to_be_large_are_refused_at_once() {
    let start = std::time::Instant::now();
    // 384 KiB for 4 TiB: every L1 entry has the same table, every L2 entry the same cluster.
    let mut bomb = header(4 << 40, 8192);
    for at in (2 << 16..3 << 16).step_by(8) {
        bomb[at..at + 8].copy_from_slice(&(COPIED | 3 << 16).to_be_bytes());
    }
    for at in (3 << 16..4 << 16).step_by(8) {
        bomb[at..at + 8].copy_from_slice(&(COPIED | 4 << 16).to_be_bytes());
    }
    check_refused(&bomb, "corrupt: cluster 0x30000 referenced twice");
    // The same with one table and one compressed cluster.
    let mut bomb = header(512 << 20, 1);
    bomb[2 << 16..(2 << 16) + 8].copy_from_slice(&(COPIED | 3 << 16).to_be_bytes());
    for at in (3 << 16..4 << 16).step_by(8) {
        bomb[at..at + 8].copy_from_slice(&(1 << 62 | 4_u64 << 16).to_be_bytes());
    }
    check_refused(&bomb, "corrupt: compressed cluster at 0x40000 referenced twice");
    assert!(start.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn a_sparse_file_of_absurd_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut bytes = header(1 << 20, 1);
    bytes[20..24].copy_from_slice(&9_u32.to_be_bytes());
    bytes[36..40].copy_from_slice(&32_u32.to_be_bytes());
    write_sparse(&path, &bytes);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 42).unwrap();
    let error = open_path(&path, None).unwrap_err().to_string();
    assert_eq!(error, "too-large: a file of 8589934592 clusters is over the limit of 1073741824");
}

#[test]
fn damaged_compressed_clusters_are_never_read_as_something_else() {
    println!("seed {SEED:#x}");
    for kind in ["zlib", "zstd"] {
        let (disk, image) = qcow2(&["-c", "-o", &format!("compression_type={kind}")]);
        let l2 = l2_at(&image);
        let at = index_at(&image, l2, (1 << 54) - 1);
        let damaged = poked(&image, at, &[0xff; 64]);
        let opened = open_bytes(&damaged, None).unwrap();
        let mut cluster = vec![0; 65536];
        for len in [65536, 512] {
            let error = opened.read_exact_at(&mut cluster[..len], 0).unwrap_err().to_string();
            assert!(error.starts_with(&format!("corrupt: compressed cluster at {at:#x}: ")), "{error}");
        }
        opened.read_exact_at(&mut cluster, 65536).unwrap();
        assert!(cluster == disk[65536..2 * 65536]);
    }
}
