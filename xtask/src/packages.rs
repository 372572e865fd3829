//! The one list of what a machine needs besides Rust, as Debian packages with reasons.

use std::path::Path;

use crate::run::find_program;

/// Who needs a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Building and running Bulbil.
    Run,
    /// Building guest images.
    Images,
    /// Building guest images as a user other than root.
    ImagesWithoutRoot,
    /// Tests that compare with, or speak to, other programs.
    Tests,
}

/// How to see that a package, or something as good, is there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Probe {
    /// A program in `PATH`.
    Program(&'static str),
    /// Any of these files.
    File(&'static [&'static str]),
}

/// One Debian package and why it is wanted.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) need: Need,
    pub(crate) probe: Probe,
    pub(crate) reason: &'static str,
}

impl Package {
    pub(crate) fn is_present(&self) -> bool {
        match self.probe {
            Probe::Program(name) => find_program(name).is_some(),
            Probe::File(paths) => paths.iter().any(|path| Path::new(path).exists()),
        }
    }
}

const fn program(name: &'static str, need: Need, program: &'static str, reason: &'static str) -> Package {
    Package { name, need, probe: Probe::Program(program), reason }
}

const fn file(name: &'static str, need: Need, files: &'static [&'static str], reason: &'static str) -> Package {
    Package { name, need, probe: Probe::File(files), reason }
}

/// Installed before all others and by itself: Debian 12's `qemu-system-x86` conflicts with a
/// `qemu-utils` from backports.  Alone, it makes apt remove that one; then the rest brings
/// `qemu-utils` back in the version that fits.
pub(crate) const INSTALL_FIRST: &str = "qemu-system-x86";

const OVMF: &[&str] = &["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"];
const SEABIOS: &[&str] = &["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"];
const KEYRING: &[&str] = &["/usr/share/keyrings/debian-archive-keyring.gpg"];
const GRUB_BIOS: &[&str] = &["/usr/lib/grub/i386-pc/boot.img"];
const GRUB_UEFI: &[&str] = &["/usr/lib/grub/x86_64-efi/moddep.lst"];
const PYTHON_NBD: &[&str] = &["/usr/lib/python3/dist-packages/nbd.py"];

/// Every package, in the order in which it is shown.
pub(crate) const PACKAGES: &[Package] = &[
    program(INSTALL_FIRST, Need::Run, "qemu-system-x86_64", "runs the instances"),
    program("qemu-utils", Need::Run, "qemu-img", "converts disks: guest images, and tests of every format"),
    file("seabios", Need::Run, SEABIOS, "firmware of instances that start by BIOS"),
    file("ovmf", Need::Run, OVMF, "firmware of instances that start by UEFI"),
    program("openssh-client", Need::Run, "ssh", "`bulbil exec` and `bulbil shell`"),
    program("gcc", Need::Run, "cc", "compiles SQLite and zstd"),
    program("mmdebstrap", Need::Images, "mmdebstrap", "installs packages into a folder"),
    file("debian-archive-keyring", Need::Images, KEYRING, "checks the packages' signatures"),
    program("fdisk", Need::Images, "sfdisk", "writes partition tables"),
    program("e2fsprogs", Need::Images, "mke2fs", "writes file systems without a mount"),
    program("mtools", Need::Images, "mformat", "writes the EFI partition without a mount"),
    program("grub-common", Need::Images, "grub-mkimage", "puts the boot loader together"),
    file("grub-pc-bin", Need::Images, GRUB_BIOS, "boot loader for BIOS"),
    file("grub-efi-amd64-bin", Need::Images, GRUB_UEFI, "boot loader for UEFI"),
    program("cpio", Need::Images, "cpio", "packs the small initramfs"),
    program("lz4", Need::Images, "lz4", "packs the small initramfs"),
    program("zstd", Need::Images, "zstd", "packs cached package trees"),
    program("kmod", Need::Images, "depmod", "finds what a kernel module needs"),
    program("uidmap", Need::ImagesWithoutRoot, "newuidmap", "lets you own root's files inside a namespace"),
    program("libnbd-bin", Need::Tests, "nbdcopy", "an NBD client that is not ours"),
    file("python3-libnbd", Need::Tests, PYTHON_NBD, "NBD requests one by one, with every flag"),
    program("nbdkit", Need::Tests, "nbdkit", "an NBD server that is not ours, to measure against"),
    program("fio", Need::Tests, "fio", "load for measurements"),
    program("fuse3", Need::Run, "fusermount3", "`bulbil volume mount` and `image mount` without root"),
    program("xorriso", Need::Tests, "xorriso", "reads our seed disks"),
    program("python3", Need::Tests, "python3", "small servers and clients in tests"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_is_listed_once_and_has_a_reason() {
        let mut names: Vec<_> = PACKAGES.iter().map(|package| package.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PACKAGES.len());
        assert!(PACKAGES.iter().all(|package| !package.reason.is_empty()));
    }
}
