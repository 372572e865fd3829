//! `bulbil volume …` and `bulbil snapshot …`

use bulbil_control::{ErrorCode, SnapshotRecord, VolumeRequest, VolumeView};
use bulbil_types::ByteSize;

use super::image::when;
use super::{Context, volume_use};
use crate::cli_volume::{CreateArgs, SnapshotCommand, VolumeCommand};
use crate::error::{CliError, CliResult};
use crate::output::{fields, table};

pub(crate) async fn run(context: &Context<'_>, command: VolumeCommand) -> CliResult<()> {
    match command {
        VolumeCommand::Create(arguments) => create(context, arguments).await,
        VolumeCommand::List => list(context).await,
        VolumeCommand::Show { volume } => {
            let found = find(context, &volume).await?;
            context.printer.result(&found, || describe(&found))
        }
        VolumeCommand::Resize { volume, size } => {
            let resized = context.client.resize_volume(&volume, size.0).await;
            let resized = resized.map_err(|e| with_hints(e.into()))?;
            context.printer.note(&format!("{} has {}", resized.title(), ByteSize(resized.record.size_bytes)));
            print(context, &resized)
        }
        VolumeCommand::Snapshot { volume, name } => {
            let taken = context.client.snapshot_volume(&volume, name).await.map_err(|e| with_hints(e.into()))?;
            let stored = ByteSize(taken.stored_bytes);
            context.printer.note(&format!("took {} of {volume}, the store grew by {stored}", snapshot_title(&taken)));
            context.printer.result(&taken, || taken.id.to_string())
        }
        VolumeCommand::Clone { volume, name } => {
            let clone = context.client.clone_volume(&volume, name).await.map_err(|e| with_hints(e.into()))?;
            context.printer.note(&format!("created {}", clone.title()));
            print(context, &clone)
        }
        VolumeCommand::Serve(arguments) => volume_use::serve(context, arguments).await,
        VolumeCommand::Mount { volume, place, read_only } => {
            volume_use::mount_volume(context, &volume, &place.directory, read_only).await
        }
        VolumeCommand::Rm { volumes } => remove(context, &volumes).await,
    }
}

async fn create(context: &Context<'_>, arguments: CreateArgs) -> CliResult<()> {
    let CreateArgs { name, size, image, snapshot } = arguments;
    if size.is_none() && image.is_none() && snapshot.is_none() {
        return Err(CliError::usage("an empty volume needs a size")
            .hint("say how large: --size 20GiB; or what it begins as: --image IMAGE or --snapshot SNAPSHOT"));
    }
    let request = VolumeRequest { name, size_bytes: size.map(|size| size.0), image, snapshot };
    let created = context.client.create_volume(&request).await.map_err(|e| with_hints(e.into()))?;
    context.printer.note(&format!("created {} of {}", created.title(), ByteSize(created.record.size_bytes)));
    print(context, &created)
}

fn print(context: &Context<'_>, volume: &VolumeView) -> CliResult<()> {
    context.printer.result(volume, || volume.record.id.to_string())
}

pub(crate) async fn find(context: &Context<'_>, volume: &str) -> CliResult<VolumeView> {
    context.client.volume(volume).await.map_err(|e| with_hints(e.into()))
}

pub(crate) fn with_hints(error: CliError) -> CliError {
    let what = |word: &str| error.message.contains(&format!("there is no {word}"));
    let hint = if what("image") {
        "see which there are: bulbil image list"
    } else if what("snapshot") {
        "see which there are: bulbil snapshot list"
    } else {
        "see which there are: bulbil volume list"
    };
    let taken = error.message.ends_with("exists already");
    let busy = if taken { "choose another name" } else { "end what uses it first; see: bulbil volume list" };
    error
        .hint_for(ErrorCode::NotFound, hint)
        .hint_for(ErrorCode::InUse, busy)
        .hint_for(ErrorCode::NoSpace, "free some space; see: bulbil store stats")
}

async fn list(context: &Context<'_>) -> CliResult<()> {
    let volumes = context.client.volumes().await?;
    context.printer.result(&volumes, || {
        let rows: Vec<_> = volumes
            .iter()
            .map(|volume| {
                let name =
                    |name: &Option<bulbil_types::Name>| name.as_ref().map_or("-".to_owned(), ToString::to_string);
                vec![
                    name(&volume.record.name),
                    volume.record.id.to_string(),
                    volume.state.to_string(),
                    name(&volume.instance),
                    ByteSize(volume.record.size_bytes).to_string(),
                    ByteSize(volume.used_bytes).to_string(),
                    origin(volume),
                    when(volume.record.created_at),
                ]
            })
            .collect();
        table(&["NAME", "ID", "STATE", "INSTANCE", "SIZE", "USED", "FROM", "CREATED"], &rows)
    })
}

