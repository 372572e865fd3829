//! Healing: blocks in use of damaged packs go into new packs, damaged manifests are put again.

use std::collections::HashMap;

use bulbil_types::BLOCK_LEN;

use super::check::Finding;
use super::{PackDamage, ScrubReport};
use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::import::{DiskSource, ImportObserver};
use crate::lease::WriteLease;
use crate::manifest::{Manifest, PackRef};
use crate::marking::Marks;
use crate::pack::PackId;
use crate::publish::Stored;
use crate::published::Published;
use crate::relocate::{FrameSource, Moving};
use crate::store::Store;

/// Knows the content of frames from elsewhere, for example from a cache or from another store.
///
/// What it gives is verified before it is used.
pub trait FrameHealer {
    /// The plain bytes of a frame, of which those of the blocks in [`WantedFrame::uses`] must be right;
    /// `None` when it does not have them.
    fn frame(&self, wanted: &WantedFrame<'_>) -> Option<Vec<u8>>;

    /// A whole content; `None` when it does not have it.
    fn disk(&self, _digest: &Digest) -> Option<Box<dyn DiskSource + '_>> {
        None
    }
}

/// A frame that cannot be read.
#[derive(Debug)]
pub struct WantedFrame<'a> {
    /// Its pack.
    pub pack: PackId,
    /// Its number in the pack.
    pub frame: u32,
    /// BLAKE3 of its plain bytes.
    pub hash: [u8; 32],
    /// Blocks of 4 KiB in it, at most 32.
    pub blocks: u16,
    /// Where its blocks in use lie on disks, each once.
    pub uses: &'a [BlockUse],
}

/// A block of a frame as a block of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockUse {
    /// Its position in the frame.
    pub block_in_frame: u32,
    /// The content that refers to it.
    pub digest: Digest,
    /// Its number on that disk.
    pub disk_block: u64,
}

/// For each block of damaged packs one use.
type Uses = HashMap<PackId, HashMap<u32, (Digest, u64)>>;

/// Frames as they are stored where they verify, else from healers.
struct HealedFrames<'a> {
    store: &'a Store,
    healers: &'a [&'a dyn FrameHealer],
    uses: &'a Uses,
}

impl FrameSource for HealedFrames<'_> {
    fn frame(&self, moving: &Moving, frame: u32, wanted: &[u32]) -> Result<Vec<u8>, StoreError> {
        let id = moving.pack.id;
        let record = moving.footer.frames.get(frame as usize).ok_or_else(|| StoreError::outside_frame(id))?;
        let error = match self.store.plain_of(id, &moving.footer, frame, None) {
            Ok(plain) => return Ok(plain),
            Err(e) if e.kind() == StoreErrorKind::Timeout => return Err(e),
            Err(e) => {
                StoreError::with_source(StoreErrorKind::Corrupt, format!("pack {id}, frame {frame} is damaged"), e)
            }
        };
        let known = self.uses.get(&id);
        let place = |block: &u32| {
            let (digest, disk_block) = *known?.get(&(frame * 32 + block))?;
            Some(BlockUse { block_in_frame: *block, digest, disk_block })
        };
        let uses: Vec<_> = wanted.iter().filter_map(place).collect();
        let question = WantedFrame { pack: id, frame, hash: record.hash, blocks: record.blocks, uses: &uses };
        let is_right = |plain: &[u8]| {
            blake3::hash(plain).as_bytes() == &record.hash
                || wanted.iter().all(|block| self.is_block_right(moving, frame * 32 + block, *block, plain))
        };
        self.healers.iter().filter_map(|healer| healer.frame(&question)).find(|plain| is_right(plain)).ok_or(error)
    }
}

impl HealedFrames<'_> {
    fn is_block_right(&self, moving: &Moving, in_pack: u32, in_frame: u32, plain: &[u8]) -> bool {
        let start = in_frame as usize * BLOCK_LEN;
        let block = plain.get(start..start + BLOCK_LEN);
        block.is_some_and(|block| moving.footer.blocks.get(in_pack as usize) == Some(&self.store.block_hash(block)))
    }
}

/// Listens to nothing.
struct Silent;

impl ImportObserver for Silent {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64, _stored_bytes: u64) {}
}

impl Store {
    pub(super) fn heal_packs(
        &self,
        healers: &[&dyn FrameHealer],
        findings: &HashMap<PackId, Finding>,
        report: &mut ScrubReport,
    ) -> Result<(), StoreError> {
        let mut moving = Vec::new();
        for damage in &mut report.damaged_packs {
            let finding = findings.get(&damage.id);
            // Nobody needs what is damaged there.
            damage.healed = damage.contents.is_empty();
            if let Some((finding, footer)) = finding.and_then(|f| Some((f, f.footer.clone()?))) {
                let pack = PackRef { id: damage.id, footer_digest: footer.digest, len_bytes: finding.len_bytes };
                moving.push(Moving { pack, footer });
            }
        }
        let (uses, named) = self.uses_of(&moving)?;
        // A footer that was made again is right when manifests name its digest.
        moving.retain(|moving| named.get(&moving.pack.id) == Some(&moving.pack.footer_digest));
        if !moving.is_empty() {
            let moved = self.relocate("heal", &moving, &HealedFrames { store: self, healers, uses: &uses }, false)?;
            for damage in &mut report.damaged_packs {
                damage.healed |= moved.packs.contains(&damage.id) && moved.postponed == 0;
                if let Some((_, error)) = moved.failed.iter().find(|(id, _)| *id == damage.id) {
                    tracing::warn!(pack = %damage.id, %error, "a damaged pack cannot be healed");
                }
            }
        }
        for damage in report.damaged_packs.iter_mut().filter(|damage| !damage.healed) {
            damage.healed = self.import_again(healers, damage)?;
        }
        Ok(())
    }

