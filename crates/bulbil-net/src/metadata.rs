//! The seam to the metadata service.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// The metadata service of one instance: it speaks HTTP to the guest of the link it was given to.
///
/// The link is the identity. A service is made for one instance and given to that instance's link, so it
/// never has to ask who is calling.
pub trait MetadataService: Send + Sync {
    /// Takes a TCP connection that the guest opened to `destination`, a metadata address and port 80.
    ///
    /// Called on the link's task, inside its tokio runtime: it spawns what serves the connection and
    /// returns at once. Dropping the stream closes the connection in good order, after what was written.
    fn connect(&self, destination: SocketAddr, stream: MetadataStream);
}

/// A connection of the guest to its metadata service.
///
/// Reads end when the guest closes its half, resets the connection, or the link stops; after the latter two
/// writes fail.
#[derive(Debug)]
pub struct MetadataStream {
    inner: DuplexStream,
    hop_limit: HopLimit,
}

impl MetadataStream {
    pub(crate) fn new(inner: DuplexStream, hop_limit: HopLimit) -> Self {
        Self { inner, hop_limit }
    }

    /// The control of this connection's IP TTL, which outlives the stream being handed on.
    pub fn hop_limit(&self) -> HopLimit {
        self.hop_limit.clone()
    }
}

impl AsyncRead for MetadataStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for MetadataStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// The IP TTL of what a metadata service sends on one connection.
///
/// EC2 answers the PUT for a session token with a small TTL (1 unless told otherwise), so that the token
/// does not get past the instance itself. Set it before writing the answer, and set it back before the
/// next one. Bytes written before a change may go out with the new value as long as the guest has not
/// read them, never with an older one; HTTP without pipelining leaves no such bytes.
#[derive(Debug, Clone)]
pub struct HopLimit(Arc<AtomicU8>);

impl HopLimit {
    pub(crate) fn new(ttl: u8) -> Self {
        Self(Arc::new(AtomicU8::new(ttl.max(1))))
    }

    /// Sends what is written from now on with this TTL; 0 counts as 1.
    pub fn set(&self, ttl: u8) {
        self.0.store(ttl.max(1), Ordering::Release);
    }

    /// The TTL in force.
    pub fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }
}
