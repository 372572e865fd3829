//! `bulbil`: images, copy-on-write disks and configured virtual machines from one binary.

#![forbid(unsafe_code)]

mod cli;
mod cli_disk;
mod cli_private;
mod cli_store;
mod cli_volume;
mod commands;
mod daemon;
mod error;
mod output;
mod progress;
mod ssh;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let printer = output::Printer::new(cli.global.output);
    match commands::run(cli, &printer) {
        Ok(code) => code,
        Err(error) => {
            printer.error(&error);
            error.exit_code()
        }
    }
}
