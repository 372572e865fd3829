//! `cargo xtask bench`: measurements, Bulbil and others side by side in one run.
//!
//! Programs take turns within each round, so that whatever else the machine does meets all of
//! them. Nothing here passes or fails by a time: it prints what it saw.
//!
//! | module | what it does |
//! |---|---|
//! | `import` | disks into the store, beside `qemu-img convert` |
//! | `formats` | conversions between disk formats, beside `qemu-img convert` |
//! | `launch` | clones and NBD servers, beside qemu-img, qemu-nbd and nbdkit |
//! | `store` | the store and its volumes, beside casync, restic, borg and NBD servers |
//! | `disks` | what is imported and served |
//! | `process`, `fio`, `nbd`, `guest` | measured commands and servers, and the load on them |
//! | `boot`, `network` | a guest that starts from a disk, an S3 server that is far away |
//! | `report` | best, median, ratio; table and JSON |

mod boot;
pub(crate) mod disks;
mod fio;
mod formats;
pub(crate) mod guest;
pub(crate) mod import;
mod launch;
mod nbd;
mod network;
pub(crate) mod process;
mod report;
mod store;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::json;

use self::report::Report;
use crate::run::{cargo, find_program, print_data, say, workspace_root};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench --list                 What there is, and what each needs
  cargo xtask bench import --rounds 5      Imports only
  cargo xtask bench store --part cold-boot --rounds 2
                                           Cold boots from S3 behind a network: about 8 minutes
  cargo xtask bench --json > bench.json    Everything; the table goes to standard error

Compare figures of one run only. On a machine that does other things at the same time, look at
best values and at CPU times. Everything is made in target/bench; the disks there are kept.")]
pub(crate) struct Args {
    /// Which measurements to run; all when none is named
    names: Vec<Bench>,
    /// Say what each measures and needs, and stop
    #[arg(long)]
    list: bool,
    /// Times each program gets its turn
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Length of each load that has no end of its own
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// Write one JSON document with every value to standard output
    #[arg(long)]
    json: bool,
    /// Of `store`, only these parts
    #[arg(long = "part", value_name = "PART")]
    parts: Vec<store::Part>,
    /// Measure the release binaries that are there
    #[arg(long)]
    no_build: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bench {
    Formats,
    Import,
    Launch,
    Store,
}

/// A program that a measurement starts.
struct Tool {
    program: &'static str,
    package: &'static str,
    /// What is left out without it; `None` when nothing is left without it.
    optional_for: Option<&'static str>,
}

const fn needed(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package, optional_for: None }
}

const fn optional(program: &'static str, package: &'static str, for_what: &'static str) -> Tool {
    Tool { program, package, optional_for: Some(for_what) }
}

impl Bench {
    fn about(self) -> &'static str {
        match self {
            Self::Formats => {
                "conversion of a disk of 2.4 GiB to raw and from raw, for qcow2 (plain, zlib, zstd), VMDK, VHD and VHDX, \
                 beside qemu-img convert: time, CPU, space"
            }
            Self::Import => {
                "import of real disks into a fresh store, beside qemu-img convert to compressed qcow2: time, CPU, \
                 space; then a rebuilt disk and the same disk in another format"
            }
            Self::Launch => {
                "clone at 1 GiB and 1 TiB, start of a server to its first read, warm and cold reads, durable writes \
                 and the growth of an overlay, beside qemu-img, qemu-nbd and nbdkit"
            }
            Self::Store => {
                "disks of a server, updated in place and made anew, into one store, beside qemu-img, casync, restic and borg: \
                 space, time, CPU; volumes in a guest; cold boots from S3 behind a network; memory"
            }
        }
    }

    fn tools(self) -> &'static [Tool] {
        const IMPORT: &[Tool] = &[needed("qemu-img", "qemu-utils"), needed("mke2fs", "e2fsprogs")];
        const LAUNCH: &[Tool] = &[
            needed("qemu-img", "qemu-utils"),
            needed("qemu-nbd", "qemu-utils"),
            needed("mke2fs", "e2fsprogs"),
            optional("fio", "fio", "loads: reads, writes, growth"),
            optional("nbdkit", "nbdkit", "a second server to compare with"),
            optional("qemu-storage-daemon", "qemu-system-common", "a third server to compare with"),
        ];
        const STORE: &[Tool] = &[
            needed("qemu-img", "qemu-utils"),
            needed("mke2fs", "e2fsprogs"),
            needed("mmdebstrap", "mmdebstrap"),
            needed("rsync", "rsync"),
            needed("qemu-system-x86_64", "qemu-system-x86"),
            needed("curl", "curl"),
            optional("casync", "casync", "casync beside the store"),
            optional("restic", "restic", "restic beside the store"),
            optional("borg", "borgbackup", "borg beside the store"),
        ];
        match self {
            Self::Formats | Self::Import => IMPORT,
            Self::Launch => LAUNCH,
            Self::Store => STORE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Formats => "formats",
            Self::Import => "import",
            Self::Launch => "launch",
            Self::Store => "store",
        }
    }
}

