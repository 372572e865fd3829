//! Frames: up to 32 blocks, hashed and compressed together.

use bulbil_types::{BLOCK_LEN, BLOCKS_PER_FRAME, FRAME_LEN};

use crate::error::StoreError;

/// zstd's default level: at 128 KiB it is 4 % smaller than level 1 and decodes as fast.
const ZSTD_LEVEL: i32 = 3;

/// How a frame's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    pub(crate) fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A frame ready to be put into a pack.
#[derive(Debug)]
pub(crate) struct EncodedFrame {
    pub(crate) hash: [u8; 32],
    pub(crate) codec: Codec,
    pub(crate) blocks: u16,
    pub(crate) stored: Vec<u8>,
}

/// Hashes and compresses `plain`, whole blocks, at most a full frame.
///
/// Bytes that gain under 3 % are stored as they are.
pub(crate) fn encode(plain: Vec<u8>, compressor: &mut zstd::bulk::Compressor<'_>) -> Result<EncodedFrame, StoreError> {
    let blocks = (plain.len() / BLOCK_LEN) as u64;
    assert!(
        plain.len().is_multiple_of(BLOCK_LEN) && (1..=BLOCKS_PER_FRAME).contains(&blocks),
        "a frame is 1 to 32 blocks"
    );
    let hash = *blake3::hash(&plain).as_bytes();
    let packed = compressor.compress(&plain).map_err(|e| StoreError::io("cannot compress a frame", e))?;
    let worth_it = packed.len() < plain.len() - plain.len() / 32;
    let (codec, stored) = if worth_it { (Codec::Zstd, packed) } else { (Codec::Raw, plain) };
    Ok(EncodedFrame { hash, codec, blocks: u16::try_from(blocks).expect("at most 32"), stored })
}

/// Makes the compressor that [`encode`] uses; one per thread.
pub(crate) fn compressor() -> Result<zstd::bulk::Compressor<'static>, StoreError> {
    zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(|e| StoreError::io("cannot start zstd", e))
}

/// Decompresses and verifies a frame.
///
/// # Errors
/// `Corrupt` when the bytes do not decode to `blocks` blocks with this hash.
pub(crate) fn decode(stored: &[u8], codec: Codec, blocks: u16, hash: &[u8; 32]) -> Result<Vec<u8>, StoreError> {
    let plain_len = usize::from(blocks) * BLOCK_LEN;
    debug_assert!(plain_len <= FRAME_LEN);
    let plain = match codec {
        Codec::Raw => stored.to_vec(),
        Codec::Zstd => decompress(stored, plain_len)
            .map_err(|e| StoreError::with_source(crate::StoreErrorKind::Corrupt, "frame does not decompress", e))?,
    };
    if plain.len() != plain_len {
        return Err(StoreError::corrupt(format!("frame holds {} bytes instead of {plain_len}", plain.len())));
    }
    if blake3::hash(&plain).as_bytes() != hash {
        return Err(StoreError::corrupt("frame does not match its hash"));
    }
    Ok(plain)
}

/// Decompresses a frame of which only the bound is known; `None` when it does not give whole blocks.
pub(crate) fn decompress_unknown(stored: &[u8]) -> Option<Vec<u8>> {
    let plain = decompress(stored, FRAME_LEN).ok()?;
    (!plain.is_empty() && plain.len().is_multiple_of(BLOCK_LEN)).then_some(plain)
}

fn decompress(stored: &[u8], plain_len: usize) -> std::io::Result<Vec<u8>> {
    thread_local! {
        // A context is 128 KiB and slow to make.
        static DECOMPRESSOR: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
            const { std::cell::RefCell::new(None) };
    }
    DECOMPRESSOR.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = Some(zstd::bulk::Decompressor::new()?);
        }
        kept.as_mut().expect("made above").decompress(stored, plain_len)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(plain: Vec<u8>) -> EncodedFrame {
        let frame = encode(plain.clone(), &mut compressor().unwrap()).unwrap();
        assert_eq!(decode(&frame.stored, frame.codec, frame.blocks, &frame.hash).unwrap(), plain);
        frame
    }

    #[test]
    fn frames_come_back_and_incompressible_ones_stay_raw() {
        assert_eq!(round_trip(vec![7; 4096 * 32]).codec, Codec::Zstd);
        let mut noise = vec![0; 8192];
        getrandom::fill(&mut noise).unwrap();
        assert_eq!(round_trip(noise).codec, Codec::Raw);
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let text: Vec<u8> = (0..4096_u32 * 4).map(|i| (i / 7 % 251) as u8).collect();
        let frame = encode(text, &mut compressor().unwrap()).unwrap();
        for position in 0..frame.stored.len() {
            let mut bad = frame.stored.clone();
            bad[position] ^= 0x10;
            let read = decode(&bad, frame.codec, frame.blocks, &frame.hash);
            // A flip that zstd ignores (a header bit) may still decode, but only to the right bytes.
            if let Ok(plain) = read {
                assert_eq!(blake3::hash(&plain).as_bytes(), &frame.hash);
            }
        }
        assert!(decode(&frame.stored[..10], frame.codec, frame.blocks, &frame.hash).is_err());
        assert!(decode(&frame.stored, frame.codec, frame.blocks + 1, &frame.hash).is_err());
    }
}
