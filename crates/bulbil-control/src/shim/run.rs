//! The shim's life: open, start, watch, end.

use std::io;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_types::InstanceId;
use bulbil_vm::boot::{BootInput, CloudInitPresence, Expectations};
use bulbil_vm::{BootPhase, BootProgress, BootVerdict, CloudInitReport, QemuProcess, Qmp, QmpSeen, exit_reason};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::machine::{self, ServedDisk};
use super::ssh::{self, Look, SshTarget};
use super::volume_requests::OpenDisk;
use super::{ShimRequest, network};
use crate::control::now;
use crate::data_dir::{DataDir, InstanceDir, replace_file};
use crate::error::{ControlError, ErrorCode};
use crate::keys;
use crate::model::{InstanceRecord, InstanceState, RunState, SshAccess};

/// How often the console's log is looked at.
const CONSOLE_TICK: Duration = Duration::from_millis(100);

/// How long QEMU may take until it answers on QMP.
const QMP_START: Duration = Duration::from_secs(30);

/// How long a boot may take until a verdict is given all the same: emulated guests are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(15 * 60);

/// How long SSH may refuse every login after cloud-init finished before that is the verdict.
const LOGIN_LIMIT: Duration = Duration::from_secs(60);

/// The power button is pressed again this often: a guest that is still booting misses the first.
const BUTTON_AGAIN: Duration = Duration::from_secs(5);

/// How long the shim of an earlier run may take to end.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// How long a guest may take to power off when the shim itself is told to end.
const TERMINATE_GRACE: Duration = Duration::from_secs(60);

/// How long QEMU may take to answer `quit`, and then to be gone, before it is killed.
const QUIT_LIMIT: Duration = Duration::from_secs(5);

/// How long a pressed power button may take to be acknowledged by QEMU.
const BUTTON_LIMIT: Duration = Duration::from_secs(2);

/// How long a guest whose console tells nothing is given before users are guessed.
const GUESS_AFTER: Duration = Duration::from_secs(5);

/// How long to leave a server alone that has refused every user: it may count failed logins.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// The longest line a client of the shim may send.
const MAX_REQUEST_BYTES: u64 = 4096;

/// Runs the shim of an instance until its machine has ended.
///
/// # Errors
/// When the machine could not be started; `state.json` says so as well.
pub fn run_shim(data_root: &Path, id: &InstanceId, program: PathBuf) -> Result<(), ControlError> {
    // Apart from the daemon's terminal and signals; already a leader is as good.
    let _already_leader = rustix::process::setsid().is_err();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_file_limit();
    let data = DataDir::open(data_root)?;
    let directory = data.instance(id);
    // First of all, so that the sockets and the state of another shim are left alone.
    let _lock = lock_instance(&directory)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| ControlError::io("cannot start the shim's runtime", &e))?;
    let ended = runtime.block_on(live(&data, &directory, program));
    if let Err(error) = &ended {
        let reason = std::iter::once(error.to_string()).chain(error.causes().iter().cloned());
        let state = RunState::stopped(reason.collect::<Vec<_>>().join(": "), now());
        save_state(&directory, &state);
    }
    ended
}

/// Takes the instance for this shim; one that is about to end is waited for.
fn lock_instance(directory: &InstanceDir) -> Result<std::fs::File, ControlError> {
    let path = directory.file("shim.lock");
    let fail = |e: io::Error| ControlError::io(format!("cannot lock `{}`", path.display()), &e);
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(fail)?;
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(ControlError::new(ErrorCode::InUse, "another process supervises this instance"));
            }
            Err(errno) => return Err(fail(errno.into())),
        }
    }
    // What the last run left must not be taken for this one's.
    match std::fs::remove_file(directory.file("state.json")) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail(e)),
        _ => Ok(file),
    }
}

