//! One instance's metadata service: its site, its tokens, its throttle.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode};

use crate::respond::{Request, Response, respond};
use crate::site::Site;
use crate::token::TokenStore;
use crate::view::InstanceView;

/// Time since an origin of the clock's choice; never goes back.
pub type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// Told of every request that was answered. It is called on the connection's task: it must be
/// quick, and a channel is what it usually leads to.
pub type RequestSink = Box<dyn Fn(&RequestEvent<'_>) + Send + Sync>;

/// A request that was answered; neither values nor headers nor the query are in it.
#[derive(Debug, Clone, Copy)]
pub struct RequestEvent<'a> {
    /// The address and port the guest called.
    pub destination: SocketAddr,
    /// The method.
    pub method: &'a Method,
    /// The path as it was sent, without the query. The guest chose it, and it may be long.
    pub path: &'a str,
    /// The status of the answer.
    pub status: StatusCode,
}

/// How much one instance may ask.
///
/// A crawl by cloud-init is 53 requests in about 0.2 s; the defaults let seven of them pass at
/// once. What is too much is answered 503 with `Retry-After`, and never slows another instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may come at once.
    pub burst_requests: u32,
    /// Requests a second that may come for ever.
    pub refill_requests_per_s: u32,
    /// Connections open at once; more are closed without an answer.
    pub max_connections: usize,
    /// A connection on which nothing moves for this long is closed; a request head or body that is
    /// not complete after this long too.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { burst_requests: 400, refill_requests_per_s: 100, max_connections: 64, idle: Duration::from_secs(5) }
    }
}

/// What a service is made with beside the view.
#[derive(Default)]
pub struct ServiceOptions {
    /// How much the instance may ask.
    pub limits: Limits,
    /// Where the time comes from; by default the monotonic clock.
    pub clock: Option<Clock>,
    /// Who is told of requests; by default nobody.
    pub on_request: Option<RequestSink>,
}

impl fmt::Debug for ServiceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceOptions").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// What a service has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests answered by the rules of the dialect, refusals among them.
    pub answered: u64,
    /// Requests answered 503 because there were too many.
    pub throttled: u64,
    /// Connections closed because there were too many.
    pub refused_connections: u64,
}

/// Serves the metadata of one instance. Tokens and limits are its own: nothing a guest does to
/// its service is felt in another.
pub struct MetadataService {
    site: RwLock<Arc<Site>>,
    tokens: TokenStore,
    clock: Clock,
    on_request: Option<RequestSink>,
    limits: Limits,
    bucket: Mutex<Bucket>,
    connections: AtomicUsize,
    answered: AtomicU64,
    throttled: AtomicU64,
    refused_connections: AtomicU64,
}

impl MetadataService {
    /// A service with default options.
    ///
    /// # Panics
    /// If the operating system has no randomness to give.
    #[must_use]
    pub fn new(view: InstanceView) -> Self {
        Self::with_options(view, ServiceOptions::default())
    }

    /// A service.
    ///
    /// # Panics
    /// If the operating system has no randomness to give.
    #[must_use]
    pub fn with_options(view: InstanceView, options: ServiceOptions) -> Self {
        let clock = options.clock.unwrap_or_else(monotonic_clock);
        let bucket = Bucket { thousandths: full_thousandths(options.limits), filled_at: clock() };
        Self {
            site: RwLock::new(Arc::new(Site::new(view))),
            tokens: TokenStore::new(),
            clock,
            on_request: options.on_request,
            limits: options.limits,
            bucket: Mutex::new(bucket),
            connections: AtomicUsize::new(0),
            answered: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            refused_connections: AtomicU64::new(0),
        }
    }

    /// Replaces the view; requests from now on are answered from the new one. Tokens stay valid.
    pub fn update(&self, view: InstanceView) {
        let site = Arc::new(Site::new(view));
        *self.site.write().unwrap_or_else(PoisonError::into_inner) = site;
    }

