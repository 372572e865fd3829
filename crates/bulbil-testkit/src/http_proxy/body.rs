//! Bodies on their way: at a shared rate, and damaged as told.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use tokio::time::Instant;

use super::Shared;

pub(super) type Outgoing = UnsyncBoxBody<Bytes, io::Error>;

/// An error on purpose: the connection ends with it.
pub(super) fn cut() -> io::Error {
    io::Error::other("cut as told")
}

/// The timer's steps; shorter waits are added up.
const STEP: Duration = Duration::from_millis(1);

/// What may be caught up on after waiting too long, which every timer does.
const BURST: Duration = Duration::from_millis(10);

/// One wire that all bodies share.
#[derive(Debug, Default)]
pub(super) struct Bandwidth {
    free_at: Mutex<Option<Instant>>,
}

impl Bandwidth {
    /// Waits until so many bytes have crossed at this rate, behind those before them.
    pub(super) async fn take(&self, bytes_per_s: Option<u64>, len_bytes: usize) {
        let Some(rate) = bytes_per_s else { return };
        let cost = Duration::from_nanos((len_bytes as u64).saturating_mul(1_000_000_000) / rate.max(1));
        let wait = {
            let mut free_at = self.free_at.lock().expect("no panic while held");
            let now = Instant::now();
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let at = free_at.unwrap_or(now).max(earliest) + cost;
            *free_at = Some(at);
            at.saturating_duration_since(now)
        };
        if wait >= STEP {
            tokio::time::sleep(wait).await;
        }
    }
}

/// What is done to the body of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResponseFault {
    Truncate,
    Corrupt(u64),
}

pub(super) fn full(bytes: Bytes) -> Outgoing {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

pub(super) fn corrupted(bytes: &Bytes, at: u64) -> Bytes {
    let mut bytes = bytes.to_vec();
    flip(&mut bytes, at);
    bytes.into()
}

fn flip(bytes: &mut [u8], at: u64) {
    if !bytes.is_empty() {
        let index = usize::try_from(at % bytes.len() as u64).expect("below a length");
        bytes[index] ^= 0x20;
    }
}

/// The first half of a request's body, and then the end of the connection.
pub(super) fn cut_short(bytes: Bytes) -> Outgoing {
    let half = bytes.slice(..bytes.len() / 2);
    let pieces = [Ok(Frame::data(half)), Err(cut())];
    StreamBody::new(stream::iter(pieces)).boxed_unsync()
}

/// The body of an answer at the proxy's rate; `count` hears of each piece.
pub(super) fn throttled(
    incoming: Incoming,
    shared: Arc<Shared>,
    rate: Option<u64>,
    fault: Option<ResponseFault>,
    count: impl Fn(u64) + Send + Sync + 'static,
) -> Outgoing {
    let len_bytes = incoming.size_hint().exact().unwrap_or(0);
    let state = (incoming, 0_u64, false);
    let shared = Arc::new((shared, count));
    let pieces = stream::unfold(state, move |(mut incoming, passed, ended)| {
        let shared = Arc::clone(&shared);
        async move {
            let (shared, count) = &*shared;
            if ended {
                return None;
            }
            let frame = match incoming.frame().await? {
                Ok(frame) => frame,
                Err(error) => return Some((Err(io::Error::other(error)), (incoming, passed, true))),
            };
            let Ok(mut data) = frame.into_data() else {
                return Some((Ok(Frame::data(Bytes::new())), (incoming, passed, true)));
            };
            shared.bandwidth.take(rate, data.len()).await;
            let after = passed + data.len() as u64;
            match fault {
                Some(ResponseFault::Truncate) if after > len_bytes / 2 => {
                    return Some((Err(cut()), (incoming, after, true)));
                }
                Some(ResponseFault::Corrupt(at)) if len_bytes > 0 && (passed..after).contains(&(at % len_bytes)) => {
                    data = corrupted(&data, at % len_bytes - passed);
                }
                _ => {}
            }
            count(data.len() as u64);
            Some((Ok(Frame::data(data)), (incoming, after, false)))
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}
