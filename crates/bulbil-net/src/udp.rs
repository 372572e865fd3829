//! One UDP flow: the guest's port and a destination, with a socket of the host connected to it.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket as StdSocket};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SendFlags;
use tokio::io::ReadBuf;
use tokio::net::UdpSocket;

use crate::codec::dns;
use crate::limits::{UDP_DNS_IDLE, UDP_IDLE};
use crate::ready::FlowWaker;
use crate::tcp::{FlowKey, Tuple};
use crate::timers::Deadline;

/// Datagrams taken from one flow before another has its turn.
const DATAGRAMS_PER_TURN: usize = 64;

/// A flow and its place in the link's tables.
#[derive(Debug)]
pub(crate) struct UdpFlow {
    socket: UdpSocket,
    pub(crate) waker: FlowWaker<FlowKey>,
    pub(crate) deadline: Deadline,
    pub(crate) listed: bool,
    pub(crate) last_used: Instant,
}

/// What [`UdpFlow::pump`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// Nothing more for now.
    Empty,
    /// There may be more after the other flows.
    More,
    /// The destination said that nobody listens.
    Refused,
}

/// Time a flow to `port` is kept without traffic.
pub(crate) fn idle_limit(port: u16) -> Duration {
    if port == dns::PORT { UDP_DNS_IDLE } else { UDP_IDLE }
}

impl UdpFlow {
    /// Connects a socket to `to`; nothing is sent. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// Those of the socket, and `PermissionDenied` when `to` turns out to be the host itself and
    /// `own_host` does not say that this is meant.
    pub(crate) fn open(to: SocketAddrV4, own_host: bool, waker: FlowWaker<FlowKey>, now: Instant) -> io::Result<Self> {
        let socket = StdSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(to)?;
        if !own_host && socket.local_addr()?.ip() == *to.ip() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let socket = UdpSocket::from_std(socket)?;
        Ok(Self { socket, waker, deadline: Deadline::default(), listed: false, last_used: now })
    }

    /// Sends a datagram of the guest; one that does not fit the socket's buffer is lost, as UDP may.
    ///
    /// `false` when nobody listened where an earlier one went: an error alone makes no tokio socket readable,
    /// so this is where it is learnt.
    pub(crate) fn send(&mut self, payload: &[u8], now: Instant) -> bool {
        self.last_used = now;
        // Not `try_send`: a new socket is not yet known to be writable, and its first datagram would be lost.
        match rustix::net::send(&self.socket, payload, SendFlags::DONTWAIT) {
            Ok(_) => true,
            Err(error) => {
                tracing::trace!(%error, "datagram not sent");
                error != Errno::CONNREFUSED
            }
        }
    }

    /// Hands datagrams for the guest to `take`.
    pub(crate) fn pump(&mut self, scratch: &mut [u8], now: Instant, mut take: impl FnMut(&[u8])) -> Pumped {
        self.waker.rearm();
        let mut cx = Context::from_waker(self.waker.waker());
        for _ in 0..DATAGRAMS_PER_TURN {
            let mut buf = ReadBuf::new(scratch);
            match self.socket.poll_recv(&mut cx, &mut buf) {
                Poll::Ready(Ok(())) => {
                    self.last_used = now;
                    take(buf.filled());
                }
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Pumped::Refused,
                Poll::Ready(Err(_)) | Poll::Pending => return Pumped::Empty,
            }
        }
        Pumped::More
    }

    /// When the flow is closed if nothing happens.
    pub(crate) fn idle_at(&self, tuple: Tuple) -> Instant {
        self.last_used + idle_limit(tuple.remote_port)
    }
}
