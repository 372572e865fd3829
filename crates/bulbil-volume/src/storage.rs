//! The seam to the host's files: what an overlay asks of its directory.
//!
//! [`HostDirectory`] is the real one. Tests put a fake in its place that loses what was not
//! synced, as a machine does that loses power.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file of an overlay. All offsets and lengths are bytes.
pub trait StorageFile: Send + Sync + std::fmt::Debug {
    /// Fills `buf`; what lies past the end of the file or in a hole reads as zeroes.
    ///
    /// # Errors
    /// When the host cannot read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf`; not durable before [`sync_data`](Self::sync_data).
    ///
    /// # Errors
    /// When the host cannot write; any prefix may have been written, in whole 4 KiB pages.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Gives the space of a range back; it reads as zeroes afterwards.
    ///
    /// # Errors
    /// When the host cannot; `Unsupported` when its file system has no holes.
    fn punch_hole(&self, offset: u64, len_bytes: u64) -> io::Result<()>;

    /// Makes durable what was written before the call.
    ///
    /// # Errors
    /// When the host cannot; what is on disk is then unknown.
    fn sync_data(&self) -> io::Result<()>;
}

/// The directory of an overlay.
pub trait StorageDirectory: Send + Sync + std::fmt::Debug {
    /// Opens a file if it exists.
    ///
    /// # Errors
    /// When the host cannot open it.
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn StorageFile>>>;

    /// Creates an empty file, or takes one that an earlier attempt has made; its name is durable when
    /// this returns.
    ///
    /// # Errors
    /// When the host cannot create it.
    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;
}

/// A directory of the host.
#[derive(Debug)]
pub struct HostDirectory {
    path: PathBuf,
}

impl HostDirectory {
    /// Uses an existing directory.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

impl StorageDirectory for HostDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn StorageFile>>> {
        match OpenOptions::new().read(true).write(true).open(self.path.join(name)) {
            Ok(file) => Ok(Some(Arc::new(HostFile(file)))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        // One that is there already was made by an attempt whose sync failed.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path.join(name))?;
        File::open(&self.path)?.sync_all()?;
        Ok(Arc::new(HostFile(file)))
    }
}

#[derive(Debug)]
struct HostFile(File);

impl StorageFile for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Ok(());
                }
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn punch_hole(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.0, flags, offset, len_bytes).map_err(|errno| match errno {
            rustix::io::Errno::OPNOTSUPP => io::ErrorKind::Unsupported.into(),
            errno => errno.into(),
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
