//! Mounts for tests, where this machine can.

#![allow(clippy::print_stderr, reason = "a test that is skipped says why")]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_export::fuse::{FuseMount, FuseOptions};
use bulbil_volume::BlockDevice;

use crate::support::{output_of, run};

/// Whether this machine mounts. Where `CI` is set it must.
pub(crate) fn can_mount() -> bool {
    can_open("/dev/fuse")
}

/// Whether this machine has loop devices, and this user may use them. Where `CI` is set it must.
pub(crate) fn can_loop() -> bool {
    can_open("/dev/fuse") && can_open("/dev/loop-control")
}

fn can_open(device: &str) -> bool {
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some() => panic!("{device} is needed where CI is set: {error}"),
        Err(error) => {
            eprintln!("skipped: {device} cannot be opened: {error}");
            false
        }
    }
}

/// A device that is mounted in a directory of its own.
pub(crate) struct Mounted {
    pub(crate) mount: FuseMount,
    // After the mount: it is removed when nothing is mounted on it.
    pub(crate) dir: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(device: Arc<dyn BlockDevice>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mount = FuseMount::mount(device, dir.path(), &FuseOptions::default()).unwrap();
        Self { mount, dir }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.mount.file()
    }

    pub(crate) fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.path()).unwrap()
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        read(&File::open(self.path()).unwrap(), offset, len)
    }
}

pub(crate) fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut found = vec![0xee; len];
    file.read_exact_at(&mut found, offset).unwrap();
    found
}

/// A loop device over a file.
pub(crate) struct LoopDevice(PathBuf);

impl LoopDevice {
    pub(crate) fn new(file: &Path, options: &[&str]) -> Self {
        let file = file.to_str().unwrap();
        let found = run("losetup", &[options, &["--find", "--show", file]].concat());
        Self(String::from_utf8(found.stdout).unwrap().trim().into())
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(output_of("losetup", &["--detach", self.path()]));
    }
}

/// A file system that is mounted until this is dropped.
pub(crate) struct MountedOn(PathBuf);

impl MountedOn {
    pub(crate) fn new(source: &str, directory: &Path, options: &str) -> Self {
        run("mount", &["-o", options, source, directory.to_str().unwrap()]);
        Self(directory.to_owned())
    }
}

impl Drop for MountedOn {
    fn drop(&mut self) {
        drop(output_of("umount", &[self.0.to_str().unwrap()]));
    }
}
