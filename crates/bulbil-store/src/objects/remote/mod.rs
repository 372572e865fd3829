//! Objects behind a network, in a bucket of a service that speaks S3.
//!
//! ```text
//! any thread ── blocking call ──► operation (deadline) ──► attempt (timeout) ──► request
//!            ◄── channel ───────┘   └─ failed: pause, again  └─ late range: a second request
//! ```
//! Requests run on a small runtime of their own, so that calls may come from any thread, also from
//! those of another runtime. object_store makes and signs the requests; when to give up, to try again and
//! to ask twice is decided here ([`policy`], [`hedge`]), and its own retries are off.

mod attempts;
mod credentials;
mod hedge;
mod http;
mod listing;
mod operations;
mod options;
mod policy;

use std::fmt;
use std::path::Path as FilePath;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::{ClientOptions, RetryConfig};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

pub use options::RemoteOptions;

use self::credentials::{Credentials, Service};
use self::hedge::Hedging;
use self::http::{Counters, WatchedConnector};
use super::Objects;
use super::location::S3Location;
use crate::error::{StoreError, StoreErrorKind};

/// Signing and copying are little work; two threads use any network.
const RUNTIME_THREADS: usize = 2;

/// Connecting is a few round trips; beyond this the host is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A profile file that is longer is none.
const MAX_PROFILE_BYTES: u64 = 1 << 20;

/// What requests were made since the objects were opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoteStats {
    /// Requests to the service, of all kinds, with those made again and twice.
    pub requests: u64,
    /// Bytes of objects sent.
    pub sent_bytes: u64,
    /// Bytes of objects received, without those of answers that were given up.
    pub received_bytes: u64,
    /// Attempts that were made because an earlier one failed.
    pub retries: u64,
    /// Second requests for ranges that did not come in time.
    pub hedges: u64,
    /// Second requests that were answered first.
    pub hedges_won: u64,
}

/// Objects below a prefix of a bucket.
///
/// The service must be strongly consistent and know conditional puts (`If-None-Match`): see
/// [`check_conditional_put`](Self::check_conditional_put).
pub struct RemoteObjects {
    inner: Arc<Inner>,
    /// Taken when dropped.
    runtime: Option<Runtime>,
}

struct Inner {
    store: AmazonS3,
    location: S3Location,
    options: RemoteOptions,
    in_flight: Semaphore,
    hedging: Hedging,
    counters: Arc<Counters>,
}

impl RemoteObjects {
    /// Prepares access to a bucket; makes no request yet.
    ///
    /// # Errors
    /// `Denied` when credentials are missing or half given; `Io` when a profile file cannot be read, the
    /// endpoint is no URL, or the certificates of this host cannot be loaded.
    pub fn open(location: &S3Location, options: &RemoteOptions) -> Result<Self, StoreError> {
        let service = credentials::resolve(location, &options.environment, &read_profile_file)?;
        let counters = Arc::new(Counters::default());
        let runtime = Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("bulbil-objects")
            .enable_all()
            .build()
            .map_err(|e| StoreError::io("cannot start the threads for requests", e))?;
        let store = connect(location, service, &counters).map_err(|e| {
            // Nothing was asked yet: what it says is about settings, and values are not in it.
            StoreError::with_source(StoreErrorKind::Io, format!("cannot prepare access to `{location}`"), e)
        })?;
        let inner = Inner {
            store,
            location: location.clone(),
            options: options.clone(),
            in_flight: Semaphore::new(options.in_flight.clamp(1, Semaphore::MAX_PERMITS)),
            hedging: Hedging::default(),
            counters,
        };
        Ok(Self { inner: Arc::new(inner), runtime: Some(runtime) })
    }

    /// Tells what requests were made so far.
    #[must_use]
    pub fn stats(&self) -> RemoteStats {
        let counters = &self.inner.counters;
        RemoteStats {
            requests: counters.requests.load(Ordering::Relaxed),
            sent_bytes: counters.sent_bytes.load(Ordering::Relaxed),
            received_bytes: counters.received_bytes.load(Ordering::Relaxed),
            retries: counters.retries.load(Ordering::Relaxed),
            hedges: counters.hedges.load(Ordering::Relaxed),
            hedges_won: counters.hedges_won.load(Ordering::Relaxed),
        }
    }

