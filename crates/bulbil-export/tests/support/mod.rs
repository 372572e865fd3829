//! A block device in memory that a test can look into, stop and break, and a raw NBD client.

#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "in tests a failed unwrap is a failed test")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bulbil_export::nbd::{Export, Limits, NbdServer, ServerHandle};
use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};

pub(crate) const BLOCK: u64 = 4096;
/// Bounds every wait, so that a broken server fails a test instead of hanging it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A closed gate stops requests that are slow until the test opens it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    closed: bool,
    waiting: usize,
}

impl Gate {
    pub(crate) fn close(&self) {
        self.state.lock().unwrap().closed = true;
    }

    pub(crate) fn open(&self) {
        self.state.lock().unwrap().closed = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| state.closed).unwrap();
        state.waiting -= 1;
    }

    /// Waits until exactly `count` requests stand at the gate.
    pub(crate) fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (_state, waited) =
            self.changed.wait_timeout_while(state, PATIENCE, |state| state.waiting != count).unwrap();
        assert!(!waited.timed_out(), "{count} requests did not arrive at the gate");
    }
}

/// The content of a [`MemoryDisk`]: what reads return, and what would survive a loss of power.
#[derive(Debug)]
struct Content {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    /// Blocks that hold data; others are holes.
    stored: BTreeSet<u64>,
    /// Blocks changed since they were last made durable.
    dirty: BTreeSet<u64>,
}

/// A sparse disk in memory with gates and faults.
#[derive(Debug)]
pub(crate) struct MemoryDisk {
    size_bytes: u64,
    read_only: bool,
    content: Mutex<Content>,
    /// Reads from this offset on are slow: they are not fast and pass the gate.
    pub(crate) slow_from: AtomicU64,
    pub(crate) read_gate: Gate,
    pub(crate) flush_gate: Gate,
    /// The next reads, writes or flushes fail with this.
    pub(crate) fault: Mutex<Option<BlockErrorKind>>,
    pub(crate) panic_on_read: AtomicUsize,
    pub(crate) reads: AtomicUsize,
    pub(crate) forced_writes: AtomicUsize,
}

impl MemoryDisk {
    pub(crate) fn new(size_bytes: u64) -> Self {
        let len = usize::try_from(size_bytes).unwrap();
        let content =
            Content { volatile: vec![0; len], durable: vec![0; len], stored: BTreeSet::new(), dirty: BTreeSet::new() };
        Self {
            size_bytes,
            read_only: false,
            content: Mutex::new(content),
            slow_from: AtomicU64::new(u64::MAX),
            read_gate: Gate::default(),
            flush_gate: Gate::default(),
            fault: Mutex::new(None),
            panic_on_read: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            forced_writes: AtomicUsize::new(0),
        }
    }

    pub(crate) fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Fills the disk with bytes that tell their own offset.
    pub(crate) fn patterned(self) -> Self {
        let mut content = self.content.lock().unwrap();
        content.volatile = pattern(0, usize::try_from(self.size_bytes).unwrap());
        content.durable = content.volatile.clone();
        content.stored = (0..self.size_bytes.div_ceil(BLOCK)).collect();
        drop(content);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.content.lock().unwrap().volatile.clone()
    }

    /// What is left after a loss of power.
    pub(crate) fn durable_bytes(&self) -> Vec<u8> {
        self.content.lock().unwrap().durable.clone()
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.content.lock().unwrap().dirty.is_empty()
    }

    fn check(&self, offset: u64, len_bytes: u64, changes: bool) -> Result<(), BlockError> {
        if offset.checked_add(len_bytes).is_none_or(|end| end > self.size_bytes) {
            return Err(BlockError::new(BlockErrorKind::OutOfRange, "past the end"));
        }
        if changes && self.read_only {
            return Err(BlockError::new(BlockErrorKind::ReadOnly, "read only"));
        }
        match *self.fault.lock().unwrap() {
            Some(kind) => Err(BlockError::new(kind, "injected fault in /secret/path")),
            None => Ok(()),
        }
    }

    fn range(offset: u64, len_bytes: u64) -> std::ops::Range<usize> {
        usize::try_from(offset).unwrap()..usize::try_from(offset + len_bytes).unwrap()
    }

