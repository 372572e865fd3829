//! `bulbil image …`

use std::path::{Path, PathBuf};

use bulbil_api::Event;
use bulbil_control::{ErrorCode, ExportRequest, Format, ImageRecord, ImportRequest, OtherStore};
use bulbil_types::ByteSize;

use super::{Context, disk, image_copy, volume_use};
use crate::cli::{ImageCommand, NameAndVersion};
use crate::cli_disk::{ExportArgs, InputArgs};
use crate::error::{CliError, CliResult};
use crate::output::{fields, table};
use crate::progress;

pub(crate) async fn run(context: &Context<'_>, command: ImageCommand) -> CliResult<()> {
    match command {
        ImageCommand::Import { file, name, format, input } => {
            let image = import(context, &file, name, format, input, "--format").await?;
            context.printer.result(&image, || image.id.to_string())
        }
        ImageCommand::List { from: Some(location), from_key } => {
            image_copy::list_offered(context, OtherStore { location, key: from_key }).await
        }
        ImageCommand::List { from: None, .. } => list(context).await,
        ImageCommand::Copy(arguments) => image_copy::copy(context, *arguments).await,
        ImageCommand::Show { image } => {
            let found = context.client.image(&image).await.map_err(|e| with_image_hint(e.into()))?;
            context.printer.result(&found, || describe(&found))
        }
        ImageCommand::Export(arguments) => export(context, arguments).await,
        ImageCommand::Mount { image, place } => volume_use::mount_image(context, &image, &place.directory).await,
        ImageCommand::Warm { image } => image_copy::warm(context, &image).await,
        ImageCommand::Rm { images } => remove(context, &images).await,
    }
}

/// Imports a file while a bar shows how it goes; `format_option` is what to type to say its format.
pub(crate) async fn import(
    context: &Context<'_>,
    file: &Path,
    name: Option<NameAndVersion>,
    format: Option<Format>,
    input: InputArgs,
    format_option: &str,
) -> CliResult<ImageRecord> {
    let path = absolute(file, file)?;
    let (name, version) = name.map_or((None, None), |n| (Some(n.name), n.version));
    let parents = input.parent.iter().map(|parent| absolute(file, parent)).collect::<CliResult<_>>()?;
    let extent_dir = input.extent_dir.map(|directory| absolute(file, &directory)).transpose()?;
    let (snapshot, allow_unsandboxed) = (input.snapshot, input.no_sandbox);
    let format = format.map(|format| format.to_string());
    let request = ImportRequest { path, name, version, format, parents, extent_dir, snapshot, allow_unsandboxed };
    let started = std::time::Instant::now();
    let with_hints = |e: bulbil_api::ClientError| {
        CliError::from(e)
            .hint_for(ErrorCode::InUse, "give it another version: --as NAME:VERSION, or see: bulbil image list")
            .hint_for(ErrorCode::NoSpace, "free some space, or choose another --data-dir")
            .hint_from_causes(file, format_option)
    };
    let mut events = context.client.import(&request).await.map_err(with_hints)?;
    let bar = progress::data_bar("importing");
    let mut imported = None;
    while let Some(event) = events.next().await.map_err(with_hints).inspect_err(|_| bar.finish_and_clear())? {
        match event {
            Event::Progress(step) => progress::show(&bar, step),
            Event::Image { image, existed } => imported = Some((*image, existed)),
            _ => {}
        }
    }
    bar.finish_and_clear();
    let (image, existed) = imported.ok_or_else(|| CliError::new("the daemon did not say what it imported"))?;
    if existed {
        context.printer.note(&format!("{}:{} is there already, with the same content", image.name, image.version));
        return Ok(image);
    }
    context.printer.note(&format!(
        "imported {}:{} in {}: {} of data, the store grew by {}",
        image.name,
        image.version,
        progress::seconds(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)),
        ByteSize(image.data_bytes),
        ByteSize(image.stored_bytes),
    ));
    Ok(image)
}

