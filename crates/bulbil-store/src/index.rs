//! The deduplication index: from a block's hash to where it is stored.
//!
//! It is the union of all pack footers, so it can always be rebuilt from them, and only imports
//! need it. It lives in two files beside the packs it describes:
//!
//! ```text
//! blocks   page 0: magic "BULBINDX" │ version u32 │ log2 of pages u32 │ entries u64 │ clean u32
//!          page i: entries u32 │ … │ 255 × (key u64 │ pack u32 │ block u16 │ 0 u16), 4 KiB
//! packs    n × (pack id 16 │ object bytes u64): pack number = position
//! ```
//! The key is the first half of the hash and its upper bits choose the page; a hit is believed only
//! after the full hash was compared with the pack's footer. The file doubles when a page is full.
//! While an import runs the file is marked as not clean; one that is found so is rebuilt.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::matching::Location;
use crate::pack::{BlockHash, PackId};

const MAGIC: &[u8; 8] = b"BULBINDX";
const VERSION: u32 = 1;
const PAGE_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 16;
const ENTRIES_PER_PAGE: usize = PAGE_BYTES / ENTRY_BYTES - 1;
const PACK_RECORD_BYTES: usize = 24;
const MIN_PAGE_BITS: u32 = 6;
const MAX_PAGE_BITS: u32 = 32;

/// Pages kept in memory while the index is open, 64 MiB, the whole index of 12 GiB of blocks: an
/// import looks up and adds every new block, each on a page of its own.
const PAGES_KEPT: usize = 16 << 10;

/// A pack as the index numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexedPack {
    pub(crate) id: PackId,
    pub(crate) len_bytes: u64,
}

/// The open index; the caller sees to it that there is one per store at a time.
#[derive(Debug)]
pub(crate) struct BlockIndex {
    directory: PathBuf,
    file: File,
    page_bits: u32,
    entries: u64,
    clean: bool,
    packs: Vec<IndexedPack>,
    /// Numbers of packs that are gone or must not be referred to; never stored.
    skipped: HashSet<u32>,
    kept: HashMap<u64, KeptPage>,
}

type Page = [u8; PAGE_BYTES];

/// A page in memory. Changed ones are written when room is needed and by [`BlockIndex::end_changes`];
/// until then the file is marked as not clean, so that losing them only costs a rebuild.
#[derive(Debug)]
struct KeptPage {
    bytes: Box<Page>,
    changed: bool,
}

impl BlockIndex {
    /// Opens the index, or makes an empty one when it is missing, damaged or not clean.
    ///
    /// The caller then adds every pack that [`packs`](Self::packs) does not list.
    pub(crate) fn open(directory: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(directory)
            .map_err(|e| StoreError::io(format!("cannot create `{}`", directory.display()), e))?;
        match Self::open_clean(directory) {
            Some(index) => Ok(index),
            None => Self::create(directory, MIN_PAGE_BITS, Vec::new()),
        }
    }

