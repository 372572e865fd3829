//! Objects as files below one directory.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::Objects;
use crate::durable::{make_directory, sync_directory};
use crate::error::StoreError;

/// Objects as files below one directory.
#[derive(Debug)]
pub struct DirObjects {
    root: PathBuf,
    temporary: PathBuf,
    /// Directories whose names this process has made durable.
    durable: Mutex<HashSet<PathBuf>>,
}

impl DirObjects {
    /// Opens or creates the directory.
    ///
    /// Files that an interrupted put left behind are removed, unless another process may still
    /// be writing them.
    ///
    /// # Errors
    /// `Io` or `NoSpace` when it cannot be created.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let temporary = root.join("tmp");
        make_directory(root)
            .and_then(|()| std::fs::create_dir_all(&temporary))
            .map_err(|e| StoreError::io(format!("cannot create `{}`", temporary.display()), e))?;
        let objects = Self { root: root.to_owned(), temporary, durable: Mutex::default() };
        objects.remove_stale_temporaries();
        Ok(objects)
    }

    /// A temporary file is named after the process that writes it; one whose process is gone is rubbish.
    fn remove_stale_temporaries(&self) {
        let Ok(entries) = std::fs::read_dir(&self.temporary) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|n| n.split('-').next()).and_then(|pid| pid.parse::<u32>().ok());
            let alive = owner.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists());
            if !alive && let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove a stale temporary file");
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        debug_assert!(
            name.split('/').all(|part| !part.is_empty()
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))),
            "object names are made by this crate"
        );
        self.root.join(name)
    }

    /// Makes the directories above an object, each with a durable name.
    ///
    /// Also where they are there: who has made them may have been killed before that.
    fn make_parent(&self, path: &Path) -> io::Result<PathBuf> {
        let parent = path.parent().expect("an object lies below the root").to_owned();
        if !self.durable.lock().unwrap_or_else(PoisonError::into_inner).contains(&parent) {
            make_directory(&parent)?;
            self.durable.lock().unwrap_or_else(PoisonError::into_inner).insert(parent.clone());
        }
        Ok(parent)
    }

    fn open_object(&self, name: &str) -> Result<File, StoreError> {
        File::open(self.path(name)).map_err(|e| StoreError::io(format!("cannot open object `{name}`"), e))
    }

    fn write_temporary(&self, bytes: &[u8]) -> io::Result<PathBuf> {
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let path = self.temporary.join(format!("{}-{:016x}", std::process::id(), u64::from_le_bytes(random)));
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        if let Err(error) = write() {
            drop(std::fs::remove_file(&path));
            return Err(error);
        }
        Ok(path)
    }
}

