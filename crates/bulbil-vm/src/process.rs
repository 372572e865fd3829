//! QEMU as a child process: started so that it cannot outlive its shim, watched, and its end explained.
//!
//! A thread of its own starts QEMU and stays with it until it ends, for two reasons: the kernel's parent-death signal
//! follows the *thread* that called `fork`, so a worker of a thread pool must not be that thread; and the process id
//! stays valid for [`QemuProcess::kill`] because nobody else reaps it (signals go through a pidfd anyway).

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::console::plain_text;
use crate::qmp::{QmpEvent, QmpEventKind};

/// Bytes of standard error that go to the log file; what comes after is seen in the tail only.
pub const MAX_STDERR_LOG_BYTES: usize = 256 * 1024;

/// Lines of standard error kept for the reason of an exit.
pub const STDERR_TAIL_LINES: usize = 20;

/// Bytes of one such line.
const MAX_STDERR_LINE_BYTES: u64 = 1024;

/// After QEMU ended, the time its last words may take to arrive. They are in the pipe already unless something else
/// holds the pipe open.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What to run.
#[derive(Debug, Clone)]
pub struct QemuCommand {
    /// QEMU.
    pub program: PathBuf,
    /// Its arguments, from [`crate::qemu_argv`].
    pub argv: Vec<OsString>,
    /// Where its standard error goes, at most [`MAX_STDERR_LOG_BYTES`]; begun anew at each start, mode 0600.
    pub stderr_log: PathBuf,
    /// Its whole environment. Nothing is inherited: the shim's may hold keys that are not QEMU's business.
    pub environment: Vec<(OsString, OsString)>,
}

/// QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The log file could not be made.
    #[error("cannot create the log file `{}`", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program could not be run.
    #[error("cannot start `{}`", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread that would watch it could not be started.
    #[error("cannot start a thread to watch QEMU")]
    Thread(#[source] io::Error),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndStatus {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// The watching thread was lost, and with it the status.
    Unknown,
}

impl From<ExitStatus> for EndStatus {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Unknown,
        }
    }
}

/// How QEMU ended and what it said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The status.
    pub status: EndStatus,
    /// The last lines of standard error, oldest first, free of control characters.
    pub stderr_tail: Vec<String>,
}

/// A running QEMU. Dropping it kills QEMU; so does the end of this process, however it ends.
#[derive(Debug)]
pub struct QemuProcess {
    pid: u32,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<Ended>>,
}

impl QemuProcess {
    /// Starts QEMU. When this returns the program runs, but it may still refuse its arguments: wait for QMP or for
    /// [`QemuProcess::wait`], whichever comes first. When the future is dropped, QEMU is killed.
    ///
    /// # Errors
    /// When the log file or the process cannot be made.
    pub async fn spawn(command: QemuCommand) -> Result<Self, SpawnError> {
        let (started, start) = oneshot::channel();
        let (ending, ended) = watch::channel(None);
        let keeper = move || keep(&command, started, &ending);
        thread::Builder::new().name("qemu-keeper".into()).spawn(keeper).map_err(SpawnError::Thread)?;
        let lost = || SpawnError::Thread(io::Error::other("the thread ended"));
        let (pid, pidfd) = start.await.map_err(|_| lost())??;
        Ok(Self { pid, pidfd, ended })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills QEMU at once. What the guest has not flushed is lost, as with a power cut. Nothing happens when it has
    /// ended already.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Asks QEMU to end in order (SIGTERM): disks are flushed, the guest is not asked.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    fn signal(&self, signal: Signal) {
        // The only failure is that it has ended already.
        let _sent = pidfd_send_signal(&self.pidfd, signal);
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.ended.borrow().clone()
    }

    /// Waits until it has ended. Cancel safe, and may be called again.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        let result = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        result.unwrap_or(Ended { status: EndStatus::Unknown, stderr_tail: Vec::new() })
    }
}

impl Drop for QemuProcess {
    fn drop(&mut self) {
        if self.ended.borrow().is_none() {
            self.kill();
        }
    }
}

type Started = Result<(u32, OwnedFd), SpawnError>;

