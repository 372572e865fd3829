use std::io;
use std::path::PathBuf;

/// Why a server could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The path does not fit into a socket address.
    #[error("socket path `{}` has {} bytes, the limit is {limit_bytes}", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The most bytes a socket path may have.
        limit_bytes: usize,
    },
    /// Another process answers on the socket.
    #[error("another server listens on `{}`", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket stands at the path; it is left alone.
    #[error("`{}` exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot listen on `{}`", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An export's name or description is longer than the protocol allows.
    #[error("the {what} of an export has {len_bytes} bytes, the limit is {limit_bytes}")]
    TextTooLong {
        /// `name` or `description`.
        what: &'static str,
        /// Its length.
        len_bytes: usize,
        /// The most bytes it may have.
        limit_bytes: usize,
    },
    /// Two exports have one name.
    #[error("there are two exports named `{name}`")]
    DuplicateExport {
        /// The name.
        name: String,
    },
    /// There is no export of this name.
    #[error("there is no export named `{name}`")]
    UnknownExport {
        /// The name.
        name: String,
    },
    /// A thread or a file descriptor for the server could not be made.
    #[error("cannot start the server")]
    Start {
        /// The cause.
        source: io::Error,
    },
}
