//! Developer tasks, run as `cargo xtask TASK`.
//!
//! ```text
//! setup        packages.rs (what the machine needs) → apt-get
//! guest-image  images/build-*.sh → target/images
//! test         guest-image → nextest or cargo test, doctests
//! ci           fmt, clippy, tidy, test, doc, deny
//! tidy         rules about the workspace that no compiler checks
//! quickstart   setup → release build → guest-image → import, launch, exec
//! bench        measurements
//! soak         a guest writes and verifies while its disks' servers are disturbed
//! ```

mod bench;
mod ci;
mod images;
mod packages;
mod quickstart;
mod run;
mod setup;
mod soak;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  cargo xtask setup                    Install what is missing on this machine
  cargo xtask quickstart               Build Bulbil and a Debian image, launch one instance
  cargo xtask guest-image --tiny       Build the image for quick launch tests
  cargo xtask test -- -p bulbil-net    Run one crate's tests
  cargo xtask ci                       Run everything that a change must pass";

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Run a developer task", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check for system packages and install the missing ones
    Setup(setup::Args),
    /// Build a guest image out of Debian packages
    GuestImage(images::Args),
    /// Run everything that a change must pass
    Ci,
    /// Run the tests, with guest images built first
    Test(ci::TestArgs),
    /// Check the rules about the workspace that no compiler checks
    Tidy,
    /// Build Bulbil and a Debian image, launch an instance and run a command in it
    Quickstart(quickstart::Args),
    /// Measure Bulbil against other programs
    Bench(bench::Args),
    /// Let a guest write and verify for long while its disks' servers are disturbed
    Soak(soak::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => setup::run(&args),
        Task::GuestImage(args) => images::run(&args),
        Task::Ci => ci::run(),
        Task::Test(args) => ci::test(&args),
        Task::Tidy => tidy::run(),
        Task::Quickstart(args) => quickstart::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Soak(args) => soak::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::report(&error);
            ExitCode::FAILURE
        }
    }
}
