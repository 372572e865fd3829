//! A small QMP client: QEMU's control protocol, one JSON document per line.
//!
//! ```text
//!  Qmp (cloneable) ──requests──► owner task ──► socket ──► QEMU
//!        ▲                          │  ▲                    │
//!        └──────── replies ─────────┘  └── replies, events ─┘
//!                                   └──── events ──► every subscriber
//! ```
//!
//! One task owns the socket and the table of open requests. Dropping an [`Qmp::execute`] future gives up the reply,
//! not the command: QEMU still carries it out. When the connection ends every open request fails with
//! [`QmpError::Disconnected`] and [`Qmp::closed`] returns; when the last [`Qmp`] is dropped the connection is closed.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::debug;

/// How long QEMU may take for a command unless the caller says otherwise. Its main loop can be held up for seconds
/// by a slow disk server.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of the longest line taken from QEMU; `query-qmp-schema`, the longest reply, has about 300 KiB.
const MAX_LINE_BYTES: u64 = 4 << 20;

/// Events a slow subscriber may fall behind by before it loses the oldest.
const EVENT_BACKLOG: usize = 256;

/// Between two attempts to connect to a QEMU that is starting.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Why a QMP command did not give a result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection came about in time.
    #[error("cannot connect to QMP at `{}`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why the last attempt failed.
        #[source]
        source: io::Error,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused `{command}`: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, `GenericError`, `CommandNotFound`, `DeviceNotFound`, …
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// No answer in time. The command may still be carried out.
    #[error("QEMU did not answer `{command}` within {} ms", limit.as_millis())]
    TimedOut {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The connection ended, normally because QEMU did.
    #[error("the QMP connection ended during `{command}`")]
    Disconnected {
        /// The command.
        command: String,
    },
    /// What came was not QMP.
    #[error("QEMU does not speak QMP: {0}")]
    Protocol(&'static str),
}

/// Something QEMU tells unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// QEMU's name, `SHUTDOWN`.
    pub name: String,
    /// The event in our words.
    pub kind: QmpEventKind,
    /// QEMU's data.
    pub data: Value,
}

/// The events that decide something here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QmpEventKind {
    /// The machine ends.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// `guest-shutdown`, `guest-panic`, `host-qmp-quit`, `host-signal`, …
        reason: String,
    },
    /// The machine restarts.
    Reset {
        /// Whether the guest did it.
        guest: bool,
        /// `guest-reset`, `host-qmp-system-reset`, …
        reason: String,
    },
    /// The power button was pressed; the guest may ignore it.
    Powerdown,
    /// The processors stand still.
    Stop,
    /// The processors run again.
    Resume,
    /// A disk request failed.
    BlockIoError {
        /// The block node, empty when QEMU does not say.
        node: String,
        /// `read` or `write`.
        operation: String,
        /// What QEMU did: `report`, `stop`, `ignore`.
        action: String,
        /// The system's reason.
        reason: String,
    },
    /// The guest's kernel reported a panic (needs a pvpanic device or `Hyper-V` crash registers).
    GuestPanicked,
    /// A device is gone and may be forgotten.
    DeviceDeleted {
        /// Its id, when it had one.
        device: Option<String>,
    },
    /// Any other.
    Other,
}

impl QmpEvent {
    fn from_message(message: &Value) -> Option<Self> {
        let name = message.get("event")?.as_str()?.to_owned();
        let data = message.get("data").cloned().unwrap_or(Value::Null);
        let kind = event_kind(&name, &data);
        Some(Self { name, kind, data })
    }
}

fn event_kind(name: &str, data: &Value) -> QmpEventKind {
    let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
    match name {
        "SHUTDOWN" => QmpEventKind::Shutdown { guest, reason: text("reason") },
        "RESET" => QmpEventKind::Reset { guest, reason: text("reason") },
        "POWERDOWN" => QmpEventKind::Powerdown,
        "STOP" => QmpEventKind::Stop,
        "RESUME" => QmpEventKind::Resume,
        "BLOCK_IO_ERROR" => QmpEventKind::BlockIoError {
            node: text("node-name"),
            operation: text("operation"),
            action: text("action"),
            reason: text("reason"),
        },
        "GUEST_PANICKED" => QmpEventKind::GuestPanicked,
        "DEVICE_DELETED" => {
            QmpEventKind::DeviceDeleted { device: data.get("device").and_then(Value::as_str).map(str::to_owned) }
        }
        _ => QmpEventKind::Other,
    }
}

