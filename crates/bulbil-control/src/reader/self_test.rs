//! Tries in a sandboxed process what the sandbox must refuse, and what it must not.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::process;
use crate::sandbox::{Sandbox, SandboxError, SandboxReport};

/// What was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What, in a few words.
    pub what: String,
    /// Whether it must be refused; else it must be possible.
    pub forbidden: bool,
    /// Whether it was refused for lack of rights.
    pub refused: bool,
    /// What came of it.
    pub outcome: String,
}

/// How well this host holds an image reader back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfTest {
    /// What the kernel says that it enforces.
    pub sandbox: SandboxReport,
    /// What was tried.
    pub attempts: Vec<Attempt>,
}

impl SelfTest {
    /// Whether everything that is forbidden was refused, and nothing else.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.sandbox.seccomp && self.attempts.iter().all(|attempt| attempt.forbidden == attempt.refused)
    }
}

/// How long a process may take to try everything.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// Has a process of its own try it; says whether images can be imported, and what holds their readers back.
pub(crate) async fn probe_sandbox(program: &Path) -> (bool, String) {
    let mut command = tokio::process::Command::new(program);
    command.args([process::IMAGE_READER_COMMAND, process::SELF_TEST_OPTION]).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(PROBE_LIMIT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return (false, format!("cannot be tried: {error}")),
        Err(_) => return (false, format!("cannot be tried: no answer within {} s", PROBE_LIMIT.as_secs())),
    };
    match serde_json::from_slice::<SelfTest>(&output.stdout) {
        Ok(test) => (test.holds(), test.to_string()),
        Err(_) => (false, format!("cannot be tried: {}", output.status)),
    }
}

impl fmt::Display for SelfTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.sandbox)?;
        if !self.sandbox.seccomp {
            write!(f, "; images are imported with --no-sandbox only")?;
        }
        for attempt in self.attempts.iter().filter(|attempt| attempt.forbidden != attempt.refused) {
            let verb = if attempt.forbidden { "can" } else { "cannot" };
            write!(f, "; {verb} {}", attempt.what)?;
        }
        Ok(())
    }
}

/// Sandboxes this process, for good, and tries things.
///
/// # Errors
/// [`SandboxError::Threads`] when this process has several threads.
pub fn run_self_test() -> Result<SelfTest, SandboxError> {
    // Open before, as what a reader is given.
    let open_before = File::open("/proc/self/exe");
    let sandbox = Sandbox::reader().apply(false)?;
    let mut attempts = Vec::new();
    let mut forbid = |what: &str, result: io::Result<()>| attempts.push(attempt(what, true, result));
    forbid("open /etc/passwd", File::open("/etc/passwd").map(drop));
    forbid("open its own program", File::open("/proc/self/exe").map(drop));
    forbid("list /", std::fs::read_dir("/").map(drop));
    forbid("create a file", File::create_new("/tmp/bulbil-sandbox-self-test").map(drop));
    forbid("remove a file", std::fs::remove_file("/tmp/bulbil-sandbox-self-test-2"));
    forbid("rename a file", std::fs::rename("/tmp/bulbil-sandbox-self-test-2", "/tmp/bulbil-sandbox-self-test-3"));
    forbid("make a directory", std::fs::create_dir("/tmp/bulbil-sandbox-self-test-4"));
    forbid("make a link", std::os::unix::fs::symlink("/", "/tmp/bulbil-sandbox-self-test-5"));
    forbid("make a file without a name", unnamed_file());
    forbid("connect over TCP", TcpStream::connect((Ipv4Addr::LOCALHOST, 9)).map(drop));
    forbid("listen on TCP", TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(drop));
    forbid("make a UDP socket", UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map(drop));
    forbid("make a Unix socket", UnixDatagram::unbound().map(drop));
    forbid("connect to a Unix socket", UnixStream::connect("/bulbil-sandbox-self-test").map(drop));
    forbid("listen on a Unix socket", UnixListener::bind("/tmp/bulbil-sandbox-self-test-6").map(drop));
    forbid("make a pair of sockets", UnixStream::pair().map(drop));
    forbid("run a program in its place", Err(Command::new("/bin/true").exec()));
    forbid("start a process", start_process());
    forbid("signal its parent", signal_parent());
    forbid("make shared memory", shared_memory());
    let mut allow = |what: &str, result: io::Result<()>| attempts.push(attempt(what, false, result));
    allow("read what was open", open_before.and_then(|file| read_one(&file)));
    allow("start a thread", thread());
    Ok(SelfTest { sandbox, attempts })
}

fn attempt(what: &str, forbidden: bool, result: io::Result<()>) -> Attempt {
    // That a path is not there or not its own is no refusal: another one might be.
    let codes = [Errno::PERM, Errno::ACCESS, Errno::NOSYS].map(Errno::raw_os_error);
    let refused = result.as_ref().err().and_then(io::Error::raw_os_error).is_some_and(|code| codes.contains(&code));
    let outcome = result.map_or_else(|error| error.to_string(), |()| "done".to_owned());
    Attempt { what: what.to_owned(), forbidden, refused, outcome }
}

fn unnamed_file() -> io::Result<()> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/tmp", flags, Mode::RUSR).map(drop)?)
}

fn start_process() -> io::Result<()> {
    let mut command = Command::new("/bin/true");
    command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    command.status().map(drop)
}

/// Asks whether it may, and sends nothing.
fn signal_parent() -> io::Result<()> {
    let parent = rustix::process::getppid().unwrap_or(rustix::process::Pid::INIT);
    Ok(rustix::process::test_kill_process(parent)?)
}

fn shared_memory() -> io::Result<()> {
    Ok(rustix::fs::memfd_create("self-test", rustix::fs::MemfdFlags::CLOEXEC).map(drop)?)
}

fn read_one(mut file: &File) -> io::Result<()> {
    file.read_exact(&mut [0])
}

fn thread() -> io::Result<()> {
    let started = std::thread::Builder::new().name("self-test".to_owned()).spawn(|| ())?;
    started.join().map_err(|_| io::Error::other("it panicked"))
}
