//! `bulbil image copy` and `bulbil image list --from`: images of other stores.

use bulbil_api::{ClientError, Event, EventStream};
use bulbil_control::{CopyFromRequest, CopyToRequest, ErrorCode, OtherStore, StoreLocation};
use bulbil_types::ByteSize;

use super::Context;
use super::image::{when, with_image_hint};
use crate::cli_store::CopyArgs;
use crate::error::{CliError, CliResult};
use crate::output::table;
use crate::progress;

pub(crate) async fn copy(context: &Context<'_>, arguments: CopyArgs) -> CliResult<()> {
    let CopyArgs { image, to, to_key, from, from_key, name } = arguments;
    let (name, version) = name.map_or((None, None), |n| (Some(n.name), n.version));
    match (to, from) {
        (Some(location), _) => {
            let request = CopyToRequest { to: OtherStore { location, key: to_key }, name, version };
            copy_to(context, &image, &request).await
        }
        (None, Some(location)) => {
            let request = CopyFromRequest { from: OtherStore { location, key: from_key }, image, name, version };
            copy_from(context, &request).await
        }
        (None, None) => Err(CliError::usage("a copy needs --to LOCATION or --from LOCATION")),
    }
}

async fn copy_to(context: &Context<'_>, image: &str, request: &CopyToRequest) -> CliResult<()> {
    let started = std::time::Instant::now();
    let hints = |e: ClientError| {
        with_image_hint(with_hints(e.into(), &request.to.location))
            .hint_for(ErrorCode::InUse, "give the copy another name: --as NAME:VERSION")
    };
    let events = context.client.copy_to(image, request).await.map_err(hints)?;
    let copied = match follow(events).await.map_err(hints)? {
        Some(Event::Copied { copied }) => *copied,
        _ => return Err(CliError::new("the daemon did not say what it copied")),
    };
    let (name, version, location) = (&copied.image.name, &copied.image.version, &copied.location);
    let stored = ByteSize(copied.stored_bytes);
    context.printer.note(&match copied.existed {
        true => format!("{location} had the content of {name}:{version} already"),
        false => format!("copied {name}:{version} in {}: {location} grew by {stored}", progress::since(started)),
    });
    context.printer.result(&copied, || copied.image.digest.to_string())
}

async fn copy_from(context: &Context<'_>, request: &CopyFromRequest) -> CliResult<()> {
    let started = std::time::Instant::now();
    let location = &request.from.location;
    let hints = |e: ClientError| {
        with_hints(e.into(), location)
            .hint_for(ErrorCode::NotFound, format!("see what is there: bulbil image list --from {location}"))
            .hint_for(ErrorCode::InUse, "give the copy another name: --as NAME:VERSION")
    };
    let events = context.client.copy_from(request).await.map_err(hints)?;
    let (image, existed) = match follow(events).await.map_err(hints)? {
        Some(Event::Image { image, existed }) => (*image, existed),
        _ => return Err(CliError::new("the daemon did not say what it copied")),
    };
    let (name, version) = (&image.name, &image.version);
    context.printer.note(&match existed {
        true => format!("{name}:{version} is there already, with the same content"),
        false => {
            let stored = ByteSize(image.stored_bytes);
            format!("copied {name}:{version} in {}: the store grew by {stored}", progress::since(started))
        }
    });
    context.printer.result(&image, || image.id.to_string())
}

/// Brings an image into the cache while a bar shows how it goes.
pub(crate) async fn warm(context: &Context<'_>, image: &str) -> CliResult<()> {
    let started = std::time::Instant::now();
    let hints = |e: ClientError| with_image_hint(e.into());
    let mut events = context.client.warm(image).await.map_err(hints)?;
    let bar = progress::data_bar("fetching");
    let mut warmed = None;
    while let Some(event) = events.next().await.map_err(hints).inspect_err(|_| bar.finish_and_clear())? {
        match event {
            Event::ExportProgress(step) => progress::show_export(&bar, step),
            Event::Warmed { warmed: done } => warmed = Some(*done),
            _ => {}
        }
    }
    bar.finish_and_clear();
    let warmed = warmed.ok_or_else(|| CliError::new("the daemon did not say what it fetched"))?;
    let (name, version) = (&warmed.image.name, &warmed.image.version);
    let fetched = ByteSize(warmed.fetched_bytes);
    context.printer.note(&match (warmed.complete, warmed.reason.as_deref()) {
        (true, _) => {
            format!("{name}:{version} is in the cache; {fetched} were fetched in {}", progress::since(started))
        }
        (false, Some("cache_full")) => {
            format!(
                "{name}:{version} does not fit into the cache, {fetched} were fetched; make room: --cache-size SIZE"
            )
        }
        (false, _) => format!("{name}:{version} is in the cache in part, {fetched} were fetched; try it again"),
    });
    context.printer.result(&warmed, || warmed.image.id.to_string())
}

/// Shows the progress of a copy and returns its last event.
async fn follow(mut events: EventStream) -> Result<Option<Event>, ClientError> {
    let bar = progress::data_bar("copying");
    let mut last = None;
    while let Some(event) = events.next().await.inspect_err(|_| bar.finish_and_clear())? {
        match event {
            Event::Progress(step) => progress::show(&bar, step),
            other => last = Some(other),
        }
    }
    bar.finish_and_clear();
    Ok(last)
}

pub(crate) async fn list_offered(context: &Context<'_>, store: OtherStore) -> CliResult<()> {
    let offered = context.client.offered_images(&store).await.map_err(|e| with_hints(e.into(), &store.location))?;
    for object in &offered.unreadable {
        context.printer.note(&format!("warning: the image record `{object}` of {} cannot be read", store.location));
    }
    context.printer.result(&offered.images, || {
        let row = |image: &bulbil_control::StoredImage| {
            vec![
                image.name.to_string(),
                image.version.to_string(),
                ByteSize(image.size_bytes).to_string(),
                ByteSize(image.data_bytes).to_string(),
                image.boot_mode.to_string(),
                when(image.created_at),
            ]
        };
        table(
            &["NAME", "VERSION", "SIZE", "DATA", "BOOT", "IMPORTED"],
            &offered.images.iter().map(row).collect::<Vec<_>>(),
        )
    })
}

fn with_hints(error: CliError, location: &StoreLocation) -> CliError {
    let error = match error.code {
        // Its key has options of its own.
        Some(ErrorCode::StoreKey) => {
            error.hint_instead("say where the key of that store is: --to-key SOURCE or --from-key SOURCE")
        }
        _ => error,
    };
    error.hint_for(ErrorCode::Timeout, format!("see that `{location}` can be reached from this host, and try again"))
}
