//! Manifests: the complete block map of one disk in one store.
//!
//! All integers are little endian.
//!
//! ```text
//! offset  bytes  what
//! 0       8      magic "BULBMANI"
//! 8       4      format version, 1
//! 12      4      flags, 0
//! 16      8      disk size in bytes
//! 24      32     digest of the disk
//! 56      4      p, packs
//! 60      4      e, extents
//! 64      8      length of the compressed body
//! 72      …      zstd of: p × (pack id 16 │ footer digest 32 │ object bytes u64)
//!                         e × (first block u48 │ blocks u16 │ pack u32 │ first block in pack u16 │ 0 u16)
//! end-32  32     BLAKE3 of everything before
//! ```
//! Extents are sorted and do not overlap; blocks that no extent names are zero. An extent's
//! blocks follow each other in one pack, over frame borders.

use bulbil_types::{BLOCK_BYTES, MAX_DISK_BYTES};

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::pack::{MAX_PACK_BYTES, PackId};

const MAGIC: &[u8; 8] = b"BULBMANI";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 72;
const PACK_BYTES: usize = 56;
const EXTENT_BYTES: usize = 16;

/// The largest manifest object: 64 TiB in the most scattered layout stays below.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 512 << 20;
const MAX_BODY_BYTES: usize = 2 << 30;

/// A pack as a manifest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRef {
    /// The pack.
    pub id: PackId,
    /// Digest that its footer must have.
    pub footer_digest: [u8; 32],
    /// Size of the pack object in bytes.
    pub len_bytes: u64,
}

/// A run of blocks that lie one after another in one pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First block of the disk.
    pub first_block: u64,
    /// Number of blocks, at least 1.
    pub blocks: u32,
    /// Position in [`Manifest::packs`].
    pub pack: u32,
    /// First block in the pack; `/ 32` is the frame, `% 32` the block in it.
    pub block_in_pack: u32,
}

impl Extent {
    /// The block after the last one.
    #[must_use]
    pub fn end_block(&self) -> u64 {
        self.first_block + u64::from(self.blocks)
    }
}

/// Adds a run of blocks in the order of the disk, to the last extent where it follows that.
pub(crate) fn push_run(extents: &mut Vec<Extent>, run: Extent) {
    if let Some(last) = extents.last_mut()
        && last.end_block() == run.first_block
        && last.pack == run.pack
        && last.block_in_pack + last.blocks == run.block_in_pack
        && last.blocks + run.blocks <= 0x1_0000
    {
        last.blocks += run.blocks;
        return;
    }
    extents.push(run);
}

/// The block map of one disk: immutable, whole, verified when it was parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    size_bytes: u64,
    digest: Digest,
    packs: Vec<PackRef>,
    extents: Vec<Extent>,
}

impl Manifest {
    pub(crate) fn new(
        size_bytes: u64,
        digest: Digest,
        packs: Vec<PackRef>,
        extents: Vec<Extent>,
    ) -> Result<Self, StoreError> {
        let manifest = Self { size_bytes, digest, packs, extents };
        manifest.check().map_err(StoreError::corrupt)?;
        Ok(manifest)
    }

    /// The manifest of a disk of zeroes.
    ///
    /// # Errors
    /// `Corrupt` when the size is over the limit.
    pub fn empty(size_bytes: u64) -> Result<Self, StoreError> {
        Self::new(size_bytes, crate::DigestBuilder::new(size_bytes).finish(), Vec::new(), Vec::new())
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The identity of the disk's content.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The packs that extents refer to.
    #[must_use]
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// The extents in ascending order.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Bytes of the disk that are not zero blocks.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.extents.iter().map(|e| u64::from(e.blocks) * BLOCK_BYTES).sum()
    }

    /// Finds the extent that holds `block`, or the next one after it.
    #[must_use]
    pub fn extent_at_or_after(&self, block: u64) -> Option<&Extent> {
        self.extents.get(self.extents.partition_point(|e| e.end_block() <= block))
    }

