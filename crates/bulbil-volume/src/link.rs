//! Second names of files: what a clone is made of.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::record::RECORD_NAME;
use crate::storage::sync_directory;

/// Files and directories synced at the same time.
const SYNCS_AT_A_TIME: usize = 16;

/// See [`StorageDirectory::link_sibling`](crate::StorageDirectory::link_sibling).
pub(crate) fn link_sibling(from: &Path, to: &Path, files: &[String], small: (&str, &[u8])) -> io::Result<()> {
    // By itself: what is there already is not ours to remove.
    std::fs::create_dir(to)?;
    let made = make(from, to, files, small);
    if made.is_err() {
        drop(forget_record(to).and_then(|()| std::fs::remove_dir_all(to)));
    }
    made
}

/// Makes all names and syncs them at the same time, so that a file system that keeps a journal commits
/// once. Whichever of them a crash leaves: the small file tells which others belong to it.
fn make(from: &Path, to: &Path, files: &[String], (name, bytes): (&str, &[u8])) -> io::Result<()> {
    let mut directories = vec![to.to_owned()];
    for file in files {
        let path = to.join(file);
        let parent = path.parent().unwrap_or(to);
        if !directories.iter().any(|known| known == parent) {
            std::fs::create_dir(parent)?;
            directories.push(parent.to_owned());
        }
        link(&from.join(file), &path)?;
    }
    File::create_new(to.join(name))?.write_all(bytes)?;
    directories.extend(to.parent().map(Path::to_owned));
    directories.push(to.join(name));
    sync_all(&directories)
}

fn link(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::hard_link(from, to) {
        // No second names on this file system, by these rights, or no more of them.
        Err(e) if matches!(e.raw_os_error().map(rustix::io::Errno::from_raw_os_error), Some(errno) if cannot(errno)) => {
            Err(io::Error::new(io::ErrorKind::Unsupported, e))
        }
        Err(e) => Err(e),
        // What does not count names cannot say which files may be written to.
        Ok(()) if std::fs::symlink_metadata(from)?.nlink() < 2 => Err(io::ErrorKind::Unsupported.into()),
        Ok(()) => Ok(()),
    }
}

fn cannot(errno: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::XDEV, Errno::PERM, Errno::MLINK, Errno::OPNOTSUPP, Errno::NOSYS].contains(&errno)
}

/// Syncs files and directories at the same time.
pub(crate) fn sync_all(paths: &[PathBuf]) -> io::Result<()> {
    let each = paths.len().div_ceil(SYNCS_AT_A_TIME).max(1);
    let (own, others) = paths.split_at(each.min(paths.len()));
    std::thread::scope(|scope| {
        let sync = |paths: &[PathBuf]| paths.iter().try_for_each(|path| sync_directory(path));
        let spawn = |paths| std::thread::Builder::new().spawn_scoped(scope, move || sync(paths));
        let started: Vec<_> = others.chunks(each).map(spawn).collect::<io::Result<_>>()?;
        let synced = sync(own);
        // The scope waits for those that are left out after an error.
        started.into_iter().try_for_each(|sync| sync.join().expect("a sync does not panic")).and(synced)
    })
}

/// Makes a directory be no volume any more, durably.
pub(crate) fn forget_record(directory: &Path) -> io::Result<()> {
    match std::fs::remove_file(directory.join(RECORD_NAME)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_directory(directory),
    }
}
