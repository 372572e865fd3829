//! The least rights a process needs that parses somebody else's disk image.
//!
//! ```text
//! open files, connect ──► Sandbox::apply ──► parse, start threads
//!                          │ resource limits          memory, open files, no core, length of a file written
//!                          │ Landlock                 no path but the named directories, no TCP, no signals out
//!                          └ seccomp, all threads     the system calls a reader needs, and no other
//! ```
//!
//! What is open stays usable, so a process that was given everything as descriptors needs no right to open anything.
//! Nothing of this can be undone, and threads and children inherit it.
//!
//! The filter of system calls **lists what is allowed**. A list of what is forbidden would be shorter and would never
//! break a reader, but each new kernel adds calls that such a list does not know (`io_uring` came so). The danger of
//! the other kind of list is that another C library makes another call for the same thing; three rules take it away:
//! a group of calls that do the same is allowed as a whole, in old and new forms; what is refused fails as it would
//! for lack of rights and does not kill, so that a library falls back; and calls younger than the list, with `clone3`,
//! fail as on a kernel that does not have them, which libraries expect.
//!
//! | | with descriptors only | a directory to read | a directory to write |
//! |---|---|---|---|
//! | read, write, seek, map, wait, make threads | yes | yes | yes |
//! | open a file | no | in it, for reading | in it |
//! | create, rename, remove a file | no | no | in it |
//! | ask whether a path exists | yes: `stat` of a descriptor and of a path are one call | yes | yes |
//! | sockets, other processes, `exec`, signals to others, `ptrace`, mounts, BPF, `io_uring`, executable memory | no | no | no |
//!
//! What must be there: the filter of system calls always, since Landlock knows neither sockets (but TCP) nor `fork`.
//! It also refuses to open anything, so it is enough for a process with descriptors only; Landlock then is a second
//! wall. It cannot read paths, so a process that opens files in a directory needs Landlock as well, of any version.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod system_calls;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

#[cfg(target_os = "linux")]
use linux as platform;

/// Address space of a sandboxed process: over five times what the worst image takes to open (`docs/limits.md`).
const MAX_ADDRESS_SPACE_BYTES: u64 = 4 << 30;

/// Descriptors of a process that opens no files by itself.
const MAX_FILES: u64 = 64;

/// Descriptors of a process that opens the extents of split images.
const MAX_FILES_WITH_DIRECTORIES: u64 = 1024;

/// What a process may still do once it is applied. Begins with nothing but what is open already.
#[derive(Debug, Default)]
#[must_use = "nothing is restricted until `apply`"]
pub struct Sandbox {
    readable: Vec<Directory>,
    writable: Vec<Directory>,
    max_file_bytes: Option<u64>,
}

/// A directory that stays reachable, with what lies below it.
#[derive(Debug)]
enum Directory {
    Path(PathBuf),
    Open(OwnedFd),
}

impl Sandbox {
    /// Nothing but the descriptors that are open may be used, in the way they were opened.
    pub fn reader() -> Self {
        Self::default()
    }

    /// Lets files below a directory be opened for reading. It must exist when the sandbox is applied.
    pub fn readable_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.readable.push(Directory::Path(path.into()));
        self
    }

    /// As [`Sandbox::readable_dir`], of an open directory.
    pub fn readable_dir_fd(mut self, directory: OwnedFd) -> Self {
        self.readable.push(Directory::Open(directory));
        self
    }

    /// Lets regular files below a directory be opened, created, renamed within their directory, and removed.
    pub fn writable_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.writable.push(Directory::Path(path.into()));
        self
    }

    /// Bounds the length of every file that is written, in bytes; writing past it ends the process (SIGXFSZ).
    pub fn file_bytes_at_most(mut self, max_bytes: u64) -> Self {
        self.max_file_bytes = Some(max_bytes);
        self
    }

    /// Restricts this process for the rest of its life.
    ///
    /// Call it before the first thread is started and before the first byte of an image is read. `required` says
    /// whether the process must not go on where the platform cannot do enough; otherwise as much as is possible is
    /// done, and a warning is logged.
    ///
    /// # Errors
    /// [`SandboxError::Unavailable`] where `required` is true and the platform cannot do enough;
    /// [`SandboxError::Threads`] when other threads run, [`SandboxError::Directory`] for a directory that cannot be
    /// opened, both in any case. The process then may be restricted in part: it should end.
    pub fn apply(self, required: bool) -> Result<SandboxReport, SandboxError> {
        let needs = if self.has_directories() { Needs::Directories } else { Needs::Descriptors };
        let report = platform::enforce(self)?;
        if is_sufficient(needs, &report) {
            tracing::debug!(%report, "sandboxed");
            return Ok(report);
        }
        if required {
            return Err(SandboxError::Unavailable { missing: report.missing });
        }
        tracing::warn!(missing = report.missing.join("; "), "going on without a sandbox");
        Ok(report)
    }

    fn has_directories(&self) -> bool {
        !self.readable.is_empty() || !self.writable.is_empty()
    }

    fn max_files(&self) -> u64 {
        if self.has_directories() { MAX_FILES_WITH_DIRECTORIES } else { MAX_FILES }
    }
}

