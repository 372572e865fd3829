//! What the caller allows an image, and the one way in.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use crate::{Disk, Format, FormatError, ReadAt};

/// Decides whether an image may open another file, and opens it. The default is [`DenyAll`].
///
/// Names come from the image: an implementation must not take one for a path. [`ExtentDirectory`] shows how.
pub trait OpenGate: Send + Sync {
    /// Opens the file that an image calls `name` and that holds a part of its content.
    ///
    /// # Errors
    /// [`FormatError::ExternalExtent`] if it may not be opened or is not there; [`FormatError::Io`].
    fn open_extent(&self, name: &str) -> Result<Arc<dyn ReadAt>, FormatError>;
}

/// Lets no image open any other file.
#[derive(Debug, Clone, Copy, Default)]
pub struct DenyAll;

impl OpenGate for DenyAll {
    fn open_extent(&self, name: &str) -> Result<Arc<dyn ReadAt>, FormatError> {
        let reason = "other files are opened only if their folder is named";
        Err(FormatError::ExternalExtent { name: name.to_owned(), reason })
    }
}

/// What the operator says about an image beside the file itself.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// What the file is; `None` to let the file say so.
    pub format: Option<Format>,
    /// The name or identifier of an internal snapshot to read instead of the current state.
    pub snapshot: Option<String>,
    /// The parent of an image that has only what differs from it; opened by the caller.
    pub parent: Option<Arc<dyn Disk>>,
    /// Opens the files that hold the extents of a split image; `None` refuses them all.
    pub gate: Option<Arc<dyn OpenGate>>,
    /// An empty file nobody else uses, best without a name, that takes the content of a compressed file.
    pub scratch: Option<Arc<File>>,
}

impl OpenOptions {
    /// Nothing but the format is said.
    #[must_use]
    pub fn declared(format: impl Into<Option<Format>>) -> Self {
        Self { format: format.into(), ..Self::default() }
    }
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions")
            .field("format", &self.format)
            .field("snapshot", &self.snapshot)
            .field("parent", &self.parent)
            .finish_non_exhaustive()
    }
}
