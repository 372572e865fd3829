//! The verdict on a boot, from what happened and when.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use bulbil_vm::boot::CloudInitPresence;
use bulbil_vm::console::CloudInitStage;
use bulbil_vm::{
    BootInput, BootPhase, BootProgress, BootVerdict, CloudInitReport, ConsoleEvent, ExitReason, Expectations,
};

const ALL: Expectations = Expectations { cloud_init: CloudInitPresence::Present, ssh: true, status_report: true };
const CONSOLE_ONLY: Expectations =
    Expectations { cloud_init: CloudInitPresence::Present, ssh: false, status_report: false };
const UNKNOWN: Expectations = Expectations { cloud_init: CloudInitPresence::Unknown, ssh: true, status_report: false };

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn ssh() -> BootInput<'static> {
    BootInput::SshAnswered { banner: "SSH-2.0-OpenSSH_9.2p1".into() }
}

fn finished(datasource: &str) -> BootInput<'static> {
    BootInput::Console(ConsoleEvent::CloudInitFinished {
        datasource: Some(datasource.into()),
        version: "22.4.2".into(),
        uptime_s: None,
    })
}

fn stage(stage: CloudInitStage) -> BootInput<'static> {
    BootInput::Console(ConsoleEvent::CloudInit { stage, version: "22.4.2".into(), uptime_s: None })
}

fn login() -> BootInput<'static> {
    BootInput::Console(ConsoleEvent::LoginPrompt { hostname: "web".into() })
}

fn report() -> CloudInitReport {
    CloudInitReport { done: true, datasource: Some("DataSourceEc2Local".into()), ..CloudInitReport::default() }
}

/// Applies inputs one second apart.
fn run(expect: Expectations, inputs: Vec<BootInput<'_>>) -> BootProgress {
    let mut boot = BootProgress::new(expect);
    for (second, input) in (1..).zip(inputs) {
        boot.apply(Duration::from_secs(second), input);
    }
    boot
}

fn verdict(expect: Expectations, inputs: Vec<BootInput<'_>>) -> Option<BootVerdict> {
    run(expect, inputs).verdict().cloned()
}

