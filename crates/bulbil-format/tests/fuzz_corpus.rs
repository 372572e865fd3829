//! Every input of the fuzz corpus, with the compiler that everybody has.
//!
//! The corpus is that of the package `fuzz` at the root of the project, and so are the bodies of the targets.
//! `BULBIL_MAKE_SEEDS=1 cargo nextest run -p bulbil-format --test fuzz_corpus` makes the inputs named `seed-...` anew.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

#[path = "../../../fuzz/src/lib.rs"]
mod fuzz;
#[path = "hostile/images.rs"]
mod images;
#[path = "hostile/seeds.rs"]
mod seeds;
mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What an input may take. Nothing takes a tenth of that; it bounds work that has run away.
const MAX_TIME: Duration = Duration::from_secs(5);

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target)
}

#[test]
fn every_input_of_the_corpus_passes() {
    for target in fuzz::TARGETS {
        let mut inputs: Vec<_> = std::fs::read_dir(corpus(target)).unwrap().map(|e| e.unwrap().path()).collect();
        inputs.sort();
        let (mut opened, mut slowest) = (0, (Duration::ZERO, PathBuf::new()));
        for path in &inputs {
            let input = std::fs::read(path).unwrap();
            println!("{}", path.display());
            let start = Instant::now();
            opened += usize::from(fuzz::run(target, &input));
            slowest = slowest.max((start.elapsed(), path.clone()));
        }
        let (time, slowest) = (slowest.0, slowest.1.display());
        println!("{target}: {} inputs, {opened} open, at most {time:?} for {slowest}", inputs.len());
        assert!(opened >= 3, "of the corpus of {target} {opened} inputs open");
        assert!(time < MAX_TIME, "{slowest} takes {time:?}");
    }
}

#[test]
fn seeds_are_made_on_demand() {
    if std::env::var_os("BULBIL_MAKE_SEEDS").is_none() {
        println!("skipped: BULBIL_MAKE_SEEDS is not set");
        return;
    }
    for (target, name, input) in seeds::all() {
        println!("{target}/{name}: {} bytes", input.len());
        let mut file = std::fs::File::create(corpus(target).join(name)).unwrap();
        file.write_all(&input).unwrap();
    }
}