/// What a measurement works with.
#[derive(Debug)]
pub(crate) struct Bed {
    /// Made anew for each measurement and removed after it.
    pub(crate) work: PathBuf,
    /// The `bulbil` binary.
    bulbil: PathBuf,
    /// The `bench_volume` example.
    pub(crate) bench_volume: PathBuf,
    /// The `s3_behind_network` example.
    s3_behind_network: PathBuf,
    rounds: u32,
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.list {
        return list();
    }
    let chosen = if args.names.is_empty() { Bench::value_variants() } else { &args.names };
    for bench in chosen {
        check_tools(*bench)?;
    }
    if !args.no_build {
        build()?;
    }
    let mut report = Report::default();
    let load_before = load_average();
    for bench in chosen {
        say(format!("\n== {}", bench.name()));
        let bed = Bed::new(*bench, args)?;
        process::fresh_directory(&bed.work)?;
        let measured = match bench {
            Bench::Formats => formats::run(&bed, &mut report),
            Bench::Import => import::run(&bed, &mut report),
            Bench::Launch => launch::run(&bed, &mut report),
            Bench::Store => store::run(&bed, &args.parts, &mut report),
        };
        std::fs::remove_dir_all(&bed.work).with_context(|| format!("cannot remove {}", bed.work.display()))?;
        measured?;
    }
    report.note(format!("{}; load average {load_before} before, {} after", machine(), load_average()));
    print(&report, args.json)
}

impl Bed {
    fn new(bench: Bench, args: &Args) -> Result<Self> {
        let bed = Self::at(bench_dir().join(bench.name()))?;
        Ok(Self { rounds: args.rounds, seconds: args.seconds, ..bed })
    }

    /// The release binaries and a directory to work in.
    pub(crate) fn at(work: PathBuf) -> Result<Self> {
        let root = workspace_root();
        let bed = Self {
            work,
            bulbil: root.join("target/release/bulbil"),
            bench_volume: root.join("target/release/examples/bench_volume"),
            s3_behind_network: root.join("target/release/examples/s3_behind_network"),
            rounds: 1,
            seconds: 1.0,
        };
        for program in [&bed.bulbil, &bed.bench_volume, &bed.s3_behind_network] {
            if !program.is_file() {
                bail!("{} is not there\nhint: leave --no-build out", program.display());
            }
        }
        Ok(bed)
    }
}

/// Where everything is made.
fn bench_dir() -> PathBuf {
    workspace_root().join("target/bench")
}

/// One command for all packages: with one set of features, nothing is compiled twice.
pub(crate) fn build() -> Result<()> {
    let packages = ["bulbil", "bulbil-control", "bulbil-testkit", "bulbil-s3-testserver"];
    let packages = packages.iter().flat_map(|name| ["--package", name]);
    let targets = ["--bin", "bulbil", "--bin", "bulbil-s3-testserver", "--example", "bench_volume"];
    let targets = targets.into_iter().chain(["--example", "s3_behind_network"]);
    cargo().args(["build", "--locked", "--release"]).args(packages).args(targets).run()
}

fn list() -> Result<()> {
    for bench in Bench::value_variants() {
        print_data(format!("{:8} {}", bench.name(), bench.about()))?;
        for Tool { program, package, optional_for } in bench.tools() {
            let state = if find_program(program).is_some() { "present" } else { "missing" };
            let package = if package == program { String::new() } else { format!(" (package {package})") };
            let use_text = optional_for.map_or("needed".to_owned(), |what| format!("optional: {what}"));
            print_data(format!("{:8}   {state}  {program}{package}: {use_text}", ""))?;
        }
    }
    Ok(())
}

fn check_tools(bench: Bench) -> Result<()> {
    for Tool { program, package, optional_for } in bench.tools() {
        match (find_program(program), optional_for) {
            (None, None) => bail!("`{}` needs {program}\nhint: apt-get install {package}", bench.name()),
            (None, Some(what)) => say(format!("{program} is missing, left out: {what} (apt-get install {package})")),
            _ => {}
        }
    }
    Ok(())
}

fn print(report: &Report, as_json: bool) -> Result<()> {
    say("");
    for line in report.table() {
        if as_json { say(line) } else { print_data(line)? }
    }
    if as_json {
        let mut document = report.json();
        document["machine"] = json!(machine());
        print_data(serde_json::to_string_pretty(&document).context("cannot write JSON")?)?;
    }
    Ok(())
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    format!("{cores} cores of {}", model.map_or("an unknown processor", |(_, name)| name))
}

fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// A size as its name in a table.
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
