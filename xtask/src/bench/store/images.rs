//! Disks that are stored one after another: a server, its update in place, and both built again.
//!
//! Each program gets a fresh repository and the disks in the same order, so what a disk adds is what
//! the program does not find in those before it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::import::{DataDir, convert_command};
use crate::bench::process::{Cost, disk_usage_bytes, fresh_directory, timed};
use crate::bench::report::{Better, Report};
use crate::bench::{Bed, disks, mib};
use crate::run::{find_program, say};

/// A program that keeps disks in a repository.
struct Keeper {
    name: &'static str,
    program: &'static str,
    prepare: fn(&Path) -> Vec<Command>,
    add: fn(&Path, &Path, &str) -> Command,
}

const KEEPERS: &[Keeper] = &[
    Keeper { name: "qcow2 zstd", program: "qemu-img", prepare: |_| Vec::new(), add: add_qcow2 },
    Keeper { name: "casync", program: "casync", prepare: |_| Vec::new(), add: add_casync },
    Keeper { name: "restic", program: "restic", prepare: prepare_restic, add: add_restic },
    Keeper { name: "borg", program: "borg", prepare: prepare_borg, add: add_borg },
    Keeper { name: "borg fixed 256 KiB", program: "borg", prepare: prepare_borg, add: add_borg_fixed },
];

fn add_qcow2(repository: &Path, disk: &Path, name: &str) -> Command {
    convert_command(disk, &repository.join(format!("{name}.qcow2")))
}

fn add_casync(repository: &Path, disk: &Path, name: &str) -> Command {
    let mut command = Command::new("casync");
    command.arg("make").arg(format!("--store={}", repository.join("default.castr").display()));
    command.arg(repository.join(format!("{name}.caibx"))).arg(disk);
    command
}

fn restic(repository: &Path) -> Command {
    let mut command = Command::new("restic");
    command.env("RESTIC_PASSWORD", "bench").args(["--quiet", "--no-cache", "--repo"]).arg(repository);
    command
}

fn prepare_restic(repository: &Path) -> Vec<Command> {
    let mut command = restic(repository);
    command.arg("init");
    vec![command]
}

fn add_restic(repository: &Path, disk: &Path, _name: &str) -> Command {
    let mut command = restic(repository);
    command.arg("backup").arg(disk);
    command
}

fn borg(repository: &Path) -> Command {
    let mut command = Command::new("borg");
    command
        .env("BORG_BASE_DIR", repository.with_extension("home"))
        .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
    command
}

fn prepare_borg(repository: &Path) -> Vec<Command> {
    let mut command = borg(repository);
    command.args(["init", "--encryption", "none"]).arg(repository);
    vec![command]
}

fn borg_create(repository: &Path, disk: &Path, name: &str, options: &[&str]) -> Command {
    let mut command = borg(repository);
    command.args(["create", "--compression", "zstd,3"]).args(options);
    command.arg(format!("{}::{name}", repository.display())).arg(disk);
    command
}

fn add_borg(repository: &Path, disk: &Path, name: &str) -> Command {
    borg_create(repository, disk, name, &[])
}

fn add_borg_fixed(repository: &Path, disk: &Path, name: &str) -> Command {
    borg_create(repository, disk, name, &["--chunker-params", "fixed,262144", "--sparse"])
}

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let servers = disks::servers()?;
    for round in 1..=bed.rounds {
        say(format!("store: images: round {round} of {}", bed.rounds));
        bulbil(bed, &servers, report)?;
        for keeper in KEEPERS.iter().filter(|keeper| find_program(keeper.program).is_some()) {
            keep(bed, keeper, &servers, report)?;
        }
    }
    report.note("store: images: bulbil's space is the whole store with its index; its images are durable, others are not synced");
    Ok(())
}

fn bulbil(bed: &Bed, servers: &[(&'static str, PathBuf)], report: &mut Report) -> Result<()> {
    let data = DataDir::fresh(bed, "images")?;
    let daemon = data.start_daemon()?;
    let mut used_bytes = data.store_bytes()?;
    for (number, (label, disk)) in servers.iter().enumerate() {
        disks::warm_up(disk)?;
        let daemon_cpu_s = daemon.cpu_s()?;
        let (cost, _) = data.import(disk, &format!("server-{number}"))?;
        let cpu_s = cost.cpu_s + daemon.cpu_s()? - daemon_cpu_s;
        let now_bytes = data.store_bytes()?;
        add(report, label, "bulbil", Cost { cpu_s, ..cost }, now_bytes.saturating_sub(used_bytes));
        used_bytes = now_bytes;
    }
    drop(daemon);
    std::fs::remove_dir_all(data.path()).context("cannot remove a data directory")
}

fn keep(bed: &Bed, keeper: &Keeper, servers: &[(&'static str, PathBuf)], report: &mut Report) -> Result<()> {
    let repository = bed.work.join("repository");
    let home = repository.with_extension("home");
    for directory in [&repository, &home] {
        fresh_directory(directory)?;
    }
    for mut command in (keeper.prepare)(&repository) {
        timed(&mut command)?;
    }
    let mut used_bytes = disk_usage_bytes(&repository)?;
    for (number, (label, disk)) in servers.iter().enumerate() {
        disks::warm_up(disk)?;
        let cost = timed(&mut (keeper.add)(&repository, disk, &format!("server-{number}")))?;
        let now_bytes = disk_usage_bytes(&repository)?;
        add(report, label, keeper.name, cost, now_bytes.saturating_sub(used_bytes));
        used_bytes = now_bytes;
    }
    for directory in [&repository, &home] {
        std::fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

fn add(report: &mut Report, label: &str, program: &str, cost: Cost, added_bytes: u64) {
    let label = |what: &str| format!("{label}: {what}");
    report.add(&label("space"), "MiB", Better::Lower, program, mib(added_bytes));
    report.add(&label("time"), "s", Better::Lower, program, cost.wall_s);
    report.add(&label("CPU"), "s", Better::Lower, program, cost.cpu_s);
}
