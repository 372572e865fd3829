//! Counters of a server's work.

use std::sync::atomic::Ordering::Relaxed;

use super::request::Command;

/// What a server has done since it started. Requests count when they are taken from a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections accepted.
    pub connections: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Requests to write zeroes.
    pub write_zeroes: u64,
    /// All others.
    pub other_requests: u64,
    /// Requests answered with an error.
    pub failures: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Bytes carried by writes.
    pub written_bytes: u64,
    /// Requests that went to a worker.
    pub slow_requests: u64,
    /// Requests that an earlier process had left unanswered.
    pub resubmitted: u64,
}

counters!(
    connections,
    reads,
    writes,
    flushes,
    discards,
    write_zeroes,
    other_requests,
    failures,
    read_bytes,
    written_bytes,
    slow_requests,
    resubmitted,
);

impl Counters {
    pub(super) fn count_request(&self, command: Command, data_bytes: u32) {
        let counter = match command {
            Command::Read => {
                self.read_bytes.fetch_add(data_bytes.into(), Relaxed);
                &self.reads
            }
            Command::Write => {
                self.written_bytes.fetch_add(data_bytes.into(), Relaxed);
                &self.writes
            }
            Command::Flush => &self.flushes,
            Command::Discard => &self.discards,
            Command::WriteZeroes => &self.write_zeroes,
            Command::GetId | Command::Unknown(_) => &self.other_requests,
        };
        Self::count(counter);
    }
}