    fn check(&self) -> Result<(), String> {
        if self.size_bytes > MAX_DISK_BYTES {
            return Err(format!("manifest of a disk of {} bytes", self.size_bytes));
        }
        let disk_blocks = self.size_bytes.div_ceil(BLOCK_BYTES);
        let mut end = 0;
        for extent in &self.extents {
            let pack = self.packs.get(extent.pack as usize).ok_or("extent in an unknown pack")?;
            let last_in_pack = extent.block_in_pack + extent.blocks;
            if extent.blocks == 0 || extent.first_block < end || extent.end_block() > disk_blocks {
                return Err(format!("extent at block {:#x} is out of order or range", extent.first_block));
            }
            if last_in_pack > 0x1_0000 || pack.len_bytes > MAX_PACK_BYTES {
                return Err(format!("extent at block {:#x} is outside its pack", extent.first_block));
            }
            end = extent.end_block();
        }
        Ok(())
    }

    /// Encodes the manifest as one object.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, StoreError> {
        let mut body = Vec::with_capacity(self.packs.len() * PACK_BYTES + self.extents.len() * EXTENT_BYTES);
        for pack in &self.packs {
            body.extend_from_slice(&pack.id.0);
            body.extend_from_slice(&pack.footer_digest);
            body.extend_from_slice(&pack.len_bytes.to_le_bytes());
        }
        for extent in &self.extents {
            body.extend_from_slice(&extent.first_block.to_le_bytes()[..6]);
            let narrow = |value: u32| u16::try_from(value).expect("checked when the manifest was made");
            // 65536 blocks are written as 0: a run is never empty.
            body.extend_from_slice(&narrow(extent.blocks & 0xffff).to_le_bytes());
            body.extend_from_slice(&extent.pack.to_le_bytes());
            body.extend_from_slice(&narrow(extent.block_in_pack).to_le_bytes());
            body.extend_from_slice(&[0, 0]);
        }
        let body = zstd::bulk::compress(&body, 3).map_err(|e| StoreError::io("cannot compress a manifest", e))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + 32);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        bytes.extend_from_slice(&self.size_bytes.to_le_bytes());
        bytes.extend_from_slice(self.digest.as_bytes());
        for count in [self.packs.len(), self.extents.len()] {
            let count = u32::try_from(count).map_err(|_| StoreError::corrupt("too many extents for a manifest"))?;
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&body);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        Ok(bytes)
    }

    /// Parses and verifies a manifest object.
    ///
    /// # Errors
    /// `Corrupt` or `UnsupportedVersion`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let corrupt = |what: &str| StoreError::corrupt(format!("manifest: {what}"));
        let (content, hash) = bytes.split_last_chunk::<32>().ok_or_else(|| corrupt("too short"))?;
        if content.len() < HEADER_BYTES || &content[..8] != MAGIC {
            return Err(corrupt("not a manifest"));
        }
        if blake3::hash(content).as_bytes() != hash {
            return Err(corrupt("does not match its hash"));
        }
        let u32_at = |at: usize| u32::from_le_bytes(content[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().expect("8 bytes"));
        if u32_at(8) != VERSION {
            let text = format!("manifest format version {} is not known", u32_at(8));
            return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
        }
        let (packs, extents) = (u32_at(56) as usize, u32_at(60) as usize);
        let body = &content[HEADER_BYTES..];
        let plain_len = packs * PACK_BYTES + extents * EXTENT_BYTES;
        if u64_at(64) != body.len() as u64 || plain_len > MAX_BODY_BYTES {
            return Err(corrupt("wrong body length"));
        }
        let plain = zstd::bulk::decompress(body, plain_len).map_err(|_| corrupt("body does not decompress"))?;
        if plain.len() != plain_len {
            return Err(corrupt("body has a wrong length"));
        }
        let (pack_bytes, extent_bytes) = plain.split_at(packs * PACK_BYTES);
        Self::new(
            u64_at(16),
            Digest::from_bytes(content[24..56].try_into().expect("32 bytes")),
            pack_bytes.chunks_exact(PACK_BYTES).map(parse_pack).collect(),
            extent_bytes.chunks_exact(EXTENT_BYTES).map(parse_extent).collect(),
        )
    }
}

