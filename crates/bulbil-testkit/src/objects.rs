//! Objects in memory, and objects that fail.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bulbil_store::{Clock, Objects, StoreError, StoreErrorKind};

use crate::rng::Rng;

/// Objects in memory, strongly consistent, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct MemoryObjects {
    objects: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

impl MemoryObjects {
    /// The names of all objects, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }

    /// Flips bits of one byte of an object.
    pub fn flip(&self, name: &str, position: usize, mask: u8) {
        self.objects.lock().unwrap().get_mut(name).unwrap()[position] ^= mask;
    }

    /// The size of an object in bytes.
    #[must_use]
    pub fn len_bytes(&self, name: &str) -> usize {
        self.objects.lock().unwrap()[name].len()
    }

    /// A copy that shares nothing.
    #[must_use]
    pub fn deep_copy(&self) -> Self {
        Self { objects: Arc::new(Mutex::new(self.objects.lock().unwrap().clone())) }
    }
}

fn not_found(name: &str) -> StoreError {
    StoreError::new(StoreErrorKind::NotFound, format!("there is no object `{name}`"))
}

impl Objects for MemoryObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let mut objects = self.objects.lock().unwrap();
        Ok(objects.entry(name.to_owned()).or_insert_with(|| bytes.to_vec()) == bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.objects.lock().unwrap().insert(name.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let objects = self.objects.lock().unwrap();
        let object = objects.get(name).ok_or_else(|| not_found(name))?;
        let short = || StoreError::new(StoreErrorKind::Corrupt, format!("object `{name}` is shorter"));
        object.get(offset as usize..offset as usize + len_bytes).map(<[u8]>::to_vec).ok_or_else(short)
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let objects = self.objects.lock().unwrap();
        let object = objects.get(name).ok_or_else(|| not_found(name))?;
        if object.len() as u64 > limit_bytes {
            return Err(StoreError::new(StoreErrorKind::Corrupt, format!("object `{name}` is longer")));
        }
        Ok(object.clone())
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let prefix = format!("{directory}/");
        let objects = self.objects.lock().unwrap();
        let found = objects.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix));
        Ok(found.map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect())
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.objects.lock().unwrap().remove(name);
        Ok(())
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// What goes wrong, each once in so many operations on average; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultRates {
    /// An operation fails and had no effect.
    pub fail_before: u64,
    /// An operation has its effect and fails: its answer was lost.
    pub fail_after: u64,
    /// A put fails for lack of space and had no effect.
    pub no_space: u64,
    /// What is read has a changed byte.
    pub corrupt_read: u64,
    /// What is read ends too early.
    pub truncated_read: u64,
}

/// Objects that fail by a seeded plan.
///
/// After the kill every call fails and does nothing, as nothing is done by a process that was killed.
#[derive(Debug)]
pub struct FaultyObjects {
    inner: Arc<dyn Objects>,
    rates: FaultRates,
    plan: Mutex<FaultPlan>,
}

#[derive(Debug)]
struct FaultPlan {
    rng: Rng,
    operations: u64,
    kill_at: Option<u64>,
    killed: bool,
    done: BTreeMap<&'static str, u64>,
}

enum Fault {
    None,
    Before(StoreErrorKind),
    After(StoreErrorKind),
    CorruptRead(u64),
    TruncatedRead,
}

impl FaultyObjects {
    /// Wraps objects; `kill_at` is the number of the operation at which the process is killed, before or
    /// after its effect.
    #[must_use]
    pub fn new(inner: Arc<dyn Objects>, seed: u64, rates: FaultRates, kill_at: Option<u64>) -> Self {
        let rng = Rng::new(seed);
        let plan = FaultPlan { rng, operations: 0, kill_at, killed: false, done: BTreeMap::new() };
        Self { inner, rates, plan: Mutex::new(plan) }
    }

    /// Kills the process now.
    pub fn kill(&self) {
        self.plan.lock().unwrap().killed = true;
    }

