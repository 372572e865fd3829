//! A file system in memory that keeps apart what is visible and what is durable.

use std::collections::BTreeMap;

use crate::rng::Rng;

pub(super) const UNIT: u64 = 4096;
pub(super) const ROOT: u64 = 1;

/// Something of which a crash leaves what was synced, or any version since.
#[derive(Debug, Clone)]
struct Cell<T> {
    durable: T,
    /// Versions since the last sync, the newest last.
    newer: Vec<T>,
}

impl<T: Clone> Cell<T> {
    fn new(durable: T) -> Self {
        Self { durable, newer: Vec::new() }
    }

    fn now(&self) -> &T {
        self.newer.last().unwrap_or(&self.durable)
    }

    fn set(&mut self, value: T) {
        self.newer.push(value);
    }

    fn sync(&mut self) {
        if let Some(newest) = self.newer.pop() {
            self.durable = newest;
            self.newer.clear();
        }
    }

    fn crash(&mut self, rng: &mut Rng) {
        let survivor = rng.below(self.newer.len() as u64 + 1) as usize;
        if survivor < self.newer.len() {
            self.durable = self.newer.swap_remove(survivor);
        }
        self.newer.clear();
    }
}

#[derive(Debug, Clone)]
pub(super) enum Inode {
    File(FileData),
    Directory(Entries),
}

/// The data of a file: each unit, and the size, survive a crash for themselves.
#[derive(Debug, Clone)]
pub(super) struct FileData {
    size: Cell<u64>,
    /// `None` is a hole.
    units: BTreeMap<u64, Cell<Option<Vec<u8>>>>,
}

impl FileData {
    fn new() -> Self {
        Self { size: Cell::new(0), units: BTreeMap::new() }
    }

    pub(super) fn size_bytes(&self) -> u64 {
        *self.size.now()
    }

    pub(super) fn stored_bytes(&self) -> u64 {
        self.units.values().filter(|unit| unit.now().is_some()).count() as u64 * UNIT
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let len = (len as u64).min(self.size_bytes().saturating_sub(offset)) as usize;
        let mut bytes = vec![0; len];
        for (unit, within, range) in pieces(offset, len) {
            if let Some(Some(data)) = self.units.get(&unit).map(Cell::now) {
                let count = range.len();
                bytes[range].copy_from_slice(&data[within..within + count]);
            }
        }
        bytes
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (unit, within, range) in pieces(offset, bytes.len()) {
            let cell = self.units.entry(unit).or_insert_with(|| Cell::new(None));
            let mut data = cell.now().clone().unwrap_or_else(|| vec![0; UNIT as usize]);
            data[within..within + range.len()].copy_from_slice(&bytes[range]);
            cell.set(Some(data));
        }
        let end = offset + bytes.len() as u64;
        if end > self.size_bytes() {
            self.size.set(end);
        }
    }

    /// Makes a range read as zeroes.
    pub(super) fn clear(&mut self, offset: u64, len_bytes: u64) {
        let end = (offset + len_bytes).min(self.size_bytes().next_multiple_of(UNIT));
        let touched: Vec<_> = self.units.range(offset / UNIT..).map(|(unit, _)| *unit).collect();
        for unit in touched.into_iter().take_while(|unit| unit * UNIT < end) {
            let cell = self.units.get_mut(&unit).expect("listed above");
            let (from, to) = (offset.max(unit * UNIT), end.min((unit + 1) * UNIT));
            let Some(mut data) = cell.now().clone() else { continue };
            data[(from - unit * UNIT) as usize..(to - unit * UNIT) as usize].fill(0);
            cell.set((to - from < UNIT).then_some(data));
        }
    }

    pub(super) fn set_size(&mut self, size_bytes: u64) {
        if size_bytes < self.size_bytes() {
            self.clear(size_bytes, u64::MAX / 2 - size_bytes);
        }
        self.size.set(size_bytes);
    }

