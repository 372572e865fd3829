//! An S3 server that a test starts: a process of its own, over a directory of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::SystemTime;

use bulbil_store::{RemoteOptions, StoreLocation};
use tempfile::TempDir;

const PACKAGE: &str = "bulbil-s3-testserver";
const BUCKET: &str = "bulbil-test";

/// A running S3 server with one bucket, ended when dropped.
#[derive(Debug)]
pub struct S3Server {
    child: Child,
    endpoint: String,
    directory: TempDir,
}

impl S3Server {
    /// The key that requests are signed with.
    pub const KEY_ID: &str = "bulbil-test";
    /// The secret of that key.
    pub const SECRET: &str = "bulbil-test-secret";

    /// Starts a server, and builds it first when it is older than its source.
    ///
    /// # Panics
    /// When it cannot be built or started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with_pages_of(1000)
    }

    /// As [`start`](Self::start); a list takes a request for each so many objects.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    pub fn start_with_pages_of(objects: usize) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut child = Command::new(built())
            .arg(directory.path())
            .arg(BUCKET)
            .arg(objects.to_string())
            // It ends when this pipe does, even where this process is killed.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the S3 server starts");
        let stdout = child.stdout.take().expect("piped above");
        let mut endpoint = String::new();
        BufReader::new(stdout).read_line(&mut endpoint).expect("the S3 server tells its address");
        let endpoint = endpoint.trim_end().to_owned();
        assert!(endpoint.starts_with("http://"), "the S3 server ended: {:?}", child.wait());
        Self { child, endpoint, directory }
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where it listens, for a proxy.
    ///
    /// # Panics
    /// Never: the server told it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoint.trim_start_matches("http://").parse().expect("an address and a port")
    }

    /// A store below a prefix of the bucket.
    #[must_use]
    pub fn location(&self, prefix: &str) -> StoreLocation {
        Self::location_at(&self.endpoint, prefix)
    }

    /// As [`location`](Self::location), reached by another endpoint: that of a proxy.
    ///
    /// # Panics
    /// When these are no prefix or no endpoint.
    #[must_use]
    pub fn location_at(endpoint: &str, prefix: &str) -> StoreLocation {
        let text = format!("s3://{BUCKET}/{prefix}?endpoint={endpoint}&region=us-east-1");
        text.parse().expect("a location")
    }

    /// The variables that a process needs to use the bucket.
    #[must_use]
    pub fn environment() -> [(String, String); 3] {
        [
            ("AWS_ACCESS_KEY_ID", Self::KEY_ID),
            ("AWS_SECRET_ACCESS_KEY", Self::SECRET),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    }

    /// Options with these variables.
    #[must_use]
    pub fn options() -> RemoteOptions {
        RemoteOptions::with_environment(Self::environment())
    }

    /// The directory whose files are the bucket's objects: to look at them, and to damage them.
    #[must_use]
    pub fn objects(&self) -> PathBuf {
        self.directory.path().join(BUCKET)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The server's program, beside the test's own. No dependency: only who needs it waits for its build.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("a program has a path");
    let is_inner = |path: &Path| path.ends_with("deps") || path.ends_with("examples");
    let directory = test.ancestors().skip(1).find(|path| !is_inner(path)).expect("below a target directory");
    let program = directory.join(PACKAGE);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("a crate of the workspace");
    if !is_current(&program, root) {
        build(root, directory);
        let touched = File::open(&program).and_then(|file| file.set_modified(SystemTime::now()));
        touched.expect("the S3 server was built beside the test");
    }
    program
}

fn is_current(program: &Path, root: &Path) -> bool {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
    let Ok(built) = modified(program) else { return false };
    let sources = root.join("crates").join(PACKAGE);
    let files = std::fs::read_dir(sources.join("src")).expect("the server's source").flatten().map(|e| e.path());
    files
        .chain([sources.join("Cargo.toml"), root.join("Cargo.lock")])
        .all(|file| modified(&file).is_ok_and(|changed| changed <= built))
}

fn build(root: &Path, profile_directory: &Path) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root).args(["build", "--quiet", "--locked", "--package", PACKAGE]);
    command.arg("--target-dir").arg(profile_directory.parent().expect("a profile lies in a target directory"));
    if profile_directory.ends_with("release") {
        command.arg("--release");
    }
    let status = command.status().expect("cargo starts");
    assert!(status.success(), "cannot build {PACKAGE}: {status}");
}
