//! What each operation does, attempt by attempt.

use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use futures_util::future::{Either, select};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions, PutPayload,
};
use tokio::time::{Instant, sleep};

use super::Inner;
use super::attempts::{Attempt, judge_with, timely};
use super::http::{Seen, count, watched};
use super::policy::Failure;
use crate::error::{StoreError, StoreErrorKind};

/// What lies under a name, compared with what should.
enum Stored {
    Absent,
    Same,
    Other,
}

/// Reads of an object that is there, until two say the same.
const READS_TO_COMPARE: u32 = 5;

impl Inner {
    pub(super) fn path(&self, name: &str) -> Attempt<Path> {
        let whole =
            if self.location.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.location.prefix) };
        Path::parse(whole).map_err(|_| Failure::last(StoreErrorKind::Io, "this is no name of an object"))
    }

    pub(super) async fn put_if_absent(&self, name: &str, bytes: Bytes) -> Result<bool, StoreError> {
        let len_bytes = bytes.len() as u64;
        self.try_until(&format!("store object `{name}`"), len_bytes, || async {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let path = self.path(name)?;
            let put = self.store.put_opts(&path, PutPayload::from(bytes.clone()), options);
            let (seen, error) = match watched(put).await {
                (Ok(_), _) => return Ok(true),
                (Err(error), seen) => (seen, error),
            };
            // 412: something is there. 409: another put of the name is going on, or a deletion.
            let refused = matches!(&seen, Some(Seen::Status { status: 409 | 412, .. }));
            if !refused {
                return Err(judge_with(seen, &error));
            }
            // It may be ours: the answer to an earlier attempt may have been lost.
            match self.compare(&path, &bytes).await? {
                Stored::Same => Ok(true),
                Stored::Other => Ok(false),
                Stored::Absent => {
                    Err(Failure::passing(StoreErrorKind::Io, "the object came and went while it was being stored"))
                }
            }
        })
        .await
    }

    async fn compare(&self, path: &Path, bytes: &Bytes) -> Attempt<Stored> {
        let mut other = None;
        for _ in 0..READS_TO_COMPARE {
            match self.fetch(path, None, |found| found.meta.size == bytes.len() as u64).await {
                Ok(Some(stored)) if stored == *bytes => return Ok(Stored::Same),
                // Of the same size: a body that was damaged on its way is not damaged twice in the same way.
                Ok(Some(stored)) if other.as_ref() != Some(&stored) => other = Some(stored),
                Ok(_) => return Ok(Stored::Other),
                Err(failure) if failure.kind == StoreErrorKind::NotFound => return Ok(Stored::Absent),
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::passing(StoreErrorKind::Io, "the object that is there is read otherwise each time"))
    }

    pub(super) async fn put(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        let len_bytes = bytes.len() as u64;
        self.try_until(&format!("store object `{name}`"), len_bytes, || async {
            let path = self.path(name)?;
            let put = self.store.put_opts(&path, PutPayload::from(bytes.clone()), PutOptions::default());
            match watched(put).await {
                (Ok(_), _) => Ok(()),
                (Err(error), seen) => Err(judge_with(seen, &error)),
            }
        })
        .await
    }

    pub(super) async fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        // How long it may take is known only when the service has told the size: see `body`.
        let deadline = Instant::now() + self.options.deadline;
        self.try_before(&format!("read object `{name}`"), deadline, || async {
            let path = self.path(name)?;
            let mut size_bytes = 0;
            let accept = |found: &GetResult| {
                size_bytes = found.meta.size;
                size_bytes <= limit_bytes
            };
            match self.fetch(&path, None, accept).await? {
                Some(bytes) => Ok(bytes),
                None => {
                    let text = format!("it has {size_bytes} bytes, the limit is {limit_bytes}");
                    Err(Failure::last(StoreErrorKind::Corrupt, text))
                }
            }
        })
        .await
    }

    pub(super) async fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let end = offset.checked_add(len_bytes as u64);
        let end = end.ok_or_else(|| StoreError::corrupt(format!("object `{name}` has no byte {offset:#x}")))?;
        self.hedging.earn();
        self.try_until(&format!("read object `{name}` at {offset:#x}"), len_bytes as u64, || async {
            let path = self.path(name)?;
            if len_bytes == 0 {
                // There is no empty range in HTTP; whether the object is there can be asked.
                let (found, seen) = watched(self.store.head(&path)).await;
                return found.map(|_| Vec::new()).map_err(|error| judge_with(seen, &error));
            }
            self.hedged(len_bytes, || self.fetch_range(&path, offset, end)).await
        })
        .await
    }

    /// Asks once more when the answer is late; the first good one counts.
    async fn hedged<F: Future<Output = Attempt<Vec<u8>>>>(
        &self,
        len_bytes: usize,
        ask: impl Fn() -> F,
    ) -> Attempt<Vec<u8>> {
        let started = Instant::now();
        let outcome = match self.options.hedge_after {
            None => ask().await,
            Some(at_least) => self.ask_twice(self.hedging.late_after(len_bytes, at_least), ask).await,
        };
        if outcome.is_ok() {
            self.hedging.record(len_bytes, started.elapsed());
        }
        outcome
    }

    async fn ask_twice<F: Future<Output = Attempt<Vec<u8>>>>(
        &self,
        late_after: Duration,
        ask: impl Fn() -> F,
    ) -> Attempt<Vec<u8>> {
        let mut first = std::pin::pin!(ask());
        match select(first.as_mut(), std::pin::pin!(sleep(late_after))).await {
            Either::Left((outcome, _)) => return outcome,
            Either::Right(_) => {}
        }
        // Where requests wait for each other already, one more makes all of them later.
        let Ok(_permit) = self.in_flight.try_acquire() else { return first.await };
        if !self.hedging.spend() {
            return first.await;
        }
        count(&self.counters.hedges, 1);
        match select(first, std::pin::pin!(ask())).await {
            Either::Left((Ok(bytes), _)) => Ok(bytes),
            Either::Right((Ok(bytes), _)) => {
                count(&self.counters.hedges_won, 1);
                Ok(bytes)
            }
            Either::Left((Err(_), second)) => {
                count(&self.counters.hedges_won, 1);
                second.await
            }
            Either::Right((Err(_), first)) => first.await,
        }
    }

    async fn fetch_range(&self, path: &Path, offset: u64, end: u64) -> Attempt<Vec<u8>> {
        let shorter = || Failure::last(StoreErrorKind::Corrupt, format!("the object ends before byte {end:#x}"));
        match self.fetch(path, Some(offset..end), |found| found.meta.size >= end).await? {
            Some(bytes) => Ok(bytes),
            None => Err(shorter()),
        }
    }

    /// Makes one GET. The body is read when `accept` says so, and its length is what was promised.
    async fn fetch(
        &self,
        path: &Path,
        range: Option<std::ops::Range<u64>>,
        accept: impl FnOnce(&GetResult) -> bool,
    ) -> Attempt<Option<Vec<u8>>> {
        let options = GetOptions { range: range.map(GetRange::Bounded), ..GetOptions::default() };
        let asked = timely(self.options.attempt_timeout, async {
            let (found, seen) = watched(self.store.get_opts(path, options)).await;
            found.map_err(|error| judge_with(seen, &error))
        });
        let found = asked.await?;
        if !accept(&found) {
            return Ok(None);
        }
        let promised = usize::try_from(found.range.end - found.range.start)
            .map_err(|_| Failure::last(StoreErrorKind::Corrupt, "the object does not fit in memory"))?;
        let time = self.options.attempt_timeout + self.options.transfer(promised as u64);
        let bytes = timely(time, body(found, promised)).await?;
        count(&self.counters.received_bytes, promised as u64);
        Ok(Some(bytes))
    }

    pub(super) async fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.try_until(&format!("delete object `{name}`"), 0, || async {
            let (deleted, seen) = watched(self.store.delete(&self.path(name)?)).await;
            match deleted.map_err(|error| judge_with(seen, &error)) {
                Err(failure) if failure.kind != StoreErrorKind::NotFound => Err(failure),
                _ => Ok(()),
            }
        })
        .await
    }
}

/// Reads the body of an answer, which is as long as was promised.
async fn body(found: GetResult, promised: usize) -> Attempt<Vec<u8>> {
    let cut = |got: usize| {
        Failure::passing(StoreErrorKind::Io, format!("{got} bytes of the answer arrived, {promised} were promised"))
    };
    let mut bytes = Vec::with_capacity(promised);
    let mut pieces = found.into_stream();
    while let Some(piece) = pieces.try_next().await.map_err(|error| judge_with(None, &error))? {
        if piece.len() > promised - bytes.len() {
            return Err(cut(bytes.len() + piece.len()));
        }
        bytes.extend_from_slice(&piece);
    }
    if bytes.len() == promised { Ok(bytes) } else { Err(cut(bytes.len())) }
}