/// What `query-status` says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RunStatus {
    /// Whether the processors run.
    pub running: bool,
    /// `running`, `paused`, `prelaunch`, `shutdown`, `io-error`, …
    pub status: String,
}

struct Request {
    id: u64,
    line: Vec<u8>,
    reply: oneshot::Sender<Result<Value, Refusal>>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// A connection to one QEMU. Clones share it.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Receiver<bool>,
    next_id: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects to the socket of a QEMU that may still be starting, within `limit`, and enters command mode. The
    /// receiver has every event from then on.
    ///
    /// # Errors
    /// [`QmpError::Connect`] when there is no listening socket in time, [`QmpError::TimedOut`] when it stays silent
    /// (QEMU serves one client at a time), [`QmpError::Protocol`] when it speaks something else.
    pub async fn connect(path: &Path, limit: Duration) -> Result<(Self, broadcast::Receiver<QmpEvent>), QmpError> {
        let deadline = Instant::now() + limit;
        let stream = connect_until(path, deadline).await?;
        let timed_out = |_| QmpError::TimedOut { command: "qmp_capabilities".into(), limit };
        tokio::time::timeout_at(deadline, Self::over(stream)).await.map_err(timed_out)?
    }

    /// Enters command mode on a connected socket.
    ///
    /// # Errors
    /// [`QmpError::Protocol`] or [`QmpError::Disconnected`] when the other end is not QEMU.
    pub async fn over(stream: UnixStream) -> Result<(Self, broadcast::Receiver<QmpEvent>), QmpError> {
        let (read, write) = stream.into_split();
        let mut lines = LineReader(BufReader::new(read));
        let greeting = lines.next().await.and_then(|line| parse(&line));
        let greeting = greeting.map_err(|_| QmpError::Protocol("there was no greeting"))?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Protocol("the greeting is not QMP's"));
        }
        let (requests, inbox) = mpsc::channel(32);
        let (events, receiver) = broadcast::channel(EVENT_BACKLOG);
        let (closing, closed) = watch::channel(false);
        let owner = Owner { write, inbox, events: events.clone(), open: HashMap::new() };
        tokio::spawn(async move {
            owner.run(lines).await;
            closing.send_replace(true);
        });
        let qmp = Self { requests, events, closed, next_id: std::sync::Arc::default() };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok((qmp, receiver))
    }

    /// Runs a command with [`COMMAND_TIMEOUT`]. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's words, [`QmpError::TimedOut`], [`QmpError::Disconnected`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT).await
    }

    /// Runs a command with a time limit of its own.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_within(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        match tokio::time::timeout(limit, self.exchange(command, arguments)).await {
            Ok(result) => result,
            Err(_) => Err(QmpError::TimedOut { command: command.to_owned(), limit }),
        }
    }

    async fn exchange(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let disconnected = || QmpError::Disconnected { command: command.to_owned() };
        let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let request = Request { id, line: request_line(id, command, arguments), reply };
        self.requests.send(request).await.map_err(|_| disconnected())?;
        let answer = answer.await.map_err(|_| disconnected())?;
        answer.map_err(|Refusal { class, desc }| QmpError::Refused { command: command.to_owned(), class, desc })
    }

    /// A new receiver of events, from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Whether the connection stands.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !*self.closed.borrow()
    }

    /// Returns when the connection has ended. Cancel safe.
    pub async fn closed(&self) {
        let mut closed = self.closed.clone();
        // An error means the task is gone, which is the same answer.
        let _ended = closed.wait_for(|closed| *closed).await;
    }

    /// Presses the power button. The guest may take its time or ignore it: wait for the shutdown event.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn system_powerdown(&self) -> Result<(), QmpError> {
        self.execute("system_powerdown", Value::Null).await.map(drop)
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.execute("system_reset", Value::Null).await.map(drop)
    }

    /// Ends QEMU; disks are flushed, the guest is not asked. That the connection ends counts as success.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null).await {
            Ok(_) | Err(QmpError::Disconnected { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Halts the processors.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).await.map(drop)
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).await.map(drop)
    }

    /// Asks whether the processors run.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`QmpError::Protocol`] when the answer is not a status.
    pub async fn query_status(&self) -> Result<RunStatus, QmpError> {
        let status = self.execute("query-status", Value::Null).await?;
        serde_json::from_value(status).map_err(|_| QmpError::Protocol("the status has another form"))
    }
}

