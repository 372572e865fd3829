//! What an input says about how its file is opened.

use std::sync::Arc;

use bulbil_format::{Disk, Format, FormatError, OpenGate, OpenOptions, ReadAt, open_disk};

use super::{SparseFile, checksums};

/// The first byte of an input, one choice in each bit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options(pub(crate) u8);

impl Options {
    /// Makes the checksums of the file right, so that what they protect is reached.
    pub(crate) fn fixes_checksums(self) -> bool {
        self.0 & 1 != 0
    }

    /// Does not tell the reader what the file is.
    pub(crate) fn hides_format(self) -> bool {
        self.0 & 2 != 0
    }

    /// Makes the last sector a copy of the first, as VHD wants it.
    pub(crate) fn copies_footer(self) -> bool {
        self.0 & 4 != 0
    }

    /// Takes what comes after the first bytes of the file for another one, which the image may open by any name.
    pub(crate) fn split(self, file: SparseFile) -> (SparseFile, Option<SparseFile>) {
        if self.0 & 16 == 0 {
            return (file, None);
        }
        let (image, other) = file.split_at(DESCRIPTOR_BYTES);
        (image, Some(other))
    }

    /// What the operator says: perhaps a parent, a gate, a snapshot.
    pub(crate) fn open_options(self, format: Option<Format>, file: &SparseFile) -> OpenOptions {
        let mut options = OpenOptions::declared(format);
        if self.0 & 8 != 0 {
            options.parent = parent(format, file);
        }
        if self.0 & 32 != 0 {
            options.snapshot = Some("1".to_owned());
        }
        options
    }
}

/// Room for a descriptor.
const DESCRIPTOR_BYTES: u64 = 64 << 10;

/// A gate that leads to one file.
pub(crate) fn gate(other: Option<SparseFile>) -> Option<Arc<dyn OpenGate>> {
    other.map(|other| Arc::new(OneFile(Arc::new(other))) as _)
}

/// A parent that a child takes: qcow2 asks for nothing, VHD for the identifier and the size.
fn parent(format: Option<Format>, child: &SparseFile) -> Option<Arc<dyn Disk>> {
    let mut file = vec![0x5a_u8; PARENT_BYTES];
    let format = format.filter(|format| *format == Format::Vhd).unwrap_or(Format::Raw);
    if format == Format::Vhd {
        let size_bytes = child.len_bytes().checked_sub(512).map_or([0; 8], |footer| child.read(footer + 48));
        let kept = usize::try_from(u64::from_be_bytes(size_bytes)).ok().filter(|size| *size <= PARENT_BYTES)?;
        file.truncate(kept);
        file.extend(checksums::vhd_fixed_footer(size_bytes, *b"id of the parent"));
    }
    open_disk(Arc::new(file), &OpenOptions::declared(format)).ok().map(Arc::from)
}

const PARENT_BYTES: usize = 64 << 10;

/// Every name an image asks for is the same file.
struct OneFile(Arc<SparseFile>);

impl OpenGate for OneFile {
    fn open_extent(&self, _name: &str) -> Result<Arc<dyn ReadAt>, FormatError> {
        Ok(Arc::clone(&self.0) as _)
    }
}
