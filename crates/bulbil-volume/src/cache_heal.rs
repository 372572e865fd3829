//! The base cache as a place from which damaged frames of a store are healed.

use bulbil_store::{FrameHealer, Store, WantedFrame};
use bulbil_types::BLOCK_LEN;

use crate::cache::BaseCache;
use crate::cache_file::CacheFile;

/// Frames of this host's base cache, for [`Store::scrub`].
#[derive(Debug)]
pub struct CacheHealer<'a> {
    cache: &'a BaseCache,
    store: &'a Store,
}

impl<'a> CacheHealer<'a> {
    /// Heals a store from its cache.
    #[must_use]
    pub fn new(cache: &'a BaseCache, store: &'a Store) -> Self {
        Self { cache, store }
    }
}

impl FrameHealer for CacheHealer<'_> {
    fn frame(&self, wanted: &WantedFrame<'_>) -> Option<Vec<u8>> {
        let shared = self.cache.shared();
        // Opening would make a file.
        if !shared.directory.join(format!("{}.frames", wanted.pack)).exists() {
            return None;
        }
        let cipher = self.store.cache_cipher(wanted.pack);
        let file = CacheFile::open(&shared.directory, wanted.pack, &shared.boot_id, cipher).ok()?;
        let mut plain = vec![0; usize::from(wanted.blocks) * BLOCK_LEN];
        (file.has(wanted.frame) && file.read(wanted.frame, 0, &mut plain).is_ok()).then_some(plain)
    }
}
