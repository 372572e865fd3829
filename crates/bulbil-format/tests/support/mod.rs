//! What the tests share: seeded content, QEMU's tools as an oracle, images in memory.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{
    ConvertError, Disk, DiskContent, Extent, ExtentKind, FileReader, Format, FormatError, Identity, NoObserver,
    OpenOptions, Target, convert, open_disk,
};

/// A small seeded generator (SplitMix64); tests print their seed.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap()
    }
}

/// Makes disk content: runs of zeros, of noise and of text, of every length up to an eighth of the disk.
pub(crate) fn content(rng: &mut Rng, size_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_bytes);
    while bytes.len() < size_bytes {
        let scale = rng.index(size_bytes.ilog2() as usize - 9);
        let len = 1 + rng.index(512 << scale);
        let len = len.min(size_bytes / 8).min(size_bytes - bytes.len());
        match rng.below(3) {
            0 => bytes.resize(bytes.len() + len, 0),
            1 => bytes.extend(std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(len)),
            _ => {
                let line = format!("line {} of a file that compresses well\n", rng.next());
                bytes.extend(line.bytes().cycle().take(len));
            }
        }
    }
    // Like every disk that is imported without saying so: a boot signature.
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// Writes a file, leaving holes for blocks of zeros.
pub(crate) fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (index, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, index as u64 * 4096).unwrap();
        }
    }
}

/// Runs a tool that these tests cannot do without.
pub(crate) fn try_run(tool: &str, args: &[&str]) -> Output {
    // `blkid` is not on the PATH of everybody.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(tool).args(args).env("LC_ALL", "C").env("PATH", path).output();
    output.unwrap_or_else(|error| panic!("these tests need `{tool}` (packages qemu-utils, util-linux): {error}"))
}

/// Runs a tool and returns its standard output.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let output = try_run(tool, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{tool} {}`: {stderr}", args.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// Opens the image at a path.
pub(crate) fn open_path(path: &Path, declared: Option<Format>) -> Result<Box<dyn Disk>, FormatError> {
    open_disk(Arc::new(FileReader::open(path)?), &OpenOptions::declared(declared))
}

/// Opens an image in memory.
pub(crate) fn open_bytes(bytes: &[u8], declared: Option<Format>) -> Result<Box<dyn Disk>, FormatError> {
    open_disk(Arc::new(bytes.to_vec()), &OpenOptions::declared(declared))
}

/// Reads a whole disk in pieces of a given size.
pub(crate) fn read_all(disk: &dyn Disk, piece_bytes: usize) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0xee; usize::try_from(disk.size_bytes()).unwrap()];
    for (index, piece) in bytes.chunks_mut(piece_bytes).enumerate() {
        disk.read_exact_at(piece, (index * piece_bytes) as u64)?;
    }
    Ok(bytes)
}

/// Checks that the extents of a disk cover it, alternate, and are zero where they say so; returns the data extents.
pub(crate) fn check_extents(disk: &dyn Disk, expected: &[u8]) -> Vec<(u64, u64)> {
    let mut data = Vec::new();
    let (mut offset, mut last) = (0, None);
    while let Some(extent) = disk.next_extent(offset).unwrap() {
        assert_eq!(extent.offset_bytes, offset);
        assert!(extent.len_bytes > 0);
        if disk.format() == Format::Qcow2 {
            assert_ne!(last, Some(extent.kind), "extents at {offset:#x} are not merged");
        }
        let range = usize::try_from(offset).unwrap()..usize::try_from(extent.end_bytes()).unwrap();
        if extent.kind.has_content() {
            push_joined(&mut data, (extent.offset_bytes, extent.len_bytes));
        } else {
            assert!(expected[range].iter().all(|byte| *byte == 0), "data in {extent:?}");
        }
        (offset, last) = (extent.end_bytes(), Some(extent.kind));
    }
    assert_eq!(offset, disk.size_bytes());
    let mut listed = Vec::new();
    disk.data_extents().map(Result::unwrap).for_each(|e| push_joined(&mut listed, (e.offset_bytes, e.len_bytes)));
    assert_eq!(listed, data);
    data
}

/// Adds a range to others before it, as one where they touch.
fn push_joined(ranges: &mut Vec<(u64, u64)>, (start, len): (u64, u64)) {
    match ranges.last_mut() {
        Some(last) if last.0 + last.1 == start => last.1 += len,
        _ => ranges.push((start, len)),
    }
}

