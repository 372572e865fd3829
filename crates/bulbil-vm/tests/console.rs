//! The console parser on output of real guests and on lines written for the purpose.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bulbil_vm::ConsoleEvent::{self, *};
use bulbil_vm::ConsoleParser;
use bulbil_vm::console::{BootFailure, CloudInitStage, FailureKind, FirmwareKind, ProblemKind, plain_text};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn events(bytes: &[u8]) -> Vec<ConsoleEvent> {
    ConsoleParser::new().push(bytes)
}

fn kernel_events(text: &str) -> Vec<ConsoleEvent> {
    let mut events = events(text.as_bytes());
    events.retain(|event| !matches!(event, Kernel { .. } | UserSpace));
    events
}

fn failures(bytes: &[u8]) -> Vec<BootFailure> {
    let failure = |event| if let Failure(failure) = event { Some(failure) } else { None };
    events(bytes).into_iter().filter_map(failure).collect()
}

fn stage(stage: CloudInitStage, uptime_s: f64) -> ConsoleEvent {
    CloudInit { stage, version: "22.4.2".into(), uptime_s: Some(uptime_s) }
}

#[test]
fn a_quiet_debian_12_boots_through_all_stages() {
    let mut events = events(&fixture("debian-12-quiet.console"));
    let keys: Vec<String> = events
        .extract_if(.., |event| matches!(event, SshHostKey { .. }))
        .map(|event| if let SshHostKey { key } = event { key } else { unreachable!() })
        .collect();
    let datasource = Some("DataSourceNoCloud [seed=/dev/vdb][dsmode=net]".to_owned());
    assert_eq!(
        events,
        [
            Kernel { release: None },
            UserSpace,
            stage(CloudInitStage::Local, 22.29),
            stage(CloudInitStage::Network, 31.55),
            stage(CloudInitStage::Config, 42.43),
            LoginPrompt { hostname: "web-1".into() },
            stage(CloudInitStage::Final, 48.53),
            LoginUser { user: "debian".into(), file: "/home/debian/.ssh/authorized_keys".into() },
            CloudInitFinished { datasource, version: "22.4.2".into(), uptime_s: Some(51.60) },
            PoweringOff,
        ]
    );
    assert_eq!(keys.len(), 2, "{keys:?}");
    assert!(keys[0].starts_with("ecdsa-sha2-nistp256 AAAA") && keys[1].starts_with("ssh-ed25519 AAAA"));
}

#[test]
fn a_debian_12_with_failing_modules_shows_firmware_loader_and_warnings() {
    let events = events(&fixture("debian-12-degraded.console"));
    assert_eq!(events[..2], [Firmware { kind: FirmwareKind::SeaBios }, BootLoader]);
    let problems: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Problem { kind: ProblemKind::CloudInitWarning, line } => Some(line.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems[0].contains("util.py[WARNING]: Running module timezone"));
    assert!(problems[1].contains("Failed to run module scripts-user"));
}

#[test]
fn blank_disks_fail_in_either_firmware() {
    let bios = failures(&fixture("seabios-blank-disk.console"));
    assert_eq!(bios.len(), 1);
    assert_eq!(bios[0].kind, FailureKind::NothingToBoot);
    assert_eq!(bios[0].evidence, "Boot failed: not a bootable disk");
    let uefi = failures(&fixture("ovmf-blank-disk.console"));
    assert_eq!(uefi.len(), 1);
    assert_eq!(uefi[0].kind, FailureKind::NothingToBoot);
    assert!(uefi[0].evidence.starts_with("BdsDxe: failed to load Boot0001"), "{}", uefi[0].evidence);
}

#[test]
fn a_kernel_without_root_panics_once() {
    let panic = failures(&fixture("kernel-panic.console"));
    assert_eq!(panic.len(), 1);
    assert_eq!(panic[0].kind, FailureKind::KernelPanic);
    assert_eq!(panic[0].cause, "the kernel panicked: it found no root file system");
    assert!(panic[0].evidence.contains("VFS: Unable to mount root fs"));
    let release = events(&fixture("kernel-panic.console")).into_iter().find(|e| matches!(e, Kernel { .. }));
    assert_eq!(release, Some(Kernel { release: Some("6.1.0-56-cloud-amd64".into()) }));
}