/// The absolute path of something that exists and is needed to import `file`.
fn absolute(file: &Path, typed: &Path) -> CliResult<PathBuf> {
    // Not canonical: the image is named after the file that was typed, not what a link leads to.
    let path = std::path::absolute(typed).and_then(|path| std::fs::metadata(&path).map(|_| path));
    let path = path.map_err(|e| CliError::cannot_open(typed, &e))?;
    if path.to_str().is_none() {
        let what = if typed == file { "its path".to_owned() } else { format!("the path `{}`", typed.display()) };
        return Err(CliError::new(format!("cannot import `{}`", file.display()))
            .caused_by(format!("{what} is not valid UTF-8"))
            .hint("rename it, or give it a link with another name"));
    }
    Ok(path)
}

/// Exports an image while a bar shows how it goes.
async fn export(context: &Context<'_>, arguments: ExportArgs) -> CliResult<()> {
    let ExportArgs { image, file, target } = arguments;
    let options = target.options(&file, false)?;
    let cannot_write = format!("cannot write `{}`", file.display());
    let path = std::path::absolute(&file).map_err(|e| CliError::io(&*cannot_write, &e))?;
    if path.to_str().is_none() {
        return Err(CliError::new(cannot_write).caused_by("its path is not valid UTF-8").hint("choose another name"));
    }
    let request = ExportRequest { path, target: options, replace: target.force };
    let started = std::time::Instant::now();
    let with_hints = |e: bulbil_api::ClientError| with_export_hints(e.into());
    let mut events = context.client.export(&image, &request).await.map_err(with_hints)?;
    let bar = progress::data_bar("exporting");
    let mut written = None;
    while let Some(event) = events.next().await.map_err(with_hints).inspect_err(|_| bar.finish_and_clear())? {
        match event {
            Event::ExportProgress(step) => progress::show_export(&bar, step),
            Event::File { file } => written = Some(*file),
            _ => {}
        }
    }
    bar.finish_and_clear();
    let written = written.ok_or_else(|| CliError::new("the daemon did not say what it exported"))?;
    disk::tell_written(context.printer, &written, started)
}

fn with_export_hints(error: CliError) -> CliError {
    let error = disk::with_output_hints(error);
    if error.message.contains("there is no image") { with_image_hint(error) } else { error }
}

async fn list(context: &Context<'_>) -> CliResult<()> {
    let images = context.client.images().await?;
    context.printer.result(&images, || {
        let rows: Vec<_> = images
            .iter()
            .map(|image| {
                vec![
                    image.name.to_string(),
                    image.version.to_string(),
                    image.id.to_string(),
                    ByteSize(image.size_bytes).to_string(),
                    ByteSize(image.data_bytes).to_string(),
                    image.boot_mode.to_string(),
                    when(image.created_at),
                ]
            })
            .collect();
        table(&["NAME", "VERSION", "ID", "SIZE", "DATA", "BOOT", "IMPORTED"], &rows)
    })
}

async fn remove(context: &Context<'_>, images: &[String]) -> CliResult<()> {
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    for image in images {
        match context.client.remove_image(image).await {
            Ok(gone) => {
                context.printer.note(&format!("removed {}:{}", gone.name, gone.version));
                removed.push(gone);
            }
            Err(error) => {
                let error = with_image_hint(error.into());
                errors.push(error.hint_for(ErrorCode::InUse, "remove the instance first: bulbil rm NAME"));
            }
        }
    }
    context.printer.removed(&removed, errors)
}

pub(crate) fn with_image_hint(error: CliError) -> CliError {
    error.hint_for(
        ErrorCode::NotFound,
        "see which there are: bulbil image list; or import one: bulbil image import FILE",
    )
}

fn describe(image: &ImageRecord) -> String {
    let size = |bytes: u64| format!("{} ({bytes})", ByteSize(bytes));
    fields(&[
        ("id", image.id.to_string()),
        ("name", image.name.to_string()),
        ("version", image.version.to_string()),
        ("digest", image.digest.to_string()),
        ("size", size(image.size_bytes)),
        ("data", size(image.data_bytes)),
        ("stored", size(image.stored_bytes)),
        ("architecture", image.architecture.to_string()),
        ("boot mode", image.boot_mode.to_string()),
        ("source format", image.source_format.clone()),
        ("imported", when(image.created_at)),
    ])
}

/// A point in time, to the second.
pub(crate) fn when(unix_s: i64) -> String {
    jiff::Timestamp::from_second(unix_s).map_or_else(|_| "-".to_owned(), |at| at.to_string())
}
