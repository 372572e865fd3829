//! Finds QEMU and OVMF on this machine and reads QEMU's version.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::spec::UefiFirmware;

/// The program's name in every distribution.
pub const QEMU_PROGRAM: &str = "qemu-system-x86_64";

/// The oldest version with `-netdev stream`.
pub const OLDEST_SUPPORTED: QemuVersion = QemuVersion::new(7, 2, 0);

/// The last major version these command lines are written for.
pub const NEWEST_SUPPORTED_MAJOR: u32 = 11;

/// Generous: on a busy machine the dynamic linker alone may need seconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// Code and variable template of OVMF, by distribution, best first. Builds with Secure Boot enforced are left out:
/// they would refuse unsigned loaders.
const OVMF_LOCATIONS: &[(&str, &str)] = &[
    // Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    // Fedora, RHEL and its family
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    // Arch
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    // openSUSE
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    // QEMU's own build
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
];

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl QemuVersion {
    /// The version of three numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32, micro: u32) -> Self {
        Self { major, minor, micro }
    }

    /// Whether these command lines are known to suit the version.
    #[must_use]
    pub fn is_supported(self) -> bool {
        self >= OLDEST_SUPPORTED && self.major <= NEWEST_SUPPORTED_MAJOR
    }

    /// Reads the first line of `qemu-system-x86_64 -version`:
    /// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
    #[must_use]
    pub fn parse_banner(banner: &str) -> Option<Self> {
        let (_, rest) = banner.split_once("QEMU emulator version ")?;
        let numbers = rest.split_whitespace().next()?;
        let mut parts = numbers.split('.').map(leading_number);
        Some(Self::new(parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
    }
}

/// `0-rc2` and `22+dfsg` are written where a number is expected.
fn leading_number(text: &str) -> Option<u32> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).map_or(text, |end| text.split_at(end).0);
    digits.parse().ok()
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// QEMU or its firmware is missing or not usable.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// No such program.
    #[error("`{program}` was not found: install QEMU (Debian, Ubuntu: apt install qemu-system-x86)")]
    NotFound {
        /// What was looked for.
        program: String,
    },
    /// The program could not be run.
    #[error("cannot run `{}`", path.display())]
    CannotRun {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program did not say its version in time.
    #[error("`{}` did not tell its version within {} s", path.display(), PROBE_TIMEOUT.as_secs())]
    TimedOut {
        /// The program.
        path: PathBuf,
    },
    /// The program is not QEMU, or a broken one.
    #[error("`{}` does not say what version of QEMU it is: {said}", path.display())]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// Its first line.
        said: String,
    },
    /// The version is not one these command lines suit.
    #[error("`{}` is QEMU {version}; versions 7.2 to {NEWEST_SUPPORTED_MAJOR} are supported", path.display())]
    Unsupported {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: QemuVersion,
    },
    /// No UEFI firmware.
    #[error("UEFI firmware (OVMF) was not found: install it (Debian, Ubuntu: apt install ovmf)")]
    NoOvmf,
    /// An instance's variable store could not be made.
    #[error("cannot create the UEFI variable store `{}`", path.display())]
    Vars {
        /// The store.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Finds QEMU: the given program, or `qemu-system-x86_64` in the folders of `path_variable` (the value of `PATH`).
///
/// # Errors
/// [`QemuError::NotFound`], which names the package to install.
pub fn find_qemu(given: Option<&Path>, path_variable: &OsStr) -> Result<PathBuf, QemuError> {
    let name = given.unwrap_or_else(|| Path::new(QEMU_PROGRAM));
    let found = if name.components().count() > 1 {
        is_program(name).then(|| name.to_owned())
    } else {
        std::env::split_paths(path_variable).map(|folder| folder.join(name)).find(|path| is_program(path))
    };
    found.ok_or_else(|| QemuError::NotFound { program: name.display().to_string() })
}

fn is_program(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Finds OVMF's code and the template of its variables.
///
/// # Errors
/// [`QemuError::NoOvmf`], which names the package to install.
pub fn find_ovmf() -> Result<UefiFirmware, QemuError> {
    choose_ovmf(Path::is_file).ok_or(QemuError::NoOvmf)
}

fn choose_ovmf(exists: impl Fn(&Path) -> bool) -> Option<UefiFirmware> {
    let both = |(code, vars): &&(&str, &str)| exists(Path::new(code)) && exists(Path::new(vars));
    OVMF_LOCATIONS.iter().find(both).map(|&(code, vars)| UefiFirmware { code: code.into(), vars: vars.into() })
}

/// Copies the variable template to `path` unless the instance has its store already. Durable when this returns; a
/// crash leaves either no store or a whole one.
///
/// # Errors
/// [`QemuError::Vars`] with the system's reason.
pub fn create_uefi_vars(template: &Path, path: &Path) -> Result<(), QemuError> {
    copy_durably(template, path).map_err(|source| QemuError::Vars { path: path.to_owned(), source })
}

fn copy_durably(template: &Path, path: &Path) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let temporary = path.with_extension("new");
    let mut copy = File::create(&temporary)?;
    io::copy(&mut File::open(template)?, &mut copy)?;
    copy.sync_all()?;
    fs::rename(&temporary, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(folder)?.sync_all()
}

/// A QEMU that was found and asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub path: PathBuf,
    /// Its version.
    pub version: QemuVersion,
    /// Whether it was built with seccomp, so that `-sandbox` is accepted.
    pub sandbox: bool,
}

impl QemuBinary {
    /// Asks a program for its version and whether it can confine itself.
    ///
    /// # Errors
    /// When it cannot be run, is not QEMU, or is a version outside 7.2 to 11.
    pub async fn probe(path: &Path) -> Result<Self, QemuError> {
        // Options are read in order: without seccomp `-sandbox` ends QEMU before it comes to `-version`.
        let confined = first_line(path, &["-sandbox", "on", "-version"]).await?;
        let (banner, sandbox) = match QemuVersion::parse_banner(&confined) {
            Some(_) => (confined, true),
            None => (first_line(path, &["-version"]).await?, false),
        };
        let version = QemuVersion::parse_banner(&banner)
            .ok_or_else(|| QemuError::NotQemu { path: path.to_owned(), said: banner.chars().take(200).collect() })?;
        if !version.is_supported() {
            return Err(QemuError::Unsupported { path: path.to_owned(), version });
        }
        Ok(Self { path: path.to_owned(), version, sandbox })
    }
}

/// Whether QEMU can hand disks to a vhost-user server: it has the device (not every build does) and can share memory.
/// A QEMU that does not tell is taken for one that cannot.
pub async fn has_vhost_user_blk(path: &Path) -> bool {
    // Linux hosts only, and only their byte order is spoken over the shared memory.
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return false;
    }
    match output(path, &["-device", "help"]).await {
        Ok(said) => said.contains("name \"vhost-user-blk-pci\""),
        Err(error) => {
            tracing::warn!(%error, "cannot ask QEMU for its devices");
            false
        }
    }
}

