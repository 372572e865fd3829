//! Inside a guest: a volume by vhost-user-blk and by NBD, beside QEMU's virtio-blk on a raw file.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bench::guest::{Attach, LoadGuest};
use crate::bench::import::DataDir;
use crate::bench::process::{Server, timed_output};
use crate::bench::report::{Better, Report};
use crate::bench::{Bed, disks};
use crate::run::say;

const RANGE: &str = "256M";

/// Name, what is measured, options of fio.
const LOADS: &[(&str, bool, &str)] = &[
    ("4 KiB random reads, depth 1", true, "--rw=randread --bs=4k --iodepth=1"),
    ("4 KiB random reads, depth 16", true, "--rw=randread --bs=4k --iodepth=16"),
    ("4 KiB random writes, depth 1", true, "--rw=randwrite --bs=4k --iodepth=1"),
    ("4 KiB random writes, depth 16", true, "--rw=randwrite --bs=4k --iodepth=16"),
    ("1 MiB reads in order, depth 4", false, "--rw=read --bs=1M --iodepth=4"),
];

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let guest = LoadGuest::build()?;
    let disk = disks::large()?;
    let data = DataDir::fresh(bed, "guest")?;
    let daemon = data.start_daemon()?;
    let (_, digest) = data.import(&disk, "dense")?;
    drop(daemon);
    let size_bytes = std::fs::metadata(&disk)?.len();
    let copy = bed.work.join("guest.raw");
    disks::resized(&disk, &copy, size_bytes)?;
    for round in 1..=bed.rounds {
        say(format!("store: in a guest: round {round} of {}", bed.rounds));
        for (name, option) in [("bulbil vhost-user-blk", "--vhost-user"), ("bulbil NBD", "--nbd")] {
            let volume = volume(bed, data.path(), &digest, size_bytes)?;
            let socket = bed.work.join("guest.sock");
            let mut command = Command::new(&bed.bench_volume);
            command.arg("serve").arg(data.path()).args([&volume]).arg(&socket).arg(option);
            let _server = Server::start_and_listen(&mut command, &socket)?;
            let attach = if option == "--nbd" { Attach::nbd(&socket) } else { Attach::vhost_user(&socket) };
            measure(bed, &guest, attach, name, report)?;
        }
        measure(bed, &guest, Attach::raw_file(&copy), "virtio-blk raw file", report)?;
    }
    report.note("store: in a guest: emulated (TCG), one processor; everything is in the page cache");
    Ok(())
}

fn volume(bed: &Bed, data: &Path, digest: &str, size_bytes: u64) -> Result<String> {
    let mut command = Command::new(&bed.bench_volume);
    command.arg("create").arg(data).args([digest, &size_bytes.to_string()]);
    Ok(timed_output(&mut command)?.1.trim().to_owned())
}

fn measure(bed: &Bed, guest: &LoadGuest, attach: Attach, name: &str, report: &mut Report) -> Result<()> {
    let mut arguments = format!("--size={RANGE} --time_based --runtime={:.0}ms", bed.seconds * 1e3);
    // Everything once, so that the base cache has it.
    arguments.push_str(" --name=warm --rw=read --bs=1M --iodepth=4 --time_based=0");
    for (number, (_, _, options)) in LOADS.iter().enumerate() {
        arguments.push_str(&format!(" --name=load{number} --stonewall --time_based=1 {options}"));
    }
    let document = guest.fio(&bed.work, &arguments, attach)?;
    for (number, (label, by_rate, options)) in LOADS.iter().enumerate() {
        let direction = if options.contains("write") { "write" } else { "read" };
        let value = figure(&document, &format!("load{number}"), direction, *by_rate)
            .with_context(|| format!("fio in the guest tells nothing of {label}"))?;
        let (unit, value) = if *by_rate { ("1/s", value) } else { ("MB/s", value / 1e6) };
        report.add(&format!("in a guest: {label}"), unit, Better::Higher, name, value);
    }
    Ok(())
}

fn figure(document: &Value, job: &str, direction: &str, by_rate: bool) -> Option<f64> {
    let jobs = document["jobs"].as_array()?;
    let found = jobs.iter().find(|found| found["jobname"] == job)?;
    found[direction][if by_rate { "iops" } else { "bw_bytes" }].as_f64().filter(|value| *value > 0.0)
}
