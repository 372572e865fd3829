//! Who uses which sector of an extent file: nothing may be used twice.

use std::ops::Range;

use crate::FormatError;
use crate::claims::ClusterSet;
use crate::disk::SECTOR_BYTES;

use super::header::MAX_SECTORS;

/// The longest grain that begins at the last sector an entry can name may end this much later.
const SLACK_SECTORS: u64 = 1 << 16;

/// A set of sectors, one bit each: at most 512 MiB, touched only where the file is used.
pub(super) struct SectorSet {
    sectors: ClusterSet,
}

impl SectorSet {
    /// Makes a set for a file of a length.
    pub(super) fn new(len_bytes: u64) -> Self {
        let sectors = len_bytes.div_ceil(SECTOR_BYTES).min(MAX_SECTORS + SLACK_SECTORS);
        Self { sectors: ClusterSet::new(sectors) }
    }

    /// Adds sectors and fails if one of them was there. Sectors past the end of the file are in no set.
    pub(super) fn claim(&mut self, sectors: Range<u64>) -> Result<(), FormatError> {
        let claimed = self.sectors.claim_range(sectors);
        claimed.map_err(|twice| FormatError::corrupt(format!("sector {twice:#x} referenced twice")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_told_from_ranges_that_overlap() {
        for (first, second, twice) in [
            (0..1, 1..2, None),
            (0..64, 64..128, None),
            (10..200, 200..300, None),
            (10..200, 0..10, None),
            (10..200, 199..300, Some(199)),
            (10..200, 0..11, Some(10)),
            (10..200, 64..65, Some(64)),
            (3..4, 0..500, Some(3)),
            (0..600, 700..800, None),
        ] {
            let mut set = SectorSet::new(512 * 500);
            set.claim(first.clone()).unwrap();
            let found = set.claim(second.clone()).map_err(|error| error.to_string());
            let expected = twice.map_or(Ok(()), |twice| Err(format!("corrupt: sector {twice:#x} referenced twice")));
            assert_eq!(found, expected, "{first:?} {second:?}");
        }
    }
}
