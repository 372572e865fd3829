//! Threads for requests that may wait.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits for work before it ends.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that start when needed and end when idle.
pub(super) struct Pool {
    max_threads: usize,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("max_threads", &self.max_threads).finish_non_exhaustive()
    }
}

impl Pool {
    pub(super) fn new(max_threads: usize) -> Arc<Self> {
        Arc::new(Self { max_threads: max_threads.max(1), queue: Mutex::default(), work: Condvar::new() })
    }

    /// Queues a job, first in first out, starting a thread when none is free. The kernel bounds how many there are.
    ///
    /// When no thread at all can be had the job runs here, on the caller.
    pub(super) fn submit(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.queue();
        queue.jobs.push_back(Box::new(job));
        if queue.jobs.len() <= queue.idle || queue.threads == self.max_threads {
            drop(queue);
            self.work.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let pool = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("fuse-worker".to_owned()).spawn(move || {
            let _count = ThreadCount(&pool);
            while let Some(job) = pool.next_job() {
                job();
            }
        });
        if spawned.is_err() {
            let mut queue = self.queue();
            queue.threads -= 1;
            let left = if queue.threads == 0 { std::mem::take(&mut queue.jobs) } else { VecDeque::new() };
            drop(queue);
            left.into_iter().for_each(|job| job());
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            let (woken, waited) = self.work.wait_timeout(queue, IDLE_LIMIT).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                return None;
            }
        }
    }

    /// Every section under this lock leaves the queue valid at each step.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a thread out, also when a device panicked in it.
struct ThreadCount<'a>(&'a Pool);

impl Drop for ThreadCount<'_> {
    fn drop(&mut self) {
        self.0.queue().threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_wait_for_each_other_only_when_all_threads_are_taken() {
        let pool = Pool::new(2);
        let (gate, opened) = std::sync::mpsc::channel::<()>();
        let (done, results) = std::sync::mpsc::channel();
        let slow = done.clone();
        pool.submit(move || {
            opened.recv().unwrap();
            slow.send("slow").unwrap();
        });
        for _ in 0..3 {
            let done = done.clone();
            pool.submit(move || done.send("fast").unwrap());
        }
        let patience = Duration::from_secs(30);
        for _ in 0..3 {
            assert_eq!(results.recv_timeout(patience).unwrap(), "fast");
        }
        gate.send(()).unwrap();
        assert_eq!(results.recv_timeout(patience).unwrap(), "slow");
    }
}
