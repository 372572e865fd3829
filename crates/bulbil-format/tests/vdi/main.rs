//! VDIs are read as QEMU reads them, written so that QEMU reads the same, and refused where they are wrong.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod refusals;
#[path = "../support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bulbil_format::{ConvertError, DiskContent, FileReader, Format, OpenOptions, Target, open_disk};
use support::{
    Rng, Zeros, check_content, content, disks_of_all_kinds, open_bytes, open_path, raw_in_memory, run, write_image,
    write_sparse,
};

const SEED: u64 = 0x5eed_0201;
const MIB: usize = 1 << 20;

/// Makes an image by hand: `entries` are the block map, `blocks` the file's blocks in order.
fn image(kind: u32, size_bytes: u64, entries: &[u32], blocks: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    bytes[..39].copy_from_slice(b"<<< Oracle VM VirtualBox Disk Image >>>");
    let words = [
        (64, 0xbeda_107f),
        (68, 0x0001_0001),
        (72, 400),
        (76, kind),
        (340, 512),
        (344, 1024),
        (360, 512),
        (376, 1 << 20),
        (384, u32::try_from(entries.len()).unwrap()),
        (388, u32::try_from(blocks.len() / MIB).unwrap()),
    ];
    for (at, word) in words {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
    }
    bytes[368..376].copy_from_slice(&size_bytes.to_le_bytes());
    bytes[392..408].copy_from_slice(b"3210FE98cdefghij");
    for (index, entry) in entries.iter().enumerate() {
        bytes[512 + index * 4..516 + index * 4].copy_from_slice(&entry.to_le_bytes());
    }
    [&bytes, blocks].concat()
}

/// Counts the bytes in blocks that are not zeros: only these are stored.
fn stored_bytes(disk: &[u8]) -> u64 {
    let stored = disk.chunks(MIB).filter(|block| block.iter().any(|byte| *byte != 0));
    stored.map(|block| block.len() as u64).sum()
}

fn file(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

fn write(source: &dyn DiskContent, path: &Path) -> Result<(), ConvertError> {
    write_image(source, &Target::Vdi, path)
}

#[test]
fn what_qemu_writes_is_read_as_what_it_was() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (file(&dir, "disk.raw"), file(&dir, "disk.vdi"));
    for (name, disk) in disks_of_all_kinds(SEED) {
        write_sparse(&raw, &disk);
        for (preallocated, kind) in [("off", "dynamic"), ("on", "static")] {
            let options = format!("static={preallocated}");
            let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
            run("qemu-img", &[&["convert", "-f", "raw", "-O", "vdi", "-o", &options][..], &paths].concat());
            for declared in [None, Some(Format::Vdi)] {
                let opened = open_path(&image, declared).unwrap();
                let data_bytes: u64 = check_content(&*opened, &disk).iter().map(|(_, len)| len).sum();
                let info = opened.info();
                assert_eq!((opened.format(), info.variant.as_deref()), (Format::Vdi, Some(kind)), "{name}");
                // Of the blocks of a static disk many were only set aside.
                let stored_bytes = if preallocated == "on" { disk.len() as u64 } else { data_bytes };
                assert_eq!((info.data_bytes, info.cluster_bytes), (Some(stored_bytes), Some(1 << 20)), "{name}");
                assert_eq!(info.creator.as_deref(), Some("QEMU VM Virtual Disk Image"));
            }
        }
    }
}

