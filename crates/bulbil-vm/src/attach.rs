//! Chooses how a disk reaches its machine: over shared memory where QEMU can, else over NBD.

use std::fmt;
use std::str::FromStr;

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAttach {
    /// The Network Block Device protocol on a socket: any QEMU can, and the guest's memory stays private.
    Nbd,
    /// vhost-user-blk: the disk's server takes requests out of the guest's memory.
    VhostUser,
}

impl fmt::Display for DiskAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nbd => "nbd",
            Self::VhostUser => "vhost-user",
        })
    }
}

/// What the user asked for (`BULBIL_DISK`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskChoice {
    /// vhost-user where it works, else NBD.
    #[default]
    Auto,
    /// NBD.
    Nbd,
    /// vhost-user or nothing.
    VhostUser,
}

/// Not one of the ways.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown way to attach a disk `{0}`: use `auto`, `nbd`, `vhost-user`")]
pub struct ParseDiskChoiceError(String);

impl FromStr for DiskChoice {
    type Err = ParseDiskChoiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" | "" => Ok(Self::Auto),
            "nbd" => Ok(Self::Nbd),
            "vhost-user" => Ok(Self::VhostUser),
            other => Err(ParseDiskChoiceError(other.to_owned())),
        }
    }
}

/// vhost-user was demanded and cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this QEMU has no vhost-user-blk-pci device: set BULBIL_DISK=nbd")]
pub struct NoVhostUserError;

/// How to attach disks for a choice, where QEMU has the device (`has_device`) or not.
///
/// # Errors
/// [`NoVhostUserError`] when it was demanded and cannot be had.
pub fn choose_attach(choice: DiskChoice, has_device: bool) -> Result<DiskAttach, NoVhostUserError> {
    match (choice, has_device) {
        (DiskChoice::Nbd, _) | (DiskChoice::Auto, false) => Ok(DiskAttach::Nbd),
        (_, true) => Ok(DiskAttach::VhostUser),
        (DiskChoice::VhostUser, false) => Err(NoVhostUserError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_falls_back_and_a_demand_does_not() {
        assert_eq!(choose_attach(DiskChoice::Auto, true), Ok(DiskAttach::VhostUser));
        assert_eq!(choose_attach(DiskChoice::Auto, false), Ok(DiskAttach::Nbd));
        assert_eq!(choose_attach(DiskChoice::Nbd, true), Ok(DiskAttach::Nbd));
        assert!(choose_attach(DiskChoice::VhostUser, false).unwrap_err().to_string().contains("BULBIL_DISK=nbd"));
    }

    #[test]
    fn choices_are_parsed() {
        assert_eq!("".parse(), Ok(DiskChoice::Auto));
        assert_eq!("vhost-user".parse(), Ok(DiskChoice::VhostUser));
        assert!("vhost".parse::<DiskChoice>().unwrap_err().to_string().contains("`auto`, `nbd`, `vhost-user`"));
    }
}
