//! What can go wrong when a volume is made or opened.

use std::fmt;

use bulbil_store::{StoreError, StoreErrorKind};

use crate::device::{BlockError, BlockErrorKind};

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeErrorKind {
    /// There is no such volume.
    NotFound,
    /// Another process has it open, or another snapshot of it is being taken.
    InUse,
    /// Its files cannot be understood.
    Corrupt,
    /// The size is zero, over the limit, or smaller than the image or the volume.
    BadSize,
    /// The host has no space left.
    NoSpace,
    /// The host failed to read or write.
    Io,
    /// The caller asked to stop.
    Cancelled,
}

/// A volume that could not be made or opened.
#[derive(Debug)]
pub struct VolumeError {
    kind: VolumeErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl VolumeError {
    pub(crate) fn new(kind: VolumeErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn with_source(
        kind: VolumeErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    pub(crate) fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => VolumeErrorKind::NotFound,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => VolumeErrorKind::NoSpace,
            _ => VolumeErrorKind::Io,
        };
        Self::with_source(kind, message, source)
    }

    pub(crate) fn block(message: impl Into<String>, source: BlockError) -> Self {
        let kind = match source.kind() {
            BlockErrorKind::NoSpace => VolumeErrorKind::NoSpace,
            _ => VolumeErrorKind::Io,
        };
        Self::with_source(kind, message, source)
    }

    pub(crate) fn store(message: impl Into<String>, source: StoreError) -> Self {
        let kind = match source.kind() {
            StoreErrorKind::NotFound | StoreErrorKind::Corrupt => VolumeErrorKind::Corrupt,
            StoreErrorKind::NoSpace => VolumeErrorKind::NoSpace,
            StoreErrorKind::Cancelled => VolumeErrorKind::Cancelled,
            _ => VolumeErrorKind::Io,
        };
        Self::with_source(kind, message, source)
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> VolumeErrorKind {
        self.kind
    }
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for VolumeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}
