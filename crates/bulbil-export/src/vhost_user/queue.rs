//! The thread of one queue.
//!
//! ```text
//! kick ──► take a batch ──► fast? ── yes ─► carried out here ──► answered with the batch, one call ──► guest
//!   ▲                          └──── no ──► worker ──► answered by itself, one call ─────────────────► guest
//!   └── look for more for a moment, then sleep
//! ```

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use tracing::error;
use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::execute::Disk;
use super::lock;
use super::memory::Memory;
use super::request::{Request, Status};
use super::ring::Ring;
use super::stats::Counters;
use super::workers::{Work, WorkerPool};

/// Requests taken at once. More would keep the first ones' answers waiting; fewer would call the guest more often.
const BATCH: usize = 16;
/// The first time spent looking for more after a request came soon after the last one.
const FIRST_WINDOW: Duration = Duration::from_micros(4);

/// A queue as its thread, workers and the control socket see it.
pub(super) struct QueueShared {
    ring: Mutex<Ring>,
    became_idle: Condvar,
    is_stopping: AtomicBool,
    wake: OwnedFd,
    counters: Arc<Counters>,
}

impl QueueShared {
    /// Answers a request and tells the guest.
    fn answer(&self, head: u16, written_bytes: u32) {
        let mut ring = lock(&self.ring);
        ring.answer(head, written_bytes);
        ring.notify();
        self.tell_if_idle(&ring);
    }

    fn tell_if_idle(&self, ring: &Ring) {
        if ring.is_idle() {
            self.became_idle.notify_all();
        }
    }

    /// Changes the ring and lets its thread look at it.
    pub(super) fn update(&self, change: impl FnOnce(&mut Ring)) {
        change(&mut lock(&self.ring));
        self.wake();
    }

    fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_le_bytes());
    }
}

/// A queue that is being served; dropping it stops it.
pub(super) struct RunningQueue {
    shared: Arc<QueueShared>,
    thread: Option<JoinHandle<()>>,
}

/// What a queue's thread needs besides the ring.
pub(super) struct QueueParts {
    pub(super) kick: OwnedFd,
    pub(super) disk: Disk,
    pub(super) workers: Arc<WorkerPool<Job>>,
    pub(super) counters: Arc<Counters>,
    pub(super) max_polling: Duration,
}

impl RunningQueue {
    /// Starts serving. Nothing is lost if the guest has kicked before: the ring is looked at first.
    pub(super) fn start(index: usize, ring: Ring, parts: QueueParts) -> std::io::Result<Self> {
        let (table, size) = ring.table();
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(QueueShared {
            ring: Mutex::new(ring),
            became_idle: Condvar::new(),
            is_stopping: AtomicBool::new(false),
            wake,
            counters: Arc::clone(&parts.counters),
        });
        let thread = QueueThread {
            shared: Arc::clone(&shared),
            table,
            size,
            parts,
            chain: Chain::default(),
            bounce: Vec::new(),
            heads: Vec::with_capacity(BATCH),
            answers: Vec::with_capacity(BATCH),
            window: Duration::ZERO,
        };
        let name = std::thread::Builder::new().name(format!("vhost-queue-{index}"));
        Ok(Self { shared, thread: Some(name.spawn(move || thread.run())?) })
    }

    pub(super) fn shared(&self) -> &QueueShared {
        &self.shared
    }

    /// Takes no further requests and returns where to go on, once those that were taken are answered.
    pub(super) fn stop(&mut self) -> u16 {
        self.shared.is_stopping.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread of a queue panicked");
            return lock(&self.shared.ring).next_available();
        }
        let ring = lock(&self.shared.ring);
        let ring = self.shared.became_idle.wait_while(ring, |ring| !ring.is_idle());
        ring.unwrap_or_else(PoisonError::into_inner).next_available()
    }
}

impl Drop for RunningQueue {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A request on its way to a worker.
pub(super) struct Job {
    queue: Arc<QueueShared>,
    memory: Arc<Memory>,
    disk: Disk,
    head: u16,
    request: Request,
    is_answered: bool,
}

impl Work for Job {
    fn run(mut self, bounce: &mut Vec<u8>) {
        let status = self.disk.run(&self.memory, &self.request, bounce);
        self.answer(status);
    }
}

impl Job {
    fn answer(&mut self, status: Status) {
        self.is_answered = true;
        let written = finish(&self.memory, &self.request, status, &self.queue.counters);
        self.queue.answer(self.head, written);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Only a panic in the device leaves a request unanswered; the guest must not wait for it.
        if !self.is_answered {
            self.answer(Status::IoError);
        }
    }
}

/// Writes the status; returns how much of the guest's memory was written.
fn finish(memory: &Memory, request: &Request, status: Status, counters: &Counters) -> u32 {
    if status != Status::Ok {
        Counters::count(&counters.failures);
    }
    // A status that is not in memory is the guest's loss: the answer itself is in the ring.
    let is_written = memory.write_obj(status as u8, request.status).is_ok();
    if is_written { request.written_bytes(status) } else { 0 }
}

struct QueueThread {
    shared: Arc<QueueShared>,
    table: GuestAddress,
    size: u16,
    parts: QueueParts,
    chain: Chain,
    bounce: Vec<u8>,
    heads: Vec<u16>,
    answers: Vec<(u16, u32)>,
    /// How long to look for more before sleeping.
    window: Duration,
}

impl QueueThread {
    fn run(mut self) {
        while !self.is_stopping() {
            if self.serve_batch() || self.poll_for_more() {
                continue;
            }
            if lock(&self.shared.ring).enable_kicks() {
                lock(&self.shared.ring).disable_kicks();
                continue;
            }
            self.sleep();
            lock(&self.shared.ring).disable_kicks();
        }
    }

