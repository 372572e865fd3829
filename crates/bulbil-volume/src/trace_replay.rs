//! Fetches what a boot will touch, in its order, while the boot runs.
//!
//! The frames are taken in growing steps, so that the first ones come first and later ones are joined
//! well. Within a step, frames that lie near each other in a pack become one read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bulbil_store::{PackLayout, StoreError};

use crate::cache::lock;
use crate::fetch_ahead;
use crate::fetch_pool::Class;
use crate::image::{FrameAt, Image};
use crate::trace_record::{frames_of, load};

/// Frames of the first step and of the largest: 4 and 64 MiB of the disk.
const FIRST_STEP: usize = 32;
const LARGEST_STEP: usize = 512;

/// The most stored bytes of one read.
const MAX_READ_BYTES: u64 = 1 << 20;

/// The most frames of one read: they may be small.
const MAX_READ_FRAMES: usize = 64;

/// Bytes that may be read over to join two reads: less than a request costs over a network.
const MAX_GAP_BYTES: u64 = 64 << 10;

/// All gaps together come to one byte in so many of what is wanted.
const GAP_SHARE: u64 = 12;

/// A read that fetches frames nobody waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlannedRead {
    pub(crate) pack: u32,
    /// In ascending order.
    pub(crate) frames: Vec<u32>,
    /// The most frames between two of these.
    pub(crate) max_gap: u32,
}

/// Joins frames into reads (pure): those of one pack whose gaps are small, as far as `gap_bytes` goes.
pub(crate) fn plan(frames: &[FrameAt], layouts: &BTreeMap<u32, PackLayout>, gap_bytes: &mut u64) -> Vec<PlannedRead> {
    let mut sorted = frames.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut reads: Vec<PlannedRead> = Vec::new();
    // Stored bytes of the last read.
    let (mut start, mut end) = (0, 0);
    for at in sorted {
        let Some(range) = layouts.get(&at.pack).and_then(|layout| layout.stored_range(at.frame)) else { continue };
        let gap = range.start.saturating_sub(end);
        match reads.last_mut() {
            Some(read)
                if read.pack == at.pack
                    && gap <= MAX_GAP_BYTES.min(*gap_bytes)
                    && range.end.saturating_sub(start) <= MAX_READ_BYTES
                    && read.frames.len() < MAX_READ_FRAMES =>
            {
                *gap_bytes -= gap;
                let between = at.frame - read.frames.last().copied().unwrap_or(at.frame);
                read.max_gap = read.max_gap.max(between.saturating_sub(1));
                read.frames.push(at.frame);
            }
            _ => {
                reads.push(PlannedRead { pack: at.pack, frames: vec![at.frame], max_gap: 0 });
                start = range.start;
            }
        }
        end = range.end;
    }
    reads
}

/// Frames of a list that are not in the cache, also when another process has written them.
pub(crate) fn missing(image: &Image, frames: &[FrameAt]) -> Vec<FrameAt> {
    let mut by_pack: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for at in frames {
        by_pack.entry(at.pack).or_default().push(at.frame);
    }
    for (pack, frames) in by_pack {
        let (first, last) = (frames.iter().min().copied().unwrap_or(0), frames.iter().max().copied().unwrap_or(0));
        if let Some(file) = image.cache.file(image.handle(pack), &image.store, image.pack(pack)) {
            file.refresh(first..last + 1);
        }
    }
    frames.iter().filter(|at| !image.handle(at.pack).is_near(at.frame)).copied().collect()
}

/// Reads the layouts of the packs of these frames, several at a time.
pub(crate) fn layouts(image: &Arc<Image>, frames: &[FrameAt]) -> Result<BTreeMap<u32, PackLayout>, Arc<StoreError>> {
    let mut packs: Vec<u32> = frames.iter().map(|at| at.pack).collect();
    packs.sort_unstable();
    packs.dedup();
    let lanes = if image.store.is_remote() { 8 } else { 1 };
    let mut found = BTreeMap::new();
    for group in packs.chunks(lanes) {
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = group.iter().map(|pack| (*pack, scope.spawn(|| layout(image, *pack)))).collect();
            threads.into_iter().map(|(pack, thread)| (pack, thread.join())).collect()
        });
        for (pack, layout) in loaded {
            let lost = |_| Arc::new(StoreError::outside_frame(image.pack(pack).id));
            found.insert(pack, layout.map_err(lost)??);
        }
    }
    Ok(found)
}

