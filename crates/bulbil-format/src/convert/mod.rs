//! Writes a disk as an image file of any format.
//!
//! ```text
//! source extents ─► pieces ─► prepare ─► place ─► write ─► finish
//!                             parallel   in order  parallel  tables, header
//!                             compress,  gives
//!                             find zeros offsets
//! ```
//!
//! The file depends on the content, the [`Target`] and the [`Identity`] alone: not on the number of threads, nor on
//! where the source has holes.

use std::io;
use std::sync::Arc;

use crate::{Compression, DiskContent, Format, FormatError, WriteAt};

mod engine;

pub(crate) use engine::{Writer, run};

/// What to write.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Target {
    /// The bytes of the disk, with holes for zeros.
    Raw,
    /// qcow2 version 3.
    Qcow2(Qcow2Options),
    /// A VHD with every byte in place and a footer behind, as Azure wants it.
    VhdFixed,
    /// A VHD of blocks of 2 MiB.
    VhdDynamic,
    /// A VHDX with dynamic blocks.
    Vhdx,
    /// A VMDK with uncompressed grains, for VMware Workstation and VirtualBox.
    VmdkSparse,
    /// A VMDK with compressed grains in the order of the disk, as clouds and OVAs want it.
    VmdkStream,
    /// A VDI with dynamic blocks.
    Vdi,
    /// An OVA: an archive of a description and a streamOptimized VMDK.
    Ova {
        /// The name of the virtual machine.
        name: String,
    },
}

/// How a qcow2 image is written.
#[derive(Debug, Clone)]
pub struct Qcow2Options {
    /// The cluster size: a power of two, 512 B to 2 MiB.
    pub cluster_bytes: u64,
    /// What clusters are compressed with; `None` to store them as they are.
    pub compression: Option<Compression>,
    /// The image below, of which only the difference is written.
    pub backing: Option<BackingFile>,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { cluster_bytes: 64 << 10, compression: None, backing: None }
    }
}

/// The image below a new qcow2 image.
#[derive(Debug, Clone)]
pub struct BackingFile {
    /// The name that readers will open, at most 1023 bytes; never opened here.
    pub name: String,
    /// Its format, which is written beside the name.
    pub format: Format,
    /// What it holds.
    pub content: Arc<dyn DiskContent>,
}

/// What makes an image different from others of the same content: formats ask for identifiers and times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Random bytes; further identifiers are derived from them.
    pub uuid: [u8; 16],
    /// Now, in seconds since 1970.
    pub created_unix_s: u64,
}

impl Identity {
    /// Derives an identifier in the form of a random UUID (RFC 9562, version 4); `number` tells several apart.
    #[must_use]
    pub fn derive(&self, number: u8) -> [u8; 16] {
        let mut bytes = self.uuid;
        // An odd factor maps different numbers to different bytes; the rest of the identifier stays random.
        let [_, _, _, last, ..] = &mut bytes;
        *last ^= number.wrapping_mul(0x9d);
        let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
        *version = (*version & 0x0f) | 0x40;
        *variant = (*variant & 0x3f) | 0x80;
        bytes
    }
}

/// Hears how a conversion goes on, from any thread.
pub trait ConvertObserver: Sync {
    /// `done_bytes` of the `total_bytes` of content were taken in.
    fn progress(&self, done_bytes: u64, total_bytes: u64);

    /// Whether the conversion should stop now.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoObserver;

impl ConvertObserver for NoObserver {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64) {}
}

/// A conversion failed; what was written so far is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The source could not be read.
    #[error("cannot read the disk")]
    Read(#[source] FormatError),
    /// The operating system did not take what was written.
    #[error("cannot write the image file at byte {offset_bytes:#x}")]
    Write {
        /// Where in the file.
        offset_bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The format cannot hold this disk, or not in the way that was asked for.
    #[error("unsupported-target: {reason}")]
    Unsupported {
        /// Why.
        reason: String,
    },
    /// A compressor failed.
    #[error("cannot compress: {reason}")]
    Compress {
        /// What it said.
        reason: String,
    },
    /// The observer said so.
    #[error("cancelled")]
    Cancelled,
}

impl ConvertError {
    pub(crate) fn write(offset_bytes: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { offset_bytes, source }
    }

    pub(crate) fn unsupported(reason: impl Into<String>) -> Self {
        Self::Unsupported { reason: reason.into() }
    }
}

/// Writes bytes of an image file at an offset in it.
pub(crate) fn write_at(file: &dyn WriteAt, bytes: &[u8], offset: u64) -> Result<(), ConvertError> {
    file.write_all_at(bytes, offset).map_err(ConvertError::write(offset))
}

/// Writes the content of `source` to `file`, which must be new and empty.
///
/// When this returns the file is complete, but not synced. Memory is a few MiB for each thread, and tables of the
/// target: 8 bytes for each cluster, block or grain of the disk that has content, at most.
///
/// # Errors
/// [`ConvertError`], by condition.
pub fn convert(
    source: &dyn DiskContent,
    file: &dyn WriteAt,
    target: &Target,
    identity: &Identity,
    observer: &dyn ConvertObserver,
) -> Result<(), ConvertError> {
    let size_bytes = source.size_bytes();
    match target {
        Target::Raw => engine::run(&crate::raw::RawWriter::new(size_bytes), source, file, observer),
        Target::Qcow2(options) => crate::qcow2::write(source, file, options, observer),
        Target::VhdFixed => engine::run(&crate::vhd::FixedWriter::new(size_bytes, identity)?, source, file, observer),
        Target::VhdDynamic => {
            engine::run(&crate::vhd::DynamicWriter::new(size_bytes, identity)?, source, file, observer)
        }
        Target::Vhdx => engine::run(&crate::vhdx::VhdxWriter::new(size_bytes, identity), source, file, observer),
        Target::VmdkSparse => {
            engine::run(&crate::vmdk::SparseWriter::new(size_bytes, identity), source, file, observer)
        }
        Target::VmdkStream => {
            engine::run(&crate::vmdk::StreamWriter::new(size_bytes, identity), source, file, observer)
        }
        Target::Vdi => engine::run(&crate::vdi::VdiWriter::new(size_bytes, identity)?, source, file, observer),
        Target::Ova { name } => crate::archive::write_ova(name, source, file, identity, observer),
    }
}
