//! What the boot that an image's trace tells of needs of the store.

use std::sync::Arc;

use bulbil_store::{Manifest, Store, StoreError};
use bulbil_types::BLOCK_BYTES;

use crate::cache::BaseCache;
use crate::image::Image;
use crate::read_stats::Counters;
use crate::trace_record::{frames_of, load};
use crate::trace_replay::layouts;

/// The frames that hold what a boot reads, each once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkingSet {
    /// Bytes of the disk that the boot reads, each block once.
    pub read_bytes: u64,
    /// Frames that these lie in.
    pub frames: u64,
    /// Bytes of these frames as they are stored.
    pub stored_bytes: u64,
}

/// Tells what the boot trace of an image comes to; `None` when it has none.
///
/// Reads where the frames lie of each pack that it names, and no frame.
///
/// # Errors
/// Those of the store.
pub fn boot_working_set(
    store: &Arc<Store>,
    cache: &Arc<BaseCache>,
    manifest: Manifest,
) -> Result<Option<WorkingSet>, Arc<StoreError>> {
    let Some(trace) = load(store, &manifest.digest()).map_err(Arc::new)? else { return Ok(None) };
    let counters = Arc::new(Counters::default());
    let image = Image::new(Arc::clone(store), Arc::clone(cache.shared()), manifest, counters);
    let frames = frames_of(&image, &trace);
    let layouts = layouts(&image, &frames)?;
    let stored = frames.iter().filter_map(|at| layouts.get(&at.pack)?.stored_range(at.frame));
    Ok(Some(WorkingSet {
        read_bytes: trace.blocks() * BLOCK_BYTES,
        frames: frames.len() as u64,
        stored_bytes: stored.map(|range| range.end - range.start).sum(),
    }))
}
