//! Fetches frames that are not in the cache: each once, however many ask for it.
//!
//! ```text
//! claim ──► flight (one for each frame of the process) ──► lock between processes ──► one ranged read
//!              ▲ others wait on it                             │ another process has it: wait for its mark
//!              └── done: plain bytes, served from memory ◄─────┴── decode, verify
//!                                       └──► written into the cache file, mark set, unlocked, flight over
//! ```
//! A flight is in the table until its frame is in the file, so whoever comes in between finds it. When
//! the file cannot be written, the last frames stay in memory for a while. Nothing of a failure is
//! kept: the next read begins anew.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulbil_store::{PackId, StoreError, StoreErrorKind};

use crate::cache::{CacheShared, PackHandle, lock};
use crate::cache_file::CacheFile;
use crate::fetch_pool::Class;
use crate::image::{FrameAt, Image};

/// Frames of one request to the store when nothing is known of where they lie: at most 1 MiB stored.
pub(crate) const RUN_FRAMES: u32 = 8;

/// Frames that wait in memory to be written: 4 MiB. With more, who fetches writes by itself.
const MAX_UNWRITTEN: usize = 32;

/// Frames kept in memory although they cannot be written: 2 MiB.
const MAX_UNCACHED: usize = 16;

/// How long a reader waits for another thread's fetch: longer than a store takes to give up (30 s),
/// with one attempt before it in the queue.
const FLIGHT_LIMIT: Duration = Duration::from_secs(75);

/// How long to wait for another process before fetching the same frame beside it.
const FOREIGN_LIMIT: Duration = Duration::from_secs(40);

/// For whom a frame is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A read waits for it.
    Demand,
    /// It is expected to be read: frames that another process fetches are left to that.
    Ahead,
}

/// How the fetch of a frame went.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// Verified plain bytes.
    Plain(Arc<Vec<u8>>),
    /// Another process has written it into the cache file.
    InFile,
    /// It was not fetched, since nobody waited for it.
    Skipped,
    Failed(Arc<StoreError>),
}

/// The fetch of one frame.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) need: Need,
    outcome: Mutex<Option<Outcome>>,
    done: Condvar,
}

impl Flight {
    fn complete(&self, outcome: Outcome) {
        lock(&self.outcome).get_or_insert(outcome);
        self.done.notify_all();
    }

    /// The error that the fetch ended with, if it did.
    pub(crate) fn failure(&self) -> Option<Arc<StoreError>> {
        match &*lock(&self.outcome) {
            Some(Outcome::Failed(error)) => Some(Arc::clone(error)),
            _ => None,
        }
    }

