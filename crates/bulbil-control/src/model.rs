//! Records that are kept and views that are shown. Field names are the API's and stay.

use std::fmt;
use std::str::FromStr;

use bulbil_store::Digest;
use bulbil_types::{Architecture, BootMode, ByteSize, ImageId, InstanceId, Name, Personality, VolumeId};
use bulbil_vm::{BootVerdict, PhaseReached};
use serde::{Deserialize, Serialize};

/// An image in the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: Name,
    /// Its version; name and version together are unique.
    pub version: Name,
    /// Identity of the disk's content.
    pub digest: Digest,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes of the disk that are not zero.
    pub data_bytes: u64,
    /// Bytes the store grew by when it was imported.
    pub stored_bytes: u64,
    /// Its processor architecture.
    pub architecture: Architecture,
    /// How firmware starts it.
    pub boot_mode: BootMode,
    /// The format of the file it came from.
    pub source_format: String,
    /// When it was imported, in seconds since 1970.
    pub created_at: i64,
}

/// A host port that leads to a port of the guest: `[ADDRESS:]HOST:GUEST`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Address listened on.
    pub address: std::net::IpAddr,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", std::net::SocketAddr::new(self.address, self.host_port), self.guest_port)
    }
}

impl FromStr for PublishedPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail =
            || format!("`{text}` is not a port to publish: write HOST:GUEST or ADDRESS:HOST:GUEST, such as 8080:80");
        let (rest, guest) = text.rsplit_once(':').ok_or_else(fail)?;
        let (address, host) = rest.rsplit_once(':').unwrap_or(("127.0.0.1", rest));
        let port = |word: &str| word.parse().ok().filter(|port| *port != 0).ok_or_else(fail);
        let address = address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| fail())?;
        Ok(Self { address, host_port: port(host)?, guest_port: port(guest)? })
    }
}

/// A public key that may log in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoginKey {
    /// The key's comment, or a number.
    pub name: String,
    /// The OpenSSH line.
    pub key: String,
}

/// What an instance is, apart from whether it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Its id.
    pub id: InstanceId,
    /// Its name, unique on this host.
    pub name: Name,
    /// The image it was launched from.
    pub image_id: ImageId,
    /// That image's name and version.
    pub image: String,
    /// Content of that image.
    pub image_digest: Digest,
    /// Its root disk.
    pub volume_id: VolumeId,
    /// Size of the root disk in bytes.
    pub disk_bytes: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Which cloud it looks like to its guest.
    pub personality: Personality,
    /// How firmware starts it.
    pub boot_mode: BootMode,
    /// Hardware address of its network card.
    pub mac: String,
    /// Host name it is given.
    pub hostname: String,
    /// Public keys that may log in.
    pub public_keys: Vec<LoginKey>,
    /// Bytes of user data; the data itself is only in the instance's directory.
    pub user_data_bytes: u64,
    /// Ports of the host that lead in.
    pub publish: Vec<PublishedPort>,
    /// When it was launched, in seconds since 1970.
    pub created_at: i64,
}

/// Whether an instance runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Its processes are being started.
    Pending,
    /// The machine runs.
    Running,
    /// It was asked to power off.
    Stopping,
    /// It does not run.
    Stopped,
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        })
    }
}

/// How to log in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAccess {
    /// Address of the host that leads to the guest's port 22.
    pub address: String,
    /// That port.
    pub port: u16,
    /// Who may log in, once it is known.
    pub user: Option<String>,
    /// The private key that bulbil uses.
    pub identity_file: String,
    /// Where the guest's host keys are kept.
    pub known_hosts_file: String,
}

/// What the shim of an instance tells: everything that changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Whether it runs.
    pub state: InstanceState,
    /// Why it does not, or what is wrong.
    pub reason: Option<String>,
    /// When this state began, in seconds since 1970.
    pub since: i64,
    /// The shim's process.
    pub shim_pid: Option<u32>,
    /// The virtual machine's process.
    pub vm_pid: Option<u32>,
    /// What runs its instructions: `kvm` or `tcg`.
    pub accelerator: Option<String>,
    /// How to log in.
    pub ssh: Option<SshAccess>,
    /// How far the boot has come.
    pub phases: Vec<PhaseReached>,
    /// How the boot ended.
    pub boot: Option<BootVerdict>,
}

impl RunState {
    pub(crate) fn stopped(reason: impl Into<String>, since: i64) -> Self {
        Self { reason: Some(reason.into()), since, ..Self::pending(since) }.with_state(InstanceState::Stopped)
    }

    pub(crate) fn pending(since: i64) -> Self {
        Self {
            state: InstanceState::Pending,
            reason: None,
            since,
            shim_pid: None,
            vm_pid: None,
            accelerator: None,
            ssh: None,
            phases: Vec::new(),
            boot: None,
        }
    }

    fn with_state(self, state: InstanceState) -> Self {
        Self { state, ..self }
    }
}

/// An instance as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceView {
    /// What it is.
    #[serde(flatten)]
    pub record: InstanceRecord,
    /// What it does.
    #[serde(flatten)]
    pub run: RunState,
    /// One word on how it is: `ready`, `degraded`, `failed`, `booting`, `starting`, or `-` when it
    /// does not run.
    pub health: String,
    /// Its address on its own network.
    pub private_ip: String,
}

impl InstanceView {
    pub(crate) fn new(record: InstanceRecord, run: RunState, private_ip: String) -> Self {
        let health = health_of(&run).to_owned();
        Self { record, run, health, private_ip }
    }

    /// The same instance in another state.
    #[must_use]
    pub fn with_run(self, run: RunState) -> Self {
        Self::new(self.record, run, self.private_ip)
    }

    /// The size of its memory, for people.
    #[must_use]
    pub fn memory(&self) -> ByteSize {
        ByteSize(self.record.memory_bytes)
    }
}

fn health_of(run: &RunState) -> &'static str {
    match (run.state, &run.boot) {
        (InstanceState::Running, Some(BootVerdict::Ready)) => "ready",
        (InstanceState::Running, Some(BootVerdict::Degraded { .. })) => "degraded",
        (InstanceState::Running, Some(BootVerdict::Failed { .. })) => "failed",
        (InstanceState::Running, None) => "booting",
        (InstanceState::Pending, _) => "starting",
        (InstanceState::Stopping | InstanceState::Stopped, _) => "-",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_to_publish_are_read() {
        let show = |text: &str| text.parse::<PublishedPort>().map(|p| p.to_string());
        assert_eq!(show("8080:80").as_deref(), Ok("127.0.0.1:8080:80"));
        assert_eq!(show("0.0.0.0:8080:80").as_deref(), Ok("0.0.0.0:8080:80"));
        assert_eq!(show("[::1]:8080:80").as_deref(), Ok("[::1]:8080:80"));
        for text in ["80", "0:80", "a:80", "99999:80", "x:1:2", ""] {
            assert!(show(text).unwrap_err().contains("HOST:GUEST"), "{text}");
        }
    }
}
