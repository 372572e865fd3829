//! Hostile files: each is refused by the right rule, at once, in little memory, and without a look at any other file.
//!
//! Every case is opened by a process of its own, which is this test binary once more ([`opens_what_it_is_told_to`]).
//! `docs/formats/refusals.md` lists the rules; `--no-capture` shows the table with the figures.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

#[path = "hostile/cases.rs"]
mod cases;
#[path = "hostile/images.rs"]
mod images;
mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{FileReader, Format, FormatError, OpenOptions, open_disk};
use cases::Case;
use support::Rng;

/// What is read of a disk that opened, to see that damage in its content is found.
const MAX_READ_BYTES: u64 = 8 << 20;

/// Names the image to the child.
const IMAGE: &str = "BULBIL_HOSTILE_IMAGE";
/// The format the child declares; empty for none.
const DECLARED: &str = "BULBIL_HOSTILE_DECLARED";

#[test]
fn opens_what_it_is_told_to() {
    let Some(image) = std::env::var_os(IMAGE) else {
        println!("skipped: this is the child of another test");
        return;
    };
    let declared = std::env::var(DECLARED).unwrap().parse().ok();
    let start = Instant::now();
    let outcome = open_and_read(Path::new(&image), declared);
    let elapsed = start.elapsed();
    let (code, message) = match &outcome {
        Ok(format) => ("opened", format!("as {format}")),
        Err(error) => (error.code(), error.to_string()),
    };
    println!("\nchild\t{code}\t{}\t{}\t{message:?}", elapsed.as_micros(), peak_resident_kib());
}

fn open_and_read(image: &Path, declared: Option<Format>) -> Result<Format, FormatError> {
    let scratch = Some(Arc::new(tempfile::tempfile().unwrap()));
    let options = OpenOptions { scratch, ..OpenOptions::declared(declared) };
    let disk = open_disk(Arc::new(FileReader::open(image)?), &options)?;
    let mut left = MAX_READ_BYTES;
    for extent in disk.data_extents() {
        let extent = extent?;
        let len = extent.len_bytes.min(left);
        let mut buf = vec![0; usize::try_from(len).unwrap()];
        disk.read_exact_at(&mut buf, extent.offset_bytes)?;
        left -= len;
    }
    Ok(disk.format())
}

fn peak_resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What a child found.
struct Outcome {
    code: String,
    elapsed: Duration,
    resident_kib: u64,
    message: String,
    /// All that the child wrote.
    output: String,
}

fn open_in_child(image: &Path, declared: Option<Format>, folder: &Path) -> Outcome {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "opens_what_it_is_told_to", "--nocapture"])
        .env(IMAGE, image)
        .env(DECLARED, declared.map_or("", Format::as_str))
        .current_dir(folder)
        .output()
        .unwrap();
    let output = [output.stdout, output.stderr].concat();
    let output = String::from_utf8_lossy(&output).into_owned();
    let line = output.lines().find_map(|line| line.strip_prefix("child\t")).unwrap_or("crashed\t0\t0\t");
    let fields: Vec<_> = line.splitn(4, '\t').map(str::to_owned).collect();
    let [code, elapsed, resident, message] = fields.try_into().unwrap();
    let elapsed = Duration::from_micros(elapsed.parse().unwrap());
    Outcome { code, elapsed, resident_kib: resident.parse().unwrap(), message, output }
}

/// A folder with a secret that images ask for, and empty folders beside it.
struct Ground {
    dir: tempfile::TempDir,
    secret: String,
}

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng(u64::from(std::process::id()));
        let secret = format!("{:016x}{:016x}", rng.next(), rng.next());
        let ground = Self { dir, secret };
        for name in ["work", "images"] {
            std::fs::create_dir(ground.path(name)).unwrap();
        }
        let mut canary = std::fs::File::create(ground.path("canary")).unwrap();
        canary.write_all(ground.secret.repeat(4096).as_bytes()).unwrap();
        ground
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Opens the file of a case; returns what is wrong.
    fn check(&self, case: &Case) -> Vec<String> {
        let image = self.path("images/image");
        case.write(&image, &self.path("canary"));
        let outcome = open_in_child(&image, case.declared, &self.path("work"));
        let (ms, kib) = (outcome.elapsed.as_secs_f64() * 1e3, outcome.resident_kib);
        let declared = case.declared.map_or("-", Format::as_str);
        let line = format!("{:36} {declared:6} {:20} {ms:8.2} ms {kib:6} KiB", case.name, outcome.code);
        println!("{:>2} {line}  {}", case.rule, outcome.message);
        let left = std::fs::read_dir(self.path("work")).unwrap().count();
        std::fs::remove_file(&image).unwrap();
        let beside = std::fs::read_dir(self.path("images")).unwrap().count();
        let problems = [
            (!case.codes.contains(&&*outcome.code), format!("expected {:?}: {}", case.codes, outcome.message)),
            (outcome.elapsed > case.max_time, format!("took {:?}", outcome.elapsed)),
            (outcome.resident_kib > case.max_resident_kib, format!("took {kib} KiB")),
            (left + beside > 0, "left files behind".to_owned()),
            (outcome.output.contains(&self.secret[..16]), "let out what another file holds".to_owned()),
        ];
        problems.into_iter().filter(|(is, _)| *is).map(|(_, what)| format!("{line}: {what}")).collect()
    }
}

#[test]
fn hostile_files_are_refused_by_the_right_rule_at_once() {
    let ground = Ground::new();
    let cases = cases::all();
    let problems: Vec<_> = cases.iter().flat_map(|case| ground.check(case)).collect();
    println!("{} cases, {} problems", cases.len(), problems.len());
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// The rules about files: all but that of addresses.
const RULES: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19];
const ADVISORIES: &[&str] = &[
    "CVE-2013-2096",
    "CVE-2013-4463",
    "CVE-2013-4469",
    "CVE-2014-0222",
    "CVE-2014-0223",
    "CVE-2014-3641",
    "CVE-2015-5162",
    "CVE-2015-5163",
    "CVE-2022-47951",
    "CVE-2024-4467",
    "CVE-2024-32498",
    "CVE-2024-40767",
    "CVE-2024-44082",
    "CVE-2026-24708",
];

#[test]
fn every_rule_and_every_advisory_has_a_case() {
    let cases = cases::all();
    for rule in RULES {
        assert!(cases.iter().any(|case| case.rule == *rule), "no case for rule {rule}");
    }
    for advisory in ADVISORIES {
        assert!(cases.iter().any(|case| case.attacks.contains(advisory)), "no case for {advisory}");
    }
    let mut names: Vec<_> = cases.iter().map(|case| case.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "a name occurs twice");
}

#[test]
fn every_rule_and_every_code_is_documented() {
    let document = include_str!("../../../docs/formats/refusals.md");
    for case in cases::all() {
        assert!(document.contains(&format!("\n| {} | ", case.rule)), "rule {}", case.rule);
        for code in case.codes {
            assert!(document.contains(&format!("\n| `{code}`")), "{code}");
        }
    }
    for advisory in ADVISORIES {
        assert!(document.contains(advisory), "{advisory}");
    }
}

#[test]
fn the_child_reports_a_disk_that_opens() {
    let ground = Ground::new();
    let image = ground.path("images/image");
    support::write_sparse(&image, &images::small_content());
    let outcome = open_in_child(&image, None, &ground.path("work"));
    assert_eq!((&*outcome.code, &*outcome.message), ("opened", "\"as raw\""));
    assert!(outcome.resident_kib > 0);
}
