//! Chooses what runs the guest's instructions: KVM where it truly works, else emulation.
//!
//! `/dev/kvm` proves nothing. There are machines where it opens, a machine can be created, and then the call that
//! runs the processor never returns. So the questions go from harmless to telling, and the last one is asked by a
//! child process that can be left behind:
//!
//! 1. does the processor have `vmx` or `svm`? (`/proc/cpuinfo`; without them the device is not touched at all)
//! 2. is `/dev/kvm` there, and may this user open it? (`stat`, `access`: nothing is opened)
//! 3. does a guest of one `HLT` run to its end, in a child with a time limit?

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::Access;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

pub use crate::sys::KvmProbeError;

/// How long the child may take: a working KVM needs milliseconds, a busy machine seconds.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

const KVM_DEVICE: &str = "/dev/kvm";

/// Bytes of a failing probe's message that are kept.
const MAX_MESSAGE_BYTES: u64 = 4096;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor itself, through the kernel.
    Kvm,
    /// QEMU's translator: works everywhere, 10 to 50 times slower.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What the user asked for (`BULBIL_ACCEL`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// KVM when it works, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Not one of the accelerators.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown accelerator `{0}`: use `auto`, `kvm`, `tcg`")]
pub struct ParseAccelError(String);

impl FromStr for AccelChoice {
    type Err = ParseAccelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" | "" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => Err(ParseAccelError(other.to_owned())),
        }
    }
}

/// Whether KVM can be used here, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kvm", content = "detail")]
pub enum KvmVerdict {
    /// A guest ran.
    Works,
    /// The processor does not offer virtualisation (or the host hides it).
    NoProcessorSupport,
    /// There is no `/dev/kvm`.
    NoDevice,
    /// This user may not open `/dev/kvm`.
    NotPermitted,
    /// The probe ran and said no.
    Fails(String),
    /// The probe was killed after this many seconds.
    Hangs(u64),
    /// The probe itself could not be run.
    Unknown(String),
}

impl KvmVerdict {
    /// Whether a guest ran.
    #[must_use]
    pub fn works(&self) -> bool {
        *self == Self::Works
    }
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => write!(f, "KVM works"),
            Self::NoProcessorSupport => {
                write!(f, "the processor offers no virtualisation (no vmx or svm in /proc/cpuinfo)")
            }
            Self::NoDevice => write!(f, "there is no /dev/kvm: load the kernel module kvm_intel or kvm_amd"),
            Self::NotPermitted => {
                write!(f, "/dev/kvm may not be opened by this user: add the user to the group kvm and log in again")
            }
            Self::Fails(reason) => write!(f, "KVM does not work: {reason}"),
            Self::Hangs(seconds) => write!(f, "KVM hangs: a guest of one instruction did not end within {seconds} s"),
            Self::Unknown(reason) => write!(f, "KVM could not be tried: {reason}"),
        }
    }
}

/// KVM was demanded and cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use KVM: {0}")]
pub struct NoKvmError(pub KvmVerdict);

/// What is known of KVM before anything is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFacts {
    /// `/proc/cpuinfo` lists `vmx` or `svm`.
    pub processor: bool,
    /// `/dev/kvm` exists.
    pub device: bool,
    /// This user may open it for reading and writing.
    pub permitted: bool,
}

impl HostFacts {
    /// Looks at this machine without opening `/dev/kvm`.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = has_virtualisation_flag(&cpuinfo);
        // Not even looked at where the processor cannot use it.
        let device = processor && Path::new(KVM_DEVICE).exists();
        let permitted = device && rustix::fs::access(KVM_DEVICE, Access::READ_OK | Access::WRITE_OK).is_ok();
        Self { processor, device, permitted }
    }

    /// The verdict, where these facts are enough for one.
    #[must_use]
    pub fn verdict(self) -> Option<KvmVerdict> {
        if !self.processor {
            Some(KvmVerdict::NoProcessorSupport)
        } else if !self.device {
            Some(KvmVerdict::NoDevice)
        } else if !self.permitted {
            Some(KvmVerdict::NotPermitted)
        } else {
            None
        }
    }
}

