//! `bulbil disk convert`

use std::time::Instant;

use bulbil_control::{ConvertRequest, DiskFile, WrittenFile, convert_file};
use tokio::signal::unix::{SignalKind, signal};

use super::{tell_written, with_input_hints, with_output_hints};
use crate::cli_disk::ConvertArgs;
use crate::daemon;
use crate::error::{CliError, CliResult};
use crate::output::Printer;
use crate::progress;

/// What a user or a system ends a command with, by number.
const ENDING: [u8; 3] = [1, 2, 15];

pub(super) fn run(arguments: ConvertArgs, printer: &Printer) -> CliResult<()> {
    let target = arguments.target.options(&arguments.output_file, arguments.backing.is_some())?;
    let request = ConvertRequest {
        input: arguments.source.disk_file(arguments.input, arguments.input_format),
        output: arguments.output_file,
        target,
        backing: arguments.backing.map(|path| DiskFile { format: arguments.backing_format, ..DiskFile::new(path) }),
        replace: arguments.target.force,
        allow_unsandboxed: arguments.source.no_sandbox,
    };
    let started = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::io("cannot start the runtime", &e))?;
    let written = runtime.block_on(convert(request))?;
    tell_written(printer, &written, started)
}

async fn convert(request: ConvertRequest) -> CliResult<WrittenFile> {
    let bar = progress::data_bar("converting");
    let (program, input) = (daemon::own_program()?, request.input.clone());
    let interrupted = format!("interrupted: `{}` was not written", request.output.display());
    let conversion = convert_file(&program, request, |step| progress::show_export(&bar, step));
    let ended = tokio::select! {
        biased;
        signal = any_signal() => Err(CliError::interrupted(interrupted, signal?)),
        converted = conversion => {
            converted.map_err(|error| with_input_hints(with_output_hints(error.into()), &input, "--input-format"))
        }
    };
    bar.finish_and_clear();
    ended
}

/// Waits for a signal that ends commands; what is written then must not stay.
async fn any_signal() -> CliResult<u8> {
    let listen = |number: u8| signal(SignalKind::from_raw(number.into()));
    let listeners: Result<Vec<_>, _> = ENDING.into_iter().map(listen).collect();
    let mut listeners = listeners.map_err(|e| CliError::io("cannot wait for signals", &e))?;
    let [hangup, interrupt, terminate] = listeners.as_mut_slice() else { return std::future::pending().await };
    tokio::select! {
        _ = hangup.recv() => Ok(ENDING[0]),
        _ = interrupt.recv() => Ok(ENDING[1]),
        _ = terminate.recv() => Ok(ENDING[2]),
    }
}
