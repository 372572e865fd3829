//! Clones of volumes, beside overlays that `qemu-img create -b` makes.
//!
//! The parent is a volume over the Debian disk, of three sizes; QEMU's is a qcow2 overlay over the same disk as qcow2,
//! which has every size on every file system. A qcow2 file below an overlay must not be written to any more, so whoever
//! goes on with the parent needs a second overlay; a parent of Bulbil's clones needs nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::bench::fio::{self, Load, Until};
use crate::bench::import::{DataDir, convert_command};
use crate::bench::process::{Server, timed, timed_output};
use crate::bench::report::{Better, Report};
use crate::bench::{Bed, disks};
use crate::run::{find_program, say};

const BULBIL: &str = "bulbil, durable";
const LIVE: &str = "bulbil, durable, open and written to between";
const QEMU: &str = "qemu-img create";
const QEMU_SYNCED: &str = "qemu-img create; sync";
const COPY: &str = "cp --reflink=auto; sync";

/// Each takes milliseconds and varies much.
const CLONES: u32 = 20;

/// Made in one go.
const MANY: u32 = 1000;

/// Random writes to a parent, and where.
const WRITES: u64 = 100_000;
const WRITTEN_BYTES: u64 = 1 << 30;

pub(super) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let data = DataDir::fresh(bed, "clones")?;
    let disk = disks::debian()?.raw;
    let mut parents = Vec::new();
    {
        let _daemon = data.start_daemon()?;
        for (name, label, size) in [("gib", "1 GiB", "1G"), ("tib", "1 TiB", "1T"), ("most", "64 TiB", "64T")] {
            say(format!("clones: a disk of {label}"));
            parents.push(Parent::make(bed, &data, &disk, (name, label, size))?);
        }
    }
    for parent in &parents {
        parent.clones(&data, "", report)?;
    }
    if find_program("fio").is_none() {
        report.note("clones: those of volumes that were written to left out, because fio is missing");
        return Ok(());
    }
    for parent in [&parents[0], &parents[2]] {
        say(format!("clones: {WRITES} writes to the parent of {}", parent.label));
        parent.write(&data)?;
        parent.clones(&data, " after 100 000 writes", report)?;
        parent.copies(bed, report)?;
    }
    say(format!("clones: {MANY} in one go"));
    parents[0].many(bed, &data, report)
}

/// A volume, and QEMU's overlay over the same disk.
struct Parent {
    label: &'static str,
    name: &'static str,
    volume: String,
    overlay: PathBuf,
}

impl Parent {
    fn make(
        bed: &Bed,
        data: &DataDir<'_>,
        disk: &Path,
        (name, label, size): (&'static str, &'static str, &str),
    ) -> Result<Self> {
        let base = bed.work.join(format!("{name}.qcow2"));
        timed(&mut convert_command(disk, &base))?;
        timed(Command::new("qemu-img").args(["resize", "-q", "--shrink"]).arg(&base).arg(size))?;
        data.import(&base, name)?;
        let volume = data.bulbil_json(&["volume", "create", &format!("{name}-parent"), "--image", name])?;
        let volume = volume["id"].as_str().context("a volume without an id")?.to_owned();
        let overlay = bed.work.join(format!("{name}-parent.qcow2"));
        timed(&mut overlay_command(&base, &overlay))?;
        Ok(Self { label, name, volume, overlay })
    }

    /// Whole commands, and the work inside.
    fn clones(&self, data: &DataDir<'_>, when: &str, report: &mut Report) -> Result<()> {
        let label = format!("clone of {}{when}: whole command", self.label);
        let daemon = data.start_daemon()?;
        let mut add = |program: &str, ms: f64| report.add(&label, "ms", Better::Lower, program, ms);
        for _ in 0..CLONES {
            let start = Instant::now();
            data.bulbil_json(&["volume", "clone", &format!("{}-parent", self.name)])?;
            add(BULBIL, start.elapsed().as_secs_f64() * 1e3);
            let clone = self.overlay.with_extension("clone");
            let qemu = timed(&mut overlay_command(&self.overlay, &clone))?;
            let synced = timed(Command::new("sync").arg(&clone))?;
            add(QEMU, qemu.wall_s * 1e3);
            add(QEMU_SYNCED, (qemu.wall_s + synced.wall_s) * 1e3);
            std::fs::remove_file(&clone).context("cannot remove a clone")?;
        }
        drop(daemon);
        let label = format!("clone of {}{when}: inside a process", self.label);
        for (command, program) in [("time-clones", BULBIL), ("time-live-clones", LIVE)] {
            for us in self.timed_clones(data, command, CLONES)? {
                report.add(&label, "ms", Better::Lower, program, us / 1e3);
            }
        }
        Ok(())
    }