/// The life of the watching thread.
fn keep(command: &QemuCommand, started: oneshot::Sender<Started>, ending: &watch::Sender<Option<Ended>>) {
    let (mut child, log) = match start(command) {
        Ok(running) => running,
        Err(error) => {
            // Nobody waits for the answer any more: nothing was started either.
            let _unheard = started.send(Err(error));
            return;
        }
    };
    let tail = Arc::new(Mutex::new(VecDeque::new()));
    let (last_words, heard) = mpsc::channel();
    if let Some(stderr) = child.stderr.take() {
        let tail = Arc::clone(&tail);
        thread::spawn(move || {
            copy_stderr(stderr, log, &tail);
            drop(last_words);
        });
    }
    if !announce(command, &child, started) {
        // Nobody is left to want this QEMU.
        let _killed = child.kill();
    }
    let status = child.wait().map_or(EndStatus::Unknown, EndStatus::from);
    // Nothing is ever sent: this ends when the reader does.
    let _closed: Result<(), mpsc::RecvTimeoutError> = heard.recv_timeout(LAST_WORDS);
    let stderr_tail = tail.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
    ending.send_replace(Some(Ended { status, stderr_tail }));
}

fn start(command: &QemuCommand) -> Result<(Child, File), SpawnError> {
    let log = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&command.stderr_log);
    let log = log.map_err(|source| SpawnError::Log { path: command.stderr_log.clone(), source })?;
    let mut qemu = Command::new(&command.program);
    qemu.args(&command.argv).env_clear().envs(command.environment.iter().map(|(key, value)| (key, value)));
    qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // A group of its own: Ctrl-C at the terminal is for the command, not for the instance.
    qemu.process_group(0);
    crate::sys::die_with_spawning_thread(&mut qemu);
    let child = qemu.spawn().map_err(|source| SpawnError::Program { program: command.program.clone(), source })?;
    Ok((child, log))
}

/// Hands the running process to whoever asked; false when nobody can be told.
fn announce(command: &QemuCommand, child: &Child, started: oneshot::Sender<Started>) -> bool {
    let pid = child.id();
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH);
    match raw.and_then(|raw| pidfd_open(raw, PidfdFlags::empty())) {
        Ok(pidfd) => started.send(Ok((pid, pidfd))).is_ok(),
        Err(error) => {
            let (program, source) = (command.program.clone(), io::Error::from(error));
            let _unheard = started.send(Err(SpawnError::Program { program, source }));
            false
        }
    }
}

/// Copies standard error to the log, up to its limit, and remembers the last lines.
fn copy_stderr(stderr: ChildStderr, mut log: File, tail: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(stderr);
    let mut room = MAX_STDERR_LOG_BYTES;
    let mut line = Vec::new();
    while let Ok(1..) = (&mut reader).take(MAX_STDERR_LINE_BYTES).read_until(b'\n', &mut line) {
        if line.len() <= room {
            room -= line.len();
            // The tail still has it when the disk is full.
            let _written = log.write_all(&line);
        }
        remember(tail, &plain_text(&String::from_utf8_lossy(&line)));
        line.clear();
    }
}

fn remember(tail: &Mutex<VecDeque<String>>, text: &str) {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if tail.len() == STDERR_TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line.to_owned());
    }
}

/// What was seen over QMP that explains an exit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QmpSeen {
    /// Whether QMP ever answered: QEMU had accepted its arguments.
    pub connected: bool,
    /// The reason of the last shutdown event.
    pub shutdown: Option<String>,
}

impl QmpSeen {
    /// Takes note of an event.
    pub fn observe(&mut self, event: &QmpEvent) {
        self.connected = true;
        if let QmpEventKind::Shutdown { reason, .. } = &event.kind {
            self.shutdown = Some(reason.clone());
        }
    }
}

