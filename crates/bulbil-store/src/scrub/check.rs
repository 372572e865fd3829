//! Reads one pack again and says what of it does not verify.

use std::sync::Arc;

use crate::error::{StoreError, StoreErrorKind};
use crate::pack::{self, Footer, MAX_PACK_BYTES, PackId};
use crate::pack_rebuild;
use crate::store::Store;

/// What was found in a pack.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) id: PackId,
    pub(super) len_bytes: u64,
    /// What is wrong with the pack as a whole.
    pub(super) reason: Option<String>,
    /// Frames that cannot be read.
    pub(super) frames: Vec<u32>,
    /// Frames whose bytes are right, but have other block hashes than the footer says.
    pub(super) other_hashes: Vec<u32>,
    pub(super) sound_frames: u64,
    /// The footer, also one that was made again from the frames.
    pub(super) footer: Option<Arc<Footer>>,
    /// Whether the footer in the object cannot be read.
    pub(super) footer_damaged: bool,
}

impl Finding {
    pub(super) fn is_damaged(&self) -> bool {
        self.reason.is_some() || !self.frames.is_empty()
    }
}

impl Store {
    /// Checks a pack; `None` when it is not there any more.
    ///
    /// # Errors
    /// `Timeout`.
    pub(super) fn check_pack(&self, id: PackId, len_bytes: u64) -> Result<Option<Finding>, StoreError> {
        let mut finding = Finding {
            id,
            len_bytes,
            reason: None,
            frames: Vec::new(),
            other_hashes: Vec::new(),
            sound_frames: 0,
            footer: None,
            footer_damaged: false,
        };
        let bytes = match self.objects.get(&id.object_name(), MAX_PACK_BYTES) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == StoreErrorKind::NotFound => return Ok(None),
            // A disk that cannot read one sector can read the others.
            Err(e) if matches!(e.kind(), StoreErrorKind::Io | StoreErrorKind::Corrupt) => {
                finding.reason = Some(format!("cannot be read as a whole: {e}"));
                None
            }
            Err(e) => return Err(e),
        };
        let footer = match &bytes {
            Some(bytes) => {
                if let Err(reason) = pack::check_unread_bytes(id, bytes) {
                    finding.reason = Some(reason.to_owned());
                }
                pack::parse_footer(id, bytes, bytes.len() as u64, self.pack_keys()).map(Arc::new)
            }
            None => self.footer(id, len_bytes),
        };
        finding.footer = match footer {
            Ok(footer) => Some(footer),
            // A key that is not there is no damage.
            Err(e) if matches!(e.kind(), StoreErrorKind::Timeout | StoreErrorKind::Key) => return Err(e),
            Err(e) => {
                finding.reason = Some(e.to_string());
                finding.footer_damaged = true;
                // Where an encrypted frame ends only the footer tells.
                let plain = bytes.as_ref().filter(|_| !self.is_encrypted());
                plain.and_then(|bytes| pack_rebuild::rebuild(id, bytes, |block| self.block_hash(block))).map(Arc::new)
            }
        };
        if let Some(footer) = finding.footer.clone().filter(|_| !finding.footer_damaged) {
            self.check_frames(&footer, bytes.as_deref(), &mut finding)?;
        }
        Ok(Some(finding))
    }

    fn check_frames(&self, footer: &Footer, bytes: Option<&[u8]>, finding: &mut Finding) -> Result<(), StoreError> {
        let mut first_block = 0;
        for (record, number) in footer.frames.iter().zip(0_u32..) {
            let hashes = &footer.blocks[first_block..first_block + usize::from(record.blocks)];
            first_block += usize::from(record.blocks);
            match self.plain_of(finding.id, footer, number, bytes) {
                Ok(plain) => {
                    let same = plain.chunks_exact(bulbil_types::BLOCK_LEN).zip(hashes);
                    if same.clone().all(|(block, hash)| self.block_hash(block) == *hash) {
                        finding.sound_frames += 1;
                    } else {
                        finding.other_hashes.push(number);
                    }
                }
                Err(e) if e.kind() == StoreErrorKind::Timeout => return Err(e),
                Err(_) => finding.frames.push(number),
            }
        }
        Ok(())
    }

    /// Reads and verifies a frame, from the pack's bytes where they are at hand.
    pub(super) fn plain_of(
        &self,
        id: PackId,
        footer: &Footer,
        number: u32,
        bytes: Option<&[u8]>,
    ) -> Result<Vec<u8>, StoreError> {
        let record = footer.frames.get(number as usize).ok_or_else(|| StoreError::outside_frame(id))?;
        let len = record.stored_bytes as usize;
        let stored = match bytes {
            Some(bytes) => {
                let start = usize::try_from(record.offset).unwrap_or(usize::MAX);
                let stored = start.checked_add(len).and_then(|end| bytes.get(start..end));
                stored.ok_or_else(|| StoreError::outside_frame(id))?.to_vec()
            }
            None => self.objects.get_range(&id.object_name(), record.offset, len)?,
        };
        footer.decode_frame(number, &stored)
    }
}
