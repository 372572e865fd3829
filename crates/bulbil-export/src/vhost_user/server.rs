//! Accepting frontends, and the handle to what runs.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bulbil_volume::BlockDevice;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;
use tracing::{debug, error, info, warn};

use super::execute::ID_BYTES;
use super::queue::Job;
use super::session::Session;
use super::stats::{Counters, Stats};
use super::workers::WorkerPool;
use super::{ServeError, lock, wire};
use crate::nbd::socket::{self, SocketFile};

/// How long accepting pauses when the process has no file descriptor or memory for a connection.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The most queues of a device.
pub const MAX_QUEUES: u16 = 16;

/// How a device is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What the guest reads as the disk's serial; bytes after the twentieth are cut off.
    pub serial: String,
    /// Queues, 1 to [`MAX_QUEUES`], each with a thread of its own. The machine must be given as many (`num-queues`).
    pub queues: u16,
    /// Worker threads for requests that may wait.
    pub workers: usize,
    /// The longest time a queue looks for more requests before it sleeps. Zero switches it off.
    pub max_polling: Duration,
    /// Time that requests have to finish at a shutdown; then the connection is left behind.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            serial: String::new(),
            queues: 1,
            workers: 16,
            max_polling: Duration::ZERO,
            grace: Duration::from_secs(10),
        }
    }
}

/// What all connections of a server share.
pub(super) struct Backend {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) options: Options,
    pub(super) id: [u8; ID_BYTES],
    pub(super) workers: Arc<WorkerPool<Job>>,
    pub(super) counters: Arc<Counters>,
    /// The frontend's socket for messages in the other direction.
    pub(super) channel: Mutex<Option<OwnedFd>>,
}

/// A vhost-user-blk server that does not run yet.
pub struct VhostUserServer {
    listener: UnixListener,
    socket_file: SocketFile,
    device: Arc<dyn BlockDevice>,
    options: Options,
}

impl fmt::Debug for VhostUserServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserServer").field("options", &self.options).finish_non_exhaustive()
    }
}

impl VhostUserServer {
    /// Listens on a new unix socket at `path`, with mode 0600.
    ///
    /// A socket file on which nothing listens any more is replaced. The file is removed when the server ends or this
    /// value is dropped.
    ///
    /// # Errors
    /// [`ServeError::PathTooLong`] over 107 bytes, [`ServeError::InUse`] when another server answers there,
    /// [`ServeError::NotASocket`] when something else stands there, [`ServeError::Bind`] otherwise.
    pub fn bind(path: impl AsRef<Path>, device: Arc<dyn BlockDevice>, options: Options) -> Result<Self, ServeError> {
        let (listener, socket_file) = socket::listen(path.as_ref())?;
        let options = Options { queues: options.queues.clamp(1, MAX_QUEUES), ..options };
        Ok(Self { listener, socket_file, device, options })
    }

    /// Serves on threads of its own until the handle is shut down or dropped.
    ///
    /// # Errors
    /// [`ServeError::Start`] when the host gives no thread or file descriptor.
    pub fn spawn(self) -> Result<VhostUserHandle, ServeError> {
        let start = |source: io::Error| ServeError::Start { source };
        self.listener.set_nonblocking(true).map_err(start)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| start(error.into()))?;
        let server = Arc::new(Server {
            backend: Arc::new(Backend {
                device: self.device,
                id: id_of(&self.options.serial),
                workers: WorkerPool::new(self.options.workers),
                counters: Arc::default(),
                channel: Mutex::new(None),
                options: self.options,
            }),
            wake,
            is_stopping: AtomicBool::new(false),
            state: Mutex::default(),
            ended: Condvar::new(),
        });
        let (serving, listener, socket_file) = (Arc::clone(&server), self.listener, self.socket_file);
        let thread = std::thread::Builder::new().name("vhost-control".to_owned());
        thread.spawn(move || serving.serve_until_stopped(&listener, socket_file)).map_err(start)?;
        Ok(VhostUserHandle { server })
    }
}

