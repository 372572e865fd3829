//! A proxy before an HTTP server: it is slow as a network is, counts, and does what networks do wrong.
//!
//! ```text
//! client ──► latency, shared bandwidth ──► faults ──► one connection to the server for each of the client's
//! ```
//! Requests pass as they are, so signatures stay right.

mod body;
mod faults;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

use self::body::{Bandwidth, Outgoing, ResponseFault, cut};
use self::faults::Plan;
pub use self::faults::{Fault, HttpFaultRates};

/// How slow the way through the proxy is.
#[derive(Debug, Clone, Default)]
pub struct ProxyOptions {
    /// Each request waits this long.
    pub latency: Duration,
    /// Bytes of bodies each second, all connections and both directions together.
    pub bytes_per_s: Option<u64>,
    /// What goes wrong by chance.
    pub faults: HttpFaultRates,
    /// Whether each request is kept for [`HttpFaultProxy::take_log`].
    pub log: bool,
}

/// What passed through with one method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Passed {
    /// Requests that came from clients.
    pub requests: u64,
    /// Bytes of their bodies.
    pub request_bytes: u64,
    /// Bytes of bodies given back.
    pub response_bytes: u64,
}

/// A request that came from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedRequest {
    /// `GET` and the like.
    pub method: String,
    /// The path with the query.
    pub path: String,
    /// The header `Range`.
    pub range: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    options: ProxyOptions,
    plan: Plan,
    passed: BTreeMap<String, Passed>,
    log: Vec<LoggedRequest>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    state: Mutex<State>,
    bandwidth: Bandwidth,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn passed(&self, method: &str, add: impl FnOnce(&mut Passed)) {
        add(self.state().passed.entry(method.to_owned()).or_default());
    }
}

/// A running proxy, ended when dropped.
#[derive(Debug)]
pub struct HttpFaultProxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    runtime: Option<Runtime>,
}

impl HttpFaultProxy {
    /// Starts a proxy before the server at this address.
    ///
    /// # Panics
    /// When it cannot listen.
    #[must_use]
    pub fn start(server: SocketAddr, options: ProxyOptions) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("it listens");
        listener.set_nonblocking(true).expect("a socket may be made non-blocking");
        let state = State { plan: Plan::new(&options.faults), options, ..State::default() };
        let shared = Arc::new(Shared { server, state: Mutex::new(state), bandwidth: Bandwidth::default() });
        let accepting = Arc::clone(&shared);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it is non-blocking");
            loop {
                if let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(client, Arc::clone(&accepting)));
                }
            }
        });
        Self { shared, address, runtime: Some(runtime) }
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Changes how slow the way is and what goes wrong, from the next request on.
    pub fn set(&self, options: ProxyOptions) {
        let mut state = self.shared.state();
        state.plan.set_rates(&options.faults);
        state.options = options;
    }

    /// Does this to the next so many requests with this method (any: `""`), before anything by chance.
    pub fn inject(&self, method: &str, fault: Fault, requests: usize) {
        self.shared.state().plan.inject(method, fault, requests);
    }

    /// What passed, by method.
    #[must_use]
    pub fn passed(&self) -> BTreeMap<String, Passed> {
        self.shared.state().passed.clone()
    }

    /// What passed with one method.
    #[must_use]
    pub fn passed_with(&self, method: &str) -> Passed {
        self.shared.state().passed.get(method).copied().unwrap_or_default()
    }

    /// How many requests something was done to.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.shared.state().plan.done()
    }

    /// The requests that came, oldest first, since the log was turned on or taken.
    #[must_use]
    pub fn take_log(&self) -> Vec<LoggedRequest> {
        std::mem::take(&mut self.shared.state().log)
    }
}

impl Drop for HttpFaultProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

type Connection = Option<SendRequest<Outgoing>>;

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    drop(client.set_nodelay(true));
    let connection: Arc<tokio::sync::Mutex<Connection>> = Arc::default();
    let service = service_fn(move |request| {
        let (shared, connection) = (Arc::clone(&shared), Arc::clone(&connection));
        async move {
            // HTTP/1.1 has one request at a time.
            let mut connection = connection.lock().await;
            pass(&shared, &mut connection, request).await
        }
    });
    // An error of the service closes the connection without an answer; a client that goes is no event.
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(client), service).await);
}