/// Seen with OVMF and no display: GRUB complains, and the guest starts all the same.
#[test]
fn what_the_loader_complained_of_is_not_blamed_for_a_later_failure() {
    let uefi = "BdsDxe: starting Boot0001 \"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x5,0x0)\r\n\
        \x1b[0m\x1b[30m\x1b[47mWelcome to GRUB!\n\r\n\r\x1b[0m\x1b[37m\x1b[40merror: no suitable video mode found.\n\
        \rBooting in blind mode\n\r[   20.529695] systemd[1]: Started.\r\nYou are in emergency mode.\r\n";
    let events = events(uefi.as_bytes());
    let (last, first) = events.split_last().unwrap();
    let kind = FirmwareKind::Uefi;
    assert_eq!(first, [Firmware { kind }, BootLoader, Kernel { release: None }, UserSpace]);
    assert!(matches!(last, Failure(failure) if failure.evidence == "You are in emergency mode."), "{last:?}");
}

/// Every way of cutting must give the same events, also inside escape sequences and characters.
#[test]
fn pieces_of_any_size_give_the_same_events() {
    let names = ["debian-12-quiet", "debian-12-degraded", "seabios-blank-disk", "ovmf-blank-disk", "kernel-panic"];
    for name in names {
        let bytes = fixture(&format!("{name}.console"));
        let whole = events(&bytes);
        for size in [1, 2, 3, 7, 64, 1000] {
            let mut parser = ConsoleParser::new();
            let pieces: Vec<ConsoleEvent> = bytes.chunks(size).flat_map(|piece| parser.push(piece)).collect();
            assert_eq!(pieces, whole, "{name} in pieces of {size}");
        }
    }
}

#[test]
fn newer_cloud_init_speaks_the_same_words() {
    let text = "cloud-init[500]: Cloud-init v. 25.1.4-0ubuntu0~24.04.1 running 'init-local' at Tue, 01 Jul 2025 10:00:00 +0000. Up 5.04 seconds.\r\n\
        cloud-init[500]: Cloud-init v. 26.2 finished at Tue, 01 Jul 2025 10:00:20 +0000. Datasource DataSourceEc2Local.  Up 20.11 seconds\r\n\
        cloud-init[500]: 2025-07-01 10:00:00,000 - schema.py[DEPRECATED]: The value is deprecated\r\n";
    assert_eq!(
        kernel_events(text),
        [
            CloudInit { stage: CloudInitStage::Local, version: "25.1.4-0ubuntu0~24.04.1".into(), uptime_s: Some(5.04) },
            CloudInitFinished {
                datasource: Some("DataSourceEc2Local".into()),
                version: "26.2".into(),
                uptime_s: Some(20.11)
            },
            Problem {
                kind: ProblemKind::Deprecation,
                line: "2025-07-01 10:00:00,000 - schema.py[DEPRECATED]: The value is deprecated".into()
            },
        ]
    );
}

#[test]
fn prompts_are_seen_without_an_end_of_line() {
    assert_eq!(kernel_events("web-1 login: "), [LoginPrompt { hostname: "web-1".into() }]);
    assert_eq!(kernel_events("Last login: Sun Nov 22\n"), []);
    let rescue = failures(b"GRUB loading.\r\nerror: no such partition.\r\nEntering rescue mode...\r\ngrub rescue> ");
    assert_eq!(rescue[0].kind, FailureKind::BootLoader);
    assert_eq!(rescue[0].evidence, "error: no such partition.");
    assert_eq!(failures(b"GRUB loading.\r\ngrub> ")[0].kind, FailureKind::BootLoader);
    let initramfs = failures(b"ALERT!  UUID=1234 does not exist.  Dropping to a shell!\r\n(initramfs) ");
    assert_eq!(initramfs.len(), 1);
    assert_eq!(initramfs[0].kind, FailureKind::RootNotFound);
    assert_eq!(initramfs[0].evidence, "ALERT!  UUID=1234 does not exist.  Dropping to a shell!");
}

#[test]
fn emergency_mode_is_blamed_on_the_line_before() {
    let text = "[\x1b[0;1;31m TIME \x1b[0m] Timed out waiting for device \x1b[0;1;39mdev-vdz.device\x1b[0m.\r\n\
        [\x1b[0;1;38;5;185mDEPEND\x1b[0m] Dependency failed for \x1b[0;1;39mdata.mount\x1b[0m.\r\n\
        You are in emergency mode. After logging in, type \"journalctl -xb\"\r\n";
    let failures = failures(text.as_bytes());
    assert_eq!(failures[0].kind, FailureKind::EmergencyMode);
    assert_eq!(failures[0].evidence, "[DEPEND] Dependency failed for data.mount.");
}

