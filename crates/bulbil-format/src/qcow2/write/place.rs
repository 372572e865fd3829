//! Gives clusters their places in the file, and remembers them.

use std::ops::Range;

use crate::bytes::{to_u64, to_usize};

use super::{PieceRange, Placed};
use crate::qcow2::entry;

/// What a cluster of the disk is, before it has a place. Ranges are those of [`PieceRange`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// What is below, or zeros if nothing is.
    Unallocated,
    /// Zeros, above something else.
    Zero,
    /// Stored as it is.
    Plain(Range<usize>),
    /// Compressed.
    Packed(Range<usize>),
}

/// The file so far.
pub(super) struct Placer {
    cluster_bits: u32,
    /// How often each host cluster is referenced; its length is that of the file in clusters.
    refcounts: Vec<u16>,
    /// Where the next compressed cluster may begin, if it fits; at a boundary, nowhere.
    packed_end: u64,
    map: ClusterMap,
}

impl Placer {
    /// A file that has its header.
    pub(super) fn new(cluster_bits: u32) -> Self {
        Self { cluster_bits, refcounts: vec![1], packed_end: 0, map: ClusterMap::default() }
    }

    /// Gives a cluster of the disk its place; returns what is to be written. Called in the order of the disk.
    pub(super) fn place(&mut self, cluster: u64, found: &Found) -> Option<Placed> {
        match found {
            Found::Unallocated => None,
            Found::Zero => {
                self.map.push(cluster, entry::ZERO_ENTRY);
                None
            }
            Found::Plain(range) => {
                let host_offset = self.append_clusters(1);
                self.map.push(cluster, entry::plain_entry(host_offset));
                Some(Placed { host_offset, bytes: PieceRange::Plain(range.clone()) })
            }
            Found::Packed(range) => {
                let len_bytes = to_u64(range.len());
                let host_offset = self.place_packed(len_bytes);
                self.map.push(cluster, entry::compressed_entry(host_offset, len_bytes, self.cluster_bits));
                Some(Placed { host_offset, bytes: PieceRange::Packed(range.clone()) })
            }
        }
    }

    /// Takes so many clusters at the end of the file, each referenced once.
    pub(super) fn append_clusters(&mut self, clusters: u64) -> u64 {
        let host_offset = self.end_bytes();
        self.refcounts.resize(self.refcounts.len() + to_usize(clusters), 1);
        host_offset
    }

    /// Finds room for compressed bytes, at most one cluster of them, and counts the references to it.
    fn place_packed(&mut self, len_bytes: u64) -> u64 {
        let boundary = self.packed_end.next_multiple_of(1 << self.cluster_bits);
        let fits = self.packed_end + len_bytes <= boundary;
        if !fits && boundary != self.end_bytes() {
            // Something else follows; the rest of the cluster stays empty.
            self.packed_end = self.end_bytes();
        }
        let host_offset = self.packed_end;
        self.packed_end += len_bytes;
        let (first, end) = (host_offset >> self.cluster_bits, self.packed_end.div_ceil(1 << self.cluster_bits));
        self.refcounts.resize(self.refcounts.len().max(to_usize(end)), 0);
        for count in self.refcounts.get_mut(to_usize(first)..to_usize(end)).unwrap_or_default() {
            *count += 1;
        }
        host_offset
    }

    /// The length of the file: whole clusters.
    pub(super) fn end_bytes(&self) -> u64 {
        to_u64(self.refcounts.len()) << self.cluster_bits
    }

    /// How often each cluster of the file is referenced.
    pub(super) fn refcounts(&self) -> &[u16] {
        &self.refcounts
    }

    /// Takes the map out, when all clusters of the disk are placed.
    pub(super) fn take_map(&mut self) -> ClusterMap {
        std::mem::take(&mut self.map)
    }
}

/// The L2 entries of all clusters that have one, by cluster of the disk.
#[derive(Debug, Default)]
pub(super) struct ClusterMap {
    entries: Vec<u64>,
    runs: Vec<MapRun>,
}

/// Where neighbouring clusters have their entries; the end is the start of the next run.
#[derive(Debug)]
struct MapRun {
    first_cluster: u64,
    first_entry: usize,
}

impl ClusterMap {
    /// Adds a cluster; it comes after all others.
    fn push(&mut self, cluster: u64, entry: u64) {
        let next = self.runs.last().map(|run| run.first_cluster + to_u64(self.entries.len() - run.first_entry));
        if next != Some(cluster) {
            self.runs.push(MapRun { first_cluster: cluster, first_entry: self.entries.len() });
        }
        self.entries.push(entry);
    }

    /// Iterates over clusters and their entries in the order of the disk.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let ends = self.runs.iter().skip(1).map(|run| run.first_entry).chain([self.entries.len()]);
        self.runs.iter().zip(ends).flat_map(|(run, end)| {
            let entries = self.entries.get(run.first_entry..end).unwrap_or_default();
            (run.first_cluster..).zip(entries.iter().copied())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_clusters_are_packed_across_boundaries_only_where_the_next_cluster_is_theirs() {
        let mut placer = Placer::new(9);
        let mut at = |found: Found| placer.place(0, &found).unwrap().host_offset;
        assert_eq!(at(Found::Packed(0..300)), 512);
        assert_eq!(at(Found::Packed(300..600)), 812);
        assert_eq!(at(Found::Plain(0..512)), 3 * 512);
        // 112 bytes are left of the cluster before the plain one.
        assert_eq!(at(Found::Packed(600..700)), 1112);
        assert_eq!(at(Found::Packed(700..800)), 1212);
        assert_eq!(at(Found::Packed(800..1112)), 4 * 512);
        assert_eq!(at(Found::Packed(1112..1312)), 4 * 512 + 312);
        assert_eq!(at(Found::Packed(1312..1412)), 5 * 512);
        assert_eq!(placer.refcounts(), [1, 2, 3, 1, 2, 1]);
    }

    #[test]
    fn the_map_gives_back_what_it_was_given() {
        let given = [(3, 30), (4, 40), (7, 70), (1 << 40, 80), ((1 << 40) + 1, 90)];
        let mut map = ClusterMap::default();
        given.iter().for_each(|(cluster, entry)| map.push(*cluster, *entry));
        assert_eq!(map.iter().collect::<Vec<_>>(), given);
        assert_eq!(map.runs.len(), 3);
    }
}
