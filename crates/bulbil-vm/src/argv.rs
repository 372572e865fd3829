//! The command line of QEMU, as a pure function of the specification.
//!
//! Every device has a fixed place on the root bus, so that names the guest derives from places (`enp0s2`) stay when
//! a disk is added, and so that a saved machine finds the same devices again:
//!
//! | slot | device |
//! |---|---|
//! | 0x02 | NIC |
//! | 0x03 | random number generator |
//! | 0x04 | guest agent port |
//! | 0x05 … 0x0d | disks, in order |
//! | 0x0e | seed (behind the disks: Linux names disks in slot order) |
//! | 0x10 … 0x1b | ports for hot plug |
//! | 0x1f | q35's own functions |

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::accel::Accelerator;
use crate::qemu::QemuVersion;
use crate::spec::{Disk, DiskSource, Firmware, InstanceSpec, Nic, Smbios, SocketRole, SpecError, UefiFirmware};

const NIC_SLOT: usize = 0x02;
const RNG_SLOT: usize = 0x03;
const AGENT_SLOT: usize = 0x04;
const FIRST_DISK_SLOT: usize = 0x05;
const SEED_SLOT: usize = 0x0e;
const FIRST_HOTPLUG_SLOT: usize = 0x10;

/// Seconds the guest's requests wait for the disk server to come back before they fail.
const NBD_RECONNECT_S: u32 = 30;

/// Seconds QEMU waits for the disk server at start.
const NBD_OPEN_TIMEOUT_S: u32 = 10;

/// What a QEMU that needs no other program may not do. `spawn=deny` also means that state is saved over file
/// descriptors, never with `exec:`.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The arguments (without the program) that make QEMU run the instance.
///
/// # Errors
/// When [`InstanceSpec::check`] finds something impossible.
pub fn qemu_argv(spec: &InstanceSpec, version: &QemuVersion) -> Result<Vec<OsString>, SpecError> {
    spec.check()?;
    let mut argv = Argv::default();
    identity(&mut argv, spec);
    machine(&mut argv, spec);
    control(&mut argv, spec);
    disks(&mut argv, spec, *version);
    if let Some(seed) = &spec.seed_iso {
        seed_disk(&mut argv, seed);
    }
    if let Some(nic) = &spec.nic {
        network(&mut argv, nic, *version);
    }
    entropy(&mut argv);
    hotplug_ports(&mut argv, spec.hotplug_ports);
    if spec.sandbox {
        argv.option("-sandbox", SANDBOX);
    }
    if spec.start_paused {
        argv.flag("-S");
    }
    Ok(argv.0)
}

fn identity(argv: &mut Argv, spec: &InstanceSpec) {
    argv.flag("-nodefaults");
    argv.flag("-no-user-config");
    argv.option("-display", "none");
    argv.option("-name", Opt::new("guest=").escaped(&spec.name).text(",debug-threads=on"));
    argv.option("-uuid", spec.uuid.as_str());
    for smbios in &spec.smbios {
        argv.option("-smbios", smbios_value(smbios));
    }
}

fn smbios_value(smbios: &Smbios) -> Opt {
    smbios.fields.iter().fold(Opt::new(&format!("type={}", smbios.type_number)), |opt, (key, value)| {
        opt.text(&format!(",{key}=")).escaped(value)
    })
}

