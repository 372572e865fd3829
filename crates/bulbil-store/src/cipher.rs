//! Encryption of blocks in place, for files of this host: the base cache and overlays.
//!
//! AES-256-XTS (IEEE 1619) with the block as data unit: block `n` has the tweak `n`, 128 bits, little
//! endian. It hides content and nothing else: who can write to such a file can damage blocks or put
//! earlier ones back, and who sees it twice sees which 16 bytes have changed.

use std::fmt;

use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt as _, BlockCipherEncrypt as _, KeyInit as _};
use bulbil_types::BLOCK_LEN;
use zeroize::Zeroizing;

use crate::encryption::Secret;

const AES_BLOCK_LEN: usize = 16;

/// AES blocks that are worked on together: enough for the processor's pipeline, and the tweaks fit in
/// its first cache.
const LANES: usize = 32;

type AesBlock = Array<u8, aes::cipher::consts::U16>;

/// Encrypts whole 4 KiB blocks, each by its own number, without making them longer.
pub struct BlockCipher {
    content: Aes256,
    tweak: Aes256,
}

impl fmt::Debug for BlockCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockCipher")
    }
}

impl BlockCipher {
    fn new(key: &[u8; 64]) -> Self {
        let (content, tweak) = key.split_at(32);
        let aes = |half: &[u8]| Aes256::new_from_slice(half).expect("half of 64 bytes");
        Self { content: aes(content), tweak: aes(tweak) }
    }

    pub(crate) fn derive(key: &Secret, context: &'static str, parts: &[&[u8]]) -> Self {
        let mut derived = Zeroizing::new([0; 64]);
        key.derive_bytes(context, parts, &mut *derived);
        Self::new(&derived)
    }

    /// Encrypts `blocks`, whole 4 KiB blocks from number `first_block`.
    ///
    /// # Panics
    /// When the length is not a multiple of 4096.
    pub fn encrypt(&self, first_block: u64, blocks: &mut [u8]) {
        self.each_unit(first_block, blocks, |lanes| self.content.encrypt_blocks(lanes));
    }

    /// Decrypts `blocks`, whole 4 KiB blocks from number `first_block`.
    ///
    /// # Panics
    /// When the length is not a multiple of 4096.
    pub fn decrypt(&self, first_block: u64, blocks: &mut [u8]) {
        self.each_unit(first_block, blocks, |lanes| self.content.decrypt_blocks(lanes));
    }

    fn each_unit(&self, first_block: u64, blocks: &mut [u8], apply: impl Fn(&mut [AesBlock])) {
        assert!(blocks.len().is_multiple_of(BLOCK_LEN), "blocks are encrypted whole");
        for (unit, number) in blocks.chunks_exact_mut(BLOCK_LEN).zip(u128::from(first_block)..) {
            self.transform(number, unit, &apply);
        }
    }

    /// XTS over one data unit, which is a multiple of 16 bytes.
    fn transform(&self, unit_number: u128, unit: &mut [u8], apply: &impl Fn(&mut [AesBlock])) {
        let mut first = AesBlock::from(unit_number.to_le_bytes());
        self.tweak.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.into());
        let mut tweaks = [0_u128; LANES];
        for lanes in unit.chunks_mut(LANES * AES_BLOCK_LEN) {
            let (lanes, _) = Array::slice_as_chunks_mut(lanes);
            for kept in &mut tweaks {
                *kept = tweak;
                tweak = times_alpha(tweak);
            }
            xor(lanes, &tweaks);
            apply(lanes);
            xor(lanes, &tweaks);
        }
    }
}

fn xor(lanes: &mut [AesBlock], tweaks: &[u128; LANES]) {
    for (lane, tweak) in lanes.iter_mut().zip(tweaks) {
        *lane = (u128::from_le_bytes((*lane).into()) ^ tweak).to_le_bytes().into();
    }
}

