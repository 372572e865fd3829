//! Load by fio's nbd engine.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::process::{Server, timed_output};

/// A workload and how long it lasts.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) rw: &'static str,
    pub(crate) block: &'static str,
    pub(crate) depth: u32,
    pub(crate) until: Until,
    /// Part of the disk that is used, from its start.
    pub(crate) range_bytes: u64,
    /// Writes before each flush; 0 for none.
    pub(crate) flush_every: u32,
    /// Chooses the random offsets: the same for all programs of a round.
    pub(crate) seed: u32,
}

/// When a load ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Seconds(f64),
    Requests(u64),
    /// The range was gone through once.
    EndOfRange,
}

/// What a load saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) iops: f64,
    pub(crate) bytes_per_s: f64,
    /// CPU time of the server for each request.
    pub(crate) server_cpu_us: f64,
}

/// Puts a load on a server.
pub(crate) fn run(server: &Server, load: &Load) -> Result<Outcome> {
    let cpu_before = server.cpu_s()?;
    let (_, text) = timed_output(&mut command(server, load))?;
    let cpu_s = server.cpu_s()? - cpu_before;
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: Value = serde_json::from_str(json).context("fio wrote no JSON")?;
    outcome(&value, load, cpu_s).context("fio's JSON lacks a figure")
}

fn command(server: &Server, load: &Load) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--ioengine=nbd", "--output-format=json"]);
    command.arg(format!("--uri=nbd+unix:///?socket={}", server.socket().display()));
    command.args([format!("--rw={}", load.rw), format!("--bs={}", load.block), format!("--iodepth={}", load.depth)]);
    command.args([format!("--size={}", load.range_bytes), format!("--randseed={}", load.seed)]);
    match load.until {
        Until::Seconds(seconds) => {
            command.args(["--time_based".to_owned(), format!("--runtime={:.0}ms", seconds * 1000.0)]);
        }
        Until::Requests(count) => {
            command.arg(format!("--number_ios={count}"));
        }
        Until::EndOfRange => {}
    }
    if load.flush_every > 0 {
        command.arg(format!("--fsync={}", load.flush_every));
    }
    command
}

fn outcome(value: &Value, load: &Load, cpu_s: f64) -> Option<Outcome> {
    let direction = if load.rw.ends_with("write") { "write" } else { "read" };
    let job = &value["jobs"][0][direction];
    let requests = job["total_ios"].as_f64().filter(|requests| *requests > 0.0)?;
    Some(Outcome {
        iops: job["iops"].as_f64()?,
        bytes_per_s: job["bw_bytes"].as_f64()?,
        server_cpu_us: cpu_s / requests * 1e6,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_taken_from_the_direction_of_the_load() {
        let load = Load {
            rw: "randwrite",
            block: "4k",
            depth: 1,
            until: Until::EndOfRange,
            range_bytes: 4096,
            flush_every: 1,
            seed: 1,
        };
        let job = json!({
            "read": {"total_ios": 0, "iops": 0.0, "bw_bytes": 0},
            "write": {"total_ios": 200, "iops": 1000.0, "bw_bytes": 4096000},
        });
        let found = outcome(&json!({ "jobs": [job] }), &load, 0.01).unwrap();
        assert_eq!((found.iops, found.bytes_per_s, found.server_cpu_us), (1000.0, 4_096_000.0, 50.0));
        assert!(outcome(&json!({}), &load, 0.01).is_none());
    }
}
