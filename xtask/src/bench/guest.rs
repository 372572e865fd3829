//! A guest that puts load on a disk: a kernel, fio and a job, nothing on a disk of its own.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::process::timed_output;
use crate::images::images_dir;
use crate::run::{Cmd, workspace_root};

const JSON_BEGIN: &str = "LOAD-JSON-BEGIN";
const JSON_END: &str = "LOAD-JSON-END";
const MEMORY: &str = "512M";

/// The kernel and initramfs of the guest.
#[derive(Debug)]
pub(crate) struct LoadGuest {
    kernel: PathBuf,
    initrd: PathBuf,
}

/// How a disk of the guest is attached: options of QEMU.
#[derive(Debug, Clone)]
pub(crate) struct Attach(Vec<String>);

impl Attach {
    /// A raw file by QEMU's own virtio-blk.
    pub(crate) fn raw_file(disk: &Path) -> Self {
        let node = format!("driver=raw,node-name=file,file.driver=file,file.filename={}", disk.display());
        Self(["-blockdev", &node, "-device", "virtio-blk-pci,drive=file"].map(str::to_owned).to_vec())
    }

    /// A qcow2 file by the same.
    pub(crate) fn qcow2_file(disk: &Path) -> Self {
        let node = format!("driver=qcow2,node-name=file,file.driver=file,file.filename={}", disk.display());
        Self(["-blockdev", &node, "-device", "virtio-blk-pci,drive=file"].map(str::to_owned).to_vec())
    }

    /// An NBD server on a unix socket; a server that is gone is waited for.
    pub(crate) fn nbd(socket: &Path) -> Self {
        let path = socket.display();
        let node =
            format!("driver=nbd,node-name=nbd,server.type=unix,server.path={path},reconnect-delay=60,discard=unmap");
        Self(["-blockdev", &node, "-device", "virtio-blk-pci,drive=nbd"].map(str::to_owned).to_vec())
    }

    /// A vhost-user-blk server on a unix socket; a server that is gone is waited for.
    pub(crate) fn vhost_user(socket: &Path) -> Self {
        let chardev = format!("socket,id=vhost,path={},reconnect=1", socket.display());
        Self(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=vhost"].map(str::to_owned).to_vec())
    }

    pub(crate) fn options(&self) -> &[String] {
        &self.0
    }
}

impl LoadGuest {
    /// Builds the guest unless it is there.
    pub(crate) fn build() -> Result<Self> {
        let dir = images_dir();
        Cmd::new(workspace_root().join("images/build-load-guest.sh")).args([&dir]).run()?;
        Ok(Self { kernel: dir.join("load.vmlinuz"), initrd: dir.join("load.initrd") })
    }

    /// The command that runs a job, a shell script, with disks at `/dev/vda` and on; its console is standard output.
    ///
    /// The guest's memory is shared with servers that need it.
    pub(crate) fn command(&self, work: &Path, job: &str, disks: &[Attach]) -> Result<Command> {
        let initrd = work.join("job.initrd");
        self.add_job(work, job, &initrd)?;
        let mut command = Command::new("qemu-system-x86_64");
        let memory = format!("memory-backend-memfd,id=memory,size={MEMORY},share=on");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", MEMORY]);
        command.args(["-object", &memory, "-machine", "q35,memory-backend=memory"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&initrd);
        command.args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check"]);
        command.args(disks.iter().flat_map(|disk| &disk.0));
        Ok(command)
    }

    /// Runs fio in the guest and returns its JSON document.
    pub(crate) fn fio(&self, work: &Path, arguments: &str, disk: Attach) -> Result<Value> {
        let job = format!(
            "echo {JSON_BEGIN}\nfio --output-format=json --filename=/dev/vda --direct=1 --ioengine=io_uring {arguments}\necho {JSON_END}\n"
        );
        let (_, console) = timed_output(&mut self.command(work, &job, &[disk])?)?;
        json_in(&console).with_context(|| format!("fio in the guest wrote no JSON:\n{console}"))
    }

    /// The job comes first: a reader of archives goes on after a plain one, not after every compressed one.
    fn add_job(&self, work: &Path, job: &str, target: &Path) -> Result<()> {
        let script = work.join("job.sh");
        write(&script, job.as_bytes())?;
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-o", "-H", "newc"])
            .current_dir(work)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start cpio")?;
        cpio.stdin.take().context("cpio without input")?.write_all(b"job.sh\n")?;
        let archive = cpio.wait_with_output().context("cannot wait for cpio")?;
        if !archive.status.success() {
            bail!("cpio failed: {}", archive.status);
        }
        let guest = std::fs::read(&self.initrd).with_context(|| format!("cannot read {}", self.initrd.display()))?;
        write(target, &[archive.stdout, guest].concat())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = std::fs::File::create(path).and_then(|mut file| file.write_all(bytes));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn json_in(console: &str) -> Option<Value> {
    let (_, rest) = console.split_once(JSON_BEGIN)?;
    let (text, _) = rest.split_once(JSON_END)?;
    serde_json::from_str(text.get(text.find('{')?..)?.trim_end()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_found_between_other_lines_of_the_console() {
        let console = "boot\r\nLOAD-JSON-BEGIN\r\nnote\r\n{\r\n \"jobs\": [1]\r\n}\r\nLOAD-JSON-END\r\n";
        assert_eq!(json_in(console).unwrap()["jobs"][0], 1);
        assert!(json_in("LOAD-JSON-BEGIN {").is_none());
    }
}