/// Multiplies in GF(2^128) by the primitive element, with x^128 + x^7 + x^2 + x + 1.
fn times_alpha(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

/// The key of one overlay: each of its files has a cipher of its own.
#[derive(Debug)]
pub struct OverlayKey(Secret);

impl OverlayKey {
    pub(crate) fn derive(host_key: &Secret, salt: &[u8; 32]) -> Self {
        Self(host_key.derive("bulbil 2026-11 overlay", &[salt]))
    }

    /// What tells this key from others, and nothing else about it.
    #[must_use]
    pub fn check_value(&self) -> [u8; 32] {
        *self.0.derive("bulbil 2026-11 check value of an overlay's key", &[]).as_bytes()
    }

    /// The cipher of the overlay's file of this name.
    #[must_use]
    pub fn file_cipher(&self, name: &str) -> BlockCipher {
        BlockCipher::derive(&self.0, "bulbil 2026-11 file of an overlay", &[name.as_bytes()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn xts_gives_what_its_specification_says() {
        // IEEE 1619, vector 10: the first 64 bytes.
        let key = hex(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592"
        ));
        let cipher = BlockCipher::new(key[..].try_into().unwrap());
        let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
        let mut unit = plain.clone();
        cipher.transform(0xff, &mut unit, &|lanes| cipher.content.encrypt_blocks(lanes));
        let expected = concat!(
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
            "5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd"
        );
        assert_eq!(unit[..64].to_vec(), hex(expected));
        cipher.transform(0xff, &mut unit, &|lanes| cipher.content.decrypt_blocks(lanes));
        assert_eq!(unit, plain);
    }

    #[test]
    fn blocks_come_back_one_by_one_and_together() {
        let cipher = BlockCipher::new(&[7; 64]);
        let plain: Vec<u8> = (0..4 * BLOCK_LEN).map(|at| (at * 31 % 253) as u8).collect();
        let mut together = plain.clone();
        cipher.encrypt(1 << 40, &mut together);
        let mut one_by_one = plain.clone();
        for (block, number) in one_by_one.chunks_mut(BLOCK_LEN).zip(1 << 40..) {
            cipher.encrypt(number, block);
        }
        assert!(together == one_by_one && together != plain);
        cipher.decrypt(1 << 40, &mut together);
        assert!(together == plain);
    }

    #[test]
    fn the_same_block_looks_different_at_every_place_and_in_every_file() {
        let key = Secret::new([5; 32]);
        let overlay = OverlayKey::derive(&key, &[1; 32]);
        let other = OverlayKey::derive(&key, &[2; 32]);
        let mut seen = std::collections::HashSet::new();
        for cipher in [overlay.file_cipher("data.0"), overlay.file_cipher("data.1"), other.file_cipher("data.0")] {
            for number in [0, 1, u64::MAX] {
                let mut block = [0; BLOCK_LEN];
                cipher.encrypt(number, &mut block);
                assert!(block.chunks(16).all(|part| seen.insert(part.to_vec())));
            }
        }
        assert_ne!(overlay.check_value(), other.check_value());
    }

    #[test]
    fn the_keys_of_files_never_change() {
        let mut block = [0; BLOCK_LEN];
        OverlayKey::derive(&Secret::new([5; 32]), &[1; 32]).file_cipher("data.0").encrypt(3, &mut block);
        assert_eq!(
            blake3::hash(&block).to_hex().as_str(),
            "384bf225e576263a9d3008a8f937e0f6e48746eecf6baeee80991cb52d194eca"
        );
        BlockCipher::derive(&Secret::new([5; 32]), "bulbil 2026-11 base cache of a pack", &[&[1; 16]])
            .encrypt(3, &mut block);
        assert_eq!(
            blake3::hash(&block).to_hex().as_str(),
            "b7052ca86d7c95082ae9ce0928179844d948c59e5eb7571fac4b5d0c39196510"
        );
    }
}
