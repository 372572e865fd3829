//! Counters of a server's work.

use std::sync::atomic::Ordering::Relaxed;

use super::wire::request::Command;

/// What a server has done since it started. Requests count when they are accepted for execution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections accepted, also those whose handshake failed.
    pub connections: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub trims: u64,
    /// Requests to write zeroes.
    pub write_zeroes: u64,
    /// Requests for block status.
    pub block_statuses: u64,
    /// Requests to cache.
    pub caches: u64,
    /// Requests answered with an error, refused ones included.
    pub failures: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Bytes carried by writes.
    pub written_bytes: u64,
    /// Requests that went to a worker.
    pub slow_requests: u64,
}

counters!(
    connections,
    reads,
    writes,
    flushes,
    trims,
    write_zeroes,
    block_statuses,
    caches,
    failures,
    read_bytes,
    written_bytes,
    slow_requests,
);

impl Counters {
    pub(super) fn count_request(&self, command: Command, len_bytes: u32) {
        let counter = match command {
            Command::Read => {
                self.read_bytes.fetch_add(u64::from(len_bytes), Relaxed);
                &self.reads
            }
            Command::Write { .. } => {
                self.written_bytes.fetch_add(u64::from(len_bytes), Relaxed);
                &self.writes
            }
            Command::Flush => &self.flushes,
            Command::Trim { .. } => &self.trims,
            Command::Cache => &self.caches,
            Command::WriteZeroes { .. } => &self.write_zeroes,
            Command::BlockStatus { .. } => &self.block_statuses,
            Command::Disconnect => return,
        };
        Self::count(counter);
    }
}
