//! The image below a volume: a manifest, read through the base cache.
//!
//! A read whose frames are all in cache files costs one `pread` for each run of blocks. Otherwise the
//! missing frames are claimed, joined into runs and fetched together; see `fetch`.
//!
//! # When the store fails
//! The objects below the store repeat what failed until their deadline (about 30 s). Then the read is
//! an I/O error, for everybody who waits for that frame, and nothing of it is remembered: the next read
//! asks the store again. A frame that does not verify is read once more before it is an error. When a
//! pack is gone, the manifest was replaced by one of the same content in other packs: it is loaded once
//! and the read goes on with it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bulbil_store::{Digest, Manifest, Store, StoreError, StoreErrorKind};
use bulbil_types::FRAME_BYTES;

use crate::cache::{BaseCache, CacheRead, lock};
use crate::device::{BlockError, BlockErrorKind};
use crate::fetch::{Claim, Flight, Need, Outcome, join};
use crate::fetch_ahead::Ahead;
use crate::fetch_pool::Class;
use crate::image::{FrameAt, Image, Part};
use crate::read_stats::{Counters, ReadStats};
use crate::trace_record::Recorder;
use crate::trace_replay::Replay;

/// Bytes of one request that are fetched at a time: its frames are in memory until they are copied.
const WINDOW_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(crate) struct Base {
    digest: Digest,
    /// Replaced as a whole when the store has a newer edition of the manifest.
    image: RwLock<Arc<Image>>,
    /// How often the manifest was loaded again.
    reloads: AtomicU64,
    /// Held while it is.
    reloading: Mutex<()>,
    counters: Arc<Counters>,
    ahead: Ahead,
    recorder: Arc<Recorder>,
    replay: Replay,
    /// Keeps the threads that fetch.
    _cache: Arc<BaseCache>,
}

/// Why a range could not be read.
enum Failure {
    Store(Arc<StoreError>),
    /// No answer within the bound of a flight.
    Stuck,
}

/// A part of a read, and what is waited for.
struct Wanted {
    at: FrameAt,
    offset_in_frame: u64,
    /// Where it goes in the reader's buffer.
    start: usize,
    len: usize,
    /// `None` when the frame is in the file.
    flight: Option<Arc<Flight>>,
}

impl Base {
    pub(crate) fn new(store: Arc<Store>, cache: Arc<BaseCache>, manifest: Manifest) -> Self {
        let counters = Arc::new(Counters::default());
        let digest = manifest.digest();
        let remote = store.is_remote();
        let image = Image::new(store, Arc::clone(cache.shared()), manifest, Arc::clone(&counters));
        Self {
            digest,
            image: RwLock::new(image),
            reloads: AtomicU64::new(0),
            reloading: Mutex::new(()),
            counters,
            ahead: Ahead::new(remote),
            recorder: Recorder::new(),
            replay: Replay::default(),
            _cache: cache,
        }
    }

    pub(crate) fn stats(&self) -> ReadStats {
        self.counters.snapshot()
    }

    pub(crate) fn start_prefetch(&self) {
        self.replay.start(&self.image());
    }

    pub(crate) fn start_recording(&self) {
        self.recorder.start(&self.image());
    }

    pub(crate) fn finish_recording(&self) -> Result<bool, StoreError> {
        self.recorder.finish()
    }

    fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a block is in no extent and how many blocks from it, at most `limit`, are alike.
    pub(crate) fn hole_run(&self, block: u64, limit: u64) -> (bool, u64) {
        self.image.read().unwrap_or_else(PoisonError::into_inner).hole_run(block, limit)
    }

    /// Whether every frame of the range is in the cache or in memory.
    pub(crate) fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        self.image.read().unwrap_or_else(PoisonError::into_inner).is_near(offset, len_bytes)
    }

    /// Fills `buf` from `offset`; zeroes past the end of the image.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        let len_bytes = buf.len() as u64;
        if self.recorder.is_active() && !self.recorder.knows(offset, len_bytes) {
            self.recorder.touch(&self.image(), offset, len_bytes);
        }
        let warm = self.image.read().unwrap_or_else(PoisonError::into_inner).read_warm(buf, offset);
        if self.ahead.is_due(offset, len_bytes) {
            self.ahead.go_on(&self.image(), offset, len_bytes);
        }
        if warm == buf.len() { Ok(()) } else { self.read_cold(&mut buf[warm..], offset + warm as u64) }
    }

    fn read_cold(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.ahead.note_miss(&self.image(), offset, buf.len() as u64);
        let mut at = offset;
        for window in buf.chunks_mut(WINDOW_BYTES) {
            self.read_window(window, at)?;
            at += window.len() as u64;
        }
        Ok(())
    }

    fn read_window(&self, window: &mut [u8], offset: u64) -> Result<(), BlockError> {
        let reloads = self.reloads.load(Ordering::Acquire);
        let failure = match fetch_and_copy(&self.image(), window, offset) {
            Err(Failure::Store(error)) if error.kind() == StoreErrorKind::NotFound => {
                if !self.reload(reloads) {
                    Failure::Store(error)
                } else if let Err(failure) = fetch_and_copy(&self.image(), window, offset) {
                    failure
                } else {
                    return Ok(());
                }
            }
            Err(failure) => failure,
            Ok(()) => return Ok(()),
        };
        Err(self.failed(failure))
    }

    fn failed(&self, failure: Failure) -> BlockError {
        let text = format!("cannot read the image {}", self.digest);
        match failure {
            Failure::Store(error) => {
                tracing::error!(image = %self.digest, %error, "cannot read a frame of an image");
                BlockError::with_source(BlockErrorKind::Io, text, error)
            }
            Failure::Stuck => {
                tracing::error!(image = %self.digest, "a frame of an image was not fetched in time");
                BlockError::new(BlockErrorKind::Io, format!("{text} in time"))
            }
        }
    }

    /// Loads the manifest again; returns whether there is another one than before the read began.
    ///
    /// `seen` is the number of loads before it began: what another reader has loaded since is enough.
    fn reload(&self, seen: u64) -> bool {
        let _alone = lock(&self.reloading);
        if self.reloads.load(Ordering::Acquire) != seen {
            return true;
        }
        let old = self.image();
        let loaded = old.store.manifest(&self.digest);
        let changed = match loaded {
            Ok(manifest) if manifest != old.manifest => {
                tracing::info!(image = %self.digest, "the image has moved to other packs");
                let image =
                    Image::new(Arc::clone(&old.store), Arc::clone(&old.cache), manifest, Arc::clone(&self.counters));
                *self.image.write().unwrap_or_else(PoisonError::into_inner) = image;
                true
            }
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(image = %self.digest, %error, "cannot load the manifest of an image again");
                false
            }
        };
        self.reloads.fetch_add(1, Ordering::Release);
        changed
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        self.replay.stop();
        self.recorder.cancel();
    }
}

