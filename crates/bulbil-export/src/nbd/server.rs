//! Accepting connections, and the handle to what runs.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulbil_volume::BlockDevice;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use tracing::{debug, error, info, warn};

use super::connection::Connection;
use super::negotiation::{AdvertisedExport, Negotiation};
use super::socket::SocketFile;
use super::stats::{Counters, Stats};
use super::wire::MAX_STRING_BYTES;
use super::workers::WorkerPool;
use super::{ServeError, handshake, lock, receiver, socket};

/// How long accepting pauses when the process has no file descriptor or memory for a connection.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A device under a name.
#[derive(Clone)]
pub struct Export {
    /// The name clients choose, at most 4096 bytes. The empty name is the default export; when no
    /// export has it, the first one is the default as well.
    pub name: String,
    /// A text for people, at most 4096 bytes; may be empty.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn BlockDevice>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("description", &self.description)
            .finish_non_exhaustive()
    }
}

impl Export {
    fn check(&self) -> Result<(), ServeError> {
        for (what, text) in [("name", &self.name), ("description", &self.description)] {
            if text.len() > MAX_STRING_BYTES {
                return Err(ServeError::TextTooLong { what, len_bytes: text.len(), limit_bytes: MAX_STRING_BYTES });
            }
        }
        Ok(())
    }

    fn advertised(&self) -> AdvertisedExport {
        AdvertisedExport {
            name: self.name.clone(),
            description: self.description.clone(),
            size_bytes: self.device.size_bytes(),
            read_only: self.device.is_read_only(),
        }
    }
}

/// Bounds on what clients can make a server hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time, handshakes included; further ones are closed at once.
    pub connections: usize,
    /// Bytes of data in requests that a connection may have with workers.
    pub in_flight_bytes: usize,
    /// Worker threads of the server.
    pub workers: usize,
    /// Time from accepting a connection to the end of its handshake.
    pub handshake: Duration,
    /// Time that connections have to finish when they are ended; then their sockets are closed.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            in_flight_bytes: 64 << 20,
            workers: 16,
            handshake: Duration::from_secs(10),
            grace: Duration::from_secs(10),
        }
    }
}

/// An NBD server that does not run yet.
#[derive(Debug)]
pub struct NbdServer {
    listener: UnixListener,
    socket_file: Option<SocketFile>,
    exports: Vec<Export>,
    limits: Limits,
}

