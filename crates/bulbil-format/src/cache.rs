//! A bounded cache whose entries are made once, however many threads ask.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A place for one value; locked while the value is being made.
type Slot<V> = Arc<Mutex<Option<Arc<V>>>>;

/// A cache in two generations: when the young one is full it becomes the old one, and the old one goes.
///
/// A value used within the last `capacity / 2` different keys is still there. That is nearly what an exact
/// least-recently-used order gives, with no list to maintain.
pub(crate) struct SharedCache<V> {
    generations: Mutex<Generations<V>>,
    generation_len: usize,
}

struct Generations<V> {
    young: HashMap<u64, Slot<V>>,
    old: HashMap<u64, Slot<V>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done under these locks, so a panic elsewhere does not spoil what they guard.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<V> SharedCache<V> {
    /// Makes a cache of at most `capacity` values (and at least two).
    pub(crate) fn new(capacity: usize) -> Self {
        let generations = Generations { young: HashMap::new(), old: HashMap::new() };
        Self { generations: Mutex::new(generations), generation_len: (capacity / 2).max(1) }
    }

    /// Returns the value for `key`, making it if needed. Threads that want the same key wait for the first; others go
    /// on. An error is not kept: the next caller tries again.
    pub(crate) fn get_or_load<E>(&self, key: u64, load: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        let slot = self.slot(key);
        let mut value = lock(&slot);
        if let Some(value) = &*value {
            return Ok(Arc::clone(value));
        }
        let loaded = Arc::new(load()?);
        *value = Some(Arc::clone(&loaded));
        Ok(loaded)
    }

    fn slot(&self, key: u64) -> Slot<V> {
        let mut generations = lock(&self.generations);
        if let Some(slot) = generations.young.get(&key) {
            return Arc::clone(slot);
        }
        let slot = generations.old.remove(&key).unwrap_or_default();
        if generations.young.len() >= self.generation_len {
            generations.old = mem::take(&mut generations.young);
        }
        generations.young.insert(key, Arc::clone(&slot));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_value_is_made_once_for_many_threads() {
        let cache = SharedCache::<u64>::new(8);
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for key in 0..4 {
                        let value = cache.get_or_load(key, || {
                            made.fetch_add(1, Ordering::Relaxed);
                            Ok::<_, ()>(key * 10)
                        });
                        assert_eq!(*value.unwrap(), key * 10);
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 4);
    }

    #[test]
    fn the_number_of_values_is_bounded_and_errors_are_retried() {
        let cache = SharedCache::<u64>::new(8);
        for key in 0..1000 {
            assert!(cache.get_or_load(key, || Err::<u64, _>(())).is_err());
            assert!(cache.get_or_load(key, || Ok::<_, ()>(key)).is_ok());
        }
        let generations = lock(&cache.generations);
        assert!(generations.young.len() + generations.old.len() <= 8);
    }
}
