//! What the threads of one connection share: the way out, and what is in flight.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bulbil_volume::BlockDevice;
use rustix::io::Errno as OsErrno;
use rustix::net::{SendFlags, send};
use tracing::debug;

use super::lock;
use super::stats::Counters;
use super::wire::request::Session;

/// How long a send may make no progress before the reply is left to a thread of the connection's
/// own, so that a client that reads nothing holds no shared worker. A healthy client empties the
/// socket in well under a millisecond.
pub(super) const SEND_STALL: Duration = Duration::from_millis(200);

/// What every request in flight costs at least, so that requests without data are bounded too.
const MIN_CHARGE_BYTES: usize = 64 << 10;

/// A connection in transmission.
///
/// The receiving thread and workers send through [`send`](Self::send), one whole reply at a time.
/// When the socket is full for too long the rest goes to `Outbox::backlog`, a drain thread writes
/// it, and the receiving thread takes no further request until that is done:
///
/// ```text
/// direct ── send stalls ──► draining ── backlog empty ──► direct
///    └────── send fails ──► closed ◄── send fails ──┘
/// ```
pub(super) struct Connection {
    /// Entered by every thread that works for the connection.
    pub(super) span: tracing::Span,
    pub(super) session: Session,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) counters: Arc<Counters>,
    stream: Arc<UnixStream>,
    outbox: Mutex<Outbox>,
    drained: Condvar,
    in_flight_limit: usize,
    in_flight: Mutex<usize>,
    landed: Condvar,
}

#[derive(Default)]
struct Outbox {
    state: OutboxState,
    backlog: Vec<u8>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum OutboxState {
    #[default]
    Direct,
    Draining,
    Closed,
}

impl Connection {
    /// Starts transmission on `stream`, in the current span.
    pub(super) fn new(
        stream: Arc<UnixStream>,
        session: Session,
        device: Arc<dyn BlockDevice>,
        counters: Arc<Counters>,
        in_flight_limit: usize,
    ) -> io::Result<Self> {
        stream.set_write_timeout(Some(SEND_STALL))?;
        Ok(Self {
            span: tracing::Span::current(),
            session,
            device,
            counters,
            stream,
            outbox: Mutex::default(),
            drained: Condvar::new(),
            in_flight_limit,
            in_flight: Mutex::new(0),
            landed: Condvar::new(),
        })
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends whole replies. Failures end the connection and are not reported here: the receiving
    /// thread finds the socket closed.
    pub(super) fn send(self: &Arc<Self>, bytes: &[u8]) {
        let mut outbox = lock(&self.outbox);
        match outbox.state {
            OutboxState::Closed => {}
            OutboxState::Draining => outbox.backlog.extend_from_slice(bytes),
            OutboxState::Direct => match self.write_until_stalled(bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => self.start_draining(&mut outbox, &bytes[sent..]),
                Err(error) => self.close(&mut outbox, error),
            },
        }
    }

    /// Waits until nothing is left for the drain thread.
    pub(super) fn wait_until_drained(&self) {
        let outbox = lock(&self.outbox);
        let waited = self.drained.wait_while(outbox, |outbox| outbox.state == OutboxState::Draining);
        drop(waited);
    }

    /// Closes the socket in both directions, without waiting for anything.
    pub(super) fn sever(&self) {
        // The peer may have closed already.
        drop(self.stream.shutdown(Shutdown::Both));
    }

    fn write_until_stalled(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            match send(&*self.stream, &bytes[sent..], SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(OsErrno::INTR) => {}
                Err(OsErrno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    fn start_draining(self: &Arc<Self>, outbox: &mut Outbox, rest: &[u8]) {
        debug!("client does not read its replies");
        outbox.backlog.extend_from_slice(rest);
        outbox.state = OutboxState::Draining;
        let connection = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("nbd-drain".to_owned()).spawn(move || connection.drain());
        if let Err(error) = spawned {
            self.close(outbox, error);
        }
    }

    fn drain(&self) {
        loop {
            let mut outbox = lock(&self.outbox);
            if outbox.backlog.is_empty() {
                outbox.state = OutboxState::Direct;
                self.drained.notify_all();
                return;
            }
            let backlog = std::mem::take(&mut outbox.backlog);
            drop(outbox);
            if let Err(error) = self.write_all(&backlog) {
                self.close(&mut lock(&self.outbox), error);
                return;
            }
        }
    }

    fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = &bytes[self.write_until_stalled(bytes)?..];
        }
        Ok(())
    }

    fn close(&self, outbox: &mut Outbox, error: io::Error) {
        debug!(%error, "cannot send to the client");
        outbox.state = OutboxState::Closed;
        outbox.backlog = Vec::new();
        self.sever();
        self.drained.notify_all();
    }

    /// Counts a request for a worker against the connection's limit, or returns `None` when the
    /// limit is reached. One request is always allowed, however large.
    pub(super) fn try_charge(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        let mut in_flight = lock(&self.in_flight);
        self.has_room(*in_flight, bytes).then(|| self.charge(&mut in_flight, bytes))
    }

    /// As [`try_charge`](Self::try_charge), waiting until enough requests are answered.
    pub(super) fn charge_when_possible(self: &Arc<Self>, bytes: usize) -> Charge {
        let in_flight = lock(&self.in_flight);
        let mut in_flight = self
            .landed
            .wait_while(in_flight, |now| !self.has_room(*now, bytes))
            .unwrap_or_else(PoisonError::into_inner);
        self.charge(&mut in_flight, bytes)
    }

    fn has_room(&self, in_flight: usize, bytes: usize) -> bool {
        in_flight == 0 || in_flight + bytes.max(MIN_CHARGE_BYTES) <= self.in_flight_limit
    }

    fn charge(self: &Arc<Self>, in_flight: &mut usize, bytes: usize) -> Charge {
        let bytes = bytes.max(MIN_CHARGE_BYTES);
        *in_flight += bytes;
        Charge { connection: Arc::clone(self), bytes }
    }

    /// Waits until every request in flight is answered.
    pub(super) fn wait_until_idle(&self) {
        drop(self.landed.wait_while(lock(&self.in_flight), |now| *now > 0));
    }
}

/// A request in flight; dropping it makes room for others.
pub(super) struct Charge {
    connection: Arc<Connection>,
    bytes: usize,
}

impl Charge {
    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        *lock(&self.connection.in_flight) -= self.bytes;
        self.connection.landed.notify_all();
    }
}
