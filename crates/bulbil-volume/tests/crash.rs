//! Crashes of the overlay at random points, against an oracle.
//!
//! Two kinds: a fake directory that loses what was not synced (power loss) or only what was in
//! memory (a killed process), cut at any file operation; and real processes that are killed with
//! SIGKILL while they write to real files.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use bulbil_testkit::{DiskOracle, Rng, tagged};
use bulbil_volume::{BlockDevice as _, HostDirectory};
use support::{Image, SECTORS, crash_again_and_again, read_all};

#[test]
fn nothing_acknowledged_is_lost_at_2000_random_points_of_power_loss_and_kill() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::make(dir.path());
    let crashes = crash_again_and_again(&image, 200);
    assert_eq!(crashes, 2000);
}

/// Where a killed writer works; its presence makes the test below act as that writer.
const WRITER_DIRECTORY: &str = "BULBIL_TEST_WRITER_DIRECTORY";
const WRITER_SEED: &str = "BULBIL_TEST_WRITER_SEED";

#[test]
fn nothing_acknowledged_is_lost_when_1000_processes_are_killed() {
    if let Ok(directory) = std::env::var(WRITER_DIRECTORY) {
        write_until_killed(Path::new(&directory), std::env::var(WRITER_SEED).unwrap().parse().unwrap());
    }
    let seed: u64 = std::process::id().into();
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    for round in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let image = Image::make(dir.path());
        std::fs::create_dir(dir.path().join("volume")).unwrap();
        let mut oracle = DiskOracle::new(&image.content);
        for kill in 0..50 {
            let lines = run_writer(dir.path(), rng.next_u64(), rng.below(60));
            replay(&lines, &mut oracle);
            let storage = Arc::new(HostDirectory::new(&dir.path().join("volume")));
            let content = read_all(&image.volume(storage));
            oracle
                .check_after_kill(&content)
                .unwrap_or_else(|e| panic!("seed {seed}, round {round}, kill {kill}: {e}\n{lines:?}"));
        }
    }
}

/// Starts a writer, kills it after it has said `lines` lines, and returns all it said.
fn run_writer(directory: &Path, seed: u64, lines: u64) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_acknowledged_is_lost_when_1000_processes_are_killed", "--nocapture"])
        .env(WRITER_DIRECTORY, directory)
        .env(WRITER_SEED, seed.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut heard = Vec::new();
    for line in said.by_ref() {
        heard.push(line);
        if heard.iter().filter(|line| line.starts_with('!')).count() as u64 >= lines {
            break;
        }
    }
    child.kill().unwrap();
    // What was in the pipe when it died counts as well.
    heard.extend(said);
    child.wait().unwrap();
    heard
}

/// The writer: says what it is about to do, does it, and says when a flush was acknowledged.
fn write_until_killed(directory: &Path, seed: u64) -> ! {
    let image = Image::make(directory);
    let volume = image.volume(Arc::new(HostDirectory::new(&directory.join("volume"))));
    let mut rng = Rng::new(seed);
    let mut out = std::io::stdout().lock();
    let mut say = |line: String| {
        // One write each, so that a line is whole or not there.
        out.write_all(line.as_bytes()).unwrap();
        out.flush().unwrap();
    };
    loop {
        let first = rng.below(SECTORS);
        let sectors = (1 + rng.below(24)).min(SECTORS - first);
        if rng.one_in(5) {
            volume.flush().unwrap();
            say("!flushed\n".to_owned());
        } else if rng.one_in(6) {
            say(format!("!write {first} {sectors} 0\n"));
            volume.write_zeroes(first * 512, sectors * 512, false).unwrap();
        } else {
            let tag = rng.next_u64() | 1;
            say(format!("!write {first} {sectors} {tag}\n"));
            volume.write_at(&tagged(tag, sectors as usize), first * 512, false).unwrap();
        }
    }
}

fn replay(lines: &[String], oracle: &mut DiskOracle) {
    for line in lines.iter().filter_map(|line| line.split('!').nth(1)) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["flushed"] => oracle.flushed(),
            ["write", first, sectors, tag] => {
                oracle.write(first.parse().unwrap(), sectors.parse().unwrap(), tag.parse().unwrap());
            }
            _ => {}
        }
    }
}
