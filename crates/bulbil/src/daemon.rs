//! The daemon, and how a command finds or starts it.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_api::{Client, ClientError};
use bulbil_control::{CacheSize, Control, DataDir, StoreBinding, StoreChoice};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::error::{CliError, CliResult};

/// How long a daemon may take to answer after it was started: it opens the store, perhaps over a network.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long a daemon that is there may take to say so.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Where everything lies when the user does not say.
pub(crate) fn default_data_dir() -> CliResult<PathBuf> {
    let from = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = from("XDG_DATA_HOME").or_else(|| from("HOME").map(|home| home.join(".local/share")));
    let base = base.ok_or_else(|| {
        CliError::new("no data directory: HOME is not set").hint("choose one: --data-dir DIR or BULBIL_DATA_DIR")
    })?;
    Ok(base.join("bulbil"))
}

/// The path of this binary.
pub(crate) fn own_program() -> CliResult<PathBuf> {
    std::env::current_exe().map_err(|e| CliError::io("cannot find the path of this program", &e))
}

/// Connects to the daemon of a data directory, which is started when it does not run, and makes sure that it has the
/// store that was asked for.
pub(crate) async fn connect(data: &DataDir, store: &StoreChoice) -> CliResult<Client> {
    // A location that is refused starts no daemon; a key is tried by the daemon that is started with it.
    if let Some(bound) = StoreBinding::read(data.root())? {
        bound.check(data.root(), store)?;
    }
    let client = connect_to_any(data, store).await?;
    if *store != StoreChoice::default() {
        check_daemon(data, store)?;
    }
    Ok(client)
}

/// Of two commands that start a daemon at the same time one meets that of the other.
fn check_daemon(data: &DataDir, store: &StoreChoice) -> CliResult<()> {
    let bound = StoreBinding::read(data.root())?;
    let bound = bound.ok_or_else(|| CliError::new("the daemon does not say which store it has"))?;
    bound.check(data.root(), store)?;
    match &store.key {
        Some(key) if bound.key.as_ref() != Some(key) => {
            let kept = bound.key.map_or_else(|| "without a key".to_owned(), |kept| format!("with the key `{kept}`"));
            Err(CliError::new(format!("the daemon has opened the store {kept}, not `{key}`"))
                .hint("end it, and name the key again: bulbil shutdown"))
        }
        _ => Ok(()),
    }
}

async fn connect_to_any(data: &DataDir, store: &StoreChoice) -> CliResult<Client> {
    let client = Client::new(&data.socket());
    if is_there(&client).await? {
        return Ok(client);
    }
    let log_path = data.run_file("daemon.log");
    let log_start = std::fs::metadata(&log_path).map_or(0, |log| log.len());
    let mut child = start(data, store, &log_path).map_err(|e| CliError::io("cannot start the daemon", &e))?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if is_there(&client).await? {
            return Ok(client);
        }
        let status = child.try_wait().ok().flatten();
        // One that ends well has met another, which may answer soon, or may be on its way out.
        if status.is_some_and(|status| status.success()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            child = start(data, store, &log_path).map_err(|e| CliError::io("cannot start the daemon", &e))?;
        }
        if status.is_some_and(|status| !status.success()) || Instant::now() > deadline {
            let log = std::fs::read(&log_path).unwrap_or_default();
            let log = log.get(usize::try_from(log_start).unwrap_or(usize::MAX)..).unwrap_or_default();
            return Err(CliError::of_process("the daemon does not start", &String::from_utf8_lossy(log))
                .hint(format!("its log is {}", log_path.display())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether a daemon answers. One that is just being killed may still accept and then break off;
/// that counts as none.
async fn is_there(client: &Client) -> CliResult<bool> {
    match tokio::time::timeout(ANSWER_LIMIT, client.health()).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(ClientError::NoDaemon(_) | ClientError::Connection(_))) => Ok(false),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(CliError::new("the daemon does not answer")
            .hint("see its process in run/daemon.pid and its log in run/daemon.log of the data directory")),
    }
}

fn start(data: &DataDir, store: &StoreChoice, log_path: &Path) -> std::io::Result<std::process::Child> {
    let log = File::options().create(true).append(true).mode(0o600).open(log_path)?;
    let option = |name: &str, value: Option<String>| value.map_or_else(Vec::new, |value| vec![name.to_owned(), value]);
    Command::new(std::env::current_exe()?)
        .args(["serve", "--detached", "--data-dir"])
        .arg(data.root())
        .args(option("--store", store.location.as_ref().map(ToString::to_string)))
        .args(option("--store-key", store.key.as_ref().map(ToString::to_string)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
}

/// Runs the daemon until it is told to end.
pub(crate) fn serve(
    data_root: &Path,
    store: &StoreChoice,
    cache_size: Option<CacheSize>,
    detached: bool,
) -> CliResult<()> {
    if detached {
        // Apart from the terminal of the command that started it; a leader already is as good.
        let _already_leader = rustix::process::setsid().is_err();
    }
    // Disks, keys and user data are nobody else's business, wherever the data directory lies.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let data = DataDir::open(data_root)?;
    let Some(_lock) = lock(&data)? else {
        if detached {
            return Ok(());
        }
        return Err(CliError::new(format!("a daemon runs already for `{}`", data_root.display()))
            .hint("end it first: bulbil shutdown"));
    };
    cache_size.map_or(Ok(()), |size| size.set(&data))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| CliError::io("cannot start the daemon's runtime", &e))?;
    let served = runtime.block_on(serve_until_told(&data, store));
    // An import that is running is cut off; it leaves nothing visible.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// One daemon for a data directory: the lock goes with the process, however it ends.
fn lock(data: &DataDir) -> CliResult<Option<File>> {
    let path = data.run_file("daemon.lock");
    let fail = |e: std::io::Error| CliError::io(format!("cannot lock `{}`", path.display()), &e);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(fail)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(fail(errno.into())),
    }
}

async fn serve_until_told(data: &DataDir, store: &StoreChoice) -> CliResult<()> {
    let control = Control::open(data.clone(), store, own_program()?).await?;
    let socket = data.socket();
    let fail = |e: std::io::Error| CliError::io(format!("cannot listen on `{}`", socket.display()), &e);
    match std::fs::remove_file(&socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&socket).map_err(fail)?;
    let pid_path = data.run_file("daemon.pid");
    let mut pid_file = File::create(&pid_path).map_err(fail)?;
    writeln!(pid_file, "{}", std::process::id()).map_err(fail)?;
    tracing::info!(socket = %socket.display(), "daemon ready");
    let stop = Arc::new(Notify::new());
    let stop_by_signal = Arc::clone(&stop);
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop_by_signal.notify_one();
    });
    let stopped = Arc::clone(&stop);
    let serving = bulbil_api::serve(listener, control, stop);
    // Streams of clients that only watch must not keep the daemon.
    tokio::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = async { stopped.notified().await; stopped.notify_one(); tokio::time::sleep(Duration::from_secs(2)).await } => Ok(()),
    };
    for path in [&socket, &pid_path] {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove a file of the daemon");
        }
    }
    served.map_err(fail)
}
