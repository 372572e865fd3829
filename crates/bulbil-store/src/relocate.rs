//! Moves the blocks in use of some packs into new packs, and gives every manifest that refers to them a
//! new edition. Repacking and healing are this.
//!
//! ```text
//! lease ─► manifests are read ─► blocks are copied ─► new packs are put ─► editions are announced and put
//! ```
//! The packs themselves stay: when nothing refers to them any more, collections delete them. A kill
//! anywhere leaves manifests of which each is whole, and perhaps new packs that nothing refers to.

use std::collections::{HashMap, HashSet};

use bulbil_types::BLOCK_LEN;

use crate::error::{StoreError, StoreErrorKind};
use crate::import::block_hash;
use crate::lease::WriteLease;
use crate::liveness::{self, BlockSet, Liveness};
use crate::manifest::{Extent, Manifest, PackRef, push_run};
use crate::pack::{BlockHash, Footer, PackId};
use crate::pack_writer::PackWriter;
use crate::publish::{Stored, next_edition};
use crate::published::Published;
use crate::store::Store;

/// A pack whose blocks are to be moved.
#[derive(Debug, Clone)]
pub(crate) struct Moving {
    pub(crate) pack: PackRef,
    pub(crate) footer: std::sync::Arc<Footer>,
}

/// Gives the plain bytes of frames that are to be moved.
pub(crate) trait FrameSource {
    /// The bytes of a frame; those of the blocks in `wanted`, positions in the frame, must be right and
    /// are checked, the others may be anything.
    fn frame(&self, moving: &Moving, frame: u32, wanted: &[u32]) -> Result<Vec<u8>, StoreError>;
}

/// What was moved.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Packs whose blocks in use were all copied.
    pub(crate) packs: Vec<PackId>,
    /// Packs of which a block could not be read, with the reason; nothing of them was moved.
    pub(crate) failed: Vec<(PackId, StoreError)>,
    pub(crate) blocks: u64,
    pub(crate) new_packs: Vec<PackRef>,
    /// Manifests that got a new edition.
    pub(crate) manifests: u64,
    /// Manifests that stay as they are for now: they refer to a pack that may be going.
    pub(crate) postponed: u64,
}

/// Where the blocks of one pack went: the position of a new pack and of the block in it.
type Targets = HashMap<u32, (u32, u16)>;

impl Store {
    /// Moves packs.
    ///
    /// # Errors
    /// `Corrupt` when a manifest cannot be read and `strict`; `Io`, `NoSpace`, `Timeout`.
    pub(crate) fn relocate(
        &self,
        purpose: &str,
        packs: &[Moving],
        source: &dyn FrameSource,
        strict: bool,
    ) -> Result<Moved, StoreError> {
        let mut lease = WriteLease::begin(self, purpose)?;
        let wanted: HashSet<_> = packs.iter().map(|moving| moving.pack.id).collect();
        let mut live = Liveness::new();
        let mut affected = Vec::new();
        let marks = self.mark(&mut |published, manifest| {
            if manifest.packs().iter().any(|pack| wanted.contains(&pack.id)) {
                liveness::add(&mut live, manifest);
                live.retain(|id, _| wanted.contains(id));
                affected.push(published.clone());
            }
        })?;
        let marks = if strict { marks.all_readable()? } else { marks };
        let mut moved = Moved::default();
        let mut targets: HashMap<PackId, Targets> = HashMap::new();
        let mut writer = PackWriter::new(self)?;
        for moving in packs {
            let Some(blocks) = live.get(&moving.pack.id) else { continue };
            lease.check()?;
            match self.copy_blocks(moving, blocks, source, &mut writer) {
                Ok(copied) => {
                    moved.blocks += copied.len() as u64;
                    moved.packs.push(moving.pack.id);
                    targets.insert(moving.pack.id, copied);
                }
                Err(e) if is_of_pack(e.kind()) => moved.failed.push((moving.pack.id, e)),
                Err(e) => return Err(e),
            }
        }
        moved.new_packs = writer.finish()?;
        let current: HashSet<_> = marks.current.iter().collect();
        affected.retain(|published| current.contains(published));
        self.put_editions(&mut lease, &affected, &targets, &mut moved)?;
        Ok(moved)
    }

