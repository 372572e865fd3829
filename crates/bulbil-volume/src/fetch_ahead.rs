//! Reads ahead of who reads one after another.
//!
//! Streams are told by where they miss: a miss just behind what an earlier miss has fetched goes on
//! with that stream. Then the next chunk of the disk is fetched, and when the reader enters it, the one
//! after it. A stream over a network gets at most a quarter of what it has read so far, so that streams
//! that end cost little; one on this host, where only the processor is spent, as much again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bulbil_store::StoreError;
use bulbil_types::{BLOCK_BYTES, FRAME_BYTES};

use crate::base::claim_one;
use crate::cache::lock;
use crate::fetch::{Need, RUN_FRAMES, Run};
use crate::fetch_pool::Class;
use crate::image::{FrameAt, Image, Part};

const STREAMS: usize = 4;

/// A miss this far behind the expected place still belongs to the stream: other images may have
/// brought the frames between.
const TOLERANCE_BYTES: u64 = 256 << 10;

const NONE: u64 = u64::MAX;

/// How much is read ahead.
#[derive(Debug, Clone, Copy)]
struct Budget {
    /// What a stream has read comes to one byte ahead for so many.
    share: u64,
    max_bytes: u64,
}

const LOCAL: Budget = Budget { share: 1, max_bytes: 2 << 20 };
const REMOTE: Budget = Budget { share: 4, max_bytes: 4 << 20 };

/// A reader that goes through the disk.
#[derive(Debug, Clone, Copy)]
struct Stream {
    start: u64,
    /// Entering the chunk that begins here asks for the next one.
    trigger: u64,
    /// What was read or is being read ahead ends here.
    end: u64,
    used: u64,
}

/// Tells streams from other reads (pure).
#[derive(Debug)]
struct Detector {
    streams: [Stream; STREAMS],
    budget: Budget,
    clock: u64,
}

impl Detector {
    fn new(budget: Budget) -> Self {
        let nothing = Stream { start: NONE, trigger: NONE, end: NONE, used: 0 };
        Self { streams: [nothing; STREAMS], budget, clock: 0 }
    }

    /// Notes that a read of `missed` had to fetch; returns what to fetch ahead.
    fn miss(&mut self, missed: &Range<u64>) -> Option<Range<u64>> {
        self.clock += 1;
        let follows = |stream: &&mut Stream| {
            // Work ahead may have been dropped: then the miss is where that would have been.
            let from = stream.trigger.min(stream.end);
            stream.start != NONE && missed.start >= from && missed.start <= stream.end.saturating_add(TOLERANCE_BYTES)
        };
        let (clock, budget) = (self.clock, self.budget);
        // What was just fetched and is not in the file yet says nothing new.
        let known =
            |stream: &Stream| stream.start <= missed.start && missed.end <= stream.end && missed.start < stream.trigger;
        if self.streams.iter().any(known) {
            return None;
        }
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            stream.used = clock;
            stream.end = missed.end;
            stream.trigger = NONE;
            return stream.next_chunk(budget);
        }
        let oldest = self.streams.iter_mut().min_by_key(|stream| stream.used).expect("there are four");
        *oldest = Stream { start: missed.start, trigger: NONE, end: missed.end, used: clock };
        None
    }

    /// Notes that a read has entered a chunk; returns what to fetch ahead.
    fn enter(&mut self, read: &Range<u64>) -> Option<Range<u64>> {
        self.clock += 1;
        let (clock, budget) = (self.clock, self.budget);
        let stream = self.streams.iter_mut().find(|stream| read.contains(&stream.trigger))?;
        stream.used = clock;
        stream.next_chunk(budget)
    }
}

impl Stream {
    fn next_chunk(&mut self, budget: Budget) -> Option<Range<u64>> {
        let earned = (self.end - self.start) / budget.share / FRAME_BYTES * FRAME_BYTES;
        let len_bytes = earned.min(budget.max_bytes);
        self.trigger = NONE;
        // A single frame is not yet a direction.
        if len_bytes == 0 || self.end - self.start < 2 * FRAME_BYTES {
            return None;
        }
        let chunk = self.end..self.end.saturating_add(len_bytes);
        (self.trigger, self.end) = (chunk.start, chunk.end);
        Some(chunk)
    }
}

/// Reads ahead for one volume.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// The triggers of the streams, where a read sees them without a lock.
    triggers: [AtomicU64; STREAMS],
    detector: Mutex<Detector>,
}

impl Ahead {
    pub(crate) fn new(remote: bool) -> Self {
        let detector = Detector::new(if remote { REMOTE } else { LOCAL });
        Self { triggers: std::array::from_fn(|_| AtomicU64::new(NONE)), detector: Mutex::new(detector) }
    }

    /// Whether a read enters a chunk that was read ahead.
    pub(crate) fn is_due(&self, offset: u64, len_bytes: u64) -> bool {
        self.triggers.iter().any(|trigger| trigger.load(Ordering::Relaxed).wrapping_sub(offset) < len_bytes)
    }

    /// Fetches the next chunk for the reader that has entered one.
    pub(crate) fn go_on(&self, image: &Arc<Image>, offset: u64, len_bytes: u64) {
        self.act(image, |detector| detector.enter(&(offset..offset + len_bytes)));
    }

