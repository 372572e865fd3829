//! `bulbil disk check`

use bulbil_control::{ControlError, ConvertObserver, DiskDescription, DiskFile, check_disks};
use bulbil_types::ByteSize;
use indicatif::ProgressBar;
use serde::Serialize;

use super::with_input_hints;
use crate::error::{CliError, CliResult};
use crate::output::Printer;
use crate::progress;

/// What came of one file, for programs.
#[derive(Serialize)]
#[serde(untagged)]
enum Checked<'a> {
    Sound {
        ok: bool,
        #[serde(flatten)]
        disk: Box<DiskDescription>,
        error: Option<Refusal>,
    },
    Refused {
        ok: bool,
        path: &'a str,
        error: Refusal,
    },
}

#[derive(Serialize)]
struct Refusal {
    message: String,
    causes: Vec<String>,
}

struct Bar(ProgressBar);

impl ConvertObserver for Bar {
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        self.0.set_length(total_bytes);
        self.0.set_position(done_bytes);
    }
}

pub(super) fn run(files: &[DiskFile], allow_unsandboxed: bool, printer: &Printer) -> CliResult<()> {
    let bar = Bar(progress::data_bar("checking"));
    let names: Vec<String> = files.iter().map(|file| file.path.display().to_string()).collect();
    let results = check_disks(files, allow_unsandboxed, &bar)?;
    let (mut documents, mut failed) = (Vec::new(), None);
    for ((file, name), result) in files.iter().zip(&names).zip(results) {
        bar.0.suspend(|| tell(name, file, &result, &mut failed, printer))?;
        documents.push(document(name, result));
    }
    bar.0.finish_and_clear();
    if printer.is_json() {
        printer.result(&documents, String::new)?;
    }
    failed.map_or(Ok(()), Err)
}

/// Writes a line for a sound file at once; of files that are not, the last one is the command's error.
fn tell(
    name: &str,
    file: &DiskFile,
    result: &Result<DiskDescription, ControlError>,
    failed: &mut Option<CliError>,
    printer: &Printer,
) -> CliResult<()> {
    match result {
        Ok(_) if printer.is_json() => {}
        Ok(disk) => {
            let (size, data) = (ByteSize(disk.size_bytes), ByteSize(disk.data_bytes));
            printer.raw(format!("{name}: ok, {}, {size}, {data} of data\n", disk.format).as_bytes())?;
        }
        Err(error) => {
            let error = with_input_hints(error.clone().into(), file, "--format");
            if let Some(earlier) = failed.replace(error) {
                printer.error(&earlier);
            }
        }
    }
    Ok(())
}

fn document(path: &str, result: Result<DiskDescription, ControlError>) -> Checked<'_> {
    match result {
        Ok(disk) => Checked::Sound { ok: true, disk: Box::new(disk), error: None },
        Err(error) => {
            let error = Refusal { message: error.to_string(), causes: error.causes().to_vec() };
            Checked::Refused { ok: false, path, error }
        }
    }
}
