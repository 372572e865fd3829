//! The check of a whole image at open: every L1 and L2 entry of the tree that is read, once, in bounded memory.
//!
//! What it proves, so that readers may rely on it:
//!
//! - every L2 table, cluster and compressed range that the disk needs lies in the file;
//! - no host cluster is used twice: not by two L2 tables, not by two clusters, not by a cluster and a table of the
//!   header. Compressed clusters may share host clusters with each other, as QEMU packs them, but no two begin at the
//!   same byte. Without this a file of 384 KiB can claim to be 1 TiB of data.
//!
//! One tree is checked: that of the current state, or that of the snapshot which is read. Refcount blocks and the
//! trees of other snapshots are not followed: nothing here uses them. Entries beyond the end of the disk are not looked
//! at, as they are never read.

use std::ops::Range;

use crate::bytes::{to_u64, to_usize};
use crate::claims::{ClusterSet, DUPLICATE_FINDER_KEYS, DuplicateFinder, referenced_twice};
use crate::holes::Holes;
use crate::{FormatError, ReadAt};

use super::entry::{Cluster, SUBCLUSTER_BITS, parse_l1, parse_l2};
use super::header::Header;
use super::read_l2_table;
use crate::error::need;
use crate::mapped::CompressedRange;

/// Host clusters that can be told apart: 128 MiB of bits for each of two maps, touched only where the image uses them.
/// With clusters of 64 KiB this is a file of 64 TiB.
const MAX_HOST_CLUSTERS: u64 = 1 << 30;
/// Compressed clusters, 16 TiB of them at 64 KiB: each [`DuplicateFinder`] pass over this many takes some seconds.
const MAX_COMPRESSED_CLUSTERS: u64 = 1 << 28;
/// The last sector of a compressed cluster need not be complete at the end of the file.
const SECTOR_BYTES: u64 = 512;

/// What an image contains.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Census {
    pub(super) data_bytes: u64,
    pub(super) compressed_clusters: u64,
}

/// Checks the tree below an L1 table; `tables` are all tables of the header and of snapshots, which it must not use.
///
/// Entries of L2 tables that lie in holes of the file become zero, which means the same and needs no reading: with an L1
/// table of 32 MiB, a file that takes no more on its disk could have four million of them.
pub(super) fn validate(
    file: &dyn ReadAt,
    header: &Header,
    tables: &[Range<u64>],
    l1: &mut [u64],
) -> Result<Census, FormatError> {
    let mut validator = Validator::new(file, header, tables)?;
    let mut holes = Holes::new(file);
    let mut tables = Vec::new();
    for (index, entry) in l1.iter_mut().enumerate() {
        let disk_offset = to_u64(index) * header.l2_coverage_bytes();
        let table = parse_l1(*entry, header.cluster_bytes());
        let table = table.map_err(|reason| bad_entry("L1", disk_offset, reason))?;
        if let Some(host_offset) = table {
            let end = host_offset.saturating_add(header.cluster_bytes());
            need(file.len_bytes(), end, "an L2 table")?;
            validator.plain.claim(host_offset, header.cluster_bits)?;
            if holes.cover(host_offset..end)? {
                *entry = 0;
            } else {
                tables.push((disk_offset, host_offset));
            }
        }
    }
    for (disk_offset, host_offset) in &tables {
        for_each_cluster(file, header, *disk_offset, *host_offset, |offset, cluster| validator.take(offset, cluster))?;
    }
    validator.check_sharing()?;
    while validator.compressed_offsets.next_pass()? {
        for (disk_offset, host_offset) in &tables {
            for_each_cluster(file, header, *disk_offset, *host_offset, |_, cluster| match cluster {
                Cluster::Compressed(range) => validator.compressed_offsets.push(range.host_offset),
                _ => Ok(()),
            })?;
        }
    }
    Ok(validator.census)
}

fn bad_entry(table: &str, disk_offset: u64, reason: &str) -> FormatError {
    FormatError::corrupt(format!("{table} entry for disk offset {disk_offset:#x}: {reason}"))
}

/// Calls `check` with every cluster of the disk that one L2 table maps.
fn for_each_cluster(
    file: &dyn ReadAt,
    header: &Header,
    disk_offset: u64,
    host_offset: u64,
    mut check: impl FnMut(u64, Cluster) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let table = read_l2_table(file, header, host_offset)?;
    let offsets = (disk_offset..header.size_bytes).step_by(to_usize(header.cluster_bytes()));
    for (words, offset) in table.chunks_exact(to_usize(header.l2_entry_words())).zip(offsets) {
        let (entry, subclusters) = split_entry(words);
        // The usual case of a sparse image, for speed.
        if entry == 0 && subclusters == 0 {
            continue;
        }
        let cluster = parse_l2(header, entry, subclusters).map_err(|reason| bad_entry("L2", offset, reason))?;
        check(offset, cluster)?;
    }
    Ok(())
}

/// Returns the entry and the map of subclusters, zero if there is none.
pub(super) fn split_entry(words: &[u64]) -> (u64, u64) {
    (words.first().copied().unwrap_or_default(), words.get(1).copied().unwrap_or_default())
}