    fn open_clean(directory: &Path) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(directory.join("blocks")).ok()?;
        let mut header = [0; 28];
        file.read_exact_at(&mut header, 0).ok()?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let page_bits = u32_at(12);
        let expected_len = (1_u64 << page_bits.min(MAX_PAGE_BITS)) + 1;
        let sound = &header[..8] == MAGIC
            && u32_at(8) == VERSION
            && u32_at(24) == 1
            && (MIN_PAGE_BITS..=MAX_PAGE_BITS).contains(&page_bits)
            && file.metadata().ok()?.len() == expected_len * PAGE_BYTES as u64;
        if !sound {
            return None;
        }
        let packs = std::fs::read(directory.join("packs")).ok()?;
        let packs = packs.chunks_exact(PACK_RECORD_BYTES).map(|record| IndexedPack {
            id: PackId(record[..16].try_into().expect("16 bytes")),
            len_bytes: u64::from_le_bytes(record[16..].try_into().expect("8 bytes")),
        });
        let entries = u64::from_le_bytes(header[16..24].try_into().expect("8 bytes"));
        let (directory, packs) = (directory.to_owned(), packs.collect());
        let (skipped, kept) = (HashSet::new(), HashMap::new());
        Some(Self { directory, file, page_bits, entries, clean: true, packs, skipped, kept })
    }

    fn create(directory: &Path, page_bits: u32, packs: Vec<IndexedPack>) -> Result<Self, StoreError> {
        let path = directory.join("blocks.new");
        let fail = |e| StoreError::io(format!("cannot create the index `{}`", path.display()), e);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).map_err(fail)?;
        file.set_len(((1 << page_bits) + 1) * PAGE_BYTES as u64).map_err(fail)?;
        let (directory, skipped, kept) = (directory.to_owned(), HashSet::new(), HashMap::new());
        let index = Self { directory, file, page_bits, entries: 0, clean: false, packs, skipped, kept };
        index.write_header()?;
        std::fs::rename(&path, index.directory.join("blocks")).map_err(fail)?;
        Ok(index)
    }

    /// Throws everything away, for a rebuild.
    pub(crate) fn clear(&mut self) -> Result<(), StoreError> {
        *self = Self::create(&self.directory, MIN_PAGE_BITS, Vec::new())?;
        Ok(())
    }

    pub(crate) fn packs(&self) -> &[IndexedPack] {
        &self.packs
    }

    /// Numbers a pack whose blocks will be inserted.
    pub(crate) fn add_pack(&mut self, pack: IndexedPack) -> Result<u32, StoreError> {
        let number =
            u32::try_from(self.packs.len()).map_err(|_| StoreError::corrupt("too many packs for the index"))?;
        self.packs.push(pack);
        Ok(number)
    }

    /// Notes the size of a pack that was numbered before it was written.
    pub(crate) fn set_pack_len(&mut self, number: u32, len_bytes: u64) {
        if let Some(pack) = self.packs.get_mut(number as usize) {
            pack.len_bytes = len_bytes;
        }
    }

    /// Numbers the packs, by id.
    pub(crate) fn numbers(&self) -> HashMap<PackId, u32> {
        self.packs.iter().zip(0..).map(|(pack, number)| (pack.id, number)).collect()
    }

    /// Says that entries are about to change; durable when this returns.
    pub(crate) fn begin_changes(&mut self) -> Result<(), StoreError> {
        if self.clean {
            self.clean = false;
            self.write_header()?;
            self.sync()?;
        }
        Ok(())
    }

    /// Says that all changes are complete; durable when this returns.
    pub(crate) fn end_changes(&mut self) -> Result<(), StoreError> {
        self.write_changed()?;
        self.sync()?;
        let records: Vec<u8> =
            self.packs.iter().flat_map(|pack| [&pack.id.0[..], &pack.len_bytes.to_le_bytes()].concat()).collect();
        let path = self.directory.join("packs.new");
        let write = || {
            let file = File::create(&path)?;
            file.write_all_at(&records, 0)?;
            file.sync_all()?;
            std::fs::rename(&path, self.directory.join("packs"))?;
            File::open(&self.directory)?.sync_all()
        };
        write().map_err(|e| StoreError::io("cannot write the index's list of packs", e))?;
        self.clean = true;
        self.write_header()?;
        self.sync()
    }

    /// The places where a block with this hash may be stored: usually none or one.
    pub(crate) fn candidates(&mut self, hash: &BlockHash) -> Result<Vec<Location>, StoreError> {
        let page = self.page(self.page_of(hash))?;
        let mut found: Vec<_> = entries(&page.bytes).filter(|e| e[..8] == hash[..8]).map(location).collect();
        found.retain(|at| !self.skipped.contains(&at.pack));
        Ok(found)
    }

    /// Passes over these packs from now on: [`candidates`](Self::candidates) does not name them.
    pub(crate) fn skip_packs(&mut self, numbers: HashSet<u32>) {
        self.skipped = numbers;
    }

    /// Whether a pack is passed over.
    pub(crate) fn is_skipped(&self, pack: u32) -> bool {
        self.skipped.contains(&pack)
    }

    /// Adds an entry.
    pub(crate) fn insert(&mut self, hash: &BlockHash, at: Location) -> Result<(), StoreError> {
        debug_assert!(!self.clean, "changes are announced first");
        loop {
            let page = self.page(self.page_of(hash))?;
            if push(&mut page.bytes, &entry(hash, at)) {
                page.changed = true;
                self.entries += 1;
                return Ok(());
            }
            self.double()?;
        }
    }

    fn page_of(&self, hash: &BlockHash) -> u64 {
        page_number(key(hash), self.page_bits)
    }

    /// Moves every entry into a file with twice as many pages.
    fn double(&mut self) -> Result<(), StoreError> {
        if self.page_bits == MAX_PAGE_BITS {
            return Err(StoreError::corrupt("the index has reached its largest size"));
        }
        let mut larger = Self::create(&self.directory, self.page_bits + 1, self.packs.clone())?;
        for number in 0..1 << self.page_bits {
            let (mut low, mut high) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
            for entry in entries(&self.page(number)?.bytes) {
                let half =
                    if page_number(key(entry), larger.page_bits).is_multiple_of(2) { &mut low } else { &mut high };
                push(half, entry);
            }
            larger.write_page(number * 2, &low)?;
            larger.write_page(number * 2 + 1, &high)?;
        }
        larger.entries = self.entries;
        larger.skipped = std::mem::take(&mut self.skipped);
        *self = larger;
        Ok(())
    }

    fn page(&mut self, number: u64) -> Result<&mut KeptPage, StoreError> {
        if !self.kept.contains_key(&number) {
            if self.kept.len() >= PAGES_KEPT {
                self.write_changed()?;
                self.kept.clear();
            }
            let mut bytes = Box::new([0; PAGE_BYTES]);
            self.file
                .read_exact_at(&mut bytes[..], (number + 1) * PAGE_BYTES as u64)
                .map_err(|e| StoreError::io("cannot read the index", e))?;
            self.kept.insert(number, KeptPage { bytes, changed: false });
        }
        Ok(self.kept.get_mut(&number).expect("added above"))
    }

    /// Writes every changed page, in the order of the file.
    fn write_changed(&mut self) -> Result<(), StoreError> {
        let mut changed: Vec<_> = self.kept.iter().filter(|(_, page)| page.changed).map(|(n, _)| *n).collect();
        changed.sort_unstable();
        for number in changed {
            self.write_page(number, &self.kept[&number].bytes)?;
        }
        self.kept.values_mut().for_each(|page| page.changed = false);
        Ok(())
    }

    fn write_page(&self, number: u64, page: &Page) -> Result<(), StoreError> {
        self.file
            .write_all_at(page, (number + 1) * PAGE_BYTES as u64)
            .map_err(|e| StoreError::io("cannot write the index", e))
    }

    fn write_header(&self) -> Result<(), StoreError> {
        let mut header = Vec::with_capacity(28);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&self.page_bits.to_le_bytes());
        header.extend_from_slice(&self.entries.to_le_bytes());
        header.extend_from_slice(&u32::from(self.clean).to_le_bytes());
        self.file.write_all_at(&header, 0).map_err(|e| StoreError::io("cannot write the index", e))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(|e| StoreError::io("cannot sync the index", e))
    }
}

