//! Who uses which part of a file: nothing may be used twice.
//!
//! Without this check a file of 384 KiB can claim to be 1 TiB of data, all of it the same few clusters.

use std::ops::Range;

use crate::FormatError;
use crate::bytes::{to_u64, to_usize};

pub(crate) fn referenced_twice(host_offset: u64) -> FormatError {
    FormatError::corrupt(format!("cluster {host_offset:#x} referenced twice"))
}

/// A set of host clusters of the file, one bit each.
pub(crate) struct ClusterSet {
    words: Vec<u64>,
}

impl ClusterSet {
    pub(crate) fn new(host_clusters: u64) -> Self {
        Self { words: vec![0; to_usize(host_clusters.div_ceil(64))] }
    }

    /// Adds a cluster; returns whether it was not there before. Clusters past the end of the file are in no set.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        let Some(word) = self.words.get_mut(to_usize(cluster / 64)) else { return true };
        let bit = 1 << (cluster % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Adds the cluster at a host offset and fails if it was there.
    pub(crate) fn claim(&mut self, host_offset: u64, cluster_bits: u32) -> Result<(), FormatError> {
        if self.insert(host_offset >> cluster_bits) { Ok(()) } else { Err(referenced_twice(host_offset)) }
    }

    /// Adds clusters by number; fails with the first that was there. As `insert` past the end of the file.
    pub(crate) fn claim_range(&mut self, clusters: Range<u64>) -> Result<(), u64> {
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            let first_bit = cluster % 64;
            let bits = (64 - first_bit).min(clusters.end - cluster);
            let mask = (u64::MAX >> (64 - bits)) << first_bit;
            let Some(word) = self.words.get_mut(to_usize(cluster / 64)) else { return Ok(()) };
            if *word & mask != 0 {
                return Err(cluster - first_bit + u64::from((*word & mask).trailing_zeros()));
            }
            *word |= mask;
            cluster += bits;
        }
        Ok(())
    }

    pub(crate) fn first_common(&self, other: &Self) -> Option<u64> {
        let mut words = self.words.iter().zip(&other.words).map(|(a, b)| a & b).enumerate();
        words
            .find(|(_, common)| *common != 0)
            .map(|(index, common)| to_u64(index) * 64 + u64::from(common.trailing_zeros()))
    }
}

/// 64 MiB of keys, twice that while sorting out a full pass.
pub(crate) const DUPLICATE_FINDER_KEYS: usize = 8 << 20;

/// Finds out whether a key occurs twice in a sequence that is too long to keep, by going over it several times.
///
/// Each pass looks at the keys above those of the pass before and keeps the lowest of them that fit. Most images need
/// one pass. Unlike hashing, no choice of keys makes it need more memory.
pub(crate) struct DuplicateFinder {
    capacity: usize,
    keys: Vec<u64>,
    /// Keys up to here were looked at in earlier passes.
    done: Option<u64>,
    /// Keys above this are left to a later pass.
    limit: u64,
    /// Whether any key was left.
    more: bool,
}

impl DuplicateFinder {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, keys: Vec::new(), done: None, limit: u64::MAX, more: false }
    }

    pub(crate) fn push(&mut self, key: u64) -> Result<(), FormatError> {
        if self.done.is_some_and(|done| key <= done) {
            return Ok(());
        }
        if key > self.limit {
            self.more = true;
            return Ok(());
        }
        self.keys.push(key);
        if self.keys.len() >= self.capacity.saturating_mul(2) {
            self.sort()?;
            self.keys.truncate(self.capacity);
            self.limit = self.keys.last().copied().unwrap_or(self.limit);
            self.more = true;
        }
        Ok(())
    }

    /// Ends a pass; returns whether the whole sequence must be pushed once more.
    pub(crate) fn next_pass(&mut self) -> Result<bool, FormatError> {
        self.sort()?;
        self.done = Some(self.limit);
        self.limit = u64::MAX;
        self.keys.clear();
        Ok(std::mem::take(&mut self.more))
    }

    fn sort(&mut self) -> Result<(), FormatError> {
        self.keys.sort_unstable();
        match self.keys.array_windows().find(|[a, b]| a == b) {
            Some([key, _]) => Err(FormatError::corrupt(format!("compressed cluster at {key:#x} referenced twice"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_duplicate(keys: &[u64], capacity: usize) -> bool {
        let mut finder = DuplicateFinder::new(capacity);
        loop {
            for key in keys {
                if finder.push(*key).is_err() {
                    return true;
                }
                assert!(finder.keys.len() <= 2 * capacity);
            }
            match finder.next_pass() {
                Err(_) => return true,
                Ok(false) => return false,
                Ok(true) => {}
            }
        }
    }

    #[test]
    fn a_duplicate_is_found_wherever_it_is() {
        let scattered: Vec<u64> = (0..1000_u64).map(|n| n * 7919 % 1009).collect();
        for capacity in [1, 2, 10, 499, 500, 501, 2000] {
            assert!(!has_duplicate(&scattered, capacity), "capacity {capacity}");
            for twice in [0, 1, 499, 998, 999] {
                for at in [0, 500, 1000] {
                    let mut keys = scattered.clone();
                    keys.insert(at, scattered[twice]);
                    assert!(has_duplicate(&keys, capacity), "capacity {capacity}, {twice} again at {at}");
                }
            }
        }
    }

    #[test]
    fn cluster_sets_find_what_they_share() {
        let (mut a, mut b) = (ClusterSet::new(1000), ClusterSet::new(1000));
        assert!(a.insert(3) && a.insert(999) && !a.insert(3));
        assert!(b.insert(4) && a.first_common(&b).is_none());
        assert!(b.insert(999));
        assert_eq!(a.first_common(&b), Some(999));
    }
}
