//! Compressed files are unpacked within bounds, and damaged ones are refused.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::io::Write as _;
use std::sync::Arc;

use bulbil_format::{Disk, FileReader, Format, FormatError, OpenOptions, open_disk};
use support::{Rng, check_content, content, run, write_sparse};

const SEED: u64 = 0x5eed_0009;

fn open(bytes: Vec<u8>, format: Option<Format>) -> Result<Box<dyn Disk>, FormatError> {
    let scratch = Some(Arc::new(tempfile::tempfile().unwrap()));
    open_disk(Arc::new(bytes), &OpenOptions { scratch, ..OpenOptions::declared(format) })
}

#[track_caller]
fn check_refused(bytes: Vec<u8>, format: Option<Format>, message: &str) {
    let error = open(bytes, format).map(|_| ()).expect_err(message);
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).unwrap()
}

/// Packs with the program people pack with.
fn packed_by(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    write_sparse(&path, bytes);
    run(program, &[args, &["--keep", "--quiet", path.to_str().unwrap()]].concat());
    let mut files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    std::fs::read(files.find(|other| *other != path).unwrap()).unwrap()
}

#[test]
fn every_packing_gives_the_disk_that_went_in() {
    println!("seed {SEED:#x}");
    let disk = content(&mut Rng(SEED), 4 << 20);
    for packed in [gzip(&disk), zstd_frame(&disk), packed_by("gzip", &["-9"], &disk), packed_by("xz", &["-1"], &disk)] {
        let open = open(packed, None).unwrap();
        assert_eq!(open.format(), Format::Raw);
        check_content(&*open, &disk);
    }
}

#[test]
fn members_streams_and_frames_are_joined() {
    let disk = content(&mut Rng(SEED + 1), 1 << 20);
    let (first, second) = disk.split_at(300_000);
    for pack in [gzip, zstd_frame, |bytes: &[u8]| packed_by("xz", &["-0"], bytes)] {
        let packed = [pack(first), pack(second)].concat();
        check_content(&*open(packed, None).unwrap(), &disk);
    }
}

#[test]
fn an_image_is_recognised_inside() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    let disk = content(&mut Rng(SEED + 2), 1 << 20);
    write_sparse(&raw, &disk);
    run("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), image.to_str().unwrap()]);
    let packed = gzip(&std::fs::read(image).unwrap());
    for format in [None, Some(Format::Qcow2)] {
        let disk_inside = open(packed.clone(), format).unwrap();
        assert_eq!(disk_inside.format(), Format::Qcow2);
        check_content(&*disk_inside, &disk);
    }
    check_refused(packed.clone(), Some(Format::Raw), "format-mismatch: declared raw, found gzip file");
    check_refused(packed.clone(), Some(Format::Vhd), "format-mismatch: declared vhd, found qcow2");
    check_refused(gzip(&packed), None, "unsupported-format: gzip file in a compressed file");
    let error = open_disk(Arc::new(packed), &OpenOptions::default()).unwrap_err();
    assert_eq!(error.code(), "no-scratch");
}

#[test]
fn damaged_files_are_refused() {
    let disk = content(&mut Rng(SEED + 3), 1 << 20);
    for (name, packed) in
        [("gzip", gzip(&disk)), ("Zstandard", zstd_frame(&disk)), ("xz", packed_by("xz", &["-0"], &disk))]
    {
        let message = format!("corrupt: the {name} file does not unpack");
        let mut cut = packed.clone();
        cut.truncate(packed.len() - 1);
        check_refused(cut, None, &message);
        check_refused(packed[..packed.len() / 2].to_vec(), None, &message);
        check_refused([&packed[..], b"something else"].concat(), None, &message);
        if name != "Zstandard" {
            // The library writes frames without a checksum.
            let mut flipped = packed.clone();
            flipped[packed.len() / 2] ^= 0x55;
            check_refused(flipped, None, &message);
        }
    }
    check_refused(gzip(b""), None, "virtual-size: 0 bytes is an empty file");
}

#[test]
fn bombs_are_refused_when_they_exceed_what_their_length_justifies() {
    // 128 KiB of zeros in four bytes each: a frame header, blocks of type RLE, the last one marked.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    let blocks = (2_u32 << 30 >> 17) + 100;
    for number in 0..blocks {
        let last = u32::from(number == blocks - 1);
        bomb.extend(&((128_u32 << 10) << 3 | 1 << 1 | last).to_le_bytes()[..3]);
        bomb.push(0);
    }
    check_refused(bomb, None, "too-much-data: a compressed file of ");
}

#[test]
fn windows_and_dictionaries_over_the_limit_are_refused() {
    // Window_Descriptor 0x90: 2^28 bytes.
    let zstd = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x90, 0x01, 0x00, 0x00];
    check_refused(zstd, None, "corrupt: the Zstandard file does not unpack: Frame requires too much memory");
    let xz = packed_by("xz", &["--lzma2=dict=256MiB"], &content(&mut Rng(SEED + 4), 1 << 20));
    check_refused(xz, None, "corrupt: the xz file does not unpack: needed memory too big");
}

#[test]
fn zeros_in_holes_are_not_unpacked() {
    let disk = content(&mut Rng(SEED + 5), 1 << 20);
    let xz = packed_by("xz", &["-0"], &disk);
    // Padding may follow a stream, but not terabytes of it.
    let mut padded = xz.clone();
    padded.resize(xz.len().next_multiple_of(4) + (1 << 20), 0);
    check_content(&*open(padded, None).unwrap(), &disk);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&xz).unwrap();
    file.set_len(1 << 40).unwrap();
    let scratch = Some(Arc::new(tempfile::tempfile().unwrap()));
    let options = OpenOptions { scratch, ..OpenOptions::default() };
    let start = std::time::Instant::now();
    let error = open_disk(Arc::new(FileReader::new(file).unwrap()), &options).unwrap_err().to_string();
    assert!(error.starts_with("corrupt: the xz file has 1099"), "{error}");
    assert!(start.elapsed().as_secs() < 1, "{:?}", start.elapsed());
}