/// Whether any processor of a `/proc/cpuinfo` text has the flag `vmx` (Intel) or `svm` (AMD).
#[must_use]
pub fn has_virtualisation_flag(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// What to run for a choice and a verdict (`None`: KVM was not asked about).
///
/// # Errors
/// [`NoKvmError`] when KVM was demanded and does not work.
pub fn decide(choice: AccelChoice, verdict: Option<&KvmVerdict>) -> Result<Accelerator, NoKvmError> {
    match (choice, verdict) {
        (AccelChoice::Tcg, _) | (AccelChoice::Auto, None) => Ok(Accelerator::Tcg),
        (_, Some(KvmVerdict::Works)) => Ok(Accelerator::Kvm),
        (AccelChoice::Auto, Some(_)) => Ok(Accelerator::Tcg),
        (AccelChoice::Kvm, Some(verdict)) => Err(NoKvmError(verdict.clone())),
        (AccelChoice::Kvm, None) => Err(NoKvmError(KvmVerdict::Unknown("it was not tried".into()))),
    }
}

/// How to run the probe: normally this program with its hidden command, which calls [`probe_kvm_blocking`] and ends
/// with status 0, or with a message on standard error and any other status.
#[derive(Debug, Clone)]
pub struct ProbeCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// When it counts as hanging ([`PROBE_TIMEOUT`]).
    pub timeout: Duration,
}

/// An accelerator and what was found out about KVM (`None` when emulation was asked for).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detection {
    /// What to run.
    pub accelerator: Accelerator,
    /// Whether KVM works here.
    pub kvm: Option<KvmVerdict>,
}

/// Finds out whether KVM works here, going no further than needed.
pub async fn check_kvm(probe: &ProbeCommand) -> KvmVerdict {
    match HostFacts::of_this_machine().verdict() {
        Some(verdict) => verdict,
        None => probe_in_child(&probe.program, &probe.args, probe.timeout).await,
    }
}

/// Chooses the accelerator for this machine. With [`AccelChoice::Tcg`] nothing is looked at.
///
/// # Errors
/// [`NoKvmError`] when KVM was demanded and does not work.
pub async fn detect_accelerator(choice: AccelChoice, probe: &ProbeCommand) -> Result<Detection, NoKvmError> {
    let kvm = match choice {
        AccelChoice::Tcg => None,
        AccelChoice::Auto | AccelChoice::Kvm => Some(check_kvm(probe).await),
    };
    Ok(Detection { accelerator: decide(choice, kvm.as_ref())?, kvm })
}

/// Runs a probe program and judges KVM by how it ends. A probe that outlives `timeout` is killed; one that cannot be
/// killed (it sleeps inside the kernel) is left to the runtime to reap, and does not hold this up.
pub async fn probe_in_child(program: &Path, args: &[OsString], timeout: Duration) -> KvmVerdict {
    let mut command = tokio::process::Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return KvmVerdict::Unknown(format!("cannot run `{}`: {error}", program.display())),
    };
    let stderr = child.stderr.take();
    let outcome = tokio::time::timeout(timeout, async {
        let message = read_message(stderr).await;
        (child.wait().await, message)
    })
    .await;
    match outcome {
        Ok((Ok(status), _)) if status.success() => KvmVerdict::Works,
        Ok((Ok(status), message)) => {
            KvmVerdict::Fails(message.unwrap_or_else(|| format!("the probe ended with {status}")))
        }
        Ok((Err(error), _)) => KvmVerdict::Unknown(format!("cannot wait for the probe: {error}")),
        // Dropping the child kills it and hands it to tokio's reaper.
        Err(_) => KvmVerdict::Hangs(timeout.as_secs()),
    }
}

/// The last line a probe wrote.
async fn read_message(stderr: Option<tokio::process::ChildStderr>) -> Option<String> {
    let mut bytes = Vec::new();
    let mut stderr = stderr?.take(MAX_MESSAGE_BYTES);
    stderr.read_to_end(&mut bytes).await.ok()?;
    let text = crate::console::plain_text(&String::from_utf8_lossy(&bytes));
    text.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
}