    /// Waits for the outcome; `None` after a bound that a working store never reaches.
    pub(crate) fn wait(&self) -> Option<Outcome> {
        let outcome = lock(&self.outcome);
        let waited = self.done.wait_timeout_while(outcome, FLIGHT_LIMIT, |outcome| outcome.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

type Key = (PackId, u32);

/// The flights of a process.
#[derive(Debug, Default)]
pub(crate) struct Fetcher {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    flights: HashMap<Key, Arc<Flight>>,
    unwritten: usize,
    /// Finished flights whose frames could not be written.
    uncached: VecDeque<Key>,
}

/// What to do about a frame that was not in the cache a moment ago.
pub(crate) enum Claim {
    InFile,
    Joined(Arc<Flight>),
    /// The caller must put it into a [`Run`].
    Mine(Arc<Flight>),
}

impl Fetcher {
    pub(crate) fn claim(&self, key: Key, handle: &PackHandle, need: Need) -> Claim {
        let mut table = lock(&self.table);
        if let Some(flight) = table.flights.get(&key) {
            return Claim::Joined(Arc::clone(flight));
        }
        // Under the table's lock: a flight leaves the table after its frame is in the file.
        if handle.has(key.1) {
            return Claim::InFile;
        }
        let flight = Arc::new(Flight { need, outcome: Mutex::default(), done: Condvar::new() });
        table.flights.insert(key, Arc::clone(&flight));
        Claim::Mine(flight)
    }

    fn remove(&self, key: Key) {
        lock(&self.table).flights.remove(&key);
    }

    /// Takes a flight out of the table whose fetch does not come to an end.
    pub(crate) fn forget(&self, key: Key, flight: &Arc<Flight>) {
        let mut table = lock(&self.table);
        if table.flights.get(&key).is_some_and(|found| Arc::ptr_eq(found, flight)) {
            table.flights.remove(&key);
        }
    }

    fn keep_uncached(&self, key: Key) {
        let mut table = lock(&self.table);
        table.uncached.push_back(key);
        if table.uncached.len() > MAX_UNCACHED
            && let Some(oldest) = table.uncached.pop_front()
        {
            table.flights.remove(&oldest);
        }
    }

    /// Whether one more frame may wait in memory; counts it if so.
    fn may_wait(&self) -> bool {
        let mut table = lock(&self.table);
        let room = table.unwritten < MAX_UNWRITTEN;
        table.unwritten += usize::from(room);
        room
    }

    fn written(&self) {
        let mut table = lock(&self.table);
        table.unwritten = table.unwritten.saturating_sub(1);
    }
}

/// Frames of one pack that are fetched together, in ascending order, each claimed.
///
/// Frames between them that are not part of the run are read over when the gap is at most `max_gap`.
#[derive(Debug)]
pub(crate) struct Run {
    image: Arc<Image>,
    pack: u32,
    need: Need,
    max_gap: u32,
    flights: VecDeque<(u32, Arc<Flight>)>,
}

impl Drop for Run {
    /// A run that did not end, because its thread could not, must not leave anybody waiting.
    fn drop(&mut self) {
        for (frame, flight) in std::mem::take(&mut self.flights) {
            self.settle(frame, &flight, Outcome::Skipped);
        }
    }
}

/// Joins claimed frames into runs: neighbours in one pack, at most [`RUN_FRAMES`] of them.
pub(crate) fn join(image: &Arc<Image>, need: Need, mut claimed: Vec<(FrameAt, Arc<Flight>)>) -> Vec<Run> {
    claimed.sort_by_key(|(at, _)| *at);
    let mut runs: Vec<Run> = Vec::new();
    for (at, flight) in claimed {
        let joins = |run: &Run| {
            let follows = run.flights.back().is_some_and(|(last, _)| last + 1 == at.frame);
            run.pack == at.pack && follows && run.flights.len() < RUN_FRAMES as usize
        };
        match runs.last_mut() {
            Some(run) if joins(run) => run.flights.push_back((at.frame, flight)),
            _ => runs.push(Run::new(image, at.pack, need, 0, [(at.frame, flight)].into())),
        }
    }
    runs
}

impl Run {
    pub(crate) fn new(
        image: &Arc<Image>,
        pack: u32,
        need: Need,
        max_gap: u32,
        flights: VecDeque<(u32, Arc<Flight>)>,
    ) -> Self {
        Self { image: Arc::clone(image), pack, need, max_gap, flights }
    }

    fn cache(&self) -> &Arc<CacheShared> {
        &self.image.cache
    }

    fn key(&self, frame: u32) -> Key {
        (self.image.pack(self.pack).id, frame)
    }

    /// Ends a flight without a frame in memory.
    fn settle(&self, frame: u32, flight: &Flight, outcome: Outcome) {
        // First out of the table, so that who sees a failure and comes again begins anew.
        self.cache().fetcher.remove(self.key(frame));
        flight.complete(outcome);
    }

    /// Fetches the frames; every flight has an outcome afterwards.
    pub(crate) fn execute(mut self) {
        let image = Arc::clone(&self.image);
        let file = self.cache().file(image.handle(self.pack), &image.store, image.pack(self.pack));
        let Some(file) = file else {
            let all = std::mem::take(&mut self.flights);
            self.fetch(None, all);
            return;
        };
        let foreign = self.lock(&file);
        let mine = std::mem::take(&mut self.flights);
        self.flights = foreign;
        self.fetch(Some(&file), mine);
        self.wait_for_others(&file);
    }

    /// Locks the frames; settles those that are in the file, and returns those that other processes fetch.
    fn lock(&mut self, file: &CacheFile) -> VecDeque<(u32, Arc<Flight>)> {
        let (Some((first, _)), Some((last, _))) = (self.flights.front(), self.flights.back()) else {
            return VecDeque::new();
        };
        let span = *first..last + 1;
        let mut locked = VecDeque::new();
        let mut foreign = VecDeque::new();
        let all = std::mem::take(&mut self.flights);
        if span.len() == all.len() && file.try_lock(span.clone()) {
            locked = all;
        } else {
            for (frame, flight) in all {
                let group = if file.try_lock(frame..frame + 1) { &mut locked } else { &mut foreign };
                group.push_back((frame, flight));
            }
        }
        // After the locks: a process that had one has set its mark before it let go.
        file.refresh(span);
        for (frame, flight) in locked {
            if file.has(frame) {
                file.unlock(frame..frame + 1);
                self.settle(frame, &flight, Outcome::InFile);
            } else {
                self.flights.push_back((frame, flight));
            }
        }
        foreign
    }

    /// Waits until other processes have fetched the rest, and does what they leave undone.
    fn wait_for_others(&mut self, file: &Arc<CacheFile>) {
        let started = Instant::now();
        let mut pause = Duration::from_micros(200);
        while let Some((frame, flight)) = self.flights.pop_front() {
            file.refresh(frame..frame + 1);
            if file.has(frame) {
                self.settle(frame, &flight, Outcome::InFile);
            } else if self.need == Need::Ahead {
                self.settle(frame, &flight, Outcome::Skipped);
            } else if file.try_lock(frame..frame + 1) {
                // Its process has failed or died, or it was just written.
                file.refresh(frame..frame + 1);
                if file.has(frame) {
                    file.unlock(frame..frame + 1);
                    self.settle(frame, &flight, Outcome::InFile);
                } else {
                    self.fetch(Some(file), [(frame, flight)].into());
                }
            } else if started.elapsed() > FOREIGN_LIMIT {
                self.fetch(Some(file), [(frame, flight)].into());
            } else {
                self.flights.push_front((frame, flight));
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
        }
    }

    fn fetch(&self, file: Option<&Arc<CacheFile>>, mut frames: VecDeque<(u32, Arc<Flight>)>) {
        while let Some((first, flight)) = frames.pop_front() {
            let mut group = vec![(first, flight)];
            let mut last = first;
            while frames.front().is_some_and(|(frame, _)| frame - last <= 1 + self.max_gap) {
                let next = frames.pop_front().expect("just seen");
                last = next.0;
                group.push(next);
            }
            self.fetch_group(file, first..last + 1, group);
        }
    }

    /// Reads a range of frames with one request, and those that do not verify once more by themselves.
    fn fetch_group(&self, file: Option<&Arc<CacheFile>>, range: Range<u32>, group: Vec<(u32, Arc<Flight>)>) {
        let (image, pack) = (&self.image, self.image.pack(self.pack));
        let known = image.handle(self.pack).know_layout(&image.store, pack);
        if let Err(error) = known {
            group.iter().for_each(|(frame, flight)| self.fail(file, *frame, flight, Arc::clone(&error)));
            return;
        }
        let run = image.store.read_run(pack, range);
        image.counters.requests.fetch_add(1, Ordering::Relaxed);
        let run = match run {
            Ok(run) => {
                image.counters.stored_bytes.fetch_add(run.stored_bytes(), Ordering::Relaxed);
                Some(run)
            }
            Err(error) if error.kind() == StoreErrorKind::Corrupt => {
                tracing::warn!(pack = %pack.id, %error, "frames cannot be read together; reading each again");
                None
            }
            Err(error) => {
                let error = Arc::new(error);
                for (frame, flight) in group {
                    self.fail(file, frame, &flight, Arc::clone(&error));
                }
                return;
            }
        };
        for (frame, flight) in group {
            let decoded = run.as_ref().map(|run| image.store.decode_frame(run, frame));
            let plain = match decoded {
                Some(Ok(plain)) => Ok(plain),
                // Perhaps it was damaged on the way.
                Some(Err(_)) | None => {
                    image.counters.requests.fetch_add(1, Ordering::Relaxed);
                    image.store.read_frame(pack, frame)
                }
            };
            match plain {
                Ok(plain) => self.deliver(file, frame, &flight, plain),
                Err(error) => self.fail(file, frame, &flight, Arc::new(error)),
            }
        }
    }

    fn fail(&self, file: Option<&Arc<CacheFile>>, frame: u32, flight: &Flight, error: Arc<StoreError>) {
        if let Some(file) = file {
            file.unlock(frame..frame + 1);
        }
        self.settle(frame, flight, Outcome::Failed(error));
    }

    /// Hands a verified frame to those who wait, and then to the cache.
    fn deliver(&self, file: Option<&Arc<CacheFile>>, frame: u32, flight: &Flight, plain: Vec<u8>) {
        let at = FrameAt { pack: self.pack, frame };
        let (counters, len_bytes) = (&self.image.counters, plain.len() as u64);
        match self.need {
            Need::Demand => {
                counters.demand_frames.fetch_add(1, Ordering::Relaxed);
                counters.demand_bytes.fetch_add(len_bytes, Ordering::Relaxed);
            }
            Need::Ahead => {
                counters.prefetched_frames.fetch_add(1, Ordering::Relaxed);
                counters.prefetched_bytes.fetch_add(len_bytes, Ordering::Relaxed);
                self.image.note_fetched_ahead(at);
            }
        }
        let plain = Arc::new(plain);
        let fetcher = &self.cache().fetcher;
        let Some(file) = file else {
            flight.complete(Outcome::Plain(plain));
            fetcher.keep_uncached(self.key(frame));
            return;
        };
        file.set_in_memory(frame);
        flight.complete(Outcome::Plain(Arc::clone(&plain)));
        let write = WriteFrame { cache: Arc::clone(self.cache()), file: Arc::clone(file), key: self.key(frame), plain };
        if self.need == Need::Demand && fetcher.may_wait() {
            self.cache().pool.submit(Class::Write, move || {
                write.cache.fetcher.written();
                write.run();
            });
        } else {
            write.run();
        }
    }
}

/// A frame on its way into the cache file.
struct WriteFrame {
    cache: Arc<CacheShared>,
    file: Arc<CacheFile>,
    key: Key,
    plain: Arc<Vec<u8>>,
}

impl WriteFrame {
    fn run(self) {
        let frame = self.key.1;
        let written = self.file.write(frame, &self.plain);
        self.file.unlock(frame..frame + 1);
        if written {
            self.cache.fetcher.remove(self.key);
            self.cache.note_written(self.plain.len() as u64);
        } else {
            self.cache.fetcher.keep_uncached(self.key);
        }
    }
}
