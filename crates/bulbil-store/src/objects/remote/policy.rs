//! What to do about an attempt that failed, and when: decisions without I/O.

use std::time::Duration;

use super::super::location::CREDENTIALS_COME_FROM;
use super::http::Seen;
use crate::error::StoreErrorKind;

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: StoreErrorKind,
    /// Whether another attempt may go better.
    pub(super) again: bool,
    pub(super) text: String,
}

impl Failure {
    pub(super) fn last(kind: StoreErrorKind, text: impl Into<String>) -> Self {
        Self { kind, again: false, text: text.into() }
    }

    pub(super) fn passing(kind: StoreErrorKind, text: impl Into<String>) -> Self {
        Self { kind, again: true, text: text.into() }
    }

    pub(super) fn attempt_timed_out(after: Duration) -> Self {
        Self::passing(StoreErrorKind::Timeout, format!("no whole answer within {:.1} s", after.as_secs_f64()))
    }
}

/// Judges how an attempt went wrong; `otherwise` is what object_store says, for what was not seen.
pub(super) fn judge(seen: Option<Seen>, otherwise: &str) -> Failure {
    match seen {
        Some(Seen::Status { status, code, message }) => judge_status(status, &code, &message),
        Some(Seen::Broken { timeout, text }) => {
            let kind = if timeout { StoreErrorKind::Timeout } else { StoreErrorKind::Io };
            Failure::passing(kind, text)
        }
        Some(Seen::NoCredentials { text, is_refused }) => {
            let text = format!("{text}; {CREDENTIALS_COME_FROM}");
            // Who has none to give has none in a second either.
            let failure = if is_refused { Failure::last } else { Failure::passing };
            failure(StoreErrorKind::Denied, text)
        }
        // The answer began well and was then cut off, or was not what was asked for.
        None => Failure::passing(StoreErrorKind::Io, otherwise),
    }
}

fn judge_status(status: u16, code: &str, message: &str) -> Failure {
    let mut text = format!("HTTP {status}");
    for part in [code, message].into_iter().filter(|part| !part.is_empty()) {
        text = format!("{text} {part}");
    }
    let full = ["InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"];
    let damaged =
        ["RequestTimeout", "XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch"];
    match status {
        507 => Failure::last(StoreErrorKind::NoSpace, text),
        _ if full.contains(&code) => Failure::last(StoreErrorKind::NoSpace, text),
        // The service saw other bytes than were sent, or not all of them.
        _ if damaged.contains(&code) => Failure::passing(StoreErrorKind::Io, text),
        // Not `NotFound`: nothing may be concluded about objects.
        404 if code == "NoSuchBucket" => Failure::last(StoreErrorKind::Io, format!("{text}; make the bucket first")),
        404 => Failure::last(StoreErrorKind::NotFound, text),
        // Temporary credentials are renewed between attempts.
        _ if matches!(code, "ExpiredToken" | "RequestExpired") => {
            Failure::passing(StoreErrorKind::Denied, format!("{text}; {CREDENTIALS_COME_FROM}"))
        }
        401 | 403 => Failure::last(StoreErrorKind::Denied, format!("{text}; {CREDENTIALS_COME_FROM}")),
        416 => Failure::last(StoreErrorKind::Corrupt, "the object is shorter than what was asked for"),
        501 => Failure::last(StoreErrorKind::Io, format!("{text}; the service lacks something that a store needs")),
        408 | 409 | 425 | 429 | 500.. => Failure::passing(StoreErrorKind::Io, text),
        300..=399 => Failure::last(StoreErrorKind::Io, format!("{text}; is the region or the endpoint right?")),
        _ => Failure::last(StoreErrorKind::Io, text),
    }
}

/// How long to wait before another attempt: doubling from 50 ms to 5 s, and from nothing to all of
/// that by chance, so that clients that failed together do not come back together.
pub(super) fn pause(failures: u32, random: u64) -> Duration {
    let longest_ms = (50_u64 << failures.saturating_sub(1).min(10)).min(5000);
    Duration::from_millis(random % (longest_ms + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: u16, code: &str, kind: StoreErrorKind, again: bool) {
        let seen = Seen::Status { status, code: code.to_owned(), message: String::new() };
        let failure = judge(Some(seen), "");
        assert_eq!((failure.kind, failure.again), (kind, again), "{status} {code}");
    }

    #[test]
    fn answers_are_told_apart() {
        check(404, "NoSuchKey", StoreErrorKind::NotFound, false);
        check(404, "", StoreErrorKind::NotFound, false);
        check(404, "NoSuchBucket", StoreErrorKind::Io, false);
        check(403, "AccessDenied", StoreErrorKind::Denied, false);
        check(401, "", StoreErrorKind::Denied, false);
        check(400, "ExpiredToken", StoreErrorKind::Denied, true);
        check(400, "InvalidArgument", StoreErrorKind::Io, false);
        check(400, "XAmzContentSHA256Mismatch", StoreErrorKind::Io, true);
        check(500, "InternalError", StoreErrorKind::Io, true);
        check(503, "SlowDown", StoreErrorKind::Io, true);
        check(429, "", StoreErrorKind::Io, true);
        check(507, "XMinioStorageFull", StoreErrorKind::NoSpace, false);
        check(403, "QuotaExceeded", StoreErrorKind::NoSpace, false);
        check(416, "InvalidRange", StoreErrorKind::Corrupt, false);
        check(301, "PermanentRedirect", StoreErrorKind::Io, false);
    }

    #[test]
    fn refusals_name_the_variables() {
        let seen = Seen::Status { status: 403, code: "InvalidAccessKeyId".into(), message: String::new() };
        assert!(judge(Some(seen), "").text.contains("AWS_SECRET_ACCESS_KEY"));
    }

    #[test]
    fn who_refuses_credentials_is_asked_once_and_who_is_away_again() {
        for is_refused in [true, false] {
            let failure = judge(Some(Seen::NoCredentials { text: "host".into(), is_refused }), "");
            assert_eq!((failure.kind, failure.again), (StoreErrorKind::Denied, !is_refused));
            assert!(failure.text.contains("AWS_SECRET_ACCESS_KEY"));
        }
    }

    #[test]
    fn pauses_double_up_to_five_seconds_and_vary() {
        assert_eq!(pause(1, 50), Duration::from_millis(50));
        assert_eq!(pause(1, 51), Duration::ZERO);
        assert_eq!(pause(3, 200), Duration::from_millis(200));
        assert_eq!(pause(1000, 5000), Duration::from_secs(5));
        assert_eq!(pause(1000, 5001), Duration::ZERO);
    }
}