/// Why QEMU is no longer there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reason")]
pub enum ExitReason {
    /// The guest switched its machine off.
    GuestPoweredOff,
    /// The guest restarted a machine that was started without restarts.
    GuestReset,
    /// The guest's kernel panicked and the machine was set to end then.
    GuestPanicked,
    /// QEMU was asked to end, over QMP (`host-qmp-quit`) or by SIGTERM (`host-signal`).
    StoppedByHost {
        /// QEMU's word for it.
        by: String,
    },
    /// A signal ended QEMU: the kernel's out-of-memory killer, an operator, or a fault in QEMU.
    Killed {
        /// The signal.
        signal: i32,
        /// What QEMU said last.
        stderr: Vec<String>,
    },
    /// QEMU refused its arguments or could not get what they name.
    FailedToStart {
        /// The exit status.
        code: i32,
        /// What QEMU said last.
        stderr: Vec<String>,
    },
    /// QEMU gave up while running.
    Failed {
        /// The exit status.
        code: i32,
        /// What QEMU said last.
        stderr: Vec<String>,
    },
    /// QEMU ended in order and no event said why.
    Unexplained {
        /// What QEMU said last.
        stderr: Vec<String>,
    },
}

impl ExitReason {
    /// Whether the guest itself ended the machine in order.
    #[must_use]
    pub fn is_guest_shutdown(&self) -> bool {
        matches!(self, Self::GuestPoweredOff | Self::GuestReset)
    }

