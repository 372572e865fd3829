//! Compressed files.

use std::fs::File;
use std::sync::Arc;

use crate::{FormatError, ReadAt};

/// How a whole file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// RFC 1952.
    Gzip,
    /// The .xz file format, version 1.
    Xz,
    /// RFC 8878.
    Zstd,
}

/// Unpacks a file into `scratch`.
pub(crate) fn unpack(_file: &dyn ReadAt, _packing: Packing, _scratch: &File) -> Result<Arc<dyn ReadAt>, FormatError> {
    Err(FormatError::UnsupportedFormat { name: "compressed file".to_owned() })
}
