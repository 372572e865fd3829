//! Another store that has the same contents, as a place to heal from.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bulbil_types::BLOCK_LEN;

use super::heal::{FrameHealer, WantedFrame};
use crate::digest::Digest;
use crate::import::DiskSource;
use crate::store::Store;
use crate::stored_disk::StoredDisk;

/// Heals from another store that has the same contents, however it has packed them.
#[derive(Debug)]
pub struct SecondStore<'a> {
    store: &'a Store,
    /// Contents that were asked for; `None` for those that the store does not have.
    disks: Mutex<HashMap<Digest, Option<Arc<StoredDisk<'a>>>>>,
}

impl<'a> SecondStore<'a> {
    /// Heals from this store.
    #[must_use]
    pub fn new(store: &'a Store) -> Self {
        Self { store, disks: Mutex::default() }
    }

    fn disk_of(&self, digest: &Digest) -> Option<Arc<StoredDisk<'a>>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || StoredDisk::open(self.store, digest).map(Arc::new).ok();
        disks.entry(*digest).or_insert_with(open).clone()
    }
}

impl FrameHealer for SecondStore<'_> {
    fn frame(&self, wanted: &WantedFrame<'_>) -> Option<Vec<u8>> {
        let mut plain = vec![0; usize::from(wanted.blocks) * BLOCK_LEN];
        let mut found = false;
        for use_ in wanted.uses {
            let block = self.disk_of(&use_.digest).and_then(|disk| disk.block(use_.disk_block).ok());
            let start = use_.block_in_frame as usize * BLOCK_LEN;
            if let (Some(block), Some(slot)) = (block, plain.get_mut(start..start + BLOCK_LEN)) {
                slot.copy_from_slice(&block);
                found = true;
            }
        }
        found.then_some(plain)
    }

    fn disk(&self, digest: &Digest) -> Option<Box<dyn DiskSource + '_>> {
        Some(Box::new(StoredDisk::open(self.store, digest).ok()?))
    }
}
