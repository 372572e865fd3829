//! HTTP/1.1 on one connection, with limits on everything a guest can send.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tracing::debug;

use crate::respond::Response;
use crate::service::MetadataService;

/// The largest request head: line and headers together.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// The largest request body. No method takes one; cloud-init sends an empty one with its `PUT`.
const MAX_BODY_BYTES: usize = 1 << 10;

/// Called with the IP time-to-live that what is written from now on has to leave with, before any
/// byte of the answer is written. `None`: the link's usual one.
///
/// On one connection the value never rises again: bytes of an earlier answer may still be waiting
/// to be sent when the next one is decided, and a token must not leave with the wrong limit.
pub type HopLimitHook = Arc<dyn Fn(Option<u8>) + Send + Sync>;

/// Serves HTTP/1.1 requests on `stream` until the peer closes it, breaks a rule or is idle.
///
/// `destination` is the address the guest called; `service` must be that of the instance on whose
/// link the stream came in, for nothing in the stream is believed about who sent it. The limits:
///
/// - a request head of 16 KiB and 100 headers (431), a body of 1 KiB (413);
/// - [`Limits::idle`](crate::Limits) without a byte in either direction, or for a whole head or body;
/// - [`Limits::max_connections`](crate::Limits): the stream is dropped at once;
/// - absolute-form and authority-form targets are refused (400): this is no proxy.
///
/// It must run in a tokio runtime with time enabled. Dropping the future closes the stream.
pub async fn serve_connection<S>(
    stream: S,
    destination: SocketAddr,
    service: Arc<MetadataService>,
    hop_limit: Option<HopLimitHook>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let Some(_guard) = service.admit_connection() else {
        debug!(%destination, "metadata connection refused: too many are open");
        return;
    };
    let idle = service.limits().idle;
    let connection = Connection { destination, service: &service, hop_limit, lowest_hop_limit: AtomicU8::new(u8::MAX) };
    let serve = service_fn(|request| connection.answer(request));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(idle)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(100)
        // A client may close its side right after asking; the idle time ends it all the same.
        .half_close(true)
        .serve_connection(TokioIo::new(IdleTimeout::new(stream, idle)), serve)
        .await;
    if let Err(error) = served {
        debug!(%destination, %error, "metadata connection ended early");
    }
}

struct Connection<'a> {
    destination: SocketAddr,
    service: &'a MetadataService,
    hop_limit: Option<HopLimitHook>,
    /// The lowest limit so far; `u8::MAX` for none, which is above every [`crate::HopLimit`].
    lowest_hop_limit: AtomicU8,
}

impl Connection<'_> {
    async fn answer(&self, request: http::Request<Incoming>) -> Result<http::Response<Full<Bytes>>, Infallible> {
        let (parts, body) = request.into_parts();
        if let Err(refusal) = drain(body, self.service.limits().idle).await {
            return Ok(closing(Response::refusal(refusal)));
        }
        let Some(path) = origin_path(&parts.method, &parts.uri) else {
            return Ok(closing(Response::refusal(StatusCode::BAD_REQUEST)));
        };
        let response = self.service.handle(self.destination, &parts.method, path, &parts.headers);
        self.set_hop_limit(response.hop_limit);
        Ok(into_http(response))
    }

    fn set_hop_limit(&self, hop_limit: Option<u8>) {
        let Some(hook) = &self.hop_limit else { return };
        let wanted = hop_limit.unwrap_or(u8::MAX);
        let lowest = self.lowest_hop_limit.fetch_min(wanted, Ordering::Relaxed).min(wanted);
        hook((lowest != u8::MAX).then_some(lowest));
    }
}

/// The path of a target in origin form; `None` for the others.
fn origin_path<'a>(method: &Method, uri: &'a Uri) -> Option<&'a str> {
    let absolute = uri.scheme().is_some() || uri.authority().is_some() || method == Method::CONNECT;
    if absolute { None } else { uri.path_and_query().map(|path| path.as_str()) }
}

/// Reads a body to its end, so that the next request on the connection begins where it should.
async fn drain(body: Incoming, idle: Duration) -> Result<(), StatusCode> {
    if body.is_end_stream() {
        return Ok(());
    }
    let collected = tokio::time::timeout(idle, Limited::new(body, MAX_BODY_BYTES).collect()).await;
    match collected {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Err(_) => Err(StatusCode::REQUEST_TIMEOUT),
    }
}

fn into_http(response: Response) -> http::Response<Full<Bytes>> {
    let mut answer = http::Response::new(Full::new(response.body));
    *answer.status_mut() = response.status;
    *answer.headers_mut() = response.headers;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(response.content_type));
    answer
}

fn closing(response: Response) -> http::Response<Full<Bytes>> {
    let mut answer = into_http(response);
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Fails reads and writes when nothing has moved in either direction for `limit`.
struct IdleTimeout<S> {
    stream: S,
    limit: Duration,
    deadline: Pin<Box<Sleep>>,
    waiting: bool,
}

impl<S> IdleTimeout<S> {
    fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, deadline: Box::pin(tokio::time::sleep(limit)), waiting: false }
    }

    /// Passes on what is ready; while nothing is, runs the clock.
    fn watch<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = false;
            return polled;
        }
        if !self.waiting {
            self.waiting = true;
            let deadline = Instant::now() + self.limit;
            self.deadline.as_mut().reset(deadline);
        }
        ready!(self.deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for IdleTimeout<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.watch(cx, polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for IdleTimeout<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Not progress when it is ready: hyper flushes while it waits for the next request.
        match Pin::new(&mut self.stream).poll_flush(cx) {
            Poll::Pending => self.watch(cx, Poll::Pending),
            flushed => flushed,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, polled)
    }
}
