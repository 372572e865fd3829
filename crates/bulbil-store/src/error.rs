//! What can go wrong in a store, as kinds a caller can match.

use std::fmt;

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// The named object, image content or store does not exist.
    NotFound,
    /// Stored bytes do not verify; nothing of them was used.
    Corrupt,
    /// The store was written by a newer version.
    UnsupportedVersion,
    /// The disk or bucket has no space left.
    NoSpace,
    /// The operating system failed to read or write.
    Io,
    /// The disk that was being imported could not be read.
    Source,
    /// The storage did not answer in time.
    Timeout,
    /// The storage refused access, or there are no credentials to ask with.
    Denied,
    /// The store is encrypted and its key is missing or wrong.
    Key,
    /// The caller asked to stop.
    Cancelled,
}

/// A failed store operation.
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl StoreError {
    /// Makes an error without a cause; implementations of [`Objects`](crate::Objects) elsewhere need it.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn with_source(
        kind: StoreErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(StoreErrorKind::Corrupt, message)
    }

    /// A read that asks for bytes outside a frame, which a sound manifest never leads to.
    #[must_use]
    pub fn outside_frame(pack: crate::PackId) -> Self {
        Self::corrupt(format!("pack {pack}: a frame is shorter than the manifest says"))
    }

    /// An image record whose content is not known, and must therefore not be freed.
    #[must_use]
    pub fn unreadable_record(object: &str) -> Self {
        Self::corrupt(format!("the image record `{object}` cannot be read; nothing is freed until it is removed"))
    }

    pub(crate) fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => StoreErrorKind::NotFound,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StoreErrorKind::NoSpace,
            _ => StoreErrorKind::Io,
        };
        Self::with_source(kind, message, source)
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}