    fn copy_blocks(
        &self,
        moving: &Moving,
        blocks: &BlockSet,
        source: &dyn FrameSource,
        writer: &mut PackWriter<'_>,
    ) -> Result<Targets, StoreError> {
        let mut by_frame: Vec<(u32, Vec<u32>)> = Vec::new();
        for block in blocks.iter() {
            match by_frame.last_mut() {
                Some((frame, wanted)) if *frame == block / 32 => wanted.push(block % 32),
                _ => by_frame.push((block / 32, vec![block % 32])),
            }
        }
        let mut targets = Targets::new();
        for (frame, wanted) in by_frame {
            let plain = source.frame(moving, frame, &wanted)?;
            for in_frame in wanted {
                let position = frame * 32 + in_frame;
                let start = in_frame as usize * BLOCK_LEN;
                let block = plain.get(start..start + BLOCK_LEN);
                let hash = moving.footer.blocks.get(position as usize);
                let (Some(block), Some(hash)) = (block, hash) else {
                    return Err(StoreError::outside_frame(moving.pack.id));
                };
                if self.block_hash(block) != *hash {
                    let text = format!("pack {}: block {position} does not match its hash", moving.pack.id);
                    return Err(StoreError::corrupt(text));
                }
                targets.insert(position, writer.push(block, hash)?);
            }
        }
        Ok(targets)
    }

    /// The hash by which a block is recognised in this store.
    pub(crate) fn block_hash(&self, block: &[u8]) -> BlockHash {
        block_hash(block, self.block_hash_key.as_bytes())
    }

    fn put_editions(
        &self,
        lease: &mut WriteLease,
        affected: &[Published],
        targets: &HashMap<PackId, Targets>,
        moved: &mut Moved,
    ) -> Result<(), StoreError> {
        if targets.is_empty() || affected.is_empty() {
            return Ok(());
        }
        let mut editions = Vec::new();
        for published in affected {
            editions.push(self.next_edition_of(published)?);
        }
        lease.announce(editions.iter().map(Published::object_name).collect())?;
        for (published, edition) in affected.iter().zip(&editions) {
            lease.check()?;
            // Removed or replaced meanwhile: then there is nothing to do for it.
            let Stored::Manifest(manifest) = self.stored_manifest(published)? else { continue };
            let Some(manifest) = rewrite(&manifest, targets, &moved.new_packs)? else { continue };
            // A reference must not be carried over to what may be going, as it must not be made anew.
            if manifest.packs().iter().any(|pack| lease.condemned().contains(&pack.id)) {
                moved.postponed += 1;
                continue;
            }
            let name = edition.object_name();
            if self.put_announced(lease, &name, &self.encode_manifest(&manifest, &name)?)? {
                moved.manifests += 1;
            }
        }
        Ok(())
    }

    /// The name of the next edition; one of no known owner becomes this owner's.
    pub(crate) fn next_edition_of(&self, published: &Published) -> Result<Published, StoreError> {
        let owner = published.owner.unwrap_or(self.owner);
        let mut same = self.published_as(published.content)?;
        same.retain(|p| p.owner == Some(owner));
        Ok(Published { content: published.content, owner: Some(owner), edition: next_edition(&same)? })
    }
}

/// Whether an error tells of one pack and not of the storage as a whole.
fn is_of_pack(kind: StoreErrorKind) -> bool {
    matches!(kind, StoreErrorKind::Corrupt | StoreErrorKind::NotFound)
}

/// The same disk with its blocks where they were moved to; `None` when nothing of it was moved.
fn rewrite(
    manifest: &Manifest,
    targets: &HashMap<PackId, Targets>,
    new_packs: &[PackRef],
) -> Result<Option<Manifest>, StoreError> {
    if !manifest.packs().iter().any(|pack| targets.contains_key(&pack.id)) {
        return Ok(None);
    }
    let mut builder = ExtentBuilder::default();
    for extent in manifest.extents() {
        let pack = manifest.packs()[extent.pack as usize];
        let Some(targets) = targets.get(&pack.id) else {
            builder.push_run(extent.first_block, extent.blocks, pack, extent.block_in_pack);
            continue;
        };
        for offset in 0..extent.blocks {
            let (number, block) = targets.get(&(extent.block_in_pack + offset)).ok_or_else(|| {
                StoreError::corrupt(format!("pack {}: a block that is in use was not copied", pack.id))
            })?;
            let first_block = extent.first_block + u64::from(offset);
            builder.push_run(first_block, 1, new_packs[*number as usize], u32::from(*block));
        }
    }
    Manifest::new(manifest.size_bytes(), manifest.digest(), builder.packs, builder.extents).map(Some)
}

/// Makes the extents of a manifest: joins runs, numbers packs in the order of their first use.
#[derive(Debug, Default)]
pub(crate) struct ExtentBuilder {
    pub(crate) packs: Vec<PackRef>,
    pub(crate) extents: Vec<Extent>,
    numbers: HashMap<PackId, u32>,
}

impl ExtentBuilder {
    /// Adds blocks that follow each other on the disk and in a pack; in the order of the disk.
    pub(crate) fn push_run(&mut self, first_block: u64, blocks: u32, pack: PackRef, block_in_pack: u32) {
        let next = u32::try_from(self.packs.len()).expect("bounded by the size of a manifest");
        let number = *self.numbers.entry(pack.id).or_insert_with(|| {
            self.packs.push(pack);
            next
        });
        push_run(&mut self.extents, Extent { first_block, blocks, pack: number, block_in_pack });
    }
}
