//! Which blocks of a pack are in use.

use crate::manifest::Manifest;
use crate::pack::PackId;

use std::collections::HashMap;

/// Blocks of one pack, a bit for each; it grows to the last one that is set.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockSet(Vec<u64>);

impl BlockSet {
    /// Sets `blocks` bits from `first`.
    pub(crate) fn insert_run(&mut self, first: u32, blocks: u32) {
        let end = (first + blocks) as usize;
        if self.0.len() < end.div_ceil(64) {
            self.0.resize(end.div_ceil(64), 0);
        }
        for block in first as usize..end {
            self.0[block / 64] |= 1 << (block % 64);
        }
    }

    pub(crate) fn contains(&self, block: u32) -> bool {
        self.0.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The blocks in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let blocks = u32::try_from(self.0.len() * 64).expect("a pack holds 65536 blocks");
        (0..blocks).filter(|block| self.contains(*block))
    }
}

/// The blocks in use of every pack.
pub(crate) type Liveness = HashMap<PackId, BlockSet>;

/// Takes in what a manifest refers to.
pub(crate) fn add(liveness: &mut Liveness, manifest: &Manifest) {
    for extent in manifest.extents() {
        let pack = manifest.packs()[extent.pack as usize].id;
        liveness.entry(pack).or_default().insert_run(extent.block_in_pack, extent.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_back_in_order() {
        let mut set = BlockSet::default();
        set.insert_run(65_535, 1);
        set.insert_run(60, 10);
        set.insert_run(62, 3);
        let expected: Vec<_> = (60..70).chain([65_535]).collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), expected);
        assert_eq!((set.len(), set.contains(70), set.contains(69)), (11, false, true));
    }
}
