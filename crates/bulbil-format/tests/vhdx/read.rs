//! Whatever `qemu-img` writes as VHDX is read as it was written, and so is what it does not write.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bulbil_format::{Disk, ExtentKind, Format};

use crate::image::{BAT, DISK_ID_TEXT, DISK_SIZE, FILE_PARAMETERS, HEADERS, LOGICAL_SECTOR, MIB, entry, image};
use crate::support::{Rng, check_content, check_extents, content, open_bytes, open_path, run, write_sparse};

const SEED: u64 = 0x5eed_0d01;

pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Has QEMU convert raw content; returns the path of the VHDX image.
    fn convert(&self, raw: &Path, options: &str) -> PathBuf {
        let image = self.path("disk.vhdx");
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "vhdx", "-o", options], &paths[..]].concat());
        image
    }
}

/// What another implementation reads.
pub(crate) fn check_with_vhdx_core(path: &Path, expected: &[u8]) {
    let mut reader = vhdx::VhdxReader::open(path).unwrap();
    assert_eq!(reader.virtual_disk_size(), expected.len() as u64);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert!(bytes == expected, "vhdx-core reads something else");
}

fn open(path: &Path) -> Box<dyn Disk> {
    open_path(path, None).unwrap_or_else(|error| panic!("{error}"))
}

fn check_converted(expected: &[u8], options: &str) -> Box<dyn Disk> {
    println!("{} bytes, {options}: seed {SEED:#x}", expected.len());
    let files = Files::new();
    let raw = files.path("disk.raw");
    write_sparse(&raw, expected);
    let path = files.convert(&raw, options);
    let disk = open(&path);
    assert_eq!(disk.format(), Format::Vhdx);
    let data = check_content(&*disk, expected);
    let data_bytes: u64 = data.iter().map(|(_, len)| len).sum();
    let info = disk.info();
    // A large block may be mostly a hole.
    let has_holes = info.cluster_bytes.unwrap() > 4 << 20 && info.data_bytes.unwrap() > data_bytes;
    assert!(has_holes || info.data_bytes == Some(data_bytes));
    assert_eq!(info.creator.as_deref().unwrap().split(' ').next(), Some("QEMU"));
    assert_eq!(info.file_bytes, std::fs::metadata(&path).unwrap().len());
    assert!(info.notes.is_empty());
    check_with_vhdx_core(&path, expected);
    assert!(open_path(&path, Some(Format::Vhdx)).is_ok());
    disk
}

#[test]
fn every_block_size_is_read() {
    let mut rng = Rng(SEED);
    for shift in 0..=8 {
        let size = (5 << 20) + 3 * 512 + (1 << 20 << shift >> 4);
        let expected = content(&mut rng, size);
        let disk = check_converted(&expected, &format!("block_size={}M", 1 << shift));
        assert_eq!(disk.info().cluster_bytes, Some(1 << 20 << shift));
        assert_eq!(disk.info().variant.as_deref(), Some("dynamic"));
    }
}

#[test]
fn options_make_no_difference() {
    let mut rng = Rng(SEED + 1);
    for (size, options) in [
        (1024, "block_size=1M"),
        (1 << 20, "block_size=1M"),
        ((1 << 20) + 512, "block_size=1M,log_size=4M"),
        (9 << 20, "block_size=1M,block_state_zero=off"),
        (9 << 20, "block_size=2M,block_state_zero=on,log_size=65M"),
        ((9 << 20) - 512, "log_size=2M"),
    ] {
        check_converted(&content(&mut rng, size), options);
    }
    for (size, options) in [((9 << 20) + 512, "block_size=1M"), (5 << 20, "log_size=3M"), (3 << 20, "block_size=4M")] {
        let disk = check_converted(&content(&mut rng, size), &format!("subformat=fixed,{options}"));
        assert_eq!(disk.info().variant.as_deref(), Some("fixed"));
    }
}

