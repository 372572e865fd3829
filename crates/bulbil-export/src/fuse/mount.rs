//! Mounting, and the handle to what is mounted.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulbil_volume::BlockDevice;
use fuser::{Config, MountOption, Session, SessionACL};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use tracing::{debug, warn};

use super::filesystem::{DiskDirectory, FlushOutcome, MAX_REQUEST_BYTES};
use super::{DISK_FILE_NAME, FuseError};

const FUSE_DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// The helper lets users mount so that root may look as well, which it needs to unmount for them.
const HELPER_SETTINGS: &str = "/etc/fuse.conf";
/// How long a handle that is dropped waits for the device's last flush.
const GRACE: Duration = Duration::from_secs(10);

/// How a device is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseOptions {
    /// What the system's list of mounts shows as the source; characters that could not stand there are replaced.
    pub label: String,
    /// Threads that receive requests.
    pub receivers: usize,
    /// The most threads for requests that may wait.
    pub workers: usize,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self { label: "bulbil".to_owned(), receivers: 2, workers: 16 }
    }
}

/// A mounted device.
///
/// Dropping it unmounts, lazily when the file is in use: what has it open then keeps it as long as the process lives.
/// When the process dies, the directory is unmounted by `fusermount3` where that is installed (and, for others than
/// root, `user_allow_other` is set in `/etc/fuse.conf`).
#[derive(Debug)]
pub struct FuseMount {
    directory: PathBuf,
    /// Tells this mount from another one on the same directory.
    device_id: u64,
    end: Arc<End>,
}

/// Set once when the session has ended.
#[derive(Debug, Default)]
struct End {
    outcome: Mutex<Option<Result<(), io::Error>>>,
    reached: Condvar,
}

impl End {
    fn lock(&self) -> MutexGuard<'_, Option<Result<(), io::Error>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reach(&self, outcome: Result<(), io::Error>) {
        *self.lock() = Some(outcome);
        self.reached.notify_all();
    }

    /// Whether it was reached within `limit`.
    fn wait(&self, limit: Duration) -> bool {
        let waited = self.reached.wait_timeout_while(self.lock(), limit, |outcome| outcome.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_some()
    }
}

impl FuseMount {
    /// Mounts `device` on an empty directory, for this process's user alone, and serves it until it is unmounted here or
    /// by `umount`. When this returns the file is there.
    ///
    /// # Errors
    /// [`FuseError::NoFuse`] and [`FuseError::NoHelper`] when this machine lacks something;
    /// [`FuseError::NotAnEmptyDirectory`], [`FuseError::Stale`] and [`FuseError::Directory`] when the directory does not
    /// do; [`FuseError::Mount`] otherwise.
    pub fn mount(device: Arc<dyn BlockDevice>, directory: &Path, options: &FuseOptions) -> Result<Self, FuseError> {
        let directory = check_directory(directory)?;
        let flushed = FlushOutcome::default();
        let session = open_session(&device, &directory, options, &flushed)?;
        let failed = |source| FuseError::Mount { path: directory.clone(), source };
        let end = Arc::new(End::default());
        let ended = Arc::clone(&end);
        std::thread::Builder::new()
            .name("fuse-session".to_owned())
            .spawn(move || {
                let served = session.run();
                let flushed = flushed.lock().unwrap_or_else(PoisonError::into_inner).take();
                ended.reach(match flushed {
                    Some(error) => Err(io::Error::other(error)),
                    None => served,
                });
            })
            .map_err(failed)?;
        let mounted = std::fs::metadata(&directory).map_err(failed)?;
        read_ahead_more(mounted.dev());
        Ok(Self { device_id: mounted.dev(), directory, end })
    }