    /// Checks with an object of its own, which it deletes again, that the service refuses a conditional put
    /// over an object. Some old services take the condition, ignore it and replace; a store there loses data.
    ///
    /// # Errors
    /// `Io` when the service does not keep the condition; `Denied`, `Timeout`, `NoSpace` as any put.
    pub fn check_conditional_put(&self) -> Result<(), StoreError> {
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random)
            .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
        let name = format!("tmp/conditional-put-{:016x}", u64::from_le_bytes(random));
        let first = self.put_if_absent(&name, b"first")?;
        let second = self.put_if_absent(&name, b"second");
        self.delete(&name)?;
        if first && !second? {
            return Ok(());
        }
        let text =
            format!("the service of `{}` ignores `If-None-Match`: a store there would lose data", self.inner.location);
        Err(StoreError::new(StoreErrorKind::Io, text))
    }

    /// Runs an operation on the runtime and waits for it; it has a deadline of its own.
    fn run<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        // Not `block_on`: it panics on the threads of another runtime.
        let (sender, receiver) = mpsc::sync_channel(1);
        let runtime = self.runtime.as_ref().expect("taken only when dropped");
        runtime.spawn(async move {
            // Nobody waits any more only when the caller's thread is gone.
            drop(sender.send(operation.await));
        });
        receiver
            .recv()
            .unwrap_or_else(|_| Err(StoreError::new(StoreErrorKind::Io, "a request ended without an answer")))
    }
}

impl Drop for RemoteObjects {
    fn drop(&mut self) {
        // Waiting for its threads is not allowed on those of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for RemoteObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteObjects").field(&self.inner.location.to_string()).finish()
    }
}

impl Objects for RemoteObjects {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let (inner, name, bytes) = (Arc::clone(&self.inner), name.to_owned(), bytes.to_vec().into());
        self.run(async move { inner.put_if_absent(&name, bytes).await })
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let (inner, name, bytes) = (Arc::clone(&self.inner), name.to_owned(), bytes.to_vec().into());
        self.run(async move { inner.put(&name, bytes).await })
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        self.run(async move { inner.get_range(&name, offset, len_bytes).await })
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        self.run(async move { inner.get(&name, limit_bytes).await })
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let (inner, directory) = (Arc::clone(&self.inner), directory.to_owned());
        self.run(async move { inner.list(&directory).await })
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        self.run(async move { inner.delete(&name).await })
    }

    fn is_remote(&self) -> bool {
        true
    }
}

fn read_profile_file(path: &FilePath) -> std::io::Result<Option<String>> {
    match std::fs::metadata(path) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(None),
        Ok(metadata) if metadata.len() > MAX_PROFILE_BYTES => Err(std::io::Error::other("it is longer than 1 MiB")),
        other => {
            other?;
            std::fs::read_to_string(path).map(Some)
        }
    }
}

fn connect(location: &S3Location, service: Service, counters: &Arc<Counters>) -> object_store::Result<AmazonS3> {
    // One for the process; whoever set one before has chosen.
    drop(rustls::crypto::ring::default_provider().install_default());
    let authority = service.endpoint.split("://").nth(1).and_then(|rest| rest.split('/').next());
    let authority = authority.unwrap_or_default().to_owned();
    let plain = service.endpoint.starts_with("http://");
    let mut client =
        ClientOptions::new().with_allow_http(plain).with_connect_timeout(CONNECT_TIMEOUT).with_timeout_disabled();
    if plain && !matches!(service.credentials, Credentials::Provider(_)) {
        // Nothing here is encrypted: a host without certificates will do.
        client = client.with_no_system_certificates(true);
    }
    let no_retries = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&location.bucket)
        .with_region(service.region)
        .with_endpoint(service.endpoint)
        .with_virtual_hosted_style_request(service.virtual_hosted)
        // One object is deleted at a time; not every service knows the other request.
        .with_disable_bulk_delete(true)
        .with_client_options(client)
        .with_retry(no_retries)
        .with_http_connector(WatchedConnector { counters: Arc::clone(counters), authority });
    match service.credentials {
        Credentials::Anonymous => builder = builder.with_skip_signature(true),
        Credentials::Static { key_id, secret, token } => {
            builder = builder.with_access_key_id(key_id).with_secret_access_key(secret);
            if let Some(token) = token {
                builder = builder.with_token(token);
            }
        }
        Credentials::Provider(settings) => {
            for (name, value) in settings {
                let key: AmazonS3ConfigKey = name.to_ascii_lowercase().parse()?;
                builder = builder.with_config(key, value);
            }
        }
    }
    builder.build()
}