    /// The next data (or hole) at or after an offset.
    pub(super) fn seek(&self, offset: u64, wants_data: bool) -> Option<u64> {
        let size_bytes = self.size_bytes();
        let is_data = |unit: u64| matches!(self.units.get(&unit).map(Cell::now), Some(Some(_)));
        let mut at = offset;
        while at < size_bytes {
            if is_data(at / UNIT) == wants_data {
                return Some(at);
            }
            at = (at / UNIT + 1) * UNIT;
        }
        (!wants_data && offset < size_bytes).then_some(size_bytes)
    }

    fn sync(&mut self) {
        self.size.sync();
        self.units.values_mut().for_each(Cell::sync);
    }

    fn crash(&mut self, rng: &mut Rng) {
        self.size.crash(rng);
        self.units.values_mut().for_each(|unit| unit.crash(rng));
        // What lies past the end is never seen again, also when the file grows.
        let size_bytes = self.size_bytes();
        self.units.retain(|unit, _| unit * UNIT < size_bytes);
        if let Some(Some(last)) = self.units.get_mut(&(size_bytes / UNIT)).map(|unit| &mut unit.durable) {
            last[(size_bytes % UNIT) as usize..].fill(0);
        }
    }
}

/// Cuts a range at the borders of units: (unit, offset in it, range of the buffer).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = (at % UNIT) as usize;
        let count = (UNIT as usize - within).min(len - done);
        done += count;
        (count > 0).then_some((at / UNIT, within, done - count..done))
    })
}

/// The names in a directory: each survives a crash for itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Entries(BTreeMap<String, Cell<Option<u64>>>);

impl Entries {
    pub(super) fn get(&self, name: &str) -> Option<u64> {
        *self.0.get(name)?.now()
    }

    fn set(&mut self, name: &str, inode: Option<u64>) {
        self.0.entry(name.to_owned()).or_insert_with(|| Cell::new(None)).set(inode);
    }

    pub(super) fn list(&self) -> Vec<(String, u64)> {
        self.0.iter().filter_map(|(name, cell)| Some((name.clone(), (*cell.now())?))).collect()
    }
}

/// All files and directories.
#[derive(Debug)]
pub(super) struct Disk {
    inodes: BTreeMap<u64, Inode>,
    next: u64,
}

impl Disk {
    pub(super) fn new() -> Self {
        Self { inodes: [(ROOT, Inode::Directory(Entries::default()))].into(), next: ROOT + 1 }
    }

    pub(super) fn inode(&self, number: u64) -> Option<&Inode> {
        self.inodes.get(&number)
    }

    pub(super) fn file(&mut self, number: u64) -> Option<&mut FileData> {
        match self.inodes.get_mut(&number)? {
            Inode::File(data) => Some(data),
            Inode::Directory(_) => None,
        }
    }

    pub(super) fn entries(&self, directory: u64) -> Option<&Entries> {
        match self.inodes.get(&directory)? {
            Inode::Directory(entries) => Some(entries),
            Inode::File(_) => None,
        }
    }

    /// Gives a name in a directory to an inode, or to none.
    pub(super) fn set_entry(&mut self, directory: u64, name: &str, inode: Option<u64>) {
        if let Some(Inode::Directory(entries)) = self.inodes.get_mut(&directory) {
            entries.set(name, inode);
        }
    }

    pub(super) fn make(&mut self, directory: u64, name: &str, is_directory: bool) -> u64 {
        let number = self.next;
        self.next += 1;
        let inode = if is_directory { Inode::Directory(Entries::default()) } else { Inode::File(FileData::new()) };
        self.inodes.insert(number, inode);
        self.set_entry(directory, name, Some(number));
        number
    }

    /// Makes the data of a file durable, or the names in a directory.
    pub(super) fn sync(&mut self, number: u64) {
        match self.inodes.get_mut(&number) {
            Some(Inode::File(data)) => data.sync(),
            Some(Inode::Directory(entries)) => entries.0.values_mut().for_each(Cell::sync),
            None => {}
        }
    }

    /// What was not synced survives or not, each name and each unit for itself.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        for inode in self.inodes.values_mut() {
            match inode {
                Inode::File(data) => data.crash(rng),
                Inode::Directory(entries) => entries.0.values_mut().for_each(|name| name.crash(rng)),
            }
        }
    }
}
