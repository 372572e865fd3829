//! A file system of its own that loses power, mounted so that real code uses it by its real calls.
//!
//! ```text
//! process 1 ── mount 1 ──┐
//! process 2 ── mount 2 ──┼── files: visible │ durable ── loses power: of each name, size and 4 KiB unit what was
//! observer ─── mount 3 ──┘                               synced or any version since, each for itself
//! ```
//! Each process of a machine has a mount of its own, so that one can be killed in the middle of a call: from then
//! on its calls fail, and files that it had open stay so. When the machine loses power, all are.
//!
//! The kernel keeps nothing: every call comes here. Needs `/dev/fuse` and root.

mod disk;
mod filesystem;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

use self::disk::Disk;
use self::filesystem::MountedDisk;
use crate::rng::Rng;

/// What goes wrong, each once in so many operations on average; 0 is never.
#[derive(Debug, Clone, Copy, Default)]
pub struct MountFaults {
    /// What needs space finds none and changes nothing.
    pub no_space: u64,
    /// A read or a write fails and changes nothing.
    pub failed_io: u64,
}

/// A machine with one file system.
#[derive(Debug, Clone)]
pub struct PowerLossMachine {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    disk: Disk,
    processes: Vec<Process>,
    /// Operations left before the power is lost.
    fuse: Option<u64>,
    faults: MountFaults,
    rng: Rng,
    done: BTreeMap<&'static str, u64>,
    operations: u64,
}

/// A process: what it had open before it was killed is of an older generation.
#[derive(Debug, Default)]
struct Process {
    fuse: Option<u64>,
    generation: u64,
    /// Meets neither faults nor the loss of power.
    is_observer: bool,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PowerLossMachine {
    /// Whether its file system can be mounted here; says why it cannot.
    ///
    /// # Panics
    /// If it cannot, and `CI` is set.
    #[must_use]
    #[expect(clippy::print_stderr, reason = "a test says why it does less")]
    pub fn is_possible() -> bool {
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
        let reason = match device {
            Ok(_) if rustix::process::geteuid().is_root() => return true,
            Ok(_) => "mounting needs root".to_owned(),
            Err(error) => format!("/dev/fuse cannot be opened: {error}"),
        };
        assert!(std::env::var_os("CI").is_none(), "needed where CI is set: {reason}");
        eprintln!("without the file system that loses power: {reason}");
        false
    }

    /// A machine with an empty disk.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            disk: Disk::new(),
            processes: Vec::new(),
            fuse: None,
            faults: MountFaults::default(),
            rng: Rng::new(seed),
            done: BTreeMap::new(),
            operations: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Mounts the file system for one more process, on an existing empty directory; an observer meets neither faults
    /// nor the loss of power.
    ///
    /// # Panics
    /// When this machine has no FUSE, or this user may not mount.
    #[must_use]
    pub fn mount(&self, directory: &Path, is_observer: bool) -> PowerLossMount {
        let process = {
            let mut state = lock(&self.state);
            state.processes.push(Process { is_observer, ..Process::default() });
            state.processes.len() - 1
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("power-loss".to_owned()), MountOption::NoAtime];
        config.acl = SessionACL::Owner;
        let session = Session::new(MountedDisk::new(self.clone(), process), directory, &config)
            .expect("this test mounts a file system: it needs /dev/fuse, and root");
        let session = session.spawn().expect("a thread that serves the file system");
        PowerLossMount { machine: self.clone(), process, directory: directory.to_owned(), _session: session }
    }

    /// Lets `operations` more operations of all processes succeed; with the next one the power is lost. One that is lost
    /// stays so until [`lose_power`](Self::lose_power).
    pub fn set_fuse(&self, operations: u64) {
        let fuse = &mut lock(&self.state).fuse;
        if *fuse != Some(0) {
            *fuse = Some(operations);
        }
    }

    /// Makes operations fail by chance from now on.
    pub fn set_faults(&self, faults: MountFaults) {
        lock(&self.state).faults = faults;
    }

    /// Whether the power is lost.
    #[must_use]
    pub fn is_off(&self) -> bool {
        lock(&self.state).fuse == Some(0)
    }

    /// The machine loses power and starts again: what was not synced is there or not.
    pub fn lose_power(&self) {
        let state = &mut *lock(&self.state);
        state.disk.crash(&mut state.rng);
        state.fuse = None;
        for process in &mut state.processes {
            process.fuse = None;
            process.generation += 1;
        }
        *state.done.entry("machine: power lost").or_default() += 1;
    }

    /// What was made to fail, by kind.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.state).done.clone()
    }
}

/// The file system as one process sees it.
#[derive(Debug)]
pub struct PowerLossMount {
    machine: PowerLossMachine,
    process: usize,
    directory: PathBuf,
    _session: BackgroundSession,
}

impl PowerLossMount {
    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Lets `operations` more operations of this process succeed; with the next one it is killed.
    pub fn set_fuse(&self, operations: u64) {
        lock(&self.machine.state).processes[self.process].fuse = Some(operations);
    }

    /// Whether the process was killed.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        let state = lock(&self.machine.state);
        state.fuse == Some(0) || state.processes[self.process].fuse == Some(0)
    }

    /// The process is gone and another one begins: the machine keeps what was written.
    pub fn kill_process(&self) {
        let process = &mut lock(&self.machine.state).processes[self.process];
        process.fuse = None;
        process.generation += 1;
    }
}
