//! Imports into a fresh store, beside `qemu-img convert` to compressed qcow2.
//!
//! Bulbil's CPU time is that of its daemon and of the command. It makes everything durable before
//! it says done; `qemu-img convert` leaves that to the host.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::process::{Cost, Server, disk_usage_bytes, fresh_directory, timed, timed_output};
use super::report::{Better, Report};
use super::{Bed, disks, mib};
use crate::run::say;

const BULBIL: &str = "bulbil";
const QEMU: &str = "qemu-img zstd";

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let debian = disks::debian()?;
    let large = disks::large()?;
    for disk in [&debian.raw, &debian.qcow2, &debian.rebuilt, &large] {
        disks::warm_up(disk)?;
    }
    // Each list goes into one fresh store, in order.
    let lists: [&[(&str, &Path)]; 3] = [
        &[
            ("debian-12.raw", &debian.raw),
            ("then the rebuilt disk", &debian.rebuilt),
            ("then debian-12.qcow2", &debian.qcow2),
        ],
        &[("debian-12.qcow2", &debian.qcow2)],
        &[("1.2 GiB of /usr, raw", &large)],
    ];
    for round in 1..=bed.rounds {
        say(format!("import: round {round} of {}", bed.rounds));
        for list in lists {
            if round % 2 == 0 {
                convert_all(bed, list, report)?;
                import_all(bed, list, report)?;
            } else {
                import_all(bed, list, report)?;
                convert_all(bed, list, report)?;
            }
        }
    }
    report.note("import: bulbil's CPU is the daemon's and the command's; its space is the whole store with the index");
    report.note("import: bulbil's image is durable when the command ends, qemu-img's is not synced");
    Ok(())
}

fn add(report: &mut Report, label: &str, program: &str, cost: Cost, added_bytes: u64) {
    let label = |what: &str| format!("import {label}: {what}");
    report.add(&label("time"), "s", Better::Lower, program, cost.wall_s);
    report.add(&label("CPU"), "s", Better::Lower, program, cost.cpu_s);
    report.add(&label("space"), "MiB", Better::Lower, program, mib(added_bytes));
}

fn import_all(bed: &Bed, list: &[(&str, &Path)], report: &mut Report) -> Result<()> {
    let data = DataDir::fresh(bed, "data")?;
    let daemon = data.start_daemon()?;
    let mut used_bytes = data.store_bytes()?;
    for (label, disk) in list {
        let daemon_cpu_s = daemon.cpu_s()?;
        let (command, _) = data.import(disk, &label.replace([' ', ',', '/'], "-"))?;
        let cpu_s = command.cpu_s + daemon.cpu_s()? - daemon_cpu_s;
        let now_bytes = data.store_bytes()?;
        add(report, label, BULBIL, Cost { cpu_s, ..command }, now_bytes.saturating_sub(used_bytes));
        used_bytes = now_bytes;
    }
    Ok(())
}

fn convert_all(bed: &Bed, list: &[(&str, &Path)], report: &mut Report) -> Result<()> {
    let target = bed.work.join("converted.qcow2");
    for (label, disk) in list {
        let cost = timed(&mut convert_command(disk, &target))?;
        add(report, label, QEMU, cost, disk_usage_bytes(&target)?);
        std::fs::remove_file(&target).with_context(|| format!("cannot remove {}", target.display()))?;
    }
    Ok(())
}

/// The quickest way QEMU has to make a compressed disk.
pub(crate) fn convert_command(disk: &Path, target: &Path) -> Command {
    let format = if disk.extension().is_some_and(|extension| extension == "qcow2") { "qcow2" } else { "raw" };
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", format, "-c", "-O", "qcow2", "-o", "compression_type=zstd", "-m", "8", "-W"]);
    command.args([disk, target]);
    command
}

/// A data directory of Bulbil.
pub(crate) struct DataDir<'a> {
    bed: &'a Bed,
    path: PathBuf,
}

impl<'a> DataDir<'a> {
    pub(crate) fn fresh(bed: &'a Bed, name: &str) -> Result<Self> {
        let path = bed.work.join(name);
        fresh_directory(&path)?;
        fresh_directory(&path.join("run"))?;
        Ok(Self { bed, path })
    }

    pub(crate) fn bed(&self) -> &'a Bed {
        self.bed
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts a daemon that ends when the returned value is dropped.
    pub(crate) fn start_daemon(&self) -> Result<Server> {
        self.start_daemon_with([])
    }

    /// The same with variables of its own.
    pub(crate) fn start_daemon_with<'v>(
        &self,
        variables: impl IntoIterator<Item = (&'v str, &'v str)>,
    ) -> Result<Server> {
        let mut command = Command::new(&self.bed.bulbil);
        command.args(["serve", "--data-dir"]).arg(&self.path).envs(variables);
        Server::start_and_wait(&mut command, &self.path.join("run/bulbil.sock"))
    }

    /// Imports a disk by the command; what that took, and the content's digest.
    pub(crate) fn import(&self, disk: &Path, name: &str) -> Result<(Cost, String)> {
        let mut command = Command::new(&self.bed.bulbil);
        command.args(["--data-dir".as_ref(), self.path.as_os_str()]);
        command.args(["-o", "json", "image", "import"]).arg(disk).args(["--as", name]);
        let (cost, text) = timed_output(&mut command)?;
        let image: serde_json::Value = serde_json::from_str(&text).context("bulbil wrote no JSON")?;
        let digest = image["digest"].as_str().context("an image without a digest")?;
        Ok((cost, digest.to_owned()))
    }

    /// Runs a command of Bulbil in this data directory and returns its JSON document.
    pub(crate) fn bulbil_json(&self, words: &[&str]) -> Result<serde_json::Value> {
        let mut command = Command::new(&self.bed.bulbil);
        command.arg("--data-dir").arg(&self.path).args(["-o", "json"]).args(words);
        let text = timed_output(&mut command)?.1;
        serde_json::from_str(&text).with_context(|| format!("bulbil wrote no JSON: {text}"))
    }

    pub(crate) fn store_bytes(&self) -> Result<u64> {
        let store = self.path.join("store");
        if store.exists() { disk_usage_bytes(&store) } else { Ok(0) }
    }
}
