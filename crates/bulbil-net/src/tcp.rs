//! One TCP flow: the guest's connection on one side, a stream of the host on the other.
//!
//! ```text
//!   guest SYN --> Connecting --(host connected, SYN given to a listening socket)--> Open
//!                     |                                                               |
//!                     +--(refused: RST, unreachable: ICMP)                            |
//!   host accept -------------(smoltcp connects to the guest)------------------------> Open
//!
//!   Open, each direction by itself:
//!     guest -> host   receive buffer --write--> host;  guest's FIN and buffer empty --> shut down the host's half
//!     host -> guest   host --read--> send buffer;      host's end                    --> FIN to the guest
//!     RST either way  --> RST the other way
//! ```
//!
//! Back-pressure needs no code: a full receive buffer closes the guest's window, and the host is not read
//! while the send buffer is full.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{IpEndpoint, IpListenEndpoint};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;

use crate::limits::{
    CONNECT_TIMEOUT, GUEST_SILENCE, KEEPALIVE, MAX_TCP_BUFFER_BYTES, MIN_TCP_BUFFER_BYTES, TCP_BUFFER_BUDGET_BYTES,
};
use crate::metadata::HopLimit;
use crate::ready::FlowWaker;
use crate::stack::Stack;
use crate::timers::Deadline;

/// What tells the flows of a link apart; the guest has one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Tuple {
    pub(crate) guest_port: u16,
    pub(crate) remote_ip: Ipv4Addr,
    pub(crate) remote_port: u16,
}

impl Tuple {
    pub(crate) fn remote(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.remote_ip, self.remote_port)
    }
}

/// A flow's key, for wakers and timers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum FlowKey {
    Tcp(Tuple),
    Udp(Tuple),
}

/// What a flow counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowKind {
    /// The guest's, to a socket of the host.
    Nat,
    Metadata,
    Dns,
    /// Into the guest.
    Forward,
}

/// A flow and its place in the link's tables.
#[derive(Debug)]
pub(crate) struct TcpFlow {
    pub(crate) kind: FlowKind,
    pub(crate) waker: FlowWaker<FlowKey>,
    pub(crate) deadline: Deadline,
    /// Whether it is on the list of flows to look at.
    pub(crate) listed: bool,
    pub(crate) stage: Stage,
}

#[derive(Debug)]
pub(crate) enum Stage {
    /// The host is connecting; the guest's SYN packet waits.
    Connecting {
        syn: Vec<u8>,
    },
    Open(Box<OpenFlow>),
}

/// The host's side of a flow.
#[derive(Debug)]
pub(crate) enum HostStream {
    Tcp(TcpStream),
    /// A service in this process, with the TTL it asks for.
    Local(DuplexStream, Option<HopLimit>),
}

impl HostStream {
    fn poll_read(&mut self, cx: &mut Context<'_>, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buf = ReadBuf::new(bytes);
        ready!(match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, &mut buf),
            Self::Local(stream, _) => Pin::new(stream).poll_read(cx, &mut buf),
        })?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Local(stream, _) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    /// Ends what is sent to the host. Neither kind ever has to wait for this.
    fn shut_down(&mut self, cx: &mut Context<'_>) {
        let result = match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Local(stream, _) => Pin::new(stream).poll_shutdown(cx),
        };
        if let Poll::Ready(Err(error)) = result {
            tracing::debug!(%error, "host had closed before the guest");
        }
    }

    fn hop_limit(&self) -> Option<u8> {
        match self {
            Self::Tcp(_) | Self::Local(_, None) => None,
            Self::Local(_, Some(limit)) => Some(limit.get()),
        }
    }
}

/// Makes the close of `stream` a reset: the peer must not take it for an orderly end.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    set_linger(stream, Some(Duration::ZERO));
}

fn set_linger(stream: &TcpStream, linger: Option<Duration>) {
    if let Err(error) = rustix::net::sockopt::set_socket_linger(stream, linger) {
        tracing::debug!(%error, "cannot say how a socket is to close");
    }
}

/// What is to be done with a flow after it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Look again at the deadline, or right after the other flows (`again`).
    Live { again: bool, deadline: Option<Instant> },
    /// It is over, in good order or not.
    Done { orderly: bool },
}

/// A flow with both sides there.
#[derive(Debug)]
pub(crate) struct OpenFlow {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    host: HostStream,
    buffer_bytes: usize,
    established: bool,
    /// All the guest sent is with the host, its end too.
    to_host_done: bool,
    /// The host's end is in the send buffer.
    to_guest_done: bool,
    /// The guest's FIN is in; what comes after is an orderly close.
    guest_finished: bool,
    /// The guest's last FIN has been acknowledged.
    last_fin_acked: bool,
    broken: bool,
}

