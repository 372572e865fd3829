//! Memory of volumes nobody uses and of what runs beside a machine.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bench::import::DataDir;
use crate::bench::process::{memory_bytes, timed_output};
use crate::bench::report::{Better, Report};
use crate::bench::{Bed, disks, mib};
use crate::images::{Image, build};
use crate::run::say;

const VOLUMES: u32 = 1000;

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    say("store: memory");
    let data = DataDir::fresh(bed, "memory")?;
    let _daemon = data.start_daemon()?;
    let debian = disks::debian()?;
    let (_, digest) = data.import(&debian.raw, "debian")?;
    let mut command = Command::new(&bed.bench_volume);
    command.arg("open-many").arg(data.path()).args([&digest, &(64_u64 << 40).to_string(), &VOLUMES.to_string()]);
    let text = timed_output(&mut command)?.1;
    let bytes: f64 = text.trim().parse().context("bench_volume printed no number")?;
    report.add("memory: an idle open volume", "KiB", Better::Lower, "bulbil", bytes / 1024.0);

    data.import(&build(Image::Tiny, false)?, "tiny")?;
    let launched = data.bulbil_json(&["launch", "tiny", "--name", "idle", "--memory", "256MiB", "--wait", "ready"])?;
    let measured = instance(&data, &launched, report);
    data.bulbil_json(&["rm", "idle", "--force"])?;
    measured
}

fn instance(data: &DataDir<'_>, launched: &Value, report: &mut Report) -> Result<()> {
    let first = launched.as_array().and_then(|list| list.first()).unwrap_or(launched);
    let id = first["id"].as_str().context("an instance without an id")?;
    let path = data.path().join("instances").join(id).join("state.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let state: Value = serde_json::from_str(&text).context("state.json is no JSON")?;
    let pid = |name: &str| state[name].as_u64().with_context(|| format!("state.json has no {name}"));
    let shim_bytes = memory_bytes(pid("shim_pid")?)?;
    report.add("memory: beside a running instance", "MiB", Better::Lower, "bulbil", mib(shim_bytes));
    Ok(())
}
