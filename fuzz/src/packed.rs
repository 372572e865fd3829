//! Compressed files.
//!
//! The first byte of an input says what the rest is: bit 0, content that is packed with gzip before it is opened, so
//! that the checksum is right; otherwise the packed file as it is. Bit 1 is whether the file is declared raw content,
//! which never unpacks.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use bulbil_format::{Format, OpenOptions, open_disk};

use super::exercise;

/// A few KiB unpack to some MiB; more only takes longer.
const MAX_INPUT_BYTES: usize = 8 << 10;

thread_local! {
    /// One file for all inputs: making one takes longer than most inputs.
    static SCRATCH: RefCell<Option<Arc<File>>> = const { RefCell::new(None) };
}

pub(crate) fn run(data: &[u8]) -> bool {
    let Some((mode, data)) = data.split_first() else { return false };
    if data.len() > MAX_INPUT_BYTES {
        return false;
    }
    let file = if mode & 1 != 0 { gzip(data) } else { data.to_vec() };
    let mut options = OpenOptions::declared((mode & 2 != 0).then_some(Format::Raw));
    options.scratch = Some(scratch());
    exercise::check(open_disk(Arc::new(file), &options))
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// The file is free again when the disk of the input before is dropped.
fn scratch() -> Arc<File> {
    SCRATCH.with_borrow_mut(|scratch| {
        let file = scratch.get_or_insert_with(|| {
            let in_memory = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile());
            Arc::new(in_memory.unwrap())
        });
        Arc::clone(file)
    })
}
