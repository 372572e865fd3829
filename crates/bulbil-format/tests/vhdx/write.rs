//! What is written is read by QEMU and others as it was given, and depends on nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bulbil_format::{DiskContent, Extent, ExtentKind, Format, FormatError, Identity, NoObserver, Target, convert};

use crate::read::{Files, check_far, check_with_vhdx_core, far_offsets, write_far};
use crate::support::{Rng, check_content, content, open_bytes, open_path, run, write_sparse};

const SEED: u64 = 0x5eed_0d02;
const IDENTITY: Identity = Identity { uuid: *b"sixteen bytes ok", created_unix_s: 1_700_000_000 };

fn write(source: &dyn DiskContent, path: &Path) {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    convert(source, &file, &Target::Vhdx, &IDENTITY, &NoObserver).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes a disk and has it read by everybody.
fn check_written(expected: &[u8], blocks: u64) {
    println!("{} bytes: seed {SEED:#x}", expected.len());
    let files = Files::new();
    let (raw, image) = (files.path("disk.raw"), files.path("disk.vhdx"));
    write_sparse(&raw, expected);
    write(&*open_path(&raw, Some(Format::Raw)).unwrap(), &image);
    run("qemu-img", &["check", "-q", "-f", "vhdx", text(&image)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", text(&raw), text(&image)]);
    check_with_vhdx_core(&image, expected);
    let disk = open_path(&image, None).unwrap();
    check_content(&*disk, expected);
    let info = disk.info();
    assert_eq!(info.creator.as_deref(), Some("Bulbil"));
    assert_eq!(info.cluster_bytes, Some(2 << 20));
    assert_eq!(info.file_bytes, (4 + 2 * blocks) << 20, "{blocks} blocks");
    // The disk identifier of the same identity is always the same, and a random UUID in form.
    assert_eq!(info.identifier.as_deref(), Some("736978a3-6565-4e20-a279-746573206f6b"));
    let dense = files.path("dense.vhdx");
    write(&*open_bytes(expected, Some(Format::Raw)).unwrap(), &dense);
    assert!(std::fs::read(&dense).unwrap() == std::fs::read(&image).unwrap(), "holes of the source make a difference");
}

#[test]
fn disks_of_every_size_and_density_are_written() {
    let mut rng = Rng(SEED);
    for size in [1024, (2 << 20) - 512, 2 << 20, (2 << 20) + 512, (21 << 20) + 1536] {
        let expected = content(&mut rng, size);
        let blocks = expected.chunks(2 << 20).filter(|block| block.iter().any(|byte| *byte != 0)).count();
        check_written(&expected, blocks as u64);
    }
    check_written(&vec![0; 9 << 20], 0);
    check_written(&vec![0x5a; 9 << 20], 5);
    let mut sparse = vec![0; 33 << 20];
    for at in [(2 << 20) - 1, 17 << 20, (33 << 20) - 1] {
        sparse[at] = 1;
    }
    check_written(&sparse, 3);
}

#[test]
fn the_smallest_disk_is_written() {
    let files = Files::new();
    let image = files.path("disk.vhdx");
    write(&*open_bytes(&[7; 512], Some(Format::Raw)).unwrap(), &image);
    check_content(&*open_path(&image, None).unwrap(), &[7; 512]);
    run("qemu-img", &["check", "-q", "-f", "vhdx", text(&image)]);
}

#[test]
fn data_beyond_4_gib_is_written_past_the_entries_of_sector_bitmaps() {
    let files = Files::new();
    let (raw, image) = (files.path("far.raw"), files.path("far.vhdx"));
    write_far(&raw);
    write(&*open_path(&raw, Some(Format::Raw)).unwrap(), &image);
    check_far(&*open_path(&image, None).unwrap(), &raw);
    run("qemu-img", &["check", "-q", "-f", "vhdx", text(&image)]);
    // QEMU would look at each zero of 10 GiB if it compared all.
    let (raw, part) = (File::open(raw).unwrap(), files.path("part.raw"));
    for offset in far_offsets().into_iter().chain([65536, 6 << 30]) {
        let (from, to) = (format!("if={}", text(&image)), format!("of={}", text(&part)));
        // QEMU counts what it skips as well.
        let (skip, count) = (format!("skip={}", offset >> 16), format!("count={}", (offset >> 16) + 1));
        run("qemu-img", &["dd", "-f", "vhdx", "-O", "raw", "bs=64k", &count, &skip, &from, &to]);
        let mut expected = vec![0; 65536];
        raw.read_exact_at(&mut expected, offset).unwrap();
        assert!(std::fs::read(&part).unwrap() == expected, "wrong content at {offset:#x}");
        std::fs::remove_file(&part).unwrap();
    }
}

/// A disk of zeros but for some sectors of ones, given in order.
#[derive(Debug)]
struct Sectors {
    size_bytes: u64,
    offsets: Vec<u64>,
}

impl DiskContent for Sectors {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        for (offset, byte) in (offset_bytes..).zip(buf) {
            *byte = u8::from(self.offsets.iter().any(|start| (*start..start + 512).contains(&offset)));
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let ends = self.offsets.iter().flat_map(|at| [(*at, ExtentKind::Zero), (at + 512, ExtentKind::Data)]);
        let part = ends.chain([(self.size_bytes, ExtentKind::Zero)]).find(|(end, _)| offset_bytes < *end);
        Ok(part.map(|(end, kind)| Extent { offset_bytes, len_bytes: end - offset_bytes, kind }))
    }
}

#[test]
fn large_disks_have_larger_blocks_and_a_small_table() {
    let files = Files::new();
    let image = files.path("large.vhdx");
    for (size_bytes, block_mib) in [(2 << 40, 2), ((2 << 40) + 512, 4), (64 << 40, 64)] {
        // Both ends of one block, which are in two pieces where it is large, and the end of the disk.
        let block_bytes = block_mib << 20;
        let offsets = vec![3 * block_bytes, 4 * block_bytes - 512, size_bytes - 512];
        let source = Sectors { size_bytes, offsets };
        write(&source, &image);
        run("qemu-img", &["check", "-q", "-f", "vhdx", text(&image)]);
        let disk = open_path(&image, None).unwrap();
        assert_eq!(disk.info().cluster_bytes, Some(block_bytes));
        let last_bytes = size_bytes - (size_bytes - 1) / block_bytes * block_bytes;
        assert_eq!(disk.info().data_bytes, Some(block_bytes + last_bytes), "two blocks");
        assert!(disk.info().file_bytes < (16 << 20) + 2 * block_bytes);
        let mut byte = [0];
        for at in &source.offsets {
            for (offset, expected) in [(at - 1, 0), (*at, 1), (at + 511, 1), (at + 512, 0)] {
                if offset < size_bytes {
                    disk.read_exact_at(&mut byte, offset).unwrap();
                    assert_eq!(byte, [expected], "{offset:#x}");
                }
            }
        }
    }
}

#[test]
fn every_block_without_content_is_zero_by_definition() {
    let files = Files::new();
    let image = files.path("disk.vhdx");
    let mut expected = vec![0; 9 << 20];
    expected[5 << 20] = 1;
    write(&*open_bytes(&expected, Some(Format::Raw)).unwrap(), &image);
    let bytes = std::fs::read(&image).unwrap();
    let table = &bytes[3 << 20..][..48];
    let entries: Vec<u64> = table.chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())).collect();
    assert_eq!(entries, [2, 2, 4 << 20 | 6, 2, 2, 0]);
    // Two headers of different sequence numbers, and both region tables.
    assert_eq!((bytes[0x1_0008], bytes[0x2_0008]), (1, 2));
    assert!(bytes[0x3_0000..0x4_0000] == bytes[0x4_0000..0x5_0000]);
}