/// What the process still has to do by itself, which decides what must hold it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing: all it needs is open.
    Descriptors,
    /// To open files in directories.
    Directories,
}

/// Whether what is enforced holds a process back from everything it does not need.
fn is_sufficient(needs: Needs, report: &SandboxReport) -> bool {
    match needs {
        Needs::Descriptors => report.seccomp,
        Needs::Directories => report.seccomp && report.landlock != LandlockLevel::None,
    }
}

/// How much of the rules about paths, TCP and signals the kernel enforces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LandlockLevel {
    /// All of them.
    Enforced,
    /// Those about paths, and not all of the rest: the kernel is older than 6.12.
    Partly,
    /// None.
    None,
}

/// What holds the process back now.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SandboxReport {
    /// Paths, TCP and signals.
    pub landlock: LandlockLevel,
    /// System calls.
    pub seccomp: bool,
    /// What is not enforced, one phrase each, with the kernel that has it.
    pub missing: Vec<String>,
}

impl fmt::Display for SandboxReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let landlock = match self.landlock {
            LandlockLevel::Enforced => "Landlock",
            LandlockLevel::Partly => "Landlock in part",
            LandlockLevel::None => "no Landlock",
        };
        write!(f, "{}, {landlock}", if self.seccomp { "seccomp" } else { "no seccomp" })?;
        match self.missing.as_slice() {
            [] => Ok(()),
            missing => write!(f, " (missing: {})", missing.join("; ")),
        }
    }
}

/// The process could not be restricted as it has to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The platform cannot do enough.
    #[error("sandbox-unavailable: {}", missing.join("; "))]
    Unavailable {
        /// What is missing, as in [`SandboxReport::missing`].
        missing: Vec<String>,
    },
    /// Other threads run already, and would not be restricted.
    #[error("sandbox-unavailable: {threads} threads run already")]
    Threads {
        /// How many, with the calling one.
        threads: usize,
    },
    /// A directory that is to stay reachable cannot be opened.
    #[error("cannot open the directory `{}`", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl SandboxError {
    /// The word for it, stable between versions.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } | Self::Threads { .. } => "sandbox-unavailable",
            Self::Directory { .. } => "io",
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::{LandlockLevel, Sandbox, SandboxError, SandboxReport};

    /// There is nothing to enforce it with.
    #[expect(clippy::unnecessary_wraps, reason = "as on Linux")]
    pub(super) fn enforce(_sandbox: Sandbox) -> Result<SandboxReport, SandboxError> {
        let missing = vec!["this is not Linux: there is neither seccomp nor Landlock".to_owned()];
        Ok(SandboxReport { landlock: LandlockLevel::None, seccomp: false, missing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(seccomp: bool, landlock: LandlockLevel) -> SandboxReport {
        SandboxReport { landlock, seccomp, missing: Vec::new() }
    }

    #[test]
    fn descriptors_need_the_filter_and_directories_need_landlock_too() {
        use LandlockLevel::{Enforced, None, Partly};
        for landlock in [Enforced, Partly, None] {
            assert!(is_sufficient(Needs::Descriptors, &report(true, landlock)), "{landlock:?}");
            assert!(!is_sufficient(Needs::Descriptors, &report(false, landlock)), "{landlock:?}");
            assert!(!is_sufficient(Needs::Directories, &report(false, landlock)), "{landlock:?}");
        }
        assert!(is_sufficient(Needs::Directories, &report(true, Enforced)));
        assert!(is_sufficient(Needs::Directories, &report(true, Partly)));
        assert!(!is_sufficient(Needs::Directories, &report(true, None)));
    }

    #[test]
    fn a_report_says_what_is_missing() {
        let mut report = report(true, LandlockLevel::Enforced);
        assert_eq!(report.to_string(), "seccomp, Landlock");
        report.landlock = LandlockLevel::None;
        report.missing = vec!["this".to_owned(), "that".to_owned()];
        assert_eq!(report.to_string(), "seccomp, no Landlock (missing: this; that)");
        let error = SandboxError::Unavailable { missing: report.missing };
        assert_eq!(
            (error.code(), error.to_string().as_str()),
            ("sandbox-unavailable", "sandbox-unavailable: this; that")
        );
    }

    #[test]
    fn directories_are_what_changes_the_needs() {
        assert!(!Sandbox::reader().file_bytes_at_most(1).has_directories());
        assert!(Sandbox::reader().readable_dir("/x").has_directories());
        assert!(Sandbox::reader().writable_dir("/x").has_directories());
    }
}
