//! Reads disk image formats safely and writes seed disks.
//!
//! An image comes from somebody else. This crate turns it into a [`Disk`] of which every table was checked, or into a
//! [`FormatError`] that says in a word why not. It knows no paths but the one of [`FileReader::open`], opens no other
//! file whatever an image asks for, runs no other program and has no unsafe code.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use bulbil_format::{FileReader, OpenOptions, open_disk};
//!
//! let file = Arc::new(FileReader::open(Path::new("debian-13.qcow2"))?);
//! let disk = open_disk(file, &OpenOptions::default())?;
//! let mut buf = vec![0; 1 << 20];
//! for extent in disk.data_extents() {
//!     let extent = extent?;
//!     let mut offset = extent.offset_bytes;
//!     while offset < extent.end_bytes() {
//!         let len = (extent.end_bytes() - offset).min(1 << 20);
//!         let piece = &mut buf[..usize::try_from(len)?];
//!         disk.read_exact_at(piece, offset)?;
//!         offset += len;
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is imported
//!
//! | format | accepted | refused, by code |
//! |---|---|---|
//! | raw | a regular file or block device with a partition table, boot sector or known file system; anything but a container when declared `raw` | `not-a-disk`, `virtual-size` |
//! | qcow2 | versions 2 and 3, clusters of 512 B to 2 MiB, zlib and zstd, zero and preallocated clusters, extended L2 entries, lazy refcounts and images not closed cleanly; the current state or an internal snapshot; with a backing file if its content is supplied as parent | `has-backing-file`, `parent-mismatch`, `no-such-snapshot`, `external-data-file`, `encrypted`, `marked-corrupt`, `unsupported-feature`, `corrupt`, `truncated`, `too-large`, `virtual-size` |
//! | VHD, VHDX, VMDK, VDI, QED, Parallels, Bochs, cloop, DMG, qcow version 1 | never, not even declared `raw` | `unsupported-format`, `format-mismatch` |
//! | ISO 9660, archives, programs, scripts, LUKS | only declared `raw` | `unsupported-format`, `encrypted` |
//! | two formats in one file | never, unless all are of the row above and `raw` is declared | `ambiguous-format` |
//!
//! The format of a disk that a guest has written is a stored fact: never ask [`open_disk`] about it without declaring
//! it, for the guest may have written any header it likes.
//!
//! # Limits
//!
//! | what | limit | why |
//! |---|---|---|
//! | disk | [`bulbil_types::MAX_DISK_BYTES`], 64 TiB | the largest cloud volumes |
//! | L1 table; refcount table; snapshots | 32 MiB; 8 MiB; 65536 | those of QEMU |
//! | clusters of a qcow2 file | 2^30 | two maps of 128 MiB find clusters referenced twice |
//! | compressed clusters | 2^28 | each 8 Mi of them cost a pass over the L2 tables at open |
//! | L2 tables in memory | 32 MiB | |
//! | decoded clusters in memory | 16 MiB | |
//!
//! How much a disk holds ([`DiskInfo::data_bytes`]) is known once it is open, so that a caller can refuse what is over
//! its budget before any work. Compressed data is decoded at reading, and only then is it known to be damaged.
//!
//! # Modules
//!
//! ```text
//! read_at   positioned reads of files and memory, holes found    ReadAt, FileReader
//! detect    what a file is                                       open_disk
//! disk      what every opened image can do                       Disk, Extent, DiskInfo
//! raw       the file is the disk
//! qcow2     header ► validate ► run_at ► read
//!   header    fields, extensions and their bounds
//!   entry     what one L1 or L2 entry says
//!   validate  one pass over all tables at open
//!   decode    compressed clusters
//! cache     bounded, each entry made once for all threads
//! error     why not                                              FormatError
//! seed      ISO 9660 seed disks for cloud-init
//! ```

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::indexing_slicing, reason = "a panic is how a test fails"))]

mod archive;
mod bytes;
mod cache;
mod claims;
mod convert;
mod detect;
mod disk;
mod error;
mod layer;
mod mapped;
mod open;
mod packed;
mod qcow2;
mod raw;
mod read_at;
pub mod seed;
mod table;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;
mod write_at;

pub use convert::{BackingFile, ConvertError, ConvertObserver, Identity, NoObserver, Qcow2Options, Target, convert};
pub use detect::open_disk;
pub use disk::{
    Compression, DataExtents, Disk, DiskContent, DiskInfo, Extent, ExtentKind, Format, ParseFormatError, SnapshotInfo,
};
pub use error::FormatError;
pub use open::{DenyAll, ExtentDirectory, OpenGate, OpenOptions};
pub use read_at::{FileReader, ReadAt};
pub use write_at::WriteAt;
