//! Garbage collection of the store: what nothing uses any more goes, and why it does or does not is told.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{Digest, PackFate};
use serde::{Deserialize, Serialize};

use crate::content_lease::leased_contents;
use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::store_ops;

/// How long unused packs of a store that other hosts may read stay by default: longer than they go without opening a
/// manifest again.
const REMOTE_GRACE: Duration = Duration::from_hours(24);

/// How to collect.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct GcRequest {
    /// Changes nothing, only says what would be done.
    pub dry_run: bool,
    /// How long unused packs stay, in seconds; by default 0 for a directory and a day for a remote store.
    pub grace_s: Option<u64>,
    /// Whether packs that are used in small part are written anew.
    pub repack: bool,
}

/// What a collection did; of a dry run, what it would do.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GcReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// How long unused packs stay, in seconds.
    pub grace_s: u64,
    /// Contents that no image, instance or volume of this host uses, and that were given up.
    pub unused_contents: Vec<Digest>,
    /// Whether these were not looked for, because an import is at work.
    pub busy: bool,
    /// Packs that are not used, or only in small part.
    pub packs: Vec<GcPack>,
    /// Packs deleted, or of a dry run to be deleted.
    pub deleted_packs: u64,
    /// Bytes of these.
    pub freed_bytes: u64,
    /// Packs of which the used part was written anew, or of a dry run is to be; then they go as the others do.
    pub repacked_packs: u64,
    /// Bytes that were written for them, or of a dry run an estimate.
    pub repacked_bytes: u64,
    /// Bytes that a later collection frees.
    pub later_bytes: u64,
}

/// A pack that a collection looked at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GcPack {
    /// The pack.
    pub pack: String,
    /// Size of the object in bytes.
    pub bytes: u64,
    /// What becomes of it.
    pub fate: GcFate,
    /// Why, in words.
    pub reason: String,
}

/// What becomes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GcFate {
    /// It is deleted.
    Deleted,
    /// It is unused and goes with a later collection.
    Condemned,
    /// Its live part is written to another pack; it goes with a later collection.
    Repacked,
    /// It stays.
    Kept,
}

impl GcReport {
    /// Adds what one cycle of a collection did; of a pack that several cycles looked at, the last word counts.
    pub(crate) fn add_cycle(&mut self, cycle: &bulbil_store::GcReport) {
        for pack in &cycle.packs {
            let told = GcPack::new(pack, self.dry_run, self.grace_s);
            match self.packs.iter_mut().find(|known| known.pack == told.pack) {
                Some(known) => *known = told,
                None => self.packs.push(told),
            }
        }
        if let Some(repack) = &cycle.repack {
            self.add_repack(repack);
        }
        let sum = |fates: &[GcFate]| -> (u64, u64) {
            let found = self.packs.iter().filter(|pack| fates.contains(&pack.fate));
            found.fold((0, 0), |(packs, bytes), pack| (packs + 1, bytes + pack.bytes))
        };
        let now: &[GcFate] = if self.dry_run && self.grace_s == 0 {
            // A collection without grace goes on until they are gone.
            &[GcFate::Deleted, GcFate::Condemned]
        } else {
            &[GcFate::Deleted]
        };
        let deleted = sum(now);
        self.later_bytes = if now.len() == 2 { 0 } else { sum(&[GcFate::Condemned]).1 };
        (self.deleted_packs, self.freed_bytes) = deleted;
    }

    /// Adds packs that are written anew; a later cycle deletes them, and its word counts.
    fn add_repack(&mut self, repack: &bulbil_store::RepackReport) {
        self.repacked_packs += repack.packs.len() as u64;
        self.repacked_bytes += repack.new_bytes;
        for pack in &repack.packs {
            let percent = pack.live_blocks * 100 / pack.blocks.max(1);
            let told = GcPack {
                pack: pack.id.to_string(),
                bytes: pack.len_bytes,
                fate: GcFate::Repacked,
                reason: format!("{percent} % of it is used, which is written to another pack"),
            };
            if !self.packs.iter().any(|known| known.pack == told.pack) {
                self.packs.push(told);
            }
        }
    }
}

