//! Objects behind a network that carries requests out twice, or after their client has given them up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bulbil_store::{Objects, StoreError, StoreErrorKind};

use crate::rng::Rng;

/// How often requests that change something arrive otherwise than they were sent: each once in so many on
/// average; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct LateRates {
    /// It is carried out twice at once, and the second answer given.
    pub duplicated: u64,
    /// It fails with `Timeout`, and is carried out later.
    pub given_up: u64,
    /// It is carried out, and once more later: the client had tried it again.
    pub tried_again: u64,
}

/// Objects that carry requests out twice or late; shared by all clients of a service.
///
/// Time is counted in operations of all clients.
#[derive(Debug)]
pub struct LateObjects {
    inner: Arc<dyn Objects>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    rates: LateRates,
    operations: u64,
    /// What is under way, with the operation before which it arrives.
    under_way: Vec<(u64, Change)>,
    done: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Clone)]
enum Change {
    PutIfAbsent(String, Vec<u8>),
    Put(String, Vec<u8>),
    Delete(String),
}

impl Change {
    /// Carries it out; the answer of a put, or `true`.
    fn apply(&self, objects: &dyn Objects) -> Result<bool, StoreError> {
        match self {
            Self::PutIfAbsent(name, bytes) => objects.put_if_absent(name, bytes),
            Self::Put(name, bytes) => objects.put(name, bytes).map(|()| true),
            Self::Delete(name) => objects.delete(name).map(|()| true),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::PutIfAbsent(name, _) | Self::Put(name, _) | Self::Delete(name) => name,
        }
    }
}

/// The longest that a change is under way, in operations.
const LONGEST: u64 = 400;

impl LateObjects {
    /// Wraps the objects of a service.
    #[must_use]
    pub fn new(inner: Arc<dyn Objects>, seed: u64, rates: LateRates) -> Self {
        let (under_way, done) = (Vec::new(), BTreeMap::new());
        Self { inner, state: Mutex::new(State { rng: Rng::new(seed), rates, operations: 0, under_way, done }) }
    }

    /// Lets everything arrive that is under way, and no more be late from now on.
    pub fn settle(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rates = LateRates::default();
        for (_, change) in std::mem::take(&mut state.under_way) {
            drop(change.apply(&*self.inner));
        }
    }

    /// What happened to requests, by kind.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).done.clone()
    }

    /// Lets an operation pass: what was under way until now arrives before it.
    fn inner(&self) -> &dyn Objects {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.operations += 1;
        let now = state.operations;
        let (due, later) = std::mem::take(&mut state.under_way).into_iter().partition(|(due, _)| *due <= now);
        state.under_way = later;
        let due: Vec<(u64, Change)> = due;
        for (_, change) in due {
            drop(change.apply(&*self.inner));
        }
        &*self.inner
    }

    fn change(&self, change: &Change) -> Result<bool, StoreError> {
        let inner = self.inner();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rates = state.rates;
        let mut hits = |rate: u64| rate > 0 && state.rng.one_in(rate);
        let (duplicated, given_up, tried_again) =
            (hits(rates.duplicated), hits(rates.given_up), hits(rates.tried_again));
        if duplicated || given_up || tried_again {
            let kind = if given_up {
                "given up, late"
            } else if tried_again {
                "tried again, late"
            } else {
                "duplicated"
            };
            *state.done.entry(kind).or_default() += 1;
        }
        if given_up || tried_again {
            // Often soon, so that it meets what follows at once.
            let longest = if state.rng.one_in(2) { 20 } else { LONGEST };
            let due = state.operations + 1 + state.rng.below(longest);
            state.under_way.push((due, change.clone()));
        }
        if given_up {
            let text = format!("no answer about `{}`; it may be carried out later", change.name());
            return Err(StoreError::new(StoreErrorKind::Timeout, text));
        }
        let first = change.apply(inner)?;
        if duplicated { change.apply(inner) } else { Ok(first) }
    }
}

impl Objects for LateObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.change(&Change::PutIfAbsent(name.to_owned(), bytes.to_vec()))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.change(&Change::Put(name.to_owned(), bytes.to_vec())).map(drop)
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        self.inner().get_range(name, offset, len_bytes)
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.inner().get(name, limit_bytes)
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        self.inner().list(directory)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.change(&Change::Delete(name.to_owned())).map(drop)
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }
}
