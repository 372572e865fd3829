//! From an image to a disk that answers, beside qemu-img, qemu-nbd, qemu-storage-daemon and nbdkit.
//!
//! Bulbil's volumes are served by `bench_volume` (crates/bulbil-control/examples), which opens
//! store, cache, volume and NBD server as the process beside a virtual machine does. QEMU has a
//! qcow2 overlay over the raw disk; nbdkit, qemu-nbd and qemu-storage-daemon have the raw disk itself as well,
//! with nothing between.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::fio::{self, Load, Until};
use super::import::{DataDir, convert_command};
use super::process::{Cost, Server, disk_usage_bytes, timed, timed_output};
use super::report::{Better, Report};
use super::{Bed, disks, mib, nbd};
use crate::run::{find_program, say};

const BULBIL: &str = "bulbil";
const QEMU_OVERLAY: &str = "qemu-nbd overlay";
const QEMU_ZSTD: &str = "qemu-nbd qcow2-zstd";
const NBDKIT: &str = "nbdkit raw";
const QEMU_RAW: &str = "qemu-nbd raw";
const STORAGE_DAEMON: &str = "qemu-storage-daemon raw";

/// Clones, and starts of a server: each takes milliseconds and varies much.
const CLONES: u32 = 20;
const STARTS: u32 = 20;

/// Few enough that hardly any frame is met twice.
const COLD_READS: u64 = 1000;
const COLD_RANGE_BYTES: u64 = 256 << 20;
/// What belongs to the overlay already when it is written again.
const OWNED_BYTES: u64 = 8 << 20;
/// 4 MiB of 4 KiB writes.
const GROWTH_WRITES: u64 = 1024;

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    let scene = Scene::set(bed)?;
    say("launch: clones");
    scene.clones(report)?;
    say("launch: first reads");
    scene.first_reads(report)?;
    if find_program("fio").is_none() {
        report.note("launch: reads, writes and growth left out, because fio is missing");
        return Ok(());
    }
    for round in 1..=bed.rounds {
        say(format!("launch: cold reads, durable writes, growth: round {round} of {}", bed.rounds));
        scene.cold_reads(round, report)?;
        scene.durable_writes(round, report)?;
        scene.growth(round, report)?;
    }
    scene.warm_reads(report)?;
    report.note("launch: cold means an empty base cache, or a qemu-nbd just started; files are in the page cache");
    Ok(())
}

/// One image and one disk that the clones are made of.
struct Image {
    disk: PathBuf,
    digest: String,
    size_bytes: u64,
    label: &'static str,
}

struct Scene<'a> {
    bed: &'a Bed,
    data: DataDir<'a>,
    /// Nearly all data: what is served.
    dense: Image,
    /// The Debian disk at two sizes: what is cloned.
    small: Image,
    huge: Image,
    /// The dense disk as compressed qcow2.
    dense_zstd: PathBuf,
}

impl<'a> Scene<'a> {
    fn set(bed: &'a Bed) -> Result<Self> {
        let debian = disks::debian()?;
        let large = disks::large()?;
        let (small_disk, huge_disk) = (bed.work.join("small.raw"), bed.work.join("huge.raw"));
        disks::resized(&debian.raw, &small_disk, 1 << 30)?;
        disks::resized(&debian.raw, &huge_disk, 1 << 40)?;
        let dense_zstd = bed.work.join("dense-zstd.qcow2");
        timed(&mut convert_command(&large, &dense_zstd))?;
        let data = DataDir::fresh(bed, "data")?;
        let daemon = data.start_daemon()?;
        let import = |disk: PathBuf, name: &'static str, label: &'static str| -> Result<Image> {
            let size_bytes = std::fs::metadata(&disk)?.len();
            let (_, digest) = data.import(&disk, name)?;
            Ok(Image { disk, digest, size_bytes, label })
        };
        let dense = import(large, "dense", "dense")?;
        let small = import(small_disk, "small", "1 GiB")?;
        let huge = import(huge_disk, "huge", "1 TiB")?;
        drop(daemon);
        disks::warm_up(&dense.disk)?;
        Ok(Self { bed, data, dense, small, huge, dense_zstd })
    }

