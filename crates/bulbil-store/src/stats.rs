//! What a store holds and what each content costs.
//!
//! Runs of blocks of all manifests are sorted by where they lie, then one pass over each pack tells for
//! every stretch which contents refer to it. So memory grows with the manifests, not with the blocks.

use std::collections::HashMap;

use bulbil_types::BLOCK_BYTES;
use serde::Serialize;

use crate::attachment::AttachmentKind;
use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::pack::{Footer, HEADER_BYTES, PackId};
use crate::published::{ContentName, Published};
use crate::store::Store;

/// What a store holds; all contents of all owners.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StoreStats {
    /// Sizes of all disks.
    pub logical_bytes: u64,
    /// Blocks of all disks that are not zero, before compression.
    pub data_bytes: u64,
    /// The same with every stored block counted once.
    pub unique_bytes: u64,
    /// What the store takes: packs, manifests and attachments.
    pub stored_bytes: u64,
    /// Bytes of packs.
    pub pack_bytes: u64,
    /// Bytes of manifests.
    pub manifest_bytes: u64,
    /// Bytes of attachments.
    pub attachment_bytes: u64,
    /// Bytes of packs in which lie blocks that no manifest refers to, compressed; packs that nothing refers to
    /// as a whole.
    pub dead_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Packs whose footer cannot be read: what lies in them is in `pack_bytes` only.
    pub unreadable_packs: u64,
    /// Each content, the costliest first.
    pub contents: Vec<ContentStats>,
}

impl StoreStats {
    /// How many bytes of disks stand for one stored byte; 1 for an empty store.
    #[must_use]
    pub fn reduction(&self) -> f64 {
        ratio(self.data_bytes, self.stored_bytes)
    }

    /// How many times each stored block is used on average.
    #[must_use]
    pub fn deduplication(&self) -> f64 {
        ratio(self.data_bytes, self.unique_bytes)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio is for people")]
fn ratio(many: u64, few: u64) -> f64 {
    if few == 0 { 1.0 } else { many as f64 / few as f64 }
}

/// What one content is and costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContentStats {
    /// The content.
    pub digest: Digest,
    /// Owners that have published it.
    pub owners: u64,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Its blocks that are not zero, before compression.
    pub data_bytes: u64,
    /// Its stored blocks, each once, to which other contents refer too, before compression.
    pub shared_bytes: u64,
    /// What would become unused without it: its share of the frames in which blocks lie to which only it
    /// refers, compressed; its manifests and attachments.
    pub alone_bytes: u64,
}

/// A run of blocks of a content in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    pack: u32,
    first: u32,
    end: u32,
    content: u32,
}

#[derive(Default)]
struct Collected {
    packs: Vec<PackId>,
    numbers: HashMap<PackId, u32>,
    contents: Vec<ContentStats>,
    by_name: HashMap<ContentName, u32>,
    runs: Vec<Run>,
}

impl Store {
    /// Adds up what the store holds and what each content costs. Reads all manifests and all footers.
    ///
    /// # Errors
    /// `Corrupt` when a manifest cannot be read; `Io`, `Timeout`.
    pub fn stats(&self) -> Result<StoreStats, StoreError> {
        let mut all = Collected::default();
        self.mark(&mut |published, manifest| all.add(published, manifest))?.all_readable()?;
        all.runs.sort_unstable();
        let mut stats = StoreStats::default();
        for (id, len_bytes) in self.list_packs()? {
            stats.packs += 1;
            stats.pack_bytes += len_bytes;
            let Some(number) = all.numbers.get(&id) else {
                stats.dead_bytes += len_bytes;
                continue;
            };
            let runs = all.runs_of(*number);
            match self.footer(id, len_bytes) {
                Ok(footer) => add_pack(&footer, &runs, &mut all.contents, &mut stats),
                Err(e) if matches!(e.kind(), StoreErrorKind::Corrupt | StoreErrorKind::NotFound) => {
                    stats.unreadable_packs += 1;
                }
                Err(e) => return Err(e),
            }
        }
        self.add_small_objects(&mut all, &mut stats)?;
        stats.logical_bytes = all.contents.iter().map(|content| content.size_bytes).sum();
        stats.data_bytes = all.contents.iter().map(|content| content.data_bytes).sum();
        stats.stored_bytes = stats.pack_bytes + stats.manifest_bytes + stats.attachment_bytes;
        stats.contents = all.contents;
        stats.contents.sort_by_key(|content| (std::cmp::Reverse(content.alone_bytes), content.digest));
        Ok(stats)
    }

    fn add_small_objects(&self, all: &mut Collected, stats: &mut StoreStats) -> Result<(), StoreError> {
        for (name, len_bytes) in self.objects.list("manifests")? {
            stats.manifest_bytes += len_bytes;
            all.add_cost(Published::parse(&name).map(|published| published.content), len_bytes);
        }
        for (name, len_bytes) in self.objects.list("attachments")? {
            stats.attachment_bytes += len_bytes;
            all.add_cost(AttachmentKind::content_of(&name), len_bytes);
        }
        Ok(())
    }
}