    fn change(&self, offset: u64, len_bytes: u64, fua: bool, change: impl FnOnce(&mut [u8])) {
        let mut content = self.content.lock().unwrap();
        change(&mut content.volatile[Self::range(offset, len_bytes)]);
        let blocks = offset / BLOCK..(offset + len_bytes).div_ceil(BLOCK);
        for block in blocks {
            let whole = Self::range(block * BLOCK, BLOCK.min(self.size_bytes - block * BLOCK));
            if content.volatile[whole.clone()].iter().all(|byte| *byte == 0) {
                content.stored.remove(&block);
            } else {
                content.stored.insert(block);
            }
            if fua {
                let data = content.volatile[whole.clone()].to_vec();
                content.durable[whole].copy_from_slice(&data);
                content.dirty.remove(&block);
            } else {
                content.dirty.insert(block);
            }
        }
        if fua {
            self.forced_writes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl BlockDevice for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check(offset, buf.len() as u64, false)?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        assert_eq!(self.panic_on_read.load(Ordering::Relaxed), 0, "a device that panics, on purpose");
        if !self.is_fast(offset, buf.len() as u64) {
            self.read_gate.pass();
        }
        let content = self.content.lock().unwrap();
        buf.copy_from_slice(&content.volatile[Self::range(offset, buf.len() as u64)]);
        Ok(())
    }

    fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        offset + len_bytes <= self.slow_from.load(Ordering::Relaxed)
    }

    fn write_at(&self, buf: &[u8], offset: u64, fua: bool) -> Result<(), BlockError> {
        self.check(offset, buf.len() as u64, true)?;
        self.change(offset, buf.len() as u64, fua, |bytes| bytes.copy_from_slice(buf));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.check(offset, len_bytes, true)?;
        self.change(offset, len_bytes, fua, |bytes| bytes.fill(0));
        Ok(())
    }

    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.check(offset, len_bytes, true)?;
        let start = offset.next_multiple_of(BLOCK);
        let end = (offset + len_bytes) / BLOCK * BLOCK;
        if start < end {
            self.change(start, end - start, fua, |bytes| bytes.fill(0));
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        // What was written when the flush began, and not one byte more.
        let snapshot = {
            let mut content = self.content.lock().unwrap();
            let dirty = std::mem::take(&mut content.dirty);
            let data = content.volatile.clone();
            (dirty, data)
        };
        self.flush_gate.pass();
        self.check(0, 0, false)?;
        let (dirty, data) = snapshot;
        let mut content = self.content.lock().unwrap();
        for block in dirty {
            let whole = Self::range(block * BLOCK, BLOCK.min(self.size_bytes - block * BLOCK));
            content.durable[whole.clone()].copy_from_slice(&data[whole]);
        }
        Ok(())
    }

    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        self.check(offset, len_bytes, false)?;
        let content = self.content.lock().unwrap();
        let mut extents: Vec<StatusExtent> = Vec::new();
        let (mut at, end) = (offset, offset + len_bytes);
        while at < end {
            let len_bytes = (at / BLOCK * BLOCK + BLOCK).min(end) - at;
            let kind = if content.stored.contains(&(at / BLOCK)) { ExtentKind::Data } else { ExtentKind::Hole };
            if let Some(last) = extents.last_mut().filter(|last| last.kind == kind) {
                last.len_bytes += len_bytes;
            } else if extents.len() == max_extents {
                break;
            } else {
                extents.push(StatusExtent { len_bytes, kind });
            }
            at += len_bytes;
        }
        Ok(extents)
    }
}

/// Bytes that tell their offset and differ from block to block.
pub(crate) fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len)
        .map(|at| u8::try_from((at ^ (at >> 8) ^ (at >> 16).wrapping_mul(31)) & 0xff).unwrap() | 1)
        .collect()
}

/// A server on a socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) server: ServerHandle,
    pub(crate) socket: PathBuf,
    pub(crate) dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self::with_limits(device, Limits::default())
    }

    pub(crate) fn with_limits(device: Arc<dyn BlockDevice>, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let export = Export { name: "disk".to_owned(), description: "a disk in memory".to_owned(), device };
        let server = NbdServer::bind(&socket).unwrap().export(export).unwrap().limits(limits).spawn().unwrap();
        Self { server, socket, dir }
    }

    pub(crate) fn uri(&self) -> String {
        uri(&self.socket)
    }

    pub(crate) fn client(&self) -> RawClient {
        RawClient::connect(&self.socket)
    }

    /// Waits until every connection has ended.
    pub(crate) fn wait_until_empty(&self) {
        wait_until("connections to end", || self.server.connections() == 0);
    }
}

