//! `bulbil store …`

use bulbil_api::{ClientError, Event, EventStream};
use bulbil_control::{GcPack, GcReport, GcRequest};
use bulbil_types::ByteSize;

use super::Context;
use crate::cli_store::StoreCommand;
use crate::error::{CliError, CliResult};
use crate::output::{fields, table};

pub(crate) async fn run(context: &Context<'_>, command: StoreCommand) -> CliResult<()> {
    match command {
        StoreCommand::Stats => stats(context).await,
        StoreCommand::Gc { dry_run, grace, no_repack } => {
            gc(context, GcRequest { dry_run, grace_s: grace.map(|grace| grace.as_secs()), repack: !no_repack }).await
        }
    }
}

async fn stats(context: &Context<'_>) -> CliResult<()> {
    let usage = context.client.store_usage().await?;
    context.printer.result(&usage, || {
        let number = |name: &str| usage.get(name).and_then(serde_json::Value::as_u64).unwrap_or_default();
        let size = |name: &str| format!("{} ({})", ByteSize(number(name)), number(name));
        fields(&[
            ("packs", number("packs").to_string()),
            ("pack bytes", size("pack_bytes")),
            ("manifests", number("manifests").to_string()),
            ("manifest bytes", size("manifest_bytes")),
        ])
    })
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
