//! Attempts: made again until one succeeds or the time is over.

use std::time::Duration;

use object_store::Error as S3Error;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Inner;
use super::http::{Seen, broken, count};
use super::policy::{Failure, judge, pause};
use crate::error::{StoreError, StoreErrorKind};

pub(super) type Attempt<T> = Result<T, Failure>;

impl Inner {
    /// Makes attempts until one succeeds, one fails for good, or the time is over.
    ///
    /// `len_bytes` are expected to cross the network in each.
    pub(super) async fn try_until<T, F: Future<Output = Attempt<T>>>(
        &self,
        what: &str,
        len_bytes: u64,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        let transfer = self.options.transfer(len_bytes);
        let deadline = Instant::now() + self.options.deadline + 2 * transfer;
        let attempt_timeout = self.options.attempt_timeout + transfer;
        let in_time = || timely(attempt_timeout.min(deadline.duration_since(Instant::now())), attempt());
        self.try_before(what, deadline, in_time).await
    }

    /// As [`try_until`](Self::try_until); an attempt that is going on at the deadline may end.
    pub(super) async fn try_before<T, F: Future<Output = Attempt<T>>>(
        &self,
        what: &str,
        deadline: Instant,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        let mut failures = 0;
        let mut last: Option<Failure> = None;
        loop {
            // Waiting for a permit is no attempt, but it ends with the deadline.
            let Ok(permit) = timeout_at(deadline, self.in_flight.acquire()).await else {
                let waited = || Failure::passing(StoreErrorKind::Timeout, "too many requests were waiting");
                return Err(self.give_up(what, failures, &last.unwrap_or_else(waited)));
            };
            let permit = permit.expect("the semaphore is never closed");
            let failure = match attempt().await {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            failures += 1;
            let wait = pause(failures, getrandom::u64().unwrap_or(0));
            if !failure.again {
                return Err(self.error(what, &failure));
            }
            if Instant::now() + wait >= deadline {
                return Err(self.give_up(what, failures, &failure));
            }
            tracing::debug!(what, failures, reason = %failure.text, "a request failed and is made again");
            last = Some(failure);
            drop(permit);
            sleep(wait).await;
            count(&self.counters.retries, 1);
        }
    }

    pub(super) fn error(&self, what: &str, failure: &Failure) -> StoreError {
        let at = match failure.kind {
            StoreErrorKind::NotFound | StoreErrorKind::Corrupt => String::new(),
            _ => format!(" in `{}`", self.location),
        };
        StoreError::with_source(failure.kind, format!("cannot {what}{at}"), failure.text.clone())
    }

    /// The error of an operation whose time is over: `Timeout`, unless the service said why it refuses.
    fn give_up(&self, what: &str, failures: u32, last: &Failure) -> StoreError {
        let kind = if last.kind == StoreErrorKind::Denied { last.kind } else { StoreErrorKind::Timeout };
        let text = format!("gave up after {failures} attempts; the last one: {}", last.text);
        self.error(what, &Failure::last(kind, text))
    }
}

/// Ends an attempt that takes too long.
pub(super) async fn timely<T>(limit: Duration, attempt: impl Future<Output = Attempt<T>>) -> Attempt<T> {
    timeout(limit, attempt).await.unwrap_or_else(|_| Err(Failure::attempt_timed_out(limit)))
}

/// Judges an error by what was seen on the wire, or else by its innermost cause.
pub(super) fn judge_with(seen: Option<Seen>, error: &S3Error) -> Failure {
    let mut seen = seen;
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
        if let (None, Some(http)) = (&seen, cause.downcast_ref()) {
            seen = Some(broken(http));
        }
    }
    // The innermost text only: those above it may show what was sent.
    judge(seen, &cause.to_string())
}