/// Polls for a condition that nothing signals.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// Runs a program that must be installed and must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> Output {
    let output = output_of(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a program that must be installed, under a time limit.
pub(crate) fn output_of(program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout").arg("60").arg(program).args(args).output().unwrap();
    assert_ne!(output.status.code(), Some(127), "{program} is needed by this test and not installed");
    output
}

/// An answer to a request, of either form.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) errno: u32,
    pub(crate) data: Vec<u8>,
    pub(crate) message: String,
    /// Chunk type, or `None` for a simple reply.
    pub(crate) chunk: Option<u16>,
}

/// A client that sends whatever a test wants.
pub(crate) struct RawClient {
    pub(crate) stream: UnixStream,
    next_cookie: u64,
}

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;
pub(crate) const FUA: u16 = 1;

impl RawClient {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream, next_cookie: 1 }
    }

    /// Reads the greeting and answers with `flags`.
    pub(crate) fn greet(&mut self, flags: u32) {
        let greeting: [u8; 18] = self.receive();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        self.send(&flags.to_be_bytes());
    }

    /// Enters transmission by EXPORT_NAME and returns the size and transmission flags.
    pub(crate) fn enter(&mut self) -> (u64, u16) {
        self.greet(3);
        self.send_option(1, b"disk");
        let reply: [u8; 10] = self.receive();
        let (size, flags) = reply.split_first_chunk::<8>().unwrap();
        (u64::from_be_bytes(*size), u16::from_be_bytes(flags.try_into().unwrap()))
    }

    /// Enters transmission with structured replies.
    pub(crate) fn enter_structured(&mut self) {
        self.greet(3);
        self.send_option(8, b"");
        assert_eq!(self.option_reply(8).0, 1);
        self.send_option(1, b"disk");
        let _size_and_flags: [u8; 10] = self.receive();
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server closes without sending anything more.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn send_option(&mut self, option: u32, data: &[u8]) {
        self.send(b"IHAVEOPT");
        self.send(&option.to_be_bytes());
        self.send(&u32::try_from(data.len()).unwrap().to_be_bytes());
        self.send(data);
    }

    /// The type and data of one reply to `option`.
    pub(crate) fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(u64::from_be_bytes(self.receive()), 0x0003_e889_0455_65a9);
        assert_eq!(u32::from_be_bytes(self.receive()), option);
        let kind = u32::from_be_bytes(self.receive());
        let len = u32::from_be_bytes(self.receive());
        (kind, self.receive_vec(len as usize))
    }

    pub(crate) fn receive_vec(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The bytes of a request; the cookie counts up from 1.
    pub(crate) fn request(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.next_cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        self.next_cookie += 1;
        bytes
    }

    /// Sends a request without payload and returns its cookie.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> u64 {
        let bytes = self.request(command, flags, offset, len);
        self.send(&bytes);
        self.next_cookie - 1
    }

    pub(crate) fn ask_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let bytes = self.request(WRITE, flags, offset, u32::try_from(data.len()).unwrap());
        self.send(&bytes);
        self.send(data);
        self.next_cookie - 1
    }

    /// Takes one answer, with `len` bytes of data when it is a simple one without error.
    pub(crate) fn answer(&mut self, len: usize) -> Answer {
        match u32::from_be_bytes(self.receive()) {
            0x6744_6698 => {
                let errno = u32::from_be_bytes(self.receive());
                let cookie = u64::from_be_bytes(self.receive());
                let data = if errno == 0 { self.receive_vec(len) } else { Vec::new() };
                Answer { cookie, errno, data, message: String::new(), chunk: None }
            }
            0x668e_33ef => self.chunk(),
            other => panic!("not a reply: {other:#x}"),
        }
    }

    fn chunk(&mut self) -> Answer {
        assert_eq!(u16::from_be_bytes(self.receive()), 1, "every reply is one chunk");
        let kind = u16::from_be_bytes(self.receive());
        let cookie = u64::from_be_bytes(self.receive());
        let len = u32::from_be_bytes(self.receive());
        let mut data = self.receive_vec(len as usize);
        let (mut errno, mut message) = (0, String::new());
        if kind & 0x8000 != 0 {
            errno = u32::from_be_bytes(*data.first_chunk().unwrap());
            message = String::from_utf8(data.split_off(6)).unwrap();
            data.clear();
        }
        Answer { cookie, errno, data, message, chunk: Some(kind) }
    }

    /// Sends a request without payload, and takes its answer's error value.
    pub(crate) fn errno_of(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        let cookie = self.ask(command, flags, offset, len);
        let data = if command == READ { len as usize } else { 0 };
        let answer = self.answer(data);
        assert_eq!(answer.cookie, cookie);
        answer.errno
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.ask_write(flags, offset, data);
        let answer = self.answer(0);
        assert_eq!(answer.cookie, cookie);
        answer.errno
    }
}