/// Creates a virtual machine with one processor and one page, and runs the instruction `HLT`.
///
/// Blocks for ever where KVM hangs: call it only in a process of its own (see [`ProbeCommand`]).
///
/// # Errors
/// The step that failed, with the kernel's reason.
pub fn probe_kvm_blocking() -> Result<(), KvmProbeError> {
    crate::sys::run_halting_guest()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme svm sse4_2\nbugs\t\t: none\n";

    fn shell(script: &str) -> Vec<OsString> {
        vec!["-c".into(), script.into()]
    }

    async fn probe(script: &str, timeout: Duration) -> KvmVerdict {
        probe_in_child(Path::new("/bin/sh"), &shell(script), timeout).await
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(has_virtualisation_flag(AMD));
        assert!(has_virtualisation_flag("flags : fpu vmx\n"));
        assert!(!has_virtualisation_flag("flags : fpu vmx_like\nmodel name : svm\nvmx flags : vnmi\n"));
        assert!(!has_virtualisation_flag(""));
    }

    #[test]
    fn facts_rule_kvm_out_in_order() {
        let facts = |processor, device, permitted| HostFacts { processor, device, permitted }.verdict();
        assert_eq!(facts(false, true, true), Some(KvmVerdict::NoProcessorSupport));
        assert_eq!(facts(true, false, false), Some(KvmVerdict::NoDevice));
        assert_eq!(facts(true, true, false), Some(KvmVerdict::NotPermitted));
        assert_eq!(facts(true, true, true), None);
    }

    #[test]
    fn auto_falls_back_and_kvm_does_not() {
        let hangs = KvmVerdict::Hangs(5);
        assert_eq!(decide(AccelChoice::Auto, Some(&hangs)), Ok(Accelerator::Tcg));
        assert_eq!(decide(AccelChoice::Auto, Some(&KvmVerdict::Works)), Ok(Accelerator::Kvm));
        assert_eq!(decide(AccelChoice::Tcg, Some(&KvmVerdict::Works)), Ok(Accelerator::Tcg));
        let error = decide(AccelChoice::Kvm, Some(&hangs)).unwrap_err().to_string();
        assert_eq!(error, "cannot use KVM: KVM hangs: a guest of one instruction did not end within 5 s");
    }

    #[test]
    fn choices_are_parsed() {
        assert_eq!("auto".parse(), Ok(AccelChoice::Auto));
        assert_eq!("kvm".parse(), Ok(AccelChoice::Kvm));
        assert_eq!("tcg".parse(), Ok(AccelChoice::Tcg));
        assert!("hvf".parse::<AccelChoice>().unwrap_err().to_string().contains("`auto`, `kvm`, `tcg`"));
    }

    #[tokio::test]
    async fn a_probe_that_ends_well_means_kvm_works() {
        assert_eq!(probe("exit 0", Duration::from_secs(20)).await, KvmVerdict::Works);
    }

    #[tokio::test]
    async fn a_failing_probe_gives_its_last_line() {
        let verdict = probe("echo odd >&2; echo 'KVM_CREATE_VM: no' >&2; exit 1", Duration::from_secs(20)).await;
        assert_eq!(verdict, KvmVerdict::Fails("KVM_CREATE_VM: no".into()));
        let silent = probe("exit 7", Duration::from_secs(20)).await;
        assert_eq!(silent, KvmVerdict::Fails("the probe ended with exit status: 7".into()));
    }

    #[tokio::test]
    async fn a_probe_that_hangs_is_killed_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        let script = format!("echo $$ > '{}'; exec sleep 600", pid_file.display());
        // Long enough that the shell has written its id even on a busy machine.
        assert_eq!(probe(&script, Duration::from_secs(2)).await, KvmVerdict::Hangs(2));
        let pid = std::fs::read_to_string(&pid_file).unwrap().trim().parse::<i32>().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        tokio::time::timeout(Duration::from_secs(20), async {
            while rustix::process::test_kill_process(pid).is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("the probe was killed and reaped");
    }

    #[tokio::test]
    async fn a_missing_probe_program_is_not_taken_for_broken_kvm() {
        let verdict = probe_in_child(Path::new("/nonexistent/bulbil"), &[], Duration::from_secs(5)).await;
        assert!(matches!(verdict, KvmVerdict::Unknown(_)), "{verdict}");
    }
}
