//! A host that has nothing of an image boots from it: lazily out of S3 behind a network, after a download, locally.
//!
//! The guest starts by its own boot loader, so its kernel is among what is fetched. Each boot has a data directory, a
//! volume and a base cache of its own, or a disk file of its own. Times begin before the volume is made, or before the
//! download.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bench::boot::boot;
use crate::bench::guest::Attach;
use crate::bench::import::{DataDir, convert_command};
use crate::bench::network::{SlowS3, Traffic};
use crate::bench::process::{Server, timed, timed_output};
use crate::bench::report::{Better, Report};
use crate::bench::{Bed, disks, mib};
use crate::run::say;

const LATENCY_MS: u32 = 30;
const BYTES_PER_S: u64 = 100_000_000;

/// The object that is downloaded.
const DOWNLOAD: &str = "image.qcow2";

const TRACED: &str = "bulbil, S3, with the trace";
const FIRST: &str = "bulbil, S3, first boot";
const LOCAL: &str = "bulbil, local store";
const DOWNLOADED: &str = "download, then boot";
const RAW: &str = "raw file";

/// In the order of the report.
const NAMES: [&str; 5] = [TRACED, FIRST, LOCAL, DOWNLOADED, RAW];

/// In the order of their turns: the first boot makes the trace of the next one.
const TURNS: [&str; 5] = [RAW, LOCAL, DOWNLOADED, FIRST, TRACED];
const OTHER_TURNS: [&str; 5] = [FIRST, TRACED, DOWNLOADED, LOCAL, RAW];

/// What one boot took.
struct Outcome {
    userspace_s: f64,
    login_s: f64,
    qemu_cpu_s: f64,
    traffic: Traffic,
    /// What the volume says of its reads.
    reads: Option<String>,
}

/// What a boot reads.
#[derive(Clone, Copy)]
struct WorkingSet {
    read_bytes: u64,
    frames: u64,
    stored_bytes: u64,
}

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let mut scene = Scene::set(bed)?;
    for round in 1..=bed.rounds {
        scene.forget_trace()?;
        let mut outcomes = Vec::new();
        let mut working_set = None;
        for name in if round % 2 == 1 { TURNS } else { OTHER_TURNS } {
            say(format!("store: cold boot: round {round} of {}: {name}", bed.rounds));
            let outcome = scene.boot(name)?;
            say(format!("  {:.1} s; {}", outcome.login_s, outcome.reads.as_deref().unwrap_or("no reads are counted")));
            outcomes.push((name, outcome));
            if name == FIRST {
                working_set = Some(scene.working_set()?);
            }
        }
        add(report, &outcomes, working_set.context("no boot has left a trace")?)?;
    }
    report.note(format!(
        "store: cold boot: {LATENCY_MS} ms before each answer and {} MB/s for all; Debian 12 by SeaBIOS and GRUB from its own disk, emulated (TCG)",
        BYTES_PER_S / 1_000_000
    ));
    report.note("store: cold boot: userspace is when systemd has mounted the file systems and writes its first files");
    report.note("store: cold boot: the working set is the frames, as stored, of what the first boot of the round read up to its login prompt");
    Ok(())
}

fn add(report: &mut Report, outcomes: &[(&str, Outcome)], needed: WorkingSet) -> Result<()> {
    let found = |name: &str| outcomes.iter().find(|(known, _)| *known == name).map(|(_, outcome)| outcome);
    let raw_s = found(RAW).context("no boot of a raw file")?.login_s;
    for name in NAMES {
        let outcome = found(name).with_context(|| format!("no boot: {name}"))?;
        let mut lower = |what: &str, unit, value| {
            report.add(&format!("cold boot: {what}"), unit, Better::Lower, name, value);
        };
        lower("to userspace", "s", outcome.userspace_s);
        lower("to the login prompt", "s", outcome.login_s);
        lower("of that, QEMU's CPU", "s", outcome.qemu_cpu_s);
        lower("of that, everything else", "s", outcome.login_s - outcome.qemu_cpu_s);
        lower("to the login prompt, beside the raw file of the round", "x", outcome.login_s / raw_s);
        if [TRACED, FIRST, DOWNLOADED].contains(&name) {
            lower("requests", "", outcome.traffic.requests as f64);
            lower("bytes fetched", "MiB", mib(outcome.traffic.bytes));
            let share = outcome.traffic.bytes as f64 / needed.stored_bytes as f64;
            lower("bytes fetched, beside the working set", "x", share);
        }
        if [TRACED, FIRST].contains(&name) {
            lower("frames fetched more than once", "MiB", mib(outcome.traffic.repeated_bytes));
            let reads = outcome.reads.as_deref().context("a volume that tells nothing of its reads")?;
            for counted in ["demand_frames", "prefetched_frames", "wasted_frames"] {
                let value = number(reads, counted).with_context(|| format!("no {counted} in `{reads}`"))?;
                lower(&counted.replace('_', " "), "", value as f64);
            }
        }
    }
    let set = "cold boot: working set";
    report.add(&format!("{set}: stored"), "MiB", Better::Lower, "Debian 12", mib(needed.stored_bytes));
    report.add(&format!("{set}: frames"), "", Better::Lower, "Debian 12", needed.frames as f64);
    report.add(&format!("{set}: blocks read by the guest"), "MiB", Better::Lower, "Debian 12", mib(needed.read_bytes));
    Ok(())
}