#[test]
fn tracebacks_and_failed_units_are_problems() {
    let text = "cloud-init[9]: Traceback (most recent call last):\r\n\
        cloud-init[9]:   File \"/usr/bin/x\", line 3, in f\r\n\
        cloud-init[9]:     g()\r\n\
        cloud-init[9]: KeyError: 'vpc'\r\n\
        [FAILED] Failed to start cloud-final.service - Execute cloud user/final scripts.\r\n\
        [   31.000001] I/O error, dev vda, sector 2048 op 0x0:(READ)\r\n\
        [   31.000002] Out of memory: Killed process 7 (python3)\r\n";
    let problems: Vec<(ProblemKind, String)> = kernel_events(text)
        .into_iter()
        .map(|event| if let Problem { kind, line } = event { (kind, line) } else { panic!("{event:?}") })
        .collect();
    let kinds: Vec<ProblemKind> = problems.iter().map(|(kind, _)| *kind).collect();
    use ProblemKind::*;
    assert_eq!(kinds, [Traceback, UnitFailed, DiskError, OutOfMemory]);
    assert_eq!(problems[0].1, "KeyError: 'vpc'");
}

#[test]
fn a_timer_panic_says_what_to_do() {
    let failures =
        failures(b"[    0.1] Kernel panic - not syncing: IO-APIC + timer doesn't work! Boot with apic=debug\r\n");
    assert!(failures[0].cause.ends_with("start it again"), "{}", failures[0].cause);
}

#[test]
fn a_restart_is_told_and_lets_events_come_again() {
    let boot = b"SeaBIOS (version 1)\r\nGRUB loading.\r\n[    0.000000] Linux version 6.1 (x)\r\n";
    let once = [Firmware { kind: FirmwareKind::SeaBios }, BootLoader, Kernel { release: Some("6.1".into()) }];
    let twice: Vec<ConsoleEvent> = once.iter().cloned().chain([Restarted]).chain(once.iter().cloned()).collect();
    assert_eq!(events(&[boot.as_slice(), boot].concat()), twice);
}

#[test]
fn users_and_keys_that_could_be_options_or_commands_are_ignored() {
    assert_eq!(kernel_events("ci-info: ++Authorized keys from /x for user -oProxyCommand=x++\n"), []);
    assert_eq!(kernel_events("ci-info: ++Authorized keys from /x for user a b++\n"), []);
    let block =
        "-----BEGIN SSH HOST KEY KEYS-----\nssh-ed25519 not/base64!\nrm -rf /\n-----END SSH HOST KEY KEYS-----\n";
    assert_eq!(kernel_events(block), []);
    assert_eq!(
        kernel_events("ci-info: no authorized SSH keys fingerprints found for user debian.\n"),
        [NoAuthorizedKeys { user: "debian".into() }]
    );
}

#[test]
fn lines_history_and_escape_sequences_are_bounded() {
    let mut parser = ConsoleParser::new();
    for _ in 0..100 {
        assert_eq!(parser.push(&[b'x'; 64 * 1024]), []);
    }
    assert_eq!(parser.last_lines(5).len(), 1);
    assert_eq!(parser.last_lines(1)[0].len(), 4096);
    for _ in 0..1000 {
        parser.push(b"\n");
        parser.push(&[b'y'; 5000]);
    }
    let kept: usize = parser.last_lines(10_000).iter().map(String::len).sum();
    assert!(kept <= 70 * 1024, "{kept}");
    // A title sequence that never ends must not hide what comes later.
    let hidden = [b"\x1b]0;".as_slice(), &[b'z'; 300], b"\r\nweb login: "].concat();
    assert!(kernel_events(std::str::from_utf8(&hidden).unwrap()).contains(&LoginPrompt { hostname: "web".into() }));
}

#[test]
fn last_lines_are_plain_and_have_the_unfinished_one() {
    let mut parser = ConsoleParser::new();
    parser.push(b"one\r\n\x1b[31mtwo\x1b[0m\r\n\r\n\xffthree\x9b\r\nfour");
    assert_eq!(parser.last_lines(2), ["\u{fffd}three\u{fffd}", "four"]);
    assert_eq!(parser.last_lines(0), Vec::<String>::new());
    assert_eq!(parser.last_lines(9).len(), 4);
}

#[test]
fn plain_text_has_no_control_characters() {
    assert_eq!(plain_text("a\x1b[1mb\x1b]0;t\x07c\u{9b}d\te\r\nf"), "abcd e\n\nf");
    assert_eq!(plain_text("\x1b[2J\x1b[01;01Hx"), "\n\nx");
}
