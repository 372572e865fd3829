//! What is written is read by others as what it was.

use std::process::Command;
use std::sync::Arc;

use bulbil_format::{FileReader, Format, OpenOptions, Target, open_disk};

use super::support::{
    IDENTITY, Rng, Zeros, check_content, content, disks_of_all_kinds, open_path, raw_in_memory, run, write_image,
    write_sparse,
};
use super::{MIB, SEED, file, read_with_qemu, read_with_vhd_core};

#[test]
fn what_is_written_is_read_by_others_as_what_it_was() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (file(&dir, "disk.raw"), file(&dir, "disk.vhd"));
    for (name, mut disk) in disks_of_all_kinds(SEED) {
        for (target, kind) in [(Target::VhdFixed, "fixed"), (Target::VhdDynamic, "dynamic")] {
            write_image(&*raw_in_memory(&disk), &target, &image).unwrap();
            write_sparse(&raw, &disk);
            let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
            run("qemu-img", &[&["compare", "-f", "raw", "-F", "vpc"][..], &paths].concat());
            disk.resize(disk.len().next_multiple_of(MIB), 0);
            assert!(read_with_qemu(&image) == disk, "{name}, {kind}");
            assert!(read_with_vhd_core(&image) == disk, "{name}, {kind}");
            let opened = open_path(&image, None).unwrap();
            check_content(&*opened, &disk);
            assert_eq!(opened.info().variant.as_deref(), Some(kind));
            if kind == "fixed" {
                assert_eq!(std::fs::metadata(&image).unwrap().len(), disk.len() as u64 + 512);
            }
        }
    }
}

#[test]
fn the_file_does_not_depend_on_the_holes_of_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, with_holes, without) = (file(&dir, "disk.raw"), file(&dir, "a.vhd"), file(&dir, "b.vhd"));
    let mut disk = content(&mut Rng(SEED), 20 * MIB);
    disk[5 * MIB..12 * MIB].fill(0);
    write_sparse(&raw, &disk);
    for target in [Target::VhdFixed, Target::VhdDynamic] {
        let source = FileReader::open(&raw).unwrap();
        let source = open_disk(Arc::new(source), &OpenOptions::declared(Format::Raw)).unwrap();
        write_image(&*source, &target, &with_holes).unwrap();
        write_image(&*raw_in_memory(&disk), &target, &without).unwrap();
        assert!(std::fs::read(&with_holes).unwrap() == std::fs::read(&without).unwrap());
    }
    let stored = disk.chunks(2 * MIB).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64;
    assert!(stored < 8);
    let opened = open_path(&with_holes, None).unwrap();
    assert_eq!(opened.info().data_bytes, Some(stored << 21));
}

#[test]
fn the_fields_are_those_that_hypervisors_and_clouds_ask_for() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vhd");
    write_image(&*raw_in_memory(&content(&mut Rng(SEED), 5 * MIB + 512)), &Target::VhdDynamic, &image).unwrap();
    let bytes = std::fs::read(&image).unwrap();
    let footer = &bytes[bytes.len() - 512..];
    assert_eq!(footer, &bytes[..512], "the copy is not the same");
    let word = |at: usize| u32::from_be_bytes(footer[at..at + 4].try_into().unwrap());
    assert_eq!((word(8), word(12), word(60)), (2, 0x1_0000, 3));
    // 14 November 2023, counted from 2000.
    assert_eq!(word(24), 1_700_000_000 - 946_684_800);
    assert_eq!(&footer[28..32], b"win ");
    assert_eq!(footer[40..48], footer[48..56]);
    assert_eq!(footer[48..56], (6_u64 << 20).to_be_bytes());
    // 6 MiB: 12288 sectors in tracks of 17, 4 heads.
    assert_eq!(footer[56..60], [0, 180, 4, 17]);
    assert_eq!(&footer[68..84], IDENTITY.derive(0));
    for entry in bytes[1536..1536 + 12].chunks(4) {
        let sector = u32::from_be_bytes(entry.try_into().unwrap());
        assert_eq!((sector + 1) % 8, 0, "the content is not at a multiple of 4 KiB");
        let bitmap = &bytes[sector as usize * 512..][..512];
        assert!(bitmap.iter().all(|byte| *byte == 0xff), "a sector is marked as never written");
    }
    assert!(bytes[1536 + 12..2048].iter().all(|byte| *byte == 0xff));
}

#[test]
fn geometries_are_those_of_the_specification() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vhd");
    // One for each way to choose heads and sectors, and two that are more than a geometry can say.
    for mib in [1, 3, 33, 40, 120, 200, 260, 450, 510, 1000, 30_000, 33_000, 120 << 10, 127 << 10, 2040 << 10] {
        write_image(&Zeros(mib << 20), &Target::VhdDynamic, &image).unwrap();
        let ours = std::fs::read(&image).unwrap()[56..60].to_vec();
        // QEMU takes the next larger size that is a geometry, which for these has the same heads and sectors.
        run("qemu-img", &["create", "-f", "vpc", image.to_str().unwrap(), &format!("{mib}M")]);
        let theirs = std::fs::read(&image).unwrap()[56..60].to_vec();
        assert_eq!(ours[2..], theirs[2..], "{mib} MiB");
        let cylinders = u64::from(ours[0]) << 8 | u64::from(ours[1]);
        let in_cylinder = u64::from(ours[2]) * u64::from(ours[3]);
        assert_eq!(cylinders, ((mib << 11) / in_cylinder).min(65535), "{mib} MiB");
    }
}

#[test]
fn the_largest_disk_is_written_and_a_larger_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vhd");
    let largest = 2040_u64 << 30;
    write_image(&Zeros(largest), &Target::VhdDynamic, &image).unwrap();
    assert_eq!(open_path(&image, None).unwrap().size_bytes(), largest);
    let info = run("qemu-img", &["info", "-f", "vpc", "--output=json", image.to_str().unwrap()]);
    assert!(info.contains(&format!("\"virtual-size\": {largest}")), "{info}");
    for target in [Target::VhdFixed, Target::VhdDynamic] {
        let error = write_image(&Zeros(largest + 512), &target, &image).unwrap_err().to_string();
        assert_eq!(error, "unsupported-target: a VHD has at most 2040 GiB, the disk 2190433321472 bytes");
    }
}

#[test]
fn qemu_can_go_on_writing() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vhd");
    let mut disk = content(&mut Rng(SEED), 12 * MIB);
    disk[4 * MIB..8 * MIB].fill(0);
    write_image(&*raw_in_memory(&disk), &Target::VhdDynamic, &image).unwrap();
    for (at, byte) in [(5 * MIB, 0x41), (MIB, 0x42), (12 * MIB - 4096, 0x43), (7 * MIB, 0x44)] {
        let write = format!("write -P {byte} {at} 4096");
        let output = Command::new("qemu-io").args(["-f", "vpc", "-c", &write]).arg(&image).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        disk[at..at + 4096].fill(byte);
    }
    check_content(&*open_path(&image, None).unwrap(), &disk);
    assert!(read_with_vhd_core(&image) == disk);
}