#[test]
fn empty_and_dense_disks_are_read() {
    for options in ["block_size=1M", "block_size=1M,block_state_zero=off"] {
        let disk = check_converted(&vec![0; 7 << 20], options);
        assert_eq!(disk.info().data_bytes, Some(0));
    }
    let disk = check_converted(&vec![0xa5; 7 << 20], "block_size=1M");
    assert_eq!(disk.info().data_bytes, Some(7 << 20));
    let files = Files::new();
    let path = files.path("large.vhdx");
    run("qemu-img", &["create", "-q", "-f", "vhdx", "-o", "block_state_zero=off", path.to_str().unwrap(), "64T"]);
    let extent = open(&path).next_extent(0).unwrap().unwrap();
    assert_eq!((extent.len_bytes, extent.kind), (64 << 40, ExtentKind::Zero));
}

/// Offsets on both sides of each 4 GiB, after which the table has an entry for a sector bitmap, and at both ends.
pub(crate) fn far_offsets() -> Vec<u64> {
    let sides = |at: u64| [at - 65536, at];
    let mut offsets: Vec<u64> = [4 << 30, 5 << 30, 8 << 30].into_iter().flat_map(sides).collect();
    offsets.extend([0, 300 << 20, (10 << 30) - 65536]);
    offsets.sort_unstable();
    offsets
}

/// Makes a raw disk of 10 GiB with 64 KiB of content at each of these offsets.
pub(crate) fn write_far(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(10 << 30).unwrap();
    let mut rng = Rng(SEED + 2);
    for offset in far_offsets() {
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(65536).collect();
        file.write_all_at(&bytes, offset).unwrap();
    }
}

/// Checks that a disk is what `write_far` has written.
pub(crate) fn check_far(disk: &dyn Disk, raw: &Path) {
    let raw = File::open(raw).unwrap();
    assert_eq!(disk.size_bytes(), 10 << 30);
    let mut found = Vec::new();
    for extent in disk.data_extents().map(Result::unwrap) {
        for offset in (extent.offset_bytes..extent.end_bytes()).step_by(65536) {
            let (mut bytes, mut expected) = (vec![0xee; 65536], vec![0xdd; 65536]);
            disk.read_exact_at(&mut bytes, offset).unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                raw.read_exact_at(&mut expected, offset).unwrap();
                assert!(bytes == expected, "wrong content at {offset:#x}");
                found.push(offset);
            }
        }
    }
    assert_eq!(found, far_offsets());
}

#[test]
fn data_beyond_4_gib_is_read_past_the_entries_of_sector_bitmaps() {
    let files = Files::new();
    let raw = files.path("far.raw");
    write_far(&raw);
    for options in ["block_size=1M", "block_size=32M,block_state_zero=off", "block_size=8M"] {
        println!("{options}");
        check_far(&*open(&files.convert(&raw, options)), &raw);
    }
}

#[test]
fn an_image_made_by_hand_is_read() {
    let image = image();
    let disk = open_bytes(&image.bytes, None).unwrap();
    let data = check_content(&*disk, &image.content);
    let mib = MIB as u64;
    assert_eq!(data, [(0, mib), (3 * mib, mib), (5 * mib, 1536)]);
    let info = disk.info();
    assert_eq!(info.variant.as_deref(), Some("dynamic"));
    assert_eq!(info.data_bytes, Some(2 * mib + 1536));
    assert_eq!(info.cluster_bytes, Some(mib));
    assert_eq!(info.identifier.as_deref(), Some(DISK_ID_TEXT));
    assert_eq!(info.creator.as_deref(), Some("By [31mhand 1.0"));
    assert!(info.notes.is_empty());
}

#[test]
fn sectors_of_4_kib_are_read() {
    let mut image = image();
    image.put(LOGICAL_SECTOR, &4096_u32.to_le_bytes());
    image.put(DISK_SIZE, &(5 * MIB as u64).to_le_bytes());
    image.content.truncate(5 * MIB);
    let disk = open_bytes(&image.bytes, None).unwrap();
    check_content(&*disk, &image.content);
    assert_eq!(disk.info().notes, ["the disk has logical sectors of 4096 bytes"]);
}

