//! Whether the process that made something is still there.
//!
//! Only a process of this host, and of the same process namespace, can be told to be gone.

use serde::{Deserialize, Serialize};

/// A process, told apart from any other one that ever had its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// The running of a host: `/proc/sys/kernel/random/boot_id`.
    boot_id: String,
    /// The namespace in which the number counts: the target of `/proc/self/ns/pid`.
    namespace: String,
    pid: u32,
    /// When the process began, in the ticks of `/proc/<pid>/stat`.
    started: u64,
}

impl ProcessId {
    /// This process; `None` where `/proc` does not tell.
    pub(crate) fn own() -> Option<Self> {
        let pid = std::process::id();
        Some(Self { boot_id: boot_id()?, namespace: namespace()?, pid, started: start_of(pid)? })
    }

    /// Whether the process has certainly ended.
    pub(crate) fn has_ended(&self) -> bool {
        let same_host = boot_id().is_some_and(|id| id == self.boot_id);
        same_host && namespace().is_some_and(|n| n == self.namespace) && start_of(self.pid) != Some(self.started)
    }
}

fn boot_id() -> Option<String> {
    Some(std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

fn namespace() -> Option<String> {
    Some(std::fs::read_link("/proc/self/ns/pid").ok()?.to_str()?.to_owned())
}

fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the start is the 20th field after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_others_are_told_by_number_and_start() {
        let own = ProcessId::own().unwrap();
        assert!(!own.has_ended());
        assert!(ProcessId { started: own.started + 1, ..own.clone() }.has_ended(), "the number was given again");
        assert!(ProcessId { pid: u32::MAX, ..own.clone() }.has_ended());
        assert!(!ProcessId { pid: u32::MAX, boot_id: "other".into(), ..own }.has_ended(), "of another host");
    }
}
