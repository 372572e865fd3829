//! A directory that forgets what was not synced.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use bulbil_volume::{StorageDirectory, StorageFile};

use crate::Rng;

/// The unit a disk writes whole: a page of data, a sector of the map.
fn atom_bytes(path: &str) -> usize {
    if path.rsplit('/').next().is_some_and(|name| name.starts_with("data")) { 4096 } else { 512 }
}

/// Files in memory that live through crashes as a disk does: after
/// [`lose_power`](PowerLossDirectory::lose_power) each atomic unit holds what was synced or any of
/// the contents written since, unit by unit, in no order.
///
/// A fuse makes every operation fail from a chosen one on, so that the crash comes in the middle of
/// whatever the code under test was doing.
///
/// Small files that are replaced hold the old or the new content after a crash, until the replacement
/// has returned; what is removed may come back until the removal has. Files may have several names; of
/// new ones any may be missing after a crash, until the call that makes them has returned.
#[derive(Debug, Clone, Default)]
pub struct PowerLossDirectory {
    state: Arc<Mutex<State>>,
    /// Empty, or where this directory is below the one with the machine's switch, with a `/` at its end.
    prefix: String,
}

/// A small file: the content on disk, and those that may be there instead, the newest last.
type Replaced = (Option<Vec<u8>>, Vec<Vec<u8>>);

/// What goes wrong with files, each once in so many operations on average; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirectoryFaults {
    /// A write, hole or new file finds no space and changes nothing.
    pub no_space: u64,
    /// A write fails, and some of its units are written.
    pub failed_write: u64,
    /// A read fails.
    pub failed_read: u64,
    /// A sync fails: each unit is durable or not, no later sync makes it so, and reads do not show it.
    pub failed_sync: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Names of files, by path.
    names: BTreeMap<String, u64>,
    /// The files themselves, by number.
    files: BTreeMap<u64, FileState>,
    /// Names that were removed, for as long as a loss of power may bring them back.
    removed: BTreeMap<String, u64>,
    /// Names that a loss of power may take away.
    unsynced_names: BTreeSet<String>,
    /// Small files by path.
    replaced: BTreeMap<String, Replaced>,
    /// Operations left before everything fails.
    fuse: Option<u64>,
    generation: u64,
    /// Times that power was lost.
    boots: u64,
    full: bool,
    no_links: bool,
    faults: Option<(DirectoryFaults, Rng)>,
    sync_failed: bool,
    done: BTreeMap<&'static str, u64>,
}

impl State {
    /// Whether a fault of this rate happens now.
    fn hits(&mut self, kind: &'static str, rate: impl Fn(&DirectoryFaults) -> u64) -> bool {
        let Some((faults, rng)) = &mut self.faults else { return false };
        let rate = rate(faults);
        let hit = rate > 0 && rng.one_in(rate);
        if hit {
            *self.done.entry(kind).or_default() += 1;
        }
        hit
    }

    fn no_space(&mut self) -> io::Result<()> {
        let full = self.hits("files: no space", |faults| faults.no_space);
        if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

fn failed(what: &str) -> io::Error {
    io::Error::other(format!("the {what} was made to fail"))
}

#[derive(Debug)]
struct FileState {
    atom: usize,
    durable: BTreeMap<u64, Vec<u8>>,
    /// Units that a sync has failed to make durable, as reads show them.
    lost: BTreeMap<u64, Vec<u8>>,
    /// Versions of each unit since the last sync, the newest last.
    unsynced: BTreeMap<u64, Vec<Vec<u8>>>,
}

impl State {
    /// How many names there are for the file at a path.
    fn links(&self, path: &str) -> Option<u64> {
        let file = self.names.get(path)?;
        Some(self.names.values().filter(|other| *other == file).count() as u64)
    }

    /// Makes an empty file with a name, unless there is one already and it may stay.
    fn name_new_file(&mut self, path: &str, replace: bool) {
        if replace || !self.names.contains_key(path) {
            let number = self.files.keys().next_back().map_or(0, |last| last + 1);
            self.files.insert(number, FileState::new(path));
            self.names.insert(path.to_owned(), number);
        }
    }

    fn sync_name(&mut self, path: &str) {
        self.unsynced_names.remove(path);
        if let Some((durable, newer)) = self.replaced.get_mut(path) {
            *durable = newer.pop().or(durable.take());
            newer.clear();
        }
    }
}

impl FileState {
    fn new(path: &str) -> Self {
        let (durable, lost, unsynced) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { atom: atom_bytes(path), durable, lost, unsynced }
    }

    fn unit(&self, number: u64) -> Vec<u8> {
        let newest = self.unsynced.get(&number).and_then(|versions| versions.last());
        newest
            .or_else(|| self.lost.get(&number))
            .or_else(|| self.durable.get(&number))
            .cloned()
            .unwrap_or_else(|| vec![0; self.atom])
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
            self.lost.remove(&number);
            self.durable.insert(number, versions.into_iter().next_back().unwrap());
        }
    }

    fn fail_sync(&mut self, rng: &mut Rng) {
        for number in self.unsynced.keys().copied().collect::<Vec<_>>() {
            self.lost.insert(number, self.unit(number));
        }
        self.settle(rng);
    }

    fn crash(&mut self, rng: &mut Rng) {
        self.lost.clear();
        self.settle(rng);
    }

    /// Of each unit any version since the last sync becomes the durable one.
    fn settle(&mut self, rng: &mut Rng) {
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

    /// Says whether there is no space for small files any more.
    pub fn set_full(&self, full: bool) {
        self.state.lock().unwrap().full = full;
    }

    /// Says whether files can have one name only.
    pub fn set_without_links(&self, without: bool) {
        self.state.lock().unwrap().no_links = without;
    }

    /// Makes operations fail by chance, from a seed, from now on.
    pub fn set_faults(&self, faults: DirectoryFaults, seed: u64) {
        self.state.lock().unwrap().faults = Some((faults, Rng::new(seed)));
    }

    /// Lets nothing fail by chance any more.
    pub fn clear_faults(&self) {
        self.state.lock().unwrap().faults = None;
    }

    /// What failed by chance, by kind.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().unwrap().done.clone()
    }

    /// Whether a sync has failed since the last loss of power: only a restart of the machine shows what is there.
    #[must_use]
    pub fn sync_has_failed(&self) -> bool {
        self.state.lock().unwrap().sync_failed
    }

    /// Whether operations fail now.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state.lock().unwrap().fuse == Some(0)
    }

