//! Packs: immutable objects of about 16 MiB that hold frames and a footer.
//!
//! All integers are little endian. Every frame of a pack but the last holds 32 blocks, so the
//! position of a block in its pack (`block / 32` is the frame) needs no table.
//!
//! ```text
//! offset  bytes  what
//! 0       8      magic "BULBPACK"
//! 8       4      format version: 1, or 2 when encrypted
//! 12      4      0; in version 2: 1 u16 │ number of the data key u16
//! 16      16     pack id, random, never reused
//! 32      …      frames, one after another
//! F       48·n   per frame: BLAKE3 of the plain bytes (32) │ offset u64 │ stored bytes u32 │ blocks u16 │ codec u8 │ 0
//! …       16·m   per block: keyed BLAKE3, first 128 bits
//! …       16     in version 2: tag of the footer
//! end-64  8      F
//! end-56  4      n, frames
//! end-52  4      m, blocks
//! end-48  32     BLAKE3 of pack id and footer (from F to end-64): the footer digest, which manifests name
//! end-16  4      format version, as above
//! end-12  4      as at 12
//! end-8   8      magic "BULBFOOT"
//! ```
//! In version 2 each frame is encrypted after compression, and its stored bytes end with a tag of 16
//! bytes; the footer is encrypted as one, and its digest is that of the encrypted bytes. How, and why
//! no nonce repeats, is told in `encryption`.
//!
//! The footer is last so that a pack can be written in one stream, and at a fixed distance from
//! the end so that one ranged read of the tail finds it.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bulbil_types::BLOCKS_PER_FRAME;

use crate::encryption::{PackCipher, PackKeys, TAG_BYTES};
use crate::error::{StoreError, StoreErrorKind};
use crate::frame::{self, Codec, EncodedFrame};

const MAGIC: &[u8; 8] = b"BULBPACK";
const FOOTER_MAGIC: &[u8; 8] = b"BULBFOOT";
const VERSION: u32 = 1;
const ENCRYPTED_VERSION: u32 = 2;
pub(crate) const HEADER_BYTES: usize = 32;
const FRAME_RECORD_BYTES: usize = 48;
const TRAILER_BYTES: usize = 64;

/// A pack is closed when its frames reach this size: large enough that a store of a terabyte is
/// tens of thousands of objects, small enough to hold in memory while it is written.
const TARGET_BYTES: usize = 16 << 20;

/// Highly compressible frames must not make a footer that is larger than the data: and a block's
/// position in its pack fits in 16 bits.
const MAX_FRAMES: usize = 2048;

/// The largest pack object a reader accepts.
pub(crate) const MAX_PACK_BYTES: u64 = 64 << 20;

/// A block's identity for deduplication: 128 bits of BLAKE3, keyed per store.
pub(crate) type BlockHash = [u8; 16];

/// Names a pack.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub(crate) [u8; 16]);

impl PackId {
    pub(crate) fn random() -> Result<Self, StoreError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)
            .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
        Ok(Self(id))
    }

    /// The object's name: 256 directories keep listings short.
    pub(crate) fn object_name(&self) -> String {
        format!("packs/{:02x}/{self}.pack", self.0[0])
    }

    pub(crate) fn from_object_name(name: &str) -> Option<Self> {
        Self::from_hex(name.rsplit('/').next()?.strip_suffix(".pack")?)
    }

    /// Reads the 32 hexadecimal digits of an id.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        let value = (hex.len() == 32).then(|| u128::from_str_radix(hex, 16).ok())??;
        Some(Self(value.to_be_bytes()))
    }
}

impl serde::Serialize for PackId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PackId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text).ok_or_else(|| serde::de::Error::custom("not the id of a pack"))
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a frame lies in its pack and how to check it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameRecord {
    pub(crate) hash: [u8; 32],
    pub(crate) offset: u64,
    pub(crate) stored_bytes: u32,
    pub(crate) blocks: u16,
    pub(crate) codec: Codec,
}

