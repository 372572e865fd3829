//! Records what a boot touches first, and keeps it with the image.
//!
//! A recording ends 60 s after the first read, with 256 MiB, or when the boot is said to be ready. A
//! volume that is closed before has shown no boot, and nothing is kept of it. The first trace of an
//! image stays; a boot for which it missed more than a tenth of the frames adds to it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bulbil_store::{AttachmentKind, Digest, Store, StoreError, StoreErrorKind};
use bulbil_types::BLOCK_BYTES;

use crate::cache::lock;
use crate::image::{FrameAt, Image, Part};
use crate::trace::{MAX_RECORDED_BLOCKS, Trace};

const RECORDED_TIME: Duration = Duration::from_secs(60);

/// A trace that misses fewer than one in so many frames of a boot is good enough.
const TOLERATED_SHARE: usize = 10;

/// Disks up to 64 GiB have a bit for each block while they are recorded: 2 MiB of memory.
const MAX_NOTED_BYTES: u64 = 64 << 30;

/// Records for one volume.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// What every read looks at.
    active: AtomicBool,
    /// One bit for each block that was noted, so that reads of known blocks need no lock; empty for huge disks.
    noted: RwLock<Box<[AtomicU64]>>,
    recording: Mutex<Option<Recording>>,
    ended: Condvar,
}

#[derive(Debug)]
struct Recording {
    image: Arc<Image>,
    since: Option<Instant>,
    trace: Trace,
}

impl Recorder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            active: AtomicBool::new(false),
            noted: RwLock::default(),
            recording: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(crate) fn start(self: &Arc<Self>, image: &Arc<Image>) {
        let recording = Recording { image: Arc::clone(image), since: None, trace: Trace::default() };
        let disk_bytes = image.manifest.size_bytes();
        let words = if disk_bytes <= MAX_NOTED_BYTES { disk_bytes.div_ceil(64 * BLOCK_BYTES) } else { 0 };
        self.set_noted((0..words).map(|_| AtomicU64::new(0)).collect());
        *lock(&self.recording) = Some(recording);
        self.active.store(true, Ordering::Relaxed);
    }

    fn set_noted(&self, words: Box<[AtomicU64]>) {
        *self.noted.write().unwrap_or_else(PoisonError::into_inner) = words;
    }

    /// Whether all blocks of a read were noted before.
    pub(crate) fn knows(&self, offset: u64, len_bytes: u64) -> bool {
        let noted = self.noted.read().unwrap_or_else(PoisonError::into_inner);
        let mut known = true;
        for_each_word(offset, len_bytes, |word, mask| {
            known = known && noted.get(word).is_some_and(|word| word.load(Ordering::Relaxed) & mask == mask);
        });
        known
    }

    fn note(&self, offset: u64, len_bytes: u64) {
        let noted = self.noted.read().unwrap_or_else(PoisonError::into_inner);
        for_each_word(offset, len_bytes, |word, mask| {
            if let Some(word) = noted.get(word) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        });
    }

    /// Notes a read of the image.
    pub(crate) fn touch(self: &Arc<Self>, image: &Image, offset: u64, len_bytes: u64) {
        let mut guard = lock(&self.recording);
        let Some(recording) = guard.as_mut() else { return };
        let end = offset.saturating_add(len_bytes).min(image.manifest.size_bytes());
        image.for_each_part(offset, end.saturating_sub(offset), |part, at| {
            if let Part::Data { len_bytes, .. } = part {
                let first = at / BLOCK_BYTES;
                let blocks = (at + len_bytes).div_ceil(BLOCK_BYTES) - first;
                recording.trace.add(first, blocks, MAX_RECORDED_BLOCKS);
            }
            true
        });
        self.note(offset, len_bytes);
        if recording.since.is_none() {
            recording.since = Some(Instant::now());
            self.start_clock();
        }
        if recording.trace.blocks() >= MAX_RECORDED_BLOCKS {
            self.active.store(false, Ordering::Relaxed);
            self.ended.notify_all();
        }
    }

    /// Starts the thread that ends the recording in time: nobody may read any more by then.
    fn start_clock(self: &Arc<Self>) {
        let recorder = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("boot-trace".to_owned()).spawn(move || {
            let guard = lock(&recorder.recording);
            let going_on = |recording: &mut Option<Recording>| recording.is_some() && recorder.is_active();
            let waited = recorder.ended.wait_timeout_while(guard, RECORDED_TIME, going_on);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            if let Err(error) = recorder.finish() {
                tracing::warn!(%error, "cannot keep the boot trace of an image");
            }
        });
        if let Err(error) = spawned {
            tracing::debug!(%error, "no thread for the clock of a boot trace");
        }
    }

    fn take(&self) -> Option<Recording> {
        self.active.store(false, Ordering::Relaxed);
        let recording = lock(&self.recording).take();
        self.set_noted(Box::default());
        self.ended.notify_all();
        recording
    }

    /// Ends the recording and keeps it with the image; returns whether anything was written.
    pub(crate) fn finish(&self) -> Result<bool, StoreError> {
        match self.take() {
            Some(recording) if recording.trace.blocks() > 0 => keep(&recording.image, &recording.trace),
            _ => Ok(false),
        }
    }

    /// Ends the recording and keeps nothing.
    pub(crate) fn cancel(&self) {
        drop(self.take());
    }
}

