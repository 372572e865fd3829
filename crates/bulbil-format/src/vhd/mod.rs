//! VHDs: fixed, dynamic and differencing disks are read, the first two written.
//!
//! ```text
//! fixed     disk ─────────────────────────────────────────────────────────────────── footer
//! dynamic   copy of the footer ─ dynamic header ─ block allocation table ─ blocks ─── footer
//! block     map of sectors, a bit each, first sector in the highest bit ─ content
//! ```
//!
//! The footer at the end says what the file is; the copy at the beginning must say the same. A table entry is the
//! sector at which a block begins, or `ffffffff` if the block is not stored. The map of sectors matters in a
//! differencing disk alone, where a zero bit means that the sector is the parent's. In a dynamic disk a zero bit means
//! that nobody wrote the sector, which then is zeros in the block as well; QEMU does not look at it, nor does this.
//!
//! The size of the disk is the footer's current size, never the geometry, which is too small for most disks.

use std::sync::Arc;

use crate::bytes::uuid_text;
use crate::{Disk, FormatError, OpenOptions, ReadAt};

mod fixed;
mod footer;
mod header;
mod map;
mod write;

use fixed::FixedDisk;
use footer::{Footer, Kind};
use header::Header;
use map::VhdMap;
pub(crate) use write::{DynamicWriter, FixedWriter};

/// Opens an image.
pub(crate) fn open(file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let (footer, footer_offset) = Footer::read_last(&*file)?;
    let copy = Footer::read_first(&*file)?;
    if footer.kind != Kind::Differencing && options.parent.is_some() {
        return Err(FormatError::ParentMismatch { reason: format!("a {} VHD has no parent", footer.kind.name()) });
    }
    if footer.kind == Kind::Fixed {
        return Ok(Box::new(FixedDisk::open(file, footer, footer_offset, copy.is_some())?));
    }
    check_copy(&footer, copy)?;
    let header = Header::read(&*file, &footer)?;
    if footer.kind == Kind::Dynamic {
        return Ok(Box::new(VhdMap::open(file, footer, footer_offset, header, None)?));
    }
    match &options.parent {
        None => Err(FormatError::Differencing { format: crate::Format::Vhd, name: header.parent_name }),
        Some(parent) => {
            check_parent(&**parent, &footer, &header)?;
            Ok(Box::new(VhdMap::open(file, footer, footer_offset, header, Some(Arc::clone(parent) as _))?))
        }
    }
}

/// Checks that the two footers of a dynamic disk say the same of it.
fn check_copy(footer: &Footer, copy: Option<Footer>) -> Result<(), FormatError> {
    let copy = copy.ok_or_else(|| FormatError::corrupt("no copy of the footer at byte 0x0"))?;
    let essential = |of: &Footer| (of.kind, of.size_bytes, of.header_offset, of.identifier);
    if essential(&copy) == essential(footer) {
        return Ok(());
    }
    Err(FormatError::corrupt("the copy of the footer at byte 0x0 says something else than the footer"))
}

fn check_parent(parent: &dyn Disk, footer: &Footer, header: &Header) -> Result<(), FormatError> {
    let wanted = uuid_text(&header.parent_identifier);
    let found = parent.info().identifier;
    if found.as_deref() != Some(wanted.as_str()) {
        let found = found.map_or_else(|| "none".to_owned(), |found| format!("{found:?}"));
        let reason = format!("the image wants the parent with the identifier {wanted:?}, this one has {found}");
        return Err(FormatError::ParentMismatch { reason });
    }
    let (size_bytes, parent_bytes) = (footer.size_bytes, parent.size_bytes());
    if size_bytes != parent_bytes {
        let reason = format!("the image has {size_bytes} bytes, the parent {parent_bytes}");
        return Err(FormatError::ParentMismatch { reason });
    }
    Ok(())
}
