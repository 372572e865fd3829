//! L1 and L2 entries: what one word (or two) of a table says about a cluster.
//!
//! ```text
//! L1 entry    bits 0-8 reserved | 9-55 offset of the L2 table | 56-62 reserved | 63 refcount is one
//! L2 entry    bit 0 reads as zeros | 1-8 reserved | 9-55 offset of the cluster | 56-61 reserved
//!             | 62 compressed | 63 refcount is one
//! compressed  bits 0..x byte offset | x..62 further 512-byte sectors | 62 set; x = 62 - (cluster bits - 8)
//! extended    a second word: bits 0-31 subcluster is allocated | 32-63 subcluster reads as zeros
//!
//! What is neither allocated nor reads as zeros is that of the backing file; zeros if there is none.
//! ```

use super::header::Header;
use crate::mapped::CompressedRange;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZEROS: u64 = 1;
/// How many parts a cluster has under extended L2 entries, as a power of two.
pub(super) const SUBCLUSTER_BITS: u32 = 5;
const SECTOR_BITS: u32 = 9;

/// What a cluster is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Not in this image.
    Unallocated,
    /// Reads as zeros; space may have been set aside for it.
    Zero { reserved_at: Option<u64> },
    /// Stored as it is.
    Data { host_offset: u64 },
    /// Stored compressed.
    Compressed(CompressedRange),
    /// Differs from part to part; space may have been set aside even if no part is stored.
    Subclusters { reserved_at: Option<u64>, map: SubclusterMap },
}

/// What the 32 parts of a cluster are: bit `n` is about part `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SubclusterMap {
    /// Stored as they are.
    pub(super) allocated: u32,
    /// Read as zeros; none of them is allocated.
    pub(super) zeros: u32,
}

/// Returns the offset of an L2 table, or `None` if there is no table.
pub(super) fn parse_l1(entry: u64, cluster_bytes: u64) -> Result<Option<u64>, &'static str> {
    if entry & L1_RESERVED_MASK != 0 {
        return Err("reserved bits are set");
    }
    match entry & OFFSET_MASK {
        0 => Ok(None),
        offset if offset.is_multiple_of(cluster_bytes) => Ok(Some(offset)),
        _ => Err("the L2 table is not at a cluster"),
    }
}

/// Returns what an L2 entry says; `subclusters` is its second word, zero if it has none.
pub(super) fn parse_l2(header: &Header, entry: u64, subclusters: u64) -> Result<Cluster, &'static str> {
    if entry & COMPRESSED != 0 {
        if subclusters != 0 {
            return Err("a compressed cluster has subclusters");
        }
        return Ok(Cluster::Compressed(parse_compressed(entry, header.cluster_bits)));
    }
    if entry & L2_RESERVED_MASK != 0 {
        return Err("reserved bits are set");
    }
    let host_offset = entry & OFFSET_MASK;
    if !host_offset.is_multiple_of(header.cluster_bytes()) {
        return Err("the cluster is not at a multiple of the cluster size");
    }
    let reserved_at = (host_offset != 0).then_some(host_offset);
    let zero_flag = entry & READS_AS_ZEROS != 0;
    if header.extended_l2 {
        return parse_subclusters(reserved_at, zero_flag, subclusters);
    }
    match reserved_at {
        _ if zero_flag && header.version < 3 => Err("a zero cluster in a version 2 image"),
        _ if zero_flag => Ok(Cluster::Zero { reserved_at }),
        Some(host_offset) => Ok(Cluster::Data { host_offset }),
        None => Ok(Cluster::Unallocated),
    }
}

fn parse_subclusters(reserved_at: Option<u64>, zero_flag: bool, map: u64) -> Result<Cluster, &'static str> {
    let allocated = u32::try_from(map & u64::from(u32::MAX)).unwrap_or_default();
    let zeros = u32::try_from(map >> 32).unwrap_or_default();
    if zero_flag {
        return Err("the zero flag is set beside a map of subclusters");
    }
    if allocated & zeros != 0 {
        return Err("a subcluster is both allocated and zero");
    }
    match (reserved_at, allocated, zeros) {
        (None, 1.., _) => Err("subclusters are allocated without a cluster"),
        (Some(host_offset), u32::MAX, _) => Ok(Cluster::Data { host_offset }),
        (reserved_at, _, u32::MAX) => Ok(Cluster::Zero { reserved_at }),
        (None, _, 0) => Ok(Cluster::Unallocated),
        (reserved_at, ..) => Ok(Cluster::Subclusters { reserved_at, map: SubclusterMap { allocated, zeros } }),
    }
}

/// The L2 entry of a cluster that reads as zeros and has no place in the file.
pub(super) const ZERO_ENTRY: u64 = READS_AS_ZEROS;
/// The only reference to what is at the offset is this entry.
const COPIED: u64 = 1 << 63;

/// Returns the L1 or L2 entry of a table or cluster that is referenced once.
pub(super) fn plain_entry(host_offset: u64) -> u64 {
    COPIED | host_offset
}

/// Returns the L2 entry of a compressed cluster; `len_bytes` is not zero and less than a cluster.
pub(super) fn compressed_entry(host_offset: u64, len_bytes: u64, cluster_bits: u32) -> u64 {
    let further_sectors = ((host_offset + len_bytes - 1) >> SECTOR_BITS) - (host_offset >> SECTOR_BITS);
    COMPRESSED | further_sectors << compressed_offset_bits(cluster_bits) | host_offset
}

fn compressed_offset_bits(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}

fn parse_compressed(entry: u64, cluster_bits: u32) -> CompressedRange {
    let offset_bits = compressed_offset_bits(cluster_bits);
    let host_offset = entry & ((1 << offset_bits) - 1);
    let further_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
    let sector_rest = host_offset & ((1 << SECTOR_BITS) - 1);
    // At most 2^13 sectors: the shift cannot overflow.
    CompressedRange { host_offset, len_bytes: ((further_sectors + 1) << SECTOR_BITS) - sector_rest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_cover_their_bytes_up_to_the_end_of_a_sector() {
        for cluster_bits in 9..=21 {
            for (host_offset, len_bytes) in [(512, 1), (512, 511), (1023, 1), (1023, 2), (0x1234_5678, 400)] {
                let entry = compressed_entry(host_offset, len_bytes, cluster_bits);
                let range = parse_compressed(entry, cluster_bits);
                assert_eq!(range.host_offset, host_offset);
                assert_eq!(range.end(), (host_offset + len_bytes).next_multiple_of(512));
            }
        }
    }
}
