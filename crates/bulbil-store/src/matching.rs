//! Which blocks of a window are references and which are stored again: a pure decision.

use std::collections::BTreeSet;

use bulbil_types::BLOCKS_PER_FRAME;

use crate::pack::BlockHash;

/// Where a block is stored: a pack of this store and the block's position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    pub(crate) pack: u32,
    pub(crate) block: u32,
}

impl Location {
    fn next(self) -> Self {
        Self { block: self.block + 1, ..self }
    }

    fn frame(self) -> (u32, u32) {
        (self.pack, self.block / u32::try_from(BLOCKS_PER_FRAME).expect("32"))
    }
}

/// What is known of stored blocks.
pub(crate) trait KnownBlocks {
    type Error;

    /// Whether the block stored at `location` has this hash.
    fn is_at(&mut self, hash: &BlockHash, location: Location) -> Result<bool, Self::Error>;

    /// Where a block with this hash is stored.
    fn find(&mut self, hash: &BlockHash) -> Result<Option<Location>, Self::Error>;
}

/// The decision for one block that is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// It is stored already.
    Known(Location),
    /// It must be stored.
    New,
}

/// A window may read from this many frames before very short matches are stored again.
const FRAMES_PER_WINDOW: usize = 4;

/// A match of fewer blocks is not worth another frame.
const SHORT_RUN: usize = 4;

/// Decides for each block of a window; `None` is a zero block.
///
/// `previous` is where the last block before the window was found, so that a run goes on over
/// the border. The first question for each block is whether it follows the last match: matches
/// average dozens of blocks, so that most need no search, and the longest run wins.
pub(crate) fn place_window<K: KnownBlocks>(
    hashes: &[Option<BlockHash>],
    previous: Option<Location>,
    known: &mut K,
) -> Result<Vec<Option<Placement>>, K::Error> {
    let mut placements = Vec::with_capacity(hashes.len());
    let mut last = previous;
    for hash in hashes {
        let Some(hash) = hash else {
            placements.push(None);
            continue;
        };
        let follows = match last.map(Location::next) {
            Some(next) if known.is_at(hash, next)? => Some(next),
            _ => None,
        };
        let found = match follows {
            Some(location) => Some(location),
            None => known.find(hash)?,
        };
        last = found.or(last);
        placements.push(Some(found.map_or(Placement::New, Placement::Known)));
    }
    limit_scatter(&mut placements, previous);
    Ok(placements)
}

/// Stores short runs again when they would make the window read from too many frames.
fn limit_scatter(placements: &mut [Option<Placement>], previous: Option<Location>) {
    let mut frames = BTreeSet::new();
    let mut at = 0;
    while at < placements.len() {
        let run = run_length(&placements[at..]);
        if let Some(Placement::Known(first)) = placements[at] {
            let continues = at == 0 && previous.map(Location::next) == Some(first);
            let adds_frame = !frames.contains(&first.frame());
            if run < SHORT_RUN && adds_frame && frames.len() >= FRAMES_PER_WINDOW && !continues {
                placements[at..at + run].fill(Some(Placement::New));
            } else {
                frames.extend(placements[at..at + run].iter().flatten().filter_map(|p| match p {
                    Placement::Known(location) => Some(location.frame()),
                    Placement::New => None,
                }));
            }
        }
        at += run;
    }
}

/// How many placements from the start belong to one run: known blocks that follow each other, or one other block.
fn run_length(placements: &[Option<Placement>]) -> usize {
    let Some(Some(Placement::Known(first))) = placements.first() else { return 1 };
    let mut next = first.next();
    let mut run = 1;
    while placements.get(run) == Some(&Some(Placement::Known(next))) {
        next = next.next();
        run += 1;
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::convert::Infallible;

    #[derive(Default)]
    struct Table {
        blocks: HashMap<BlockHash, Location>,
        at: HashMap<Location, BlockHash>,
        searches: usize,
    }

    impl Table {
        fn store(&mut self, pack: u32, block: u32, value: u8) {
            let location = Location { pack, block };
            self.blocks.entry([value; 16]).or_insert(location);
            self.at.insert(location, [value; 16]);
        }
    }

    impl KnownBlocks for Table {
        type Error = Infallible;

        fn is_at(&mut self, hash: &BlockHash, location: Location) -> Result<bool, Infallible> {
            Ok(self.at.get(&location) == Some(hash))
        }

        fn find(&mut self, hash: &BlockHash) -> Result<Option<Location>, Infallible> {
            self.searches += 1;
            Ok(self.blocks.get(hash).copied())
        }
    }

    fn known(pack: u32, block: u32) -> Option<Placement> {
        Some(Placement::Known(Location { pack, block }))
    }

    #[test]
    fn a_run_is_followed_without_searching() {
        let mut table = Table::default();
        for block in 0..32 {
            table.store(1, block, block as u8);
        }
        let hashes: Vec<_> = (0..32).map(|v| Some([v; 16])).collect();
        let placed = place_window(&hashes, None, &mut table).unwrap();
        assert_eq!(placed[31], known(1, 31));
        assert_eq!(table.searches, 1);
    }

    #[test]
    fn the_copy_that_follows_is_preferred_to_an_older_one() {
        let mut table = Table::default();
        table.store(0, 9, 2);
        table.store(1, 0, 1);
        table.store(1, 1, 2);
        let placed = place_window(&[Some([1; 16]), Some([2; 16])], None, &mut table).unwrap();
        assert_eq!(placed, [known(1, 0), known(1, 1)]);
    }

    #[test]
    fn zero_blocks_do_not_end_a_run() {
        let mut table = Table::default();
        table.store(1, 0, 1);
        table.store(1, 1, 2);
        let placed = place_window(&[Some([1; 16]), None, Some([2; 16])], None, &mut table).unwrap();
        assert_eq!(placed, [known(1, 0), None, known(1, 1)]);
        assert_eq!(table.searches, 1);
    }

    #[test]
    fn short_matches_that_scatter_a_window_are_stored_again() {
        let mut table = Table::default();
        for value in 0..8 {
            table.store(u32::from(value), 0, value);
        }
        for block in 0..4 {
            table.store(9, block, 100 + block as u8);
        }
        let mut hashes: Vec<_> = (0..8).map(|v| Some([v; 16])).collect();
        hashes.extend((100..104).map(|v| Some([v; 16])));
        let placed = place_window(&hashes, None, &mut table).unwrap();
        assert_eq!(placed[..4], [known(0, 0), known(1, 0), known(2, 0), known(3, 0)]);
        assert_eq!(placed[4..8], [Some(Placement::New); 4]);
        assert_eq!(placed[8..], [known(9, 0), known(9, 1), known(9, 2), known(9, 3)]);
    }
}