fn request_line(id: u64, command: &str, arguments: Value) -> Vec<u8> {
    let mut request = json!({ "execute": command, "id": id });
    if let (Value::Object(fields), false) = (&mut request, arguments.is_null()) {
        fields.insert("arguments".into(), arguments);
    }
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

async fn connect_until(path: &Path, deadline: Instant) -> Result<UnixStream, QmpError> {
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let starting = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if !starting || Instant::now() + CONNECT_PAUSE >= deadline {
            return Err(QmpError::Connect { path: path.to_owned(), source: error });
        }
        tokio::time::sleep(CONNECT_PAUSE).await;
    }
}

fn parse(line: &[u8]) -> io::Result<Value> {
    serde_json::from_slice(line).map_err(io::Error::from)
}

struct LineReader(BufReader<OwnedReadHalf>);

impl LineReader {
    /// The next line. An end, an error and a line without end are all the end of the connection.
    async fn next(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
        if line.last() == Some(&b'\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

struct Owner {
    write: OwnedWriteHalf,
    inbox: mpsc::Receiver<Request>,
    events: broadcast::Sender<QmpEvent>,
    open: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>,
}

impl Owner {
    /// Serves until either side is gone. Reading has a task of its own because a half-read line must not be lost
    /// when a request comes in between.
    async fn run(mut self, mut lines: LineReader) {
        let (sender, mut messages) = mpsc::channel(32);
        let reader = tokio::spawn(async move {
            while let Ok(message) = lines.next().await.and_then(|line| parse(&line)) {
                if sender.send(message).await.is_err() {
                    break;
                }
            }
        });
        loop {
            let step = tokio::select! {
                message = messages.recv() => message.map(Step::Message),
                request = self.inbox.recv() => request.map(Step::Request),
            };
            let goes_on = match step {
                Some(Step::Message(message)) => self.take_message(&message),
                Some(Step::Request(request)) => self.send(request).await,
                None => false,
            };
            if !goes_on {
                break;
            }
        }
        reader.abort();
        debug!(open_requests = self.open.len(), "qmp connection ended");
    }

    async fn send(&mut self, request: Request) -> bool {
        self.open.retain(|_, reply| !reply.is_closed());
        self.open.insert(request.id, request.reply);
        self.write.write_all(&request.line).await.is_ok()
    }

    fn take_message(&mut self, message: &Value) -> bool {
        if let Some(event) = QmpEvent::from_message(message) {
            // No subscriber is fine.
            let _receivers = self.events.send(event);
        } else if let Some(reply) = message.get("id").and_then(Value::as_u64).and_then(|id| self.open.remove(&id)) {
            // The asker may have given up.
            let _unheard = reply.send(reply_value(message));
        } else {
            // Its asker gave up, or QEMU could not read the id.
            debug!("qmp message that belongs to no open request");
        }
        true
    }
}

enum Step {
    Message(Value),
    Request(Request),
}

fn reply_value(message: &Value) -> Result<Value, Refusal> {
    match message.get("error") {
        None => Ok(message.get("return").cloned().unwrap_or(Value::Null)),
        Some(error) => Err(Refusal::deserialize(error)
            .unwrap_or_else(|_| Refusal { class: "Unknown".into(), desc: "the error has another form".into() })),
    }
}
