//! What the device says of itself: feature bits and configuration space (virtio 1.2, section 5.2).

use super::wire::F_PROTOCOL_FEATURES;

/// Unit of all positions and lengths on the wire, whatever `blk_size` is.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Descriptors of data in one request: what fits into a queue of 128 beside header and status.
const SEG_MAX: u32 = 126;
/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 32;
/// Sectors in one discarded range, 2 GiB. Longer ones are cut by the guest, so that none occupies a worker for long.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Sectors in one zeroed range, 256 MiB: without leave to unmap, zeroes are written.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 19;
/// Sectors in a block of the overlay (4 KiB): smaller discards keep nothing free.
const BLOCK_SECTORS: u8 = 8;

pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;
pub(super) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const F_EVENT_IDX: u64 = 1 << 29;
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// The feature bits that are offered.
///
/// Left out: `CONFIG_WCE` (11). The guest cannot switch its view of the cache; what counts is whether it took `FLUSH`.
pub(super) fn features(read_only: bool, queues: u16) -> u64 {
    let always = F_SEG_MAX
        | F_BLK_SIZE
        | F_FLUSH
        | F_TOPOLOGY
        | F_INDIRECT_DESC
        | F_EVENT_IDX
        | F_VERSION_1
        | F_PROTOCOL_FEATURES;
    let changing = if read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
    let many = if queues > 1 { F_MQ } else { 0 };
    always | changing | many
}

/// The configuration space from `offset` on; zeroes behind what is defined.
///
/// ```text
/// 0  u64 capacity (sectors)      24 u8  physical blocks of 2^n   44 u32 discard alignment
/// 8  u32 size_max                25 u8  alignment offset         48 u32 max write-zeroes sectors
/// 12 u32 seg_max                 26 u16 minimal I/O (blocks)     52 u32 max write-zeroes ranges
/// 16 u32 geometry                28 u32 optimal I/O (blocks)     56 u8  write zeroes may unmap
/// 20 u32 blk_size                32 u8  writeback, 34 u16 queues
///                                36 u32 max discard sectors, 40 u32 max discard ranges
/// ```
pub(super) fn space(size_bytes: u64, queues: u16, offset: u32, len: u32) -> Vec<u8> {
    let mut space = Vec::with_capacity(64);
    space.extend_from_slice(&(size_bytes / SECTOR_BYTES).to_le_bytes());
    let mut word = |value: u32| space.extend_from_slice(&value.to_le_bytes());
    word(0);
    word(SEG_MAX);
    word(0);
    word(512);
    // 2^3 logical blocks are a physical one, none is out of place, and 4 KiB is the smallest sensible request.
    word(u32::from_le_bytes([3, 0, BLOCK_SECTORS, 0]));
    word(0);
    // A write-back cache, then the number of queues.
    let [low, high] = queues.to_le_bytes();
    word(u32::from_le_bytes([1, 0, low, high]));
    word(MAX_DISCARD_SECTORS);
    word(MAX_RANGES);
    word(BLOCK_SECTORS.into());
    word(MAX_WRITE_ZEROES_SECTORS);
    word(MAX_RANGES);
    word(1);
    space.into_iter().chain(std::iter::repeat(0)).skip(offset as usize).take(len as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_has_its_fields_where_the_specification_puts_them() {
        let space = space((5 << 20) + 511, 2, 0, 60);
        assert_eq!(space[..8], (10_240_u64).to_le_bytes(), "whole sectors");
        assert_eq!(space[12..16], 126_u32.to_le_bytes());
        assert_eq!(space[20..24], 512_u32.to_le_bytes());
        assert_eq!(space[24..28], [3, 0, 8, 0], "4 KiB physical blocks");
        assert_eq!((space[32], &space[34..36]), (1, &[2, 0][..]));
        assert_eq!(space[36..40], MAX_DISCARD_SECTORS.to_le_bytes());
        assert_eq!(space[48..52], MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        assert_eq!(space[56], 1);
        assert_eq!(super::space(512, 1, 8, 256).len(), 256);
        assert_eq!(super::space(512, 1, 256, 4), [0; 4]);
    }

    #[test]
    fn a_read_only_device_offers_nothing_that_changes_it() {
        assert_eq!(features(true, 1) & (F_RO | F_DISCARD | F_WRITE_ZEROES | F_MQ), F_RO);
        assert_eq!(features(false, 2) & (F_RO | F_DISCARD | F_WRITE_ZEROES | F_MQ), F_DISCARD | F_WRITE_ZEROES | F_MQ);
    }
}
