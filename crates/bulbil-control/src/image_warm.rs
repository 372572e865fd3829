//! Fills the base cache with an image, before anything asks for it.

use std::sync::Arc;

use bulbil_volume::{WarmEnd, WarmObserver, warm};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use bulbil_types::FRAME_BYTES;

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::export::ExportProgress;
use crate::model::ImageRecord;
use crate::store_ops;

/// What was done to have an image in the cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WarmedImage {
    /// The image.
    #[serde(flatten)]
    pub image: ImageRecord,
    /// Whether all of it is in the cache now.
    pub complete: bool,
    /// Why it is not: `cache_full` or `incomplete`.
    pub reason: Option<String>,
    /// Plain bytes of its frames.
    pub total_bytes: u64,
    /// Of these what was in the cache before.
    pub present_bytes: u64,
    /// Of these what was fetched now.
    pub fetched_bytes: u64,
    /// Stored bytes that were read for them.
    pub read_bytes: u64,
}

struct Observer(mpsc::Sender<ExportProgress>);

impl WarmObserver for Observer {
    fn progress(&self, done_frames: u64, total_frames: u64) {
        let step = ExportProgress { done_bytes: done_frames * FRAME_BYTES, total_bytes: total_frames * FRAME_BYTES };
        // A listener that is behind misses a step; the next one says more.
        let _told = self.0.try_send(step).is_ok();
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

impl Control {
    /// Brings every frame of an image into the base cache, as far as its bound allows.
    ///
    /// It stops when the receiver of `progress` is dropped; what was fetched stays, and the next call goes on there.
    ///
    /// # Errors
    /// `NotFound` for an image that is not there; `Cancelled`; `NoSpace`, `Timeout` or `Failed`.
    pub async fn warm_image(
        &self,
        image: &str,
        progress: mpsc::Sender<ExportProgress>,
    ) -> Result<WarmedImage, ControlError> {
        let (image, in_use) = self.use_image(image).await?;
        let what = format!("cannot bring `{}:{}` into the cache", image.name, image.version);
        let (store, data, warmed) = (Arc::clone(&self.store), self.data.clone(), image.clone());
        let report = tokio::task::spawn_blocking(move || {
            let _in_use = in_use;
            let cache = Arc::new(store_ops::open_cache(&data)?);
            let manifest = store.manifest(&warmed.digest).map_err(|e| ControlError::store(&*what, &e))?;
            let report = warm(&store, &cache, &manifest, &Observer(progress));
            report.map_err(|e| ControlError::with_source(ErrorCode::Failed, &*what, &e))
        });
        let report = report.await;
        self.free_if_removed(&image).await;
        let report = report.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the work broke off", &e))??;
        let reason = match report.end {
            WarmEnd::Complete => None,
            WarmEnd::CacheFull => Some("cache_full".to_owned()),
            WarmEnd::Incomplete => Some("incomplete".to_owned()),
            WarmEnd::Cancelled => return Err(ControlError::new(ErrorCode::Cancelled, "it was stopped")),
        };
        Ok(WarmedImage {
            image,
            complete: reason.is_none(),
            reason,
            total_bytes: report.total_frames * FRAME_BYTES,
            present_bytes: report.present_frames * FRAME_BYTES,
            fetched_bytes: report.fetched_frames * FRAME_BYTES,
            read_bytes: report.stored_bytes,
        })
    }
}