/// A parsed and verified footer.
#[derive(Debug)]
pub(crate) struct Footer {
    pub(crate) digest: [u8; 32],
    pub(crate) frames: Vec<FrameRecord>,
    pub(crate) blocks: Vec<BlockHash>,
    /// `None` when the pack is not encrypted.
    cipher: Option<Arc<PackCipher>>,
}

impl Footer {
    /// Decrypts, decompresses and verifies a frame, which was stored as these bytes.
    ///
    /// # Errors
    /// `Corrupt` when there is no such frame, or these are not its bytes.
    pub(crate) fn decode_frame(&self, frame: u32, stored: &[u8]) -> Result<Vec<u8>, StoreError> {
        let record = self.frames.get(frame as usize).ok_or_else(|| StoreError::corrupt("no such frame"))?;
        match &self.cipher {
            None => frame::decode(stored, record.codec, record.blocks, &record.hash),
            Some(cipher) => {
                let opened = cipher.open_frame(u64::from(frame), stored);
                let opened = opened.ok_or_else(|| StoreError::corrupt("frame does not match its tag"))?;
                frame::decode(&opened, record.codec, record.blocks, &record.hash)
            }
        }
    }

    /// Makes the footer of a pack with these frames and blocks, which is not encrypted.
    pub(crate) fn new(id: PackId, frames: Vec<FrameRecord>, blocks: Vec<BlockHash>) -> Self {
        let bytes = footer_bytes(&frames, &blocks);
        Self { digest: footer_digest(id, &bytes), frames, blocks, cipher: None }
    }
}

/// Encodes the records of frames and the hashes of blocks.
fn footer_bytes(frames: &[FrameRecord], blocks: &[BlockHash]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(frames.len() * FRAME_RECORD_BYTES + blocks.len() * 16);
    for frame in frames {
        bytes.extend_from_slice(&frame.hash);
        bytes.extend_from_slice(&frame.offset.to_le_bytes());
        bytes.extend_from_slice(&frame.stored_bytes.to_le_bytes());
        bytes.extend_from_slice(&frame.blocks.to_le_bytes());
        bytes.extend_from_slice(&[frame.codec as u8, 0]);
    }
    bytes.extend_from_slice(blocks.as_flattened());
    bytes
}

/// Checks the bytes of a pack that no reader needs: its header, and what is reserved at its end.
pub(crate) fn check_unread_bytes(id: PackId, bytes: &[u8]) -> Result<(), &'static str> {
    let header = bytes.get(..HEADER_BYTES).ok_or("too short")?;
    let version_and_flags = bytes.len().checked_sub(16).and_then(|at| bytes.get(at..at + 8)).ok_or("too short")?;
    let known = match u32_at(header, 8) {
        VERSION => u32_at(header, 12) == 0,
        version => version == ENCRYPTED_VERSION && u32_at(header, 12) & 0xffff == 1,
    };
    if &header[..8] != MAGIC || !known || header[16..] != id.0 {
        return Err("the header is damaged");
    }
    if header[8..16] != *version_and_flags { Err("header and trailer do not agree") } else { Ok(()) }
}

/// A pack that is being filled.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    id: PackId,
    cipher: Option<Arc<PackCipher>>,
    bytes: Vec<u8>,
    frames: Vec<FrameRecord>,
    blocks: Vec<BlockHash>,
}

/// A finished pack, to be put as one object.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub(crate) id: PackId,
    pub(crate) bytes: Vec<u8>,
    pub(crate) footer: Footer,
}

impl PackBuilder {
    /// Begins a pack that is not encrypted; stores begin theirs with `Store::pack_builder`.
    pub(crate) fn new(id: PackId) -> Self {
        Self::with(id, None)
    }

    /// Begins an encrypted pack.
    pub(crate) fn encrypted(cipher: PackCipher) -> Self {
        Self::with(cipher.id, Some(Arc::new(cipher)))
    }

