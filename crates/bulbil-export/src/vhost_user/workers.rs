//! Threads for requests that may wait for a disk or the network.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;

/// How long a thread waits for work before it ends, and with it its buffer.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// Something that a worker does with its buffer.
pub(super) trait Work: Send + 'static {
    fn run(self, bounce: &mut Vec<u8>);
}

/// Worker threads that start when needed and end when idle.
///
/// The queue needs no bound of its own: a ring never has more requests in flight than its size.
pub(super) struct WorkerPool<W> {
    max_threads: usize,
    queue: Mutex<Queue<W>>,
    arrived: Condvar,
}

struct Queue<W> {
    jobs: VecDeque<W>,
    threads: usize,
    idle: usize,
    is_closed: bool,
}

impl<W: Work> WorkerPool<W> {
    pub(super) fn new(max_threads: usize) -> Arc<Self> {
        let queue = Queue { jobs: VecDeque::new(), threads: 0, idle: 0, is_closed: false };
        Arc::new(Self { max_threads: max_threads.max(1), queue: Mutex::new(queue), arrived: Condvar::new() })
    }

    /// Queues a job, first in first out, starting a thread when none is free. When no thread at all can be had the job
    /// runs here, on the caller.
    pub(super) fn submit(self: &Arc<Self>, job: W) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.jobs.len() <= queue.idle || queue.threads == self.max_threads {
            drop(queue);
            self.arrived.notify_one();
            return;
        }
        queue.threads += 1;
        let pool = Arc::clone(self);
        let thread = std::thread::Builder::new().name("vhost-worker".to_owned());
        if thread.spawn(move || pool.work()).is_ok() {
            return;
        }
        queue.threads -= 1;
        if queue.threads == 0 {
            let jobs = std::mem::take(&mut queue.jobs);
            drop(queue);
            let mut bounce = Vec::new();
            jobs.into_iter().for_each(|job| job.run(&mut bounce));
        }
    }

    /// Lets the threads end once nothing is queued.
    pub(super) fn close(&self) {
        lock(&self.queue).is_closed = true;
        self.arrived.notify_all();
    }

    fn work(&self) {
        let _count = ThreadCount(self);
        let mut bounce = Vec::new();
        while let Some(job) = self.next_job() {
            job.run(&mut bounce);
        }
    }

    fn next_job(&self) -> Option<W> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.is_closed {
                return None;
            }
            queue.idle += 1;
            let (woken, waited) = self.arrived.wait_timeout(queue, IDLE_LIMIT).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                return None;
            }
        }
    }
}

/// Counts a thread out, also when a device panicked in it.
struct ThreadCount<'a, W>(&'a WorkerPool<W>);

impl<W> Drop for ThreadCount<'_, W> {
    fn drop(&mut self) {
        lock(&self.0.queue).threads -= 1;
    }
}