fn parse_pack(bytes: &[u8]) -> PackRef {
    PackRef {
        id: PackId(bytes[..16].try_into().expect("16 bytes")),
        footer_digest: bytes[16..48].try_into().expect("32 bytes"),
        len_bytes: u64::from_le_bytes(bytes[48..56].try_into().expect("8 bytes")),
    }
}

fn parse_extent(bytes: &[u8]) -> Extent {
    let mut first_block = [0; 8];
    first_block[..6].copy_from_slice(&bytes[..6]);
    let blocks = u16::from_le_bytes([bytes[6], bytes[7]]);
    Extent {
        first_block: u64::from_le_bytes(first_block),
        blocks: if blocks == 0 { 0x1_0000 } else { u32::from(blocks) },
        pack: u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes")),
        block_in_pack: u32::from(u16::from_le_bytes([bytes[12], bytes[13]])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let packs = (0..3_u8).map(|i| PackRef { id: PackId([i; 16]), footer_digest: [i; 32], len_bytes: 1 << 20 });
        let extents = vec![
            Extent { first_block: 0, blocks: 1, pack: 0, block_in_pack: 0 },
            Extent { first_block: 1, blocks: 0x1_0000, pack: 2, block_in_pack: 0 },
            Extent { first_block: 0x2_0000, blocks: 7, pack: 1, block_in_pack: 0xfff0 },
        ];
        Manifest::new(1 << 40, Digest::from_bytes([9; 32]), packs.collect(), extents).unwrap()
    }

    #[test]
    fn the_format_never_changes() {
        let encoded = sample().encode().unwrap();
        // What zstd makes of the body may change, the format around it may not.
        assert_eq!(encoded[..64], GOLDEN[..64]);
        let body = |bytes: &[u8]| zstd::bulk::decompress(&bytes[72..bytes.len() - 32], 4096).unwrap();
        assert_eq!(body(&encoded), body(GOLDEN));
        assert_eq!(blake3::hash(&body(GOLDEN)).to_hex().as_str(), GOLDEN_BODY);
        assert_eq!(Manifest::parse(GOLDEN).unwrap(), sample());
    }

    const GOLDEN: &[u8] = include_bytes!("../tests/fixtures/manifest-v1");
    const GOLDEN_BODY: &str = "a6353d2c378881f0a8e11c0e108a5ef6b85fe76b7be66c7daa554e3c2abeec1e";

    #[test]
    fn a_manifest_comes_back() {
        let manifest = sample();
        assert_eq!(Manifest::parse(&manifest.encode().unwrap()).unwrap(), manifest);
    }

    #[test]
    fn extents_are_found_by_block() {
        let manifest = sample();
        let first = |block| manifest.extent_at_or_after(block).map(|e| e.first_block);
        assert_eq!(
            [first(0), first(1), first(0x1_0000), first(0x1_0001), first(0x2_0006), first(0x2_0007)],
            [Some(0), Some(1), Some(1), Some(0x2_0000), Some(0x2_0000), None]
        );
    }

    #[test]
    fn damaged_manifests_are_refused() {
        let bytes = sample().encode().unwrap();
        for position in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[position] ^= 4;
            assert!(Manifest::parse(&bad).is_err(), "byte {position}");
            assert!(Manifest::parse(&bytes[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn extents_that_overlap_or_leave_the_disk_are_refused() {
        let pack = PackRef { id: PackId([0; 16]), footer_digest: [0; 32], len_bytes: 100 };
        let extent = |first_block, blocks| Extent { first_block, blocks, pack: 0, block_in_pack: 0 };
        for extents in [vec![extent(0, 2), extent(1, 1)], vec![extent(9, 2)], vec![extent(0, 0)]] {
            assert!(Manifest::new(10 * 4096, Digest::from_bytes([0; 32]), vec![pack], extents).is_err());
        }
    }
}
