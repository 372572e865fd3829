//! The installed QEMU: it must take the command lines, speak QMP and end as asked. Always emulated, never KVM.
//!
//! These tests fail, and say what to install, on a machine without QEMU.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::time::Duration;

use bulbil_vm::qemu::{create_uefi_vars, find_ovmf, find_qemu};
use bulbil_vm::{
    Accelerator, ConsoleParser, Disk, DiskSource, ExitReason, Firmware, InstanceSpec, Nic, Paths, QemuBinary,
    QemuCommand, QemuProcess, Qmp, QmpEvent, QmpEventKind, QmpSeen, Smbios, SocketRole, UefiFirmware, exit_reason,
    qemu_argv,
};
use serde_json::{Value, json};
use tokio::sync::broadcast;

/// For a machine with twenty other things to do.
const LIMIT: Duration = Duration::from_secs(60);

fn spec(folder: &Path, qemu: &QemuBinary) -> InstanceSpec {
    InstanceSpec {
        name: "test, one".into(),
        id: "i-0123456789abcdef0".parse().unwrap(),
        cpus: 2,
        memory_bytes: 64 << 20,
        accelerator: Accelerator::Tcg,
        firmware: Firmware::Bios,
        uuid: "ec2e1916-0000-4000-8000-123456789abc".into(),
        smbios: vec![
            Smbios::new(0, [("vendor", "Amazon EC2"), ("version", "1.0")]),
            Smbios::new(1, [("manufacturer", "Amazon EC2"), ("serial", "a,b")]),
            Smbios::new(3, [("asset", "Amazon EC2")]),
        ],
        disks: vec![],
        seed_iso: None,
        nic: Some(Nic {
            mac: "52:54:00:12:34:56".into(),
            socket: folder.join("net.sock"),
            mtu: 1500,
            role: SocketRole::Listen,
        }),
        hotplug_ports: 12,
        paths: Paths {
            serial_log: folder.join("serial.log"),
            console_socket: folder.join("console.sock"),
            qmp_socket: folder.join("qmp.sock"),
            pid_file: folder.join("qemu.pid"),
            guest_agent_socket: Some(folder.join("agent.sock")),
        },
        sandbox: qemu.sandbox,
        start_paused: true,
    }
}

async fn qemu() -> QemuBinary {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = find_qemu(None, &path).expect("these tests need QEMU");
    QemuBinary::probe(&program).await.expect("these tests need a supported QEMU")
}

struct Machine {
    process: QemuProcess,
    qmp: Qmp,
    events: broadcast::Receiver<QmpEvent>,
}

async fn spawn(spec: &InstanceSpec, qemu: &QemuBinary, folder: &Path) -> QemuProcess {
    let argv = qemu_argv(spec, &qemu.version).unwrap();
    let stderr_log = folder.join("qemu.log");
    let command = QemuCommand { program: qemu.path.clone(), argv, stderr_log, environment: vec![] };
    QemuProcess::spawn(command).await.unwrap()
}

async fn start(spec: &InstanceSpec, qemu: &QemuBinary, folder: &Path) -> Machine {
    let process = spawn(spec, qemu, folder).await;
    let (qmp, events) = tokio::select! {
        connected = Qmp::connect(&spec.paths.qmp_socket, LIMIT) => connected.unwrap(),
        ended = process.wait() => panic!("QEMU ended: {ended:?}"),
    };
    Machine { process, qmp, events }
}

impl Machine {
    async fn reason(mut self) -> ExitReason {
        let ended = tokio::time::timeout(LIMIT, self.process.wait()).await.expect("QEMU ends");
        let mut seen = QmpSeen { connected: true, ..QmpSeen::default() };
        self.qmp.closed().await;
        while let Ok(event) = self.events.try_recv() {
            seen.observe(&event);
        }
        exit_reason(ended.status, &seen, &ended.stderr_tail)
    }

    async fn event(&mut self, wanted: impl Fn(&QmpEventKind) -> bool) {
        let find = async { while !wanted(&self.events.recv().await.unwrap().kind) {} };
        tokio::time::timeout(LIMIT, find).await.expect("the event comes");
    }
}

