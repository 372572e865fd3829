//! Disks, files and a storage that fails, for tests of whole stores.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bulbil_store::{Digest, DirObjects, Objects, Store, StoreError, StoreErrorKind};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

/// Blocks that compress, each another one.
pub(crate) fn text(first: u32, blocks: u32) -> Vec<u8> {
    let block = |number| format!("{number} is the number of this block of a disk\n").into_bytes();
    (first..first + blocks).flat_map(|number| block(number).into_iter().cycle().take(BLOCK_LEN)).collect()
}

/// Blocks that do not compress (xorshift64).
pub(crate) fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(blocks * BLOCK_LEN).collect()
}

/// Every file below a directory, by its path in it.
pub(crate) fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Puts other bytes into a file.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) {
    std::fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Reads a disk by its manifest, frame after frame.
pub(crate) fn try_read_disk(store: &Store, digest: &Digest) -> Result<Vec<u8>, StoreError> {
    let manifest = store.manifest(digest)?;
    let mut bytes = vec![0; manifest.size_bytes().next_multiple_of(BLOCK_BYTES) as usize];
    for extent in manifest.extents() {
        for index in 0..extent.blocks {
            let at = (extent.block_in_pack + index) as usize;
            let frame = store.read_frame(&manifest.packs()[extent.pack as usize], (at / 32) as u32)?;
            let block = &frame[at % 32 * BLOCK_LEN..][..BLOCK_LEN];
            bytes[(extent.first_block + u64::from(index)) as usize * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(block);
        }
    }
    bytes.truncate(manifest.size_bytes() as usize);
    Ok(bytes)
}

pub(crate) fn read_disk(store: &Store, digest: &Digest) -> Vec<u8> {
    try_read_disk(store, digest).unwrap()
}

/// Storage that stops after some operations: the one that is cut fails with or without its effect, all
/// later ones without.
#[derive(Debug)]
pub(crate) struct CutOff {
    inner: DirObjects,
    lost_answer: bool,
    left: Mutex<Option<u32>>,
    cut: Mutex<bool>,
}

impl CutOff {
    pub(crate) fn new(directory: &Path, lost_answer: bool) -> Self {
        Self {
            inner: DirObjects::open(directory).unwrap(),
            lost_answer,
            left: Mutex::new(None),
            cut: Mutex::new(false),
        }
    }

    pub(crate) fn cut_after(&self, operations: u32) {
        *self.left.lock().unwrap() = Some(operations);
    }

    pub(crate) fn was_cut(&self) -> bool {
        *self.cut.lock().unwrap()
    }

    fn run<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut left = self.left.lock().unwrap();
        match &mut *left {
            None => return work(),
            Some(0) => {}
            Some(left) => {
                *left -= 1;
                return work();
            }
        }
        let first = !std::mem::replace(&mut *self.cut.lock().unwrap(), true);
        if first && self.lost_answer {
            drop(work());
        }
        Err(failure())
    }
}

/// An error of the kind `Io`, which only this crate can make.
fn failure() -> StoreError {
    let missing = tempfile::tempdir().unwrap();
    let objects = DirObjects::open(missing.path()).unwrap();
    std::fs::remove_dir_all(missing.path()).unwrap();
    std::fs::File::create(missing.path()).unwrap();
    let error = objects.put("a", b"").unwrap_err();
    std::fs::remove_file(missing.path()).unwrap();
    assert!(error.kind() == StoreErrorKind::Io, "{error}");
    error
}

impl Objects for CutOff {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.run(|| self.inner.put_if_absent(name, bytes))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.run(|| self.inner.put(name, bytes))
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        self.run(|| self.inner.get_range(name, offset, len_bytes))
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.run(|| self.inner.get(name, limit_bytes))
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        self.run(|| self.inner.list(directory))
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.run(|| self.inner.delete(name))
    }
}
