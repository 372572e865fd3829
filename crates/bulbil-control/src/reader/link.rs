//! Sockets of an image reader: whole messages, bounded waits, descriptors.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::wire::{self, MAX_DESCRIPTORS, MAX_READ_BYTES, WireError};

/// How often a wait looks at whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// The room of a descriptors' message.
const ANCILLARY_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// A pair of connected sockets for bulk data: the daemon's end and the reader's.
pub(super) fn lane() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    for socket in [&ours, &theirs] {
        // A whole reply in flight lets both sides work at once. The system may give less, which is only slower.
        let _less = sockopt::set_socket_send_buffer_size(socket, MAX_READ_BYTES);
    }
    Ok((ours, theirs))
}

/// Sends descriptors together with one byte.
pub(super) fn send_descriptors(socket: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives the descriptors of one [`send_descriptors`].
pub(super) fn receive_descriptors(socket: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); ANCILLARY_BYTES];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let of_message = |message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    };
    Ok(ancillary.drain().filter_map(of_message).flatten().collect())
}

/// Sends a JSON document with its length.
pub(super) fn send_message(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let json = wire::to_json(message);
    let len = u32::try_from(json.len()).map_err(io::Error::other)?;
    to.write_all(&len.to_le_bytes())?;
    to.write_all(&json)
}

/// Receives a JSON document; the length is checked before anything is allocated.
pub(super) fn receive_message<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut header = [0; 4];
    from.read_exact(&mut header)?;
    let mut json = vec![0; wire::message_len(header).map_err(broken)?];
    from.read_exact(&mut json)?;
    wire::from_json(&json).map_err(broken)
}

/// An error of the protocol, as one of input.
pub(super) fn broken(error: WireError) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// A socket that is waited for no longer than until a moment, and no longer than it is wanted.
pub(super) struct Patient<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
    is_cancelled: &'a (dyn Fn() -> bool + Send + Sync),
}

impl<'a> Patient<'a> {
    /// Waits on `socket`, which [`prepare`] has been called for, at most `limit` from now on.
    pub(super) fn new(
        socket: &'a UnixStream,
        limit: Duration,
        is_cancelled: &'a (dyn Fn() -> bool + Send + Sync),
    ) -> Self {
        Self { socket, deadline: Instant::now() + limit, is_cancelled }
    }

    fn try_until_done(&self, mut transfer: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            // Looked at before each piece, and not only when there is none: the other side may send a byte now and then.
            if (self.is_cancelled)() {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            if Instant::now() >= self.deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            match transfer(self.socket.as_fd()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }
}

/// Makes waits on a socket end now and then.
pub(super) fn prepare(socket: &UnixStream) -> io::Result<()> {
    socket.set_read_timeout(Some(TICK))?;
    socket.set_write_timeout(Some(TICK))
}

impl Read for Patient<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Waiting for all of it saves a wake-up for each piece.
        self.try_until_done(|socket| Ok(rustix::net::recv(socket, &mut *buf, RecvFlags::WAITALL)?.0))
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.try_until_done(|socket| Ok(rustix::net::send(socket, buf, SendFlags::NOSIGNAL)?))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Reads from a side that sends a byte now and then and never all, until the wait ends.
    fn read_drips(limit: Duration, is_cancelled: impl Fn() -> bool + Send + Sync) -> (ErrorKind, Duration) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        prepare(&ours).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    theirs.write_all(&[0]).unwrap();
                    std::thread::sleep(TICK / 10);
                }
            });
            let started = Instant::now();
            let read = Patient::new(&ours, limit, &is_cancelled).read_exact(&mut [0; 500]);
            let taken = started.elapsed();
            over.store(true, Ordering::Relaxed);
            (read.expect_err("it takes 5 s to come").kind(), taken)
        })
    }

    #[test]
    fn a_side_that_sends_too_slowly_is_not_waited_for() {
        let (error, taken) = read_drips(3 * TICK, || false);
        assert_eq!(error, ErrorKind::TimedOut);
        assert!(taken < 20 * TICK, "{taken:?}");
    }

    #[test]
    fn a_side_that_sends_slowly_is_not_waited_for_when_nobody_wants_it() {
        let asked = AtomicUsize::new(0);
        let (error, taken) = read_drips(Duration::from_secs(60), || asked.fetch_add(1, Ordering::Relaxed) >= 3);
        assert_eq!(error, ErrorKind::ConnectionAborted);
        assert!(taken < 20 * TICK, "{taken:?}");
    }
}
