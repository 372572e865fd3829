//! From launch to verdict: how far an instance has got, and whether it is ready, degraded or failed.
//!
//! ```text
//!  volume → process → firmware → boot loader → kernel → user space → cloud-init (local, network, config, final,
//!  finished) → login prompt, ssh → Ready | Degraded
//!                └────────── at any time ──────────► Failed
//! ```
//!
//! [`BootProgress`] does no input and has no clock: whoever owns it brings what happened and when. The first verdict
//! stands; what comes later changes nothing.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cloud_init::CloudInitReport;
use crate::console::{BootFailure, CloudInitStage, ConsoleEvent, ConsoleParser, ProblemKind};
use crate::process::ExitReason;

/// Console lines that go with a failure.
const LAST_LINES: usize = 20;

/// Problems kept; the first ones tell most.
const MAX_PROBLEMS: usize = 50;

/// Host keys kept; a restart brings the same ones again.
const MAX_HOST_KEYS: usize = 16;

/// Restarts without getting ready after which nothing better is expected.
const MAX_RESTARTS: u32 = 5;

/// What the caller knows of the image and wants of the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expectations {
    /// Whether the image has cloud-init.
    pub cloud_init: CloudInitPresence,
    /// Whether being ready includes that SSH answers.
    pub ssh: bool,
    /// Whether [`BootInput::CloudInitStatus`] will come (by SSH or the guest agent). When it will, it is awaited and
    /// believed before the console.
    pub status_report: bool,
}

/// Whether an image has cloud-init.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloudInitPresence {
    /// It has: ready means that cloud-init finished.
    Present,
    /// It has not.
    Absent,
    /// Nobody knows: it has if the console shows it.
    Unknown,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum BootInput<'a> {
    /// The disk can be read.
    VolumeReady,
    /// QEMU runs.
    ProcessStarted,
    /// The guest wrote to its console.
    ConsoleBytes(&'a [u8]),
    /// The console told something, to a parser elsewhere.
    Console(ConsoleEvent),
    /// An SSH server answered with its banner.
    SshAnswered {
        /// `SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3`.
        banner: String,
    },
    /// The guest's own report was read.
    CloudInitStatus(CloudInitReport),
    /// Somebody looked inside: the image has no cloud-init.
    NoCloudInit,
    /// QEMU is gone.
    ProcessExited(ExitReason),
    /// The time the caller gives is over.
    Timeout,
}

/// A phase of a boot, in the order they normally come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootPhase {
    /// The disk can be read.
    Volume,
    /// QEMU runs.
    Process,
    /// The firmware spoke.
    Firmware,
    /// The boot loader spoke.
    BootLoader,
    /// The kernel runs.
    Kernel,
    /// The init system runs.
    UserSpace,
    /// cloud-init before the network.
    CloudInitLocal,
    /// cloud-init with metadata.
    CloudInitNetwork,
    /// cloud-init's configuration.
    CloudInitConfig,
    /// cloud-init's last stage: packages and scripts.
    CloudInitFinal,
    /// cloud-init is through.
    CloudInitFinished,
    /// Somebody may log in at the console.
    LoginPrompt,
    /// SSH answers.
    Ssh,
    /// What was expected is there.
    Ready,
}

impl BootPhase {
    /// The phase's name for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Process => "process",
            Self::Firmware => "firmware",
            Self::BootLoader => "boot loader",
            Self::Kernel => "kernel",
            Self::UserSpace => "user space",
            Self::CloudInitLocal => "cloud-init local",
            Self::CloudInitNetwork => "cloud-init network",
            Self::CloudInitConfig => "cloud-init config",
            Self::CloudInitFinal => "cloud-init final",
            Self::CloudInitFinished => "cloud-init finished",
            Self::LoginPrompt => "login prompt",
            Self::Ssh => "ssh",
            Self::Ready => "ready",
        }
    }

    fn is_cloud_init(self) -> bool {
        (Self::CloudInitLocal..=Self::CloudInitFinished).contains(&self)
    }
}

