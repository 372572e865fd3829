//! A Linux guest under QEMU (emulated) whose disk server is killed and started again while it writes.
//!
//! Needs `qemu-system-x86_64` and the tiny guest image: `cargo xtask test` builds it, `BULBIL_TEST_IMAGES` says where it is.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../examples/support/file_device.rs"]
mod file_device;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_export::vhost_user::{Options, VhostUserServer};
use file_device::FileDevice;

/// For a busy machine under emulation.
const LIMIT: Duration = Duration::from_secs(400);
const SOCKET: &str = "BULBIL_TEST_SOCKET";
const DISK: &str = "BULBIL_TEST_DISK";

/// The server process of the test below: this test binary, started with other variables. Does nothing otherwise.
#[test]
fn server_process() {
    let (Some(socket), Some(disk)) = (std::env::var_os(SOCKET), std::env::var_os(DISK)) else { return };
    let device = Arc::new(FileDevice::open(disk.to_str().unwrap()).unwrap());
    let options = Options { serial: "vol0123456789abcdef0".into(), ..Options::default() };
    let server = VhostUserServer::bind(socket, device, options).unwrap().spawn().unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(server);
}

/// A child that does not outlive the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.0.kill());
        self.0.wait().unwrap();
    }
}

fn start_server(socket: &Path, disk: &Path) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "server_process", "--nocapture"]).env(SOCKET, socket).env(DISK, disk);
    Process(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
}

fn start_qemu(dir: &Path) -> Process {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-display", "none", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256M"]);
    command.args(["-object", "memory-backend-memfd,id=memory,size=256M,share=on"]);
    command.args(["-machine", "q35,graphics=off,memory-backend=memory"]);
    command.args(["-chardev", &format!("socket,id=wire,path={},reconnect=1", path("vu.sock"))]);
    command.args(["-device", "vhost-user-blk-pci,chardev=wire,num-queues=1,bootindex=0"]);
    command.args(["-chardev", &format!("socket,id=console,path={},server=on,wait=off", path("console.sock"))]);
    command.args(["-serial", "chardev:console"]);
    Process(command.spawn().expect("this test needs qemu-system-x86_64"))
}

/// The guest's console: what it shows, and keys.
struct Console {
    stream: UnixStream,
    shown: String,
}

impl Console {
    fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "no console: {error}"),
            }
            std::thread::yield_now();
        };
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self { stream, shown: String::new() }
    }

    /// Reads on; true once `text` was shown.
    fn has_shown(&mut self, text: &str) -> bool {
        let mut piece = [0; 4096];
        if let Ok(len) = self.stream.read(&mut piece) {
            assert_ne!(len, 0, "the machine ended:\n{}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&piece[..len]));
        }
        self.shown.contains(text)
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.has_shown(text) {
            assert!(Instant::now() < deadline, "waited for `{text}`:\n{}", self.shown);
        }
    }

    /// Waits until `text` was shown `count` times more.
    fn wait_for_more(&mut self, text: &str, count: usize) {
        let deadline = Instant::now() + LIMIT;
        let enough = self.shown.matches(text).count() + count;
        while self.shown.matches(text).count() < enough {
            self.has_shown(text);
            assert!(Instant::now() < deadline, "waited for `{text}`:\n{}", self.shown);
        }
    }

    fn type_line(&mut self, line: &str) {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\n").unwrap();
    }
}

fn tiny_image() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images");
    let path = std::env::var_os("BULBIL_TEST_IMAGES").map_or(default, PathBuf::from).join("tiny.raw");
    assert!(path.exists(), "{} is missing: run `cargo xtask test`, which builds guest images first", path.display());
    path
}

/// Writes files in many pieces, then reads them all back from the disk.
const WORK: &str = "\
n=0; while [ $n -lt 60 ]; do dd if=/dev/urandom of=/root/f$n bs=16k count=24 conv=fsync 2>/dev/null; md5sum /root/f$n; \
echo wrote-$((n+0)); n=$((n+1)); done > /dev/console; sync; cd /root; md5sum f* > /tmp/a; \
echo 3 > /proc/sys/vm/drop_caches; md5sum f* > /tmp/b; cmp /tmp/a /tmp/b && echo same-$((40+2)); \
echo errors-$(dmesg | grep -c 'I/O error')-en''d";

#[test]
fn guest_whose_disk_server_is_killed_while_it_writes_sees_nothing_but_a_pause() {
    let dir = tempfile::Builder::new().prefix("bulbil-").tempdir_in("/tmp").unwrap();
    let (socket, disk) = (dir.path().join("vu.sock"), dir.path().join("disk.raw"));
    std::fs::copy(tiny_image(), &disk).unwrap();
    let mut server = start_server(&socket, &disk);
    let _qemu = start_qemu(dir.path());
    let mut console = Console::connect(&dir.path().join("console.sock"));
    console.wait_for("serial=vol0123456789abcdef0");
    console.wait_for("press Enter");
    console.type_line("");
    console.wait_for("# ");
    console.type_line(WORK);
    for _ in 0..5 {
        // Each file is synced, so two more of them mean that the server of now has worked: QEMU 7.2 loses a server that
        // ends in the middle of QEMU's own greeting.
        console.wait_for_more("wrote-", 3);
        drop(server);
        server = start_server(&socket, &disk);
    }
    console.wait_for("-end\r\n");
    assert!(console.shown.contains("same-42"), "{}", console.shown);
    assert!(console.shown.contains("errors-0-end"), "{}", console.shown);
    drop(server);
}
