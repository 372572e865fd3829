//! Conversions between disk formats, beside `qemu-img convert`.
//!
//! What is written lies in memory (`/dev/shm`) where there is room: Bulbil makes its file durable before it says done,
//! `qemu-img` does not, and this is not a measurement of the machine's disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::import::DataDir;
use super::process::{Cost, disk_usage_bytes, fresh_directory, timed};
use super::report::{Better, Report};
use super::{Bed, bench_dir, disks, mib};
use crate::run::say;

const BULBIL: &str = "bulbil";
const QEMU: &str = "qemu-img";

/// A format with how either program is told to write it.
struct Variant {
    label: &'static str,
    file: &'static str,
    qemu_format: &'static str,
    qemu: &'static [&'static str],
    bulbil: &'static [&'static str],
}

/// `-m 8 -W` where it makes `qemu-img` quicker; a streamOptimized VMDK can only be written in order.
const VARIANTS: &[Variant] = &[
    Variant { label: "qcow2", file: "plain.qcow2", qemu_format: "qcow2", qemu: &[], bulbil: &["--format", "qcow2"] },
    Variant {
        label: "qcow2 zlib",
        file: "zlib.qcow2",
        qemu_format: "qcow2",
        qemu: &["-c", "-m", "8", "-W"],
        bulbil: &["--format", "qcow2", "--compress", "zlib"],
    },
    Variant {
        label: "qcow2 zstd",
        file: "zstd.qcow2",
        qemu_format: "qcow2",
        qemu: &["-c", "-o", "compression_type=zstd", "-m", "8", "-W"],
        bulbil: &["--format", "qcow2", "--compress", "zstd"],
    },
    Variant {
        label: "VMDK stream",
        file: "stream.vmdk",
        qemu_format: "vmdk",
        qemu: &["-o", "subformat=streamOptimized"],
        bulbil: &["--format", "vmdk", "--subformat", "streamOptimized"],
    },
    Variant {
        label: "VHD dynamic",
        file: "dynamic.vhd",
        qemu_format: "vpc",
        qemu: &["-o", "subformat=dynamic,force_size=on"],
        bulbil: &["--format", "vhd", "--subformat", "dynamic"],
    },
    Variant { label: "VHDX", file: "dynamic.vhdx", qemu_format: "vhdx", qemu: &[], bulbil: &["--format", "vhdx"] },
];

/// Room for the largest image and what lies beside it.
const NEEDED_BYTES: u64 = 6 << 30;

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let raw = disks::huge()?;
    let out = Output::new(bed)?;
    for variant in VARIANTS {
        source(&raw, variant)?;
    }
    let unchanged =
        Variant { label: "raw", file: "copy.raw", qemu_format: "raw", qemu: &[], bulbil: &["--format", "raw"] };
    for round in 1..=bed.rounds {
        say(format!("formats: round {round} of {}", bed.rounds));
        for variant in VARIANTS {
            let label = format!("raw to {}", variant.label);
            convert_both(bed, report, &out, &label, round, (&raw, "raw"), variant)?;
            let label = format!("{} to raw", variant.label);
            convert_both(bed, report, &out, &label, round, (&source(&raw, variant)?, variant.qemu_format), &unchanged)?;
        }
        convert_both(bed, report, &out, "raw to raw", round, (&raw, "raw"), &unchanged)?;
    }
    export(bed, report, &out, &raw)?;
    report.note(format!("formats: images are written to {}; qemu-img does not sync them", out.dir.display()));
    report.note("formats: qemu-img compresses with -m 8 -W where it can");
    Ok(())
}

/// An image of the disk made by `qemu-img`; kept.
fn source(raw: &Path, variant: &Variant) -> Result<PathBuf> {
    let path = bench_dir().join("disks").join(format!("huge-{}", variant.file));
    if !path.is_file() {
        say(format!("making {}", path.display()));
        let unfinished = path.with_extension("new");
        timed(&mut qemu_command((raw, "raw"), &unfinished, variant))?;
        std::fs::rename(&unfinished, &path).with_context(|| format!("cannot rename {}", unfinished.display()))?;
    }
    Ok(path)
}

/// The directory for what is written; removed in the end.
struct Output {
    dir: PathBuf,
}

