//! Where everything lies: one directory.
//!
//! ```text
//! catalog.db        images, instances, volumes and snapshots
//! store.json        which store the images are in, see `store_binding`; store-state/ what is kept here of a remote one
//! cache.json        how large the cache may become, see `cache_settings`
//! store/            packs and manifests            cache/    decompressed frames of this host
//! volumes/vol-…/    what was written to volumes
//! instances/i-…/    instance.json, user-data, state.json, serial.log, qemu.log, shim.log, known_hosts
//! keys/             the key pair that bulbil itself logs in with
//! run/              bulbil.sock, daemon.pid, daemon.log, daemon.lock; run/leases/, see `content_lease`;
//!                   run/<n>/ the sockets of one instance
//! ```

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bulbil_types::InstanceId;

use crate::error::{ControlError, ErrorCode};

/// The longest data directory: the sockets below it must fit in the 107 bytes of a socket's path.
const MAX_PATH_BYTES: usize = 107 - "/run/0123456789abcdef0/console".len();

/// What is read of a settings file; one that is longer is not understood.
const MAX_SMALL_FILE_BYTES: u64 = 64 << 10;

/// The data directory and the paths in it.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// Uses or makes a data directory, readable by its owner only.
    ///
    /// # Errors
    /// `Invalid` for a path that is too long for the sockets below it; `NoSpace` or `Failed`.
    pub fn open(root: &Path) -> Result<Self, ControlError> {
        let fail = |e| ControlError::io(format!("cannot create the data directory `{}`", root.display()), &e);
        make_private_directory(root).map_err(fail)?;
        let root = root.canonicalize().map_err(fail)?;
        // Paths in it are written into command lines of ssh and QEMU.
        if root.to_str().is_none_or(|text| text.contains('"') || text.chars().any(char::is_control)) {
            let text =
                format!("the data directory `{}` has a path with quotes or unprintable characters", root.display());
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        let len = root.as_os_str().len();
        if len > MAX_PATH_BYTES {
            let text = format!(
                "the data directory `{}` has a path of {len} bytes; its sockets allow at most {MAX_PATH_BYTES}",
                root.display()
            );
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        let data = Self { root };
        for directory in [data.run(), data.instances()] {
            make_private_directory(&directory).map_err(fail)?;
        }
        Ok(data)
    }

    /// The directory itself, absolute.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run().join("bulbil.sock")
    }

    /// A file of the daemon in the run directory.
    #[must_use]
    pub fn run_file(&self, name: &str) -> PathBuf {
        self.run().join(name)
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    pub(crate) fn catalog(&self) -> PathBuf {
        self.root.join("catalog.db")
    }

    /// The image store, unless the data directory is bound to another one.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Which store this data directory belongs to.
    pub(crate) fn store_binding(&self) -> PathBuf {
        self.root.join("store.json")
    }

    /// What is kept on this host of a store that lies elsewhere; it can be made again.
    pub(crate) fn store_state(&self) -> PathBuf {
        self.root.join("store-state")
    }

    /// The base cache.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// The volumes.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    /// The files of one instance.
    #[must_use]
    pub fn instance(&self, id: &InstanceId) -> InstanceDir {
        let short = id.as_str().trim_start_matches("i-");
        InstanceDir { files: self.instances().join(id.as_str()), sockets: self.run().join(short) }
    }
}

/// The files and sockets of one instance.
#[derive(Debug, Clone)]
pub struct InstanceDir {
    files: PathBuf,
    sockets: PathBuf,
}

impl InstanceDir {
    pub(crate) fn create(&self) -> io::Result<()> {
        make_private_directory(&self.files)?;
        make_private_directory(&self.sockets)
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        for directory in [&self.sockets, &self.files] {
            match std::fs::remove_dir_all(directory) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// A file that is kept while the instance exists.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.join(name)
    }

    /// A socket that is there while the instance runs.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }
}

fn make_private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Reads one of the small JSON files of the data directory.
pub(crate) fn read_small_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_SMALL_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a file as a whole: readers see the old or the new one. Durable when this returns.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    let parent = path.parent().expect("a file lies in a directory");
    File::open(parent)?.sync_all()
}
