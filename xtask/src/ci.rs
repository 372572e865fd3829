//! `cargo xtask ci` and `cargo xtask test`.

use std::ffi::OsString;

use anyhow::Result;

use crate::images::{IMAGES_DIR_VAR, Image, Profile, build, images_dir};
use crate::run::{Cmd, Steps, cargo, find_program, say};
use crate::{setup, tidy};

#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Leave guest images alone; tests that need one fail
    #[arg(long)]
    no_images: bool,
    /// What to pass to the test runner instead of `--workspace`
    #[arg(last = true)]
    runner_args: Vec<OsString>,
}

/// Everything that a change must pass, the quick checks first.
pub(crate) fn run() -> Result<()> {
    let mut steps = Steps::new();
    steps.step("system packages", || setup::ensure(true))?;
    steps.step("format", || cargo().args(["fmt", "--all", "--check"]).hint("cargo fmt --all").run())?;
    steps.step("tidy", tidy::run)?;
    steps.step("guest images", build_images)?;
    steps.step("clippy", || {
        cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]).run()
    })?;
    steps.step("tests", || run_tests(&[]))?;
    steps.step("doctests", || cargo().args(["test", "--locked", "--workspace", "--doc", "--quiet"]).run())?;
    steps.step("documentation", || {
        let doc = cargo().args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", "-D warnings").run()
    })?;
    steps.step("dependencies", check_dependencies)?;
    steps.print_times();
    Ok(())
}

/// The tests alone.
pub(crate) fn test(args: &TestArgs) -> Result<()> {
    if !args.no_images {
        build_images()?;
    }
    run_tests(&args.runner_args)?;
    if args.runner_args.is_empty() {
        cargo().args(["test", "--locked", "--workspace", "--doc", "--quiet"]).run()?;
    }
    Ok(())
}

fn build_images() -> Result<()> {
    build(Image::Tiny, false)?;
    build(Image::Debian { profile: Profile::Fast, rebuilt: true }, false)?;
    Ok(())
}

fn run_tests(runner_args: &[OsString]) -> Result<()> {
    // The first test that needs it would build it as well, and hit its time limit on a slow machine.
    cargo().args(["build", "--locked", "--package", "bulbil-s3-testserver"]).run()?;
    let all = runner_args.is_empty().then_some("--workspace");
    test_runner().args(all).args(runner_args).env(IMAGES_DIR_VAR, images_dir()).run()
}

/// nextest where it is installed: it knows time limits and groups, see `.config/nextest.toml`.
fn test_runner() -> Cmd {
    let runner: &[&str] = if find_program("cargo-nextest").is_some() {
        &["nextest", "run"]
    } else {
        say("notice: cargo-nextest is not installed: no time limits (cargo install --locked cargo-nextest)");
        &["test", "--lib", "--bins", "--tests"]
    };
    cargo().args(runner).args(["--locked"])
}

fn check_dependencies() -> Result<()> {
    if find_program("cargo-deny").is_none() {
        say("NOTICE: cargo-deny is not installed: licences, sources and advisories were NOT checked");
        say("        cargo install --locked cargo-deny");
        return Ok(());
    }
    cargo().args(["deny", "--all-features", "check"]).run()
}
