//! The threads of a process that fetch frames beside the one that asked.
//!
//! Three classes of work, each before the next: what a guest waits for, frames that are still to be
//! written into the cache, and what is fetched ahead. Work ahead never takes all threads. Threads are
//! started when there is work for them and end after five idle seconds.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Threads for a store behind a network: each waits for one request most of its time.
const REMOTE_THREADS: usize = 16;
const REMOTE_AHEAD: usize = 8;

/// Work ahead that waits; more is not worth having, since its reader is elsewhere by then.
const MAX_AHEAD_QUEUE: usize = 64;

const IDLE: Duration = Duration::from_secs(5);

/// What a piece of work is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Somebody waits for it.
    Demand,
    /// A frame goes into the cache file; it is in memory until then.
    Write,
    /// Nobody waits for it yet.
    Ahead,
}

type Job = Box<dyn FnOnce() + Send>;

/// A bounded number of threads.
pub(crate) struct Pool {
    state: Mutex<State>,
    wake: Condvar,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("Pool").field("threads", &state.threads).field("idle", &state.idle).finish_non_exhaustive()
    }
}

struct State {
    demand: VecDeque<Job>,
    writes: VecDeque<Job>,
    ahead: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ahead_running: usize,
    max_threads: usize,
    max_ahead: usize,
    closed: bool,
}

impl State {
    fn take(&mut self) -> Option<(Class, Job)> {
        if let Some(job) = self.demand.pop_front() {
            return Some((Class::Demand, job));
        }
        if let Some(job) = self.writes.pop_front() {
            return Some((Class::Write, job));
        }
        if self.ahead_running < self.max_ahead
            && let Some(job) = self.ahead.pop_front()
        {
            self.ahead_running += 1;
            return Some((Class::Ahead, job));
        }
        None
    }
}

impl Pool {
    pub(crate) fn new() -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let state = State {
            demand: VecDeque::new(),
            writes: VecDeque::new(),
            ahead: VecDeque::new(),
            threads: 0,
            idle: 0,
            ahead_running: 0,
            max_threads: cores + 1,
            max_ahead: cores,
            closed: false,
        };
        Arc::new(Self { state: Mutex::new(state), wake: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allows the threads that a store behind a network needs.
    pub(crate) fn allow_remote(&self) {
        let mut state = self.lock();
        state.max_threads = state.max_threads.max(REMOTE_THREADS);
        state.max_ahead = state.max_ahead.max(REMOTE_AHEAD);
    }

    /// How many pieces of work ahead run at the same time.
    pub(crate) fn max_ahead(&self) -> usize {
        self.lock().max_ahead
    }

    /// Gives work to a thread. Work ahead is dropped without being done when much of it waits.
    pub(crate) fn submit(self: &Arc<Self>, class: Class, job: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.closed || (class == Class::Ahead && state.ahead.len() >= MAX_AHEAD_QUEUE) {
            return;
        }
        match class {
            Class::Demand => state.demand.push_back(Box::new(job)),
            Class::Write => state.writes.push_back(Box::new(job)),
            Class::Ahead => state.ahead.push_back(Box::new(job)),
        }
        let waiting = state.demand.len() + state.writes.len() + state.ahead.len();
        if waiting > state.idle && state.threads < state.max_threads {
            state.threads += 1;
            let pool = Arc::clone(self);
            let spawned = std::thread::Builder::new().name("frames".to_owned()).spawn(move || pool.work());
            if let Err(error) = spawned {
                state.threads -= 1;
                if state.threads == 0 {
                    tracing::warn!(%error, "cannot start a thread; its work is done by the caller");
                    let all = std::iter::from_fn(|| state.take().map(|(_, job)| job)).collect::<Vec<_>>();
                    state.ahead_running = 0;
                    drop(state);
                    all.into_iter().for_each(|job| job());
                    return;
                }
            }
        }
        drop(state);
        self.wake.notify_one();
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((class, job)) = state.take() {
                drop(state);
                // A job that panics must not take a thread's place for ever.
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                if done.is_err() {
                    tracing::error!("work on frames ended in a panic");
                }
                state = self.lock();
                if class == Class::Ahead {
                    state.ahead_running -= 1;
                }
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (woken, timeout) = self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            let nothing = state.demand.is_empty() && state.writes.is_empty() && state.ahead.is_empty();
            if timeout.timed_out() && nothing {
                break;
            }
        }
        state.threads -= 1;
    }

    /// Ends the threads; work that has not begun is dropped.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let dropped =
            [std::mem::take(&mut state.demand), std::mem::take(&mut state.writes), std::mem::take(&mut state.ahead)];
        drop(state);
        self.wake.notify_all();
        drop(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn work_that_somebody_waits_for_goes_past_work_ahead() {
        let pool = Pool::new();
        let max_ahead = pool.max_ahead();
        let (started, starts) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        for number in 0..max_ahead + 3 {
            let (started, released) = (started.clone(), Arc::clone(&released));
            pool.submit(Class::Ahead, move || {
                started.send(number).unwrap();
                released.lock().unwrap().recv().unwrap();
            });
        }
        for _ in 0..max_ahead {
            starts.recv().unwrap();
        }
        // All that may run ahead is stuck; this runs all the same.
        let (demand, done) = mpsc::channel();
        pool.submit(Class::Demand, move || demand.send(()).unwrap());
        done.recv().unwrap();
        for _ in 0..max_ahead + 3 {
            release.send(()).unwrap();
        }
        for _ in 0..3 {
            starts.recv().unwrap();
        }
        pool.close();
    }
}
