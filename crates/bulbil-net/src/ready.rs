//! Which flows have work: wakers that remember whom they were for.
//!
//! The link is one task with up to a thousand host sockets. Every flow polls its socket with a waker of its
//! own, which puts the flow's key on a shared list and wakes the task, so the task looks only at flows whose
//! sockets are ready.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

/// The keys woken since the last look.
#[derive(Debug)]
pub(crate) struct ReadyQueue<K> {
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    keys: Vec<K>,
    task: Option<Waker>,
}

impl<K> ReadyQueue<K> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { keys: Vec::new(), task: None }) })
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `task` woken at the next key.
    pub(crate) fn set_task(&self, task: &Waker) {
        let mut state = self.lock();
        match &mut state.task {
            Some(known) => known.clone_from(task),
            None => state.task = Some(task.clone()),
        }
    }

    /// Swaps the keys out into `into`, which is emptied first.
    pub(crate) fn take(&self, into: &mut Vec<K>) {
        into.clear();
        std::mem::swap(&mut self.lock().keys, into);
    }

    fn push(&self, key: K) {
        let task = {
            let mut state = self.lock();
            state.keys.push(key);
            state.task.clone()
        };
        if let Some(task) = task {
            task.wake();
        }
    }
}

/// The waker of one flow.
#[derive(Debug)]
pub(crate) struct FlowWaker<K> {
    inner: Arc<Inner<K>>,
    waker: Waker,
}

#[derive(Debug)]
struct Inner<K> {
    key: K,
    /// Whether the key is on the list already.
    listed: AtomicBool,
    queue: Arc<ReadyQueue<K>>,
}

impl<K: Copy + Send + Sync + 'static> FlowWaker<K> {
    pub(crate) fn new(key: K, queue: &Arc<ReadyQueue<K>>) -> Self {
        let inner = Arc::new(Inner { key, listed: AtomicBool::new(false), queue: Arc::clone(queue) });
        Self { waker: Waker::from(Arc::clone(&inner)), inner }
    }

    /// Lets the next wake list the key again; called before the flow's socket is polled.
    pub(crate) fn rearm(&self) {
        self.inner.listed.store(false, Ordering::Release);
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }
}

impl<K: Copy + Send + Sync + 'static> Wake for Inner<K> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.listed.swap(true, Ordering::AcqRel) {
            self.queue.push(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_listed_once_until_rearmed() {
        let queue = ReadyQueue::new();
        let flow = FlowWaker::new(7, &queue);
        flow.waker().wake_by_ref();
        flow.waker().wake_by_ref();
        let mut keys = vec![1];
        queue.take(&mut keys);
        assert_eq!(keys, [7]);
        flow.waker().wake_by_ref();
        queue.take(&mut keys);
        assert!(keys.is_empty());
        flow.rearm();
        flow.waker().wake_by_ref();
        queue.take(&mut keys);
        assert_eq!(keys, [7]);
    }
}
