//! A guest that starts from a disk, as far as its console tells.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::Attach;
use super::process::process_cpu_s;

const MEMORY: &str = "512M";

/// Emulated guests on a busy machine are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// What systemd writes to the console when it makes the first files: told by a credential, since the kernel is quiet.
const USERSPACE: &str = "userspace-is-up";

const LOGIN: &str = "login:";

/// When a boot came so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BootTimes {
    /// The file systems are mounted, and systemd is about to start services.
    pub(crate) userspace: Instant,
    pub(crate) login: Instant,
    /// What QEMU has computed until then; the rest of the time it waited: for the disk, or for a processor.
    pub(crate) cpu_s: f64,
}

/// Starts a machine from its disk, by firmware and boot loader, and ends it at the login prompt.
///
/// `at_login` is called before it is ended.
pub(crate) fn boot(disk: &Attach, at_login: impl FnOnce() -> Result<()>) -> Result<BootTimes> {
    let mut command = Command::new("qemu-system-x86_64");
    let memory = format!("memory-backend-memfd,id=memory,size={MEMORY},share=on");
    let credential = format!("type=11,value=io.systemd.credential:tmpfiles.extra=w+ /dev/ttyS0 - - - - {USERSPACE}");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", MEMORY]);
    command.args(["-object", &memory, "-machine", "q35,memory-backend=memory", "-smbios", &credential]);
    command.args(disk.options()).stdin(Stdio::null()).stdout(Stdio::piped());
    let machine = Machine(command.spawn().context("cannot start QEMU")?);
    machine.watch(at_login)
}

struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Machine {
    fn watch(mut self, at_login: impl FnOnce() -> Result<()>) -> Result<BootTimes> {
        let mut console = self.0.stdout.take().context("QEMU without output")?;
        let (sender, pieces) = channel();
        let reader = std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(len @ 1..) = console.read(&mut buf) {
                if sender.send((Instant::now(), buf[..len].to_vec())).is_err() {
                    return;
                }
            }
        });
        let (userspace, login) = read_console(&pieces)?;
        let times = BootTimes { userspace, login, cpu_s: process_cpu_s(self.0.id())? };
        at_login()?;
        drop(self);
        drop(pieces);
        reader.join().map_err(|_| anyhow::anyhow!("the console's reader panicked"))?;
        Ok(times)
    }
}

/// When userspace and the login prompt were told.
fn read_console(pieces: &Receiver<(Instant, Vec<u8>)>) -> Result<(Instant, Instant)> {
    let deadline = Instant::now() + BOOT_LIMIT;
    let mut console = String::new();
    let mut userspace = None;
    loop {
        let ended = match pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, piece)) => {
                console.push_str(&String::from_utf8_lossy(&piece));
                if console.contains(USERSPACE) {
                    userspace.get_or_insert(at);
                }
                match userspace {
                    Some(userspace) if console.contains(LOGIN) => return Ok((userspace, at)),
                    _ => continue,
                }
            }
            Err(RecvTimeoutError::Timeout) => "did not come to its login prompt in time",
            Err(RecvTimeoutError::Disconnected) => "ended before its login prompt",
        };
        bail!("the guest {ended}; its console:\n{console}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(pieces: &[&str]) -> Result<(Instant, Instant)> {
        let (sender, receiver) = channel();
        let start = Instant::now();
        for (second, piece) in pieces.iter().enumerate() {
            sender.send((start + Duration::from_secs(second as u64), piece.as_bytes().to_vec())).unwrap();
        }
        drop(sender);
        read_console(&receiver)
    }

    #[test]
    fn a_line_that_comes_in_pieces_counts_when_it_is_whole() {
        let (userspace, login) = times(&["userspace", "-is-up\r\n", "localhost lo", "gin: "]).unwrap();
        assert_eq!(login - userspace, Duration::from_secs(2));
    }

    #[test]
    fn a_guest_that_ends_early_is_told_with_its_console() {
        let error = times(&["Kernel panic"]).unwrap_err().to_string();
        assert!(error.contains("ended before") && error.contains("Kernel panic"), "{error}");
    }
}
