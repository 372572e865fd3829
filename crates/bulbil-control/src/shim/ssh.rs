//! Looks into the guest over SSH: who may log in, and what cloud-init says of itself.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use bulbil_vm::console::plain_text;
use bulbil_vm::{CloudInitReport, parse_cloud_init_status};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

/// Users that images give their keys to, the most common first; used when the console names none.
const USUAL_USERS: [&str; 10] =
    ["debian", "ubuntu", "ec2-user", "cloud-user", "fedora", "centos", "almalinux", "rocky", "alpine", "root"];

/// ssh's own failure, apart from that of the command it runs.
const SSH_FAILED: i32 = 255;

const BANNER_LIMIT: Duration = Duration::from_secs(10);
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// Twice what cloud-init's two files may have; a guest that says more is cut off.
const MAX_OUTPUT_BYTES: u64 = 4 << 20;

const PAUSE: Duration = Duration::from_millis(500);

/// Prints both of cloud-init's files, or only the separator where there is none.
const STATUS_COMMAND: &str = "cat /run/cloud-init/status.json 2>/dev/null; echo; echo ==result==; \
                              cat /run/cloud-init/result.json 2>/dev/null";

/// How to reach the guest.
#[derive(Debug, Clone)]
pub(super) struct SshTarget {
    pub(super) port: u16,
    pub(super) identity: PathBuf,
    pub(super) known_hosts: PathBuf,
}

/// Waits until a server answers on the forwarded port, and returns its banner.
pub(super) async fn wait_for_banner(port: u16) -> String {
    loop {
        if let Ok(Some(banner)) = tokio::time::timeout(BANNER_LIMIT, read_banner(port)).await {
            return banner;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn read_banner(port: u16) -> Option<String> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let mut line = String::new();
    // A banner is at most 255 bytes, RFC 4253 section 4.2.
    BufReader::new(stream.take(1024)).read_line(&mut line).await.ok()?;
    // The guest chose these bytes, and people will see them.
    line.starts_with("SSH-").then(|| plain_text(line.trim_end()))
}

/// What one look into the guest gave.
#[derive(Debug)]
pub(super) enum Look {
    /// cloud-init's report, from this user's session.
    Report { user: String, report: CloudInitReport },
    /// A session worked, and there is no cloud-init.
    NoCloudInit { user: String },
    /// The server answered and let no user in with the keys.
    Refused,
    /// No answer came in time, or the connection broke.
    Unreachable,
}

/// Logs in and reads cloud-init's files once.
pub(super) async fn look(target: &SshTarget, known_user: Option<&str>) -> Look {
    let users: Vec<&str> = match known_user {
        Some(user) => vec![user],
        None => USUAL_USERS.to_vec(),
    };
    for user in users {
        // A guest that is slow for one user is slow for all: it is asked again later.
        let Some(output) = run(target, user, STATUS_COMMAND).await else { return Look::Unreachable };
        if output.status.code() == Some(SSH_FAILED) {
            if String::from_utf8_lossy(&output.stderr).contains("Permission denied") {
                continue;
            }
            return Look::Unreachable;
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // An image may answer a login with words of its own, as root's on Debian: that is not a session.
        let Some((status, result)) = text.split_once("==result==") else { continue };
        let user = user.to_owned();
        if status.trim().is_empty() {
            return Look::NoCloudInit { user };
        }
        let result = Some(result.trim()).filter(|text| !text.is_empty());
        return match parse_cloud_init_status(status.trim(), result) {
            Ok(report) => Look::Report { user, report },
            // Half written: it is read again.
            Err(_) => Look::Report { user, report: CloudInitReport::default() },
        };
    }
    Look::Refused
}

/// Runs a command in the guest; `None` when it takes too long or says more than it may.
async fn run(target: &SshTarget, user: &str, command: &str) -> Option<Output> {
    let mut child = Command::new("ssh")
        .args(options(target.port, &target.identity.to_string_lossy(), &target.known_hosts.to_string_lossy()))
        .args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=60"])
        .arg(format!("{user}@127.0.0.1"))
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .ok()?;
    let mut stdout = child.stdout.take()?.take(MAX_OUTPUT_BYTES + 1);
    let mut stderr = child.stderr.take()?.take(MAX_OUTPUT_BYTES + 1);
    let all = async {
        let (mut said, mut complained) = (Vec::new(), Vec::new());
        tokio::try_join!(stdout.read_to_end(&mut said), stderr.read_to_end(&mut complained)).ok()?;
        if said.len().max(complained.len()) as u64 > MAX_OUTPUT_BYTES {
            return None;
        }
        Some(Output { status: child.wait().await.ok()?, stdout: said, stderr: complained })
    };
    tokio::time::timeout(COMMAND_LIMIT, all).await.ok()?
}

/// The options that make ssh use bulbil's key and the instance's own list of host keys, and
/// nothing of the user's configuration.
pub(super) fn options(port: u16, identity: &str, known_hosts: &str) -> Vec<String> {
    // ssh splits values at spaces and expands `%`.
    let path = |text: &str| format!("\"{}\"", text.replace('%', "%%"));
    let settings = [
        format!("IdentityFile={}", path(identity)),
        "IdentitiesOnly=yes".to_owned(),
        format!("UserKnownHostsFile={}", path(known_hosts)),
        "GlobalKnownHostsFile=/dev/null".to_owned(),
        "StrictHostKeyChecking=accept-new".to_owned(),
        "LogLevel=ERROR".to_owned(),
    ];
    let mut options = vec!["-F".to_owned(), "none".to_owned(), "-p".to_owned(), port.to_string()];
    options.extend(settings.into_iter().flat_map(|setting| ["-o".to_owned(), setting]));
    options
}