fn machine(argv: &mut Argv, spec: &InstanceSpec) {
    // graphics=off makes SeaBIOS write to the serial port: "No bootable device" is then in the log.
    let machine = Opt::new("q35,graphics=off,vmport=off");
    let machine = if has_shared_memory(spec) { shared_memory(argv, spec, machine) } else { machine };
    match &spec.firmware {
        Firmware::Bios => argv.option("-machine", machine),
        Firmware::Uefi(uefi) => {
            uefi_flash(argv, uefi);
            argv.option("-machine", machine.text(",pflash0=uefi-code,pflash1=uefi-vars"));
        }
    }
    match spec.accelerator {
        Accelerator::Kvm => {
            argv.option("-accel", "kvm");
            argv.option("-cpu", "host");
        }
        Accelerator::Tcg => {
            argv.option("-accel", "tcg,thread=multi");
            argv.option("-cpu", "max");
        }
    }
    argv.option("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.cpus).as_str());
    argv.option("-m", format!("size={}M", spec.memory_bytes >> 20).as_str());
    argv.option("-rtc", "base=utc,driftfix=slew");
    argv.option("-boot", "strict=on");
}

/// Whether a server outside QEMU must see the guest's memory. All other machines keep private memory.
fn has_shared_memory(spec: &InstanceSpec) -> bool {
    spec.disks.iter().any(|disk| matches!(disk.source, DiskSource::VhostUser { .. }))
}

fn shared_memory(argv: &mut Argv, spec: &InstanceSpec, machine: Opt) -> Opt {
    let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", spec.memory_bytes >> 20);
    argv.option("-object", memory.as_str());
    machine.text(",memory-backend=memory")
}

fn uefi_flash(argv: &mut Argv, uefi: &UefiFirmware) {
    let code = Opt::new("driver=raw,node-name=uefi-code,read-only=on,file.driver=file,file.filename=");
    argv.option("-blockdev", code.escaped(&uefi.code));
    let vars = Opt::new("driver=raw,node-name=uefi-vars,file.driver=file,file.filename=");
    argv.option("-blockdev", vars.escaped(&uefi.vars));
}

fn control(argv: &mut Argv, spec: &InstanceSpec) {
    let paths = &spec.paths;
    let console = listening_chardev("console", &paths.console_socket).text(",logfile=").escaped(&paths.serial_log);
    argv.option("-chardev", console.text(",logappend=on"));
    argv.option("-serial", "chardev:console");
    argv.option("-chardev", listening_chardev("qmp", &paths.qmp_socket));
    argv.option("-mon", "chardev=qmp,mode=control");
    argv.option("-pidfile", Opt::new("").path(&paths.pid_file));
    if let Some(socket) = &paths.guest_agent_socket {
        argv.option("-chardev", listening_chardev("agent", socket));
        argv.option("-device", format!("virtio-serial-pci,id=agent-bus,addr={AGENT_SLOT:#04x}").as_str());
        argv.option("-device", "virtserialport,bus=agent-bus.0,chardev=agent,name=org.qemu.guest_agent.0");
    }
}

fn listening_chardev(id: &str, socket: &Path) -> Opt {
    Opt::new(&format!("socket,id={id},path=")).escaped(socket).text(",server=on,wait=off")
}

fn disks(argv: &mut Argv, spec: &InstanceSpec, version: QemuVersion) {
    let is_nbd = |disk: &Disk| matches!(disk.source, DiskSource::Nbd { .. });
    // Under emulation the extra thread costs more than it gives: the processors are what is short. A vhost-user disk is
    // served by threads of its server.
    let iothread = spec.accelerator == Accelerator::Kvm && spec.disks.iter().any(is_nbd);
    if iothread {
        argv.option("-object", "iothread,id=disk-io");
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let slot = FIRST_DISK_SLOT + index;
        match &disk.source {
            DiskSource::Nbd { socket, export } => {
                argv.option("-blockdev", nbd_node(disk, socket, export));
                argv.option("-device", disk_device(disk, slot, iothread));
            }
            DiskSource::VhostUser { socket, queues } => {
                let wire = Opt::new(&format!("socket,id={}-wire,path=", disk.node)).escaped(socket);
                argv.option("-chardev", wire.text(vhost_reconnect_option(version)));
                argv.option("-device", vhost_user_device(disk, slot, *queues));
            }
        }
    }
}

/// Every supported version comes back to a disk server by itself; 9.2 gave the option another name.
fn vhost_reconnect_option(version: QemuVersion) -> &'static str {
    if version >= QemuVersion::new(9, 2, 0) { ",reconnect-ms=1000" } else { ",reconnect=1" }
}

/// The serial, the cache and whether it can be written are told by the server.
fn vhost_user_device(disk: &Disk, slot: usize, queues: u16) -> Opt {
    let node = &disk.node;
    let device =
        format!("vhost-user-blk-pci,id={node}-device,chardev={node}-wire,num-queues={queues},addr={slot:#04x}");
    boot_index(Opt::new(&device), disk)
}

fn boot_index(device: Opt, disk: &Disk) -> Opt {
    match disk.boot_index {
        Some(index) => device.text(&format!(",bootindex={index}")),
        None => device,
    }
}