#[test]
fn the_place_of_sector_bitmaps_follows_from_block_and_sector_size() {
    // A chunk is 2^23 sectors: 4 GiB with sectors of 512 bytes, 32 GiB with those of 4 KiB.
    for (block_mib, sector, blocks_in_chunk) in [(256, 512_u32, 16), (128, 512, 32), (256, 4096, 128), (64, 4096, 512)]
    {
        let mut image = image();
        let chunks = 3;
        let size = (blocks_in_chunk * chunks * block_mib) << 20;
        image.bytes.truncate(6 * MIB);
        image.put(FILE_PARAMETERS, &u32::try_from(block_mib << 20).unwrap().to_le_bytes());
        image.put(LOGICAL_SECTOR, &sector.to_le_bytes());
        image.put(DISK_SIZE, &(size as u64).to_le_bytes());
        image.put(BAT, &[0; 64]);
        for chunk in 1..chunks {
            // What is in an entry of a sector bitmap does not matter.
            image.put(BAT + 8 * (chunk * (blocks_in_chunk + 1) - 1), &[0xff; 8]);
        }
        let last = size - (block_mib << 20);
        image.put(BAT + 8 * (last / (block_mib << 20) + chunks - 1), &entry(6).to_le_bytes());
        // The disk ends with its last block, so the file has to have all of it.
        let file = Sparse { head: image.bytes, len_bytes: (6 + block_mib as u64) << 20 };
        let disk = bulbil_format::open_disk(std::sync::Arc::new(file), &bulbil_format::OpenOptions::default()).unwrap();
        let data: Vec<_> = disk.data_extents().map(|e| e.unwrap().offset_bytes).collect();
        assert_eq!(data, [last as u64], "blocks of {block_mib} MiB, sectors of {sector}");
    }
}

/// A file that ends with zeros that take no memory.
pub(crate) struct Sparse {
    pub(crate) head: Vec<u8>,
    pub(crate) len_bytes: u64,
}

impl bulbil_format::ReadAt for Sparse {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        if offset_bytes + buf.len() as u64 > self.len_bytes {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(0);
        let start = usize::try_from(offset_bytes).unwrap().min(self.head.len());
        let part = &self.head[start..(start + buf.len()).min(self.head.len())];
        buf[..part.len()].copy_from_slice(part);
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

#[test]
fn a_table_of_all_blocks_there_can_be_is_read_in_bounded_time() {
    let mut image = image();
    let table_bytes = (1_u64 << 26) * 8 + (1 << 20);
    for table in crate::image::REGION_TABLES {
        image.put(table + 40, &u32::try_from(table_bytes).unwrap().to_le_bytes());
        image.put(table + 32, &(8_u64 << 20).to_le_bytes());
    }
    image.put(DISK_SIZE, &(64_u64 << 40).to_le_bytes());
    image.put_both(HEADERS, 8, &1_u64.to_le_bytes());
    image.bytes.resize(9 * MIB, 0);
    image.put(8 * MIB + 8 * 4095, &entry(4).to_le_bytes());
    image.seal();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.vhdx");
    write_sparse(&path, &image.bytes);
    File::options().write(true).open(&path).unwrap().set_len((8 << 20) + table_bytes).unwrap();
    let start = std::time::Instant::now();
    let disk = open(&path);
    assert_eq!(disk.data_extents().map(|e| e.unwrap().offset_bytes).collect::<Vec<_>>(), [4095 << 20]);
    assert!(start.elapsed() < std::time::Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn zero_blocks_between_data_are_told_apart() {
    let mut expected = vec![0; 8 << 20];
    for block in [1, 2, 5] {
        expected[block << 20] = 1;
    }
    let files = Files::new();
    let raw = files.path("disk.raw");
    write_sparse(&raw, &expected);
    let disk = open(&files.convert(&raw, "block_size=1M"));
    assert_eq!(check_extents(&*disk, &expected), [(1 << 20, 2 << 20), (5 << 20, 1 << 20)]);
}
