//! What the store holds, and what each image costs.

use std::sync::Arc;

use bulbil_store::Digest;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};

/// What the store holds; all contents of all owners.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreStats {
    /// Packs.
    pub packs: u64,
    /// Bytes of packs.
    pub pack_bytes: u64,
    /// Manifests in use: one for each content and owner.
    pub manifests: u64,
    /// Bytes of all manifests, also of those that were never completed or that newer ones replace.
    pub manifest_bytes: u64,
    /// Bytes of what belongs to contents and can be made again.
    pub attachment_bytes: u64,
    /// Sizes of all disks.
    pub logical_bytes: u64,
    /// Blocks of all disks that are not zero, before compression.
    pub data_bytes: u64,
    /// The same with every stored block counted once.
    pub unique_bytes: u64,
    /// What the store takes.
    pub stored_bytes: u64,
    /// Of these what nothing refers to; see `store gc`.
    pub dead_bytes: u64,
    /// Bytes of data for each byte that is stored.
    pub ratio: f64,
    /// Each content, the costliest first.
    pub images: Vec<ContentStats>,
}

/// What one content is and costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContentStats {
    /// The content.
    pub digest: Digest,
    /// Images of this host that have it, as NAME:VERSION; none when only others have it.
    pub names: Vec<String>,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Its blocks that are not zero, before compression.
    pub data_bytes: u64,
    /// Its stored blocks, each once, that other contents have too, before compression.
    pub shared_bytes: u64,
    /// What would become free without it.
    pub alone_bytes: u64,
    /// Bytes of its data for each byte that would become free without it.
    pub ratio: f64,
}

#[allow(clippy::cast_precision_loss, reason = "a ratio is for people")]
fn ratio(many: u64, few: u64) -> f64 {
    // Two digits say it all, and make documents comparable.
    let exact = if few == 0 { 1.0 } else { many as f64 / few as f64 };
    (exact * 100.0).round() / 100.0
}

impl Control {
    /// Adds up what the store holds and what each content costs; reads every manifest and footer.
    ///
    /// # Errors
    /// `Failed` or `Timeout` when it cannot be read.
    pub async fn store_stats(&self) -> Result<StoreStats, ControlError> {
        let images = self.catalog.images().await?;
        let store = Arc::clone(&self.store);
        let read = tokio::task::spawn_blocking(move || store.stats());
        let broken = |e| ControlError::with_source(ErrorCode::Failed, "reading the store broke off", &e);
        let stats = read.await.map_err(broken)?.map_err(|e| ControlError::store("cannot read the store", &e))?;
        let names_of = |digest: &Digest| {
            let named = images.iter().filter(|image| image.digest == *digest);
            named.map(|image| format!("{}:{}", image.name, image.version)).collect()
        };
        let contents = stats.contents.iter().map(|content| ContentStats {
            digest: content.digest,
            names: names_of(&content.digest),
            size_bytes: content.size_bytes,
            data_bytes: content.data_bytes,
            shared_bytes: content.shared_bytes,
            alone_bytes: content.alone_bytes,
            ratio: ratio(content.data_bytes, content.alone_bytes),
        });
        Ok(StoreStats {
            packs: stats.packs,
            pack_bytes: stats.pack_bytes,
            manifests: stats.contents.iter().map(|content| content.owners).sum(),
            manifest_bytes: stats.manifest_bytes,
            attachment_bytes: stats.attachment_bytes,
            logical_bytes: stats.logical_bytes,
            data_bytes: stats.data_bytes,
            unique_bytes: stats.unique_bytes,
            stored_bytes: stats.stored_bytes,
            dead_bytes: stats.dead_bytes,
            ratio: ratio(stats.data_bytes, stats.stored_bytes),
            images: contents.collect(),
        })
    }
}
