//! Repacking: packs that are mostly unused are rewritten without what nothing refers to.

use std::sync::Arc;

use serde::Serialize;

use crate::error::{StoreError, StoreErrorKind};
use crate::liveness::{self, Liveness};
use crate::manifest::PackRef;
use crate::pack::PackId;
use crate::relocate::{FrameSource, Moving};
use crate::store::Store;

/// Packs rewritten at once, about 16 GiB: where their blocks went is held in memory.
const MAX_PACKS: usize = 1024;

/// What a repack did; of a dry run, what it would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RepackReport {
    /// Packs that are rewritten.
    pub packs: Vec<RepackedPack>,
    /// Packs put in their place. Unknown to a dry run.
    pub new_packs: u64,
    /// Bytes of those packs. A dry run estimates them by the share of blocks in use.
    pub new_bytes: u64,
    /// Manifests that got a new edition. Unknown to a dry run.
    pub rewritten_manifests: u64,
    /// Manifests that will get one by a later repack, because they refer to a pack that was condemned.
    pub postponed_manifests: u64,
    /// Packs that stay as they are because a block in use cannot be read: a scrub tells more.
    pub damaged: Vec<PackId>,
}

impl RepackReport {
    /// Bytes that become free when collections have deleted the old packs.
    #[must_use]
    pub fn gain_bytes(&self) -> u64 {
        self.packs.iter().map(|pack| pack.len_bytes).sum::<u64>().saturating_sub(self.new_bytes)
    }
}

/// A pack that is mostly unused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RepackedPack {
    /// The pack.
    pub id: PackId,
    /// Size of the object in bytes.
    pub len_bytes: u64,
    /// Blocks that some manifest refers to.
    pub live_blocks: u64,
    /// Blocks in the pack.
    pub blocks: u64,
}

/// Frames as the store has them.
pub(crate) struct StoredFrames<'a>(pub(crate) &'a Store);

impl FrameSource for StoredFrames<'_> {
    fn frame(&self, moving: &Moving, frame: u32, _wanted: &[u32]) -> Result<Vec<u8>, StoreError> {
        self.0.read_frame(&moving.pack, frame)
    }
}

impl Store {
    /// Rewrites packs of which less than `below_percent` of the blocks are in use, at most 1024 of them.
    pub(crate) fn repack(&self, below_percent: u8, dry_run: bool) -> Result<RepackReport, StoreError> {
        let candidates = self.mostly_unused(below_percent)?;
        let mut report = RepackReport::default();
        if dry_run || candidates.is_empty() {
            report.packs = candidates.into_iter().map(|(pack, _)| pack).collect();
            report.new_bytes = report.packs.iter().map(|p| p.len_bytes * p.live_blocks / p.blocks.max(1)).sum();
            return Ok(report);
        }
        let moving: Vec<_> = candidates.iter().map(|(_, moving)| moving.clone()).collect();
        let moved = self.relocate("repack", &moving, &StoredFrames(self), true)?;
        report.packs = candidates.into_iter().map(|(p, _)| p).filter(|p| moved.packs.contains(&p.id)).collect();
        for (id, error) in &moved.failed {
            tracing::warn!(pack = %id, %error, "a pack is not repacked");
        }
        report.damaged = moved.failed.iter().map(|(id, _)| *id).collect();
        report.new_packs = moved.new_packs.len() as u64;
        report.new_bytes = moved.new_packs.iter().map(|pack| pack.len_bytes).sum();
        report.rewritten_manifests = moved.manifests;
        report.postponed_manifests = moved.postponed;
        Ok(report)
    }

    /// The packs that are in use for less than a share of their blocks, those with the largest gain first.
    fn mostly_unused(&self, below_percent: u8) -> Result<Vec<(RepackedPack, Moving)>, StoreError> {
        let mut live = Liveness::new();
        self.mark(&mut |_, manifest| liveness::add(&mut live, manifest))?.all_readable()?;
        let mut found = Vec::new();
        for (id, len_bytes) in self.list_packs()? {
            let Some(blocks) = live.remove(&id) else { continue };
            let footer = match self.footer(id, len_bytes) {
                Err(e) if matches!(e.kind(), StoreErrorKind::Corrupt | StoreErrorKind::NotFound) => continue,
                other => other?,
            };
            let pack = RepackedPack { id, len_bytes, live_blocks: blocks.len(), blocks: footer.blocks.len() as u64 };
            if pack.live_blocks * 100 < pack.blocks * u64::from(below_percent) {
                let pack_ref = PackRef { id, footer_digest: footer.digest, len_bytes };
                found.push((pack, Moving { pack: pack_ref, footer: Arc::clone(&footer) }));
            }
        }
        let gain = |pack: &RepackedPack| pack.len_bytes * (pack.blocks - pack.live_blocks) / pack.blocks;
        found.sort_by_key(|(pack, _)| (std::cmp::Reverse(gain(pack)), pack.id));
        found.truncate(MAX_PACKS);
        Ok(found)
    }
}