/// Calls `each` with every word of 64 blocks that a range touches, and the bits of its blocks.
fn for_each_word(offset: u64, len_bytes: u64, mut each: impl FnMut(usize, u64)) {
    let end = offset.saturating_add(len_bytes).div_ceil(BLOCK_BYTES);
    let mut block = offset / BLOCK_BYTES;
    while block < end {
        let blocks = (64 - block % 64).min(end - block);
        each(usize::try_from(block / 64).unwrap_or(usize::MAX), u64::MAX >> (64 - blocks) << (block % 64));
        block += blocks;
    }
}

/// Reads the boot trace of an image; `None` when it has none that can be understood.
pub(crate) fn load(store: &Store, digest: &Digest) -> Result<Option<Trace>, StoreError> {
    match store.attachment(digest, AttachmentKind::BootTrace) {
        Ok(bytes) => {
            let parsed = Trace::parse(&bytes);
            if let Err(what) = parsed {
                tracing::warn!(image = %digest, what, "the boot trace of an image is no use");
            }
            Ok(parsed.ok())
        }
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == StoreErrorKind::Corrupt => {
            tracing::warn!(image = %digest, %error, "the boot trace of an image is no use");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Stores a recorded trace unless the one that is there was good enough.
fn keep(image: &Image, recorded: &Trace) -> Result<bool, StoreError> {
    let digest = image.manifest.digest();
    let trace = match load(&image.store, &digest)? {
        None => recorded.clone(),
        Some(old) => {
            let known: HashSet<FrameAt> = frames_of(image, &old).into_iter().collect();
            let touched = frames_of(image, recorded);
            let missed = touched.iter().filter(|frame| !known.contains(frame)).count();
            if missed * TOLERATED_SHARE <= touched.len() {
                return Ok(false);
            }
            old.merged_with(recorded)
        }
    };
    image.store.put_attachment(&digest, AttachmentKind::BootTrace, &trace.encode())?;
    tracing::debug!(image = %digest, blocks = trace.blocks(), "kept the boot trace of an image");
    Ok(true)
}

/// The frames that hold the blocks of a trace now, in its order, each once.
pub(crate) fn frames_of(image: &Image, trace: &Trace) -> Vec<FrameAt> {
    let mut seen = HashSet::new();
    let mut frames = Vec::new();
    for run in trace.runs() {
        image.for_each_part(run.first_block * BLOCK_BYTES, run.blocks * BLOCK_BYTES, |part, _| {
            if let Part::Data { at, .. } = part
                && seen.insert(at)
            {
                frames.push(at);
            }
            true
        });
    }
    frames
}

/// Gives a content the boot trace of the one that it was made of, when it has none of its own.
///
/// A snapshot boots much as its image does; blocks that it has changed are simply other frames. Returns
/// whether a trace was copied. Durable when this returns.
///
/// # Errors
/// `Io`, `NoSpace` or `Timeout` of the store; the content is usable all the same.
pub fn inherit_trace(store: &Store, parent: &Digest, child: &Digest) -> Result<bool, StoreError> {
    if parent == child || load(store, child)?.is_some() {
        return Ok(false);
    }
    let Some(trace) = load(store, parent)? else { return Ok(false) };
    store.put_attachment(child, AttachmentKind::BootTrace, &trace.encode())?;
    Ok(true)
}
