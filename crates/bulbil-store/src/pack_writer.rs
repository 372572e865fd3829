//! Blocks into new packs, densely and in order, one after another.

use crate::error::StoreError;
use crate::frame;
use crate::manifest::PackRef;
use crate::pack::{BlockHash, PackBuilder, PackId};
use crate::store::Store;

use bulbil_types::{BLOCK_LEN, BLOCKS_PER_FRAME, FRAME_LEN};

/// Fills packs and puts each when it is full.
pub(crate) struct PackWriter<'a> {
    store: &'a Store,
    compressor: zstd::bulk::Compressor<'static>,
    open: Option<PackBuilder>,
    frames: u32,
    plain: Vec<u8>,
    hashes: Vec<BlockHash>,
    /// Packs that were put, durable.
    finished: Vec<PackRef>,
}

impl<'a> PackWriter<'a> {
    pub(crate) fn new(store: &'a Store) -> Result<Self, StoreError> {
        let compressor = frame::compressor()?;
        let (plain, hashes) = (Vec::with_capacity(FRAME_LEN), Vec::new());
        Ok(Self { store, compressor, open: None, frames: 0, plain, hashes, finished: Vec::new() })
    }

    /// Adds a block; returns the position of its pack among all that [`finish`](Self::finish) gives, and its
    /// own position in that.
    pub(crate) fn push(&mut self, block: &[u8], hash: &BlockHash) -> Result<(u32, u16), StoreError> {
        assert_eq!(block.len(), BLOCK_LEN, "whole blocks only");
        if self.open.is_none() {
            self.open = Some(self.store.pack_builder(PackId::random()?)?);
            self.frames = 0;
        }
        let pack = u32::try_from(self.finished.len()).expect("far fewer packs are written at once");
        let in_frame = u32::try_from(self.hashes.len()).expect("at most 32");
        let frame_blocks = u32::try_from(BLOCKS_PER_FRAME).expect("32");
        let position = u16::try_from(self.frames * frame_blocks + in_frame).expect("a pack holds 65536 blocks");
        self.plain.extend_from_slice(block);
        self.hashes.push(*hash);
        if self.plain.len() == FRAME_LEN {
            self.end_frame()?;
            let open = self.open.as_ref().expect("opened above");
            if open.is_full_with(self.frames as usize) || self.frames as usize == PackBuilder::MAX_FRAMES {
                self.end_pack()?;
            }
        }
        Ok((pack, position))
    }

    /// Puts what is left and returns all packs, durable.
    pub(crate) fn finish(mut self) -> Result<Vec<PackRef>, StoreError> {
        self.end_pack()?;
        Ok(self.finished)
    }

    fn end_frame(&mut self) -> Result<(), StoreError> {
        let Some(open) = self.open.as_mut().filter(|_| !self.plain.is_empty()) else { return Ok(()) };
        let plain = std::mem::replace(&mut self.plain, Vec::with_capacity(FRAME_LEN));
        open.push(&frame::encode(plain, &mut self.compressor)?, &self.hashes);
        self.hashes.clear();
        self.frames += 1;
        Ok(())
    }

    fn end_pack(&mut self) -> Result<(), StoreError> {
        self.end_frame()?;
        let Some(open) = self.open.take() else { return Ok(()) };
        let pack = open.finish();
        self.store.objects.put_if_absent(&pack.id.object_name(), &pack.bytes)?;
        let len_bytes = pack.bytes.len() as u64;
        self.finished.push(PackRef { id: pack.id, footer_digest: pack.footer.digest, len_bytes });
        Ok(())
    }
}