fn id_of(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (place, byte) in id.iter_mut().zip(serial.bytes()) {
        *place = byte;
    }
    id
}

/// A running server. Dropping it shuts the server down.
pub struct VhostUserHandle {
    server: Arc<Server>,
}

impl fmt::Debug for VhostUserHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserHandle").field("options", &self.server.backend.options).finish_non_exhaustive()
    }
}

impl VhostUserHandle {
    /// Ends the server: accepts no further connection, removes the socket file, answers the requests that were taken
    /// and closes the connection.
    ///
    /// Requests that were not taken stay in the guest's queues, and a server that is started later goes on with them.
    /// When a device does not finish a request within [`Options::grace`] the connection is left behind, as if the
    /// server had been killed. May be called again.
    pub fn shutdown(&self) {
        self.server.is_stopping.store(true, Ordering::SeqCst);
        // It can only fail when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.server.wake, &1_u64.to_le_bytes());
        if let Some(stream) = &lock(&self.server.state).stream {
            // The frontend may have closed already.
            drop(stream.shutdown(Shutdown::Both));
        }
        let state = lock(&self.server.state);
        let waited = self.server.ended.wait_timeout_while(state, self.server.backend.options.grace, |s| !s.has_ended);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            error!("a device did not finish a request, leaving its connection behind");
        }
        self.server.backend.workers.close();
    }

    /// Tells a connected frontend that the device's size may have changed: it reads the size anew, and so does the
    /// guest. A frontend that connects later reads it anyway. Returns whether somebody was told.
    #[must_use]
    pub fn notify_resize(&self) -> bool {
        let channel = lock(&self.server.backend.channel);
        let Some(channel) = &*channel else { return false };
        // A frontend that does not empty its socket is told by an earlier message that is in there still.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::send(channel, &wire::CONFIG_CHANGE, flags);
        if let Err(error) = sent {
            warn!(%error, "cannot tell the frontend about a new size");
        }
        sent.is_ok()
    }

    /// Whether a frontend is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        lock(&self.server.state).stream.is_some()
    }

    /// What the server has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.server.backend.counters.snapshot()
    }
}

impl Drop for VhostUserHandle {
    fn drop(&mut self) {
        self.shutdown();
    }
}

struct Server {
    backend: Arc<Backend>,
    wake: OwnedFd,
    is_stopping: AtomicBool,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// The connection that is being served.
    stream: Option<Arc<UnixStream>>,
    has_ended: bool,
}

/// Marks a server as ended, in whatever way its thread ends.
struct Ending<'a>(&'a Server);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).has_ended = true;
        self.0.ended.notify_all();
    }
}

impl Server {
    fn serve_until_stopped(&self, listener: &UnixListener, socket_file: SocketFile) {
        let _ending = Ending(self);
        // Dropped before the end is told, so that nobody finds a socket file without a server.
        let _socket_file = socket_file;
        while !self.is_stopping.load(Ordering::SeqCst) {
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
                    // A failed or interrupted wait only means to look again.
                    let _ = poll(&mut fds, None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!(%error, "cannot accept a connection now");
                    let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&ACCEPT_PAUSE));
                }
            }
        }
    }

    /// Serves one connection; others wait in the socket's backlog.
    fn serve(&self, stream: UnixStream) {
        let _span = tracing::info_span!("vhost-user").entered();
        Counters::count(&self.backend.counters.connections);
        if let Err(error) = stream.set_nonblocking(false) {
            warn!(%error, "cannot serve a connection");
            return;
        }
        let stream = Arc::new(stream);
        lock(&self.state).stream = Some(Arc::clone(&stream));
        // A shutdown that came before the connection was known has not closed it.
        if !self.is_stopping.load(Ordering::SeqCst) {
            match Session::new(Arc::clone(&self.backend), Arc::clone(&stream)).serve() {
                Ok(()) => debug!("frontend disconnected"),
                Err(error) => {
                    let source = std::error::Error::source(&error);
                    info!(%error, source, "connection ended");
                }
            }
        }
        drop(stream.shutdown(Shutdown::Both));
        lock(&self.state).stream = None;
    }
}
