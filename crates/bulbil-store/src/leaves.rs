//! Leaves: the hash of every window of a content that is not zero, kept as an attachment.
//!
//! All integers are little endian.
//!
//! ```text
//! offset   bytes  what
//! 0        4      format version, 1
//! 4        4      r, runs
//! 8        8      n, leaves
//! 16       8·r    per run: first window u32 │ windows u32
//! 16+8·r   32·n   the leaves of all runs, one after another
//! ```
//! Runs are sorted and do not touch; windows in none are zero. From these the digest of a disk that
//! differs in a few windows is made without reading the others.

use bulbil_types::{FRAME_BYTES, MAX_DISK_BYTES};

use crate::attachment::AttachmentKind;
use crate::digest::{Digest, DigestBuilder};
use crate::error::{StoreError, StoreErrorKind};
use crate::store::Store;

const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const RUN_BYTES: usize = 8;
const LEAF_BYTES: usize = 32;

/// Leaves kept for one content, 32 MiB: 128 GiB of data. For more data none are kept.
const MAX_LEAVES: usize = 1 << 20;

type Leaf = [u8; LEAF_BYTES];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first_window: u32,
    windows: u32,
}

impl Run {
    fn end(self) -> u64 {
        u64::from(self.first_window) + u64::from(self.windows)
    }
}

/// Leaves by window; windows without one are zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Leaves {
    runs: Vec<Run>,
    leaves: Vec<Leaf>,
    /// There were more than are kept, so these are not all.
    overflowed: bool,
}

impl Leaves {
    /// Adds the leaf of a window past all that were added.
    pub(crate) fn push(&mut self, window: u64, leaf: Leaf) {
        if self.leaves.len() >= MAX_LEAVES {
            (self.runs, self.leaves, self.overflowed) = (Vec::new(), Vec::new(), true);
        }
        if self.overflowed {
            return;
        }
        self.leaves.push(leaf);
        match self.runs.last_mut() {
            Some(last) if last.end() == window => last.windows += 1,
            _ => {
                let first_window = u32::try_from(window).expect("a disk of 64 TiB has 2^29 windows");
                self.runs.push(Run { first_window, windows: 1 });
            }
        }
    }

    /// The leaves in ascending order of their windows.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Leaf)> {
        let windows = self.runs.iter().flat_map(|run| u64::from(run.first_window)..run.end());
        windows.zip(&self.leaves)
    }

    /// Whether these are the leaves of a content of this size.
    fn are_of(&self, digest: &Digest, size_bytes: u64) -> bool {
        if self.runs.last().is_some_and(|run| run.end() > size_bytes.div_ceil(FRAME_BYTES)) {
            return false;
        }
        let mut builder = DigestBuilder::new(size_bytes);
        self.iter().for_each(|(window, leaf)| builder.push(window, *leaf));
        builder.finish() == *digest
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.runs.len() * RUN_BYTES + self.leaves.len() * LEAF_BYTES);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.runs.len()).expect("at most 2^20").to_le_bytes());
        bytes.extend_from_slice(&(self.leaves.len() as u64).to_le_bytes());
        for run in &self.runs {
            bytes.extend_from_slice(&run.first_window.to_le_bytes());
            bytes.extend_from_slice(&run.windows.to_le_bytes());
        }
        bytes.extend(self.leaves.iter().flatten());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let damaged = || StoreError::corrupt("leaves: wrong layout");
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(damaged)?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if u32_at(0) != VERSION {
            let text = format!("leaves: format version {} is not known", u32_at(0));
            return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
        }
        let count = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
        let run_bytes = (u32_at(4) as usize).checked_mul(RUN_BYTES).filter(|len| *len <= rest.len());
        let (runs, leaves) = rest.split_at(run_bytes.ok_or_else(damaged)?);
        let (leaves, odd) = leaves.as_chunks::<LEAF_BYTES>();
        let runs: Vec<_> = runs.as_chunks::<RUN_BYTES>().0.iter().map(parse_run).collect();
        let windows: u64 = runs.iter().map(|run| u64::from(run.windows)).sum();
        let in_order = runs.windows(2).all(|pair| pair[0].end() < u64::from(pair[1].first_window));
        let in_range = runs.iter().all(|run| run.windows > 0 && run.end() <= MAX_DISK_BYTES / FRAME_BYTES);
        if !odd.is_empty() || leaves.len() as u64 != count || windows != count || !in_order || !in_range {
            return Err(damaged());
        }
        Ok(Self { runs, leaves: leaves.to_vec(), overflowed: false })
    }
}