    /// The machine loses power: what was not synced is there, or not, unit by unit.
    pub fn lose_power(&self, rng: &mut Rng) {
        let mut state = self.state.lock().unwrap();
        for (path, file) in std::mem::take(&mut state.removed) {
            if rng.one_in(2) {
                state.names.entry(path).or_insert(file);
            }
        }
        for path in std::mem::take(&mut state.unsynced_names) {
            if rng.one_in(2) {
                state.names.remove(&path);
            }
        }
        state.files.values_mut().for_each(|file| file.crash(rng));
        for (durable, newer) in state.replaced.values_mut() {
            let survivor = rng.below(newer.len() as u64 + 1) as usize;
            if survivor < newer.len() {
                *durable = Some(newer.swap_remove(survivor));
            }
            newer.clear();
        }
        state.fuse = None;
        state.sync_failed = false;
        state.generation += 1;
        state.boots += 1;
    }

    /// The process is killed: the host keeps what was written.
    pub fn kill_process(&self) {
        let mut state = self.state.lock().unwrap();
        state.fuse = None;
        state.generation += 1;
        state.removed.clear();
    }

    /// Operations left of those that [`set_fuse`](Self::set_fuse) allowed; `None` when all are.
    #[must_use]
    pub fn fuse_left(&self) -> Option<u64> {
        self.state.lock().unwrap().fuse
    }

    /// The paths of all files.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state.names.keys().chain(state.replaced.keys()).cloned().collect()
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