impl Collected {
    fn add(&mut self, published: &Published, manifest: &crate::manifest::Manifest) {
        let next = u32::try_from(self.contents.len()).expect("fewer contents than memory holds");
        let content = *self.by_name.entry(published.content).or_insert_with(|| {
            self.contents.push(ContentStats {
                digest: manifest.digest(),
                owners: 0,
                size_bytes: manifest.size_bytes(),
                data_bytes: manifest.data_bytes(),
                shared_bytes: 0,
                alone_bytes: 0,
            });
            next
        });
        self.contents[content as usize].owners += 1;
        for extent in manifest.extents() {
            let id = manifest.packs()[extent.pack as usize].id;
            let next = u32::try_from(self.packs.len()).expect("fewer packs than memory holds");
            let pack = *self.numbers.entry(id).or_insert_with(|| {
                self.packs.push(id);
                next
            });
            let (first, end) = (extent.block_in_pack, extent.block_in_pack + extent.blocks);
            self.runs.push(Run { pack, first, end, content });
        }
    }

    fn runs_of(&self, pack: u32) -> Vec<Run> {
        let start = self.runs.partition_point(|run| run.pack < pack);
        self.runs[start..].iter().take_while(|run| run.pack == pack).copied().collect()
    }

    fn add_cost(&mut self, name: Option<ContentName>, len_bytes: u64) {
        if let Some(content) = name.and_then(|name| self.by_name.get(&name)) {
            self.contents[*content as usize].alone_bytes += len_bytes;
        }
    }
}

/// Stored bytes of the blocks before this one: those of a frame are shared evenly by its blocks.
fn stored_before(footer: &Footer, block: u32) -> u64 {
    let Some(frame) = footer.frames.get(block as usize / 32).or(footer.frames.last()) else { return 0 };
    let first = u64::from(block / 32) * 32;
    let within = (u64::from(block) - first).min(u64::from(frame.blocks));
    let past = footer.frames.len() <= block as usize / 32;
    let stored = u64::from(frame.stored_bytes);
    let within_bytes = if past { stored } else { stored * within / u64::from(frame.blocks.max(1)) };
    frame.offset - HEADER_BYTES as u64 + within_bytes
}

/// Tells for every stretch of a pack who refers to it.
fn add_pack(footer: &Footer, runs: &[Run], contents: &mut [ContentStats], stats: &mut StoreStats) {
    let mut borders: Vec<u32> = runs.iter().flat_map(|run| [run.first, run.end]).collect();
    let blocks = u32::try_from(footer.blocks.len()).expect("a pack holds 65536 blocks");
    borders.extend([0, blocks]);
    borders.sort_unstable();
    borders.dedup();
    let mut coming = runs.iter().peekable();
    let mut active: Vec<Run> = Vec::new();
    for (from, to) in borders.iter().zip(borders.iter().skip(1)).map(|(from, to)| (*from, *to)) {
        active.retain(|run| run.end > from);
        while let Some(run) = coming.next_if(|run| run.first <= from) {
            active.push(*run);
        }
        let stored = stored_before(footer, to) - stored_before(footer, from);
        let plain = u64::from(to - from) * BLOCK_BYTES;
        let mut users: Vec<u32> = active.iter().map(|run| run.content).collect();
        users.sort_unstable();
        users.dedup();
        match users[..] {
            [] => stats.dead_bytes += stored,
            [only] => contents[only as usize].alone_bytes += stored,
            _ => users.iter().for_each(|content| contents[*content as usize].shared_bytes += plain),
        }
        if !users.is_empty() {
            stats.unique_bytes += plain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Codec;
    use crate::pack::FrameRecord;

    fn content(n: u8) -> ContentStats {
        let digest = Digest::from_bytes([n; 32]);
        ContentStats { digest, owners: 1, size_bytes: 0, data_bytes: 0, shared_bytes: 0, alone_bytes: 0 }
    }

    #[test]
    fn every_stored_byte_is_alone_shared_or_dead() {
        let record = |offset, stored_bytes, blocks| FrameRecord {
            hash: [0; 32],
            offset,
            stored_bytes,
            blocks,
            codec: Codec::Zstd,
        };
        let frames = vec![record(32, 3200, 32), record(3232, 100, 10)];
        let footer = Footer::new(PackId([0; 16]), frames, vec![[0; 16]; 42]);
        let run = |first, end, content| Run { pack: 0, first, end, content };
        let runs = [run(0, 8, 0), run(4, 12, 1), run(6, 7, 0), run(30, 34, 0)];
        let (mut contents, mut stats) = (vec![content(0), content(1)], StoreStats::default());
        add_pack(&footer, &runs, &mut contents, &mut stats);
        // Blocks 0..4, 30..32 and 32..34 are the first one's, 8..12 the second one's, 4..8 both have.
        assert_eq!(contents[0].alone_bytes, 400 + 200 + 20);
        assert_eq!(contents[1].alone_bytes, 400);
        assert_eq!((contents[0].shared_bytes, contents[1].shared_bytes), (4 * 4096, 4 * 4096));
        assert_eq!(stats.dead_bytes, 1800 + 80);
        assert_eq!(stats.unique_bytes, 16 * 4096);
        assert_eq!((stored_before(&footer, 0), stored_before(&footer, 42)), (0, 3300));
    }
}