impl fmt::Display for BootPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<CloudInitStage> for BootPhase {
    fn from(stage: CloudInitStage) -> Self {
        match stage {
            CloudInitStage::Local => Self::CloudInitLocal,
            CloudInitStage::Network => Self::CloudInitNetwork,
            CloudInitStage::Config => Self::CloudInitConfig,
            CloudInitStage::Final => Self::CloudInitFinal,
        }
    }
}

/// A phase and when it was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseReached {
    /// The phase.
    pub phase: BootPhase,
    /// Milliseconds since launch.
    pub at_ms: u64,
    /// Kernel release, datasource, SSH banner, where there is one.
    pub detail: Option<String>,
}

/// How a boot ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum BootVerdict {
    /// Everything expected is there.
    Ready,
    /// The instance is up, but something that was asked for did not happen.
    Degraded {
        /// What did not, first things first.
        errors: Vec<String>,
    },
    /// The instance is not up.
    Failed {
        /// Why, in one sentence.
        cause: String,
        /// The line that shows it.
        evidence: Option<String>,
        /// The end of the console.
        last_lines: Vec<String>,
    },
}

/// A boot under observation.
#[derive(Debug)]
pub struct BootProgress {
    expect: Expectations,
    console: ConsoleParser,
    phases: Vec<PhaseReached>,
    verdict: Option<BootVerdict>,
    /// Since the machine last started.
    current: Current,
    restarts: u32,
    problems: Vec<(ProblemKind, String)>,
    host_keys: Vec<String>,
    login_user: Option<String>,
}

#[derive(Debug, Default)]
struct Current {
    reached: Vec<BootPhase>,
    report: Option<CloudInitReport>,
    no_datasource: bool,
}

impl BootProgress {
    /// A boot of which nothing has happened yet.
    #[must_use]
    pub fn new(expect: Expectations) -> Self {
        Self {
            expect,
            console: ConsoleParser::new(),
            phases: Vec::new(),
            verdict: None,
            current: Current::default(),
            restarts: 0,
            problems: Vec::new(),
            host_keys: Vec::new(),
            login_user: None,
        }
    }

    /// Takes what happened `at` this time after launch and gives the phases newly reached.
    pub fn apply(&mut self, at: Duration, input: BootInput<'_>) -> Vec<PhaseReached> {
        let before = self.phases.len();
        // The console is read on after the verdict too: its last lines and keys are wanted.
        if let BootInput::ConsoleBytes(bytes) = input {
            for event in self.console.push(bytes) {
                self.take_console(at, event);
            }
        } else if self.verdict.is_none() {
            self.take(at, input);
        }
        self.phases.iter().skip(before).cloned().collect()
    }

    /// The verdict, once there is one.
    #[must_use]
    pub fn verdict(&self) -> Option<&BootVerdict> {
        self.verdict.as_ref()
    }

    /// All phases reached, in order; after a restart phases come again.
    #[must_use]
    pub fn phases(&self) -> &[PhaseReached] {
        &self.phases
    }

    /// The console as it was fed to this boot.
    #[must_use]
    pub fn console(&self) -> &ConsoleParser {
        &self.console
    }

    /// A user whose SSH keys cloud-init installed, other than root where there is one.
    #[must_use]
    pub fn login_user(&self) -> Option<&str> {
        self.login_user.as_deref()
    }

    /// The host keys the guest printed.
    #[must_use]
    pub fn host_keys(&self) -> &[String] {
        &self.host_keys
    }

    /// What went wrong on the way, by the console.
    #[must_use]
    pub fn problems(&self) -> &[(ProblemKind, String)] {
        &self.problems
    }

    fn take(&mut self, at: Duration, input: BootInput<'_>) {
        match input {
            BootInput::VolumeReady => self.reach(at, BootPhase::Volume, None),
            BootInput::ProcessStarted => self.reach(at, BootPhase::Process, None),
            // Taken by `apply`.
            BootInput::ConsoleBytes(_) => {}
            BootInput::Console(event) => self.take_console(at, event),
            BootInput::SshAnswered { banner } => self.reach(at, BootPhase::Ssh, Some(banner)),
            BootInput::CloudInitStatus(report) => self.take_report(at, report),
            BootInput::NoCloudInit => self.expect.cloud_init = CloudInitPresence::Absent,
            BootInput::ProcessExited(reason) => self.take_exit(&reason),
            BootInput::Timeout => self.take_timeout(at),
        }
        self.settle(at);
    }

