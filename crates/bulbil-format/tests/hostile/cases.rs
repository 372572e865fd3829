//! The table of hostile files.

mod archive;
mod foreign;
mod qcow2;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use bulbil_format::Format;

use super::images;
use super::support::write_sparse;

const MAX_TIME: Duration = Duration::from_secs(1);
const MAX_RESIDENT_KIB: u64 = 64 << 10;

/// A hostile file and what must become of it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The rule of `docs/formats/refusals.md` that refuses it.
    pub(crate) rule: u8,
    /// What it is after, with the number of the advisory where there is one.
    pub(crate) attacks: &'static str,
    /// What the operator says the file is.
    pub(crate) declared: Option<Format>,
    /// The code it is refused with; more than one where the order of the checks is free.
    pub(crate) codes: &'static [&'static str],
    /// Makes the file, given the path of a file it has no business with.
    make: fn(&Path) -> Vec<u8>,
    /// How long the file is made, with a hole, after it was written.
    file_bytes: Option<u64>,
    /// A bound of work that has run away, not of speed: nearly all cases take a millisecond.
    pub(crate) max_time: Duration,
    /// A bound of memory; what a test process takes that does nothing is 3 MiB of it.
    pub(crate) max_resident_kib: u64,
}

impl Case {
    /// A file that nobody says anything about.
    fn new(
        name: &'static str,
        rule: u8,
        attacks: &'static str,
        codes: &'static [&'static str],
        make: fn(&Path) -> Vec<u8>,
    ) -> Self {
        Self {
            name,
            rule,
            attacks,
            declared: None,
            codes,
            make,
            file_bytes: None,
            max_time: MAX_TIME,
            max_resident_kib: MAX_RESIDENT_KIB,
        }
    }

    fn declared(self, format: Format) -> Self {
        Self { declared: Some(format), ..self }
    }

    fn file_bytes(self, len_bytes: u64) -> Self {
        Self { file_bytes: Some(len_bytes), ..self }
    }

    /// Two GiB are unpacked of any file before it is too much.
    fn max_time(self, max_time: Duration) -> Self {
        Self { max_time, ..self }
    }

    /// A table of the largest size there is, which is read as a whole, though from a hole of the file.
    fn largest_table(self) -> Self {
        Self { max_resident_kib: 96 << 10, ..self }
    }

    /// Writes the file.
    pub(crate) fn write(&self, path: &Path, canary: &Path) {
        write_sparse(path, &(self.make)(canary));
        if let Some(len_bytes) = self.file_bytes {
            OpenOptions::new().write(true).open(path).unwrap().set_len(len_bytes).unwrap();
        }
    }
}

/// All cases.
pub(crate) fn all() -> Vec<Case> {
    [qcow2::cases(), vhd::cases(), vhdx::cases(), vmdk::cases(), vdi::cases(), archive::cases(), foreign::cases()]
        .into_iter()
        .flatten()
        .collect()
}
