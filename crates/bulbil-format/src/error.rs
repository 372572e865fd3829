//! Why an image was not opened or not read.

use std::io;

use crate::Format;

/// An image was refused, or reading it failed.
///
/// Every refusal begins with a short code (see [`FormatError::code`]) that scripts may match. Names taken from an
/// image are quoted and escaped, so a message never carries control characters to a terminal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system could not do what was asked of the image file.
    #[error("cannot {operation} the image file at byte {offset_bytes:#x}")]
    Io {
        /// What was tried, as a verb: `read`, `open`, `map`.
        operation: &'static str,
        /// Where in the file, in bytes; 0 when the whole file is meant.
        offset_bytes: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The path names something that cannot be a disk image.
    #[error("not-a-file: this is a {kind}; a disk image is a regular file or a block device")]
    NotAFile {
        /// What it is, for example `directory`.
        kind: &'static str,
    },
    /// The file is of a known format that is not read.
    #[error("unsupported-format: {name}")]
    UnsupportedFormat {
        /// The format as people call it.
        name: String,
    },
    /// Nothing in the file says that it is a disk.
    #[error("not a disk image: {reason}")]
    NotADisk {
        /// What was found, or was not.
        reason: &'static str,
    },
    /// The signatures of two formats are present.
    #[error("ambiguous-format: the file is both {first} and {second}")]
    AmbiguousFormat {
        /// One format.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// The file is not what the caller says it is.
    #[error("format-mismatch: declared {declared}, found {found}")]
    FormatMismatch {
        /// What the caller said.
        declared: Format,
        /// What the file says.
        found: &'static str,
    },
    /// The content is in another image, which is never opened.
    #[error("has-backing-file: {name:?}; import the parent and name it explicitly, or flatten")]
    HasBackingFile {
        /// The name in the header, as far as it could be read.
        name: String,
    },
    /// The content is in another file, which is never opened.
    #[error("external-data-file: the content is in {name:?}; flatten the image first")]
    ExternalDataFile {
        /// The name in the header; empty if it has none.
        name: String,
    },
    /// The image has only what differs from a parent, which is never opened unless the operator names it.
    #[error("differencing: {format} with the parent {name:?}; name the parent explicitly")]
    Differencing {
        /// The format of the image.
        format: Format,
        /// The parent's name or identifier in the image; empty if it has none.
        name: String,
    },
    /// The image the operator named is not the parent.
    #[error("parent-mismatch: {reason}")]
    ParentMismatch {
        /// What does not fit.
        reason: String,
    },
    /// The content is in another file, which is never opened unless the operator allows it.
    #[error("external-extent: the content is in {name:?}; {reason}")]
    ExternalExtent {
        /// The name in the descriptor.
        name: String,
        /// Why it was not opened.
        reason: &'static str,
    },
    /// The text that describes the image is not understood.
    #[error("bad-descriptor: {reason}")]
    BadDescriptor {
        /// What is wrong, with the line.
        reason: String,
    },
    /// A checksum of the image's own structures is wrong.
    #[error("checksum: that of {what} is wrong")]
    Checksum {
        /// Of what.
        what: String,
    },
    /// The archive does not hold exactly one disk image.
    #[error("bad-archive: {reason}")]
    BadArchive {
        /// What is wrong.
        reason: String,
    },
    /// The image has no snapshot of this name.
    #[error("no-such-snapshot: {name:?}; the image has {available}")]
    NoSuchSnapshot {
        /// What was asked for.
        name: String,
        /// Those there are, as a list for people; `none`.
        available: String,
    },
    /// The file would expand to more than its size justifies.
    #[error("too-much-data: {what} of {data_bytes} bytes from a file of {file_bytes} bytes; at most {limit_bytes}")]
    TooMuchData {
        /// What expands.
        what: &'static str,
        /// To how much, at least.
        data_bytes: u64,
        /// The length of the file.
        file_bytes: u64,
        /// The most that is accepted of a file of this length.
        limit_bytes: u64,
    },
    /// A compressed file needs room to be unpacked, and none was given.
    #[error("no-scratch: this is a {what}, and there is nowhere to unpack it; unpack it first")]
    NoScratch {
        /// What it is.
        what: &'static str,
    },
    /// The content is encrypted.
    #[error("encrypted: {what}")]
    Encrypted {
        /// By what.
        what: &'static str,
    },
    /// The image needs a feature this reader does not have.
    #[error("unsupported-feature: bit {bit} ({name})")]
    UnsupportedFeature {
        /// The number of the incompatible feature bit.
        bit: u32,
        /// The image's own name for it, or `unknown`.
        name: String,
    },
    /// The program that wrote the image marked it as damaged.
    #[error("marked-corrupt: repair the image first, for example with `qemu-img check -r all`")]
    MarkedCorrupt,
    /// The size of the disk is not one that can be handled.
    #[error("virtual-size: {size_bytes} bytes {reason}")]
    VirtualSize {
        /// The size the image gives.
        size_bytes: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The file ends before something it refers to.
    #[error("truncated at byte {at_bytes}: {what} ends at byte {needed_bytes}")]
    Truncated {
        /// The length of the file.
        at_bytes: u64,
        /// Where the missing part would end.
        needed_bytes: u64,
        /// What is missing.
        what: &'static str,
    },
    /// The image contradicts itself or its format.
    #[error("corrupt: {what}")]
    Corrupt {
        /// What is wrong, with the offset.
        what: String,
    },
    /// The image is well formed but asks for more than this reader gives.
    #[error("too-large: {what} is over the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The most that is accepted.
        limit: u64,
    },
    /// The caller asked for bytes that the disk does not have.
    #[error("bytes {offset_bytes:#x} to {end_bytes:#x} are outside a disk of {size_bytes:#x} bytes")]
    OutOfRange {
        /// The first byte asked for.
        offset_bytes: u64,
        /// One after the last byte asked for.
        end_bytes: u64,
        /// The size of the disk.
        size_bytes: u64,
    },
}

impl FormatError {
    /// The short code of this error, stable between versions, for example `has-backing-file`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::NotAFile { .. } => "not-a-file",
            Self::UnsupportedFormat { .. } => "unsupported-format",
            Self::NotADisk { .. } => "not-a-disk",
            Self::AmbiguousFormat { .. } => "ambiguous-format",
            Self::FormatMismatch { .. } => "format-mismatch",
            Self::HasBackingFile { .. } => "has-backing-file",
            Self::ExternalDataFile { .. } => "external-data-file",
            Self::Differencing { .. } => "differencing",
            Self::ParentMismatch { .. } => "parent-mismatch",
            Self::ExternalExtent { .. } => "external-extent",
            Self::BadDescriptor { .. } => "bad-descriptor",
            Self::Checksum { .. } => "checksum",
            Self::BadArchive { .. } => "bad-archive",
            Self::NoSuchSnapshot { .. } => "no-such-snapshot",
            Self::TooMuchData { .. } => "too-much-data",
            Self::NoScratch { .. } => "no-scratch",
            Self::Encrypted { .. } => "encrypted",
            Self::UnsupportedFeature { .. } => "unsupported-feature",
            Self::MarkedCorrupt => "marked-corrupt",
            Self::VirtualSize { .. } => "virtual-size",
            Self::Truncated { .. } => "truncated",
            Self::Corrupt { .. } => "corrupt",
            Self::TooLarge { .. } => "too-large",
            Self::OutOfRange { .. } => "out-of-range",
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }

    pub(crate) fn checksum(what: impl Into<String>) -> Self {
        Self::Checksum { what: what.into() }
    }

    pub(crate) fn read(offset_bytes: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation: "read", offset_bytes, source }
    }
}

/// Refuses a file that ends before `end_bytes`.
pub(crate) fn need(len_bytes: u64, end_bytes: u64, what: &'static str) -> Result<(), FormatError> {
    if end_bytes <= len_bytes {
        return Ok(());
    }
    Err(FormatError::Truncated { at_bytes: len_bytes, needed_bytes: end_bytes, what })
}