    /// One operation of a process that runs now.
    fn now<R>(&self, work: impl FnOnce(&mut State) -> R) -> io::Result<R> {
        let generation = self.state.lock().unwrap().generation;
        self.with(generation, work)
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn file(&self, path: String) -> Arc<dyn StorageFile> {
        let generation = self.state.lock().unwrap().generation;
        Arc::new(PowerLossFile { directory: self.clone(), path, generation })
    }
}

impl StorageDirectory for PowerLossDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn StorageFile>>> {
        let path = self.path(name);
        let exists = self.state.lock().unwrap().names.contains_key(&path);
        Ok(exists.then(|| self.file(path)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let path = self.path(name);
        self.now(|state| {
            state.no_space()?;
            state.removed.remove(&path);
            state.name_new_file(&path, false);
            Ok::<_, io::Error>(())
        })??;
        Ok(self.file(path))
    }

    fn create_volatile(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let path = self.path(name);
        self.now(|state| {
            state.no_space()?;
            state.removed.remove(&path);
            state.name_new_file(&path, true);
            state.unsynced_names.insert(path.clone());
            Ok::<_, io::Error>(())
        })??;
        Ok(self.file(path))
    }

    fn boot_id(&self) -> io::Result<String> {
        Ok(format!("boot {}", self.state.lock().unwrap().boots))
    }

    fn subdirectory(&self, name: &str) -> Arc<dyn StorageDirectory> {
        Arc::new(Self { state: Arc::clone(&self.state), prefix: format!("{}/", self.path(name)) })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let paths = self.paths();
        let mut names: Vec<_> = paths
            .iter()
            .filter_map(|path| path.strip_prefix(&self.prefix))
            .map(|rest| rest.split('/').next().unwrap().to_owned())
            .collect();
        names.dedup();
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let (path, below) = (self.path(name), format!("{}/", self.path(name)));
        let paths = self.paths();
        for path in paths.iter().filter(|found| **found == path || found.starts_with(&below)) {
            self.now(|state| {
                state.unsynced_names.remove(path);
                if let Some(file) = state.names.remove(path) {
                    state.removed.insert(path.clone(), file);
                }
            })?;
        }
        self.now(|state| state.removed.retain(|found, _| *found != path && !found.starts_with(&below)))
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let state = self.state.lock().unwrap();
        let found = state.replaced.get(&self.path(name));
        Ok(found.and_then(|(durable, newer)| newer.last().or(durable.as_ref()).cloned()))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(name);
        // The temporary file; its new name; the sync of the directory.
        self.now(|state| if state.full { Err(io::ErrorKind::StorageFull.into()) } else { state.no_space() })??;
        self.now(|state| state.replaced.entry(path.clone()).or_default().1.push(bytes.to_vec()))?;
        self.now(|state| {
            let (durable, newer) = state.replaced.get_mut(&path).unwrap();
            *durable = newer.pop();
            newer.clear();
        })
    }

    fn links(&self, name: &str) -> io::Result<Option<u64>> {
        Ok(self.state.lock().unwrap().links(&self.path(name)))
    }

    fn link_sibling(&self, sibling: &str, files: &[String], name: &str, bytes: &[u8]) -> io::Result<()> {
        let above = self.prefix.trim_end_matches('/').rsplit_once('/').map_or("", |(above, _)| above);
        let to = |name: &str| {
            if above.is_empty() { format!("{sibling}/{name}") } else { format!("{above}/{sibling}/{name}") }
        };
        if self.now(|state| state.no_links)? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        for name in files {
            self.now(|state| {
                let file = state.names[&self.path(name)];
                state.names.insert(to(name), file);
                state.unsynced_names.insert(to(name));
            })?;
        }
        self.now(|state| state.replaced.entry(to(name)).or_default().1.push(bytes.to_vec()))?;
        self.now(|state| {
            for name in files {
                state.sync_name(&to(name));
            }
            state.sync_name(&to(name));
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.now(|state| {
            let paths: BTreeSet<String> = state.replaced.keys().chain(&state.unsynced_names).cloned().collect();
            for path in paths {
                if path.strip_prefix(&self.prefix).is_some_and(|name| !name.contains('/')) {
                    state.sync_name(&path);
                }
            }
        })
    }
}

#[derive(Debug)]
struct PowerLossFile {
    directory: PowerLossDirectory,
    path: String,
    generation: u64,
}

impl PowerLossFile {
    fn with<R>(&self, work: impl FnOnce(&mut FileState) -> R) -> io::Result<R> {
        self.checked(|_| Ok(()), work)
    }

    /// Does something unless `check` fails.
    fn checked<R>(
        &self,
        check: impl FnOnce(&mut State) -> io::Result<()>,
        work: impl FnOnce(&mut FileState) -> R,
    ) -> io::Result<R> {
        self.directory.with(self.generation, |state| {
            check(state)?;
            let file = state.names.get(&self.path).copied();
            let file = file.and_then(|file| state.files.get_mut(&file));
            file.map(work).ok_or_else(|| io::Error::other(format!("`{}` was removed", self.path)))
        })?
    }

    /// Writes, or fails with a part of it written.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let fails = self.directory.with(self.generation, |state| {
            state.no_space()?;
            Ok::<_, io::Error>(state.hits("files: failed write", |faults| faults.failed_write))
        })??;
        if !fails {
            return self.with(|file| file.write(offset, bytes));
        }
        // A prefix of whole units.
        let whole = bytes.len() / 2 / 4096 * 4096;
        self.with(|file| file.write(offset, &bytes[..whole]))?;
        Err(failed("write"))
    }
}

impl StorageFile for PowerLossFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let check = |state: &mut State| match state.hits("files: failed read", |faults| faults.failed_read) {
            true => Err(failed("read")),
            false => Ok(()),
        };
        self.checked(check, |file| {
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
        self.write(buf, offset)
    }

    fn punch_hole(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        self.write(&vec![0; len_bytes as usize], offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.directory.with(self.generation, |state| {
            let fails = state.hits("files: failed sync", |faults| faults.failed_sync);
            let number = state.names.get(&self.path).copied();
            let Some(file) = number.and_then(|number| state.files.get_mut(&number)) else {
                return Err(io::Error::other(format!("`{}` was removed", self.path)));
            };
            match &mut state.faults {
                Some((_, rng)) if fails => file.fail_sync(rng),
                _ => file.sync(),
            }
            state.sync_failed |= fails;
            if fails { Err(failed("sync")) } else { Ok(()) }
        })?
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.with(|file| {
            let first = offset / file.atom as u64;
            let written = [file.durable.range(first..).next(), file.lost.range(first..).next()];
            let next = written.map(|found| found.map(|(unit, _)| *unit));
            let unsynced = file.unsynced.range(first..).next().map(|(unit, _)| *unit);
            next.into_iter().chain([unsynced]).flatten().min().map(|unit| offset.max(unit * file.atom as u64))
        })
    }
}
