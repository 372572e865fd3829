//! The receiving thread of a connection: requests in, fast ones answered at once.

use std::io;
use std::sync::Arc;

use rustix::io::Errno as OsErrno;
use rustix::net::{RecvFlags, recv};
use tracing::{debug, warn};

use super::connection::Connection;
use super::execute;
use super::stats::Counters;
use super::wire::reply::{self, Failure, ShortReply};
use super::wire::request::{Command, REQUEST_HEADER_BYTES, Request, RequestHeader};
use super::workers::{Job, WorkerPool, short_reply, status_reply};

/// Bytes received at once: thousands of reads, or a queue of 4 KiB writes. Memory that no client
/// fills is never touched.
const RECEIVE_BYTES: usize = 512 << 10;
/// Room for replies that are collected: the largest inline read behind an unsent batch.
const BATCH_BYTES: usize = 320 << 10;
/// Replies are sent from this many bytes on, even if more requests wait: enough to spread the cost
/// of a send, few enough that the client works on them while the next ones are made.
const SEND_BYTES: usize = 64 << 10;
/// A write that is refused is read and dropped up to this size; a larger one is taken for an
/// attack ("Size constraints" allows to disconnect past 32 MiB).
const MAX_SKIPPED_BYTES: u32 = 64 << 20;

