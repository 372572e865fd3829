//! What the caller allows an image, and the one way in.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::{Disk, FileReader, Format, FormatError, ReadAt};

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

/// Lets an image open the regular files of one directory, by their plain names.
///
/// The directory is opened once, and names are looked up in it alone, whatever happens to its path later. Symbolic
/// links are not followed, and devices, FIFOs and directories are not opened.
#[derive(Debug)]
pub struct ExtentDirectory {
    directory: OwnedFd,
}

impl ExtentDirectory {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// [`FormatError::Io`] if it cannot be opened as a directory.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty());
        let failed = |errno: Errno| FormatError::Io { operation: "open", offset_bytes: 0, source: errno.into() };
        Ok(Self { directory: directory.map_err(failed)? })
    }
}

impl From<OwnedFd> for ExtentDirectory {
    /// Takes an open directory.
    fn from(directory: OwnedFd) -> Self {
        Self { directory }
    }
}

impl OpenGate for ExtentDirectory {
    fn open_extent(&self, name: &str) -> Result<Arc<dyn ReadAt>, FormatError> {
        let refused = |reason| FormatError::ExternalExtent { name: name.to_owned(), reason };
        let name = crate::vmdk::plain_name(name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Err(refused("there is no such file in the folder")),
            Err(Errno::LOOP) => return Err(refused("it is a symbolic link")),
            Err(Errno::NXIO) => return Err(refused("it is not a regular file")),
            Err(errno) => return Err(FormatError::Io { operation: "open", offset_bytes: 0, source: errno.into() }),
        };
        let metadata = file.metadata();
        let metadata = metadata.map_err(|source| FormatError::Io { operation: "stat", offset_bytes: 0, source })?;
        if !metadata.is_file() {
            return Err(refused("it is not a regular file"));
        }
        Ok(Arc::new(FileReader::new(file)?))
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