async fn first_line(path: &Path, args: &[&str]) -> Result<String, QemuError> {
    Ok(output(path, args).await?.lines().next().unwrap_or_default().to_owned())
}

async fn output(path: &Path, args: &[&str]) -> Result<String, QemuError> {
    let output = tokio::process::Command::new(path).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PROBE_TIMEOUT, output)
        .await
        .map_err(|_| QemuError::TimedOut { path: path.to_owned() })?
        .map_err(|source| QemuError::CannotRun { path: path.to_owned(), source })?;
    let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners_of_distributions_and_release_candidates_are_read() {
        let check = |banner: &str, expected: Option<(u32, u32, u32)>| {
            let version = QemuVersion::parse_banner(banner).map(|v| (v.major, v.minor, v.micro));
            assert_eq!(version, expected, "{banner}");
        };
        check("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", Some((7, 2, 22)));
        check("QEMU emulator version 10.0.3", Some((10, 0, 3)));
        check("QEMU emulator version 11.0", Some((11, 0, 0)));
        check("QEMU emulator version 9.1.0-rc2 (v9.1.0-rc2)", Some((9, 1, 0)));
        check("QEMU emulator version 8.2.2(qemu-8.2.2-1.fc40)", Some((8, 2, 2)));
        check("QEMU emulator version seven", None);
        check("bash: qemu: command not found", None);
    }

    #[test]
    fn supported_versions_are_7_2_to_11() {
        let supported = |major, minor| QemuVersion::new(major, minor, 0).is_supported();
        assert!(!supported(7, 1) && supported(7, 2) && supported(8, 0) && supported(11, 2) && !supported(12, 0));
    }

    #[test]
    fn missing_qemu_names_the_package() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_qemu(None, folder.path().as_os_str()).unwrap_err().to_string();
        assert!(error.contains("`qemu-system-x86_64`") && error.contains("apt install qemu-system-x86"), "{error}");
        let given = folder.path().join("my-qemu");
        let error = find_qemu(Some(&given), OsStr::new("/usr/bin")).unwrap_err().to_string();
        assert!(error.contains("my-qemu"), "{error}");
    }

    #[test]
    fn the_first_whole_ovmf_is_chosen() {
        let fedora = choose_ovmf(|path| path.starts_with("/usr/share/edk2/ovmf")).unwrap();
        assert_eq!(fedora.vars, Path::new("/usr/share/edk2/ovmf/OVMF_VARS.fd"));
        assert_eq!(choose_ovmf(|path| path.ends_with("OVMF_CODE_4M.fd")), None);
        assert!(QemuError::NoOvmf.to_string().contains("apt install ovmf"));
    }

    #[test]
    fn uefi_variables_of_an_instance_are_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let (template, vars) = (folder.path().join("template"), folder.path().join("vars.fd"));
        for content in ["first", "second"] {
            io::Write::write_all(&mut File::create(&template).unwrap(), content.as_bytes()).unwrap();
            create_uefi_vars(&template, &vars).unwrap();
            assert_eq!(fs::read_to_string(&vars).unwrap(), "first");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_not_qemu_is_refused() {
        let error = QemuBinary::probe(Path::new("/bin/echo")).await.unwrap_err();
        assert!(matches!(error, QemuError::NotQemu { .. }), "{error}");
    }
}