impl OpenFlow {
    /// The flow for a SYN of the guest, which is given to it next.
    pub(crate) fn accept(local: SocketAddrV4, host: HostStream, buffer_bytes: usize) -> Option<Self> {
        let mut socket = new_socket(buffer_bytes);
        socket.listen(IpListenEndpoint::from(IpEndpoint::from(local))).ok()?;
        socket.set_hop_limit(host.hop_limit());
        Some(Self::new(socket, host, buffer_bytes))
    }

    /// The flow that connects from `local` to the guest's `remote`.
    pub(crate) fn connect(
        stack: &mut Stack,
        local: SocketAddrV4,
        remote: SocketAddrV4,
        host: HostStream,
        buffer_bytes: usize,
    ) -> Option<Self> {
        let mut socket = new_socket(buffer_bytes);
        let (local, remote) = (IpEndpoint::from(local), IpEndpoint::from(remote));
        socket.connect(stack.context(), remote, IpListenEndpoint::from(local)).ok()?;
        Some(Self::new(socket, host, buffer_bytes))
    }

    fn new(socket: Socket<'static>, host: HostStream, buffer_bytes: usize) -> Self {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            sockets,
            handle,
            host,
            buffer_bytes,
            established: false,
            to_host_done: false,
            to_guest_done: false,
            guest_finished: false,
            last_fin_acked: false,
            broken: false,
        }
    }

    /// Takes a packet of the guest.
    pub(crate) fn receive(&mut self, packet: &[u8], stack: &mut Stack, now: Instant) {
        stack.receive(packet, &mut self.sockets, now);
        self.last_fin_acked = false;
        self.note_state();
    }

    /// Bytes of each of its two buffers.
    pub(crate) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Whether the guest has answered.
    pub(crate) fn is_established(&self) -> bool {
        self.established
    }

    fn note_state(&mut self) {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let state = socket.state();
        if !self.established && !matches!(state, State::Listen | State::SynSent | State::SynReceived | State::Closed) {
            self.established = true;
            socket.set_timeout(Some(GUEST_SILENCE.into()));
            socket.set_keep_alive(Some(KEEPALIVE.into()));
        }
        if matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait) {
            self.guest_finished = true;
        }
    }

    /// Moves what can be moved both ways and sends what can be sent.
    pub(crate) fn pump(&mut self, cx: &mut Context<'_>, stack: &mut Stack, now: Instant) -> Progress {
        if !self.broken {
            let moved = self.move_to_host(cx).and_then(|()| self.move_to_guest(cx));
            if let Err(error) = moved {
                tracing::debug!(%error, "host side of a flow broke");
                self.broken = true;
                self.sockets.get_mut::<Socket<'_>>(self.handle).abort();
            }
        }
        let again = !self.is_only_draining() && stack.send(&mut self.sockets, now);
        self.last_fin_acked = !again;
        self.note_state();
        self.conclude(again, stack, now)
    }

    /// Whether the guest's side is over and only its last bytes are on their way to the host. Then the
    /// stack must not be polled: it would clear the buffer when TIME-WAIT ends.
    fn is_only_draining(&self) -> bool {
        let over = match self.sockets.get::<Socket<'_>>(self.handle).state() {
            State::Closed => true,
            State::TimeWait => self.last_fin_acked,
            _ => false,
        };
        over && !self.broken && self.guest_finished
    }

    fn conclude(&mut self, again: bool, stack: &mut Stack, now: Instant) -> Progress {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let draining = self.guest_finished && !self.broken && !self.to_host_done && socket.recv_queue() > 0;
        match socket.state() {
            State::Closed if again => Progress::Live { again, deadline: None },
            State::Closed | State::TimeWait if draining => Progress::Live { again: false, deadline: None },
            State::Closed => Progress::Done { orderly: self.to_host_done && self.to_guest_done },
            State::TimeWait if !again => Progress::Done { orderly: true },
            // A reset before the connection was there puts the socket back here.
            State::Listen => Progress::Done { orderly: false },
            _ => Progress::Live { again, deadline: stack.next_deadline(&self.sockets, now) },
        }
    }

    fn move_to_host(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let host = &mut self.host;
        while socket.recv_queue() > 0 {
            let wrote = socket.recv(|bytes| match host.poll_write(cx, bytes) {
                Poll::Ready(Ok(count)) => (count, Poll::Ready(Ok(count))),
                Poll::Ready(Err(error)) => (0, Poll::Ready(Err(error))),
                Poll::Pending => (0, Poll::Pending),
            });
            match wrote {
                Ok(Poll::Ready(Ok(0))) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Poll::Ready(Ok(_))) => {}
                Ok(Poll::Ready(Err(error))) => return Err(error),
                Ok(Poll::Pending) | Err(_) => return Ok(()),
            }
        }
        if self.guest_finished && !self.to_host_done {
            self.to_host_done = true;
            host.shut_down(cx);
        }
        Ok(())
    }

    fn move_to_guest(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.raise_hop_limit() {
            return Ok(());
        }
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        let host = &mut self.host;
        while !self.to_guest_done && socket.can_send() {
            let read = socket.send(|bytes| match host.poll_read(cx, bytes) {
                Poll::Ready(Ok(count)) => (count, Poll::Ready(Ok(count))),
                Poll::Ready(Err(error)) => (0, Poll::Ready(Err(error))),
                Poll::Pending => (0, Poll::Pending),
            });
            match read {
                Ok(Poll::Ready(Ok(0))) => {
                    self.to_guest_done = true;
                    socket.close();
                }
                Ok(Poll::Ready(Ok(_))) => {}
                Ok(Poll::Ready(Err(error))) => return Err(error),
                Ok(Poll::Pending) | Err(_) => break,
            }
        }
        self.lower_hop_limit();
        Ok(())
    }

    /// Takes over a larger TTL once everything sent with the smaller one has arrived. `false` means that
    /// nothing may be read from the host yet.
    fn raise_hop_limit(&mut self) -> bool {
        let wanted = self.host.hop_limit();
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        if wanted > socket.hop_limit() {
            if socket.send_queue() > 0 {
                return false;
            }
            socket.set_hop_limit(wanted);
        }
        true
    }

    /// Takes over a smaller TTL, after reading: what was read may have been written after it was asked for.
    fn lower_hop_limit(&mut self) {
        let wanted = self.host.hop_limit();
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        if wanted < socket.hop_limit() {
            socket.set_hop_limit(wanted);
        }
    }

    /// Ends the host's side; a disorderly end is passed on as a reset.
    pub(crate) fn finish(self, orderly: bool) {
        if let HostStream::Tcp(stream) = &self.host {
            set_linger(stream, if orderly { None } else { Some(Duration::ZERO) });
        }
    }
}