    fn is_stopping(&self) -> bool {
        self.shared.is_stopping.load(Ordering::SeqCst)
    }

    /// Takes and serves some requests; false if there were none.
    fn serve_batch(&mut self) -> bool {
        let mut heads = std::mem::take(&mut self.heads);
        let memory = {
            let mut ring = lock(&self.shared.ring);
            ring.take(&mut heads, BATCH);
            Arc::clone(&ring.memory)
        };
        for head in heads.drain(..) {
            self.serve(&memory, head);
        }
        self.heads = heads;
        if self.answers.is_empty() {
            return self.is_busy_after_no_answers();
        }
        let mut ring = lock(&self.shared.ring);
        for (head, written_bytes) in self.answers.drain(..) {
            ring.answer(head, written_bytes);
        }
        ring.notify();
        self.shared.tell_if_idle(&ring);
        true
    }

    /// All went to workers, or there was nothing: only the ring knows.
    fn is_busy_after_no_answers(&self) -> bool {
        lock(&self.shared.ring).has_work()
    }

    fn serve(&mut self, memory: &Arc<Memory>, head: u16) {
        let request = match self.parse(memory, head) {
            Ok(request) => request,
            Err(fault) => {
                let mut ring = lock(&self.shared.ring);
                ring.abandon(head, &*fault);
                self.shared.tell_if_idle(&ring);
                return;
            }
        };
        let disk = &self.parts.disk;
        self.parts.counters.count_request(request.command, request.data_bytes);
        if !disk.is_inline(&request) {
            Counters::count(&self.parts.counters.slow_requests);
            let (queue, memory, disk) = (Arc::clone(&self.shared), Arc::clone(memory), disk.clone());
            self.parts.workers.submit(Job { queue, memory, disk, head, request, is_answered: false });
            return;
        }
        let run = AssertUnwindSafe(|| disk.run(memory, &request, &mut self.bounce));
        // A device that panics has failed this request; others are still served.
        let status = catch_unwind(run).unwrap_or(Status::IoError);
        self.answers.push((head, finish(memory, &request, status, &self.parts.counters)));
        // Its list is used again.
        if request.command.takes_data() {
            self.chain.readable = request.data;
        } else {
            self.chain.writable = request.data;
        }
    }

    fn parse(&mut self, memory: &Memory, head: u16) -> Result<Request, Box<dyn std::error::Error>> {
        self.chain.walk(memory, self.table, self.size, head)?;
        Ok(Request::parse(memory, &mut self.chain)?)
    }

    /// Looks for more for as long as it has paid off lately.
    fn poll_for_more(&self) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let until = Instant::now() + self.window;
        while !self.is_stopping() {
            if lock(&self.shared.ring).has_work() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            (0..32).for_each(|_| std::hint::spin_loop());
        }
        false
    }

    fn sleep(&mut self) {
        let fell_asleep = Instant::now();
        let (kick, wake) = (&self.parts.kick, &self.shared.wake);
        let mut fds = [PollFd::new(kick, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
        // A failed or interrupted wait only means to look again.
        let _ = poll(&mut fds, None);
        let is_readable = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
        let (is_kicked, is_woken) = (is_readable(&fds[0]), is_readable(&fds[1]));
        for (event, is_set) in [(kick, is_kicked), (wake, is_woken)] {
            if is_set {
                let _ = rustix::io::read(event, &mut [0; 8]);
            }
        }
        self.window = next_window(self.window, fell_asleep.elapsed(), self.parts.max_polling);
    }
}

/// How long to look for more next time, after a sleep of `slept`: longer if a little longer would have saved the
/// sleep, not at all if nothing came for long. An idle queue never looks.
fn next_window(window: Duration, slept: Duration, max: Duration) -> Duration {
    if slept > max { Duration::ZERO } else { (window * 2).max(FIRST_WINDOW).min(max) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_for_more_grows_while_it_would_help_and_ends_when_idle() {
        let max = Duration::from_micros(32);
        let us = Duration::from_micros;
        assert_eq!(next_window(us(0), us(20), max), us(4));
        assert_eq!(next_window(us(4), us(20), max), us(8));
        assert_eq!(next_window(us(32), us(1), max), us(32));
        assert_eq!(next_window(us(32), us(33), max), us(0));
        assert_eq!(next_window(us(4), us(0), us(0)), us(0), "switched off");
    }
}