/// The first half of a hash, or of an entry, which begins with it.
fn key(bytes: &[u8; ENTRY_BYTES]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("8 of 16 bytes"))
}

fn page_number(key: u64, page_bits: u32) -> u64 {
    key >> (64 - page_bits)
}

fn entry(hash: &BlockHash, at: Location) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[..8].copy_from_slice(&hash[..8]);
    entry[8..12].copy_from_slice(&at.pack.to_le_bytes());
    entry[12..14].copy_from_slice(&u16::try_from(at.block).expect("a pack holds 65536 blocks").to_le_bytes());
    entry
}

fn location(entry: &[u8; ENTRY_BYTES]) -> Location {
    Location {
        pack: u32::from_le_bytes(entry[8..12].try_into().expect("4 bytes")),
        block: u32::from(u16::from_le_bytes([entry[12], entry[13]])),
    }
}

fn count(page: &Page) -> usize {
    let stored = u32::from_le_bytes(*page.first_chunk().expect("4 of 4096 bytes"));
    usize::try_from(stored).unwrap_or(usize::MAX).min(ENTRIES_PER_PAGE)
}

fn set_count(page: &mut Page, count: usize) {
    page[..4].copy_from_slice(&u32::try_from(count).expect("at most 255").to_le_bytes());
}