/// The number of a field in what Rust writes of a structure.
fn number(text: &str, field: &str) -> Option<u64> {
    let (_, rest) = text.split_once(&format!("{field}: "))?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

struct Scene<'a> {
    bed: &'a Bed,
    s3: SlowS3,
    local: DataDir<'a>,
    digest: String,
    disk: PathBuf,
    size_bytes: u64,
}

impl<'a> Scene<'a> {
    fn set(bed: &'a Bed) -> Result<Self> {
        let disk = disks::debian()?.raw;
        let size_bytes = std::fs::metadata(&disk).with_context(|| format!("cannot read {}", disk.display()))?.len();
        let mut s3 = SlowS3::start(&bed.s3_behind_network, LATENCY_MS, BYTES_PER_S)?;
        say("store: cold boot: filling the stores");
        timed(&mut convert_command(&disk, &s3.objects.join(DOWNLOAD)))?;
        let local = DataDir::fresh(bed, "local")?;
        let (_, digest) = {
            let _daemon = local.start_daemon()?;
            local.import(&disk, "debian")?
        };
        let filler = DataDir::fresh(bed, "filler")?;
        let (_, remote_digest) = {
            let _daemon = filler.start_daemon_with(s3.variables())?;
            filler.import(&disk, "debian")?
        };
        if remote_digest != digest {
            bail!("the content is {digest} in one store and {remote_digest} in the other");
        }
        s3.take()?;
        Ok(Self { bed, s3, local, digest, disk, size_bytes })
    }

    /// As if nobody had booted the image yet.
    fn forget_trace(&self) -> Result<()> {
        for store in [self.s3.objects.join("store"), self.local.path().join("store")] {
            let traces = store.join("attachments/boot-trace");
            if traces.exists() {
                std::fs::remove_dir_all(&traces).with_context(|| format!("cannot remove {}", traces.display()))?;
            }
        }
        Ok(())
    }

    fn boot(&mut self, name: &str) -> Result<Outcome> {
        match name {
            RAW => self.boot_raw(),
            DOWNLOADED => self.boot_downloaded(),
            LOCAL => {
                let cache = self.local.path().join("cache");
                if cache.exists() {
                    std::fs::remove_dir_all(&cache).with_context(|| format!("cannot remove {}", cache.display()))?;
                }
                let data = self.local.path().to_owned();
                self.boot_volume(&data, false)
            }
            _ => {
                let host = DataDir::fresh(self.bed, "host")?;
                self.boot_volume(host.path(), true)
            }
        }
    }

    fn boot_disk(&mut self, attach: &Attach, start: Instant) -> Result<Outcome> {
        let mut traffic = Traffic::default();
        let times = boot(attach, || {
            traffic = self.s3.take()?;
            Ok(())
        })?;
        let seconds = |at: Instant| (at - start).as_secs_f64();
        let (userspace_s, login_s) = (seconds(times.userspace), seconds(times.login));
        Ok(Outcome { userspace_s, login_s, qemu_cpu_s: times.cpu_s, traffic, reads: None })
    }

    fn boot_raw(&mut self) -> Result<Outcome> {
        let copy = self.bed.work.join("boot.raw");
        disks::resized(&self.disk, &copy, self.size_bytes)?;
        // The guest's first flush must not wait for what the copy has left to be written.
        timed(Command::new("sync").arg(&copy))?;
        disks::warm_up(&copy)?;
        self.boot_disk(&Attach::raw_file(&copy), Instant::now())
    }

    fn boot_downloaded(&mut self) -> Result<Outcome> {
        let file = self.bed.work.join(DOWNLOAD);
        let start = Instant::now();
        timed(&mut self.s3.download_command(DOWNLOAD, &file)?)?;
        self.boot_disk(&Attach::qcow2_file(&file), start)
    }

    fn boot_volume(&mut self, data: &Path, remote: bool) -> Result<Outcome> {
        let socket = self.bed.work.join("cold-boot.sock");
        let start = Instant::now();
        let mut create = self.bench_volume("create", data, remote);
        let volume = timed_output(create.args([&self.digest, &self.size_bytes.to_string()]))?.1;
        let mut serve = self.bench_volume("serve", data, remote);
        serve.arg(volume.trim()).arg(&socket).args(["--vhost-user", "--boot"]);
        let mut server = Server::start_and_listen(&mut serve, &socket)?;
        let outcome = self.boot_disk(&Attach::vhost_user(&socket), start)?;
        server.send("boot-over")?;
        server.send("stats")?;
        let told = server.finish()?;
        let reads = told.lines().find(|line| line.starts_with("ReadStats")).map(str::to_owned);
        Ok(Outcome { reads, ..outcome })
    }

    fn bench_volume(&self, command: &str, data: &Path, remote: bool) -> Command {
        let mut program = Command::new(&self.bed.bench_volume);
        program.arg(command).arg(data);
        if remote {
            program.envs(self.s3.variables());
        }
        program
    }

    fn working_set(&mut self) -> Result<WorkingSet> {
        let host = DataDir::fresh(self.bed, "host")?;
        let mut command = self.bench_volume("working-set", host.path(), true);
        let text = timed_output(command.arg(&self.digest))?.1;
        self.s3.take()?;
        let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [read_bytes, frames, stored_bytes] = numbers[..] else { bail!("bench_volume printed `{text}`") };
        Ok(WorkingSet { read_bytes, frames, stored_bytes })
    }
}
