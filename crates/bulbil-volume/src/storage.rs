//! The seam to the host's files: what an overlay asks of its directory.
//!
//! [`HostDirectory`] is the real one. Tests put a fake in its place that loses what was not
//! synced, as a machine does that loses power.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::link;

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

    /// The first offset at or after `offset` where something may be stored; before it all is a hole.
    ///
    /// # Errors
    /// When the host cannot tell.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

/// The directory of a volume, or of one of its layers.
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

    /// Creates an empty file, or empties one that is there. Nothing of it is durable: after a loss of power it
    /// may be there or not, with anything in it.
    ///
    /// # Errors
    /// When the host cannot create it.
    fn create_volatile(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;

    /// Names the time since the host was started: what was written and not synced is there as long as this
    /// is the same.
    ///
    /// # Errors
    /// When the host cannot tell.
    fn boot_id(&self) -> io::Result<String>;

    /// Creates several empty files as [`create`](Self::create) does.
    ///
    /// # Errors
    /// When the host cannot create one of them.
    fn create_all(&self, names: &[String]) -> io::Result<()> {
        names.iter().try_for_each(|name| self.create(name).map(drop))
    }

    /// How many names a file has, this one counted, if it is there.
    ///
    /// # Errors
    /// When the host cannot tell.
    fn links(&self, name: &str) -> io::Result<Option<u64>>;

    /// Makes a directory beside this one in which the same `files`, named by paths below this one, have
    /// a second name, and puts a small file there. Durable when this returns, apart from what was written
    /// to the files and not synced; before that each name may be there or not, and the small file as well.
    ///
    /// # Errors
    /// `Unsupported` when the host cannot give a file another name: the directory is not there then.
    /// After another error it may be left as a crash leaves it.
    fn link_sibling(&self, sibling: &str, files: &[String], name: &str, bytes: &[u8]) -> io::Result<()>;

    /// A directory in this one; it is made with the first file that is created in it.
    fn subdirectory(&self, name: &str) -> Arc<dyn StorageDirectory>;

    /// Lists the files and directories in it; a directory that was not made yet is empty.
    ///
    /// # Errors
    /// When the host cannot list it.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Removes a file, or a directory with all in it, if it is there. Durable when this returns; before
    /// that any part of it may be there. Its space may be given back later.
    ///
    /// # Errors
    /// When the host cannot remove it.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Reads a whole small file that [`replace`](Self::replace) wrote, if it exists.
    ///
    /// # Errors
    /// When the host cannot read it.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Writes a small file in place of an earlier one. Durable when this returns; at any time before
    /// that the old or the new content is there, whole.
    ///
    /// # Errors
    /// When the host cannot write it. `StorageFull` and `QuotaExceeded` leave the old content; after
    /// any other error it is the old or the new one.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Makes durable which files are there and which small ones were replaced, as it can be seen now: a
    /// process that was killed may not have come to that.
    ///
    /// # Errors
    /// When the host cannot.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the host.
#[derive(Debug)]
pub struct HostDirectory {
    path: PathBuf,
    /// Where it is made when it is missing.
    parent: Option<PathBuf>,
    /// Of a host that is started again on its own.
    boot_id: Option<String>,
}

impl HostDirectory {
    /// Uses an existing directory.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), parent: None, boot_id: None }
    }

    /// Says which boot of the host this is, in place of `/proc/sys/kernel/random/boot_id`: for file systems that
    /// lose what was not synced while this host goes on.
    #[must_use]
    pub fn in_boot(self, boot_id: String) -> Self {
        Self { boot_id: Some(boot_id), ..self }
    }

    fn create_file(&self, name: &str) -> io::Result<File> {
        // One that is there already was made by an attempt whose sync failed.
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path.join(name))
    }

    /// Makes the directory, or takes one that an earlier attempt has made and perhaps not synced.
    fn make(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    }
}

/// What files are called that are removed, but whose space is not given back yet.
pub(crate) const REMOVED_PREFIX: &str = "removed.";

/// Unlinks a file or directory beside what goes on: with many extents that takes a file system seconds.
fn free_later(path: PathBuf) {
    let free = move || {
        let freed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        if let Err(error) = freed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot free a removed layer; the next start of its volume will");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("free-layer".to_owned()).spawn(free) {
        tracing::warn!(%error, "cannot free a removed layer; the next start of its volume will");
    }
}

/// The id of the time since the host was started.
pub(crate) fn host_boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
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
        if let Some(parent) = &self.parent {
            self.make()?;
            sync_directory(parent)?;
        }
        let file = self.create_file(name)?;
        sync_directory(&self.path)?;
        Ok(Arc::new(HostFile(file)))
    }

    fn create_volatile(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        if self.parent.is_some() {
            self.make()?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(self.path.join(name))?;
        Ok(Arc::new(HostFile(file)))
    }

    fn boot_id(&self) -> io::Result<String> {
        self.boot_id.clone().map_or_else(host_boot_id, Ok)
    }

    fn create_all(&self, names: &[String]) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        if self.parent.is_some() {
            self.make()?;
        }
        names.iter().try_for_each(|name| self.create_file(name).map(drop))?;
        let directories: Vec<_> = std::iter::once(&self.path).chain(&self.parent).cloned().collect();
        link::sync_all(&directories)
    }

    fn links(&self, name: &str) -> io::Result<Option<u64>> {
        match std::fs::symlink_metadata(self.path.join(name)) {
            Ok(metadata) => Ok(Some(metadata.nlink())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn link_sibling(&self, sibling: &str, files: &[String], name: &str, bytes: &[u8]) -> io::Result<()> {
        let parent = self.path.parent().ok_or(io::ErrorKind::Unsupported)?;
        link::link_sibling(&self.path, &parent.join(sibling), files, (name, bytes))
    }

    fn subdirectory(&self, name: &str) -> Arc<dyn StorageDirectory> {
        let (path, parent) = (self.path.join(name), Some(self.path.clone()));
        Arc::new(Self { path, parent, boot_id: self.boot_id.clone() })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        match std::fs::read_dir(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path.join(name);
        if name.starts_with(REMOVED_PREFIX) {
            // What an earlier process had renamed and not come to free.
            free_later(path);
            return Ok(());
        }
        let renamed = self.path.join(format!("{REMOVED_PREFIX}{name}.{}", std::process::id()));
        match std::fs::rename(&path, &renamed) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        }
        sync_directory(&self.path)?;
        free_later(renamed);
        Ok(())
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.path.join(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.path.join(format!("{name}.new"));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        std::fs::rename(&temporary, self.path.join(name))?;
        sync_directory(&self.path).map_err(|e| match e.kind() {
            // The new content is visible: this must not be taken for an error that changed nothing.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => io::Error::other(e),
            _ => e,
        })
    }

    fn sync(&self) -> io::Result<()> {
        match sync_directory(&self.path) {
            // One that was not made yet holds nothing.
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.parent.is_some() => Ok(()),
            other => other,
        }
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

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // Nothing here uses the position that this moves.
        match rustix::fs::seek(&self.0, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system that does not know its holes.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(errno) => Err(errno.into()),
        }
    }
}