    fn take_console(&mut self, at: Duration, event: ConsoleEvent) {
        match event {
            ConsoleEvent::SshHostKey { key } => return self.keep_host_key(key),
            ConsoleEvent::LoginUser { user, .. } => return self.keep_login_user(user),
            _ if self.verdict.is_some() => return,
            ConsoleEvent::Restarted => self.restart(),
            ConsoleEvent::Firmware { .. } => self.reach(at, BootPhase::Firmware, None),
            ConsoleEvent::BootLoader => self.reach(at, BootPhase::BootLoader, None),
            ConsoleEvent::Kernel { release } => self.reach(at, BootPhase::Kernel, release),
            ConsoleEvent::UserSpace => self.reach(at, BootPhase::UserSpace, None),
            ConsoleEvent::CloudInit { stage, .. } => self.reach(at, stage.into(), None),
            ConsoleEvent::CloudInitFinished { datasource, .. } => self.finish_cloud_init(at, datasource),
            ConsoleEvent::LoginPrompt { .. } => self.reach(at, BootPhase::LoginPrompt, None),
            ConsoleEvent::Problem { kind, line } => self.keep_problem(kind, line),
            ConsoleEvent::Failure(failure) => self.fail_boot(failure),
            ConsoleEvent::NoAuthorizedKeys { .. } | ConsoleEvent::PoweringOff => {}
        }
        self.settle(at);
    }

    fn reach(&mut self, at: Duration, phase: BootPhase, detail: Option<String>) {
        if !self.has_reached(phase) {
            self.current.reached.push(phase);
            let at_ms = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
            self.phases.push(PhaseReached { phase, at_ms, detail });
        }
    }

    fn has_reached(&self, phase: BootPhase) -> bool {
        self.current.reached.contains(&phase)
    }

    /// A guest that installs a kernel or grows its disk may restart once or twice on its way.
    fn restart(&mut self) {
        self.current = Current::default();
        self.restarts += 1;
        if self.restarts >= MAX_RESTARTS {
            let cause = format!("the guest restarted {MAX_RESTARTS} times without getting ready");
            self.fail(cause, None);
        }
    }

    fn finish_cloud_init(&mut self, at: Duration, datasource: Option<String>) {
        self.current.no_datasource = datasource.as_deref().is_some_and(|name| name.starts_with("DataSourceNone"));
        self.reach(at, BootPhase::CloudInitFinished, datasource);
    }

    fn take_report(&mut self, at: Duration, report: CloudInitReport) {
        if report.done {
            self.reach(at, BootPhase::CloudInitFinished, report.datasource.clone());
            self.current.report = Some(report);
        }
    }