    fn with(id: PackId, cipher: Option<Arc<PackCipher>>) -> Self {
        let mut bytes = Vec::with_capacity(TARGET_BYTES + (1 << 20));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&version_and_flags(cipher.as_deref()));
        bytes.extend_from_slice(&id.0);
        Self { id, cipher, bytes, frames: Vec::new(), blocks: Vec::new() }
    }

    /// Adds a frame and the hashes of its blocks, in order.
    pub(crate) fn push(&mut self, frame: &EncodedFrame, hashes: &[BlockHash]) {
        let previous_full = self.frames.last().is_none_or(|f| u64::from(f.blocks) == BLOCKS_PER_FRAME);
        assert!(previous_full && hashes.len() == usize::from(frame.blocks), "only the last frame may be short");
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(&frame.stored);
        if let Some(cipher) = &self.cipher {
            cipher.seal_frame(self.frames.len() as u64, &mut self.bytes, offset);
        }
        self.frames.push(FrameRecord {
            hash: frame.hash,
            offset: offset as u64,
            stored_bytes: u32::try_from(self.bytes.len() - offset).expect("a frame is at most 128 KiB"),
            blocks: frame.blocks,
            codec: frame.codec,
        });
        self.blocks.extend_from_slice(hashes);
    }

    /// The most frames a pack may hold.
    pub(crate) const MAX_FRAMES: usize = MAX_FRAMES;

    /// Whether its first `frames` frames alone reach the target size.
    pub(crate) fn is_full_with(&self, frames: usize) -> bool {
        let end = frames.checked_sub(1).and_then(|last| self.frames.get(last));
        end.is_some_and(|frame| frame.offset + u64::from(frame.stored_bytes) >= TARGET_BYTES as u64)
    }

    pub(crate) fn finish(mut self) -> FinishedPack {
        let footer_offset = self.bytes.len();
        self.bytes.extend_from_slice(&footer_bytes(&self.frames, &self.blocks));
        let mut places = (footer_offset as u64).to_le_bytes().to_vec();
        places.extend_from_slice(&u32::try_from(self.frames.len()).expect("bounded").to_le_bytes());
        places.extend_from_slice(&u32::try_from(self.blocks.len()).expect("bounded").to_le_bytes());
        let version = version_and_flags(self.cipher.as_deref());
        if let Some(cipher) = &self.cipher {
            cipher.seal_footer(&[&places[..], &version].concat(), &mut self.bytes, footer_offset);
        }
        let digest = footer_digest(self.id, &self.bytes[footer_offset..]);
        self.bytes.extend_from_slice(&places);
        self.bytes.extend_from_slice(&digest);
        self.bytes.extend_from_slice(&version);
        self.bytes.extend_from_slice(FOOTER_MAGIC);
        let footer = Footer { digest, frames: self.frames, blocks: self.blocks, cipher: self.cipher };
        FinishedPack { id: self.id, bytes: self.bytes, footer }
    }
}

/// The 8 bytes that follow the magic of the header and stand before that of the trailer.
fn version_and_flags(cipher: Option<&PackCipher>) -> [u8; 8] {
    let mut bytes = [0; 8];
    let version = if cipher.is_some() { ENCRYPTED_VERSION } else { VERSION };
    bytes[..4].copy_from_slice(&version.to_le_bytes());
    if let Some(cipher) = cipher {
        bytes[4..6].copy_from_slice(&1_u16.to_le_bytes());
        bytes[6..].copy_from_slice(&cipher.number.to_le_bytes());
    }
    bytes
}

fn footer_digest(id: PackId, footer: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(&id.0).update(footer).finalize().as_bytes()
}

/// How many bytes from the end to read first: they hold the footer of a usual pack, and say where a larger one begins.
pub(crate) fn tail_guess_bytes(pack_bytes: u64) -> u64 {
    // A usual pack: 16 MiB at a ratio of 2 to 3 is 300 frames, 560 footer bytes each.
    pack_bytes.min(256 << 10)
}

/// Tells how many bytes from the end hold trailer and footer.
///
/// # Errors
/// `Corrupt` or `UnsupportedVersion`.
pub(crate) fn footer_span(tail: &[u8], pack_bytes: u64) -> Result<u64, StoreError> {
    let trailer = parse_trailer(tail)?;
    let span = pack_bytes.checked_sub(trailer.footer_offset).filter(|span| *span <= MAX_PACK_BYTES);
    let tag_bytes = if trailer.data_key.is_some() { TAG_BYTES as u64 } else { 0 };
    let expected = u64::from(trailer.frames) * FRAME_RECORD_BYTES as u64
        + u64::from(trailer.blocks) * 16
        + tag_bytes
        + TRAILER_BYTES as u64;
    span.filter(|span| *span == expected).ok_or_else(|| StoreError::corrupt("pack trailer does not fit its size"))
}