/// Each pack of an image is a file of the base cache.
pub(crate) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn save_state(directory: &InstanceDir, state: &RunState) {
    let document = serde_json::to_vec_pretty(state).expect("states are plain data");
    if let Err(error) = replace_file(&directory.file("state.json"), &document) {
        tracing::error!(%error, "cannot write state.json");
    }
}

async fn live(data: &DataDir, directory: &InstanceDir, program: PathBuf) -> Result<(), ControlError> {
    let started_at = Instant::now();
    let record = read_record(directory)?;
    let listener = listen(&directory.socket("shim"))?;
    let (states, _) = watch::channel(RunState { shim_pid: Some(std::process::id()), ..RunState::pending(now()) });
    let (request_sender, requests) = mpsc::channel(16);
    let open_disk = Arc::new(OpenDisk::default());
    tokio::spawn(serve_clients(listener, states.subscribe(), request_sender, Arc::clone(&open_disk)));

    let mut disk = ServedDisk::open(data, &record)?;
    let user_data = match std::fs::read(directory.file("user-data")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.map_err(|e| ControlError::io("cannot read the user data", &e))?),
    };
    let view = network::metadata_view(&record, user_data)?;
    let mut link = network::make_link(&record, view.clone())?;
    let handle = link.handle();
    let wire = listen(&directory.socket("net"))?;
    tokio::spawn(async move {
        let Err(error) = link.serve(wire).await;
        tracing::error!(%error, "the network link ended");
    });
    let ssh_port = network::open_ports(&record, &handle).await?;
    let target =
        SshTarget { port: ssh_port, identity: keys::own_private_key(data), known_hosts: directory.file("known_hosts") };
    let machine = machine::start(&program, directory, &record, &view, &mut disk).await?;
    disk.open_to(data, &open_disk);
    let ssh = SshAccess {
        address: "127.0.0.1".to_owned(),
        port: ssh_port,
        user: None,
        identity_file: target.identity.display().to_string(),
        known_hosts_file: target.known_hosts.display().to_string(),
    };
    states.send_modify(|state| {
        state.vm_pid = Some(machine.process.pid());
        state.accelerator = Some(machine.accelerator.to_string());
        state.ssh = Some(ssh);
    });
    let expect = Expectations { cloud_init: CloudInitPresence::Unknown, ssh: true, status_report: true };
    let mut watcher = Watcher {
        directory,
        target,
        states,
        requests,
        open_disk,
        started_at,
        progress: BootProgress::new(expect),
        console: ConsoleTail::new(directory.file("serial.log")),
        seen: QmpSeen::default(),
    };
    watcher.apply(BootInput::VolumeReady);
    watcher.apply(BootInput::ProcessStarted);
    let reason = watcher.watch(&machine.process).await;
    let closed = disk.close();
    watcher.end(reason, closed.err());
    Ok(())
}

fn read_record(directory: &InstanceDir) -> Result<InstanceRecord, ControlError> {
    let path = directory.file("instance.json");
    let bytes = std::fs::read(&path).map_err(|e| ControlError::io(format!("cannot read `{}`", path.display()), &e))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| ControlError::with_source(ErrorCode::Failed, format!("cannot read `{}`", path.display()), &e))
}

/// Listens on a socket of the instance; the file of an earlier run is replaced.
fn listen(path: &Path) -> Result<UnixListener, ControlError> {
    let fail = |e: io::Error| ControlError::io(format!("cannot listen on `{}`", path.display()), &e);
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    UnixListener::bind(path).map_err(fail)
}

