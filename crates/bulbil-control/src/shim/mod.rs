//! The shim: one process beside each virtual machine, which outlives the daemon.
//!
//! It serves the instance's disk, is the other end of its Ethernet cable, answers its metadata
//! requests, starts QEMU and watches it. Its only interface is a unix socket with one JSON document
//! per line: `ShimRequest` in, `RunState` or one `ShimAnswer` out. When it ends, QEMU is killed with it, and
//! `state.json` says why, unless the shim itself was killed.

mod machine;
mod network;
mod run;
mod ssh;
mod volume_requests;

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use bulbil_types::VolumeId;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::data_dir::InstanceDir;
use crate::error::ControlError;
use crate::model::RunState;

pub(crate) use run::raise_file_limit;
pub use run::run_shim;

/// The longest answer of a shim.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// The address every guest has on its own network.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// The options of `ssh` that reach an instance with bulbil's own key, and use nothing of the user's
/// configuration.
#[must_use]
pub fn ssh_options(access: &crate::model::SshAccess) -> Vec<String> {
    ssh::options(access.port, &access.identity_file, &access.known_hosts_file)
}

/// What a shim can be asked.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(crate) enum ShimRequest {
    /// Tell the state now, and again whenever it changes.
    Watch,
    /// Press the power button, and switch off when the guest has not ended within `grace_ms`.
    Stop {
        /// Milliseconds.
        grace_ms: u64,
    },
    /// Take the volume's content of this moment into the store, and tell which it is.
    SnapshotVolume,
    /// Make a volume that shares the files of this one as it is now.
    CloneVolume {
        /// The new volume.
        clone: VolumeId,
    },
    /// Make the volume larger.
    ResizeVolume {
        /// The new size in bytes.
        size_bytes: u64,
    },
}

/// What came of a request, where that is told.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ShimAnswer<T> {
    /// It is done.
    Done(T),
    /// It is not.
    Failed(ControlError),
}

/// Connects to a shim that may still be starting.
pub(crate) async fn connect(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    let attempt = async {
        loop {
            match UnixStream::connect(socket).await {
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                other => return other,
            }
        }
    };
    tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

pub(crate) async fn ask_to_watch(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(&request_line(&ShimRequest::Watch)).await
}

/// Asks and does not wait for the outcome.
pub(crate) async fn send(socket: &Path, request: &ShimRequest) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(&request_line(request)).await?;
    stream.shutdown().await
}

/// Asks and waits for the answer, however long it takes.
pub(crate) async fn ask<T: serde::de::DeserializeOwned>(
    directory: &InstanceDir,
    request: &ShimRequest,
) -> Result<T, ControlError> {
    let asked = async {
        let mut stream = UnixStream::connect(directory.socket("shim")).await?;
        stream.write_all(&request_line(request)).await?;
        let mut line = String::new();
        BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_line(&mut line).await?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    };
    match asked.await.map_err(|e| ControlError::io("the instance's supervising process does not answer", &e))? {
        ShimAnswer::Done(value) => Ok(value),
        ShimAnswer::Failed(error) => Err(error),
    }
}

fn answer_line(answer: &ShimAnswer<impl serde::Serialize>) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).expect("answers are plain data");
    line.push(b'\n');
    line
}

fn request_line(request: &ShimRequest) -> Vec<u8> {
    let mut line = serde_json::to_vec(request).expect("requests are plain data");
    line.push(b'\n');
    line
}

/// What a shim last wrote of its instance.
pub(crate) fn read_state(directory: &InstanceDir) -> Option<RunState> {
    serde_json::from_slice(&std::fs::read(directory.file("state.json")).ok()?).ok()
}