fn entries(page: &Page) -> impl Iterator<Item = &[u8; ENTRY_BYTES]> {
    let (slots, _) = page.as_chunks::<ENTRY_BYTES>();
    slots[1..].iter().take(count(page))
}

/// Appends an entry; `false` when the page is full.
fn push(page: &mut Page, entry: &[u8; ENTRY_BYTES]) -> bool {
    let count = count(page);
    if count == ENTRIES_PER_PAGE {
        return false;
    }
    let start = (count + 1) * ENTRY_BYTES;
    page[start..start + ENTRY_BYTES].copy_from_slice(entry);
    set_count(page, count + 1);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u64) -> BlockHash {
        *blake3::hash(&n.to_le_bytes()).as_bytes().first_chunk().unwrap()
    }

    fn at(n: u64) -> Location {
        Location { pack: (n / 60_000) as u32, block: (n % 60_000) as u32 }
    }

    #[test]
    fn entries_are_found_after_growth_and_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = BlockIndex::open(dir.path()).unwrap();
        for id in 0..2 {
            index.add_pack(IndexedPack { id: PackId([id; 16]), len_bytes: 7 }).unwrap();
        }
        const COUNT: u64 = 40_000;
        for n in 0..COUNT {
            index.insert(&hash(n), at(n)).unwrap();
        }
        assert!(index.page_bits > MIN_PAGE_BITS);
        index.end_changes().unwrap();
        let mut index = BlockIndex::open(dir.path()).unwrap();
        assert_eq!(index.packs().len(), 2);
        for n in 0..COUNT {
            assert_eq!(index.candidates(&hash(n)).unwrap(), [at(n)], "{n}");
        }
        assert!(index.candidates(&hash(COUNT)).unwrap().is_empty());
    }

    #[test]
    fn the_format_never_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = BlockIndex::open(dir.path()).unwrap();
        index.add_pack(IndexedPack { id: PackId([0xcd; 16]), len_bytes: 0x0102_0304 }).unwrap();
        // The upper six bits of the eighth byte choose page 1 + 5.
        let hash = [0, 1, 2, 3, 4, 5, 6, 0x17, 8, 9, 10, 11, 12, 13, 14, 15];
        index.insert(&hash, Location { pack: 0, block: 0x0201 }).unwrap();
        index.end_changes().unwrap();
        let mut blocks = vec![0; 65 * 4096];
        let head = [b"BULBINDX", &[1, 0, 0, 0, 6, 0, 0, 0][..], &1_u64.to_le_bytes(), &[1, 0, 0, 0]].concat();
        blocks[..28].copy_from_slice(&head);
        blocks[6 * 4096] = 1;
        let entry = [&hash[..8], &[0, 0, 0, 0, 1, 2, 0, 0]].concat();
        blocks[6 * 4096 + 16..][..16].copy_from_slice(&entry);
        assert!(std::fs::read(dir.path().join("blocks")).unwrap() == blocks);
        let packs = [&[0xcd; 16][..], &[4, 3, 2, 1, 0, 0, 0, 0]].concat();
        assert_eq!(std::fs::read(dir.path().join("packs")).unwrap(), packs);
    }

    #[test]
    fn an_index_that_was_not_finished_is_empty_when_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = BlockIndex::open(dir.path()).unwrap();
        index.add_pack(IndexedPack { id: PackId([1; 16]), len_bytes: 7 }).unwrap();
        index.insert(&hash(1), at(1)).unwrap();
        index.end_changes().unwrap();
        index.begin_changes().unwrap();
        drop(index);
        let mut index = BlockIndex::open(dir.path()).unwrap();
        assert!(index.packs().is_empty() && index.candidates(&hash(1)).unwrap().is_empty());
    }
}
