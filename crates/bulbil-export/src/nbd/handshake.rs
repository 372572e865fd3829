//! Runs a [`Negotiation`] on a socket, within a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::negotiation::{Negotiation, Outcome};
use super::wire::option::{MAX_OPTION_BYTES, OPTION_HEADER_BYTES, OptionHeader};
use super::wire::request::Session;

/// The most options a client may send: enough to look at hundreds of exports one by one.
const MAX_OPTIONS: usize = 1024;

/// Negotiates with a new client for at most `limit`.
///
/// Returns the chosen export and session, or `None` when the handshake ended in order without
/// entering transmission.
///
/// # Errors
/// The socket's errors, and `InvalidData` or `TimedOut` when the client breaks the protocol.
pub(super) fn negotiate(
    stream: &UnixStream,
    mut negotiation: Negotiation,
    limit: Duration,
) -> io::Result<Option<(usize, Session)>> {
    let mut socket = Deadlined { stream, deadline: Instant::now() + limit };
    socket.send(&Negotiation::greeting())?;
    let mut flags = [0; 4];
    socket.receive(&mut flags)?;
    if !negotiation.accept_client_flags(flags) {
        return Err(invalid("unknown client flags"));
    }
    let chosen = haggle(&mut socket, &mut negotiation)?;
    stream.set_read_timeout(None)?;
    Ok(chosen)
}

fn haggle(socket: &mut Deadlined<'_>, negotiation: &mut Negotiation) -> io::Result<Option<(usize, Session)>> {
    let mut data = Vec::new();
    let mut out = Vec::new();
    for _ in 0..MAX_OPTIONS {
        let mut header = [0; OPTION_HEADER_BYTES];
        if !socket.receive_or_end(&mut header)? {
            return Ok(None);
        }
        let header = OptionHeader::parse(&header).ok_or_else(|| invalid("an option without its magic number"))?;
        out.clear();
        if header.len_bytes > MAX_OPTION_BYTES {
            Negotiation::answer_oversized(header.option, &mut out);
            socket.send(&out)?;
            return Err(invalid("an option that is too long"));
        }
        data.resize(header.len_bytes as usize, 0);
        socket.receive(&mut data)?;
        let outcome = negotiation.answer(header.option, &data, &mut out);
        socket.send(&out)?;
        match outcome {
            Outcome::Continue => {}
            Outcome::Close => return Ok(None),
            Outcome::Transmit { export, session } => return Ok(Some((export, session))),
        }
    }
    Err(invalid("too many options"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A socket whose reads and writes together end at a deadline, however slowly bytes trickle.
struct Deadlined<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Deadlined<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"));
        }
        Ok(left)
    }

    /// Fills `buf`; false when the stream ended before its first byte.
    fn receive_or_end(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < buf.len() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(&mut buf[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                // The next turn finds the deadline passed, or goes on after a signal.
                Err(error) if is_interruption(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() || self.receive_or_end(buf)? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.left()?))?;
            match self.stream.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(error) if is_interruption(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_interruption(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
