//! `bulbil store …`

use std::path::Path;
use std::process::ExitCode;

use bulbil_api::{ClientError, Event, EventStream};
use bulbil_control::{
    ContentStats, Damage, DamagedVolume, ErrorCode, GcPack, GcReport, GcRequest, OtherStore, RotateKeyRequest,
    ScrubReport, ScrubRequest, StoreKeySlot,
};
use bulbil_types::ByteSize;

use super::Context;
use crate::cli_store::{KeyCommand, StoreCommand};
use crate::error::{CliError, CliResult};
use crate::output::{Printer, fields, table};
use crate::progress;

pub(crate) async fn run(context: &Context<'_>, command: StoreCommand) -> CliResult<ExitCode> {
    match command {
        StoreCommand::Stats => stats(context).await?,
        StoreCommand::Key(command) => key(context, command).await?,
        StoreCommand::Scrub { share, heal_from, heal_from_key } => {
            let heal_from = heal_from.map(|location| OtherStore { location, key: heal_from_key });
            let request = ScrubRequest { share: share.map(|share| (share.index, share.count)), heal_from };
            return scrub(context, &request).await;
        }
        StoreCommand::Gc { dry_run, grace, no_repack } => {
            gc(context, GcRequest { dry_run, grace_s: grace.map(|grace| grace.as_secs()), repack: !no_repack }).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a new key; needs neither daemon nor store.
pub(crate) fn new_key(file: &Path, printer: &Printer) -> CliResult<()> {
    bulbil_control::write_new_key_file(file)
        .map_err(|e| CliError::from(e).hint_for(ErrorCode::InUse, "choose another file"))?;
    printer.note(&format!("wrote a new key to `{}`; keep a copy of it elsewhere", file.display()));
    let source = format!("file:{}", std::path::absolute(file).unwrap_or_else(|_| file.to_owned()).display());
    printer.result(&serde_json::json!({ "source": source }), || source.clone())
}

async fn key(context: &Context<'_>, command: KeyCommand) -> CliResult<()> {
    let slots = match command {
        KeyCommand::New { file } => return new_key(&file, context.printer),
        KeyCommand::List => context.client.store_keys().await?,
        KeyCommand::Rotate { new_key } => {
            let hint = "see which keys there are: bulbil store key list";
            let rotated = context.client.rotate_store_key(&RotateKeyRequest { new_key: new_key.clone() }).await;
            let slots = rotated.map_err(|e| {
                let error = CliError::from(e);
                if error.code == Some(ErrorCode::StoreKey) { error.hint_instead(hint) } else { error }
            })?;
            context
                .printer
                .note(&format!("the store is opened with `{new_key}` from now on, and with the old key no more"));
            slots
        }
        KeyCommand::AddDataKey => {
            let added = context.client.add_data_key().await?;
            context.printer.note(&format!("what is stored from now on is encrypted with data key {}", added.data_key));
            return context.printer.result(&added, || added.data_key.to_string());
        }
    };
    context.printer.result(&slots, || {
        let row = |slot: &StoreKeySlot| {
            vec![slot.id.clone(), slot.provider.clone(), if slot.in_use { "yes" } else { "no" }.to_owned()]
        };
        match slots.is_empty() {
            true => "the store is not encrypted".to_owned(),
            false => table(&["KEY", "FROM", "IN USE"], &slots.iter().map(row).collect::<Vec<_>>()),
        }
    })
}

async fn stats(context: &Context<'_>) -> CliResult<()> {
    let stats = context.client.store_stats().await?;
    context.printer.result(&stats, || {
        let size = |bytes: u64| format!("{} ({bytes})", ByteSize(bytes));
        let sums = fields(&[
            ("disks", size(stats.logical_bytes)),
            ("data", size(stats.data_bytes)),
            ("unique data", size(stats.unique_bytes)),
            ("stored", size(stats.stored_bytes)),
            ("ratio", format!("{:.2}", stats.ratio)),
            ("packs", stats.packs.to_string()),
            ("pack bytes", size(stats.pack_bytes)),
            ("unused", size(stats.dead_bytes)),
            ("manifests", stats.manifests.to_string()),
            ("manifest bytes", size(stats.manifest_bytes)),
        ]);
        if stats.images.is_empty() { sums } else { format!("{sums}\n\n{}", costs(&stats.images)) }
    })
}

fn costs(contents: &[ContentStats]) -> String {
    let size = |bytes: u64| ByteSize(bytes).to_string();
    let row = |content: &ContentStats| {
        let names = if content.names.is_empty() { vec!["-".to_owned()] } else { content.names.clone() };
        let digest: String = content.digest.to_string().chars().take(19).collect();
        let sizes = [content.size_bytes, content.data_bytes, content.shared_bytes, content.alone_bytes].map(size);
        [names.join(", "), digest].into_iter().chain(sizes).chain([format!("{:.2}", content.ratio)]).collect()
    };
    let rows: Vec<Vec<String>> = contents.iter().map(row).collect();
    table(&["IMAGE", "DIGEST", "SIZE", "DATA", "SHARED", "ALONE", "RATIO"], &rows)
}

async fn scrub(context: &Context<'_>, request: &ScrubRequest) -> CliResult<ExitCode> {
    let started = std::time::Instant::now();
    let mut events = context.client.scrub(request).await?;
    let bar = progress::data_bar("reading");
    let mut found = None;
    while let Some(event) = events.next().await.inspect_err(|_| bar.finish_and_clear())? {
        match event {
            Event::ScrubProgress(step) => progress::show_scrub(&bar, step),
            Event::Scrubbed { report } => found = Some(*report),
            _ => {}
        }
    }
    bar.finish_and_clear();
    let report = found.ok_or_else(|| CliError::new("the daemon did not say what it found"))?;
    let (packs, bytes) = (report.packs, ByteSize(report.pack_bytes));
    context.printer.note(&format!("read {packs} packs, {bytes}, in {}", progress::since(started)));
    context.printer.result(&report, || describe_damage(&report))?;
    if report.damaged == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    context.printer.note("hint: heal from a store that has these images: --heal-from LOCATION; or import them again");
    Ok(ExitCode::FAILURE)
}

fn describe_damage(report: &ScrubReport) -> String {
    let row = |damage: &Damage| {
        let volume = |volume: &DamagedVolume| match &volume.instance {
            Some(instance) => format!("instance {instance}"),
            None => volume.id.clone(),
        };
        let hit: Vec<_> = damage.images.iter().cloned().chain(damage.volumes.iter().map(volume)).collect();
        let hit = if hit.is_empty() { "-".to_owned() } else { hit.join(", ") };
        let is = if damage.healed { "healed" } else { "damaged" };
        vec![damage.object.clone(), is.to_owned(), hit, damage.reason.clone()]
    };
    match report.damage.is_empty() {
        true => "nothing is damaged".to_owned(),
        false => table(&["OBJECT", "IS", "HITS", "WHAT"], &report.damage.iter().map(row).collect::<Vec<_>>()),
    }
}

async fn gc(context: &Context<'_>, request: GcRequest) -> CliResult<()> {
    let events = context.client.collect_garbage(&request).await?;
    let report = match last_event(events).await? {
        Some(Event::Collected { report }) => *report,
        _ => return Err(CliError::new("the daemon did not say what it freed")),
    };
    if report.busy {
        context.printer.note("an import is at work; contents that no image uses are looked for another time");
    }
    context.printer.result(&report, || describe(&report))
}

fn describe(report: &GcReport) -> String {
    let row = |pack: &GcPack| vec![pack.pack.clone(), ByteSize(pack.bytes).to_string(), pack.reason.clone()];
    let mut text = String::new();
    if !report.packs.is_empty() {
        text = table(&["PACK", "SIZE", "WHY"], &report.packs.iter().map(row).collect::<Vec<_>>());
        text.push('\n');
    }
    let (packs, freed) = (report.deleted_packs, ByteSize(report.freed_bytes));
    text.push_str(&match report.dry_run {
        true => format!("would free {freed} in {packs} packs"),
        false => format!("freed {freed} in {packs} packs"),
    });
    if report.repacked_packs > 0 {
        let (packs, bytes) = (report.repacked_packs, ByteSize(report.repacked_bytes));
        text.push_str(&format!("; {packs} packs, used in small part, are written anew as {bytes}"));
    }
    if report.later_bytes > 0 {
        text.push_str(&format!("; {} later", ByteSize(report.later_bytes)));
    }
    text
}

/// The event that says what came of it.
async fn last_event(mut events: EventStream) -> Result<Option<Event>, ClientError> {
    let mut last = None;
    while let Some(event) = events.next().await? {
        last = Some(event);
    }
    Ok(last)
}
