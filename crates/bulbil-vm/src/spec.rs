//! What an instance is made of, before QEMU's words for it.
//!
//! An [`InstanceSpec`] names every device, socket and file of one virtual machine. [`InstanceSpec::check`] refuses
//! what QEMU would refuse late or, worse, accept and shorten (socket paths, disk serials). The command line is made
//! by [`crate::qemu_argv`], which checks first.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bulbil_types::{InstanceId, VolumeId};
use serde::{Deserialize, Serialize};

use crate::accel::Accelerator;

/// Bytes in the longest path of a unix socket: `sun_path` has 108 and the last is a zero.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Bytes of a disk serial that virtio-blk hands to the guest (`VIRTIO_BLK_ID_BYTES`); QEMU cuts longer ones.
pub const MAX_SERIAL_BYTES: usize = 20;

/// Disks that can be given at start; each has its own slot of the root bus (see `argv`).
pub const MAX_DISKS: usize = 9;

/// Free ports that can be reserved for hot plug.
pub const MAX_HOTPLUG_PORTS: u8 = 12;

/// Queues of a vhost-user disk.
pub const MAX_DISK_QUEUES: u16 = 16;

/// Processors QEMU's q35 machine takes without an interrupt remapper.
pub const MAX_CPUS: u32 = 255;

const MIB: u64 = 1 << 20;

/// Everything that makes one virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The user's name for the instance; shown in QEMU's own messages.
    pub name: String,
    /// The instance's id.
    pub id: InstanceId,
    /// Virtual processors, 1 to [`MAX_CPUS`]: one socket with that many cores.
    pub cpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// What starts the first disk.
    pub firmware: Firmware,
    /// SMBIOS system UUID, also the machine-id systemd chooses on a first boot: it must be unique per instance.
    pub uuid: String,
    /// Further SMBIOS strings, in order.
    pub smbios: Vec<Smbios>,
    /// Disks in the order the guest sees them (`vda`, `vdb`, …), at most [`MAX_DISKS`].
    pub disks: Vec<Disk>,
    /// An ISO 9660 or FAT image labelled `cidata` or `config-2`, attached read-only as the last virtio disk.
    pub seed_iso: Option<PathBuf>,
    /// The network card, if any.
    pub nic: Option<Nic>,
    /// Free PCIe ports kept for hot plug, at most [`MAX_HOTPLUG_PORTS`]; q35 can add none later. They are called
    /// `hotplug0`, `hotplug1`, …: give one as `bus` to `device_add`.
    pub hotplug_ports: u8,
    /// Sockets and files that QEMU creates.
    pub paths: Paths,
    /// Whether QEMU confines itself with seccomp ([`crate::QemuBinary::sandbox`] tells whether it can).
    pub sandbox: bool,
    /// Whether the processors wait for `cont` over QMP.
    pub start_paused: bool,
}

/// What starts the first disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS, which comes with QEMU. It reads boot code from the first sector.
    Bios,
    /// OVMF. It reads the EFI system partition and keeps variables.
    Uefi(UefiFirmware),
}

/// The two halves of OVMF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UefiFirmware {
    /// The shared, read-only code.
    pub code: PathBuf,
    /// The instance's own variable store, writable (a copy of the template beside `code`).
    pub vars: PathBuf,
}

/// Strings of one SMBIOS structure, for example type 1 (system) `manufacturer=Amazon EC2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smbios {
    /// The structure: 0 BIOS, 1 system, 2 board, 3 chassis, 11 OEM strings.
    pub type_number: u8,
    /// QEMU's field names (`manufacturer`, `product`, `serial`, `asset`, …) with their values, in order.
    pub fields: Vec<(String, String)>,
}

impl Smbios {
    /// One structure with its fields, in order.
    #[must_use]
    pub fn new<K: Into<String>, V: Into<String>>(type_number: u8, fields: impl IntoIterator<Item = (K, V)>) -> Self {
        Self { type_number, fields: fields.into_iter().map(|(key, value)| (key.into(), value.into())).collect() }
    }
}

/// A virtio-blk disk, as the guest sees it whatever its source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Name of the block node, for QMP (`disk0`); the device is called `<node>-device`.
    pub node: String,
    /// Where the bytes are.
    pub source: DiskSource,
    /// Serial shown to the guest, at most [`MAX_SERIAL_BYTES`] (see [`disk_serial`]).
    pub serial: String,
    /// Whether the guest may write.
    pub read_only: bool,
    /// Place in the boot order, lowest first; firmware does not look at disks without one.
    pub boot_index: Option<u32>,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskSource {
    /// An NBD server on a unix socket. QEMU waits 10 s for it at start, and 30 s when it goes away later, during
    /// which the guest's requests wait; after that they fail with an I/O error.
    Nbd {
        /// The server's socket.
        socket: PathBuf,
        /// Export name; empty is the server's default export.
        #[serde(default)]
        export: String,
    },
    /// A vhost-user-blk server on a unix socket, which shares the guest's memory. It must be there when QEMU starts;
    /// when it goes away later QEMU connects again every second, and the guest's requests wait for as long as it takes.
    /// The serial and whether the disk can be written are the server's to say: those of the [`Disk`] are not used.
    #[serde(rename = "vhost-user")]
    VhostUser {
        /// The server's socket.
        socket: PathBuf,
        /// Queues, 1 to [`MAX_DISK_QUEUES`]: as many as the server has.
        queues: u16,
    },
}