async fn serve_clients(
    listener: UnixListener,
    states: watch::Receiver<RunState>,
    requests: mpsc::Sender<ShimRequest>,
    open_disk: Arc<OpenDisk>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_client(stream, states.clone(), requests.clone(), Arc::clone(&open_disk)));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_client(
    stream: UnixStream,
    states: watch::Receiver<RunState>,
    requests: mpsc::Sender<ShimRequest>,
    open_disk: Arc<OpenDisk>,
) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    if BufReader::new(reader.take(MAX_REQUEST_BYTES)).read_line(&mut line).await.is_err() {
        return;
    }
    match serde_json::from_str(&line) {
        Ok(ShimRequest::Watch) => {
            // A client that is gone ends this; there is nobody to tell.
            drop(tell_states(writer, states).await);
        }
        Ok(request @ ShimRequest::Stop { .. }) => drop(requests.send(request).await),
        Ok(request) => {
            if let Some(line) = open_disk.answer(&request).await {
                // Who asked may be gone; the volume is as it was asked for all the same.
                drop(writer.write_all(&line).await);
            }
        }
        Err(error) => tracing::warn!(%error, "a client sent no request"),
    }
}

async fn tell_states(
    mut writer: tokio::net::unix::OwnedWriteHalf,
    mut states: watch::Receiver<RunState>,
) -> io::Result<()> {
    loop {
        let mut line = serde_json::to_vec(&*states.borrow_and_update()).map_err(io::Error::other)?;
        line.push(b'\n');
        writer.write_all(&line).await?;
        if states.changed().await.is_err() {
            return Ok(());
        }
    }
}

/// Reads what is added to the console's log.
struct ConsoleTail {
    path: PathBuf,
    offset: u64,
}

impl ConsoleTail {
    /// Starts at the end of what earlier runs have written.
    fn new(path: PathBuf) -> Self {
        let offset = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        Self { path, offset }
    }

    fn read_new(&mut self) -> io::Result<Vec<u8>> {
        let mut file = match std::fs::File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(1 << 20).read_to_end(&mut bytes)?;
        self.offset += bytes.len() as u64;
        Ok(bytes)
    }
}

/// What the tasks beside the watcher found.
enum Found {
    Banner(String),
    Look(Look),
}

struct Watcher<'a> {
    directory: &'a InstanceDir,
    target: SshTarget,
    states: watch::Sender<RunState>,
    requests: mpsc::Receiver<ShimRequest>,
    open_disk: Arc<OpenDisk>,
    started_at: Instant,
    progress: BootProgress,
    console: ConsoleTail,
    seen: QmpSeen,
}

/// A stop that was asked for.
struct Stopping {
    switch_off_at: tokio::time::Instant,
    /// When it is killed, once it was switched off.
    kill_at: Option<tokio::time::Instant>,
    press_again_at: tokio::time::Instant,
}