    /// Where the blocks of packs lie on disks, and which footer digests manifests name.
    fn uses_of(&self, moving: &[Moving]) -> Result<(Uses, HashMap<PackId, [u8; 32]>), StoreError> {
        let mut uses: Uses = moving.iter().map(|moving| (moving.pack.id, HashMap::new())).collect();
        let mut named = HashMap::new();
        self.mark(&mut |_, manifest| {
            for extent in manifest.extents() {
                let pack = manifest.packs()[extent.pack as usize];
                let Some(uses) = uses.get_mut(&pack.id) else { continue };
                named.insert(pack.id, pack.footer_digest);
                for offset in 0..extent.blocks {
                    let place = (manifest.digest(), extent.first_block + u64::from(offset));
                    uses.entry(extent.block_in_pack + offset).or_insert(place);
                }
            }
        })?;
        Ok((uses, named))
    }

    /// Imports the contents that a pack concerns again, from a healer that has them whole.
    fn import_again(&self, healers: &[&dyn FrameHealer], damage: &PackDamage) -> Result<bool, StoreError> {
        let mut all = true;
        for hit in &damage.contents {
            let disk = healers.iter().find_map(|healer| healer.disk(&hit.digest));
            let Some(disk) = disk else {
                all = false;
                continue;
            };
            all &= self.import_in_place(&*disk, &hit.digest)?;
        }
        Ok(all)
    }

    /// Imports a content so that every manifest of it is put again.
    fn import_in_place(&self, disk: &dyn DiskSource, digest: &Digest) -> Result<bool, StoreError> {
        // Under a name of its own: the manifests that are there cannot be relied on.
        let imported = self.import_new_edition(disk, &Silent)?;
        if imported.digest() != *digest {
            return Ok(false);
        }
        for published in self.published(digest)? {
            match self.stored_manifest(&published)? {
                Stored::Manifest(found) if found.packs() != imported.packs() => {
                    self.put_again(&published, &imported)?;
                }
                _ => {}
            }
        }
        Ok(true)
    }

    pub(super) fn heal_manifests(
        &self,
        healers: &[&dyn FrameHealer],
        marks: &Marks,
        report: &mut ScrubReport,
    ) -> Result<(), StoreError> {
        for (damage, (published, _)) in report.damaged_manifests.iter_mut().zip(&marks.damaged) {
            let manifest = match self.sound_manifest(published)? {
                Some(manifest) => Some(manifest),
                None => {
                    let digest = self.known_digest(published.content);
                    let disk = digest.and_then(|digest| healers.iter().find_map(|healer| healer.disk(&digest)));
                    disk.map(|disk| self.import_new_edition(&*disk, &Silent)).transpose()?
                }
            };
            let Some(manifest) = manifest.filter(|m| self.content_name(&m.digest()) == published.content) else {
                continue;
            };
            damage.healed = self.counts_again(published)? || self.put_again(published, &manifest)?;
        }
        Ok(())
    }

    /// Whether a newer edition is in a damaged one's place: collections then delete it.
    fn counts_again(&self, damaged: &Published) -> Result<bool, StoreError> {
        let owner = damaged.owner.unwrap_or(self.owner);
        for published in self.published_as(damaged.content)? {
            let newer = damaged.owner.is_none() || published.edition > damaged.edition;
            if published.owner == Some(owner)
                && newer
                && matches!(self.stored_manifest(&published)?, Stored::Manifest(_))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A manifest of a content, of any owner, that can be read.
    fn sound_manifest(&self, damaged: &Published) -> Result<Option<Manifest>, StoreError> {
        for published in self.published_as(damaged.content)? {
            if let Stored::Manifest(manifest) = self.stored_manifest(&published)? {
                return Ok(Some(manifest));
            }
        }
        Ok(None)
    }

    /// Whether some owner has exactly this manifest.
    fn is_published(&self, manifest: &Manifest) -> Result<bool, StoreError> {
        for published in self.published(&manifest.digest())? {
            if matches!(self.stored_manifest(&published)?, Stored::Manifest(found) if found == *manifest) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts a manifest as the next edition of an owner's; `false` when it cannot be relied on right now.
    fn put_again(&self, published: &Published, manifest: &Manifest) -> Result<bool, StoreError> {
        let mut lease = WriteLease::begin(self, "heal")?;
        let condemned = |pack: &PackRef| lease.condemned().contains(&pack.id);
        if manifest.packs().iter().any(condemned) {
            return Ok(false);
        }
        // Under the lease: it must still be there, so that its packs are protected from here on.
        if !self.is_published(manifest)? {
            return Ok(false);
        }
        let edition = self.next_edition_of(published)?;
        lease.announce(vec![edition.object_name()])?;
        let name = edition.object_name();
        self.put_announced(&mut lease, &name, &self.encode_manifest(manifest, &name)?)
    }
}
