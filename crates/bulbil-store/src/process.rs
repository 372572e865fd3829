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

/// When a process began; `None` when it is gone.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the state follows, and the start is the 20th field after the name.
    let fields = stat.rsplit_once(')')?.1;
    let is_zombie = matches!(fields.split_whitespace().next(), Some("Z" | "X"));
    // One that was killed is there until its parent asks; as long as it has other threads, these may be in a system call.
    if is_zombie && std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1 {
        return None;
    }
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_nobody_has_waited_for_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId { pid: child.id(), started: start_of(child.id()).unwrap(), ..ProcessId::own().unwrap() };
        assert!(!id.has_ended());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !id.has_ended() {
            assert!(std::time::Instant::now() < deadline, "a killed process counts as alive");
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn this_process_lives_and_others_are_told_by_number_and_start() {
        let own = ProcessId::own().unwrap();
        assert!(!own.has_ended());
        assert!(ProcessId { started: own.started + 1, ..own.clone() }.has_ended(), "the number was given again");
        assert!(ProcessId { pid: u32::MAX, ..own.clone() }.has_ended());
        assert!(!ProcessId { pid: u32::MAX, boot_id: "other".into(), ..own }.has_ended(), "of another host");
    }
}