impl Watcher<'_> {
    /// Watches the machine until it is gone, and returns why.
    async fn watch(&mut self, process: &QemuProcess) -> String {
        let socket = self.directory.socket("qmp");
        let qmp = tokio::select! {
            connected = Qmp::connect(&socket, QMP_START) => connected,
            ended = process.wait() => return exit_reason(ended.status, &self.seen, &ended.stderr_tail).to_string(),
        };
        let (qmp, mut events) = match qmp {
            Ok(connected) => connected,
            Err(error) => {
                process.kill();
                return format!("the virtual machine does not answer: {error}");
            }
        };
        self.seen.connected = true;
        self.open_disk.set_qmp(qmp.clone());
        self.set_state(InstanceState::Running);
        let (found_sender, mut found) = mpsc::channel(4);
        let looking = tokio::spawn(look_into_guest(self.target.clone(), self.states.subscribe(), found_sender));
        let mut tick = tokio::time::interval(CONSOLE_TICK);
        let mut stopping: Option<Stopping> = None;
        let mut terminate = match signal(SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(error) => {
                process.kill();
                return format!("its supervising process cannot wait for signals: {error}");
            }
        };
        let boot_limit = tokio::time::sleep(BOOT_LIMIT);
        tokio::pin!(boot_limit);
        let ended = loop {
            tokio::select! {
                ended = process.wait() => break ended,
                Ok(event) = events.recv() => self.seen.observe(&event),
                _ = tick.tick() => {
                    self.read_console();
                    if let Some(stopping) = &mut stopping {
                        press_on(stopping, &qmp, process).await;
                    }
                }
                Some(request) = self.requests.recv() => if let ShimRequest::Stop { grace_ms } = request {
                    let now = tokio::time::Instant::now();
                    let switch_off_at = now + Duration::from_millis(grace_ms);
                    stopping = Some(Stopping { switch_off_at, kill_at: None, press_again_at: now });
                    self.set_state(InstanceState::Stopping);
                },
                _ = terminate.recv() => {
                    let now = tokio::time::Instant::now();
                    // A second signal means at once.
                    let grace = if stopping.is_some() { Duration::ZERO } else { TERMINATE_GRACE };
                    stopping = Some(Stopping { switch_off_at: now + grace, kill_at: None, press_again_at: now });
                    self.set_state(InstanceState::Stopping);
                },
                Some(found) = found.recv() => self.take_found(found),
                () = &mut boot_limit, if self.progress.verdict().is_none() => self.apply(BootInput::Timeout),
            }
        };
        looking.abort();
        // What QEMU said before it closed is in the channel still.
        while let Ok(event) = events.try_recv() {
            self.seen.observe(&event);
        }
        self.read_console();
        let reason = exit_reason(ended.status, &self.seen, &ended.stderr_tail);
        if self.progress.verdict().is_none() {
            self.apply(BootInput::ProcessExited(reason.clone()));
        }
        match stopping {
            Some(Stopping { kill_at: Some(_), .. }) => "switched off".to_owned(),
            Some(_) => "stopped by the user".to_owned(),
            None => reason.to_string(),
        }
    }

    fn apply(&mut self, input: BootInput<'_>) {
        let had_verdict = self.progress.verdict().is_some();
        let reached = self.progress.apply(self.started_at.elapsed(), input);
        let decided = !had_verdict && self.progress.verdict().is_some();
        if reached.is_empty() && !decided {
            return;
        }
        for phase in &reached {
            tracing::info!(phase = %phase.phase, at_ms = phase.at_ms, "boot phase");
        }
        if decided && !matches!(self.progress.verdict(), Some(BootVerdict::Failed { .. })) {
            self.open_disk.boot_is_over();
        }
        let (phases, boot) = (self.progress.phases().to_vec(), self.progress.verdict().cloned());
        let user = self.progress.login_user().map(str::to_owned);
        self.states.send_modify(|state| {
            state.phases = phases;
            state.boot = boot;
            if let (Some(ssh), Some(user)) = (&mut state.ssh, user) {
                ssh.user.get_or_insert(user);
            }
        });
        save_state(self.directory, &self.states.borrow());
    }

    fn read_console(&mut self) {
        match self.console.read_new() {
            Ok(bytes) if bytes.is_empty() => {}
            Ok(bytes) => self.apply(BootInput::ConsoleBytes(&bytes)),
            Err(error) => tracing::warn!(%error, "cannot read the console's log"),
        }
    }

    fn take_found(&mut self, found: Found) {
        match found {
            Found::Banner(banner) => self.apply(BootInput::SshAnswered { banner }),
            Found::Look(Look::Report { user, report }) => {
                self.set_user(&user);
                self.apply(BootInput::CloudInitStatus(report));
            }
            Found::Look(Look::NoCloudInit { user }) => {
                self.set_user(&user);
                self.apply(BootInput::NoCloudInit);
            }
            Found::Look(Look::Unreachable) => {}
            Found::Look(Look::Refused) => {
                let error = "no user of the image accepts the keys over ssh".to_owned();
                let report = CloudInitReport { done: true, errors: vec![error], ..CloudInitReport::default() };
                self.apply(BootInput::CloudInitStatus(report));
            }
        }
    }

    fn set_user(&self, user: &str) {
        self.states.send_modify(|state| {
            if let Some(ssh) = &mut state.ssh {
                ssh.user = Some(user.to_owned());
            }
        });
    }

    fn set_state(&self, state: InstanceState) {
        self.states.send_modify(|run| {
            run.state = state;
            run.since = now();
        });
        save_state(self.directory, &self.states.borrow());
    }

    /// Tells everybody that the machine has ended, and leaves the reason behind.
    fn end(&self, reason: String, disk_error: Option<ControlError>) {
        let reason = match disk_error {
            Some(error) => format!("{reason}; {error}: {}", error.causes().join(": ")),
            None => reason,
        };
        self.states.send_modify(|run| {
            run.state = InstanceState::Stopped;
            run.reason = Some(reason);
            run.since = now();
            run.shim_pid = None;
            run.vm_pid = None;
            run.ssh = None;
        });
        save_state(self.directory, &self.states.borrow());
        for name in ["shim", "disk", "net", "qmp", "console", "agent"] {
            match std::fs::remove_file(self.directory.socket(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(name, %error, "cannot remove a socket");
                }
                _ => {}
            }
        }
    }
}

