//! A directory that forgets what was not synced.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use bulbil_volume::{StorageDirectory, StorageFile};

use crate::Rng;

/// The unit a disk writes whole: a page of data, a sector of the map.
fn atom_bytes(name: &str) -> usize {
    if name.starts_with("data") { 4096 } else { 512 }
}

/// Files in memory that live through crashes as a disk does: after
/// [`lose_power`](PowerLossDirectory::lose_power) each atomic unit holds what was synced or any of
/// the contents written since, unit by unit, in no order.
///
/// A fuse makes every operation fail from a chosen one on, so that the crash comes in the middle of
/// whatever the code under test was doing.
#[derive(Debug, Clone, Default)]
pub struct PowerLossDirectory {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, FileState>,
    /// Operations left before everything fails.
    fuse: Option<u64>,
    generation: u64,
}

#[derive(Debug)]
struct FileState {
    atom: usize,
    durable: BTreeMap<u64, Vec<u8>>,
    /// Versions of each unit since the last sync, the newest last.
    unsynced: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl FileState {
    fn unit(&self, number: u64) -> Vec<u8> {
        let newest = self.unsynced.get(&number).and_then(|versions| versions.last());
        newest.or_else(|| self.durable.get(&number)).cloned().unwrap_or_else(|| vec![0; self.atom])
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (number, within) = (at / self.atom as u64, (at % self.atom as u64) as usize);
            let len = (self.atom - within).min(bytes.len() - done);
            let mut unit = self.unit(number);
            unit[within..within + len].copy_from_slice(&bytes[done..done + len]);
            self.unsynced.entry(number).or_default().push(unit);
            done += len;
        }
    }

    fn sync(&mut self) {
        for (number, versions) in std::mem::take(&mut self.unsynced) {
            self.durable.insert(number, versions.into_iter().next_back().unwrap());
        }
    }

    fn crash(&mut self, rng: &mut Rng) {
        for (number, mut versions) in std::mem::take(&mut self.unsynced) {
            let survivor = rng.below(versions.len() as u64 + 1) as usize;
            if survivor < versions.len() {
                self.durable.insert(number, versions.swap_remove(survivor));
            }
        }
    }
}

impl PowerLossDirectory {
    /// Lets `operations` more operations succeed, then fails every one until the next crash.
    pub fn set_fuse(&self, operations: u64) {
        self.state.lock().unwrap().fuse = Some(operations);
    }

    /// Whether operations fail now.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state.lock().unwrap().fuse == Some(0)
    }

    /// The machine loses power: what was not synced is there, or not, unit by unit.
    pub fn lose_power(&self, rng: &mut Rng) {
        let mut state = self.state.lock().unwrap();
        state.files.values_mut().for_each(|file| file.crash(rng));
        state.fuse = None;
        state.generation += 1;
    }

    /// The process is killed: the host keeps what was written.
    pub fn kill_process(&self) {
        let mut state = self.state.lock().unwrap();
        state.fuse = None;
        state.generation += 1;
    }

    /// Operations of files opened before a crash reach nothing: their process is gone.
    fn with<R>(&self, generation: u64, work: impl FnOnce(&mut State) -> R) -> io::Result<R> {
        let mut state = self.state.lock().unwrap();
        if state.generation != generation || state.fuse == Some(0) {
            return Err(io::Error::other("the machine is off"));
        }
        if let Some(left) = &mut state.fuse {
            *left -= 1;
        }
        Ok(work(&mut state))
    }

    fn file(&self, name: &str, generation: u64) -> Arc<dyn StorageFile> {
        Arc::new(PowerLossFile { directory: self.clone(), name: name.to_owned(), generation })
    }
}

impl StorageDirectory for PowerLossDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn StorageFile>>> {
        let state = self.state.lock().unwrap();
        let generation = state.generation;
        let exists = state.files.contains_key(name);
        drop(state);
        Ok(exists.then(|| self.file(name, generation)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let generation = self.state.lock().unwrap().generation;
        self.with(generation, |state| {
            let empty = FileState { atom: atom_bytes(name), durable: BTreeMap::new(), unsynced: BTreeMap::new() };
            state.files.insert(name.to_owned(), empty);
        })?;
        Ok(self.file(name, generation))
    }
}

#[derive(Debug)]
struct PowerLossFile {
    directory: PowerLossDirectory,
    name: String,
    generation: u64,
}

impl PowerLossFile {
    fn with<R>(&self, work: impl FnOnce(&mut FileState) -> R) -> io::Result<R> {
        self.directory.with(self.generation, |state| work(state.files.get_mut(&self.name).unwrap()))
    }
}

impl StorageFile for PowerLossFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|file| {
            let mut done = 0;
            while done < buf.len() {
                let at = offset + done as u64;
                let within = (at % file.atom as u64) as usize;
                let len = (file.atom - within).min(buf.len() - done);
                buf[done..done + len].copy_from_slice(&file.unit(at / file.atom as u64)[within..within + len]);
                done += len;
            }
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with(|file| file.write(offset, buf))
    }

    fn punch_hole(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.with(|file| file.write(offset, &vec![0; len_bytes as usize]))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(FileState::sync)
    }
}