struct Validator<'a> {
    header: &'a Header,
    len_bytes: u64,
    /// Host clusters of tables and of clusters stored as they are.
    plain: ClusterSet,
    /// Host clusters with compressed bytes.
    compressed: ClusterSet,
    compressed_offsets: DuplicateFinder,
    census: Census,
}

impl<'a> Validator<'a> {
    fn new(file: &dyn ReadAt, header: &'a Header, tables: &[Range<u64>]) -> Result<Self, FormatError> {
        let len_bytes = file.len_bytes();
        let host_clusters = len_bytes.div_ceil(header.cluster_bytes());
        if host_clusters > MAX_HOST_CLUSTERS {
            let what = format!("a file of {host_clusters} clusters");
            return Err(FormatError::TooLarge { what, limit: MAX_HOST_CLUSTERS });
        }
        let mut plain = ClusterSet::new(host_clusters);
        plain.claim(0, header.cluster_bits)?;
        for table in tables.iter().filter(|table| !table.is_empty()) {
            let clusters = table.start >> header.cluster_bits..table.end.div_ceil(header.cluster_bytes());
            plain.claim_range(clusters).map_err(|cluster| referenced_twice(cluster << header.cluster_bits))?;
        }
        Ok(Self {
            header,
            len_bytes,
            plain,
            compressed: ClusterSet::new(host_clusters),
            compressed_offsets: DuplicateFinder::new(DUPLICATE_FINDER_KEYS),
            census: Census::default(),
        })
    }

    fn take(&mut self, disk_offset: u64, cluster: Cluster) -> Result<(), FormatError> {
        match cluster {
            Cluster::Unallocated => Ok(()),
            Cluster::Zero { reserved_at } => self.take_reserved(reserved_at),
            Cluster::Data { host_offset } => self.take_data(disk_offset, host_offset, u32::MAX),
            Cluster::Subclusters { reserved_at: Some(host_offset), map } if map.allocated != 0 => {
                self.take_data(disk_offset, host_offset, map.allocated)
            }
            Cluster::Subclusters { reserved_at, .. } => self.take_reserved(reserved_at),
            Cluster::Compressed(range) => self.take_compressed(disk_offset, range),
        }
    }

    /// The part of a cluster within the disk.
    fn cluster_len(&self, disk_offset: u64) -> u64 {
        self.header.cluster_bytes().min(self.header.size_bytes.saturating_sub(disk_offset))
    }

    /// Space set aside is never read, so it need not be in the file.
    fn take_reserved(&mut self, reserved_at: Option<u64>) -> Result<(), FormatError> {
        match reserved_at {
            Some(host_offset) if host_offset < self.len_bytes => {
                self.plain.claim(host_offset, self.header.cluster_bits)
            }
            _ => Ok(()),
        }
    }

    fn take_data(&mut self, disk_offset: u64, host_offset: u64, allocated: u32) -> Result<(), FormatError> {
        let subcluster_bits = self.header.cluster_bits - SUBCLUSTER_BITS;
        let cluster_len = self.cluster_len(disk_offset);
        // The file may end within the last cluster, after the last part of it that is read.
        let used_subclusters = u64::from(u32::BITS - allocated.leading_zeros());
        let used_bytes = (used_subclusters << subcluster_bits).min(cluster_len);
        need(self.len_bytes, host_offset.saturating_add(used_bytes), "a data cluster")?;
        self.census.data_bytes += stored_bytes(allocated, subcluster_bits, cluster_len);
        self.plain.claim(host_offset, self.header.cluster_bits)
    }

    fn take_compressed(&mut self, disk_offset: u64, range: CompressedRange) -> Result<(), FormatError> {
        if range.host_offset >= self.len_bytes || range.end() >= self.len_bytes.saturating_add(SECTOR_BYTES) {
            return need(self.len_bytes, range.end(), "a compressed cluster");
        }
        self.census.data_bytes += self.cluster_len(disk_offset);
        self.census.compressed_clusters += 1;
        if self.census.compressed_clusters > MAX_COMPRESSED_CLUSTERS {
            let what = "the number of compressed clusters".to_owned();
            return Err(FormatError::TooLarge { what, limit: MAX_COMPRESSED_CLUSTERS });
        }
        let first = range.host_offset >> self.header.cluster_bits;
        let last = range.end().min(self.len_bytes).saturating_sub(1) >> self.header.cluster_bits;
        for cluster in first..=last {
            self.compressed.insert(cluster);
        }
        self.compressed_offsets.push(range.host_offset)
    }

    fn check_sharing(&self) -> Result<(), FormatError> {
        match self.plain.first_common(&self.compressed) {
            None => Ok(()),
            Some(cluster) => Err(referenced_twice(cluster << self.header.cluster_bits)),
        }
    }
}

/// Counts the bytes in the stored parts of a cluster of which the first `cluster_len` bytes are in the disk.
fn stored_bytes(allocated: u32, subcluster_bits: u32, cluster_len: u64) -> u64 {
    if allocated == u32::MAX {
        return cluster_len;
    }
    let stored = (0..u32::BITS).filter(|bit| allocated & (1 << bit) != 0);
    let in_disk = stored.map(|bit| cluster_len.saturating_sub(u64::from(bit) << subcluster_bits));
    in_disk.map(|bytes| bytes.min(1 << subcluster_bits)).sum()
}
