//! Fills the base cache with all of an image, before anything asks for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bulbil_store::{Manifest, Store, StoreError, StoreErrorKind};
use bulbil_types::{BLOCKS_PER_FRAME, FRAME_BYTES};

use crate::cache::BaseCache;
use crate::error::{VolumeError, VolumeErrorKind};
use crate::fetch_ahead;
use crate::image::{FrameAt, Image};
use crate::read_stats::Counters;
use crate::trace_replay::{PlannedRead, layouts, missing, plan};

/// Packs whose layouts are in memory at a time.
const PACKS_AT_A_TIME: usize = 8;

/// Listens to [`warm`], and may stop it. Called from several threads.
pub trait WarmObserver: Sync {
    /// `done_frames` of the `total_frames` of the image are in the cache.
    fn progress(&self, done_frames: u64, total_frames: u64);

    /// Whether to stop now; what was fetched stays.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Why [`warm`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmEnd {
    /// The whole image is in the cache.
    Complete,
    /// The image does not fit: more of it would only evict what is there.
    CacheFull,
    /// The observer asked to stop.
    Cancelled,
    /// The cache cannot be written, or others have evicted parts of it meanwhile.
    Incomplete,
}

/// What [`warm`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmReport {
    /// Why it ended.
    pub end: WarmEnd,
    /// Frames that hold the image.
    pub total_frames: u64,
    /// Frames of these that were in the cache before.
    pub present_frames: u64,
    /// Frames that this call has fetched.
    pub fetched_frames: u64,
    /// Stored bytes that were read for them.
    pub stored_bytes: u64,
    /// Requests to the store for frames.
    pub requests: u64,
}

/// Fetches every frame of a content that is not in the cache, in the order of the packs.
///
/// It may be stopped at any time and begun again: frames that are there are skipped. With a bounded
/// cache it stops at 90 % of the bound, where eviction would begin to undo it.
///
/// # Errors
/// `NotFound`, `Corrupt` or `Io` when the store cannot give a frame. What was fetched stays.
pub fn warm(
    store: &Arc<Store>,
    cache: &Arc<BaseCache>,
    manifest: &Manifest,
    observer: &dyn WarmObserver,
) -> Result<WarmReport, VolumeError> {
    let counters = Arc::new(Counters::default());
    let image = Image::new(Arc::clone(store), Arc::clone(cache.shared()), manifest.clone(), counters);
    let all = all_frames(manifest);
    let todo = missing(&image, &all);
    let present = all.len() - todo.len();
    let room = cache.shared().options.max_bytes.map_or(usize::MAX, |max_bytes| {
        usize::try_from(max_bytes / 10 * 9 / FRAME_BYTES).unwrap_or(usize::MAX).saturating_sub(present)
    });
    let fits = todo.len() <= room;
    let work = Warming { image, observer, total: all.len() as u64, present: present as u64 };
    observer.progress(work.present, work.total);
    // Whole packs at a time, so that neighbours are joined.
    let mut rest = &todo[..room.min(todo.len())];
    while !rest.is_empty() && !observer.is_cancelled() {
        let (now, later) = rest.split_at(packs_end(rest));
        rest = later;
        let layouts = layouts(&work.image, now).map_err(|error| failed(error.kind(), error))?;
        let mut unlimited = u64::MAX;
        work.fetch(&plan(now, &layouts, &mut unlimited))?;
    }
    let end = if observer.is_cancelled() {
        WarmEnd::Cancelled
    } else if !fits {
        WarmEnd::CacheFull
    } else if missing(&work.image, &all).is_empty() {
        WarmEnd::Complete
    } else {
        WarmEnd::Incomplete
    };
    let stats = work.image.counters.snapshot();
    Ok(WarmReport {
        end,
        total_frames: work.total,
        present_frames: work.present,
        fetched_frames: stats.prefetched_frames + stats.demand_frames,
        stored_bytes: stats.stored_bytes,
        requests: stats.requests,
    })
}

/// Every frame that the manifest refers to, in the order of packs.
fn all_frames(manifest: &Manifest) -> Vec<FrameAt> {
    let mut frames = BTreeSet::new();
    for extent in manifest.extents() {
        let first = u64::from(extent.block_in_pack) / BLOCKS_PER_FRAME;
        let last = (u64::from(extent.block_in_pack) + u64::from(extent.blocks) - 1) / BLOCKS_PER_FRAME;
        frames.extend((first..=last).map(|frame| FrameAt {
            pack: extent.pack,
            frame: u32::try_from(frame).expect("a pack holds 2048 frames"),
        }));
    }
    frames.into_iter().collect()
}

/// Where the first packs of a sorted list end.
fn packs_end(frames: &[FrameAt]) -> usize {
    let (mut packs, mut current) = (0, None);
    for (position, at) in frames.iter().enumerate() {
        if current != Some(at.pack) {
            if packs == PACKS_AT_A_TIME {
                return position;
            }
            packs += 1;
            current = Some(at.pack);
        }
    }
    frames.len()
}

struct Warming<'a> {
    image: Arc<Image>,
    observer: &'a dyn WarmObserver,
    total: u64,
    present: u64,
}

impl Warming<'_> {
    /// Makes the planned reads with several threads; the first error ends them all.
    fn fetch(&self, reads: &[PlannedRead]) -> Result<(), VolumeError> {
        let next = AtomicUsize::new(0);
        let ended = AtomicBool::new(false);
        let lanes = self.image.cache.pool.max_ahead().min(reads.len());
        let results: Vec<Result<(), Arc<StoreError>>> = std::thread::scope(|scope| {
            let lane = || {
                while !ended.load(Ordering::Relaxed) && !self.observer.is_cancelled() {
                    let Some(read) = reads.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    let fetched = fetch_ahead::fetch(&self.image, read.pack, &read.frames, read.max_gap);
                    if let Err(error) = fetched {
                        ended.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                    let fetched = self.image.counters.prefetched_frames.load(Ordering::Relaxed);
                    self.observer.progress(self.present + fetched, self.total);
                }
                Ok(())
            };
            let threads: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(Ok(()))).collect()
        });
        results.into_iter().collect::<Result<(), _>>().map_err(|error| failed(error.kind(), error))
    }
}

fn failed(kind: StoreErrorKind, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VolumeError {
    let kind = match kind {
        StoreErrorKind::NotFound => VolumeErrorKind::NotFound,
        StoreErrorKind::Corrupt => VolumeErrorKind::Corrupt,
        StoreErrorKind::NoSpace => VolumeErrorKind::NoSpace,
        _ => VolumeErrorKind::Io,
    };
    VolumeError::with_source(kind, "cannot fetch all of the image", source)
}