    /// The directory, as an absolute path.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file that is the device.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.directory.join(DISK_FILE_NAME)
    }

    /// Waits until the directory is unmounted, here or by someone else, and the device was flushed.
    ///
    /// # Errors
    /// [`FuseError::Served`] when that flush or the connection to the kernel failed.
    pub fn wait(&self) -> Result<(), FuseError> {
        let reached = self.end.reached.wait_while(self.end.lock(), |outcome| outcome.is_none());
        drop(reached.unwrap_or_else(PoisonError::into_inner));
        self.outcome()
    }

    /// Waits at most `limit`; whether it is unmounted.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub fn wait_for(&self, limit: Duration) -> Result<bool, FuseError> {
        if self.end.wait(limit) { self.outcome().map(|()| true) } else { Ok(false) }
    }

    /// Unmounts, and waits until the device was flushed. Nothing happens when it is unmounted already.
    ///
    /// # Errors
    /// [`FuseError::Busy`] when the file is in use, and then it stays mounted; [`FuseError::Unmount`];
    /// [`FuseError::Served`] as for [`wait`](Self::wait).
    pub fn unmount(&self) -> Result<(), FuseError> {
        self.take_away(false)?;
        self.wait()
    }

    /// Takes the directory away at once. Whatever has the file open keeps it, and the device, until it closes the file
    /// or this process ends.
    ///
    /// # Errors
    /// [`FuseError::Unmount`].
    pub fn detach(&self) -> Result<(), FuseError> {
        self.take_away(true)
    }

    fn take_away(&self, lazily: bool) -> Result<(), FuseError> {
        // Asked in any case: the session answers, unless it has ended, and then there is nothing to do.
        let is_there = std::fs::metadata(&self.directory).is_ok_and(|found| found.dev() == self.device_id);
        if !is_there || self.end.lock().is_some() {
            return Ok(());
        }
        let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        match rustix::mount::unmount(&self.directory, flags | UnmountFlags::NOFOLLOW) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(FuseError::Busy { path: self.directory.clone() }),
            Err(Errno::PERM) => self.take_away_by_helper(lazily),
            Err(errno) => Err(FuseError::Unmount { path: self.directory.clone(), source: errno.into() }),
        }
    }

    fn take_away_by_helper(&self, lazily: bool) -> Result<(), FuseError> {
        let path = || self.directory.clone();
        let mut command = Command::new(HELPER);
        command.arg("-u").args(lazily.then_some("-z")).arg("--").arg(&self.directory).stdin(Stdio::null());
        let done = command.output().map_err(|source| FuseError::Unmount { path: path(), source })?;
        if done.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        if said.contains("busy") {
            return Err(FuseError::Busy { path: path() });
        }
        Err(FuseError::Unmount { path: path(), source: io::Error::other(said) })
    }

    fn outcome(&self) -> Result<(), FuseError> {
        match &*self.end.lock() {
            // So ends a receiver that asks for the next request just when the directory is unmounted.
            Some(Err(error)) if error.kind() != io::ErrorKind::ConnectionAborted => {
                let source = io::Error::new(error.kind(), error.to_string());
                Err(FuseError::Served { path: self.directory.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        let taken = match self.take_away(false) {
            Err(FuseError::Busy { path }) => {
                warn!(directory = %path.display(), "the file is in use: it is taken away lazily");
                // What has the file open decides when the session ends.
                return drop(self.detach());
            }
            other => other,
        };
        match taken {
            Ok(()) if self.end.wait(GRACE) => {}
            Ok(()) => warn!(directory = %self.directory.display(), "the file is still being served"),
            Err(error) => warn!(directory = %self.directory.display(), %error, "cannot unmount"),
        }
    }
}

fn check_directory(path: &Path) -> Result<PathBuf, FuseError> {
    let failed = |source: io::Error| match Errno::from_io_error(&source) {
        Some(Errno::NOTCONN) => FuseError::Stale { path: path.to_owned() },
        _ => FuseError::Directory { path: path.to_owned(), source },
    };
    let path = std::fs::canonicalize(path).map_err(failed)?;
    let is_empty = std::fs::metadata(&path).map_err(failed)?.is_dir()
        && std::fs::read_dir(&path).map_err(failed)?.next().is_none();
    if is_empty { Ok(path) } else { Err(FuseError::NotAnEmptyDirectory { path }) }
}

fn open_session(
    device: &Arc<dyn BlockDevice>,
    directory: &Path,
    options: &FuseOptions,
    flushed: &FlushOutcome,
) -> Result<Session<DiskDirectory>, FuseError> {
    let is_root = rustix::process::geteuid().is_root();
    let has_helper = Command::new(HELPER).arg("-V").stdin(Stdio::null()).output().is_ok();
    let opened = OpenOptions::new().read(true).write(true).open(FUSE_DEVICE);
    match opened {
        Err(source) if source.kind() != io::ErrorKind::PermissionDenied => return Err(FuseError::NoFuse { source }),
        Err(source) if is_root || !has_helper => return Err(FuseError::NoFuse { source }),
        _ if !is_root && !has_helper => return Err(FuseError::NoHelper),
        _ => {}
    }
    let new_session = |by_helper: bool| {
        let files = DiskDirectory::new(Arc::clone(device), options.workers, Arc::clone(flushed));
        Session::new(files, directory, &session_config(options, device.is_read_only(), by_helper))
    };
    // The helper stays and unmounts when this process dies.
    let cleans_up = has_helper && (is_root || users_may_let_root_look());
    let session = match new_session(cleans_up) {
        Err(error) if cleans_up => {
            debug!(%error, "cannot mount so that it is unmounted when this process dies");
            new_session(false)
        }
        other => other,
    };
    session.map_err(|source| FuseError::Mount { path: directory.to_owned(), source })
}

fn session_config(options: &FuseOptions, read_only: bool, by_helper: bool) -> Config {
    let is_plain = |c: &char| c.is_ascii_alphanumeric() || "._:-".contains(*c);
    let label = options.label.chars().map(|c| if is_plain(&c) { c } else { '-' }).collect();
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(label),
        MountOption::Subtype("bulbil".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
        MountOption::NoExec,
        if read_only { MountOption::RO } else { MountOption::RW },
    ];
    if by_helper {
        config.mount_options.push(MountOption::AutoUnmount);
        config.acl = SessionACL::RootAndOwner;
    }
    config.n_threads = Some(options.receivers.max(1));
    config.clone_fd = options.receivers > 1;
    config
}

fn users_may_let_root_look() -> bool {
    let settings = std::fs::read_to_string(HELPER_SETTINGS).unwrap_or_default();
    settings.lines().any(|line| line.trim() == "user_allow_other")
}

/// Lets the kernel read ahead as much as one request may hold; by default it is an eighth of that. Only root may, and a
/// sequential reader elsewhere is slower.
fn read_ahead_more(device_id: u64) {
    let (major, minor) = (rustix::fs::major(device_id), rustix::fs::minor(device_id));
    let setting = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"));
    let set = OpenOptions::new().write(true).open(&setting).and_then(|mut file| {
        use io::Write as _;
        file.write_all(format!("{}\n", MAX_REQUEST_BYTES >> 10).as_bytes())
    });
    if let Err(error) = set {
        debug!(%error, setting = %setting.display(), "readahead stays as it is");
    }
}