impl NbdServer {
    /// Listens on a new unix socket at `path`, with mode 0600.
    ///
    /// A socket file on which nothing listens any more is replaced. The file is removed when the
    /// server ends or this value is dropped.
    ///
    /// # Errors
    /// [`ServeError::PathTooLong`] over 107 bytes, [`ServeError::InUse`] when another server
    /// answers there, [`ServeError::NotASocket`] when something else stands there,
    /// [`ServeError::Bind`] otherwise.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ServeError> {
        let (listener, socket_file) = socket::listen(path.as_ref())?;
        Ok(Self { socket_file: Some(socket_file), ..Self::from_listener(listener) })
    }

    /// Serves on a socket that already listens; its file, if any, stays the caller's.
    #[must_use]
    pub fn from_listener(listener: UnixListener) -> Self {
        Self { listener, socket_file: None, exports: Vec::new(), limits: Limits::default() }
    }

    /// Adds an export.
    ///
    /// # Errors
    /// [`ServeError::TextTooLong`] and [`ServeError::DuplicateExport`].
    pub fn export(mut self, export: Export) -> Result<Self, ServeError> {
        export.check()?;
        if self.exports.iter().any(|other| other.name == export.name) {
            return Err(ServeError::DuplicateExport { name: export.name });
        }
        self.exports.push(export);
        Ok(self)
    }

    /// Replaces the default limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Serves on threads of its own until the handle is shut down or dropped.
    ///
    /// # Errors
    /// [`ServeError::Start`] when the host gives no thread or file descriptor.
    pub fn spawn(self) -> Result<ServerHandle, ServeError> {
        let start = |source: io::Error| ServeError::Start { source };
        self.listener.set_nonblocking(true).map_err(start)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| start(error.into()))?;
        let server = Arc::new(Server {
            exports: Mutex::new(self.exports),
            limits: self.limits,
            counters: Arc::default(),
            workers: Arc::new(WorkerPool::new(self.limits.workers.max(1))),
            clients: Mutex::default(),
            client_ended: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake,
        });
        let (accepting, listener, socket_file) = (Arc::clone(&server), self.listener, self.socket_file);
        let acceptor = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accepting.accept_until_stopped(&listener, socket_file))
            .map_err(start)?;
        Ok(ServerHandle { server, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Serves for as long as connections can be accepted, which is normally for ever.
    ///
    /// # Errors
    /// As for [`spawn`](Self::spawn).
    pub fn run(self) -> Result<(), ServeError> {
        self.spawn()?.wait();
        Ok(())
    }
}

/// A running server. Dropping it shuts the server down.
#[derive(Debug)]
pub struct ServerHandle {
    server: Arc<Server>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl ServerHandle {
    /// Ends the server: accepts no further connection, removes the socket file, lets connections
    /// answer what they have received and closes them.
    ///
    /// Connections that are not done after [`Limits::grace`] lose their sockets; a request that a
    /// device still works on then stays unanswered, as if the server had been killed. Returns
    /// when every connection has ended, or after twice the grace time. May be called again.
    pub fn shutdown(&self) {
        self.server.stopping.store(true, Ordering::SeqCst);
        self.server.wake_acceptor();
        self.wait();
        self.server.end_clients(|_export| true);
        self.server.workers.close();
    }

    /// Waits until the server accepts no connections any more: until a shutdown elsewhere begins,
    /// or the listening socket fails.
    pub fn wait(&self) {
        // Held while joining: everyone who waits does so until the thread has ended.
        let mut acceptor = lock(&self.acceptor);
        if let Some(acceptor) = acceptor.take()
            && acceptor.join().is_err()
        {
            error!("the accepting thread panicked");
        }
    }

    /// Serves `device` under an existing export's name from now on and ends the export's
    /// connections as a shutdown does, so that clients connect again and see the new device: this
    /// is how a disk changes its size (QEMU reconnects by itself with `reconnect-delay`).
    ///
    /// When this returns the old device gets no requests any more, unless one outlasted
    /// [`Limits::grace`] twice.
    ///
    /// # Errors
    /// [`ServeError::UnknownExport`].
    pub fn replace_device(&self, name: &str, device: Arc<dyn BlockDevice>) -> Result<(), ServeError> {
        let mut exports = lock(&self.server.exports);
        let Some(export) = exports.iter_mut().find(|export| export.name == name) else {
            return Err(ServeError::UnknownExport { name: name.to_owned() });
        };
        export.device = device;
        drop(exports);
        // A handshake may have seen the old device, so those end too.
        self.server.end_clients(|export| export.is_none_or(|chosen| chosen == name));
        Ok(())
    }

    /// The number of open connections, handshakes included.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.server.clients).open.len()
    }

    /// What the server has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.server.counters.snapshot()
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.shutdown();
    }
}

struct Server {
    exports: Mutex<Vec<Export>>,
    limits: Limits,
    counters: Arc<Counters>,
    workers: Arc<WorkerPool>,
    clients: Mutex<Clients>,
    client_ended: Condvar,
    stopping: AtomicBool,
    wake: OwnedFd,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("limits", &self.limits).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Clients {
    next_id: u64,
    open: HashMap<u64, Client>,
}

/// An open connection as the server sees it.
struct Client {
    stream: Arc<UnixStream>,
    /// The export's name once one was chosen.
    export: Option<String>,
}

impl Server {
    fn accept_until_stopped(self: &Arc<Self>, listener: &UnixListener, socket_file: Option<SocketFile>) {
        while !self.stopping.load(Ordering::SeqCst) {
            match listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_for_client(listener),
                Err(error) if is_passing(&error) => {
                    warn!(%error, "cannot accept a connection now");
                    self.pause();
                }
                Err(error) => {
                    error!(%error, "cannot accept connections any more");
                    break;
                }
            }
        }
        // Before connections end, so that nobody finds a socket file without a server.
        drop(socket_file);
    }

    fn wait_for_client(&self, listener: &UnixListener) {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        // A failed or interrupted wait only means to look again.
        let _ = rustix::event::poll(&mut fds, None);
    }

