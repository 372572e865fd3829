//! `cargo xtask bench`: measurements.

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which measurements to run; all when none is named
    names: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let names = if args.names.is_empty() { "all".to_owned() } else { args.names.join(" ") };
    bail!("bench ({names}): not built yet");
}
