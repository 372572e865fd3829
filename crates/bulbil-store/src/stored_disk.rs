//! A content of a store as a disk that can be read, for example to be imported into another store.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::import::{DiskSource, SourceError};
use crate::manifest::Manifest;
use crate::store::Store;

/// A frame that was read: its pack's position in the manifest, its number, its bytes.
type LastFrame = Option<(u32, u32, Arc<Vec<u8>>)>;

/// A content of a store, to read block by block.
#[derive(Debug)]
pub(crate) struct StoredDisk<'a> {
    store: &'a Store,
    manifest: Manifest,
    last: Mutex<LastFrame>,
}

impl<'a> StoredDisk<'a> {
    pub(crate) fn open(store: &'a Store, digest: &Digest) -> Result<Self, StoreError> {
        Ok(Self { store, manifest: store.manifest(digest)?, last: Mutex::default() })
    }

    /// Reads one block.
    pub(crate) fn block(&self, block: u64) -> Result<Vec<u8>, StoreError> {
        let Some(extent) = self.manifest.extent_at_or_after(block).filter(|extent| extent.first_block <= block) else {
            return Ok(vec![0; BLOCK_LEN]);
        };
        let offset = u32::try_from(block - extent.first_block).expect("within an extent");
        let position = extent.block_in_pack + offset;
        let frame = self.frame(extent.pack, position / 32)?;
        let start = (position % 32) as usize * BLOCK_LEN;
        let pack = self.manifest.packs()[extent.pack as usize].id;
        frame.get(start..start + BLOCK_LEN).map(<[u8]>::to_vec).ok_or_else(|| StoreError::outside_frame(pack))
    }

    fn frame(&self, pack: u32, number: u32) -> Result<Arc<Vec<u8>>, StoreError> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, _, frame)) = last.filter(|(p, n, _)| (*p, *n) == (pack, number)) {
            return Ok(frame);
        }
        let frame = Arc::new(self.store.read_frame(&self.manifest.packs()[pack as usize], number)?);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((pack, number, Arc::clone(&frame)));
        Ok(frame)
    }
}

impl DiskSource for StoredDisk<'_> {
    fn size_bytes(&self) -> u64 {
        self.manifest.size_bytes()
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let extent = self.manifest.extent_at_or_after(offset / BLOCK_BYTES);
        Ok(extent.map(|e| {
            let end = (e.end_block() * BLOCK_BYTES).min(self.manifest.size_bytes());
            (e.first_block * BLOCK_BYTES).max(offset)..end
        }))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = usize::try_from(at % BLOCK_BYTES).expect("below 4096");
            let len = (BLOCK_LEN - within).min(buf.len() - done);
            let block = self.block(at / BLOCK_BYTES)?;
            buf[done..done + len].copy_from_slice(&block[within..within + len]);
            done += len;
        }
        Ok(())
    }
}