fn new_socket(buffer_bytes: usize) -> Socket<'static> {
    let buffer = || SocketBuffer::new(vec![0; buffer_bytes]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    // Frames are taken in batches, so one acknowledgement already stands for many segments.
    socket.set_ack_delay(None);
    socket.set_timeout(Some(CONNECT_TIMEOUT.into()));
    socket
}

/// Shares out the memory of TCP buffers: the first flows get large ones, a crowd small ones.
#[derive(Debug, Default)]
pub(crate) struct BufferBudget {
    used_bytes: usize,
}

/// Part of what is left that one buffer may take.
const SHARE: usize = 32;

impl BufferBudget {
    /// Bytes for each of a new flow's two buffers, at most `max_bytes`.
    pub(crate) fn take(&mut self, max_bytes: usize) -> usize {
        let share = TCP_BUFFER_BUDGET_BYTES.saturating_sub(self.used_bytes) / SHARE;
        let power_of_two = 1 << share.max(1).ilog2();
        let bytes = usize::clamp(power_of_two, MIN_TCP_BUFFER_BYTES, MAX_TCP_BUFFER_BYTES.min(max_bytes));
        self.used_bytes += 2 * bytes;
        bytes
    }

    /// Gives back what [`Self::take`] gave.
    pub(crate) fn put_back(&mut self, bytes: usize) {
        self.used_bytes = self.used_bytes.saturating_sub(2 * bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_TCP_FLOWS;

    #[test]
    fn first_flow_has_large_buffers_and_all_together_stay_small() {
        let mut budget = BufferBudget::default();
        assert_eq!(budget.take(usize::MAX), MAX_TCP_BUFFER_BYTES);
        let sizes: Vec<usize> = (1..MAX_TCP_FLOWS).map(|_| budget.take(usize::MAX)).collect();
        assert!(sizes.is_sorted_by(|a, b| a >= b));
        assert_eq!(sizes.last(), Some(&MIN_TCP_BUFFER_BYTES));
        assert!(budget.used_bytes < 19 << 20, "{} bytes", budget.used_bytes);
        sizes.into_iter().for_each(|bytes| budget.put_back(bytes));
        budget.put_back(MAX_TCP_BUFFER_BYTES);
        assert_eq!(budget.used_bytes, 0);
    }
}
