//! `bulbil disk …`: disk image files as such, without a daemon, a data directory or a store.

mod check;
mod convert;

use std::time::Instant;

use bulbil_control::{DiskDescription, DiskFile, ErrorCode, WrittenFile, describe_disks};
use bulbil_types::ByteSize;

use super::image::when;
use crate::cli_disk::DiskCommand;
use crate::error::{CliError, CliResult};
use crate::output::{Printer, fields, table};
use crate::progress;

pub(crate) fn run(command: DiskCommand, printer: &Printer) -> CliResult<()> {
    match command {
        DiskCommand::Info { file, format, input } => info(&input.disk_file(file, format), input.no_sandbox, printer),
        DiskCommand::Check { files, format, input } => {
            let files: Vec<_> = files.into_iter().map(|file| input.disk_file(file, format)).collect();
            check::run(&files, input.no_sandbox, printer)
        }
        DiskCommand::Convert(arguments) => convert::run(arguments, printer),
    }
}

fn info(file: &DiskFile, allow_unsandboxed: bool, printer: &Printer) -> CliResult<()> {
    let with_hints = |error: bulbil_control::ControlError| with_input_hints(error.into(), file, "--format");
    let mut described = describe_disks(std::slice::from_ref(file), allow_unsandboxed).map_err(with_hints)?;
    let described = described.next().expect("one for each file").map_err(with_hints)?;
    printer.result(&described, || describe(&described))
}

fn describe(disk: &DiskDescription) -> String {
    let size = |bytes: u64| format!("{} ({bytes})", ByteSize(bytes));
    let with_variant = disk.variant.iter().fold(disk.format.clone(), |format, variant| format!("{format}, {variant}"));
    let mut pairs = vec![
        ("format", with_variant),
        ("size", size(disk.size_bytes)),
        ("file", size(disk.file_bytes)),
        ("data", size(disk.data_bytes)),
    ];
    pairs.extend(disk.cluster_bytes.map(|bytes| ("cluster size", size(bytes))));
    if let (Some(compression), clusters @ 1..) = (&disk.compression, disk.compressed_clusters) {
        let plural = if clusters == 1 { "" } else { "s" };
        pairs.push(("compression", format!("{compression}, {clusters} compressed cluster{plural}")));
    }
    pairs.extend(disk.identifier.iter().map(|identifier| ("identifier", visible(identifier))));
    pairs.extend(disk.creator.iter().map(|creator| ("creator", visible(creator))));
    pairs.extend(disk.notes.iter().map(|note| ("note", visible(note))));
    let mut text = fields(&pairs);
    if !disk.snapshots.is_empty() {
        let row = |snapshot: &bulbil_control::SnapshotDescription| {
            let taken = when(i64::try_from(snapshot.created_at).unwrap_or(i64::MAX));
            vec![visible(&snapshot.id), visible(&snapshot.name), ByteSize(snapshot.size_bytes).to_string(), taken]
        };
        let rows: Vec<_> = disk.snapshots.iter().map(row).collect();
        text = format!("{text}\n\n{}", table(&["SNAPSHOT", "NAME", "SIZE", "TAKEN"], &rows));
    }
    text
}

/// A text out of an image, whose control characters must not reach the terminal.
fn visible(text: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// Ends a command that wrote an image file.
pub(super) fn tell_written(printer: &Printer, written: &WrittenFile, started: Instant) -> CliResult<()> {
    printer.note(&format!(
        "wrote {}: {}, {} disk, {} file, in {}",
        written.path.display(),
        written.format,
        ByteSize(written.size_bytes),
        ByteSize(written.file.allocated_bytes),
        progress::since(started),
    ));
    if printer.is_json() { printer.result(written, String::new) } else { Ok(()) }
}

/// Adds what to type next when an image could not be read; `format_option` says its format.
fn with_input_hints(error: CliError, file: &DiskFile, format_option: &str) -> CliError {
    let temp_dir = std::env::temp_dir();
    error.hint_from_causes(&file.path, format_option).hint_for(
        ErrorCode::NoSpace,
        format!("compressed files are unpacked in `{}`: choose another: TMPDIR=DIR", temp_dir.display()),
    )
}

/// Adds what to type next when an image could not be written.
pub(super) fn with_output_hints(error: CliError) -> CliError {
    error
        .hint_for(ErrorCode::InUse, "replace it: --force, or choose another name")
        .hint_for(ErrorCode::NoSpace, "free some space, or write it elsewhere")
}
