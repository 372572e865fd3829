//! Processes that are measured: what they take, and that they end.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a server may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Between two looks for a server that starts: short beside the milliseconds that a start takes.
const START_POLL: Duration = Duration::from_micros(50);

/// Ticks a second of the times in `/proc`, the same on every Linux that cargo runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a finished command took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) wall_s: f64,
    /// User and system time of the command and all its children, in steps of 10 ms.
    pub(crate) cpu_s: f64,
}

/// Runs a command without output of its own.
pub(crate) fn timed(command: &mut Command) -> Result<Cost> {
    timed_output(command).map(|(cost, _)| cost)
}

/// Runs a command; what it took, and its standard output.
pub(crate) fn timed_output(command: &mut Command) -> Result<(Cost, String)> {
    let cpu_before = children_cpu_s()?;
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    let wall_s = start.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("{command:?} failed: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    let cpu_s = children_cpu_s()? - cpu_before;
    Ok((Cost { wall_s, cpu_s }, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// A process that runs until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    started: Instant,
}

impl Server {
    /// Starts a server that will listen on `socket`; its standard error goes to a file beside it.
    pub(crate) fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        if socket.exists() {
            std::fs::remove_file(socket).with_context(|| format!("cannot remove {}", socket.display()))?;
        }
        let log = std::fs::File::create(log_path(socket))
            .with_context(|| format!("cannot create {}", log_path(socket).display()))?;
        // Some servers end when their standard input does, so it stays open as long as this.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self { child, socket: socket.to_owned(), started })
    }

    /// Starts a server and waits until it listens.
    pub(crate) fn start_and_wait(command: &mut Command, socket: &Path) -> Result<Self> {
        let mut server = Self::start(command, socket)?;
        drop(server.connect()?);
        Ok(server)
    }

    /// Starts a server and waits until its socket is there, for servers that take one connection in all.
    pub(crate) fn start_and_listen(command: &mut Command, socket: &Path) -> Result<Self> {
        let mut server = Self::start(command, socket)?;
        while !socket.exists() {
            server.check_start()?;
            std::thread::sleep(START_POLL);
        }
        Ok(server)
    }

    /// Connects, as soon as the server listens.
    pub(crate) fn connect(&mut self) -> Result<UnixStream> {
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                return Ok(stream);
            }
            self.check_start()?;
            std::thread::sleep(START_POLL);
        }
    }

    fn check_start(&mut self) -> Result<()> {
        let ended = self.child.try_wait().context("cannot wait for a server")?;
        if ended.is_some() || self.started.elapsed() > START_LIMIT {
            let log = std::fs::read_to_string(log_path(&self.socket)).unwrap_or_default();
            bail!("no server on {}: {}", self.socket.display(), log.trim_end());
        }
        Ok(())
    }

    /// Kills the server and waits until it is gone.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill().context("cannot kill a server")?;
        self.child.wait().context("cannot wait for a server").map(drop)
    }

    /// Sends a line to the server's standard input.
    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("a server without standard input")?;
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).context("cannot write to a server")
    }

    /// Closes the server's standard input, waits until it has ended by that, and returns what it has said.
    pub(crate) fn finish(mut self) -> Result<String> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("cannot wait for a server")?;
        let log = log_path(&self.socket);
        let said = std::fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
        if !status.success() {
            bail!("a server failed: {status}\n{}", said.trim_end());
        }
        Ok(said)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The time since the process was started.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// User and system time of the process so far, in steps of 10 ms.
    pub(crate) fn cpu_s(&self) -> Result<f64> {
        process_cpu_s(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn log_path(socket: &Path) -> PathBuf {
    socket.with_extension("log")
}

/// Position of `utime` in `/proc/PID/stat`, counted from the field after the program's name; `stime` follows.
const USER_FIELD: usize = 11;
/// The same of `cutime`, the time of children that were waited for; `cstime` follows.
const CHILDREN_FIELD: usize = 13;

/// User and system time of a process so far, in steps of 10 ms.
pub(crate) fn process_cpu_s(pid: u32) -> Result<f64> {
    stat_cpu_s(&format!("/proc/{pid}/stat"), USER_FIELD)
}

fn children_cpu_s() -> Result<f64> {
    stat_cpu_s("/proc/self/stat", CHILDREN_FIELD)
}

fn stat_cpu_s(path: &str, field: usize) -> Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    cpu_s_in(&text, field).with_context(|| format!("{path} does not look as expected"))
}

fn cpu_s_in(stat: &str, field: usize) -> Option<f64> {
    // The program's name may hold spaces and parentheses; the last one ends it.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let ticks = after_name.split_ascii_whitespace().skip(field).take(2).map(|word| word.parse::<f64>().ok());
    ticks.sum::<Option<f64>>().map(|ticks| ticks / TICKS_PER_SECOND)
}

/// Memory of a process that it shares with no other and that is no file's.
pub(crate) fn memory_bytes(pid: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("{path} does not look as expected"))? * 1024)
}

/// Bytes a file, or everything below a directory, takes on the disk.
pub(crate) fn disk_usage_bytes(path: &Path) -> Result<u64> {
    let metadata = std::fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    // `st_blocks` counts 512 bytes on every file system.
    let mut total = if metadata.is_file() { metadata.blocks() * 512 } else { 0 };
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
            total += disk_usage_bytes(&entry?.path())?;
        }
    }
    Ok(total)
}

/// Makes a directory anew.
pub(crate) fn fresh_directory(path: &Path) -> Result<()> {
    if path.exists() {
        std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    std::fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_found_behind_a_name_with_spaces() {
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194560 100 0 0 0 150 50 7 3 20 0 1 0 1234 0 0";
        assert_eq!(cpu_s_in(stat, USER_FIELD), Some(2.0));
        assert_eq!(cpu_s_in(stat, CHILDREN_FIELD), Some(0.1));
        assert_eq!(cpu_s_in("42 (short) S 1", USER_FIELD), Some(0.0));
        assert_eq!(cpu_s_in("nonsense", USER_FIELD), None);
    }
}
