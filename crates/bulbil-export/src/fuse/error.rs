use std::io;
use std::path::PathBuf;

/// Why a device could not be shown in a directory, or not be taken away from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FuseError {
    /// The kernel offers no FUSE.
    #[error("this machine has no FUSE: `/dev/fuse` cannot be opened")]
    NoFuse {
        /// The cause.
        source: io::Error,
    },
    /// Only root may mount by itself, and the program that mounts for others is missing.
    #[error("only root can mount without `fusermount3`, which is not installed")]
    NoHelper,
    /// The place is not an empty directory.
    #[error("`{}` is not an empty directory", path.display())]
    NotAnEmptyDirectory {
        /// The place.
        path: PathBuf,
    },
    /// Something is mounted there whose server has died.
    #[error("what is mounted on `{}` has lost its server", path.display())]
    Stale {
        /// The place.
        path: PathBuf,
    },
    /// The place cannot be used.
    #[error("cannot use the directory `{}`", path.display())]
    Directory {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel or the helper refused.
    #[error("cannot mount on `{}`", path.display())]
    Mount {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is open, or something stands on it, such as a loop device.
    #[error("`{}` is in use", path.display())]
    Busy {
        /// The place.
        path: PathBuf,
    },
    /// It could not be unmounted for another reason.
    #[error("cannot unmount `{}`", path.display())]
    Unmount {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The connection to the kernel failed, or the device could not be flushed at the end.
    #[error("the file in `{}` was not served to its end", path.display())]
    Served {
        /// The place.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}
