//! A data directory of a test's own, and the real `bulbil` on it.

#![allow(dead_code, clippy::print_stdout, clippy::unwrap_used, reason = "tests share it, and may panic and print")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Time for what may take long on a busy machine under emulation.
pub(crate) const LIMIT: Duration = Duration::from_secs(400);

/// A data directory; what runs in it is ended when this is dropped.
pub(crate) struct Bulbil {
    dir: tempfile::TempDir,
}

/// What a command did.
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The output of a command that must have succeeded.
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// The JSON document of a command that must have succeeded.
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }
}

impl Bulbil {
    /// Starts with nothing. The path is short: sockets below it allow 107 bytes.
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("bulbil-").tempdir_in("/tmp").unwrap() }
    }

    pub(crate) fn data_dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulbil"));
        command.args(arguments).env("BULBIL_DATA_DIR", self.dir.path()).env("NO_COLOR", "1").stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran { status: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// Runs a shell script in an instance; the output must be a success's.
    pub(crate) fn sh(&self, instance: &str, script: &str) -> String {
        self.run(&["exec", instance, "--", "sh", "-c", script]).ok().trim_end().to_owned()
    }

    pub(crate) fn show(&self, instance: &str) -> Value {
        self.run(&["show", instance, "-o", "json"]).json()
    }

    pub(crate) fn import(&self, image: &str) {
        self.run(&["image", "import", guest_image(image).to_str().unwrap()]).ok();
    }

    /// Writes a file beside the data and returns its path.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.dir.path().join(name);
        std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), content.as_ref()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        let path = self.dir.path().join("run/daemon.pid");
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Bulbil {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_what_happened();
        }
        self.run(&["rm", "--all", "--force"]);
        self.run(&["shutdown"]);
    }
}

impl Bulbil {
    fn print_what_happened(&self) {
        for entry in std::fs::read_dir(self.dir.path().join("instances")).into_iter().flatten().flatten() {
            for (name, lines) in [("state.json", 200), ("shim.log", 30), ("qemu.log", 30), ("serial.log", 60)] {
                let text = std::fs::read(entry.path().join(name)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                let all: Vec<&str> = text.lines().collect();
                let tail = &all[all.len().saturating_sub(lines)..];
                println!("--- {}/{name}\n{}", entry.path().display(), tail.join("\n"));
            }
        }
    }
}

/// A disk that `cargo xtask guest-image` has built.
pub(crate) fn guest_image(name: &str) -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images");
    let directory = std::env::var_os("BULBIL_TEST_IMAGES").map_or(default, PathBuf::from);
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing: run `cargo xtask test`, which builds guest images first", path.display());
    path
}

/// Waits until `condition` gives something.
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Sends a signal to a process that a test has started.
pub(crate) fn kill(pid: u64, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

pub(crate) fn is_alive(pid: u64) -> bool {
    // A process that has ended but was not waited for yet is not alive.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
