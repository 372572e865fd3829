//! Reads disk image formats safely, writes them, and writes seed disks.
//!
//! An image comes from somebody else. This crate turns it into a [`Disk`] of which every table was checked, or into a
//! [`FormatError`] that says in a word why not. It opens no other file whatever an image asks for, but those the caller
//! names: the one of [`FileReader::open`], a parent, the extents an [`OpenGate`] lets through. It runs no other program
//! and has no unsafe code. The other way round, [`convert()`] writes what any [`DiskContent`] holds as a new image file.
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
//! | qcow2 | versions 2 and 3, clusters of 512 B to 2 MiB, zlib and zstd, zero and preallocated clusters, extended L2 entries, lazy refcounts and images not closed cleanly; the current state or an internal snapshot; with a backing file if its content is supplied as parent | `has-backing-file`, `parent-mismatch`, `no-such-snapshot`, `external-data-file`, `encrypted`, `marked-corrupt`, `unsupported-feature` |
//! | VHD | fixed, dynamic; differencing if its parent is supplied | `differencing`, `parent-mismatch`, `checksum` |
//! | VHDX | dynamic, fixed, sectors of 4 KiB, a log that was not replayed | `differencing`, `checksum`, `unsupported-feature` |
//! | VMDK | monolithicSparse, streamOptimized; flat and split extents if an [`OpenGate`] opens them | `external-extent`, `differencing`, `bad-descriptor`, `encrypted` |
//! | VDI | dynamic, static | `unsupported-format` |
//! | gzip, xz, Zstandard; OVA, tar of a `disk.raw` | with one of the above inside | `bad-archive`, `too-much-data`, `no-scratch` |
//! | QED, Parallels, Bochs, cloop, DMG, COWD, seSparse, qcow version 1 | never, not even declared `raw` | `unsupported-format`, `format-mismatch` |
//! | ISO 9660, tar, other archives, programs, scripts, LUKS | only declared `raw` | `unsupported-format`, `encrypted` |
//! | two formats in one file | never, unless all are of the row above and `raw` is declared | `ambiguous-format` |
//!
//! Any of them may be `corrupt`, `truncated` or `too-large`. `docs/formats` has a page for each, and one for the codes.
//!
//! The format of a disk that a guest has written is a stored fact: never ask [`open_disk`] about it without declaring
//! it, for the guest may have written any header it likes.
//!
//! # Limits
//!
//! | what | limit | why |
//! |---|---|---|
//! | disk | [`bulbil_types::MAX_DISK_BYTES`], 64 TiB | the largest cloud volumes |
//! | content of one file | 1032 times its length, or 2 GiB | what deflate does with zeros |
//! | clusters of a qcow2 file; compressed ones | 2^30; 2^28 | two maps of 128 MiB find clusters referenced twice |
//! | blocks of a VHD; of a VDI | 2^23; 2^24 | their maps are kept in memory |
//! | VHDX log that is replayed | 64 MiB | kept in memory |
//! | decoded clusters in memory | 16 MiB | |
//!
//! The pages of the formats have the rest.
//!
//! How much a disk holds ([`DiskInfo::data_bytes`]) is known once it is open, so that a caller can refuse what is over
//! its budget before any work. Compressed data is decoded at reading, and only then is it known to be damaged.
//!
//! # Modules
//!
//! ```text
//! read_at   positioned reads of files and memory, holes found    ReadAt, FileReader
//! detect    what a file is                                       open_disk
//! packed    gzip, xz, Zstandard: unpacked first
//! archive   OVA, tar: the disk inside
//! open      what the caller allows an image                      OpenOptions, OpenGate, ExtentDirectory
//! disk      what every opened image can do                       Disk, DiskContent, Extent, DiskInfo
//! mapped    a map of clusters becomes a disk                     (claims: nothing is used twice)
//! raw       the file is the disk
//! qcow2     header ► validate ► run_at ► read
//! vhd       footer ► header ► map
//! vhdx      header ► log ► metadata ► bat
//! vmdk      header, descriptor ► sparse | split
//! vdi       header ► map
//! convert   threads: prepare ► place ► write ► finish            convert, Target
//! write_at  positioned writes of a new file                      WriteAt
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
mod holes;
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
