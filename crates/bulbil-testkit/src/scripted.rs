//! Objects whose reads are counted, delayed, refused or damaged as a test says.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulbil_store::{DirObjects, Objects, StoreError, StoreErrorKind};

/// A ranged read that reached the objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The object's name.
    pub name: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: usize,
}

impl Request {
    /// Whether it reads frames of a pack whose object has `pack_bytes` bytes, and not the footer at its end.
    #[must_use]
    pub fn reads_frames(&self, pack_bytes: u64) -> bool {
        self.name.starts_with("packs/") && self.offset + self.len_bytes as u64 != pack_bytes
    }
}

/// What a ranged read gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The bytes.
    Bytes,
    /// The bytes, one of them flipped.
    Flipped,
    /// An error of this kind.
    Fails(StoreErrorKind),
}

type Script = Box<dyn FnMut(&Request) -> Answer + Send>;

/// Objects in a directory, with a script for ranged reads of packs.
pub struct ScriptedObjects {
    below: DirObjects,
    remote: bool,
    delay: Mutex<Duration>,
    script: Mutex<Script>,
    requests: Mutex<Vec<Request>>,
    log: Option<PathBuf>,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

impl fmt::Debug for ScriptedObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedObjects").field("below", &self.below).finish_non_exhaustive()
    }
}

impl ScriptedObjects {
    /// Opens a directory of objects.
    #[must_use]
    pub fn open(directory: &Path, remote: bool) -> Arc<Self> {
        Arc::new(Self::new(directory, remote, None))
    }

    /// Opens a directory of objects; every ranged read of a pack is also a line in a file, which other processes share.
    #[must_use]
    pub fn logging_to(directory: &Path, remote: bool, log: &Path) -> Arc<Self> {
        Arc::new(Self::new(directory, remote, Some(log.to_owned())))
    }

    fn new(directory: &Path, remote: bool, log: Option<PathBuf>) -> Self {
        Self {
            below: DirObjects::open(directory).unwrap(),
            remote,
            delay: Mutex::new(Duration::ZERO),
            script: Mutex::new(Box::new(|_| Answer::Bytes)),
            requests: Mutex::default(),
            log,
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
        }
    }

    /// Makes each ranged read take this long.
    pub fn set_delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }

    /// Lets a function decide about each ranged read of a pack.
    pub fn set_script(&self, script: impl FnMut(&Request) -> Answer + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }

    /// Takes the ranged reads of packs since this was last called.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// The most ranged reads that were under way at the same time.
    pub fn most_running(&self) -> usize {
        self.most_running.load(Ordering::SeqCst)
    }

    fn record(&self, request: &Request) {
        if let Some(path) = &self.log {
            let line = format!("{} {} {}\n", request.name, request.offset, request.len_bytes);
            let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
            file.write_all(line.as_bytes()).unwrap();
        }
        self.requests.lock().unwrap().push(request.clone());
    }
}

impl Objects for ScriptedObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.below.put_if_absent(name, bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.below.put(name, bytes)
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        if !name.starts_with("packs/") {
            return self.below.get_range(name, offset, len_bytes);
        }
        let request = Request { name: name.to_owned(), offset, len_bytes };
        self.record(&request);
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(running, Ordering::SeqCst);
        let delay = *self.delay.lock().unwrap();
        std::thread::sleep(delay);
        let answer = (self.script.lock().unwrap())(&request);
        self.running.fetch_sub(1, Ordering::SeqCst);
        match answer {
            Answer::Bytes => self.below.get_range(name, offset, len_bytes),
            Answer::Fails(kind) => Err(StoreError::new(kind, "as the script says")),
            Answer::Flipped => {
                let mut bytes = self.below.get_range(name, offset, len_bytes)?;
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x40;
                Ok(bytes)
            }
        }
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.below.get(name, limit_bytes)
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        self.below.list(directory)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.below.delete(name)
    }

    fn make_durable(&self, names: &[String]) -> Result<(), StoreError> {
        self.below.make_durable(names)
    }

    fn is_remote(&self) -> bool {
        self.remote
    }
}