    fn timed_clones(&self, data: &DataDir<'_>, command: &str, count: u32) -> Result<Vec<f64>> {
        let mut program = Command::new(&data.bed().bench_volume);
        program.arg(command).arg(data.path()).args([&self.volume, &count.to_string()]);
        let text = timed_output(&mut program)?.1;
        text.lines().map(|line| line.parse().context("bench_volume printed no time")).collect()
    }

    /// Random writes to both, flushed at the end.
    fn write(&self, data: &DataDir<'_>) -> Result<()> {
        let load = Load {
            rw: "randwrite",
            block: "4k",
            depth: 32,
            until: Until::Requests(WRITES),
            range_bytes: WRITTEN_BYTES,
            flush_every: 10_000,
            seed: 1,
        };
        let socket = data.bed().work.join("clones.sock");
        let mut bulbil = Command::new(&data.bed().bench_volume);
        bulbil.arg("serve").arg(data.path()).args([self.volume.as_ref(), socket.as_os_str()]);
        let mut qemu = Command::new("qemu-nbd");
        qemu.args(["-t", "-f", "qcow2", "-k"]).args([&socket, &self.overlay]);
        for command in [&mut bulbil, &mut qemu] {
            let server = Server::start_and_wait(command, &socket)?;
            fio::run(&server, &load)?;
        }
        Ok(())
    }

    /// The whole overlay copied, as a clone that shares nothing, or all where the file system can.
    fn copies(&self, bed: &Bed, report: &mut Report) -> Result<()> {
        let label = format!("clone of {} after 100 000 writes: whole command", self.label);
        let copy = bed.work.join("copy.qcow2");
        for _ in 0..3 {
            let copied = timed(Command::new("cp").arg("--reflink=auto").args([&self.overlay, &copy]))?;
            let synced = timed(Command::new("sync").arg(&copy))?;
            report.add(&label, "ms", Better::Lower, COPY, (copied.wall_s + synced.wall_s) * 1e3);
            std::fs::remove_file(&copy).context("cannot remove a copy")?;
        }
        Ok(())
    }

    fn many(&self, bed: &Bed, data: &DataDir<'_>, report: &mut Report) -> Result<()> {
        let (time, space) = (format!("{MANY} clones in one go"), format!("{MANY} clones: space"));
        let mut add = |program: &str, seconds: f64, mib: f64| {
            report.add(&time, "s", Better::Lower, program, seconds);
            report.add(&space, "MiB", Better::Lower, program, mib);
        };
        let before = allocated_mib(data.path())?;
        let seconds = self.timed_clones(data, "time-clones", MANY)?.iter().sum::<f64>() / 1e6;
        add("bulbil, durable, one process", seconds, allocated_mib(data.path())? - before);
        let daemon = data.start_daemon()?;
        let before = allocated_mib(data.path())?;
        let start = Instant::now();
        for _ in 0..MANY {
            data.bulbil_json(&["volume", "clone", &format!("{}-parent", self.name)])?;
        }
        let seconds = start.elapsed().as_secs_f64();
        add("bulbil, durable, one command each", seconds, allocated_mib(data.path())? - before);
        drop(daemon);
        let directory = bed.work.join("many");
        std::fs::create_dir(&directory).context("cannot make a directory")?;
        let start = Instant::now();
        for number in 0..MANY {
            timed(&mut overlay_command(&self.overlay, &directory.join(number.to_string())))?;
        }
        add(QEMU, start.elapsed().as_secs_f64(), allocated_mib(&directory)?);
        Ok(())
    }
}

fn overlay_command(below: &Path, overlay: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([below, overlay]);
    command
}

/// What is allocated below a directory; a file with several names counts once.
fn allocated_mib(directory: &Path) -> Result<f64> {
    let text = timed_output(Command::new("du").args(["-s", "--block-size=1"]).arg(directory))?.1;
    let bytes: f64 = text.split_whitespace().next().and_then(|word| word.parse().ok()).context("du said nothing")?;
    Ok(bytes / f64::from(1 << 20))
}
