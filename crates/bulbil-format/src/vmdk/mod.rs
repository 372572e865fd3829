//! VMDK, read only here: sparse extents with their descriptor, and sets of extents beside a descriptor.
//!
//! ```text
//! KDMV …          one file: header ► embedded descriptor ► SparseMap     monolithicSparse, streamOptimized
//! # Disk Desc…    descriptor ► gate ► Part, Part, …                      monolithicFlat, vmfs, twoGbMaxExtent…
//! ```
//!
//! Source: VMware Virtual Disks, Virtual Disk Format 5.0.

use std::sync::Arc;

use crate::bytes::to_usize;
use crate::disk::SECTOR_BYTES;
use crate::error::need;
use crate::mapped::Mapped;
use crate::open::DenyAll;
use crate::{Disk, FormatError, OpenOptions, ReadAt};

mod descriptor;
mod grain;
mod header;
mod sectors;
mod sparse;
mod split;
mod validate;
mod write;

pub(crate) use descriptor::plain_name;
use descriptor::{Descriptor, ExtentSource};
use header::{Header, MAGIC};
use sparse::{About, SparseMap};
use split::{SplitDisk, check_extent_size};
pub(crate) use write::{SparseWriter, StreamWriter};

/// Enough for the descriptor of a disk of thousands of extents.
const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;

/// Opens an image.
pub(crate) fn open(file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let mut magic = [0; 4];
    need(file.len_bytes(), 4, "the header")?;
    file.read_exact_at(&mut magic, 0).map_err(FormatError::read(0))?;
    let disk = if magic == MAGIC { open_sparse(file) } else { open_descriptor(&*file, options) };
    match disk {
        Ok(_) if options.parent.is_some() => {
            Err(FormatError::ParentMismatch { reason: "this VMDK image has no parent".to_owned() })
        }
        Err(FormatError::Differencing { name, .. }) if options.parent.is_some() => {
            Err(FormatError::UnsupportedFormat { name: format!("VMDK with the parent {name:?}") })
        }
        disk => disk,
    }
}

/// Opens a file that has header, descriptor and content.
fn open_sparse(file: Arc<dyn ReadAt>) -> Result<Box<dyn Disk>, FormatError> {
    let header = Header::read(&*file)?;
    let descriptor = Descriptor::parse(&embedded_descriptor(&*file, &header)?)?;
    let size_bytes = check_self_contained(&descriptor, &header)?;
    let about =
        About { create_type: descriptor.create_type.as_str().to_owned(), content_id: Some(descriptor.content_id) };
    let map = SparseMap::new(&*file, header, size_bytes, about)?;
    Ok(Box::new(Mapped::new(file, map, None)))
}

fn embedded_descriptor(file: &dyn ReadAt, header: &Header) -> Result<Vec<u8>, FormatError> {
    let range = header.descriptor_range();
    if range.is_empty() || range.start == 0 {
        let reason = "there is none: this is one extent of a larger disk".to_owned();
        return Err(FormatError::BadDescriptor { reason });
    }
    let (start_bytes, len_bytes) =
        (range.start.saturating_mul(SECTOR_BYTES), (range.end - range.start).saturating_mul(SECTOR_BYTES));
    if len_bytes > MAX_DESCRIPTOR_BYTES {
        return Err(too_large(len_bytes));
    }
    need(file.len_bytes(), start_bytes.saturating_add(len_bytes), "the descriptor")?;
    read_descriptor(file, start_bytes, len_bytes)
}

fn read_descriptor(file: &dyn ReadAt, start_bytes: u64, len_bytes: u64) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0; to_usize(len_bytes)];
    file.read_exact_at(&mut bytes, start_bytes).map_err(FormatError::read(start_bytes))?;
    if bytes.first() == Some(&0) {
        let reason = "it is empty: this is one extent of a larger disk".to_owned();
        return Err(FormatError::BadDescriptor { reason });
    }
    Ok(bytes)
}

fn too_large(len_bytes: u64) -> FormatError {
    FormatError::TooLarge { what: format!("a descriptor of {len_bytes} bytes"), limit: MAX_DESCRIPTOR_BYTES }
}

/// Checks that a file with a header has all of its disk; returns the size of the disk.
///
/// The name of the extent is not used: it is often that of another file, for renaming a file does not change it.
fn check_self_contained(descriptor: &Descriptor, header: &Header) -> Result<u64, FormatError> {
    let [only] = descriptor.extents.as_slice() else {
        let reason = format!("{} extents in one file", descriptor.extents.len());
        return Err(FormatError::BadDescriptor { reason });
    };
    match &only.source {
        ExtentSource::Sparse { .. } if descriptor.create_type.is_one_file() => {
            check_extent_size(header, only.sectors)?;
            Ok(descriptor.size_bytes())
        }
        other => {
            let reason = "a file with a header has its own content only";
            Err(FormatError::ExternalExtent { name: other.name().to_owned(), reason })
        }
    }
}

/// Opens a descriptor that is a file of its own.
fn open_descriptor(file: &dyn ReadAt, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    if file.len_bytes() > MAX_DESCRIPTOR_BYTES {
        return Err(too_large(file.len_bytes()));
    }
    let descriptor = Descriptor::parse(&read_descriptor(file, 0, file.len_bytes())?)?;
    if descriptor.create_type.is_one_file() {
        let name = descriptor.extents.first().map(|extent| extent.source.name().to_owned()).unwrap_or_default();
        let reason = "import that file itself";
        return Err(FormatError::ExternalExtent { name, reason });
    }
    match options.gate.as_deref() {
        Some(gate) => Ok(Box::new(SplitDisk::open(&descriptor, file.len_bytes(), gate)?)),
        None => Ok(Box::new(SplitDisk::open(&descriptor, file.len_bytes(), &DenyAll)?)),
    }
}
