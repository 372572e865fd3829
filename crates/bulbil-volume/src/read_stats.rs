//! What a volume's reads of its image cost.

use std::sync::atomic::{AtomicU64, Ordering};

/// What was fetched for a volume since it was opened. Bytes are plain ones unless it says otherwise.
///
/// A frame that another volume of this host had fetched already, or fetched for both, is in none of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadStats {
    /// Requests to the store for frames; those for footers and manifests are not counted.
    pub requests: u64,
    /// Stored bytes that these requests have read.
    pub stored_bytes: u64,
    /// Frames that were fetched while a read waited for them.
    pub demand_frames: u64,
    /// Bytes of these.
    pub demand_bytes: u64,
    /// Frames that were fetched before anything asked for them.
    pub prefetched_frames: u64,
    /// Bytes of these.
    pub prefetched_bytes: u64,
    /// Prefetched frames that were read afterwards.
    pub hit_frames: u64,
    /// Prefetched frames that nothing has read yet.
    pub wasted_frames: u64,
}

impl ReadStats {
    /// The sum of both.
    pub(crate) fn plus(&self, other: &Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            stored_bytes: self.stored_bytes + other.stored_bytes,
            demand_frames: self.demand_frames + other.demand_frames,
            demand_bytes: self.demand_bytes + other.demand_bytes,
            prefetched_frames: self.prefetched_frames + other.prefetched_frames,
            prefetched_bytes: self.prefetched_bytes + other.prefetched_bytes,
            hit_frames: self.hit_frames + other.hit_frames,
            wasted_frames: self.wasted_frames + other.wasted_frames,
        }
    }
}

/// The same, while it is counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) stored_bytes: AtomicU64,
    pub(crate) demand_frames: AtomicU64,
    pub(crate) demand_bytes: AtomicU64,
    pub(crate) prefetched_frames: AtomicU64,
    pub(crate) prefetched_bytes: AtomicU64,
    pub(crate) hit_frames: AtomicU64,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> ReadStats {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (prefetched_frames, hit_frames) = (value(&self.prefetched_frames), value(&self.hit_frames));
        ReadStats {
            requests: value(&self.requests),
            stored_bytes: value(&self.stored_bytes),
            demand_frames: value(&self.demand_frames),
            demand_bytes: value(&self.demand_bytes),
            prefetched_frames,
            prefetched_bytes: value(&self.prefetched_bytes),
            hit_frames,
            wasted_frames: prefetched_frames.saturating_sub(hit_frames),
        }
    }
}