    /// Notes that a read has to fetch something.
    pub(crate) fn note_miss(&self, image: &Arc<Image>, offset: u64, len_bytes: u64) {
        let last = (offset + len_bytes).saturating_sub(1) / BLOCK_BYTES * BLOCK_BYTES;
        // What the last frame brings beside what was asked for.
        let end = last + image.part_at(last, FRAME_BYTES).len_bytes();
        self.act(image, |detector| detector.miss(&(offset..end.max(offset + len_bytes))));
    }

    fn act(&self, image: &Arc<Image>, decide: impl FnOnce(&mut Detector) -> Option<Range<u64>>) {
        let mut detector = lock(&self.detector);
        let chunk = decide(&mut detector);
        for (trigger, stream) in self.triggers.iter().zip(&detector.streams) {
            trigger.store(stream.trigger, Ordering::Relaxed);
        }
        drop(detector);
        let Some(chunk) = chunk else { return };
        for (pack, frames) in runs_of(image, chunk) {
            let image = Arc::clone(image);
            let pool = Arc::clone(&image.cache.pool);
            pool.submit(Class::Ahead, move || {
                if let Err(error) = fetch(&image, pack, &frames, 0) {
                    // Whoever needs one of the frames tries by itself, and then it is said.
                    tracing::debug!(%error, "cannot read ahead");
                }
            });
        }
    }
}

/// The frames of a range of the disk that are not near, as runs of neighbours.
fn runs_of(image: &Image, range: Range<u64>) -> Vec<(u32, Vec<u32>)> {
    let mut frames: Vec<FrameAt> = Vec::new();
    let end = range.end.min(image.manifest.size_bytes());
    image.for_each_part(range.start, end.saturating_sub(range.start), |part, _| {
        if let Part::Data { at, .. } = part
            && !image.handle(at.pack).is_near(at.frame)
        {
            frames.push(at);
        }
        true
    });
    frames.sort_unstable();
    frames.dedup();
    let mut runs: Vec<(u32, Vec<u32>)> = Vec::new();
    for at in frames {
        match runs.last_mut() {
            Some((pack, run))
                if *pack == at.pack
                    && run.len() < RUN_FRAMES as usize
                    && run.last().is_some_and(|last| last + 1 == at.frame) =>
            {
                run.push(at.frame);
            }
            _ => runs.push((at.pack, vec![at.frame])),
        }
    }
    runs
}

/// Fetches frames of one pack, in ascending order, that nobody waits for yet.
///
/// Only now are they claimed: until then a read that needs one fetches it by itself.
pub(crate) fn fetch(image: &Arc<Image>, pack: u32, frames: &[u32], max_gap: u32) -> Result<(), Arc<StoreError>> {
    let mut mine = Vec::new();
    for frame in frames {
        claim_one(image, FrameAt { pack, frame: *frame }, Need::Ahead, &mut mine);
    }
    let flights = mine.iter().map(|(at, flight)| (at.frame, Arc::clone(flight))).collect();
    Run::new(image, pack, Need::Ahead, max_gap, flights).execute();
    mine.iter().find_map(|(_, flight)| flight.failure()).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: u64 = FRAME_BYTES;

    fn frames(first: u64, count: u64) -> Range<u64> {
        first * FRAME..(first + count) * FRAME
    }

    #[test]
    fn a_reader_in_order_gets_growing_chunks_ahead() {
        let mut detector = Detector::new(LOCAL);
        assert_eq!(detector.miss(&frames(10, 1)), None);
        assert_eq!(detector.miss(&frames(11, 1)), Some(frames(12, 2)));
        assert_eq!(detector.enter(&frames(11, 1)), None);
        assert_eq!(detector.enter(&(12 * FRAME..12 * FRAME + 4096)), Some(frames(14, 4)));
        assert_eq!(detector.enter(&frames(14, 1)), Some(frames(18, 8)));
        assert_eq!(detector.enter(&frames(18, 1)), Some(frames(26, 16)));
        assert_eq!(detector.enter(&frames(26, 1)), Some(frames(42, 16)), "2 MiB at most");
    }

    #[test]
    fn over_a_network_a_stream_gets_a_quarter_of_what_it_has_read() {
        let mut detector = Detector::new(REMOTE);
        for frame in 0..3 {
            assert_eq!(detector.miss(&frames(frame, 1)), None);
        }
        assert_eq!(detector.miss(&frames(3, 1)), Some(frames(4, 1)));
        assert_eq!(detector.enter(&frames(4, 1)), Some(frames(5, 1)));
    }

    #[test]
    fn reads_here_and_there_get_nothing_and_streams_are_told_apart() {
        let mut detector = Detector::new(LOCAL);
        for frame in [100, 7, 3000, 50, 900, 20, 400] {
            assert_eq!(detector.miss(&frames(frame, 1)), None);
        }
        detector.miss(&frames(1000, 1));
        detector.miss(&frames(2000, 1));
        assert_eq!(detector.miss(&frames(1001, 1)), Some(frames(1002, 2)));
        assert_eq!(detector.miss(&frames(2001, 1)), Some(frames(2002, 2)));
    }

    #[test]
    fn a_stream_whose_chunk_was_dropped_goes_on() {
        let mut detector = Detector::new(LOCAL);
        detector.miss(&frames(0, 1));
        assert_eq!(detector.miss(&frames(1, 1)), Some(frames(2, 2)));
        assert_eq!(detector.miss(&frames(2, 1)), Some(frames(3, 3)));
    }
}
