//! Encryption of blocks in place, for files of this host: the base cache and overlays.

/// Encrypts whole 4 KiB blocks, each by its own number, without making them longer.
#[derive(Debug)]
pub struct BlockCipher {}

impl BlockCipher {
    /// Encrypts `blocks`, whole 4 KiB blocks from number `first_block`.
    pub fn encrypt(&self, _first_block: u64, _blocks: &mut [u8]) {}

    /// Decrypts `blocks`, whole 4 KiB blocks from number `first_block`.
    pub fn decrypt(&self, _first_block: u64, _blocks: &mut [u8]) {}
}
