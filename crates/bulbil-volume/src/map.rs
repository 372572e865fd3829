//! The overlay's map: for each 4 KiB block, where its content is.
//!
//! Two bits a block, four blocks a byte from the low bits up, in pages of 4 KiB that cover 64 MiB
//! of disk each. Pages are written in place. That is safe without a journal because a bit pair
//! changes only between states that both describe legal content at that moment (see `overlay`),
//! and disks do not tear within a byte.

use std::collections::{BTreeMap, BTreeSet};

use bulbil_types::BLOCK_LEN;

/// Where the content of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// In the image below.
    Base = 0,
    /// In the overlay's data file, at the block's own offset.
    Data = 1,
    /// Nowhere: it is zero.
    Zero = 2,
}

impl BlockState {
    fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Base),
            1 => Some(Self::Data),
            2 => Some(Self::Zero),
            _ => None,
        }
    }
}

/// Blocks that one page covers.
pub(crate) const BLOCKS_PER_PAGE: u64 = BLOCK_LEN as u64 * 4;

pub(crate) type MapPage = [u8; BLOCK_LEN];

/// Pages kept in memory, 16 MiB: the map of 256 GiB of disk. Changed ones are kept beyond it.
const PAGES_KEPT: usize = 4096;

/// The pages that were touched, and which of them are not on disk as they are here.
#[derive(Debug, Default)]
pub(crate) struct BlockMap {
    pages: BTreeMap<u64, Box<MapPage>>,
    /// Changed since they were last taken for writing.
    dirty: BTreeSet<u64>,
    /// Taken, and perhaps not written yet.
    in_flight: BTreeSet<u64>,
}

/// Bytes of a page that have changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MapChange {
    pub(crate) page: u64,
    pub(crate) first_byte: u64,
    pub(crate) old: Vec<u8>,
    pub(crate) new: Vec<u8>,
}

impl BlockMap {
    pub(crate) fn has_page(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// The first page in memory from `page` on.
    pub(crate) fn next_page(&self, page: u64) -> Option<u64> {
        self.pages.range(page..).next().map(|(number, _)| *number)
    }

    /// Adds a page as it is stored.
    ///
    /// # Errors
    /// When it holds a bit pair that no version writes.
    pub(crate) fn load_page(&mut self, number: u64, page: MapPage) -> Result<(), u64> {
        check_page(number, &page)?;
        if self.pages.len() >= PAGES_KEPT {
            let (dirty, in_flight) = (&self.dirty, &self.in_flight);
            self.pages.retain(|number, _| dirty.contains(number) || in_flight.contains(number));
        }
        self.pages.entry(number).or_insert_with(|| Box::new(page));
        Ok(())
    }

    /// The state of `first` and a number of blocks from it, at most `limit`, in the same state.
    ///
    /// The run ends early where a page is not loaded; `None` when that of `first` is not.
    pub(crate) fn run(&self, first: u64, limit: u64) -> Option<(BlockState, u64)> {
        let mut page = self.pages.get(&(first / BLOCKS_PER_PAGE))?;
        let state = state_in(page, first);
        let mut len = 1;
        while len < limit {
            let block = first + len;
            if block.is_multiple_of(BLOCKS_PER_PAGE) {
                match self.pages.get(&(block / BLOCKS_PER_PAGE)) {
                    Some(next) => page = next,
                    None => break,
                }
            }
            if state_in(page, block) != state {
                break;
            }
            len += 1;
        }
        Some((state, len))
    }

    /// Puts `count` blocks from `first`, all of one loaded page, into a state; says what that changed.
    pub(crate) fn set(&mut self, first: u64, count: u64, state: BlockState) -> Option<MapChange> {
        let number = first / BLOCKS_PER_PAGE;
        let page = self.pages.get_mut(&number).expect("the caller loads the page");
        let (first_byte, last_byte) = (position(first).0, position(first + count - 1).0);
        if (first..first + count).all(|block| state_in(page, block) == state) {
            return None;
        }
        let old = page[first_byte..=last_byte].to_vec();
        for block in first..first + count {
            let (byte, shift) = position(block);
            page[byte] = page[byte] & !(3 << shift) | (state as u8) << shift;
        }
        self.dirty.insert(number);
        let new = page[first_byte..=last_byte].to_vec();
        Some(MapChange { page: number, first_byte: first_byte as u64, old, new })
    }

    /// Takes a change back; nobody has made another one in these bytes since.
    pub(crate) fn take_back(&mut self, change: &MapChange) {
        let page = self.pages.get_mut(&change.page).expect("changed pages stay");
        let first = usize::try_from(change.first_byte).expect("within a page");
        page[first..first + change.old.len()].copy_from_slice(&change.old);
        self.dirty.insert(change.page);
    }

    /// Puts the blocks of a loaded page into the states that another one has for them, where that is not `Base`.
    ///
    /// # Errors
    /// When it holds a bit pair that no version writes.
    pub(crate) fn merge_page(&mut self, number: u64, newer: &MapPage) -> Result<(), u64> {
        check_page(number, newer)?;
        let page = self.pages.get_mut(&number).expect("the caller loads the page");
        for (byte, newer) in page.iter_mut().zip(newer) {
            let said = (*newer | *newer >> 1) & 0x55;
            let merged = *byte & !(said | said << 1) | *newer;
            if *byte != merged {
                *byte = merged;
                self.dirty.insert(number);
            }
        }
        Ok(())
    }

    /// Whether every page is on disk as it is here.
    pub(crate) fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.in_flight.is_empty()
    }