fn failure(expect: Expectations, inputs: Vec<BootInput<'_>>) -> (String, Option<String>) {
    match verdict(expect, inputs) {
        Some(BootVerdict::Failed { cause, evidence, .. }) => (cause, evidence),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_real_console_with_ssh_and_report_becomes_ready() {
    let console = fixture("debian-12-quiet.console");
    let boot = run(
        ALL,
        vec![
            BootInput::VolumeReady,
            BootInput::ProcessStarted,
            BootInput::ConsoleBytes(&console),
            ssh(),
            BootInput::CloudInitStatus(report()),
        ],
    );
    assert_eq!(boot.verdict(), Some(&BootVerdict::Ready));
    use BootPhase::*;
    let phases: Vec<BootPhase> = boot.phases().iter().map(|reached| reached.phase).collect();
    let expected = [
        Volume,
        Process,
        Kernel,
        UserSpace,
        CloudInitLocal,
        CloudInitNetwork,
        CloudInitConfig,
        LoginPrompt,
        CloudInitFinal,
        CloudInitFinished,
        Ssh,
        Ready,
    ];
    assert_eq!(phases, expected);
    assert_eq!(boot.phases().last().unwrap().at_ms, 5000);
    assert_eq!(boot.login_user(), Some("debian"));
    assert_eq!(boot.host_keys().len(), 2);
}

#[test]
fn only_new_phases_are_returned() {
    let mut boot = BootProgress::new(ALL);
    let reached = boot.apply(Duration::from_millis(7), BootInput::VolumeReady);
    assert_eq!((reached.len(), reached[0].phase, reached[0].at_ms), (1, BootPhase::Volume, 7));
    assert_eq!(boot.apply(Duration::from_millis(8), BootInput::VolumeReady), []);
}

#[test]
fn failing_modules_on_the_console_degrade() {
    let console = fixture("debian-12-degraded.console");
    let Some(BootVerdict::Degraded { errors }) = verdict(CONSOLE_ONLY, vec![BootInput::ConsoleBytes(&console)]) else {
        panic!("not degraded");
    };
    assert_eq!(errors.len(), 3, "{errors:?}");
}

#[test]
fn the_report_is_believed_before_the_console() {
    let console = fixture("debian-12-degraded.console");
    let reported = CloudInitReport { errors: vec!["timezone".into()], ..report() };
    let inputs = vec![BootInput::ConsoleBytes(&console), ssh(), BootInput::CloudInitStatus(reported)];
    assert_eq!(verdict(ALL, inputs), Some(BootVerdict::Degraded { errors: vec!["timezone".into()] }));
}

#[test]
fn a_report_of_a_running_stage_decides_nothing() {
    let running = CloudInitReport { stage: Some("init".into()), ..CloudInitReport::default() };
    assert_eq!(verdict(ALL, vec![ssh(), BootInput::CloudInitStatus(running)]), None);
}

#[test]
fn finding_no_datasource_degrades() {
    let Some(BootVerdict::Degraded { errors }) = verdict(CONSOLE_ONLY, vec![finished("DataSourceNone")]) else {
        panic!("not degraded");
    };
    assert!(errors[0].contains("no datasource"), "{errors:?}");
}

#[test]
fn an_image_without_cloud_init_is_ready_when_ssh_answers() {
    let absent = Expectations { cloud_init: CloudInitPresence::Absent, ssh: true, status_report: true };
    assert_eq!(verdict(absent, vec![ssh()]), Some(BootVerdict::Ready));
    let no_ssh = Expectations { ssh: false, ..absent };
    assert_eq!(verdict(no_ssh, vec![login()]), Some(BootVerdict::Ready));
}

#[test]
fn an_unknown_image_waits_for_cloud_init_once_it_was_seen() {
    assert_eq!(verdict(UNKNOWN, vec![ssh()]), None);
    assert_eq!(verdict(UNKNOWN, vec![ssh(), login()]), Some(BootVerdict::Ready));
    assert_eq!(verdict(UNKNOWN, vec![ssh(), BootInput::Timeout]), Some(BootVerdict::Ready));
    let seen = || vec![stage(CloudInitStage::Local), ssh(), login()];
    assert_eq!(verdict(UNKNOWN, seen()), None);
    let done = seen().into_iter().chain([finished("DataSourceEc2Local")]).collect();
    assert_eq!(verdict(UNKNOWN, done), Some(BootVerdict::Ready));
}

#[test]
fn blank_disks_and_panics_fail_with_their_line() {
    let console = fixture("seabios-blank-disk.console");
    let (cause, evidence) = failure(ALL, vec![BootInput::ConsoleBytes(&console)]);
    assert_eq!(cause, "the firmware found no disk it can start from");
    assert_eq!(evidence.as_deref(), Some("Boot failed: not a bootable disk"));
    let console = fixture("kernel-panic.console");
    let later = vec![BootInput::ConsoleBytes(&console), ssh(), finished("x"), BootInput::Timeout];
    assert_eq!(failure(ALL, later).0, "the kernel panicked: it found no root file system");
}

#[test]
fn a_failure_has_the_last_lines() {
    let console = fixture("seabios-blank-disk.console");
    let Some(BootVerdict::Failed { last_lines, .. }) = verdict(ALL, vec![BootInput::ConsoleBytes(&console)]) else {
        panic!("not failed");
    };
    assert_eq!(last_lines.first().unwrap(), "SeaBIOS (version 1.16.2-debian-1.16.2-1)");
}

#[test]
fn a_timeout_tells_how_far_the_boot_got() {
    let (cause, _) = failure(ALL, vec![BootInput::ProcessStarted, stage(CloudInitStage::Network), BootInput::Timeout]);
    assert_eq!(cause, "the instance was not ready in time; it got as far as: cloud-init network");
    let (cause, _) = failure(ALL, vec![BootInput::Timeout]);
    assert!(cause.ends_with("as far as: nothing"), "{cause}");
    let (cause, _) = failure(ALL, vec![finished("DataSourceEc2Local"), BootInput::Timeout]);
    assert_eq!(cause, "cloud-init finished, but SSH does not answer");
}

#[test]
fn a_timeout_with_ssh_degrades() {
    let inputs = vec![stage(CloudInitStage::Final), ssh(), BootInput::Timeout];
    let expected = "cloud-init did not finish in time; it got as far as: cloud-init final";
    assert_eq!(verdict(ALL, inputs), Some(BootVerdict::Degraded { errors: vec![expected.into()] }));
    // Only the report is missing: the console will do.
    let inputs = vec![finished("DataSourceEc2Local"), ssh(), BootInput::Timeout];
    assert_eq!(verdict(ALL, inputs), Some(BootVerdict::Ready));
}

#[test]
fn a_process_that_ends_fails_the_boot() {
    let (cause, _) = failure(ALL, vec![BootInput::ProcessExited(ExitReason::GuestPoweredOff)]);
    assert_eq!(cause, "the guest powered off before it was ready");
    let stderr = vec!["one".to_owned(), "Could not open disk".to_owned()];
    let (cause, evidence) = failure(ALL, vec![BootInput::ProcessExited(ExitReason::FailedToStart { code: 1, stderr })]);
    assert_eq!(cause, "QEMU failed to start (exit status 1): Could not open disk");
    assert_eq!(evidence.as_deref(), Some("Could not open disk"));
}

#[test]
fn the_first_verdict_stands() {
    let boot = run(CONSOLE_ONLY, vec![finished("x"), BootInput::ProcessExited(ExitReason::GuestPoweredOff)]);
    assert_eq!(boot.verdict(), Some(&BootVerdict::Ready));
}

#[test]
fn a_restart_on_the_way_is_allowed_and_a_boot_loop_is_not() {
    let boot = b"SeaBIOS (version 1)\r\nGRUB loading.\r\n".as_slice();
    let once = vec![BootInput::ConsoleBytes(boot), ssh(), BootInput::ConsoleBytes(boot), finished("x")];
    // SSH must answer again after the restart.
    let unreported = Expectations { status_report: false, ..ALL };
    assert_eq!(verdict(unreported, once.clone()), None);
    assert_eq!(verdict(unreported, once.into_iter().chain([ssh()]).collect()), Some(BootVerdict::Ready));
    let (cause, _) = failure(ALL, vec![BootInput::ConsoleBytes(boot); 6]);
    assert_eq!(cause, "the guest restarted 5 times without getting ready");
}