    fn pause(&self) {
        let _ = rustix::event::poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&ACCEPT_PAUSE));
    }

    fn wake_acceptor(&self) {
        // It can only fail when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &[1; 8]);
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) {
        Counters::count(&self.counters.connections);
        let Some(registration) = self.register(stream) else { return };
        let spawned = std::thread::Builder::new().name("nbd-client".to_owned()).spawn(move || registration.serve());
        if let Err(error) = spawned {
            warn!(%error, "no thread for a new connection");
        }
    }

    fn register(self: &Arc<Self>, stream: UnixStream) -> Option<Registration> {
        let stream = Arc::new(stream);
        let mut clients = lock(&self.clients);
        if clients.open.len() >= self.limits.connections {
            warn!(limit = self.limits.connections, "too many connections, closed a new one");
            return None;
        }
        let id = clients.next_id;
        clients.next_id += 1;
        clients.open.insert(id, Client { stream: Arc::clone(&stream), export: None });
        Some(Registration { server: Arc::clone(self), id, stream })
    }

    /// Ends the connections whose export (`None` during a handshake) satisfies `which`, and waits
    /// for them.
    fn end_clients(&self, which: impl Fn(Option<&str>) -> bool) {
        // Reading ends after what was received: requests already sent are still answered.
        let ending = self.shut_clients(Shutdown::Read, |client| which(client.export.as_deref()));
        if self.wait_for_end(&ending) {
            return;
        }
        warn!("connections did not end in time, closing their sockets");
        let ending = self.shut_clients(Shutdown::Both, |client| which(client.export.as_deref()));
        if !self.wait_for_end(&ending) {
            error!("a device did not finish a request, leaving its connection behind");
        }
    }

    fn shut_clients(&self, how: Shutdown, which: impl Fn(&Client) -> bool) -> Vec<u64> {
        let clients = lock(&self.clients);
        let chosen = clients.open.iter().filter(|(_, client)| which(client));
        chosen
            .map(|(id, client)| {
                // The client may have closed already.
                drop(client.stream.shutdown(how));
                *id
            })
            .collect()
    }

    fn wait_for_end(&self, ending: &[u64]) -> bool {
        let is_open = |clients: &mut Clients| ending.iter().any(|id| clients.open.contains_key(id));
        let (_clients, waited) = self
            .client_ended
            .wait_timeout_while(lock(&self.clients), self.limits.grace, is_open)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }
}

/// Errors of accept(2) after which a later call may succeed.
fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let passing = [Errno::INTR, Errno::CONNABORTED, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|raw| passing.contains(&Errno::from_raw_os_error(raw)))
}

/// A connection's place in [`Clients`], given up when its thread ends in whatever way.
struct Registration {
    server: Arc<Server>,
    id: u64,
    stream: Arc<UnixStream>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        drop(self.stream.shutdown(Shutdown::Both));
        lock(&self.server.clients).open.remove(&self.id);
        self.server.client_ended.notify_all();
    }
}

impl Registration {
    fn serve(self) {
        let _span = tracing::info_span!("nbd", connection = self.id, export = tracing::field::Empty).entered();
        let started = Instant::now();
        match self.negotiate() {
            Ok(Some(connection)) => {
                debug!(elapsed_us = started.elapsed().as_micros(), "client entered transmission");
                receiver::serve(connection, Arc::clone(&self.server.workers));
            }
            Ok(None) => debug!("client left during the handshake"),
            Err(error) => info!(%error, "handshake failed"),
        }
    }

    fn negotiate(&self) -> io::Result<Option<Arc<Connection>>> {
        // Accepted sockets do not inherit the listener's non-blocking mode on Linux; other
        // systems differ.
        self.stream.set_nonblocking(false)?;
        let exports = lock(&self.server.exports).clone();
        let negotiation = Negotiation::new(exports.iter().map(Export::advertised).collect());
        let limits = &self.server.limits;
        let Some((index, session)) = handshake::negotiate(&self.stream, negotiation, limits.handshake)? else {
            return Ok(None);
        };
        let Export { name, device, .. } = exports.into_iter().nth(index).ok_or(io::ErrorKind::InvalidInput)?;
        tracing::Span::current().record("export", &name);
        if let Some(client) = lock(&self.server.clients).open.get_mut(&self.id) {
            client.export = Some(name);
        }
        let (stream, counters) = (Arc::clone(&self.stream), Arc::clone(&self.server.counters));
        let connection = Connection::new(stream, session, device, counters, limits.in_flight_bytes)?;
        Ok(Some(Arc::new(connection)))
    }
}