    /// What was made to fail, by kind.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        self.plan.lock().unwrap().done.clone()
    }

    /// Whether the kill has come.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.plan.lock().unwrap().killed
    }

    /// Operations so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.plan.lock().unwrap().operations
    }

    fn fault(&self, is_put: bool, is_read: bool) -> Fault {
        let plan = &mut *self.plan.lock().unwrap();
        if plan.killed {
            return Fault::Before(StoreErrorKind::Io);
        }
        plan.operations += 1;
        if plan.kill_at.is_some_and(|at| plan.operations >= at) {
            plan.killed = true;
            let before = plan.rng.one_in(2);
            return if before { Fault::Before(StoreErrorKind::Io) } else { Fault::After(StoreErrorKind::Io) };
        }
        let rates = self.rates;
        let mut hits = |rate: u64| rate > 0 && plan.rng.one_in(rate);
        let (kind, fault) = if hits(rates.fail_before) {
            ("refused", Fault::Before(StoreErrorKind::Timeout))
        } else if hits(rates.fail_after) {
            ("answer lost", Fault::After(StoreErrorKind::Timeout))
        } else if is_put && hits(rates.no_space) {
            ("no space", Fault::Before(StoreErrorKind::NoSpace))
        } else if is_read && hits(rates.corrupt_read) {
            ("read corrupted", Fault::CorruptRead(plan.rng.next_u64()))
        } else if is_read && hits(rates.truncated_read) {
            ("read truncated", Fault::TruncatedRead)
        } else {
            return Fault::None;
        };
        *plan.done.entry(kind).or_default() += 1;
        fault
    }

    fn run<T>(
        &self,
        is_put: bool,
        name: &str,
        operation: impl FnOnce(&dyn Objects) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let failed = |kind| StoreError::new(kind, format!("the operation on `{name}` was made to fail"));
        match self.fault(is_put, false) {
            Fault::Before(kind) => Err(failed(kind)),
            Fault::After(kind) => operation(&*self.inner).and_then(|_| Err(failed(kind))),
            _ => operation(&*self.inner),
        }
    }

    fn read(
        &self,
        name: &str,
        operation: impl FnOnce(&dyn Objects) -> Result<Vec<u8>, StoreError>,
    ) -> Result<Vec<u8>, StoreError> {
        let fault = self.fault(false, true);
        if let Fault::Before(kind) | Fault::After(kind) = fault {
            return Err(StoreError::new(kind, format!("reading `{name}` was made to fail")));
        }
        let mut bytes = operation(&*self.inner)?;
        let len = bytes.len() as u64;
        match fault {
            Fault::CorruptRead(random) if len > 0 => bytes[(random % len) as usize] ^= 1 << (random >> 32 & 7),
            Fault::TruncatedRead => bytes.truncate((len / 2) as usize),
            _ => {}
        }
        Ok(bytes)
    }
}

impl Objects for FaultyObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        self.run(true, name, |inner| inner.put_if_absent(name, bytes))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.run(true, name, |inner| inner.put(name, bytes))
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let bytes = self.read(name, |inner| inner.get_range(name, offset, len_bytes))?;
        let short = || StoreError::new(StoreErrorKind::Corrupt, format!("`{name}` ended too early"));
        (bytes.len() == len_bytes).then_some(bytes).ok_or_else(short)
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.read(name, |inner| inner.get(name, limit_bytes))
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        self.run(false, directory, |inner| inner.list(directory))
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.run(false, name, |inner| inner.delete(name))
    }

    fn make_durable(&self, names: &[String]) -> Result<(), StoreError> {
        self.run(false, "several objects", |inner| inner.make_durable(names))
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }
}

/// A clock that goes only when it is told to.
#[derive(Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock that shows a day in 2026.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU64::new(1_790_000_000_000))
    }

    /// Lets time pass.
    pub fn advance_ms(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}