    fn keep_problem(&mut self, kind: ProblemKind, line: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push((kind, line));
        }
    }

    fn keep_host_key(&mut self, key: String) {
        if self.host_keys.len() < MAX_HOST_KEYS && !self.host_keys.contains(&key) {
            self.host_keys.push(key);
        }
    }

    fn keep_login_user(&mut self, user: String) {
        if self.login_user.is_none() || self.login_user.as_deref() == Some("root") {
            self.login_user = Some(user);
        }
    }

    fn fail_boot(&mut self, failure: BootFailure) {
        self.fail(failure.cause, Some(failure.evidence));
    }

    fn fail(&mut self, cause: String, evidence: Option<String>) {
        let last_lines = self.console.last_lines(LAST_LINES);
        let evidence = evidence.or_else(|| last_lines.last().cloned());
        self.verdict = Some(BootVerdict::Failed { cause, evidence, last_lines });
    }

    fn take_exit(&mut self, reason: &ExitReason) {
        let before = if reason.is_guest_shutdown() { " before it was ready" } else { "" };
        self.fail(format!("{reason}{before}"), reason.stderr().last().cloned());
    }

    /// Gives the verdict when all that was expected is there.
    fn settle(&mut self, at: Duration) {
        if self.verdict.is_none() && self.is_complete() {
            self.conclude(at, Vec::new());
        }
    }

    fn is_complete(&self) -> bool {
        let ssh = !self.expect.ssh || self.has_reached(BootPhase::Ssh);
        let cloud_init = if self.has_cloud_init() {
            let report = !self.expect.status_report || self.current.report.is_some();
            self.has_reached(BootPhase::CloudInitFinished) && report
        } else {
            // Without cloud-init to say so, the prompt tells that the services before it are up. Where nobody knows
            // whether there is cloud-init it must not be ruled out early either: it speaks before the prompt.
            let prompt = self.has_reached(BootPhase::LoginPrompt);
            prompt || (self.expect.ssh && self.expect.cloud_init == CloudInitPresence::Absent)
        };
        ssh && cloud_init
    }

    fn has_cloud_init(&self) -> bool {
        match self.expect.cloud_init {
            CloudInitPresence::Present => true,
            CloudInitPresence::Absent => false,
            CloudInitPresence::Unknown => self.current.reached.iter().any(|phase| phase.is_cloud_init()),
        }
    }

    fn conclude(&mut self, at: Duration, late: Vec<String>) {
        self.reach(at, BootPhase::Ready, None);
        let errors: Vec<String> = late.into_iter().chain(self.errors()).collect();
        self.verdict = Some(if errors.is_empty() { BootVerdict::Ready } else { BootVerdict::Degraded { errors } });
    }

    /// What did not happen: by the guest's own report where there is one, else by the console.
    fn errors(&self) -> Vec<String> {
        let report = self.current.report.as_ref();
        let no_datasource = report.map_or(self.current.no_datasource, CloudInitReport::found_no_datasource);
        let mut errors = Vec::new();
        if no_datasource {
            errors.push("cloud-init found no datasource: no key, no user data and no host name were set".to_owned());
        }
        if let Some(report) = report {
            errors.extend(report.errors.iter().chain(&report.recoverable_errors).cloned());
        }
        let counted = self.problems.iter().filter(|(kind, line)| counts_as_error(*kind, line, report.is_some()));
        errors.extend(counted.map(|(_, line)| line.clone()));
        errors
    }

    fn take_timeout(&mut self, at: Duration) {
        let up =
            if self.expect.ssh { self.has_reached(BootPhase::Ssh) } else { self.has_reached(BootPhase::LoginPrompt) };
        let finished = self.has_reached(BootPhase::CloudInitFinished);
        if up && (finished || !self.has_cloud_init()) {
            self.conclude(at, Vec::new());
        } else if up {
            self.conclude(at, vec![self.unfinished_cloud_init()]);
        } else if finished {
            self.fail("cloud-init finished, but SSH does not answer".to_owned(), None);
        } else {
            let last = self.current.reached.iter().max();
            let phase = last.map_or("nothing", |phase| phase.as_str());
            self.fail(format!("the instance was not ready in time; it got as far as: {phase}"), None);
        }
    }

    fn unfinished_cloud_init(&self) -> String {
        match self.current.reached.iter().filter(|phase| phase.is_cloud_init()).max() {
            Some(phase) => format!("cloud-init did not finish in time; it got as far as: {phase}"),
            None => "cloud-init did not finish in time; the console shows nothing of it".to_owned(),
        }
    }
}

/// What the report tells better is not told twice.
fn counts_as_error(kind: ProblemKind, line: &str, reported: bool) -> bool {
    match kind {
        ProblemKind::Deprecation => false,
        ProblemKind::CloudInitWarning | ProblemKind::CloudInitError | ProblemKind::Traceback => !reported,
        ProblemKind::UnitFailed => !(reported && line.contains("cloud-")),
        ProblemKind::OutOfMemory | ProblemKind::DiskError => true,
    }
}