/// Claims the frames of a range; returns what to wait for and the runs to fetch.
fn claim(image: &Arc<Image>, window: &mut [u8], offset: u64) -> (Vec<Wanted>, Vec<crate::fetch::Run>) {
    let (mut wanted, mut mine) = (Vec::new(), Vec::new());
    let mut start = 0;
    image.for_each_part(offset, window.len() as u64, |part, _| {
        let len = usize::try_from(part.len_bytes()).expect("at most the length of a buffer");
        match part {
            Part::Hole { .. } => window[start..start + len].fill(0),
            Part::Data { at, offset_in_frame, .. } => {
                let flight = claim_one(image, at, Need::Demand, &mut mine);
                wanted.push(Wanted { at, offset_in_frame, start, len, flight });
            }
        }
        start += len;
        true
    });
    (wanted, join(image, Need::Demand, mine))
}

/// Claims a frame; a claim that is the caller's is put into `mine` as well.
pub(crate) fn claim_one(
    image: &Arc<Image>,
    at: FrameAt,
    need: Need,
    mine: &mut Vec<(FrameAt, Arc<Flight>)>,
) -> Option<Arc<Flight>> {
    match image.cache.fetcher.claim((image.pack(at.pack).id, at.frame), image.handle(at.pack), need) {
        Claim::InFile => None,
        Claim::Joined(flight) => Some(flight),
        Claim::Mine(flight) => {
            mine.push((at, Arc::clone(&flight)));
            Some(flight)
        }
    }
}

fn fetch_and_copy(image: &Arc<Image>, window: &mut [u8], offset: u64) -> Result<(), Failure> {
    let (wanted, runs) = claim(image, window, offset);
    let mut runs = runs.into_iter();
    let first = runs.next();
    for run in runs {
        image.cache.pool.submit(Class::Demand, move || run.execute());
    }
    // Here: a thread that waits is worth as much as one that fetches.
    if let Some(run) = first {
        run.execute();
    }
    for part in wanted {
        copy(image, &part, &mut window[part.start..part.start + part.len])?;
        image.touch(part.at);
    }
    Ok(())
}

fn copy(image: &Arc<Image>, part: &Wanted, buf: &mut [u8]) -> Result<(), Failure> {
    let mut flight = part.flight.clone();
    // The fetch that was joined may have been one that nobody waited for; then this read makes its own.
    for _ in 0..2 {
        let outcome = match &flight {
            None => Outcome::InFile,
            Some(flight) => flight.wait().ok_or_else(|| give_up(image, part.at, flight))?,
        };
        let again = match outcome {
            Outcome::Plain(plain) => return copy_part(&plain, part, buf, image),
            Outcome::InFile => match image.handle(part.at.pack).read(part.at.frame, part.offset_in_frame, buf) {
                CacheRead::Done => return Ok(()),
                // The file was evicted meanwhile.
                CacheRead::Absent => true,
                CacheRead::Failed => false,
            },
            Outcome::Skipped => true,
            Outcome::Failed(error) => {
                if flight.is_none_or(|flight| flight.need == Need::Demand) {
                    return Err(Failure::Store(error));
                }
                true
            }
        };
        if !again {
            break;
        }
        let mut mine = Vec::new();
        flight = claim_one(image, part.at, Need::Demand, &mut mine);
        join(image, Need::Demand, mine).into_iter().for_each(crate::fetch::Run::execute);
    }
    // The cache is no help; the store still has the frame.
    let plain = image.store.read_frame(image.pack(part.at.pack), part.at.frame);
    copy_part(&plain.map_err(|error| Failure::Store(Arc::new(error)))?, part, buf, image)
}

/// A flight whose thread is lost must not make the next read wait as well.
fn give_up(image: &Image, at: FrameAt, flight: &Arc<Flight>) -> Failure {
    image.cache.fetcher.forget((image.pack(at.pack).id, at.frame), flight);
    Failure::Stuck
}

fn copy_part(plain: &[u8], part: &Wanted, buf: &mut [u8], image: &Image) -> Result<(), Failure> {
    debug_assert!(plain.len() as u64 <= FRAME_BYTES);
    let start = usize::try_from(part.offset_in_frame).unwrap_or(usize::MAX);
    match plain.get(start..start.saturating_add(buf.len())) {
        Some(bytes) => {
            buf.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(Failure::Store(Arc::new(StoreError::outside_frame(image.pack(part.at.pack).id)))),
    }
}
