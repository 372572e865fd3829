//! The whole command line of typical instances, against golden files: one argument per line.
//!
//! `BULBIL_BLESS=1 cargo test -p bulbil-vm --test argv` writes the files anew; read the difference before keeping it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Write;
use std::path::{Path, PathBuf};

use bulbil_types::InstanceId;
use bulbil_vm::spec::{MAX_SOCKET_PATH_BYTES, disk_serial};
use bulbil_vm::{
    Accelerator, Disk, DiskSource, Firmware, InstanceSpec, Nic, Paths, QemuVersion, Smbios, SocketRole, SpecError,
    UefiFirmware, qemu_argv,
};

const QEMU_7_2: QemuVersion = QemuVersion::new(7, 2, 22);

fn spec() -> InstanceSpec {
    let run = Path::new("/run/bulbil/i-1");
    InstanceSpec {
        name: "web-1".into(),
        id: "i-0123456789abcdef0".parse::<InstanceId>().unwrap(),
        cpus: 2,
        memory_bytes: 1 << 30,
        accelerator: Accelerator::Tcg,
        firmware: Firmware::Bios,
        uuid: "ec2e1916-0000-4000-8000-123456789abc".into(),
        smbios: vec![],
        disks: vec![disk("disk0", "root.sock", "vol0123456789abcdef0", Some(0))],
        seed_iso: None,
        nic: Some(Nic {
            mac: "52:54:00:12:34:56".into(),
            socket: run.join("net.sock"),
            mtu: 1500,
            role: SocketRole::Listen,
        }),
        hotplug_ports: 2,
        paths: Paths {
            serial_log: "/var/lib/bulbil/i-1/serial.log".into(),
            console_socket: run.join("console.sock"),
            qmp_socket: run.join("qmp.sock"),
            pid_file: run.join("qemu.pid"),
            guest_agent_socket: None,
        },
        sandbox: true,
        start_paused: false,
    }
}

fn disk(node: &str, socket: &str, serial: &str, boot_index: Option<u32>) -> Disk {
    Disk {
        node: node.into(),
        source: DiskSource::Nbd { socket: Path::new("/run/bulbil/i-1").join(socket), export: String::new() },
        serial: serial.into(),
        read_only: false,
        boot_index,
    }
}

fn lines(spec: &InstanceSpec, version: QemuVersion) -> String {
    let argv = qemu_argv(spec, &version).unwrap();
    argv.iter().map(|argument| format!("{}\n", argument.to_str().unwrap())).collect()
}

fn check(name: &str, spec: &InstanceSpec, version: QemuVersion) {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/fixtures", &format!("argv-{name}.txt")].iter().collect();
    let actual = lines(spec, version);
    if std::env::var_os("BULBIL_BLESS").is_some() {
        std::fs::File::create(&path).unwrap().write_all(actual.as_bytes()).unwrap();
    }
    assert_eq!(actual, std::fs::read_to_string(&path).unwrap(), "{name}");
}

#[test]
fn bios_instance_that_looks_like_ec2() {
    let mut spec = spec();
    let identity = "ec2e1916-0000-4000-8000-123456789abc";
    spec.smbios = vec![
        Smbios::new(0, [("vendor", "Amazon EC2"), ("version", "1.0")]),
        Smbios::new(1, [("manufacturer", "Amazon EC2"), ("product", "t3.small"), ("serial", identity)]),
        Smbios::new(3, [("manufacturer", "Amazon EC2"), ("asset", "i-0123456789abcdef0")]),
    ];
    check("bios-ec2", &spec, QEMU_7_2);
}

#[test]
fn uefi_instance_that_looks_like_alibaba_cloud() {
    let mut spec = spec();
    let product = ("product", "Alibaba Cloud ECS");
    spec.smbios = vec![Smbios::new(1, [("manufacturer", "Alibaba Cloud"), product])];
    spec.firmware = Firmware::Uefi(UefiFirmware {
        code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
        vars: "/var/lib/bulbil/i-1/vars.fd".into(),
    });
    spec.nic = spec.nic.map(|nic| Nic { role: SocketRole::Connect, mtu: 9000, ..nic });
    spec.paths.guest_agent_socket = Some("/run/bulbil/i-1/agent.sock".into());
    check("uefi-alibaba", &spec, QemuVersion::new(10, 0, 3));
}

#[test]
fn nocloud_instance_with_a_seed_two_disks_and_kvm() {
    let mut spec = spec();
    spec.accelerator = Accelerator::Kvm;
    spec.smbios = vec![Smbios::new(1, [("serial", "ds=nocloud;s=http://169.254.169.254/a,b/")])];
    spec.seed_iso = Some("/var/lib/bulbil/i-1/seed.iso".into());
    spec.disks.push(Disk {
        source: DiskSource::Nbd { socket: "/run/bulbil/i-1/data.sock".into(), export: "vol-2".into() },
        read_only: true,
        ..disk("disk1", "", "vol2", None)
    });
    spec.hotplug_ports = 0;
    spec.nic = None;
    spec.sandbox = false;
    spec.start_paused = true;
    check("bios-nocloud-kvm", &spec, QEMU_7_2);
}