#[test]
fn what_is_written_is_clean_and_the_same_for_qemu() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (file(&dir, "disk.raw"), file(&dir, "disk.vdi"));
    for (name, disk) in disks_of_all_kinds(SEED) {
        write(&*raw_in_memory(&disk), &image).unwrap();
        write_sparse(&raw, &disk);
        let path = image.to_str().unwrap();
        let checked = run("qemu-img", &["check", "-f", "vdi", path]);
        assert!(checked.starts_with("No errors were found"), "{name}: {checked}");
        run("qemu-img", &["compare", "-f", "raw", "-F", "vdi", raw.to_str().unwrap(), path]);
        let opened = open_path(&image, None).unwrap();
        check_content(&*opened, &disk);
        let stored =
            disk.chunks(MIB).filter(|block| block.iter().any(|byte| *byte != 0)).map(<[u8]>::len).sum::<usize>();
        assert_eq!(opened.info().data_bytes, Some(stored as u64), "{name}");
        // The letters, with the version and the variant of a random UUID.
        assert_eq!(opened.info().identifier.as_deref(), Some("73697874-6565-4e20-ac65-747465727321"));
    }
}

#[test]
fn the_file_does_not_depend_on_the_holes_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, with_holes, without) = (file(&dir, "disk.raw"), file(&dir, "a.vdi"), file(&dir, "b.vdi"));
    let mut disk = content(&mut Rng(SEED), 20 * MIB);
    disk[5 * MIB..12 * MIB].fill(0);
    write_sparse(&raw, &disk);
    let source = Arc::new(FileReader::open(&raw).unwrap());
    let source = open_disk(source, &OpenOptions::declared(Format::Raw)).unwrap();
    write(&*source, &with_holes).unwrap();
    write(&*raw_in_memory(&disk), &without).unwrap();
    assert!(std::fs::read(&with_holes).unwrap() == std::fs::read(&without).unwrap());
    assert_eq!(open_path(&with_holes, None).unwrap().info().data_bytes, Some(stored_bytes(&disk)));
}

#[test]
fn qemu_can_go_on_writing() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vdi");
    let mut disk = content(&mut Rng(SEED), 8 * MIB + 512);
    disk[4 * MIB..6 * MIB].fill(0);
    write(&*raw_in_memory(&disk), &image).unwrap();
    for (at, byte) in [(5 * MIB, 0x41), (MIB, 0x42), (8 * MIB, 0x43)] {
        let write = format!("write -P {byte} {at} 512");
        let output = Command::new("qemu-io").args(["-f", "vdi", "-c", &write]).arg(&image).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        disk[at..at + 512].fill(byte);
    }
    check_content(&*open_path(&image, None).unwrap(), &disk);
}

#[test]
fn large_disks_are_written_up_to_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vdi");
    let largest = 16_u64 << 40;
    write(&Zeros(largest), &image).unwrap();
    let opened = open_path(&image, None).unwrap();
    assert_eq!((opened.size_bytes(), opened.info().data_bytes), (largest, Some(0)));
    assert_eq!(opened.next_extent(0).unwrap().unwrap().len_bytes, largest);
    let info = run("qemu-img", &["info", "-f", "vdi", "--output=json", image.to_str().unwrap()]);
    assert!(info.contains(&format!("\"virtual-size\": {largest}")), "{info}");
    let error = write(&Zeros(largest + 512), &image).unwrap_err().to_string();
    assert_eq!(error, "unsupported-target: a VDI has at most 16 TiB, the disk 17592186044928 bytes");
}

#[test]
fn blocks_come_in_any_order_with_marks_for_zeros_between_them() {
    let disk = content(&mut Rng(SEED), 4 * MIB);
    let blocks = [&disk[3 * MIB..], &[0x99; MIB], &disk[..MIB]].concat();
    let mut expected = disk.clone();
    expected[MIB..3 * MIB].fill(0);
    for kind in [1, 2] {
        let bytes = image(kind, 4 << 20, &[2, u32::MAX, u32::MAX - 1, 0], &blocks);
        let opened = open_bytes(&bytes, None).unwrap();
        let extents = check_content(&*opened, &expected);
        assert_eq!(extents, [(0, 1 << 20), (3 << 20, 1 << 20)]);
        let info = opened.info();
        assert_eq!(info.creator.as_deref(), Some("Oracle VM VirtualBox Disk Image"));
        assert_eq!(info.identifier.as_deref(), Some("30313233-4546-3839-6364-65666768696a"));
    }
}