/// Compares a disk with its true content, read in several ways; returns the data extents.
pub(crate) fn check_content(disk: &dyn Disk, expected: &[u8]) -> Vec<(u64, u64)> {
    assert_eq!(disk.size_bytes(), expected.len() as u64);
    for piece_bytes in [1 << 20, 77_777, 4096] {
        assert!(read_all(disk, piece_bytes).unwrap() == expected, "wrong content in pieces of {piece_bytes}");
    }
    let mut rng = Rng(1);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let mut rng = Rng(rng.next() ^ seed);
            scope.spawn(move || {
                for _ in 0..50 {
                    let start = rng.index(expected.len());
                    let end = (start + rng.index(300_000)).min(expected.len());
                    let mut piece = vec![0xee; end - start];
                    disk.read_exact_at(&mut piece, start as u64).unwrap();
                    assert!(piece == expected[start..end], "wrong content in {start:#x}..{end:#x}");
                }
            });
        }
    });
    let mut one = [0];
    assert_eq!(disk.read_exact_at(&mut one, disk.size_bytes()).unwrap_err().code(), "out-of-range");
    assert_eq!(disk.read_exact_at(&mut one, u64::MAX).unwrap_err().code(), "out-of-range");
    check_extents(disk, expected)
}

/// Asks `qemu-img map` for the ranges that are data, merged.
pub(crate) fn qemu_data_extents(path: &Path) -> Vec<(u64, u64)> {
    let json = run("qemu-img", &["map", "--output=json", "-f", "qcow2", path.to_str().unwrap()]);
    let number = |object: &str, key: &str| -> u64 {
        let (_, rest) = object.split_once(&format!("\"{key}\": ")).unwrap();
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let mut extents: Vec<(u64, u64)> = Vec::new();
    for object in json.split('{').skip(1).filter(|object| object.contains("\"data\": true")) {
        let (start, len) = (number(object, "start"), number(object, "length"));
        push_joined(&mut extents, (start, len));
    }
    extents
}

/// Whose images the tests write.
pub(crate) const IDENTITY: Identity = Identity { uuid: *b"sixteen letters!", created_unix_s: 1_700_000_000 };

/// Writes an image over whatever is at a path.
pub(crate) fn write_image(source: &dyn DiskContent, target: &Target, path: &Path) -> Result<(), ConvertError> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    convert(source, &file, target, &IDENTITY, &NoObserver)
}

/// Opens bytes as the disk that they are.
pub(crate) fn raw_in_memory(bytes: &[u8]) -> Box<dyn Disk> {
    open_bytes(bytes, Some(Format::Raw)).unwrap()
}

/// Disks of all kinds: empty, with one sector, with a few runs, full; smaller than a block, ending in the middle of one.
pub(crate) fn disks_of_all_kinds(seed: u64) -> Vec<(&'static str, Vec<u8>)> {
    const MIB: usize = 1 << 20;
    let mut rng = Rng(seed);
    let mut one_sector = vec![0; 9 * MIB + 512];
    one_sector[5 * MIB..5 * MIB + 512].fill(0x77);
    one_sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut dense = content(&mut rng, 6 * MIB);
    dense.iter_mut().for_each(|byte| *byte |= 1);
    vec![
        ("empty", vec![0; 5 * MIB]),
        ("one sector", one_sector),
        ("runs", content(&mut rng, 13 * MIB)),
        ("dense", dense),
        ("104448 bytes", content(&mut rng, 104_448)),
        ("1 MiB and a sector", content(&mut rng, MIB + 512)),
    ]
}

/// Checks that an image is refused at once, with a message that begins so and so with its code.
#[track_caller]
pub(crate) fn check_refused_at_once(bytes: &[u8], message: &str) {
    let start = Instant::now();
    let error = open_bytes(bytes, None).map(|_| ()).expect_err(message);
    assert!(start.elapsed() < Duration::from_secs(1), "{message} takes {:?}", start.elapsed());
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
    assert!(message.starts_with(error.code()), "{}: {message}", error.code());
}

/// A disk of zeros of any size.
#[derive(Debug)]
pub(crate) struct Zeros(pub(crate) u64);

impl DiskContent for Zeros {
    fn size_bytes(&self) -> u64 {
        self.0
    }

    fn read_exact_at(&self, buf: &mut [u8], _offset_bytes: u64) -> Result<(), FormatError> {
        buf.fill(0);
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let len_bytes = self.0.saturating_sub(offset_bytes);
        Ok((len_bytes > 0).then_some(Extent { offset_bytes, len_bytes, kind: ExtentKind::Zero }))
    }
}

/// The most memory this process has had at a time.
pub(crate) fn peak_resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