struct Trailer {
    footer_offset: u64,
    frames: u32,
    blocks: u32,
    digest: [u8; 32],
    /// Number of the data key; `None` when the pack is not encrypted.
    data_key: Option<u16>,
    /// What is authenticated with an encrypted footer: everything but the digest and the magic.
    authenticated: Vec<u8>,
}

fn parse_trailer(tail: &[u8]) -> Result<Trailer, StoreError> {
    let trailer = tail.len().checked_sub(TRAILER_BYTES).and_then(|start| tail.get(start..));
    let trailer =
        trailer.filter(|t| &t[56..] == FOOTER_MAGIC).ok_or_else(|| StoreError::corrupt("pack has no footer"))?;
    let flags = u32_at(trailer, 52);
    let data_key = match u32_at(trailer, 48) {
        VERSION => None,
        // The lower half is 1, the upper half the number.
        ENCRYPTED_VERSION if flags & 0xffff == 1 => Some((flags >> 16) as u16),
        version => {
            let text = format!("pack format version {version} is not known");
            return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
        }
    };
    Ok(Trailer {
        footer_offset: u64_at(trailer, 0),
        frames: u32_at(trailer, 8),
        blocks: u32_at(trailer, 12),
        digest: trailer[16..48].try_into().expect("32 bytes"),
        data_key,
        authenticated: [&trailer[..16], &trailer[48..56]].concat(),
    })
}

/// Parses the last bytes of a pack, which must hold the whole footer (see [`footer_span`]).
///
/// A store has `keys` when it is encrypted. Then all its packs are, and else none.
///
/// # Errors
/// `Corrupt` when anything does not fit or verify, `Key` when there is no key for it.
pub(crate) fn parse_footer(
    id: PackId,
    tail: &[u8],
    pack_bytes: u64,
    keys: Option<&dyn PackKeys>,
) -> Result<Footer, StoreError> {
    let corrupt = |what: &str| StoreError::corrupt(format!("pack {id}: {what}"));
    let span = footer_span(tail, pack_bytes)?;
    let start = usize::try_from(span).ok().and_then(|span| tail.len().checked_sub(span));
    let footer = start.map(|start| &tail[start..tail.len() - TRAILER_BYTES]).ok_or_else(|| corrupt("footer is cut"))?;
    let trailer = parse_trailer(tail)?;
    if footer_digest(id, footer) != trailer.digest {
        return Err(corrupt("footer does not match its digest"));
    }
    let cipher = match (trailer.data_key, keys) {
        (None, None) => None,
        (Some(number), Some(keys)) => Some(Arc::new(keys.pack_cipher(number, id)?)),
        (None, Some(_)) => return Err(corrupt("is not encrypted, and the store is")),
        (Some(_), None) => return Err(corrupt("is encrypted, and the store is not")),
    };
    let opened = match &cipher {
        None => Cow::Borrowed(footer),
        Some(cipher) => {
            let opened = cipher.open_footer(&trailer.authenticated, footer);
            Cow::Owned(opened.ok_or_else(|| corrupt("footer does not match its tag"))?)
        }
    };
    let (records, hashes) = opened.split_at(trailer.frames as usize * FRAME_RECORD_BYTES);
    let frames = records.chunks_exact(FRAME_RECORD_BYTES).map(parse_record).collect::<Option<Vec<_>>>();
    let frames = frames.ok_or_else(|| corrupt("unknown frame codec"))?;
    let blocks: Vec<BlockHash> = hashes.chunks_exact(16).map(|h| h.try_into().expect("16 bytes")).collect();
    check_records(&frames, blocks.len(), trailer.footer_offset).map_err(corrupt)?;
    Ok(Footer { digest: trailer.digest, frames, blocks, cipher })
}

