//! Images that others made: each is read to the right content, or refused.
//!
//! `BULBIL_CORPUS` names a folder with a `manifest.tsv` of these columns: path, format, verdict (`accept`, `refuse`,
//! `either`), size of the disk in bytes, SHA-256 of its content, SHA-256 of the image file. A path that ends in `.gz`
//! is packed once more than what it stands for.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_format::{Disk, DiskInfo, ExtentDirectory, FileReader, Format, FormatError, OpenOptions, open_disk};
use sha2::{Digest as _, Sha256};

/// More than this of zeros is not hashed: the answer would only be known after minutes.
const MAX_HASHED_BYTES: u64 = 32 << 30;

struct Row {
    path: String,
    format: String,
    verdict: String,
    size_bytes: Option<u64>,
    content_sha256: String,
    image_sha256: String,
}

fn rows(folder: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(folder.join("manifest.tsv")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#')).skip(1);
    let row = |line: &str| {
        let fields: Vec<_> = line.split('\t').map(str::to_owned).collect();
        let [path, format, verdict, size, content_sha256, image_sha256] = fields[..6].to_vec().try_into().unwrap();
        Row { path, format, verdict, size_bytes: size.parse().ok(), content_sha256, image_sha256 }
    };
    lines.map(row).collect()
}

/// Unpacks a file, leaving holes for zeros; returns its digest.
fn unpack(packed: &Path, target: &Path) -> String {
    let file = BufReader::new(File::open(packed).unwrap());
    let gzipped = packed.extension().is_some_and(|extension| extension == "gz");
    let mut input: Box<dyn Read> = if gzipped { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
    let output = File::create(target).unwrap();
    let (mut hash, mut at, mut buf) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let len = input.read(&mut buf).unwrap();
        if len == 0 {
            break;
        }
        hash.update(&buf[..len]);
        if buf[..len].iter().any(|byte| *byte != 0) {
            output.write_all_at(&buf[..len], at).unwrap();
        }
        at += len as u64;
    }
    output.set_len(at).unwrap();
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest of a disk, of which only what has content is read.
fn content_sha256(disk: &dyn Disk) -> Result<String, FormatError> {
    let (mut hash, mut offset, mut buf) = (Sha256::new(), 0, vec![0; 1 << 20]);
    while let Some(extent) = disk.next_extent(offset)? {
        if !extent.kind.has_content() {
            buf.fill(0);
        }
        while offset < extent.end_bytes() {
            let len = usize::try_from((extent.end_bytes() - offset).min(1 << 20)).unwrap();
            if extent.kind.has_content() {
                disk.read_exact_at(&mut buf[..len], offset)?;
            }
            hash.update(&buf[..len]);
            offset += len as u64;
        }
    }
    Ok(hex(&hash.finalize()))
}

/// What became of an image.
enum Outcome {
    Right,
    Wrong(String),
    Refused(FormatError),
}

impl Outcome {
    /// Whether the verdict allows this.
    fn is_allowed(&self, verdict: &str) -> bool {
        match self {
            Self::Right => verdict != "refuse",
            Self::Wrong(_) => false,
            Self::Refused(error) => verdict != "accept" && error.code() != "io",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Right => f.write_str("right"),
            Self::Wrong(what) => write!(f, "WRONG {what}"),
            Self::Refused(error) => write!(f, "refused: {error}"),
        }
    }
}

type Opened = Result<Box<dyn Disk>, FormatError>;

/// Compares the size and the content of a disk with the manifest.
fn import(row: &Row, opened: Opened) -> Outcome {
    let disk = match opened {
        Ok(disk) => disk,
        Err(error) => return Outcome::Refused(error),
    };
    if row.size_bytes.is_some_and(|expected| expected != disk.size_bytes()) {
        return Outcome::Wrong(format!("size: {} bytes", disk.size_bytes()));
    }
    if disk.size_bytes() > MAX_HASHED_BYTES {
        // Those of the manifest have no content.
        let empty = disk.data_extents().next().is_none();
        return if empty { Outcome::Right } else { Outcome::Wrong("content: there should be none".to_owned()) };
    }
    match content_sha256(&*disk) {
        Ok(digest) if digest == row.content_sha256 => Outcome::Right,
        Ok(digest) => Outcome::Wrong(format!("content: {digest}")),
        Err(error) => Outcome::Refused(error),
    }
}

/// Compares what a disk says of itself with that of the same image, opened in another way and read.
fn compare(opened: Opened, known: &DiskInfo) -> Outcome {
    match opened {
        Ok(disk) if disk.info() == *known => Outcome::Right,
        Ok(disk) => Outcome::Wrong(format!("when declared: {:?}", disk.info())),
        Err(error) => Outcome::Refused(error),
    }
}

/// Unpacks what lies beside a descriptor into the folder of the descriptor's own copy.
fn unpack_siblings(packed: &Path, folder: &Path) {
    for sibling in std::fs::read_dir(packed.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path()) {
        unpack(&sibling, &folder.join(unpacked_name(&sibling)));
    }
}

fn unpacked_name(packed: &Path) -> PathBuf {
    let name = Path::new(packed.file_name().unwrap());
    if name.extension().is_some_and(|extension| extension == "gz") { name.with_extension("") } else { name.to_owned() }
}

/// Prints what became of an image; returns it if it is not as the verdict says.
fn report(row: &Row, how: &str, verdict: &str, outcome: &Outcome) -> Option<String> {
    let ok = outcome.is_allowed(verdict);
    let line = format!("{} {} ({how}, {verdict}): {outcome}", if ok { "ok   " } else { "WRONG" }, row.path);
    println!("{line}");
    if ok { None } else { Some(line) }
}

/// Returns what is not as the manifest says.
fn check(row: &Row, folder: &Path) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let packed = folder.join(&row.path);
    let image = dir.path().join(unpacked_name(&packed));
    assert_eq!(unpack(&packed, &image), row.image_sha256, "{} is not the file of the manifest", row.path);
    let open = |options: &OpenOptions| open_disk(Arc::new(FileReader::open(&image)?), options);
    let undeclared = open(&OpenOptions::declared(None));
    let info = undeclared.as_ref().ok().map(|disk| disk.info());
    let mut wrong = vec![report(row, "undeclared", &row.verdict, &import(row, undeclared))];
    // Nothing else is known of foreign containers.
    if let Ok(format) = row.format.parse::<Format>() {
        let declared = open(&OpenOptions::declared(format));
        let outcome = match &info {
            // Read already.
            Some(info) => compare(declared, info),
            None => import(row, declared),
        };
        wrong.push(report(row, "declared", &row.verdict, &outcome));
        if format != Format::Raw {
            let as_raw = import(row, open(&OpenOptions::declared(Format::Raw)));
            wrong.push(report(row, "declared raw", "refuse", &as_raw));
        }
    }
    if row.path.starts_with("vmdk-set/") && row.verdict == "either" {
        unpack_siblings(&packed, dir.path());
        let gate = ExtentDirectory::open(dir.path()).unwrap();
        let set = open(&OpenOptions { gate: Some(Arc::new(gate)), ..OpenOptions::default() });
        wrong.push(report(row, "as a set", "accept", &import(row, set)));
    }
    wrong.into_iter().flatten().collect()
}

/// Checks the images of which the path begins so.
fn check_group(group: &str) {
    let Some(folder) = std::env::var_os("BULBIL_CORPUS").map(PathBuf::from) else {
        println!("skipped: BULBIL_CORPUS does not name a folder of images");
        return;
    };
    let rows: Vec<_> = rows(&folder).into_iter().filter(|row| row.path.starts_with(group)).collect();
    assert!(!rows.is_empty(), "no image of {group}");
    let wrong: Vec<_> = rows.iter().flat_map(|row| check(row, &folder)).collect();
    println!("{} images of {group}, {} wrong answers", rows.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn qcow2_images_of_others() {
    check_group("qcow2/");
}

#[test]
fn vhd_images_of_others() {
    check_group("vhd/");
}

#[test]
fn vhdx_images_of_others() {
    check_group("vhdx/");
}

#[test]
fn vmdk_images_of_others() {
    check_group("vmdk/");
}

#[test]
fn split_vmdk_images_of_others() {
    check_group("vmdk-set/");
}

#[test]
fn images_that_others_found_hostile_or_unreadable() {
    check_group("refuse/");
    check_group("other/");
}