impl DiskSource {
    fn socket(&self) -> &Path {
        match self {
            Self::Nbd { socket, .. } | Self::VhostUser { socket, .. } => socket,
        }
    }
}

/// A virtio-net card whose wire is a unix stream socket (4-byte big-endian length, then the frame).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Hardware address, `52:54:00:12:34:56`.
    pub mac: String,
    /// The socket of the wire.
    pub socket: PathBuf,
    /// Largest packet in bytes, 68 to 65 535; 1500 unless both ends know better.
    pub mtu: u16,
    /// Which end listens.
    pub role: SocketRole,
}

/// Which end of a socket QEMU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketRole {
    /// QEMU listens: the peer may go and come back, in every supported version.
    Listen,
    /// QEMU connects once at start, to a peer that must be there already; from QEMU 8.0 on it connects again after
    /// the peer went away.
    Connect,
}

/// Sockets and files QEMU creates for an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// Everything the guest writes to its serial port, appended over restarts.
    pub serial_log: PathBuf,
    /// The serial port, interactive.
    pub console_socket: PathBuf,
    /// QMP; QEMU serves one client at a time.
    pub qmp_socket: PathBuf,
    /// The process id, written and locked by QEMU, removed when it exits in order.
    pub pid_file: PathBuf,
    /// The guest agent's virtio-serial port, if wanted.
    pub guest_agent_socket: Option<PathBuf>,
}

/// A specification QEMU could not, or not faithfully, carry out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The kernel has no room for the path.
    #[error(
        "{what} path `{path}` has {length} bytes; a unix socket path has at most {MAX_SOCKET_PATH_BYTES}: use a shorter data directory"
    )]
    SocketPathTooLong {
        /// Which socket.
        what: &'static str,
        /// The path.
        path: String,
        /// Its length in bytes.
        length: usize,
    },
    /// A path that cannot stand on a command line.
    #[error("{what} path is empty or contains a zero byte")]
    BadPath {
        /// Which path.
        what: &'static str,
    },
    /// Not 8-4-4-4-12 hexadecimal digits.
    #[error("`{0}` is not a UUID")]
    BadUuid(String),
    /// Not six hexadecimal octets, or a group address.
    #[error("`{0}` is not the hardware address of a network card")]
    BadMac(String),
    /// A number outside what the machine takes.
    #[error("{what} of {value} is not possible: {rule}")]
    OutOfRange {
        /// Which number.
        what: &'static str,
        /// The number asked for.
        value: u64,
        /// What is possible.
        rule: &'static str,
    },
    /// A word with characters that QEMU or the guest would read as something else.
    #[error("{what} `{value}` is not usable: {rule}")]
    BadText {
        /// Which word.
        what: &'static str,
        /// The word.
        value: String,
        /// What is possible.
        rule: &'static str,
    },
}

/// The serial a guest sees for a volume: the id without its dash (`vol0123456789abcdef0`), as on EC2, because the
/// id itself has one byte more than a virtio disk can show.
#[must_use]
pub fn disk_serial(volume: &VolumeId) -> String {
    volume.as_str().replacen('-', "", 1)
}

impl InstanceSpec {
    /// Checks what the command line relies on.
    ///
    /// # Errors
    /// The first thing found to be impossible.
    pub fn check(&self) -> Result<(), SpecError> {
        self.check_machine()?;
        self.check_disks()?;
        self.nic.as_ref().map_or(Ok(()), Nic::check)?;
        self.check_files()?;
        self.sockets().try_for_each(|(what, path)| check_socket_path(what, path))
    }

    fn check_machine(&self) -> Result<(), SpecError> {
        check_range("processor count", self.cpus.into(), 1..=MAX_CPUS.into(), "1 to 255")?;
        let ports = u64::from(self.hotplug_ports);
        check_range("number of hot plug ports", ports, 0..=MAX_HOTPLUG_PORTS.into(), "0 to 12")?;
        if self.memory_bytes == 0 || !self.memory_bytes.is_multiple_of(MIB) {
            let rule = "use a multiple of 1 MiB";
            return Err(SpecError::OutOfRange { what: "memory size", value: self.memory_bytes, rule });
        }
        if !is_uuid(&self.uuid) {
            return Err(SpecError::BadUuid(self.uuid.clone()));
        }
        check_text("name", &self.name)?;
        self.smbios.iter().try_for_each(Smbios::check)
    }