#[test]
fn a_vhost_user_disk_shares_the_memory_and_keeps_its_place() {
    let mut spec = spec();
    spec.firmware = Firmware::Uefi(UefiFirmware { code: "/ovmf/code.fd".into(), vars: "/i-1/vars.fd".into() });
    spec.disks[0].source = DiskSource::VhostUser { socket: "/run/bulbil/i-1/root.sock".into(), queues: 2 };
    check("uefi-vhost-user", &spec, QEMU_7_2);
    let wire = |version| lines(&spec, version).lines().find(|l| l.contains("id=disk0-wire")).unwrap().to_owned();
    assert!(wire(QemuVersion::new(9, 1, 0)).ends_with(",reconnect=1"));
    assert!(wire(QemuVersion::new(9, 2, 0)).ends_with(",reconnect-ms=1000"));
}

#[test]
fn commas_are_doubled_in_values_and_left_alone_in_plain_paths() {
    let mut spec = spec();
    spec.name = "a,b".into();
    spec.paths.qmp_socket = "/run/x,y/qmp".into();
    spec.paths.pid_file = "/run/x,y/pid".into();
    let text = lines(&spec, QEMU_7_2);
    assert!(text.contains("guest=a,,b,debug-threads=on"), "{text}");
    assert!(text.contains("path=/run/x,,y/qmp,server=on"), "{text}");
    assert!(text.contains("\n/run/x,y/pid\n"), "{text}");
}

#[test]
fn a_connecting_nic_reconnects_where_qemu_can() {
    let mut spec = spec();
    spec.nic = spec.nic.map(|nic| Nic { role: SocketRole::Connect, ..nic });
    let netdev = |version| lines(&spec, version).lines().find(|l| l.starts_with("stream,")).unwrap().to_owned();
    assert!(!netdev(QEMU_7_2).contains("reconnect"));
    assert!(netdev(QemuVersion::new(8, 0, 0)).ends_with(",reconnect=1"));
    assert!(netdev(QemuVersion::new(9, 1, 2)).ends_with(",reconnect=1"));
    assert!(netdev(QemuVersion::new(9, 2, 0)).ends_with(",reconnect-ms=1000"));
}

#[test]
fn socket_paths_of_107_bytes_fit_and_longer_ones_are_named() {
    let path = |length: usize| PathBuf::from(format!("/{}", "s".repeat(length - 1)));
    let mut spec = spec();
    spec.paths.qmp_socket = path(MAX_SOCKET_PATH_BYTES);
    spec.check().unwrap();
    spec.paths.qmp_socket = path(MAX_SOCKET_PATH_BYTES + 1);
    let error = qemu_argv(&spec, &QEMU_7_2).unwrap_err();
    assert!(matches!(error, SpecError::SocketPathTooLong { what: "QMP socket", length: 108, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("108 bytes") && text.contains("at most 107"), "{text}");
}

#[test]
fn impossible_specifications_are_refused() {
    let refused = |change: fn(&mut InstanceSpec), expected: &str| {
        let mut spec = spec();
        change(&mut spec);
        let text = spec.check().unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    };
    refused(|s| s.cpus = 0, "processor count of 0");
    refused(|s| s.memory_bytes = (1 << 20) + 1, "multiple of 1 MiB");
    refused(|s| s.memory_bytes = 0, "memory size of 0");
    refused(|s| s.uuid = "not-a-uuid".into(), "`not-a-uuid` is not a UUID");
    refused(|s| s.name = "a\nb".into(), "no control characters");
    refused(|s| s.hotplug_ports = 13, "hot plug ports of 13");
    refused(|s| s.disks[0].serial = "vol-0123456789abcdef0".into(), "the guest sees 20 bytes");
    let no_queues = |s: &mut InstanceSpec| {
        s.disks[0].source = DiskSource::VhostUser { socket: "/run/disk".into(), queues: 0 };
    };
    refused(no_queues, "number of disk queues of 0");
    refused(|s| s.disks[0].node = "a,b".into(), "disk node name `a,b`");
    refused(|s| s.disks = vec![s.disks[0].clone(); 10], "number of disks of 10");
    refused(|s| s.nic.as_mut().unwrap().mac = "53:54:00:00:00:01".into(), "is not the hardware address");
    refused(|s| s.nic.as_mut().unwrap().mac = "52:54:00".into(), "is not the hardware address");
    refused(|s| s.smbios = vec![Smbios::new(1, [("a=b", "c")])], "SMBIOS field `a=b`");
    refused(|s| s.seed_iso = Some(PathBuf::new()), "seed path is empty");
}

#[test]
fn a_specification_survives_json() {
    let spec = spec();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<InstanceSpec>(&text).unwrap(), spec);
}

#[test]
fn the_serial_of_a_volume_fits_a_virtio_disk() {
    let serial = disk_serial(&"vol-0123456789abcdef0".parse().unwrap());
    assert_eq!((serial.as_str(), serial.len()), ("vol0123456789abcdef0", 20));
}
