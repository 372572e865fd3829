//! Deadlines of flows, earliest first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

/// A heap of (deadline, key). Nothing is ever taken out early: the owner of a key compares a deadline that
/// comes up with the one it has now, and puts it back when it has moved.
#[derive(Debug)]
pub(crate) struct Timers<K> {
    heap: BinaryHeap<Reverse<(Instant, K)>>,
}

impl<K: Ord + Copy> Timers<K> {
    pub(crate) fn new() -> Self {
        Self { heap: BinaryHeap::new() }
    }

    pub(crate) fn push(&mut self, at: Instant, key: K) {
        self.heap.push(Reverse((at, key)));
    }

    /// Entries, stale ones included.
    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }

    /// Keeps the entries of some keys only.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        self.heap.retain(|Reverse((_, key))| keep(key));
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes out one key whose deadline has passed.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<K> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, key))| key)
    }
}

/// The deadline of one flow, and the earliest one on the heap for it.
#[derive(Debug, Default)]
pub(crate) struct Deadline {
    wanted: Option<Instant>,
    on_heap: Option<Instant>,
}

impl Deadline {
    /// Moves the deadline; the heap hears of it only when it became earlier.
    pub(crate) fn set<K: Ord + Copy>(&mut self, wanted: Option<Instant>, key: K, timers: &mut Timers<K>) {
        self.wanted = wanted;
        if let Some(at) = wanted
            && self.on_heap.is_none_or(|on_heap| at < on_heap)
        {
            self.on_heap = Some(at);
            timers.push(at, key);
        }
    }

    /// Called when the heap gave this flow's key: whether the deadline really has passed. If it moved, it
    /// is put back.
    pub(crate) fn came_up<K: Ord + Copy>(&mut self, now: Instant, key: K, timers: &mut Timers<K>) -> bool {
        if self.on_heap.is_some_and(|on_heap| on_heap <= now) {
            self.on_heap = None;
        }
        if self.wanted.is_some_and(|wanted| wanted <= now) {
            self.wanted = None;
            return true;
        }
        self.set(self.wanted, key, timers);
        false
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn deadline_that_moved_later_comes_up_at_the_later_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (mut timers, mut deadline) = (Timers::new(), Deadline::default());
        deadline.set(Some(at(10)), 'a', &mut timers);
        deadline.set(Some(at(30)), 'a', &mut timers);
        assert_eq!(timers.pop_due(at(9)), None);
        assert_eq!(timers.pop_due(at(10)), Some('a'));
        assert!(!deadline.came_up(at(10), 'a', &mut timers));
        assert_eq!(timers.next(), Some(at(30)));
        assert_eq!(timers.pop_due(at(31)), Some('a'));
        assert!(deadline.came_up(at(31), 'a', &mut timers));
        assert_eq!(timers.next(), None);
    }
}
