//! A new file that is there as a whole or not at all.
//!
//! ```text
//! create: .NAME.PID-N.part beside it ──► written by others ──► complete: sync, rename, sync the directory
//!                                            └── dropped: removed
//! ```

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::error::{ControlError, ErrorCode};

/// What a finished file takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileSize {
    /// Its length in bytes.
    pub file_bytes: u64,
    /// What it takes of the file system in bytes, without its holes.
    pub allocated_bytes: u64,
}

impl FileSize {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        // `st_blocks` counts 512 bytes whatever the file system's own unit is.
        Self { file_bytes: metadata.len(), allocated_bytes: metadata.blocks() * 512 }
    }
}

/// A file that is being written. Dropping it removes what was written so far.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: Arc<File>,
    path: PathBuf,
    temporary: PathBuf,
    replace: bool,
    complete: bool,
}

impl NewFile {
    /// Begins a file; with `replace` it may take the place of another one when it is complete.
    ///
    /// A symbolic link stays, and what it leads to is replaced.
    ///
    /// # Errors
    /// `InUse` if there is such a file; `Invalid` for a path that is not one of a regular file; `NotFound` without
    /// its directory; `NoSpace`, `Failed`.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<Self, ControlError> {
        let fail = |e| ControlError::io(cannot_write(path), &e);
        let target = match std::fs::metadata(path) {
            Ok(found) => {
                check_replaceable(path, &found, replace)?;
                path.canonicalize().map_err(fail)?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
                let text = format!("{}: it is a symbolic link to nothing", cannot_write(path));
                return Err(ControlError::new(ErrorCode::Invalid, text));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => std::path::absolute(path).map_err(fail)?,
            Err(e) => return Err(fail(e)),
        };
        let temporary = temporary_name(&target).ok_or_else(|| {
            ControlError::new(ErrorCode::Invalid, format!("{}: this is not the name of a file", cannot_write(path)))
        })?;
        // Readable, as the new length and checksums are read back from it.
        let file =
            File::options().read(true).write(true).create_new(true).mode(0o644).open(&temporary).map_err(fail)?;
        Ok(Self { file: Arc::new(file), path: target, temporary, replace, complete: false })
    }

    /// The open file, empty at first.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where it lies until it is complete.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// The directory in which it lies.
    pub(crate) fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Gives the file its name. It is there and durable when this returns.
    ///
    /// # Errors
    /// `InUse` if another file has got the name in the meantime; `NoSpace`, `Failed`. The file is then not there.
    pub(crate) fn complete(mut self) -> Result<FileSize, ControlError> {
        let fail = |e| ControlError::io(cannot_write(&self.path), &e);
        self.file.sync_all().map_err(fail)?;
        let size = FileSize::of(&self.file.metadata().map_err(fail)?);
        let renamed = if self.replace {
            std::fs::rename(&self.temporary, &self.path)
        } else {
            rename_to_free_name(&self.temporary, &self.path)
        };
        match renamed {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(exists(&self.path)),
            other => other.map_err(fail)?,
        }
        self.complete = true;
        File::open(self.directory()).and_then(|directory| directory.sync_all()).map_err(fail)?;
        Ok(size)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.complete
            && let Err(error) = std::fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove a file that was not completed");
        }
    }
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write `{}`", path.display())
}

fn exists(path: &Path) -> ControlError {
    ControlError::new(ErrorCode::InUse, format!("{}: it exists already", cannot_write(path)))
}

fn check_replaceable(path: &Path, found: &Metadata, replace: bool) -> Result<(), ControlError> {
    let kind = found.file_type();
    let what = if kind.is_file() {
        return if replace { Ok(()) } else { Err(exists(path)) };
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() {
        "a block device; write a file, then copy it there"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "a FIFO or a socket; an image file is not written from its beginning to its end"
    };
    Err(ControlError::new(ErrorCode::Invalid, format!("{}: it is {what}", cannot_write(path))))
}

/// A hidden name in the same directory, so that a rename does not copy; `None` for a path without a file's name.
fn temporary_name(path: &Path) -> Option<PathBuf> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // The name may be as long as names can be already.
    let name: String = path.file_name()?.to_string_lossy().chars().take(40).collect();
    Some(path.with_file_name(format!(".{name}.{}-{number}.part", std::process::id())))
}

/// Renames a file if nothing has the new name.
fn rename_to_free_name(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system cannot do it in one step.
        Err(Errno::INVAL | Errno::NOSYS) if to.symlink_metadata().is_err() => std::fs::rename(from, to),
        Err(Errno::INVAL | Errno::NOSYS) => Err(io::ErrorKind::AlreadyExists.into()),
        other => other.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn put(path: &Path, text: &str) {
        io::Write::write_all(&mut File::create(path).unwrap(), text.as_bytes()).unwrap();
    }

    fn begin(path: &Path, replace: bool, text: &str) -> NewFile {
        let new = NewFile::create(path, replace).unwrap();
        io::Write::write_all(&mut &**new.file(), text.as_bytes()).unwrap();
        new
    }

    #[test]
    fn a_file_has_its_name_when_it_is_complete_and_leaves_nothing_when_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let new = begin(&path, false, "new");
        assert!(!path.exists());
        drop(new);
        assert_eq!(names(dir.path()), [""; 0]);
        assert_eq!(begin(&path, false, "new").complete().unwrap().file_bytes, 3);
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o133, 0, "not executable, written by its owner");
    }

    #[test]
    fn a_file_that_is_there_is_replaced_only_when_it_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let late = begin(&path, false, "late");
        put(&path, "old");
        assert_eq!(NewFile::create(&path, false).unwrap_err().code(), ErrorCode::InUse);
        assert_eq!(late.complete().unwrap_err().code(), ErrorCode::InUse);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        begin(&path, true, "new").complete().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("out"), dir.path().join("link"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(NewFile::create(&link, true).unwrap_err().code(), ErrorCode::Invalid, "it leads to nothing");
        put(&path, "old");
        begin(&link, true, "new").complete().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert!(link.is_symlink());
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for (path, says) in [(dir.path(), "a directory"), (Path::new("/dev/null"), "a character device")] {
            let error = NewFile::create(path, true).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Invalid);
            assert!(error.to_string().contains(says), "{error}");
        }
        assert!(NewFile::create(&dir.path().join("missing/out"), true).unwrap_err().code() == ErrorCode::NotFound);
    }
}