#[tokio::test]
async fn qemu_takes_the_command_line_and_obeys_qmp() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let spec = spec(folder.path(), &qemu);
    let mut machine = start(&spec, &qemu, folder.path()).await;
    let pid = std::fs::read_to_string(&spec.paths.pid_file).unwrap();
    assert_eq!(pid.trim(), machine.process.pid().to_string());
    assert_eq!(machine.qmp.query_status().await.unwrap().status, "prelaunch");
    machine.qmp.cont().await.unwrap();
    machine.event(|kind| *kind == QmpEventKind::Resume).await;
    machine.qmp.stop().await.unwrap();
    machine.event(|kind| *kind == QmpEventKind::Stop).await;
    assert!(!machine.qmp.query_status().await.unwrap().running);
    machine.qmp.cont().await.unwrap();
    machine.qmp.system_reset().await.unwrap();
    machine.event(|kind| matches!(kind, QmpEventKind::Reset { guest: false, .. })).await;
    machine.qmp.system_powerdown().await.unwrap();
    machine.event(|kind| *kind == QmpEventKind::Powerdown).await;
    let error = machine.qmp.execute("no-such-command", Value::Null).await.unwrap_err().to_string();
    assert!(error.contains("CommandNotFound"), "{error}");
    let name = machine.qmp.execute("query-name", Value::Null).await.unwrap();
    assert_eq!(name, json!({"name": "test, one"}));
    machine.qmp.quit().await.unwrap();
    assert_eq!(machine.reason().await, ExitReason::StoppedByHost { by: "host-qmp-quit".into() });
}

#[tokio::test]
async fn a_killed_qemu_is_reported_as_killed() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let spec = spec(folder.path(), &qemu);
    let machine = start(&spec, &qemu, folder.path()).await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(machine.process.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let reason = machine.reason().await;
    assert!(matches!(reason, ExitReason::Killed { signal: 9, .. }), "{reason:?}");
    assert!(reason.to_string().starts_with("QEMU was killed by signal 9 (SIGKILL)"), "{reason}");
    // What it leaves behind must not stop the next start.
    let machine = start(&spec, &qemu, folder.path()).await;
    machine.process.terminate();
    assert_eq!(machine.reason().await, ExitReason::StoppedByHost { by: "host-signal".into() });
}

#[tokio::test]
async fn a_missing_seed_fails_the_start_with_qemus_own_words() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let seed_iso = Some(folder.path().join("no-such-seed.iso"));
    let spec = InstanceSpec { seed_iso, ..spec(folder.path(), &qemu) };
    let process = spawn(&spec, &qemu, folder.path()).await;
    let ended = tokio::time::timeout(LIMIT, process.wait()).await.unwrap();
    let reason = exit_reason(ended.status, &QmpSeen::default(), &ended.stderr_tail);
    assert!(matches!(reason, ExitReason::FailedToStart { code: 1, .. }), "{reason:?}");
    assert!(reason.to_string().contains("no-such-seed.iso"), "{reason}");
}

/// The firmware must speak on the serial port, or a disk that does not boot is a silent one.
#[tokio::test]
async fn a_machine_without_a_boot_disk_says_so_on_the_console() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let spec = InstanceSpec { start_paused: false, ..spec(folder.path(), &qemu) };
    let machine = start(&spec, &qemu, folder.path()).await;
    let log = spec.paths.serial_log.clone();
    let no_boot = async {
        loop {
            let events = ConsoleParser::new().push(&std::fs::read(&log).unwrap_or_default());
            if let Some(bulbil_vm::ConsoleEvent::Failure(failure)) = events.last() {
                break failure.cause.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let cause = tokio::time::timeout(LIMIT, no_boot).await.expect("the firmware gives up");
    assert_eq!(cause, "the firmware found no disk it can start from");
    machine.qmp.quit().await.unwrap();
    machine.reason().await;
}

#[tokio::test]
async fn uefi_starts_from_its_own_variable_store() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let template = find_ovmf().expect("this test needs OVMF");
    let vars = folder.path().join("vars.fd");
    create_uefi_vars(&template.vars, &vars).unwrap();
    let firmware = Firmware::Uefi(UefiFirmware { code: template.code, vars });
    let spec = InstanceSpec { firmware, ..spec(folder.path(), &qemu) };
    let machine = start(&spec, &qemu, folder.path()).await;
    let nodes = machine.qmp.execute("query-named-block-nodes", Value::Null).await.unwrap();
    let names: Vec<&str> = nodes.as_array().unwrap().iter().filter_map(|node| node["node-name"].as_str()).collect();
    assert!(names.contains(&"uefi-code") && names.contains(&"uefi-vars"), "{names:?}");
    machine.qmp.quit().await.unwrap();
    machine.reason().await;
}

/// A disk server that is not there: QEMU must wait for it, not give up at once, and then say what it missed.
#[tokio::test]
async fn an_nbd_disk_is_looked_for_at_its_socket() {
    let (folder, qemu) = (tempfile::tempdir().unwrap(), qemu().await);
    let socket = folder.path().join("disk.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let disk = Disk {
        node: "disk0".into(),
        source: DiskSource::Nbd { socket, export: String::new() },
        serial: "vol0123456789abcdef0".into(),
        read_only: false,
        boot_index: Some(0),
    };
    let spec = InstanceSpec { disks: vec![disk], ..spec(folder.path(), &qemu) };
    let process = spawn(&spec, &qemu, folder.path()).await;
    tokio::select! {
        accepted = listener.accept() => drop(accepted.unwrap()),
        ended = process.wait() => panic!("QEMU did not even connect: {ended:?}"),
    }
    process.kill();
    process.wait().await;
}
