//! The identity of a disk's content.
//!
//! A digest is a SHA-256 Merkle root over the disk's 128 KiB windows, so it does not depend on
//! how a store cut, matched or compressed the content:
//!
//! ```text
//! leaf   = SHA-256(0x00 ‖ window)            the last window is padded with zeroes
//! node   = SHA-256(0x01 ‖ left ‖ right)      a complete binary tree; windows past the end are zero windows
//! digest = SHA-256("bulbil-disk-1" ‖ 0x00 ‖ size in bytes, u64 little endian ‖ root)
//! ```
//!
//! Runs of zero windows cost O(log n): the hash of an all-zero subtree of each height is known.

use std::fmt;
use std::str::FromStr;

use bulbil_types::{FRAME_BYTES, FRAME_LEN};
use sha2::{Digest as _, Sha256};

/// Identity of a disk's content: written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// The text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest: it is written `sha256:` and 64 hexadecimal digits")]
pub struct ParseDigestError(String);

impl Digest {
    /// Wraps 32 bytes that were read from a checked place.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm, for file names.
    #[must_use]
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseDigestError(text.to_owned());
        let hex = text.strip_prefix("sha256:").ok_or_else(fail)?;
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fail());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| fail())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| fail())?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseDigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

type Hash = [u8; 32];

fn node(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([1]).chain_update(left).chain_update(right).finalize().into()
}

/// Hashes one window of at most 128 KiB; a shorter one is padded with zeroes.
///
/// # Panics
/// If `window` is longer than a window.
#[must_use]
pub fn window_leaf(window: &[u8]) -> [u8; 32] {
    const PADDING: [u8; 4096] = [0; 4096];
    assert!(window.len() <= FRAME_LEN, "a window is at most 128 KiB");
    let mut hasher = Sha256::new().chain_update([0]).chain_update(window);
    let mut missing = FRAME_LEN - window.len();
    while missing > 0 {
        let step = missing.min(PADDING.len());
        hasher.update(&PADDING[..step]);
        missing -= step;
    }
    hasher.finalize().into()
}

/// The highest tree: 64 TiB of windows is 2^29 leaves; room to spare.
const MAX_HEIGHT: usize = 40;

/// Computes a [`Digest`] from window leaves given in ascending order; gaps are zero windows.
#[derive(Debug)]
pub struct DigestBuilder {
    size_bytes: u64,
    windows: u64,
    next_window: u64,
    /// `pending[k]`: a finished subtree of height k that waits for its right sibling.
    pending: [Option<Hash>; MAX_HEIGHT],
    zero_subtrees: Vec<Hash>,
}

impl DigestBuilder {
    /// Starts the digest of a disk of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let mut zero_subtrees = vec![window_leaf(&[])];
        for height in 1..MAX_HEIGHT {
            let below = zero_subtrees[height - 1];
            zero_subtrees.push(node(&below, &below));
        }
        let windows = size_bytes.div_ceil(FRAME_BYTES);
        Self { size_bytes, windows, next_window: 0, pending: [None; MAX_HEIGHT], zero_subtrees }
    }

    /// Adds the leaf of window `index`; windows between the last one and this are zero.
    ///
    /// # Panics
    /// If `index` is not past the last one added, or is past the end of the disk.
    pub fn push(&mut self, index: u64, leaf: [u8; 32]) {
        assert!(index >= self.next_window && index < self.windows, "windows come in order");
        self.skip_zeroes_to(index);
        self.add_subtree(0, leaf);
    }

    /// Finishes the digest; windows that were not added are zero.
    #[must_use]
    pub fn finish(mut self) -> Digest {
        let leaves = self.windows.max(1).next_power_of_two();
        self.skip_zeroes_to(leaves);
        let root = self.pending[leaves.trailing_zeros() as usize].expect("a complete tree has its root");
        let digest = Sha256::new()
            .chain_update(b"bulbil-disk-1\0")
            .chain_update(self.size_bytes.to_le_bytes())
            .chain_update(root)
            .finalize();
        Digest(digest.into())
    }

    fn skip_zeroes_to(&mut self, index: u64) {
        while self.next_window < index {
            let gap = index - self.next_window;
            let aligned = if self.next_window == 0 { u32::MAX } else { self.next_window.trailing_zeros() };
            let height = aligned.min(gap.ilog2());
            self.add_subtree(height as usize, self.zero_subtrees[height as usize]);
        }
    }

    fn add_subtree(&mut self, height: usize, hash: Hash) {
        self.next_window += 1 << height;
        let (mut height, mut hash) = (height, hash);
        while let Some(left) = self.pending[height].take() {
            hash = node(&left, &hash);
            height += 1;
        }
        self.pending[height] = Some(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, written the slow way.
    fn naive(content: &[u8]) -> Digest {
        let mut level: Vec<Hash> = content.chunks(FRAME_LEN).map(window_leaf).collect();
        level.resize(level.len().max(1).next_power_of_two(), window_leaf(&[]));
        while level.len() > 1 {
            level = level.chunks(2).map(|pair| node(&pair[0], &pair[1])).collect();
        }
        let mut hasher = Sha256::new();
        hasher.update(b"bulbil-disk-1\0");
        hasher.update((content.len() as u64).to_le_bytes());
        hasher.update(level[0]);
        Digest(hasher.finalize().into())
    }

    fn sparse(content: &[u8]) -> Digest {
        let mut builder = DigestBuilder::new(content.len() as u64);
        for (index, window) in content.chunks(FRAME_LEN).enumerate() {
            if window.iter().any(|b| *b != 0) {
                builder.push(index as u64, window_leaf(window));
            }
        }
        builder.finish()
    }

    #[test]
    fn skipping_zero_windows_gives_the_digest_of_the_whole_content() {
        for windows in 0..12_usize {
            for data in 0..windows.max(1) {
                let mut content = vec![0_u8; windows * FRAME_LEN + if data % 2 == 1 { 512 } else { 0 }];
                for window in [data, data * 2, data * 3] {
                    if let Some(byte) = content.get_mut(window * FRAME_LEN + 77) {
                        *byte = 7;
                    }
                }
                assert_eq!(sparse(&content), naive(&content), "{windows} windows, data in {data}");
            }
        }
    }

    #[test]
    fn a_64_tib_disk_of_zeroes_is_quick_and_its_size_counts() {
        let digest = DigestBuilder::new(64 << 40).finish();
        assert_ne!(digest, DigestBuilder::new(32 << 40).finish());
        assert_ne!(DigestBuilder::new(512).finish(), DigestBuilder::new(1024).finish());
    }

    #[test]
    fn digests_never_change() {
        let mut builder = DigestBuilder::new(1 << 30);
        builder.push(3, window_leaf(b"bulbil"));
        assert_eq!(builder.finish().to_string(), GOLDEN);
    }

    /// Computed by an independent program from the definition at the head of this file.
    const GOLDEN: &str = "sha256:01d4762a2ca391c3a3883ff571b2819539a55b8469cb52cce45ee00b34acdcad";

    #[test]
    fn a_digest_parses_back() {
        let digest = DigestBuilder::new(4096).finish();
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("sha256:12".parse::<Digest>().is_err());
        assert!("md5:00".parse::<Digest>().is_err());
    }
}