    /// QEMU's own words, where it had any.
    #[must_use]
    pub fn stderr(&self) -> &[String] {
        match self {
            Self::Killed { stderr, .. }
            | Self::FailedToStart { stderr, .. }
            | Self::Failed { stderr, .. }
            | Self::Unexplained { stderr } => stderr,
            Self::GuestPoweredOff | Self::GuestReset | Self::GuestPanicked | Self::StoppedByHost { .. } => &[],
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestPoweredOff => write!(f, "the guest powered off"),
            Self::GuestReset => write!(f, "the guest restarted"),
            Self::GuestPanicked => write!(f, "the guest's kernel panicked"),
            Self::StoppedByHost { by } => write!(f, "stopped from the host ({by})"),
            Self::Killed { signal, .. } => write!(f, "QEMU was killed by signal {signal}{}", signal_name(*signal)),
            Self::FailedToStart { code, .. } => write!(f, "QEMU failed to start (exit status {code})"),
            Self::Failed { code, .. } => write!(f, "QEMU failed (exit status {code})"),
            Self::Unexplained { .. } => write!(f, "QEMU ended without saying why"),
        }?;
        match self.stderr().last() {
            Some(line) => write!(f, ": {line}"),
            None => Ok(()),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        31 => " (SIGSYS: the sandbox refused a system call)",
        _ => "",
    }
}

/// Explains an exit by its status, what QMP told before, and the last lines of standard error.
#[must_use]
pub fn exit_reason(status: EndStatus, seen: &QmpSeen, stderr_tail: &[String]) -> ExitReason {
    let stderr = stderr_tail.to_vec();
    match status {
        EndStatus::Signal(signal) => ExitReason::Killed { signal, stderr },
        EndStatus::Code(0) | EndStatus::Unknown => orderly_reason(seen.shutdown.as_deref(), stderr),
        EndStatus::Code(code) if seen.connected => ExitReason::Failed { code, stderr },
        EndStatus::Code(code) => ExitReason::FailedToStart { code, stderr },
    }
}

fn orderly_reason(shutdown: Option<&str>, stderr: Vec<String>) -> ExitReason {
    match shutdown {
        Some("guest-shutdown") => ExitReason::GuestPoweredOff,
        Some("guest-reset") => ExitReason::GuestReset,
        Some("guest-panic") => ExitReason::GuestPanicked,
        Some(by) => ExitReason::StoppedByHost { by: by.to_owned() },
        // A signal may come before QMP does.
        None if stderr.iter().any(|line| line.contains("terminating on signal")) => {
            ExitReason::StoppedByHost { by: "host-signal".to_owned() }
        }
        None => ExitReason::Unexplained { stderr },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &tempfile::TempDir) -> QemuCommand {
        QemuCommand {
            program: "/bin/sh".into(),
            argv: vec!["-c".into(), script.into()],
            stderr_log: folder.path().join("stderr.log"),
            environment: vec![("PATH".into(), "/usr/bin:/bin".into())],
        }
    }

    fn seen(connected: bool, shutdown: Option<&str>) -> QmpSeen {
        QmpSeen { connected, shutdown: shutdown.map(str::to_owned) }
    }

    #[test]
    fn exits_are_explained() {
        let check = |status, seen: &QmpSeen, tail: &[&str], expected: &str| {
            let tail: Vec<String> = tail.iter().map(|&line| line.to_owned()).collect();
            assert_eq!(exit_reason(status, seen, &tail).to_string(), expected);
        };
        let (off, quit) = (seen(true, Some("guest-shutdown")), seen(true, Some("host-qmp-quit")));
        check(EndStatus::Code(0), &off, &[], "the guest powered off");
        check(EndStatus::Code(0), &seen(true, Some("guest-reset")), &[], "the guest restarted");
        check(EndStatus::Code(0), &seen(true, Some("guest-panic")), &[], "the guest's kernel panicked");
        check(EndStatus::Code(0), &quit, &[], "stopped from the host (host-qmp-quit)");
        check(EndStatus::Signal(9), &seen(true, None), &[], "QEMU was killed by signal 9 (SIGKILL)");
        // A signal after the guest's own shutdown is still what ended it.
        check(
            EndStatus::Signal(6),
            &off,
            &["Assertion failed"],
            "QEMU was killed by signal 6 (SIGABRT): Assertion failed",
        );
        let refused = &["qemu: -smp 0: bad", "qemu: giving up"];
        check(EndStatus::Code(1), &seen(false, None), refused, "QEMU failed to start (exit status 1): qemu: giving up");
        check(EndStatus::Code(1), &seen(true, None), &["disk gone"], "QEMU failed (exit status 1): disk gone");
        let term = &["qemu-system-x86_64: terminating on signal 15 from pid 7 (kill)"];
        check(EndStatus::Code(0), &seen(false, None), term, "stopped from the host (host-signal)");
        check(EndStatus::Code(0), &seen(false, None), &[], "QEMU ended without saying why");
    }

    #[tokio::test]
    async fn status_and_last_lines_are_kept_and_the_log_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let script = "i=0; while [ $i -lt 4000 ]; do echo \"line $i ...................................................................................................\" >&2; i=$((i+1)); done; printf '\\033[31mlast\\033[0m words' >&2; exit 3";
        let process = QemuProcess::spawn(shell(script, &folder)).await.unwrap();
        let ended = process.wait().await;
        assert_eq!(ended.status, EndStatus::Code(3));
        assert_eq!(ended.stderr_tail.len(), STDERR_TAIL_LINES);
        assert_eq!(ended.stderr_tail.last().unwrap(), "last words");
        let log = std::fs::metadata(folder.path().join("stderr.log")).unwrap().len();
        assert!((200_000..=MAX_STDERR_LOG_BYTES as u64).contains(&log), "{log}");
        assert_eq!(process.ended(), Some(ended));
        process.kill();
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let command = QemuCommand { program: "/nonexistent/qemu".into(), ..shell("", &folder) };
        let error = QemuProcess::spawn(command).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot start `/nonexistent/qemu`");
    }

    #[tokio::test]
    async fn the_environment_is_not_inherited() {
        let folder = tempfile::tempdir().unwrap();
        // The shell adds PWD, SHLVL and such by itself; cargo's variables show inheritance.
        let process = QemuProcess::spawn(shell("env | grep CARGO >&2; exit 0", &folder)).await.unwrap();
        assert_eq!(process.wait().await.stderr_tail, Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_dropped_process_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let process = QemuProcess::spawn(shell("exec sleep 600", &folder)).await.unwrap();
        let mut ended = process.ended.clone();
        drop(process);
        let status = ended.wait_for(Option::is_some).await.unwrap().as_ref().map(|ended| ended.status);
        assert_eq!(status, Some(EndStatus::Signal(9)));
    }

    /// The watcher starts a child from a thread that then ends: the child must go with it.
    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let child = thread::spawn(|| {
            let mut command = Command::new("/bin/sleep");
            command.arg("600");
            crate::sys::die_with_spawning_thread(&mut command);
            command.spawn().unwrap()
        });
        let status = child.join().unwrap().wait().unwrap();
        assert_eq!(status.signal(), Some(9));
    }
}