fn parse_run(bytes: &[u8; RUN_BYTES]) -> Run {
    let [a, b, c, d, e, f, g, h] = *bytes;
    Run { first_window: u32::from_le_bytes([a, b, c, d]), windows: u32::from_le_bytes([e, f, g, h]) }
}

impl Store {
    /// Keeps the leaves of a content, unless it has sound ones; a failure is only told.
    pub(crate) fn keep_leaves(&self, digest: &Digest, leaves: &Leaves, content_existed: bool) {
        if leaves.overflowed || (content_existed && self.attachment(digest, AttachmentKind::Leaves).is_ok()) {
            return;
        }
        if let Err(error) = self.put_attachment(digest, AttachmentKind::Leaves, &leaves.encode()) {
            tracing::warn!(%digest, %error, "cannot keep the leaves of a content; its first snapshot will read it whole");
        }
    }

    /// The leaves of a content; `None` when they are missing or are not those of this digest.
    pub(crate) fn leaves(&self, digest: &Digest, size_bytes: u64) -> Option<Leaves> {
        let read = self.attachment(digest, AttachmentKind::Leaves).and_then(|bytes| Leaves::parse(&bytes));
        match read {
            Ok(leaves) if leaves.are_of(digest, size_bytes) => Some(leaves),
            Ok(_) => {
                tracing::warn!(%digest, "the leaves kept for a content are others; it is read instead");
                None
            }
            Err(error) => {
                if error.kind() != StoreErrorKind::NotFound {
                    tracing::warn!(%digest, %error, "cannot read the leaves of a content; it is read instead");
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Leaves {
        let mut leaves = Leaves::default();
        for window in [0, 1, 2, 7, 8, (1 << 29) - 1] {
            leaves.push(window, [(window as u8).wrapping_add(7); 32]);
        }
        leaves
    }

    fn digest_of(leaves: &Leaves, size_bytes: u64) -> Digest {
        let mut builder = DigestBuilder::new(size_bytes);
        leaves.iter().for_each(|(window, leaf)| builder.push(window, *leaf));
        builder.finish()
    }

    #[test]
    fn leaves_come_back() {
        for leaves in [sample(), Leaves::default()] {
            assert_eq!(Leaves::parse(&leaves.encode()).unwrap(), leaves);
        }
        let windows: Vec<_> = sample().iter().map(|(window, _)| window).collect();
        assert_eq!(windows, [0, 1, 2, 7, 8, (1 << 29) - 1]);
    }

    #[test]
    fn leaves_of_another_content_or_size_are_not_taken() {
        let leaves = sample();
        let digest = digest_of(&leaves, 64 << 40);
        assert!(leaves.are_of(&digest, 64 << 40));
        assert!(!leaves.are_of(&digest, 1 << 20));
        let mut other = leaves.clone();
        other.leaves[3][5] ^= 1;
        assert!(!other.are_of(&digest, 64 << 40));
    }

    #[test]
    fn wrong_layouts_are_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(Leaves::parse(&bytes[..len]).is_err(), "cut at {len}");
        }
        // Every number of the header and of the runs counts.
        for position in 0..HEADER_BYTES + 3 * RUN_BYTES {
            for bit in [0, 7] {
                let mut bad = bytes.clone();
                bad[position] ^= 1 << bit;
                let taken = Leaves::parse(&bad).is_ok_and(|leaves| leaves == sample());
                assert!(!taken, "byte {position}");
            }
        }
    }

    #[test]
    fn the_format_never_changes() {
        let hash = blake3::hash(&sample().encode()).to_hex();
        assert_eq!((sample().encode().len(), hash.as_str()), GOLDEN);
    }

    const GOLDEN: (usize, &str) = (232, "1deb6787c0660c4855564f67f0db908e300e23e0b7cc578b77d3e69b13e23c38");

    #[test]
    fn more_leaves_than_are_kept_are_none() {
        let mut leaves = Leaves::default();
        (0..=MAX_LEAVES as u64).for_each(|window| leaves.push(window, [1; 32]));
        assert!(leaves.overflowed && leaves.leaves.is_empty());
    }
}