/// Goes on with a stop: the button again, or the switch.
async fn press_on(stopping: &mut Stopping, qmp: &Qmp, process: &QemuProcess) {
    let now = tokio::time::Instant::now();
    match stopping.kill_at {
        Some(kill_at) if now >= kill_at => process.kill(),
        Some(_) => {}
        None if now >= stopping.switch_off_at => {
            stopping.kill_at = Some(now + 2 * QUIT_LIMIT);
            if let Err(error) = qmp.execute_within("quit", Value::Null, QUIT_LIMIT).await {
                tracing::warn!(%error, "the machine does not quit; it is killed");
                process.kill();
            }
        }
        None if now >= stopping.press_again_at => {
            stopping.press_again_at = now + BUTTON_AGAIN;
            if let Err(error) = qmp.execute_within("system_powerdown", Value::Null, BUTTON_LIMIT).await {
                tracing::warn!(%error, "cannot press the power button");
            }
        }
        None => {}
    }
}

/// Waits for SSH and then asks the guest how cloud-init is doing, until it is through.
async fn look_into_guest(target: SshTarget, states: watch::Receiver<RunState>, found: mpsc::Sender<Found>) {
    let banner = ssh::wait_for_banner(target.port).await;
    let banner_at = Instant::now();
    if found.send(Found::Banner(banner)).await.is_err() {
        return;
    }
    let mut refused_since = None;
    loop {
        let (user, finished, prompt) = {
            let state = states.borrow();
            let user = state.ssh.as_ref().and_then(|ssh| ssh.user.clone());
            let reached = |phase| state.phases.iter().any(|reached| reached.phase == phase);
            (user, reached(BootPhase::CloudInitFinished), reached(BootPhase::LoginPrompt))
        };
        // Before the keys are set every user would be refused, and newer servers punish that.
        let early = user.is_none() && !finished && !prompt && banner_at.elapsed() < GUESS_AFTER;
        if early {
            tokio::time::sleep(Duration::from_secs(1)).await;
            continue;
        }
        let look = ssh::look(&target, user.as_deref()).await;
        let last = match &look {
            Look::Report { report, .. } => report.done,
            Look::NoCloudInit { .. } => true,
            Look::Unreachable => false,
            Look::Refused => {
                // Keys are set by cloud-init, so being refused before it finished means nothing.
                let since = *refused_since.get_or_insert_with(Instant::now);
                if !finished {
                    refused_since = None;
                }
                finished && since.elapsed() > LOGIN_LIMIT
            }
        };
        let pause = if matches!(look, Look::Refused) { REFUSED_PAUSE } else { Duration::from_secs(1) };
        let telling = last || matches!(look, Look::Report { .. } | Look::NoCloudInit { .. });
        if telling && found.send(Found::Look(look)).await.is_err() || last {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}
