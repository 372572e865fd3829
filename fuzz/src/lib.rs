//! The bodies of the fuzz targets, one for each reader.
//!
//! They live here and not in the targets because two programs run them: libFuzzer, which needs a nightly compiler, and
//! the test `fuzz_corpus` of the crate `bulbil-format`, which runs every input of the corpus with the stable one.
//!
//! An input of all targets but `packed` is a short text about a long file:
//!
//! ```text
//! offset  bytes  field
//!      0      1  options: see `Options`
//!      1      4  length of the file in bytes, little endian; 0: it ends with its last chunk
//!      5         chunks: offset in the file, 4 bytes; length, 2 bytes; content
//! ```
//!
//! What no chunk covers is zeros, and a later chunk is written over an earlier one. So a VHDX file, which has 4 MiB at
//! least, is an input of some hundred bytes, and a mutation rarely misses what matters.

#![forbid(unsafe_code)]
#![allow(unreachable_pub, clippy::unwrap_used, reason = "also a module of a test; a panic is how a target reports")]

mod checksums;
mod exercise;
mod options;
mod packed;
mod sparse;

use std::sync::Arc;

use bulbil_format::{Format, OpenOptions, ReadAt as _, open_disk};

use options::Options;
pub use sparse::SparseFile;

/// The targets, by the names of their corpora.
pub const TARGETS: &[&str] = &["raw", "qcow2", "vhd", "vhdx", "vmdk", "vdi", "archive", "packed", "detect"];

/// Runs one input of a target; returns whether a disk was opened.
///
/// # Panics
/// If a reader breaks one of its promises, and if there is no such target.
pub fn run(target: &str, data: &[u8]) -> bool {
    match target {
        "raw" => run_declared(Some(Format::Raw), data),
        "qcow2" => run_declared(Some(Format::Qcow2), data),
        "vhd" => run_declared(Some(Format::Vhd), data),
        "vhdx" => run_declared(Some(Format::Vhdx), data),
        "vmdk" => run_declared(Some(Format::Vmdk), data),
        "vdi" => run_declared(Some(Format::Vdi), data),
        "archive" => run_declared(None, data),
        "packed" => packed::run(data),
        "detect" => run_undeclared(data),
        _ => panic!("no target {target}"),
    }
}

/// Opens the file as one format, or as what it says it is, and looks at all of the disk that can be looked at.
fn run_declared(format: Option<Format>, data: &[u8]) -> bool {
    let Some((options, file)) = parse(data) else { return false };
    let (mut file, other) = options.split(file);
    if options.fixes_checksums() {
        checksums::fix(format, &mut file, options);
    }
    let format = if options.hides_format() { None } else { format };
    let options = OpenOptions { gate: options::gate(other), ..options.open_options(format, &file) };
    exercise::check(open_disk(Arc::new(file), &options))
}

/// Opens a file that nobody says anything about, and asks whether it would have passed for raw.
fn run_undeclared(data: &[u8]) -> bool {
    let Some((options, file)) = parse(data) else { return false };
    let file = Arc::new(file);
    let undeclared = open_disk(Arc::clone(&file) as _, &options.open_options(None, &file));
    let raw = open_disk(Arc::clone(&file) as _, &options.open_options(Some(Format::Raw), &file));
    if let (Ok(disk), Ok(_)) = (&undeclared, &raw) {
        // Of an archive the disk is a part, and the archive may be raw.
        let is_part = disk.info().file_bytes != file.len_bytes();
        assert!(is_part || disk.format() == Format::Raw, "{} passes for raw", disk.format());
    }
    exercise::check(raw) | exercise::check(undeclared)
}

fn parse(data: &[u8]) -> Option<(Options, SparseFile)> {
    let (options, rest) = data.split_first()?;
    Some((Options(*options), SparseFile::parse(rest)?))
}