impl Output {
    fn new(bed: &Bed) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let room = rustix::fs::statvfs(memory).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
        let dir = if room >= NEEDED_BYTES {
            memory.join(format!("bulbil-bench-{}", std::process::id()))
        } else {
            bed.work.join("out")
        };
        fresh_directory(&dir)?;
        Ok(Self { dir })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // What cannot be removed is only in the way of the next run, which says so.
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

/// Converts with both programs, which take turns to be first, and compares what they made in the first round.
fn convert_both(
    bed: &Bed,
    report: &mut Report,
    out: &Output,
    label: &str,
    round: u32,
    source: (&Path, &str),
    target: &Variant,
) -> Result<()> {
    let paths = [
        (BULBIL, out.dir.join(format!("bulbil-{}", target.file))),
        (QEMU, out.dir.join(format!("qemu-{}", target.file))),
    ];
    disks::warm_up(source.0)?;
    let order = if round.is_multiple_of(2) { [1, 0] } else { [0, 1] };
    let mut results = [None, None];
    for index in order {
        let (program, path) = &paths[index];
        let mut command = match *program {
            BULBIL => bulbil_command(bed, source.0, path, target),
            _ => qemu_command(source, path, target),
        };
        results[index] = Some((timed(&mut command)?, disk_usage_bytes(path)?));
    }
    if round == 1 {
        check_identical(&paths[0].1, &paths[1].1, target.qemu_format)?;
    }
    for ((program, path), result) in paths.iter().zip(results) {
        if let Some((cost, bytes)) = result {
            add(report, label, program, cost, bytes);
        }
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Exports the disk out of a store, beside `qemu-img` out of the format of like size and speed.
fn export(bed: &Bed, report: &mut Report, out: &Output, raw: &Path) -> Result<()> {
    let data = DataDir::fresh(bed, "data")?;
    let daemon = data.start_daemon()?;
    data.import(raw, "huge")?;
    let zstd = bench_dir().join("disks/huge-zstd.qcow2");
    let paths = [out.dir.join("exported.raw"), out.dir.join("converted.raw")];
    for round in 1..=bed.rounds {
        say(format!("formats: export, round {round} of {}", bed.rounds));
        disks::warm_up(&zstd)?;
        let daemon_cpu_s = daemon.cpu_s()?;
        let mut command = Command::new(&bed.bulbil);
        command.arg("--data-dir").arg(data.path()).args(["image", "export", "huge"]).arg(&paths[0]);
        let cost = timed(&mut command)?;
        let cost = Cost { cpu_s: cost.cpu_s + daemon.cpu_s()? - daemon_cpu_s, ..cost };
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&zstd, &paths[1]]);
        let peer = timed(&mut command)?;
        check_identical(&paths[0], &paths[1], "raw")?;
        for (program, cost, path) in [(BULBIL, cost, &paths[0]), (QEMU, peer, &paths[1])] {
            add(report, "export to raw (qcow2 zstd to raw)", program, cost, disk_usage_bytes(path)?);
            std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn add(report: &mut Report, label: &str, program: &str, cost: Cost, bytes: u64) {
    report.add(&format!("{label}: time"), "s", Better::Lower, program, cost.wall_s);
    report.add(&format!("{label}: CPU"), "s", Better::Lower, program, cost.cpu_s);
    report.add(&format!("{label}: space"), "MiB", Better::Lower, program, mib(bytes));
}

fn bulbil_command(bed: &Bed, source: &Path, target: &Path, variant: &Variant) -> Command {
    let mut command = Command::new(&bed.bulbil);
    command.args(["disk", "convert"]).args([source, target]).args(variant.bulbil);
    command
}

fn qemu_command((source, format): (&Path, &str), target: &Path, variant: &Variant) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", format, "-O", variant.qemu_format]).args(variant.qemu).args([source, target]);
    command
}

/// Fails unless both images hold the same disk, apart from zeros at the end of the one that was rounded up.
fn check_identical(one: &Path, other: &Path, format: &str) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["compare", "-f", format, "-F", format])
        .args([one, other])
        .output()
        .context("cannot start qemu-img compare")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        bail!("{} and {} differ: {}", one.display(), other.display(), text.trim_end());
    }
    Ok(())
}