/// Why a connection ended.
#[derive(Debug)]
enum End {
    /// The client disconnected, in order or by closing its socket between requests.
    Client,
    /// The client broke the protocol.
    Violation(&'static str),
    /// The socket failed or ended inside a request.
    Socket(io::Error),
}

/// Serves a connection until the client or the server ends it, and every request is answered.
pub(super) fn serve(connection: Arc<Connection>, workers: Arc<WorkerPool>) {
    let mut receiver = Receiver {
        input: Input { bytes: vec![0; RECEIVE_BYTES], start: 0, end: 0 },
        batch: Batch { bytes: vec![0; BATCH_BYTES], filled: 0 },
        connection,
        workers,
    };
    let end = receiver.run();
    receiver.send_batch();
    receiver.connection.wait_until_idle();
    receiver.connection.wait_until_drained();
    // What was sent stays readable for the client.
    receiver.connection.sever();
    match end {
        End::Client => debug!("client disconnected"),
        End::Violation(what) => warn!(what, "client broke the protocol"),
        End::Socket(error) => debug!(%error, "connection lost"),
    }
}

/// Received bytes; `start..end` are not yet consumed.
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn available(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The free part, with room for at least `needed` bytes counted from `start`.
    fn free(&mut self, needed: usize) -> &mut [u8] {
        if self.bytes.len() - self.start < needed {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }
}

/// Replies not yet sent.
struct Batch {
    bytes: Vec<u8>,
    filled: usize,
}

impl Batch {
    fn has_room(&self, len: usize) -> bool {
        self.bytes.len() - self.filled >= len
    }
}

struct Receiver {
    connection: Arc<Connection>,
    workers: Arc<WorkerPool>,
    input: Input,
    batch: Batch,
}

impl Receiver {
    fn run(&mut self) -> End {
        loop {
            match self.next_header() {
                Ok(None) => return End::Client,
                Ok(Some(header)) => match self.handle(&header) {
                    Ok(None) if self.batch.filled >= SEND_BYTES => self.send_batch(),
                    Ok(None) => {}
                    Ok(Some(end)) => return end,
                    Err(error) => return End::Socket(error),
                },
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return End::Violation("a request without its magic number");
                }
                Err(error) => return End::Socket(error),
            }
        }
    }

    /// Takes the next header; `None` at the end of the stream.
    fn next_header(&mut self) -> io::Result<Option<RequestHeader>> {
        if !self.fill(REQUEST_HEADER_BYTES)? {
            return Ok(None);
        }
        let bytes = self.input.available().first_chunk().expect("as many bytes were just received");
        let header = RequestHeader::parse(bytes).ok_or(io::ErrorKind::InvalidData)?;
        self.input.consume(REQUEST_HEADER_BYTES);
        Ok(Some(header))
    }

    fn handle(&mut self, header: &RequestHeader) -> io::Result<Option<End>> {
        let request = match self.connection.session.check(header) {
            Ok(request) => request,
            Err(failure) => return self.refuse(header, failure),
        };
        self.connection.counters.count_request(request.command, request.len_bytes);
        if request.command == Command::Disconnect {
            return Ok(Some(End::Client));
        }
        if execute::is_inline(&*self.connection.device, &request) {
            self.run_inline(&request)?;
        } else {
            self.submit(request)?;
        }
        Ok(None)
    }

    fn refuse(&mut self, header: &RequestHeader, failure: Failure) -> io::Result<Option<End>> {
        if header.payload_bytes() > MAX_SKIPPED_BYTES {
            return Ok(Some(End::Violation("a write that is far too long")));
        }
        self.skip(header.payload_bytes() as usize)?;
        debug!(?header, failure.message, "request refused");
        Counters::count(&self.connection.counters.failures);
        let structured = self.connection.session.structured;
        self.push_short(&reply::failure(structured, header.cookie, failure));
        Ok(None)
    }

    fn run_inline(&mut self, request: &Request) -> io::Result<()> {
        match request.command {
            Command::Read if request.len_bytes > 0 => self.read_inline(request),
            Command::Read => {
                self.push_short(&reply::empty_read(self.connection.session.structured, request.cookie));
            }
            Command::BlockStatus { one_extent } => self.status_inline(request, one_extent),
            Command::Write { .. } => self.write_inline(request)?,
            _ => self.push_short(&reply::success(request.cookie)),
        }
        Ok(())
    }

    /// Reads straight into the batch, behind the place of the header.
    fn read_inline(&mut self, request: &Request) {
        let structured = self.connection.session.structured;
        let header_bytes = reply::read_header_bytes(structured);
        let total = header_bytes + request.len_bytes as usize;
        self.make_room(total);
        let place = &mut self.batch.bytes[self.batch.filled..self.batch.filled + total];
        let (header, data) = place.split_at_mut(header_bytes);
        match execute::read(&*self.connection.device, request, data) {
            Ok(()) => {
                reply::write_read_header(structured, header, request.cookie, request.offset, request.len_bytes);
                self.batch.filled += total;
            }
            Err(failure) => self.push_short(&short_reply(&self.connection, request, Err(failure))),
        }
    }

    fn write_inline(&mut self, request: &Request) -> io::Result<()> {
        let len = request.len_bytes as usize;
        if !self.fill(len)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let payload = &self.input.available()[..len];
        let done = execute::run(&*self.connection.device, request, payload, &self.workers.buffers);
        self.input.consume(len);
        self.push_short(&short_reply(&self.connection, request, done));
        Ok(())
    }

    fn status_inline(&mut self, request: &Request, one_extent: bool) {
        match status_reply(&self.connection, request, one_extent) {
            Ok(bytes) => self.push(&bytes),
            Err(failure) => self.push_short(&short_reply(&self.connection, request, Err(failure))),
        }
    }

    /// Hands a request to a worker, waiting first while too much is in flight.
    fn submit(&mut self, request: Request) -> io::Result<()> {
        Counters::count(&self.connection.counters.slow_requests);
        let is_write = matches!(request.command, Command::Write { .. });
        let has_data = is_write || request.command == Command::Read;
        let cost = if has_data { request.len_bytes as usize } else { 0 };
        // A client that reads no replies gets no further work done.
        self.connection.wait_until_drained();
        let charge = match self.connection.try_charge(cost) {
            Some(charge) => charge,
            None => {
                self.send_batch();
                self.connection.charge_when_possible(cost)
            }
        };
        let payload = if is_write { Some(self.take_payload(request.len_bytes as usize)?) } else { None };
        self.workers.submit(Job::new(request, payload, charge));
        Ok(())
    }

    /// Moves a write's data into a buffer of its own; what is not yet here is received into it.
    fn take_payload(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut buffer = self.workers.buffers.take(len);
        let mut filled = self.input.available().len().min(len);
        buffer[..filled].copy_from_slice(&self.input.available()[..filled]);
        self.input.consume(filled);
        while filled < len {
            self.send_batch();
            match receive(&self.connection, &mut buffer[filled..len])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(buffer)
    }

    fn skip(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            if !self.fill(1)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = self.input.available().len().min(len);
            self.input.consume(count);
            len -= count;
        }
        Ok(())
    }

    /// Receives until `needed` bytes are there; false when the stream ended before the first.
    ///
    /// Replies are sent before this waits, so a client never waits for one that is collected.
    fn fill(&mut self, needed: usize) -> io::Result<bool> {
        while self.input.available().len() < needed {
            self.send_batch();
            let received = receive(&self.connection, self.input.free(needed))?;
            if received == 0 {
                let is_empty = self.input.available().is_empty();
                return if is_empty { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.input.end += received;
        }
        Ok(true)
    }

    fn push_short(&mut self, reply: &ShortReply) {
        self.push(reply.as_bytes());
    }

    fn push(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.batch.bytes[self.batch.filled..self.batch.filled + bytes.len()].copy_from_slice(bytes);
        self.batch.filled += bytes.len();
    }

    fn make_room(&mut self, len: usize) {
        if !self.batch.has_room(len) {
            self.send_batch();
        }
    }

    fn send_batch(&mut self) {
        if self.batch.filled > 0 {
            self.connection.send(&self.batch.bytes[..self.batch.filled]);
            self.batch.filled = 0;
            self.connection.wait_until_drained();
        }
    }
}

/// Receives at least one byte, or zero at the end of the stream.
fn receive(connection: &Connection, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(connection.stream(), &mut *buf, RecvFlags::empty()) {
            Ok((received, _)) => return Ok(received),
            Err(OsErrno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