    /// What is served at the moment.
    #[must_use]
    pub fn site(&self) -> Arc<Site> {
        Arc::clone(&self.site.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How much the instance may ask.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            answered: self.answered.load(Ordering::Relaxed),
            throttled: self.throttled.load(Ordering::Relaxed),
            refused_connections: self.refused_connections.load(Ordering::Relaxed),
        }
    }

    /// Answers a request that came in on this instance's link.
    ///
    /// A throttled request is counted, but the event sink is not told: a flood must not become a
    /// flood of events.
    #[must_use]
    pub fn handle(&self, destination: SocketAddr, method: &Method, path: &str, headers: &HeaderMap) -> Response {
        let now = (self.clock)();
        if !self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(self.limits, now) {
            self.throttled.fetch_add(1, Ordering::Relaxed);
            return Response::throttled();
        }
        let request = Request { destination: destination.ip(), method, path, headers };
        let response = respond(&request, &self.site(), &self.tokens, now);
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.tell(destination, method, path, response.status);
        response
    }

    fn tell(&self, destination: SocketAddr, method: &Method, path: &str, status: StatusCode) {
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        if let Some(on_request) = &self.on_request {
            on_request(&RequestEvent { destination, method, path, status });
        }
    }

    /// Counts a connection until the guard is dropped; `None` if there are too many.
    pub(crate) fn admit_connection(&self) -> Option<ConnectionGuard<'_>> {
        let max = self.limits.max_connections;
        let one_more = |open: usize| (open < max).then_some(open + 1);
        match self.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            Ok(_) => Some(ConnectionGuard(&self.connections)),
            Err(_) => {
                self.refused_connections.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl fmt::Debug for MetadataService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetadataService")
            .field("view", self.site().view())
            .field("limits", &self.limits)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct ConnectionGuard<'a>(&'a AtomicUsize);

impl Drop for ConnectionGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn monotonic_clock() -> Clock {
    let origin = Instant::now();
    Box::new(move || origin.elapsed())
}

/// A token bucket, in thousandths of a request so that a millisecond's refill is whole.
#[derive(Debug)]
struct Bucket {
    thousandths: u64,
    filled_at: Duration,
}

fn full_thousandths(limits: Limits) -> u64 {
    u64::from(limits.burst_requests) * 1000
}

impl Bucket {
    fn take(&mut self, limits: Limits, now: Duration) -> bool {
        let elapsed_ms = u64::try_from(now.saturating_sub(self.filled_at).as_millis()).unwrap_or(u64::MAX);
        let refill = elapsed_ms.saturating_mul(limits.refill_requests_per_s.into());
        self.thousandths = self.thousandths.saturating_add(refill).min(full_thousandths(limits));
        // The part of a millisecond that gave nothing yet is left for the next time.
        self.filled_at = self.filled_at.saturating_add(Duration::from_millis(elapsed_ms));
        let Some(rest) = self.thousandths.checked_sub(1000) else { return false };
        self.thousandths = rest;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let limits = Limits { burst_requests: 10, refill_requests_per_s: 5, ..Limits::default() };
        let mut bucket = Bucket { thousandths: full_thousandths(limits), filled_at: Duration::ZERO };
        let mut taken = |at_ms: u64| (0..100).filter(|_| bucket.take(limits, Duration::from_millis(at_ms))).count();
        assert_eq!(taken(0), 10);
        assert_eq!(taken(199), 0);
        assert_eq!(taken(200), 1);
        assert_eq!(taken(1200), 5);
        assert_eq!(taken(3_600_000), 10);
        assert_eq!(taken(0), 0, "a clock that goes back gives nothing");
    }

    #[test]
    fn many_small_steps_refill_as_much_as_one_large_one() {
        let limits = Limits { burst_requests: 1000, refill_requests_per_s: 100, ..Limits::default() };
        let mut bucket = Bucket { thousandths: 0, filled_at: Duration::ZERO };
        let taken = (1..=100_000).filter(|step| bucket.take(limits, Duration::from_micros(step * 100))).count();
        assert_eq!(taken, 1000);
    }
}
