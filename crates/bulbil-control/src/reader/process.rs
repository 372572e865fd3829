//! The reader as a child of this process: started with nothing, its last words kept, its end explained.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulbil_vm::console::plain_text;

use crate::process;

/// What a reader may say on standard error before the rest is dropped.
const MAX_STDERR_BYTES: u64 = 64 << 10;

/// Bytes of one such line.
const MAX_LINE_BYTES: u64 = 1024;

/// Lines kept to explain its end.
const LAST_LINES: usize = 4;

/// How long a reader whose sockets are closed may take to be gone before it is killed.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A running reader. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct ReaderProcess {
    child: Mutex<Running>,
    last_lines: Arc<Mutex<VecDeque<String>>>,
    stderr: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    killed_by_us: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ReaderProcess {
    /// Starts a reader. It is killed when the calling *thread* ends, which is what the kernel watches: that must be
    /// the one that uses the reader.
    pub(super) fn start(program: &Path, control: UnixStream) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.arg(process::IMAGE_READER_COMMAND).env_clear().current_dir("/");
        command.stdin(OwnedFd::from(control)).stdout(Stdio::null()).stderr(Stdio::piped());
        // Ctrl-C at the terminal of `bulbil serve` is for the daemon, which then ends its readers.
        command.process_group(0);
        let mut child = command.spawn()?;
        let last_lines = Arc::<Mutex<VecDeque<String>>>::default();
        let stderr = child.stderr.take().map(|stderr| {
            let (kept, reader) = (Arc::clone(&last_lines), child.id());
            std::thread::spawn(move || keep_last_words(stderr, reader, &kept))
        });
        Ok(Self { child: Mutex::new(Running { child, killed_by_us: false }), last_lines, stderr })
    }

    /// Kills the process; nothing happens when it has ended.
    pub(super) fn kill(&self) {
        let mut running = lock(&self.child);
        if let Ok(None) = running.child.try_wait() {
            running.killed_by_us = true;
            // The only failure is that it ended just now.
            let _sent = running.child.kill();
        }
    }

    /// Says how the process ended whose socket has closed; one that has not ended is killed.
    pub(super) fn explain_end(&self) -> String {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            let mut running = lock(&self.child);
            match running.child.try_wait() {
                Ok(Some(_)) if running.killed_by_us => return "the image reader was ended".to_owned(),
                Ok(Some(status)) => {
                    drop(running);
                    return self.describe(status);
                }
                Ok(None) if Instant::now() < deadline => {}
                Ok(None) | Err(_) => {
                    drop(running);
                    self.kill();
                    return "the image reader closed its sockets and had to be ended".to_owned();
                }
            }
            drop(running);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn describe(&self, status: ExitStatus) -> String {
        let how = describe_status(status);
        match lock(&self.last_lines).back() {
            Some(line) => format!("{how}: {line}"),
            None => how,
        }
    }
}

impl Drop for ReaderProcess {
    fn drop(&mut self) {
        self.kill();
        let ended = lock(&self.child).child.wait();
        if let Err(error) = ended {
            tracing::warn!(%error, "cannot wait for an image reader");
        }
        // It ends with the process, which has started no other.
        if let Some(stderr) = self.stderr.take() {
            drop(stderr.join());
        }
    }
}

/// How a reader ended that should not have.
fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => format!("the image reader was killed by signal {signal}{}", signal_name(signal)),
        (Some(code), _) => format!("the image reader ended too early (exit status {code})"),
        (None, None) => "the image reader ended".to_owned(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT: a bug, or more memory than it may have)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        25 => " (SIGXFSZ: it wrote more than it may)",
        31 => " (SIGSYS: the sandbox refused a system call)",
        _ => "",
    }
}

/// Logs what a reader says, free of control characters and bounded.
fn keep_last_words(stderr: ChildStderr, reader: u32, last_lines: &Mutex<VecDeque<String>>) {
    let mut lines = BufReader::new(stderr.take(MAX_STDERR_BYTES));
    let mut line = Vec::new();
    while let Ok(1..) = (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
        let text = plain_text(&String::from_utf8_lossy(&line)).trim().to_owned();
        line.clear();
        if text.is_empty() {
            continue;
        }
        tracing::warn!(reader, text, "image reader");
        let mut kept = lock(last_lines);
        if kept.len() == LAST_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
    // The rest is read all the same, so that its writer never waits.
    let mut rest = lines.into_inner().into_inner();
    drop(io::copy(&mut rest, &mut io::sink()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_name_the_signal() {
        let check = |raw: i32, expected: &str| assert_eq!(describe_status(ExitStatus::from_raw(raw)), expected);
        check(11, "the image reader was killed by signal 11 (SIGSEGV)");
        check(9, "the image reader was killed by signal 9 (SIGKILL)");
        check(31, "the image reader was killed by signal 31 (SIGSYS: the sandbox refused a system call)");
        check(3 << 8, "the image reader ended too early (exit status 3)");
    }
}
