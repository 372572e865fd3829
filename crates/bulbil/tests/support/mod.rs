//! The built `bulbil` over a data directory of its own.

#![allow(dead_code, reason = "each test binary uses its own part")]

#[path = "../../../bulbil-control/tests/support/disks.rs"]
pub(crate) mod disks;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Bounds every wait, so that what hangs fails a test.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something holds.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) command: String,
    /// `None` when a signal ended it.
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn new(command: String, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("bulbil writes UTF-8");
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        Self { command, status: output.status.code(), stdout, stderr }
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.status, Some(0), "{self}");
        self
    }

    /// The one JSON document on standard output.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let ran = self.ok();
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("not one JSON document: {error}: {ran}"))
    }

    #[track_caller]
    pub(crate) fn failed(self) -> Self {
        assert_eq!(self.status, Some(1), "{self}");
        self
    }

    /// Checks an error that comes after lines of a log.
    #[track_caller]
    pub(crate) fn refused_with_log(mut self, says: &[&str]) -> Self {
        let at = self.stderr.find("error: ").unwrap_or_else(|| panic!("no error: {self}"));
        self.stderr = self.stderr.split_off(at);
        self.refused(1, says)
    }

    /// Checks an error as a user meets it: nothing on standard output, `error: …`, nothing only a
    /// programmer understands.
    #[track_caller]
    pub(crate) fn refused(self, status: i32, says: &[&str]) -> Self {
        assert_eq!(self.status, Some(status), "{self}");
        assert_eq!(self.stdout, "", "{self}");
        assert!(self.stderr.starts_with("error: "), "{self}");
        for part in says {
            assert!(self.stderr.contains(part), "expected `{part}` in {self}");
        }
        for inside in ["Os {", "Error {", "Custom {", "Some(", "Err(", "kind: ", "panicked", "::", ".rs:", "\u{1b}"] {
            assert!(!self.stderr.contains(inside), "`{inside}` is for programmers: {self}");
        }
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, status, stdout, stderr } = self;
        write!(f, "`{command}` ended with {status:?}\n--- stdout\n{stdout}--- stderr\n{stderr}---")
    }
}

/// A home directory with a data directory in it; the daemon ends with the value.
pub(crate) struct Home {
    dir: tempfile::TempDir,
    search_path: std::ffi::OsString,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self::with_search_path(std::env::var_os("PATH").unwrap())
    }

    /// A home whose commands, and so whose daemon, see these programs only.
    pub(crate) fn with_programs(programs: &[&str]) -> Self {
        let mut home = Self::with_search_path(std::ffi::OsString::new());
        let folder = home.path("bin");
        std::fs::create_dir(&folder).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        for name in programs {
            let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file());
            let found = found.unwrap_or_else(|| panic!("these tests need `{name}`"));
            std::os::unix::fs::symlink(found, folder.join(name)).unwrap();
        }
        home.search_path = folder.into();
        home
    }

    fn with_search_path(search_path: std::ffi::OsString) -> Self {
        // Not below TMPDIR, which may be too long for sockets.
        let dir = tempfile::Builder::new().prefix("bb-").tempdir_in("/tmp").unwrap();
        Self { dir, search_path }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// Writes a file and returns its path as an argument.
    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        disks::write(&self.path(name), bytes.as_ref());
        self.text_path(name)
    }

    pub(crate) fn text_path(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// A program that meets nothing of the machine's settings.
    pub(crate) fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", &self.search_path).env("HOME", self.dir.path()).env("LC_ALL", "C");
        command.env("BULBIL_DATA_DIR", self.data()).env("BULBIL_ACCEL", "tcg").current_dir(self.dir.path());
        // Tests read disks of running instances over NBD.
        command.env("BULBIL_DISK", "nbd").stdin(Stdio::null());
        command
    }

    pub(crate) fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_bulbil"));
        command.args(args.iter().map(AsRef::as_ref));
        command
    }

    pub(crate) fn run<S: AsRef<str>>(&self, args: &[S]) -> Ran {
        let words: Vec<_> = args.iter().map(AsRef::as_ref).collect();
        Ran::new(format!("bulbil {}", words.join(" ")), self.command(args).output().unwrap())
    }

    #[track_caller]
    pub(crate) fn ok<S: AsRef<str>>(&self, args: &[S]) -> Ran {
        self.run(args).ok()
    }

    /// Runs a command that must succeed and write one JSON document.
    #[track_caller]
    pub(crate) fn json<S: AsRef<str>>(&self, args: &[S]) -> Value {
        let mut args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
        args.extend(["--output", "json"]);
        self.run(&args).json()
    }

    /// Starts a command and goes on.
    pub(crate) fn spawn<S: AsRef<str>>(&self, args: &[S]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    #[track_caller]
    pub(crate) fn assert_no_images(&self) {
        assert_eq!(self.json(&["image", "list"]), serde_json::json!([]));
    }

    /// Everything a command that fails must leave as it was.
    #[track_caller]
    pub(crate) fn state(&self) -> [Value; 3] {
        [self.json(&["image", "list"]), self.json(&["list"]), self.json(&["store", "stats"])]
    }

    /// The processes that serve this data directory.
    pub(crate) fn daemons(&self) -> Vec<u32> {
        let data = self.data();
        let serves = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            words.get(1) == Some(&b"serve".as_slice())
                && words.contains(&std::os::unix::ffi::OsStrExt::as_bytes(data.as_os_str()))
        };
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(serves).collect()
    }

    /// The daemon's process, which must be there.
    #[track_caller]
    pub(crate) fn daemon(&self) -> u32 {
        let text = std::fs::read_to_string(self.data().join("run/daemon.pid")).unwrap();
        text.trim().parse().unwrap()
    }

    #[track_caller]
    pub(crate) fn signal_daemon(&self, signal: rustix::process::Signal) {
        send_signal(self.daemon(), signal);
    }

    /// The socket on which a running instance's disk is served.
    pub(crate) fn disk_socket(&self, instance: &Value) -> PathBuf {
        let data = bulbil_control::DataDir::open(&self.data()).unwrap();
        data.instance(&instance["id"].as_str().unwrap().parse().unwrap()).socket("disk")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if !self.data().join("run").exists() {
            return;
        }
        // Nothing a test started may outlive it, whether or not the test passed.
        if std::fs::read_dir(self.data().join("instances")).is_ok_and(|mut entries| entries.next().is_some()) {
            drop(self.command(&["rm", "--all", "--force"]).output());
        }
        drop(self.command(&["shutdown"]).output());
        let deadline = Instant::now() + PATIENCE;
        while !self.daemons().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A test that failed has said why; a second panic would hide it.
        if !std::thread::panicking() {
            assert_eq!(self.daemons(), [0_u32; 0]);
        }
    }
}

pub(crate) fn send_signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Whether any file lies below a directory.
pub(crate) fn holds_files(directory: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else { return false };
    entries.flatten().any(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => holds_files(&entry.path()),
        kind => kind.is_ok(),
    })
}

/// Checks by `qemu-img` that an image in the home is sound and holds the disk of a raw file.
#[track_caller]
pub(crate) fn assert_same_disk(home: &Home, image: &str, format: &str, raw: &str) {
    let image = home.text_path(image);
    // A format may make a disk larger, never the content.
    let ran = disks::run("qemu-img", &["compare", "-f", format, "-F", "raw", &image, raw]);
    assert!(ran.contains("Images are identical."), "{image}: {ran}");
    let checked = disks::try_run("qemu-img", &["check", "-f", format, &image]);
    // 63: this format has no check.
    assert!(matches!(checked.status.code(), Some(0 | 63)), "{image}: {checked:?}");
}