fn origin(volume: &VolumeView) -> String {
    let record = &volume.record;
    let clone = record.cloned_from.as_ref().map(ToString::to_string);
    let snapshot = record.snapshot_id.as_ref().map(ToString::to_string);
    clone.or(snapshot).or_else(|| record.image.clone()).unwrap_or_else(|| "-".to_owned())
}

fn size(bytes: u64) -> String {
    format!("{} ({bytes})", ByteSize(bytes))
}

fn describe(volume: &VolumeView) -> String {
    let record = &volume.record;
    let mut pairs = vec![("id", record.id.to_string())];
    pairs.extend(record.name.as_ref().map(|name| ("name", name.to_string())));
    pairs.push(("state", volume.state.to_string()));
    if let (Some(name), Some(id)) = (&volume.instance, &record.instance_id) {
        pairs.push(("instance", format!("{name} ({id})")));
    }
    pairs.extend([("size", size(record.size_bytes)), ("used", size(volume.used_bytes)), ("from", origin(volume))]);
    pairs.extend(record.digest.map(|digest| ("digest", digest.to_string())));
    pairs.push(("created", when(record.created_at)));
    fields(&pairs)
}

async fn remove(context: &Context<'_>, volumes: &[String]) -> CliResult<()> {
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    for volume in volumes {
        match context.client.remove_volume(volume).await {
            Ok(gone) => {
                context.printer.note(&format!("removed {}", gone.title()));
                removed.push(gone);
            }
            Err(error) => {
                let error = CliError::from(error);
                let error = match error.message.rsplit_once("root volume of instance `") {
                    Some((_, name)) => {
                        let name = name.trim_end_matches('`').to_owned();
                        error.hint(format!("it goes with the instance: bulbil rm {name}"))
                    }
                    None => error,
                };
                errors.push(with_hints(error));
            }
        }
    }
    context.printer.removed(&removed, errors)
}

pub(crate) async fn run_snapshot(context: &Context<'_>, command: SnapshotCommand) -> CliResult<()> {
    match command {
        SnapshotCommand::List => list_snapshots(context).await,
        SnapshotCommand::Show { snapshot } => {
            let found = context.client.snapshot(&snapshot).await.map_err(|e| with_hints(e.into()))?;
            context.printer.result(&found, || describe_snapshot(&found))
        }
        SnapshotCommand::Rm { snapshots } => {
            let (mut removed, mut errors) = (Vec::new(), Vec::new());
            for snapshot in &snapshots {
                match context.client.remove_snapshot(snapshot).await {
                    Ok(gone) => {
                        context.printer.note(&format!("removed {}", snapshot_title(&gone)));
                        removed.push(gone);
                    }
                    Err(error) => errors.push(with_hints(error.into())),
                }
            }
            context.printer.removed(&removed, errors)
        }
    }
}

fn snapshot_title(snapshot: &SnapshotRecord) -> String {
    snapshot.name.as_ref().map_or_else(|| snapshot.id.to_string(), ToString::to_string)
}

async fn list_snapshots(context: &Context<'_>) -> CliResult<()> {
    let snapshots = context.client.snapshots().await?;
    context.printer.result(&snapshots, || {
        let rows: Vec<_> = snapshots
            .iter()
            .map(|snapshot| {
                vec![
                    snapshot.name.as_ref().map_or("-".to_owned(), ToString::to_string),
                    snapshot.id.to_string(),
                    ByteSize(snapshot.size_bytes).to_string(),
                    ByteSize(snapshot.stored_bytes).to_string(),
                    snapshot.volume.as_ref().map_or_else(|| snapshot.volume_id.to_string(), ToString::to_string),
                    when(snapshot.created_at),
                ]
            })
            .collect();
        table(&["NAME", "ID", "SIZE", "STORED", "OF", "TAKEN"], &rows)
    })
}

fn describe_snapshot(snapshot: &SnapshotRecord) -> String {
    let mut pairs = vec![("id", snapshot.id.to_string())];
    pairs.extend(snapshot.name.as_ref().map(|name| ("name", name.to_string())));
    let of = snapshot.volume.as_ref().map_or_else(String::new, |name| format!("{name} "));
    pairs.extend([
        ("digest", snapshot.digest.to_string()),
        ("size", size(snapshot.size_bytes)),
        ("stored", size(snapshot.stored_bytes)),
        ("of volume", format!("{of}({})", snapshot.volume_id)),
        ("taken", when(snapshot.created_at)),
    ]);
    fields(&pairs)
}