    /// Copies every changed page for writing.
    pub(crate) fn take_dirty(&mut self) -> Vec<(u64, Box<MapPage>)> {
        self.in_flight = std::mem::take(&mut self.dirty);
        self.in_flight.iter().map(|number| (*number, self.pages[number].clone())).collect()
    }

    /// Says that the pages of [`take_dirty`](Self::take_dirty) are on disk, or that they are not.
    pub(crate) fn finish_writing(&mut self, written: bool) {
        let in_flight = std::mem::take(&mut self.in_flight);
        if !written {
            self.dirty.extend(in_flight);
        }
    }
}

/// Refuses a page with a bit pair that no version writes: the error is near its block.
fn check_page(number: u64, page: &MapPage) -> Result<(), u64> {
    match page.iter().zip(0_u64..).find(|(byte, _)| *byte & (*byte >> 1) & 0x55 != 0) {
        Some((_, position)) => Err(number * BLOCKS_PER_PAGE + position * 4),
        None => Ok(()),
    }
}

fn state_in(page: &MapPage, block: u64) -> BlockState {
    let (byte, shift) = position(block);
    BlockState::from_bits(page[byte] >> shift & 3).expect("pages are checked when they are loaded")
}

fn position(block: u64) -> (usize, u32) {
    let in_page = usize::try_from(block % BLOCKS_PER_PAGE).expect("at most 16383");
    (in_page / 4, u32::try_from(in_page % 4 * 2).expect("at most 6"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_with_pages(count: u64) -> BlockMap {
        let mut map = BlockMap::default();
        for number in 0..count {
            map.load_page(number, [0; BLOCK_LEN]).unwrap();
        }
        map
    }

    #[test]
    fn runs_are_found_over_page_borders_and_end_at_missing_pages() {
        let mut map = map_with_pages(2);
        let border = BLOCKS_PER_PAGE;
        map.set(border - 3, 3, BlockState::Data);
        map.set(border, 2, BlockState::Data);
        map.set(border + 2, 1, BlockState::Zero);
        assert_eq!(map.run(0, u64::MAX), Some((BlockState::Base, border - 3)));
        assert_eq!(map.run(border - 3, 100), Some((BlockState::Data, 5)));
        assert_eq!(map.run(border - 3, 4), Some((BlockState::Data, 4)));
        assert_eq!(map.run(border + 2, 100), Some((BlockState::Zero, 1)));
        assert_eq!(map.run(border + 3, 1 << 33), Some((BlockState::Base, border - 3)));
        assert_eq!(map.run(2 * border, 1), None);
    }

    #[test]
    fn many_pages_do_not_fill_the_memory_and_changed_ones_stay() {
        let mut map = map_with_pages(1);
        map.set(9, 1, BlockState::Data);
        for number in 1..3 * PAGES_KEPT as u64 {
            map.load_page(number, [0; BLOCK_LEN]).unwrap();
        }
        assert!(map.pages.len() <= PAGES_KEPT + 1);
        assert_eq!(map.run(9, 1), Some((BlockState::Data, 1)));
    }

    #[test]
    fn only_pages_that_change_are_dirty() {
        let mut map = map_with_pages(3);
        map.set(BLOCKS_PER_PAGE, 1, BlockState::Data);
        map.set(5, 1, BlockState::Base);
        let numbers = |map: &mut BlockMap| map.take_dirty().iter().map(|(n, _)| *n).collect::<Vec<_>>();
        assert_eq!(numbers(&mut map), [1]);
        map.finish_writing(false);
        assert_eq!(numbers(&mut map), [1]);
        map.finish_writing(true);
        map.set(BLOCKS_PER_PAGE, 1, BlockState::Data);
        assert!(numbers(&mut map).is_empty());
    }

    #[test]
    fn changes_are_told_taken_back_and_merged() {
        let mut map = map_with_pages(2);
        let change = map.set(BLOCKS_PER_PAGE + 6, 3, BlockState::Data).unwrap();
        assert_eq!((change.page, change.first_byte), (1, 1));
        assert_eq!((&change.old[..], &change.new[..]), (&[0, 0][..], &[0b0101_0000, 0b01][..]));
        assert_eq!(map.set(BLOCKS_PER_PAGE + 6, 3, BlockState::Data), None);
        map.take_back(&change);
        assert_eq!(map.run(BLOCKS_PER_PAGE, 100), Some((BlockState::Base, 100)));
        map.set(BLOCKS_PER_PAGE, 3, BlockState::Data);
        let mut newer = [0; BLOCK_LEN];
        newer[0] = 0b0110_0000;
        map.merge_page(1, &newer).unwrap();
        let state = |block| map.run(BLOCKS_PER_PAGE + block, 1).unwrap().0;
        let expected = [BlockState::Data, BlockState::Data, BlockState::Zero, BlockState::Data, BlockState::Base];
        assert_eq!([state(0), state(1), state(2), state(3), state(4)], expected);
        newer[1] = 0b11;
        assert_eq!(map.merge_page(1, &newer), Err(BLOCKS_PER_PAGE + 4));
    }

    #[test]
    fn a_page_with_an_unknown_state_is_refused() {
        let mut page = [0; BLOCK_LEN];
        page[7] = 0b1100;
        assert_eq!(BlockMap::default().load_page(1, page), Err(BLOCKS_PER_PAGE + 28));
        page[7] = 0b1001;
        assert_eq!(BlockMap::default().load_page(1, page), Ok(()));
    }
}