fn layout(image: &Image, pack: u32) -> Result<PackLayout, Arc<StoreError>> {
    image.handle(pack).know_layout(&image.store, image.pack(pack))?;
    image.store.pack_layout(image.pack(pack)).map_err(Arc::new)
}

/// Counts reads that are under way, and holds back who would start too many.
#[derive(Debug, Default)]
struct Gate {
    running: Mutex<usize>,
    changed: Condvar,
}

/// Opens the gate for one more, also when its work was dropped.
struct Pass(Arc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        *lock(&self.0.running) -= 1;
        self.0.changed.notify_all();
    }
}

impl Gate {
    fn enter(self: &Arc<Self>, limit: usize) -> Pass {
        let running = lock(&self.running);
        let waited = self.changed.wait_while(running, |running| *running >= limit);
        *waited.unwrap_or_else(PoisonError::into_inner) += 1;
        Pass(Arc::clone(self))
    }
}

/// The replay of a volume.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    stopped: Arc<AtomicBool>,
    started: AtomicBool,
}

impl Replay {
    /// Starts the thread, once.
    pub(crate) fn start(&self, image: &Arc<Image>) {
        if self.started.swap(true, Ordering::Relaxed) {
            return;
        }
        let (image, stopped) = (Arc::clone(image), Arc::clone(&self.stopped));
        let spawned = std::thread::Builder::new().name("prefetch".to_owned()).spawn(move || {
            if let Err(error) = run(&image, &stopped) {
                // Reads go on by themselves.
                tracing::warn!(image = %image.manifest.digest(), %error, "stopped fetching what a boot needs");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot start fetching what a boot needs");
        }
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

fn run(image: &Arc<Image>, stopped: &AtomicBool) -> Result<(), Arc<StoreError>> {
    let Some(trace) = load(&image.store, &image.manifest.digest()).map_err(Arc::new)? else { return Ok(()) };
    let all = frames_of(image, &trace);
    let frames = missing(image, &all);
    if frames.is_empty() {
        return Ok(());
    }
    let gate = Arc::new(Gate::default());
    let failed = Arc::new(AtomicBool::new(false));
    let limit = image.cache.pool.max_ahead();
    let mut rest = frames.as_slice();
    let mut step = FIRST_STEP;
    while !rest.is_empty() && !stopped.load(Ordering::Relaxed) {
        let (now, later) = rest.split_at(step.min(rest.len()));
        rest = later;
        step = (step * 4).min(LARGEST_STEP);
        let now: Vec<_> = now.iter().filter(|at| !image.handle(at.pack).is_near(at.frame)).copied().collect();
        let layouts = layouts(image, &now)?;
        let wanted: u64 =
            now.iter().filter_map(|at| layouts.get(&at.pack)?.stored_range(at.frame)).map(|r| r.end - r.start).sum();
        let mut gap_bytes = wanted / GAP_SHARE;
        for read in plan(&now, &layouts, &mut gap_bytes) {
            let pass = gate.enter(limit);
            if stopped.load(Ordering::Relaxed) || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let (image, failed) = (Arc::clone(image), Arc::clone(&failed));
            let pool = Arc::clone(&image.cache.pool);
            pool.submit(Class::Ahead, move || {
                let _pass = pass;
                if let Err(error) = fetch_ahead::fetch(&image, read.pack, &read.frames, read.max_gap)
                    && !failed.swap(true, Ordering::Relaxed)
                {
                    // Reads that need the rest try by themselves.
                    tracing::warn!(image = %image.manifest.digest(), %error, "stopped fetching what a boot needs");
                }
            });
        }
    }
    Ok(())
}
