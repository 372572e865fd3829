//! Applies a sandbox by the means of Linux: resource limits, Landlock, seccomp.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use super::{Directory, LandlockLevel, MAX_ADDRESS_SPACE_BYTES, Sandbox, SandboxError, SandboxReport, system_calls};

/// What may be done with files below a readable directory.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// What may be done with files below a writable directory: regular files only, and none is run.
const WRITE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | Truncate | MakeReg | RemoveFile});

/// What Landlock learned after its first version, by the version and the kernel that has it.
const LATER_RULES: &[(ABI, &str)] = &[
    (ABI::V3, "rules about truncating files (Linux 6.2)"),
    (ABI::V4, "rules about TCP (Linux 6.7)"),
    (ABI::V5, "rules about devices (Linux 6.10)"),
    (ABI::V6, "rules about signals and abstract sockets (Linux 6.12)"),
];

pub(super) fn enforce(sandbox: Sandbox) -> Result<SandboxReport, SandboxError> {
    check_single_thread()?;
    let mut missing = Vec::new();
    let opens = system_calls::Opens::of(!sandbox.readable.is_empty(), !sandbox.writable.is_empty());
    let limits = Limits::of(&sandbox);
    let landlock = restrict_paths(open_all(sandbox.readable)?, open_all(sandbox.writable)?, &mut missing);
    // After that, as a process may be given more descriptors than it may open, and Landlock takes one more.
    limits.apply(&mut missing);
    let seccomp = system_calls::restrict(opens).map_err(|reason| missing.push(reason)).is_ok();
    Ok(SandboxReport { landlock, seccomp, missing })
}

/// Landlock restricts the calling thread and those it starts, so there may be no other.
fn check_single_thread() -> Result<(), SandboxError> {
    // Where /proc is not mounted, the caller's word has to do.
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 { Err(SandboxError::Threads { threads }) } else { Ok(()) }
}

/// What the process may take of the host.
struct Limits {
    max_files: u64,
    max_file_bytes: Option<u64>,
}

impl Limits {
    fn of(sandbox: &Sandbox) -> Self {
        Self { max_files: sandbox.max_files(), max_file_bytes: sandbox.max_file_bytes }
    }

    fn apply(self, missing: &mut Vec<String>) {
        let limits = [
            (Resource::As, Some(MAX_ADDRESS_SPACE_BYTES), "of memory"),
            (Resource::Nofile, Some(self.max_files), "of open files"),
            (Resource::Core, Some(0), "of core dumps"),
            (Resource::Fsize, self.max_file_bytes, "of a file's length"),
        ];
        for (resource, wanted, name) in limits {
            if let Some(Err(error)) = wanted.map(|wanted| lower(resource, wanted)) {
                missing.push(format!("the limit {name}: {error}"));
            }
        }
        // Nor to a program that takes cores through a pipe, for which the limit does not count.
        if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
            missing.push(format!("refusing core dumps: {error}"));
        }
    }
}

/// Sets a limit; one that is lower already stays.
fn lower(resource: Resource, wanted: u64) -> rustix::io::Result<()> {
    let now = rustix::process::getrlimit(resource);
    let lowered = now.current.into_iter().chain(now.maximum).fold(wanted, u64::min);
    rustix::process::setrlimit(resource, Rlimit { current: Some(lowered), maximum: Some(lowered) })
}

fn open_all(directories: Vec<Directory>) -> Result<Vec<OwnedFd>, SandboxError> {
    let open = |directory| match directory {
        Directory::Open(fd) => Ok(fd),
        Directory::Path(path) => {
            open_directory(&path).map_err(|source| SandboxError::Directory { path, source: source.into() })
        }
    };
    directories.into_iter().map(open).collect()
}

fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn restrict_paths(readable: Vec<OwnedFd>, writable: Vec<OwnedFd>, missing: &mut Vec<String>) -> LandlockLevel {
    let restricted = match try_restrict_paths(&readable, &writable) {
        Ok(restricted) => restricted,
        Err(error) => {
            missing.push(format!("Landlock: {error}"));
            return LandlockLevel::None;
        }
    };
    match (restricted.ruleset, restricted.landlock) {
        (RulesetStatus::FullyEnforced, _) => LandlockLevel::Enforced,
        (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
            let later = LATER_RULES.iter().filter(|(abi, _)| *abi > effective_abi);
            missing.extend(later.map(|(_, rules)| format!("Landlock has no {rules}")));
            LandlockLevel::Partly
        }
        (_, status) => {
            missing.push(match status {
                LandlockStatus::NotEnabled => {
                    "Landlock is switched off on this host (kernel parameter `lsm=`)".to_owned()
                }
                _ => "Landlock is not in this kernel (Linux 5.13 and later can have it)".to_owned(),
            });
            LandlockLevel::None
        }
    }
}

/// Denies everything the kernel knows of, as of version 6, but the given directories.
fn try_restrict_paths(readable: &[OwnedFd], writable: &[OwnedFd]) -> Result<RestrictionStatus, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(rules(readable, READ))?
        .add_rules(rules(writable, WRITE))?;
    ruleset.restrict_self()
}

fn rules(
    directories: &[OwnedFd],
    access: BitFlags<AccessFs>,
) -> impl Iterator<Item = Result<PathBeneath<BorrowedFd<'_>>, RulesetError>> {
    directories.iter().map(move |fd| Ok(PathBeneath::new(fd.as_fd(), access)))
}