fn nbd_node(disk: &Disk, socket: &Path, export: &str) -> Opt {
    let node = Opt::new(&format!("driver=nbd,node-name={},server.type=unix,server.path=", disk.node)).escaped(socket);
    let node = if export.is_empty() { node } else { node.text(",export=").escaped(export) };
    node.text(&format!(",reconnect-delay={NBD_RECONNECT_S},open-timeout={NBD_OPEN_TIMEOUT_S}"))
        .text(if disk.read_only { ",read-only=on" } else { ",discard=unmap" })
}

/// `write-cache=on` shows the guest a volatile cache, so that it flushes, and each flush goes to the server.
fn disk_device(disk: &Disk, slot: usize, iothread: bool) -> Opt {
    let node = &disk.node;
    let device = Opt::new(&format!("virtio-blk-pci,id={node}-device,drive={node},addr={slot:#04x},serial="));
    let device = device.escaped(&disk.serial).text(",write-cache=on,werror=report,rerror=report");
    let device = boot_index(device, disk);
    if iothread { device.text(",iothread=disk-io") } else { device }
}

fn seed_disk(argv: &mut Argv, seed: &Path) {
    let node = Opt::new("driver=raw,node-name=seed,read-only=on,file.driver=file,file.filename=");
    argv.option("-blockdev", node.escaped(seed));
    argv.option(
        "-device",
        format!("virtio-blk-pci,id=seed-device,drive=seed,addr={SEED_SLOT:#04x},serial=seed").as_str(),
    );
}

fn network(argv: &mut Argv, nic: &Nic, version: QemuVersion) {
    let server = if nic.role == SocketRole::Listen { "on" } else { "off" };
    let wire = Opt::new(&format!("stream,id=net0,server={server},addr.type=unix,addr.path=")).escaped(&nic.socket);
    argv.option("-netdev", wire.text(reconnect_option(nic.role, version)));
    let card = Opt::new(&format!("virtio-net-pci,id=net0-device,netdev=net0,mac={},addr={NIC_SLOT:#04x}", nic.mac));
    let card = if nic.mtu == 1500 { card } else { card.text(&format!(",host_mtu={}", nic.mtu)) };
    // An empty romfile leaves out the network boot program, which nothing here uses.
    argv.option("-device", card.text(",romfile="));
}

/// A connecting end comes back by itself from 8.0 on; 9.2 gave the option another name and 10 dropped the first one.
fn reconnect_option(role: SocketRole, version: QemuVersion) -> &'static str {
    match role {
        SocketRole::Listen => "",
        SocketRole::Connect if version >= QemuVersion::new(9, 2, 0) => ",reconnect-ms=1000",
        SocketRole::Connect if version >= QemuVersion::new(8, 0, 0) => ",reconnect=1",
        SocketRole::Connect => "",
    }
}

fn entropy(argv: &mut Argv) {
    argv.option("-object", "rng-random,id=rng0,filename=/dev/urandom");
    argv.option("-device", format!("virtio-rng-pci,id=rng0-device,rng=rng0,addr={RNG_SLOT:#04x}").as_str());
    argv.option("-device", "vmgenid,id=generation,guid=auto");
}

fn hotplug_ports(argv: &mut Argv, count: u8) {
    for port in 0..usize::from(count) {
        let slot = FIRST_HOTPLUG_SLOT + port;
        let chassis = port + 1;
        let device = format!("pcie-root-port,id=hotplug{port},bus=pcie.0,addr={slot:#04x},chassis={chassis}");
        argv.option("-device", device.as_str());
    }
}

#[derive(Default)]
struct Argv(Vec<OsString>);

impl Argv {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn option(&mut self, name: &str, value: impl Into<Opt>) {
        self.flag(name);
        self.0.push(OsString::from_vec(value.into().0));
    }
}

/// The value of one option. Paths need not be UTF-8.
struct Opt(Vec<u8>);

impl Opt {
    fn new(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }

    fn text(mut self, text: &str) -> Self {
        self.0.extend_from_slice(text.as_bytes());
        self
    }

    fn path(mut self, path: &Path) -> Self {
        self.0.extend_from_slice(path.as_os_str().as_bytes());
        self
    }

    /// Adds a value in which a comma is a comma: QEMU wants it doubled.
    fn escaped(mut self, value: &(impl AsRef<OsStr> + ?Sized)) -> Self {
        for &byte in value.as_ref().as_bytes() {
            if byte == b',' {
                self.0.push(b',');
            }
            self.0.push(byte);
        }
        self
    }
}

impl From<&str> for Opt {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}
