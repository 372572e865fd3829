//! The footer of a pack, made again from its frames.
//!
//! Frames follow each other from byte 32, each a zstd frame, which knows its own length, or plain bytes. The
//! size of the object then tells where they end: 48 bytes for each frame and 16 for each block come after
//! them, and 64 at last. Whether the guess is right is told by the footer digest in manifests.

use bulbil_types::{BLOCK_LEN, FRAME_LEN};

use crate::frame::{self, Codec};
use crate::pack::{BlockHash, Footer, FrameRecord, HEADER_BYTES, PackBuilder, PackId};

const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// Makes the footer of a pack whose own footer cannot be read; `None` when its frames cannot be read either.
pub(crate) fn rebuild(id: PackId, bytes: &[u8], hash: impl Fn(&[u8]) -> BlockHash) -> Option<Footer> {
    let (mut frames, mut blocks) = (Vec::new(), Vec::new());
    let mut offset = HEADER_BYTES;
    while !ends_at(bytes.len(), offset, frames.len(), blocks.len()) {
        if frames.len() == PackBuilder::MAX_FRAMES {
            return None;
        }
        let (codec, stored_len, plain) = frame_at(bytes, offset, frames.len(), blocks.len())?;
        blocks.extend(plain.chunks_exact(BLOCK_LEN).map(&hash));
        frames.push(FrameRecord {
            hash: *blake3::hash(&plain).as_bytes(),
            offset: offset as u64,
            stored_bytes: u32::try_from(stored_len).ok()?,
            blocks: u16::try_from(plain.len() / BLOCK_LEN).ok()?,
            codec,
        });
        offset += stored_len;
    }
    Some(Footer::new(id, frames, blocks))
}

/// Whether an object of this size ends its frames here.
fn ends_at(len: usize, offset: usize, frames: usize, blocks: usize) -> bool {
    frames > 0 && offset + frames * 48 + blocks * 16 + 64 == len
}

/// The frame that begins here: its codec, its stored bytes, its plain bytes.
fn frame_at(bytes: &[u8], offset: usize, frames: usize, blocks: usize) -> Option<(Codec, usize, Vec<u8>)> {
    let rest = bytes.get(offset..)?;
    if rest.starts_with(&ZSTD_MAGIC)
        && let Ok(stored_len) = zstd::zstd_safe::find_frame_compressed_size(rest)
        && let Some(plain) = frame::decompress_unknown(rest.get(..stored_len)?)
    {
        return Some((Codec::Zstd, stored_len, plain));
    }
    let short = (1..=FRAME_LEN / BLOCK_LEN).map(|count| count * BLOCK_LEN);
    let mut last = short.filter(|len| ends_at(bytes.len(), offset + len, frames + 1, blocks + len / BLOCK_LEN));
    let len = last.next().unwrap_or(FRAME_LEN);
    Some((Codec::Raw, len, rest.get(..len)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{compressor, encode};

    #[test]
    fn the_footer_of_every_mixture_of_frames_comes_back() {
        let mut noise = vec![0; FRAME_LEN];
        getrandom::fill(&mut noise).unwrap();
        let hash = |block: &[u8]| *blake3::hash(block).as_bytes().first_chunk().unwrap();
        for shape in 0..8_u8 {
            for last_blocks in [1, 7, 32] {
                let id = PackId([shape; 16]);
                let mut builder = PackBuilder::new(id);
                for frame in 0..3_u8 {
                    let len = if frame == 2 { last_blocks * BLOCK_LEN } else { FRAME_LEN };
                    let plain = if shape >> frame & 1 == 0 { vec![frame + 1; len] } else { noise[..len].to_vec() };
                    let hashes: Vec<_> = plain.chunks_exact(BLOCK_LEN).map(hash).collect();
                    builder.push(&encode(plain, &mut compressor().unwrap()).unwrap(), &hashes);
                }
                let mut pack = builder.finish();
                let footer_bytes = pack.footer.frames.len() * 48 + pack.footer.blocks.len() * 16 + 64;
                let start = pack.bytes.len() - footer_bytes;
                pack.bytes[start..].fill(0);
                let rebuilt = rebuild(id, &pack.bytes, hash).unwrap();
                assert_eq!(rebuilt.digest, pack.footer.digest, "shape {shape}, {last_blocks} blocks");
            }
        }
    }
}