fn parse_record(record: &[u8]) -> Option<FrameRecord> {
    Some(FrameRecord {
        hash: record[..32].try_into().ok()?,
        offset: u64_at(record, 32),
        stored_bytes: u32_at(record, 40),
        blocks: u16::from_le_bytes(record[44..46].try_into().ok()?),
        codec: Codec::from_u8(record[46])?,
    })
}

fn check_records(frames: &[FrameRecord], blocks: usize, footer_offset: u64) -> Result<(), &'static str> {
    let mut offset = HEADER_BYTES as u64;
    let mut counted = 0_usize;
    for (index, frame) in frames.iter().enumerate() {
        let full = u64::from(frame.blocks) == BLOCKS_PER_FRAME;
        let last = index + 1 == frames.len();
        if frame.blocks == 0 || u64::from(frame.blocks) > BLOCKS_PER_FRAME || !(full || last) {
            return Err("a frame has a wrong number of blocks");
        }
        if frame.offset != offset {
            return Err("frames overlap or leave a gap");
        }
        offset += u64::from(frame.stored_bytes);
        counted += usize::from(frame.blocks);
    }
    if offset != footer_offset || counted != blocks || frames.len() > MAX_FRAMES {
        return Err("footer does not describe the pack");
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encryption::Secret;

    fn sample() -> FinishedPack {
        let mut compressor = crate::frame::compressor().unwrap();
        let mut builder = PackBuilder::new(PackId([0xab; 16]));
        for (value, blocks) in [(1_u8, 32_usize), (2, 32), (3, 5)] {
            let frame = crate::frame::encode(vec![value; blocks * 4096], &mut compressor).unwrap();
            builder.push(&frame, &vec![[value; 16]; blocks]);
        }
        builder.finish()
    }

    #[test]
    fn a_footer_comes_back() {
        let pack = sample();
        let footer = parse_footer(pack.id, &pack.bytes, pack.bytes.len() as u64, None).unwrap();
        assert_eq!(footer.frames, pack.footer.frames);
        assert_eq!(footer.blocks, pack.footer.blocks);
        assert_eq!(footer.digest, pack.footer.digest);
        assert_eq!(PackId::from_object_name(&pack.id.object_name()), Some(pack.id));
    }

    #[test]
    fn no_changed_footer_byte_goes_unnoticed_and_none_panics() {
        let pack = sample();
        let start = pack.footer.frames.iter().map(|f| f.offset + u64::from(f.stored_bytes)).max().unwrap() as usize;
        for position in start..pack.bytes.len() {
            for flip in [1, 0x80] {
                let mut bad = pack.bytes.clone();
                bad[position] ^= flip;
                let parsed = parse_footer(pack.id, &bad, bad.len() as u64, None);
                let reserved = (pack.bytes.len() - 12..pack.bytes.len() - 8).contains(&position);
                assert!(parsed.is_err() || reserved, "byte {position}");
            }
        }
        for len in 0..pack.bytes.len() {
            assert!(parse_footer(pack.id, &pack.bytes[..len], len as u64, None).is_err());
        }
        let other = parse_footer(PackId([1; 16]), &pack.bytes, pack.bytes.len() as u64, None);
        assert!(other.is_err(), "another pack's footer");
    }

    #[test]
    fn the_format_never_changes() {
        // Raw frames: what zstd makes of a text may change, the format around it may not.
        let mut builder = PackBuilder::new(PackId([0xcd; 16]));
        for (value, blocks) in [(1_u8, 32_u16), (2, 3)] {
            let plain = vec![value; usize::from(blocks) * 4096];
            let hash = *blake3::hash(&plain).as_bytes();
            let frame = EncodedFrame { hash, codec: Codec::Raw, blocks, stored: plain };
            builder.push(&frame, &vec![[value; 16]; usize::from(blocks)]);
        }
        let pack = builder.finish();
        let hash = blake3::hash(&pack.bytes).to_hex();
        assert_eq!((pack.bytes.len(), hash.as_str()), GOLDEN);
    }

    const GOLDEN: (usize, &str) = (144_112, "e54c44fddd819692876f6868a6124c603539ebaf875c4a6aac3ee21f3f1bf465");

    /// A store's keys, of which the one with the number 3 is known.
    struct Keys;

    impl PackKeys for Keys {
        fn pack_cipher(&self, number: u16, id: PackId) -> Result<PackCipher, StoreError> {
            let known = (number == 3).then(|| PackCipher::new(&Secret::new([9; 32]), number, id));
            known.ok_or_else(|| StoreError::new(StoreErrorKind::Key, "no such key"))
        }
    }

    fn encrypted() -> FinishedPack {
        let id = PackId([0xcd; 16]);
        let mut builder = PackBuilder::encrypted(Keys.pack_cipher(3, id).unwrap());
        for (value, blocks) in [(1_u8, 32_u16), (2, 3)] {
            let plain = vec![value; usize::from(blocks) * 4096];
            let hash = *blake3::hash(&plain).as_bytes();
            let frame = EncodedFrame { hash, codec: Codec::Raw, blocks, stored: plain };
            builder.push(&frame, &vec![[value; 16]; usize::from(blocks)]);
        }
        builder.finish()
    }

    fn parse(bytes: &[u8]) -> Result<Footer, StoreError> {
        parse_footer(PackId([0xcd; 16]), bytes, bytes.len() as u64, Some(&Keys))
    }

    #[test]
    fn an_encrypted_pack_comes_back_with_its_key_only() {
        let pack = encrypted();
        let footer = parse(&pack.bytes).unwrap();
        assert_eq!(
            (&footer.frames, &footer.blocks, footer.digest),
            (&pack.footer.frames, &pack.footer.blocks, pack.footer.digest)
        );
        for (number, value) in [(0, 1_u8), (1, 2)] {
            let record = footer.frames[number as usize];
            let stored = &pack.bytes[record.offset as usize..][..record.stored_bytes as usize];
            let plain = footer.decode_frame(number, stored).unwrap();
            assert!(plain.iter().all(|byte| *byte == value) && plain.len() + 16 == stored.len());
            assert!(!stored.windows(8).any(|bytes| bytes == [value; 8]));
            assert!(footer.decode_frame(1 - number, stored).is_err(), "a frame at another place");
            for position in [0, 5000, stored.len() - 17, stored.len() - 16, stored.len() - 1] {
                let mut bad = stored.to_vec();
                bad[position] ^= 1;
                assert!(footer.decode_frame(number, &bad).is_err(), "byte {position}");
            }
        }
        let len = pack.bytes.len() as u64;
        assert!(parse_footer(pack.id, &pack.bytes, len, None).is_err(), "a store that is not encrypted");
        let plain = sample();
        assert!(parse_footer(plain.id, &plain.bytes, plain.bytes.len() as u64, Some(&Keys)).is_err(), "a plain pack");
    }

    #[test]
    fn no_changed_byte_of_an_encrypted_footer_goes_unnoticed() {
        let pack = encrypted();
        let last = pack.footer.frames[1];
        for position in (last.offset + u64::from(last.stored_bytes)) as usize..pack.bytes.len() {
            for flip in [1, 0x80] {
                let mut bad = pack.bytes.clone();
                bad[position] ^= flip;
                // Whoever can change the footer can make its digest fit.
                let digest =
                    footer_digest(pack.id, &bad[last.offset as usize + last.stored_bytes as usize..bad.len() - 64]);
                assert!(parse(&bad).is_err(), "byte {position}");
                let at = bad.len() - 48;
                if !(at..at + 32).contains(&position) {
                    bad[at..at + 32].copy_from_slice(&digest);
                    assert!(parse(&bad).is_err(), "byte {position}, with its digest");
                }
            }
        }
    }

    #[test]
    fn the_encrypted_format_never_changes() {
        let pack = encrypted();
        let hash = blake3::hash(&pack.bytes).to_hex();
        assert_eq!((pack.bytes.len(), hash.as_str()), GOLDEN_ENCRYPTED);
    }

    const GOLDEN_ENCRYPTED: (usize, &str) =
        (144_160, "56fe6cd5742658de57be1bc813cab21e808a89da0080f0afa029986474313b66");
}