    fn check_disks(&self) -> Result<(), SpecError> {
        if self.disks.len() > MAX_DISKS {
            let value = u64::try_from(self.disks.len()).unwrap_or(u64::MAX);
            let rule = "0 to 9 at start; attach more afterwards";
            return Err(SpecError::OutOfRange { what: "number of disks", value, rule });
        }
        self.disks.iter().try_for_each(Disk::check)
    }

    fn check_files(&self) -> Result<(), SpecError> {
        check_path("serial log", &self.paths.serial_log)?;
        check_path("pid file", &self.paths.pid_file)?;
        self.seed_iso.as_deref().map_or(Ok(()), |path| check_path("seed", path))?;
        match &self.firmware {
            Firmware::Bios => Ok(()),
            Firmware::Uefi(uefi) => {
                check_path("UEFI code", &uefi.code)?;
                check_path("UEFI variables", &uefi.vars)
            }
        }
    }

    fn sockets(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let paths = &self.paths;
        let disks = self.disks.iter().map(|disk| ("disk socket", disk.source.socket()));
        [("console socket", paths.console_socket.as_path()), ("QMP socket", paths.qmp_socket.as_path())]
            .into_iter()
            .chain(paths.guest_agent_socket.as_deref().map(|path| ("guest agent socket", path)))
            .chain(self.nic.as_ref().map(|nic| ("network socket", nic.socket.as_path())))
            .chain(disks)
    }
}

impl Smbios {
    fn check(&self) -> Result<(), SpecError> {
        self.fields.iter().try_for_each(|(key, value)| {
            check_identifier("SMBIOS field", key)?;
            check_text("SMBIOS value", value)
        })
    }
}

impl Disk {
    fn check(&self) -> Result<(), SpecError> {
        check_identifier("disk node name", &self.node)?;
        check_text("disk serial", &self.serial)?;
        if self.serial.len() > MAX_SERIAL_BYTES {
            let rule = "the guest sees 20 bytes";
            return Err(SpecError::BadText { what: "disk serial", value: self.serial.clone(), rule });
        }
        match &self.source {
            DiskSource::Nbd { export, .. } => check_text("export name", export),
            DiskSource::VhostUser { queues, .. } => {
                check_range("number of disk queues", (*queues).into(), 1..=MAX_DISK_QUEUES.into(), "1 to 16")
            }
        }
    }
}

impl Nic {
    fn check(&self) -> Result<(), SpecError> {
        check_range("MTU", self.mtu.into(), 68..=65_535, "68 to 65535 bytes")?;
        if is_unicast_mac(&self.mac) { Ok(()) } else { Err(SpecError::BadMac(self.mac.clone())) }
    }
}

fn check_range(
    what: &'static str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
    rule: &'static str,
) -> Result<(), SpecError> {
    if range.contains(&value) { Ok(()) } else { Err(SpecError::OutOfRange { what, value, rule }) }
}

fn check_text(what: &'static str, value: &str) -> Result<(), SpecError> {
    let rule = "no control characters";
    if value.chars().any(char::is_control) {
        return Err(SpecError::BadText { what, value: value.to_owned(), rule });
    }
    Ok(())
}

/// QEMU's ids begin with a letter and go on with letters, digits, `-`, `.` and `_`.
fn check_identifier(what: &'static str, value: &str) -> Result<(), SpecError> {
    let rule = "begin with a letter, then letters, digits, `-`, `.`, `_`, at most 24 in all";
    let first = value.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
    let rest = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    // Block node names have 31 bytes at most; `-device` is added for the device.
    if first && rest && value.len() <= 24 {
        return Ok(());
    }
    Err(SpecError::BadText { what, value: value.to_owned(), rule })
}

fn check_path(what: &'static str, path: &Path) -> Result<(), SpecError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) { Err(SpecError::BadPath { what }) } else { Ok(()) }
}

/// Checks that the kernel can bind or reach a unix socket at `path`.
///
/// # Errors
/// [`SpecError::SocketPathTooLong`] over [`MAX_SOCKET_PATH_BYTES`], [`SpecError::BadPath`] for no path at all.
pub fn check_socket_path(what: &'static str, path: &Path) -> Result<(), SpecError> {
    check_path(what, path)?;
    let length = byte_len(path.as_os_str());
    if length > MAX_SOCKET_PATH_BYTES {
        return Err(SpecError::SocketPathTooLong { what, path: path.display().to_string(), length });
    }
    Ok(())
}

fn byte_len(text: &OsStr) -> usize {
    text.as_bytes().len()
}

fn is_uuid(text: &str) -> bool {
    let lengths = [8, 4, 4, 4, 12];
    let mut parts = text.split('-');
    lengths.iter().all(|&length| parts.next().is_some_and(|part| is_hex(part, length))) && parts.next().is_none()
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_unicast_mac(text: &str) -> bool {
    let octets: Vec<&str> = text.split(':').collect();
    let group = octets.first().and_then(|octet| u8::from_str_radix(octet, 16).ok()).is_none_or(|octet| octet & 1 == 1);
    octets.len() == 6 && octets.iter().all(|octet| is_hex(octet, 2)) && !group
}
