//! The listening socket's file.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::warn;

use super::ServeError;

/// `sun_path` has 108 bytes, one of them for the terminating NUL (unix(7)).
const MAX_PATH_BYTES: usize = 107;
/// Connections that may wait to be accepted: a multi-connection client opens up to 16 at once.
const BACKLOG: i32 = 128;

/// A socket file made by this process; dropping it removes the file if it is still this one.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode number.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = identity_of(&self.path).is_ok_and(|identity| identity == self.identity);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the socket file");
        }
    }
}

/// Listens on a new socket file at `path`, which only its owner may connect to.
///
/// A socket file on which nothing listens is replaced. Two servers that start on one path at the
/// same moment are kept apart by whatever they serve (a volume is locked), not here.
pub(crate) fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ServeError> {
    if path.as_os_str().as_bytes().len() > MAX_PATH_BYTES {
        return Err(ServeError::PathTooLong { path: path.to_owned(), limit_bytes: MAX_PATH_BYTES });
    }
    remove_stale(path)?;
    let failed = |source: io::Error| ServeError::Bind { path: path.to_owned(), source };
    let socket = bind_private(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), identity: identity_of(path).map_err(failed)? };
    Ok((UnixListener::from(socket), file))
}

fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the file takes the mode of the unbound socket, so it is never open to others, not
    // even between bind and chmod.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn remove_stale(path: &Path) -> Result<(), ServeError> {
    let failed = |source: io::Error| ServeError::Bind { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServeError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(ServeError::InUse { path: path.to_owned() }),
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}