    fn bench_volume(&self, command: &str) -> Command {
        let mut program = Command::new(&self.bed.bench_volume);
        program.arg(command).arg(self.data.path());
        program
    }

    fn clone_volume(&self, image: &Image) -> Result<(Cost, String)> {
        let mut command = self.bench_volume("create");
        let (cost, text) = timed_output(command.args([&image.digest, &image.size_bytes.to_string()]))?;
        Ok((cost, text.trim().to_owned()))
    }

    fn clone_overlay(&self, image: &Image, name: &str) -> Result<(Cost, PathBuf)> {
        let overlay = self.bed.work.join(name);
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&image.disk, &overlay]);
        Ok((timed(&mut command)?, overlay))
    }

    /// The time of whole commands, and of the work inside.
    fn clones(&self, report: &mut Report) -> Result<()> {
        for round in 0..CLONES {
            for image in [&self.small, &self.huge] {
                let label = format!("clone {}: whole command", image.label);
                let (bulbil, _) = self.clone_volume(image)?;
                let (qemu, overlay) = self.clone_overlay(image, &format!("clone-{round}-{}.qcow2", image.label))?;
                let synced = timed(Command::new("sync").arg(&overlay))?;
                for (program, seconds) in [
                    ("bulbil, durable", bulbil.wall_s),
                    ("qemu-img create", qemu.wall_s),
                    ("qemu-img create; sync", qemu.wall_s + synced.wall_s),
                ] {
                    report.add(&label, "ms", Better::Lower, program, seconds * 1e3);
                }
            }
        }
        for image in [&self.small, &self.huge] {
            let mut command = self.bench_volume("time-creates");
            command.args([&image.digest, &image.size_bytes.to_string(), &CLONES.to_string()]);
            for line in timed_output(&mut command)?.1.lines() {
                let microseconds: f64 = line.parse().context("bench_volume printed no time")?;
                let label = format!("clone {}: inside a process", image.label);
                report.add(&label, "ms", Better::Lower, "bulbil, durable", microseconds / 1e3);
            }
        }
        Ok(())
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.bed.work.join(format!("{name}.sock"))
    }

    fn bulbil_server(&self, volume: &str) -> (Command, PathBuf) {
        let socket = self.socket("bulbil");
        let mut command = self.bench_volume("serve");
        command.arg(volume).arg(&socket);
        (command, socket)
    }

    fn qemu_server(&self, disk: &Path, format: &str) -> (Command, PathBuf) {
        let socket = self.socket(&format!("qemu-{format}"));
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-e", "16", "-f", format, "-k"]).args([&socket, disk]);
        (command, socket)
    }

    fn storage_daemon(&self, disk: &Path) -> (Command, PathBuf) {
        let socket = self.socket("storage-daemon");
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!("file,node-name=disk,filename={}", disk.display()));
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={},max-connections=16", socket.display()));
        command.args(["--export", "nbd,id=export,node-name=disk,name=,writable=on"]);
        (command, socket)
    }

    fn nbdkit_server(&self, disk: &Path) -> (Command, PathBuf) {
        let socket = self.socket("nbdkit");
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).arg("file").arg(disk);
        (command, socket)
    }

    /// Servers of the dense disk: a new volume, a new overlay, and what `raw_disk` gives to those that serve files.
    fn servers(&self, raw_disk: impl Fn(&str) -> Result<Option<PathBuf>>) -> Result<Vec<Contestant>> {
        let (_, volume) = self.clone_volume(&self.dense)?;
        let (_, overlay) = self.clone_overlay(&self.dense, &format!("{volume}.qcow2"))?;
        let volume_files = self.data.path().join("volumes").join(&volume);
        let mut contestants = vec![
            Contestant::new(BULBIL, self.bulbil_server(&volume), &volume_files),
            Contestant::new(QEMU_OVERLAY, self.qemu_server(&overlay, "qcow2"), &overlay),
        ];
        for (name, program) in [(NBDKIT, "nbdkit"), (QEMU_RAW, "qemu-nbd"), (STORAGE_DAEMON, "qemu-storage-daemon")] {
            if find_program(program).is_none() {
                continue;
            }
            let Some(disk) = raw_disk(program)? else { continue };
            let command = match name {
                NBDKIT => self.nbdkit_server(&disk),
                QEMU_RAW => self.qemu_server(&disk, "raw"),
                _ => self.storage_daemon(&disk),
            };
            contestants.push(Contestant::new(name, command, &disk));
        }
        Ok(contestants)
    }

    /// From the start of a server to its first block, and the same on one that runs.
    fn first_reads(&self, report: &mut Report) -> Result<()> {
        let mut contestants = self.servers(|_| Ok(Some(self.dense.disk.clone())))?;
        // Every server answers from memory, as it does once an image is in use.
        for contestant in &mut contestants {
            nbd::read_first_block(contestant.start()?.connect()?)?;
        }
        for _ in 0..STARTS {
            for contestant in &mut contestants {
                let mut server = contestant.begin()?;
                nbd::read_first_block(server.connect()?)?;
                let ms = server.age().as_secs_f64() * 1e3;
                report.add("server start to first 4 KiB", "ms", Better::Lower, contestant.name, ms);
            }
        }
        let mut running = contestants.iter_mut().map(Contestant::start).collect::<Result<Vec<_>>>()?;
        for _ in 0..STARTS {
            for (contestant, server) in contestants.iter().zip(&mut running) {
                let start = std::time::Instant::now();
                nbd::read_first_block(server.connect()?)?;
                let ms = start.elapsed().as_secs_f64() * 1e3;
                report.add("connect and first 4 KiB, running server", "ms", Better::Lower, contestant.name, ms);
            }
        }
        Ok(())
    }

    fn load(&self, rw: &'static str, block: &'static str, depth: u32) -> Load {
        Load {
            rw,
            block,
            depth,
            until: Until::Seconds(self.bed.seconds),
            range_bytes: self.dense.size_bytes / (256 << 10) * (256 << 10),
            flush_every: 0,
            seed: 1,
        }
    }

    fn warm_reads(&self, report: &mut Report) -> Result<()> {
        let mut contestants = self.servers(|_| Ok(Some(self.dense.disk.clone())))?;
        let servers = contestants.iter_mut().map(Contestant::start).collect::<Result<Vec<_>>>()?;
        say("launch: warm reads: reading everything once");
        for server in &servers {
            fio::run(server, &Load { until: Until::EndOfRange, ..self.load("read", "256k", 4) })?;
        }
        for round in 1..=self.bed.rounds {
            say(format!("launch: warm reads: round {round} of {}", self.bed.rounds));
            for (contestant, server) in contestants.iter().zip(&servers) {
                for depth in [1, 32] {
                    let load = Load { seed: round, ..self.load("randread", "4k", depth) };
                    let outcome = fio::run(server, &load)?;
                    let label = |what: &str| format!("warm 4 KiB random reads, depth {depth}: {what}");
                    report.add(&label("rate"), "1/s", Better::Higher, contestant.name, outcome.iops);
                    report.add(&label("server CPU"), "us each", Better::Lower, contestant.name, outcome.server_cpu_us);
                }
                let outcome = fio::run(server, &self.load("read", "256k", 4))?;
                let label = "warm 256 KiB reads in order, depth 4";
                report.add(label, "MB/s", Better::Higher, contestant.name, outcome.bytes_per_s / 1e6);
            }
        }
        Ok(())
    }

    /// Reads that decompress: from the store with an empty cache, from compressed qcow2.
    fn cold_reads(&self, round: u32, report: &mut Report) -> Result<()> {
        let random =
            |depth: u32| Load { until: Until::Requests(COLD_READS), seed: round, ..self.load("randread", "4k", depth) };
        let in_order = Load { until: Until::EndOfRange, range_bytes: COLD_RANGE_BYTES, ..self.load("read", "256k", 4) };
        let (_, volume) = self.clone_volume(&self.dense)?;
        for (label, load) in [
            ("cold 4 KiB random reads, depth 1", random(1)),
            ("cold 4 KiB random reads, depth 32", random(32)),
            ("cold 256 KiB reads in order, depth 4", in_order),
        ] {
            let by_rate = load.rw == "randread";
            let cache = self.data.path().join("cache");
            if cache.exists() {
                std::fs::remove_dir_all(&cache).with_context(|| format!("cannot remove {}", cache.display()))?;
            }
            for (name, (mut command, socket)) in
                [(BULBIL, self.bulbil_server(&volume)), (QEMU_ZSTD, self.qemu_server(&self.dense_zstd, "qcow2"))]
            {
                let server = Server::start_and_wait(&mut command, &socket)?;
                let outcome = fio::run(&server, &load)?;
                let (unit, value) = if by_rate { ("1/s", outcome.iops) } else { ("MB/s", outcome.bytes_per_s / 1e6) };
                report.add(&format!("{label}: rate"), unit, Better::Higher, name, value);
                let cpu_label = format!("{label}: server CPU");
                report.add(&cpu_label, "us each", Better::Lower, name, outcome.server_cpu_us);
            }
        }
        Ok(())
    }

    /// A flush after every write: on blocks that are the image's until then, and on the overlay's own.
    fn durable_writes(&self, round: u32, report: &mut Report) -> Result<()> {
        let write =
            |range_bytes: u64| Load { flush_every: 1, range_bytes, seed: round, ..self.load("randwrite", "4k", 1) };
        let everywhere = write(self.load("randwrite", "4k", 1).range_bytes);
        let own = Load {
            until: Until::EndOfRange,
            range_bytes: OWNED_BYTES,
            flush_every: 8,
            ..self.load("write", "256k", 4)
        };
        for contestant in &mut self.servers(|program| self.scratch_disk(program, round).map(Some))? {
            let server = contestant.start()?;
            let first = fio::run(&server, &everywhere)?;
            fio::run(&server, &own)?;
            let again = fio::run(&server, &write(OWNED_BYTES))?;
            for (label, outcome) in
                [("4 KiB write and flush, first touch", first), ("4 KiB write and flush, own blocks", again)]
            {
                report.add(label, "1/s", Better::Higher, contestant.name, outcome.iops);
            }
        }
        Ok(())
    }

    /// A raw disk for a program to write to: empty, as large as the dense one.
    fn scratch_disk(&self, program: &str, round: u32) -> Result<PathBuf> {
        let path = self.bed.work.join(format!("scratch-{program}-{round}.raw"));
        let file = std::fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.set_len(self.dense.size_bytes).with_context(|| format!("cannot make {} larger", path.display()))?;
        Ok(path)
    }

    fn growth(&self, round: u32, report: &mut Report) -> Result<()> {
        let load = Load {
            until: Until::Requests(GROWTH_WRITES),
            flush_every: 256,
            seed: round,
            ..self.load("randwrite", "4k", 32)
        };
        for contestant in &mut self.servers(|_| Ok(None))? {
            let before_bytes = disk_usage_bytes(&contestant.files)?;
            let server = contestant.start()?;
            fio::run(&server, &load)?;
            let grown_bytes = disk_usage_bytes(&contestant.files)?.saturating_sub(before_bytes);
            if grown_bytes == 0 {
                bail!("{} wrote nothing", contestant.name);
            }
            let label = "growth by 4 MiB of random 4 KiB writes";
            report.add(label, "MiB", Better::Lower, contestant.name, mib(grown_bytes));
        }
        Ok(())
    }
}

/// A server that can be started many times.
struct Contestant {
    name: &'static str,
    command: Command,
    socket: PathBuf,
    /// What it writes to.
    files: PathBuf,
}

impl Contestant {
    fn new(name: &'static str, (command, socket): (Command, PathBuf), files: &Path) -> Self {
        Self { name, command, socket, files: files.to_owned() }
    }

    fn begin(&mut self) -> Result<Server> {
        Server::start(&mut self.command, &self.socket)
    }

    fn start(&mut self) -> Result<Server> {
        Server::start_and_wait(&mut self.command, &self.socket)
    }
}
