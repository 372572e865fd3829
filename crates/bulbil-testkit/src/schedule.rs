//! Deterministic interleaving: actors on threads of their own, of which one goes on at a time, chosen by a seed.
//!
//! Every operation on [`ScheduledObjects`] waits until all actors wait or have finished; then the
//! schedule lets one of them make its operation and run to its next one. So a seed gives the same order of
//! operations each time.

use std::sync::{Arc, Condvar, Mutex};

use bulbil_store::{Objects, StoreError};

use crate::rng::Rng;

/// Decides which actor makes the next operation.
#[derive(Debug)]
pub struct Schedule {
    state: Mutex<ScheduleState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ScheduleState {
    rng: Rng,
    /// For each actor how many of its threads wait; `None` when it has finished.
    waiting: Vec<Option<u32>>,
    turn: Option<usize>,
    /// Whether an operation is being made.
    busy: bool,
    /// Who goes on more often than others, for a while: long stays of one actor find other errors than fair turns.
    favourite: usize,
    steps: u64,
}

impl Schedule {
    /// A schedule for so many actors, none of which has begun.
    #[must_use]
    pub fn new(seed: u64, actors: usize) -> Arc<Self> {
        let state = ScheduleState {
            rng: Rng::new(seed),
            waiting: vec![Some(0); actors],
            turn: None,
            busy: false,
            favourite: 0,
            steps: 0,
        };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Objects by which an actor makes its operations.
    #[must_use]
    pub fn objects(self: &Arc<Self>, actor: usize, inner: Arc<dyn Objects>) -> ScheduledObjects {
        ScheduledObjects { schedule: Arc::clone(self), actor, inner }
    }

    /// Waits for the actor's turn; threads that an actor which has finished left behind go on at once.
    fn wait_for_turn(&self, actor: usize) {
        let mut state = self.state.lock().unwrap();
        let Some(waiting) = &mut state.waiting[actor] else { return };
        *waiting += 1;
        self.choose(&mut state);
        while state.turn != Some(actor) {
            if state.waiting[actor].is_none() {
                return;
            }
            state = self.changed.wait(state).unwrap();
        }
        state.turn = None;
        if let Some(waiting) = &mut state.waiting[actor] {
            *waiting -= 1;
        }
        state.busy = true;
    }

    /// Says that the operation is over; another thread of its actor may wait for its turn, and this one for that.
    fn operation_done(&self) {
        let mut state = self.state.lock().unwrap();
        state.busy = false;
        self.choose(&mut state);
    }

    /// Says that an actor makes no operation any more.
    pub fn finish(&self, actor: usize) {
        let mut state = self.state.lock().unwrap();
        state.waiting[actor] = None;
        self.choose(&mut state);
        self.changed.notify_all();
    }

    /// Says that an actor that had finished makes operations again.
    pub fn begin(&self, actor: usize) {
        self.state.lock().unwrap().waiting[actor].get_or_insert(0);
    }

    /// Operations made so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.state.lock().unwrap().steps
    }

    fn choose(&self, state: &mut ScheduleState) {
        let ready = |waiting: &Option<u32>| waiting.is_none_or(|count| count > 0);
        if state.busy || state.turn.is_some() || !state.waiting.iter().all(ready) {
            return;
        }
        let unfinished: Vec<_> = (0..state.waiting.len()).filter(|actor| state.waiting[*actor].is_some()).collect();
        if unfinished.is_empty() {
            return;
        }
        if state.rng.one_in(12) {
            state.favourite = state.rng.below(state.waiting.len() as u64) as usize;
        }
        let favoured = unfinished.contains(&state.favourite) && !state.rng.one_in(4);
        let any = unfinished[state.rng.below(unfinished.len() as u64) as usize];
        state.turn = Some(if favoured { state.favourite } else { any });
        state.steps += 1;
        self.changed.notify_all();
    }
}

/// Objects whose operations wait for their actor's turn.
#[derive(Debug)]
pub struct ScheduledObjects {
    schedule: Arc<Schedule>,
    actor: usize,
    inner: Arc<dyn Objects>,
}

/// An operation that is being made.
struct Turn<'a>(&'a ScheduledObjects);

impl std::ops::Deref for Turn<'_> {
    type Target = dyn Objects;

    fn deref(&self) -> &Self::Target {
        &*self.0.inner
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.schedule.operation_done();
    }
}

impl ScheduledObjects {
    fn inner(&self) -> Turn<'_> {
        self.schedule.wait_for_turn(self.actor);
        Turn(self)
    }
}

impl Objects for ScheduledObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.inner().put_if_absent(name, bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner().put(name, bytes)
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        self.inner().get_range(name, offset, len_bytes)
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.inner().get(name, limit_bytes)
    }

    /// Lists as a directory or a bucket of many pages does: what is put or deleted meanwhile is listed or not.
    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let mut found = self.inner().list(directory)?;
        let random = self.schedule.state.lock().unwrap().rng.next_u64();
        if random.is_multiple_of(3) {
            let early = |(name, _): &(String, u64)| {
                let sum = name.bytes().fold(random, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
                sum >> 40 & 1 == 0
            };
            found.retain(early);
            found.extend(self.inner().list(directory)?.into_iter().filter(|entry| !early(entry)));
        }
        Ok(found)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.inner().delete(name)
    }

    fn make_durable(&self, names: &[String]) -> Result<(), StoreError> {
        self.inner().make_durable(names)
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }
}
