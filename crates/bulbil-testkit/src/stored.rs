//! A content of a store, read frame by frame.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bulbil_store::{Digest, DiskSource, Manifest, SourceError, Store, StoreError, StoreErrorKind};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

/// How often a content that is replaced while it is read is read again.
const ATTEMPTS: u32 = 20;

/// A frame: its pack's position in the manifest, its number, its bytes.
type LastFrame = Option<((u32, u32), Arc<Vec<u8>>)>;

/// A content as a disk that can be imported elsewhere.
#[derive(Debug)]
pub struct StoredContent<'a> {
    store: &'a Store,
    manifest: Manifest,
    last: Mutex<LastFrame>,
}

impl<'a> StoredContent<'a> {
    /// Opens a content by its manifest.
    ///
    /// # Errors
    /// As [`Store::manifest`].
    pub fn open(store: &'a Store, digest: &Digest) -> Result<Self, StoreError> {
        Ok(Self { store, manifest: store.manifest(digest)?, last: Mutex::default() })
    }

    /// Reads a whole content; one that is replaced meanwhile is read again.
    ///
    /// # Errors
    /// As [`Store::manifest`] and [`Store::read_frame`].
    pub fn read(store: &Store, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        for _ in 0..ATTEMPTS {
            match StoredContent::open(store, digest).and_then(|content| content.bytes()) {
                Err(error) if error.kind() == StoreErrorKind::NotFound && store.manifest(digest).is_ok() => {}
                other => return other,
            }
        }
        StoredContent::open(store, digest)?.bytes()
    }

    fn bytes(&self) -> Result<Vec<u8>, StoreError> {
        let size_bytes = self.manifest.size_bytes() as usize;
        let mut bytes = vec![0; size_bytes.next_multiple_of(BLOCK_LEN)];
        for extent in self.manifest.extents() {
            for index in 0..u64::from(extent.blocks) {
                let number = extent.first_block + index;
                self.block(number, &mut bytes[number as usize * BLOCK_LEN..][..BLOCK_LEN])?;
            }
        }
        bytes.truncate(size_bytes);
        Ok(bytes)
    }

    fn block(&self, block: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let extent = self.manifest.extent_at_or_after(block).filter(|extent| extent.first_block <= block);
        let Some(extent) = extent else {
            buf.fill(0);
            return Ok(());
        };
        let position = extent.block_in_pack + (block - extent.first_block) as u32;
        let place = (extent.pack, position / 32);
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let frame = match last.filter(|(found, _)| *found == place) {
            Some((_, frame)) => frame,
            None => Arc::new(self.store.read_frame(&self.manifest.packs()[place.0 as usize], place.1)?),
        };
        buf.copy_from_slice(&frame[position as usize % 32 * BLOCK_LEN..][..buf.len()]);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((place, frame));
        Ok(())
    }
}

impl DiskSource for StoredContent<'_> {
    fn size_bytes(&self) -> u64 {
        self.manifest.size_bytes()
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let extent = self.manifest.extent_at_or_after(offset / BLOCK_BYTES);
        Ok(extent.map(|extent| {
            let end = (extent.end_block() * BLOCK_BYTES).min(self.manifest.size_bytes());
            (extent.first_block * BLOCK_BYTES).max(offset)..end
        }))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % BLOCK_BYTES) as usize;
            let len = (BLOCK_LEN - within).min(buf.len() - done);
            let mut block = [0; BLOCK_LEN];
            self.block(at / BLOCK_BYTES, &mut block)?;
            buf[done..done + len].copy_from_slice(&block[within..within + len]);
            done += len;
        }
        Ok(())
    }
}