async fn pass(
    shared: &Arc<Shared>,
    connection: &mut Connection,
    request: Request<Incoming>,
) -> Result<Response<Outgoing>, io::Error> {
    let method = request.method().as_str().to_owned();
    let (fault, latency, rate) = begin(shared, &method, &request);
    let (head, body) = request.into_parts();
    let body = collect(shared, rate, body).await?;
    shared.passed(&method, |passed| passed.request_bytes += body.len() as u64);
    tokio::time::sleep(latency).await;
    if let Some(Fault::Slow(more)) = fault {
        tokio::time::sleep(more).await;
    }
    match fault {
        Some(Fault::Status(status)) => {
            return Response::builder().status(status).body(body::full(Bytes::new())).map_err(io::Error::other);
        }
        Some(Fault::CutBefore) => return Err(cut()),
        _ => {}
    }
    let send = |bytes: Outgoing| Request::from_parts(head.clone(), bytes);
    let sent = match fault {
        Some(Fault::Truncate) if !body.is_empty() => body::cut_short(body.clone()),
        Some(Fault::Corrupt(at)) if !body.is_empty() => body::full(body::corrupted(&body, at)),
        _ => body::full(body.clone()),
    };
    let mut response = forward(shared, connection, send(sent)).await?;
    if fault == Some(Fault::Duplicate) {
        response.into_body().collect().await.map_err(io::Error::other)?;
        response = forward(shared, connection, send(body::full(body.clone()))).await?;
    }
    match fault {
        Some(Fault::CutAfter) => {
            response.into_body().collect().await.map_err(io::Error::other)?;
            return Err(cut());
        }
        // The client gives up, and its connection ends this.
        Some(Fault::Silent) => std::future::pending().await,
        _ => {}
    }
    let change = match fault {
        Some(Fault::Truncate) if body.is_empty() => Some(ResponseFault::Truncate),
        Some(Fault::Corrupt(at)) if body.is_empty() => Some(ResponseFault::Corrupt(at)),
        _ => None,
    };
    if change == Some(ResponseFault::Truncate) {
        // What is left of the answer is not wanted.
        *connection = None;
    }
    let counted = Arc::clone(shared);
    let count = move |len_bytes: u64| counted.passed(&method, |passed| passed.response_bytes += len_bytes);
    let shared = Arc::clone(shared);
    Ok(response.map(|incoming| body::throttled(incoming, shared, rate, change, count)))
}

/// Takes note of a request and decides what will be done to it.
fn begin(shared: &Shared, method: &str, request: &Request<Incoming>) -> (Option<Fault>, Duration, Option<u64>) {
    let mut state = shared.state();
    state.passed.entry(method.to_owned()).or_default().requests += 1;
    if state.options.log {
        let range = request.headers().get("range").and_then(|range| range.to_str().ok()).map(str::to_owned);
        let path = request.uri().to_string();
        state.log.push(LoggedRequest { method: method.to_owned(), path, range });
    }
    (state.plan.next(method), state.options.latency, state.options.bytes_per_s)
}

async fn collect(shared: &Shared, rate: Option<u64>, mut body: Incoming) -> Result<Bytes, io::Error> {
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(io::Error::other)?.into_data() {
            shared.bandwidth.take(rate, data.len()).await;
            whole.extend_from_slice(&data);
        }
    }
    Ok(whole.into())
}

async fn forward(
    shared: &Shared,
    connection: &mut Connection,
    request: Request<Outgoing>,
) -> Result<Response<Incoming>, io::Error> {
    let ready = match connection {
        Some(sender) => sender.ready().await.is_ok(),
        None => false,
    };
    if !ready {
        let stream = TcpStream::connect(shared.server).await?;
        stream.set_nodelay(true)?;
        let (sender, driver) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(driver);
        *connection = Some(sender);
    }
    let sender = connection.as_mut().expect("connected above");
    let response = sender.send_request(request).await;
    if response.is_err() {
        *connection = None;
    }
    response.map_err(io::Error::other)
}