impl GcPack {
    fn new(pack: &bulbil_store::PackReport, dry_run: bool, grace_s: u64) -> Self {
        let (fate, reason) = match &pack.fate {
            PackFate::Deleted => (GcFate::Deleted, "no image uses it".to_owned()),
            PackFate::Condemned if dry_run && grace_s == 0 => (GcFate::Condemned, "no image uses it".to_owned()),
            PackFate::Condemned => {
                (GcFate::Condemned, "no image uses it any more; it goes after its time of grace".to_owned())
            }
            PackFate::Grace { until_ms } => {
                (GcFate::Condemned, format!("no image uses it; it stays until {}", when(*until_ms)))
            }
            PackFate::Leased { purpose, .. } => (GcFate::Kept, format!("somebody at work may use it ({purpose})")),
            PackFate::NotAsked => (GcFate::Kept, "not looked for".to_owned()),
            PackFate::Named => (GcFate::Kept, "an image uses it again".to_owned()),
        };
        Self { pack: pack.id.to_string(), bytes: pack.len_bytes, fate, reason }
    }
}

/// A point in time, to the second.
fn when(unix_ms: u64) -> String {
    let second = i64::try_from(unix_ms / 1000).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    second.map_or_else(|| "a time that cannot be told".to_owned(), |at| at.to_string())
}

impl Control {
    /// Frees what nothing uses. Runs beside imports, copies and launches.
    ///
    /// # Errors
    /// `Failed` when the catalog, a volume's record or a manifest cannot be read, and then nothing is deleted;
    /// `Timeout`, `StoreKey`.
    pub async fn collect_garbage(&self, request: GcRequest) -> Result<GcReport, ControlError> {
        let default_grace = if self.binding.location.is_remote() { REMOTE_GRACE } else { Duration::ZERO };
        let grace = request.grace_s.map_or(default_grace, Duration::from_secs);
        let mut report = GcReport { dry_run: request.dry_run, grace_s: grace.as_secs(), ..GcReport::default() };
        // Between the store and the catalog a content belongs to nobody, so it is not the time to ask who needs it.
        match self.image_changes.try_lock() {
            Ok(_one_change_of_images) => report.unused_contents = self.give_up_unused(request.dry_run).await?,
            Err(_) => report.busy = true,
        }
        let store = Arc::clone(&self.store);
        let collected = tokio::task::spawn_blocking(move || {
            store_ops::collect(&store, &request, grace, report)
                .map_err(|e| ControlError::store("cannot free unused space", &e))
        });
        let report = collected
            .await
            .map_err(|e| ControlError::with_source(ErrorCode::Failed, "the collection broke off", &e))??;
        tracing::info!(packs = report.deleted_packs, bytes = report.freed_bytes, report.dry_run, "garbage collected");
        Ok(report)
    }

    /// Gives up every content that no image, instance, volume, export or copy of this host refers to and that the
    /// store does not offer by name, and returns them.
    ///
    /// The caller holds the lock on changes of images, so no import is between store and catalog.
    pub(crate) async fn give_up_unused(&self, dry_run: bool) -> Result<Vec<Digest>, ControlError> {
        // Without its manifest a content cannot be launched any more, so launches may go on afterwards.
        let no_new_use = Arc::clone(&self.image_uses).lock_owned().await;
        let data = self.data.clone();
        let broken = |e| ControlError::with_source(ErrorCode::Failed, "the sweep broke off", &e);
        // What a shim does for a daemon that is gone is waited for: it may put a volume above another content.
        let leased = tokio::task::spawn_blocking(move || leased_contents(&data)).await;
        let (leased, no_new_lease) = leased.map_err(broken)??;
        let mut used: HashSet<_> = self.catalog.images().await?.into_iter().map(|image| image.digest).collect();
        used.extend(self.catalog.instances().await?.into_iter().map(|(record, _)| record.image_digest));
        used.extend(self.contents_in_use());
        used.extend(self.contents_of_volumes().await?);
        used.extend(leased);
        let store = Arc::clone(&self.store);
        let given_up = tokio::task::spawn_blocking(move || {
            let _no_new_use = (no_new_use, no_new_lease);
            // What this store offers to others by name is theirs as well.
            let offered = store.images()?;
            if let Some(object) = offered.unreadable.first() {
                return Err(bulbil_store::StoreError::unreadable_record(object));
            }
            used.extend(offered.images.into_iter().map(|image| image.digest));
            let unused: Vec<_> = store.digests()?.into_iter().filter(|digest| !used.contains(digest)).collect();
            if !dry_run {
                unused.iter().try_for_each(|digest| store.remove_manifest(digest))?;
            }
            Ok(unused)
        });
        given_up.await.map_err(broken)?.map_err(|e| ControlError::store("cannot free unused space", &e))
    }
}