impl Objects for DirObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let path = self.path(name);
        let put = || -> io::Result<bool> {
            let parent = self.make_parent(&path)?;
            let temporary = self.write_temporary(bytes)?;
            // A hard link fails when the name exists, where a rename would replace.
            let linked = std::fs::hard_link(&temporary, &path);
            if let Err(error) = std::fs::remove_file(&temporary) {
                tracing::warn!(path = %temporary.display(), %error, "cannot remove a temporary file");
            }
            match linked {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    let same = std::fs::read(&path)? == bytes;
                    if same {
                        // Whoever put it may not have synced the directory yet.
                        sync_directory(&parent)?;
                    }
                    return Ok(same);
                }
                other => other?,
            }
            sync_directory(&parent)?;
            Ok(true)
        };
        put().map_err(|e| StoreError::io(format!("cannot store object `{name}`"), e))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(name);
        let put = || -> io::Result<()> {
            let parent = self.make_parent(&path)?;
            let temporary = self.write_temporary(bytes)?;
            if let Err(error) = std::fs::rename(&temporary, &path) {
                drop(std::fs::remove_file(&temporary));
                return Err(error);
            }
            sync_directory(&parent)
        };
        put().map_err(|e| StoreError::io(format!("cannot store object `{name}`"), e))
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let file = self.open_object(name)?;
        let mut bytes = vec![0; len_bytes];
        match file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(StoreError::corrupt(format!("object `{name}` ends before byte {:#x}", offset + len_bytes as u64)))
            }
            Err(e) => Err(StoreError::io(format!("cannot read object `{name}` at {offset:#x}"), e)),
        }
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let file = self.open_object(name)?;
        let metadata = file.metadata().map_err(|e| StoreError::io(format!("cannot read object `{name}`"), e))?;
        if metadata.is_dir() {
            let text = format!("`{name}` is a directory of objects");
            return Err(StoreError::new(crate::StoreErrorKind::NotFound, text));
        }
        let len = metadata.len();
        if len > limit_bytes {
            return Err(StoreError::corrupt(format!("object `{name}` has {len} bytes, the limit is {limit_bytes}")));
        }
        let len = usize::try_from(len).map_err(|_| StoreError::corrupt("object does not fit in memory"))?;
        self.get_range(name, 0, len)
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let mut found = Vec::new();
        let mut todo = vec![directory.to_owned()];
        while let Some(directory) = todo.pop() {
            let fail = |e| StoreError::io(format!("cannot list `{directory}`"), e);
            let entries = match std::fs::read_dir(self.path(&directory)) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(fail(e)),
            };
            for entry in entries {
                let entry = entry.map_err(fail)?;
                let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
                let name = format!("{directory}/{name}");
                let metadata = match entry.metadata() {
                    // Deleted while the directory was read.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    other => other.map_err(fail)?,
                };
                if metadata.is_dir() {
                    todo.push(name);
                } else {
                    found.push((name, metadata.len()));
                }
            }
        }
        Ok(found)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        match std::fs::remove_file(self.path(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io(format!("cannot delete object `{name}`"), e))
            }
            _ => Ok(()),
        }
    }

    fn make_durable(&self, names: &[String]) -> Result<(), StoreError> {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        let directories: BTreeSet<_> = paths.iter().filter_map(|path| path.parent()).collect();
        let sync = |directory: &Path| make_directory(directory).and_then(|()| sync_directory(directory));
        directories.into_iter().try_for_each(|directory| {
            sync(directory).map_err(|e| StoreError::io(format!("cannot sync `{}`", directory.display()), e))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_put_once_and_read_by_range() {
        let dir = tempfile::tempdir().unwrap();
        let objects = DirObjects::open(dir.path()).unwrap();
        assert!(objects.put_if_absent("packs/ab/x", b"hello world").unwrap());
        assert!(!objects.put_if_absent("packs/ab/x", b"other").unwrap());
        assert!(objects.put_if_absent("packs/ab/x", b"hello world").unwrap(), "the same bytes are as good as stored");
        assert_eq!(objects.get_range("packs/ab/x", 6, 5).unwrap(), b"world");
        assert_eq!(objects.get_range("packs/ab/x", 6, 6).unwrap_err().kind(), crate::StoreErrorKind::Corrupt);
        assert_eq!(objects.get("packs/ab/x", 5).unwrap_err().kind(), crate::StoreErrorKind::Corrupt);
        assert_eq!(objects.list("packs").unwrap(), [("packs/ab/x".to_owned(), 11)]);
        objects.put("packs/ab/x", b"new").unwrap();
        assert_eq!(objects.get("packs/ab/x", 99).unwrap(), b"new");
        objects.delete("packs/ab/x").unwrap();
        objects.delete("packs/ab/x").unwrap();
        assert_eq!(objects.get("packs/ab/x", 99).unwrap_err().kind(), crate::StoreErrorKind::NotFound);
    }

    #[test]
    fn what_a_dead_process_left_is_removed_on_open() {
        let dir = tempfile::tempdir().unwrap();
        drop(DirObjects::open(dir.path()).unwrap());
        let (dead, alive) =
            (dir.path().join("tmp/4294967295-1"), dir.path().join(format!("tmp/{}-1", std::process::id())));
        for path in [&dead, &alive] {
            File::create(path).unwrap();
        }
        drop(DirObjects::open(dir.path()).unwrap());
        assert!(!dead.exists() && alive.exists());
    }
}
