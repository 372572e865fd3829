//! VHDs are read as QEMU reads them, written so that others read the same, and refused where they are wrong.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod differencing;
mod image;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
mod write;

use std::io::Read;
use std::path::{Path, PathBuf};

use bulbil_format::Format;
use image::{Block, DYNAMIC, fixed, footer, sparse};
use support::{Rng, check_content, content, disks_of_all_kinds, open_bytes, open_path, read_all, run, write_sparse};

const SEED: u64 = 0x5eed_0101;
const MIB: usize = 1 << 20;

/// Reads a whole VHD with another library, which always takes the current size.
fn read_with_vhd_core(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    vhd::VhdReader::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Reads a whole VHD with QEMU.
fn read_with_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("qemu.raw");
    run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    std::fs::read(raw).unwrap()
}

fn file(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

#[test]
fn what_qemu_writes_is_read_as_qemu_reads_it() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (file(&dir, "disk.raw"), file(&dir, "disk.vhd"));
    for (name, disk) in disks_of_all_kinds(SEED) {
        write_sparse(&raw, &disk);
        for kind in ["fixed", "dynamic"] {
            // Without the exact size QEMU rounds up to a geometry and is another creator, `qemu` instead of `qem2`.
            for exact in ["on", "off"] {
                let options = format!("subformat={kind},force_size={exact}");
                let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
                run("qemu-img", &[&["convert", "-f", "raw", "-O", "vpc", "-o", &options][..], &paths].concat());
                let expected = read_with_qemu(&image);
                assert!(expected.starts_with(&disk), "{name}, {options}");
                for declared in [None, Some(Format::Vhd)] {
                    let opened = open_path(&image, declared).unwrap();
                    check_content(&*opened, &expected);
                    let info = opened.info();
                    assert_eq!((opened.format(), info.variant.as_deref()), (Format::Vhd, Some(kind)), "{name}");
                    assert_eq!(info.creator.as_deref(), Some(if exact == "on" { "qem2" } else { "qemu" }));
                }
                assert!(read_with_vhd_core(&image) == expected, "{name}, {options}");
            }
        }
    }
}

#[test]
fn holes_and_blocks_that_are_not_stored_are_zero_extents() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (file(&dir, "disk.raw"), file(&dir, "disk.vhd"));
    let mut disk = vec![0; 64 * MIB];
    disk[17 * MIB] = 1;
    write_sparse(&raw, &disk);
    for (kind, data) in [("fixed", None), ("dynamic", Some(2 * MIB as u64))] {
        let options = format!("subformat={kind},force_size=on");
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "vpc", "-o", &options][..], &paths].concat());
        let opened = open_path(&image, None).unwrap();
        let extents = check_content(&*opened, &disk);
        let data_bytes: u64 = extents.iter().map(|(_, len)| len).sum();
        assert!((1..=2 << 20).contains(&data_bytes), "{kind}: {extents:?}");
        assert_eq!(opened.info().data_bytes, data);
    }
}

#[test]
fn the_size_is_the_current_size_whoever_the_creator_is() {
    let disk = content(&mut Rng(SEED), MIB);
    for creator in [b"vpc ", b"qemu", b"vs  ", b"win ", b"d2v ", b"vbox", b"\0\x1b\0\xff"] {
        let opened = open_bytes(&fixed(&disk, creator), None).unwrap();
        check_content(&*opened, &disk);
        let shown = std::str::from_utf8(creator).ok().map(|name| name.trim().replace(['\0', '\x1b'], ""));
        assert_eq!(opened.info().creator, shown.filter(|name| !name.is_empty()));
    }
}

#[test]
fn footers_without_their_last_byte_are_read() {
    let disk = content(&mut Rng(SEED), MIB);
    let image = fixed(&disk, b"vpc ");
    check_content(&*open_bytes(&image[..image.len() - 1], None).unwrap(), &disk);
    let blocks = [Block { index: 0, bitmap: vec![0xff; 512], content: disk.clone() }];
    let image = sparse(DYNAMIC, MIB as u64, MIB, &blocks);
    check_content(&*open_bytes(&image[..image.len() - 1], None).unwrap(), &disk);
}

#[test]
fn the_map_of_sectors_of_a_dynamic_disk_is_not_looked_at_as_in_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let image = file(&dir, "disk.vhd");
    let disk = content(&mut Rng(SEED), 3 * MIB);
    let block = |index: usize, byte| {
        let content = disk[index * MIB..(index + 1) * MIB].to_vec();
        Block { index, bitmap: vec![byte; 512], content }
    };
    // Blocks in any order, and a file with something between the blocks and the footer.
    let mut bytes = sparse(DYNAMIC, disk.len() as u64, MIB, &[block(2, 0), block(0, 0x55), block(1, 0xff)]);
    let end = bytes.split_off(bytes.len() - 512);
    bytes.extend([0x99; 4096]);
    bytes.extend(end);
    // QEMU takes the geometry for the size of a creator it does not know.
    for at in [0, bytes.len() - 512] {
        image::poke_footer(&mut bytes, at, 28, b"win ");
    }
    write_sparse(&image, &bytes);
    check_content(&*open_path(&image, None).unwrap(), &disk);
    assert!(read_with_qemu(&image) == disk);
}

#[test]
fn blocks_of_every_size_are_read() {
    for block_bytes in [512_usize, 4096, 512 << 10, 4 << 20, 8 << 20] {
        let disk = content(&mut Rng(SEED), 9 * MIB + 512);
        let bitmap_bytes = (block_bytes / 512).div_ceil(8).next_multiple_of(512);
        let mut blocks = Vec::new();
        let mut expected = vec![0; disk.len()];
        // Every third block is not stored.
        for (index, piece) in disk.chunks(block_bytes).enumerate().filter(|(index, _)| index % 3 != 1) {
            let mut content = piece.to_vec();
            content.resize(block_bytes, 0xee);
            blocks.push(Block { index, bitmap: vec![0xff; bitmap_bytes], content });
            let at = index * block_bytes;
            expected[at..at + piece.len()].copy_from_slice(piece);
        }
        blocks.reverse();
        let opened = open_bytes(&sparse(DYNAMIC, disk.len() as u64, block_bytes, &blocks), None).unwrap();
        let data: u64 = check_content(&*opened, &expected).iter().map(|(_, len)| len).sum();
        assert_eq!(opened.info().data_bytes, Some(data), "blocks of {block_bytes}");
        assert_eq!(opened.info().cluster_bytes, Some(block_bytes as u64));
    }
}

#[test]
fn a_machine_in_saved_state_is_noted() {
    let mut image = fixed(&content(&mut Rng(SEED), MIB), b"win ");
    image::poke_footer(&mut image, MIB, 84, &[1]);
    let info = open_bytes(&image, None).unwrap().info();
    assert_eq!(info.notes, ["the virtual machine was saved, not shut down"]);
    assert_eq!(info.identifier.as_deref(), Some("616e2069-6465-6e74-6966-6965722e2e2e"));
}

#[test]
fn what_is_behind_a_fixed_disk_is_not_on_it() {
    let disk = content(&mut Rng(SEED), MIB);
    let bytes = [&disk[..], &[0x99; 4096], &footer(image::FIXED, MIB as u64, b"win ")].concat();
    let opened = open_bytes(&bytes, None).unwrap();
    check_content(&*opened, &disk);
    assert!(read_all(&*opened, 999).unwrap() == disk);
}
