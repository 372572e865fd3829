//! `bulbil launch`, `start` and `reboot`: what ends with a boot.

use std::path::{Path, PathBuf};

use bulbil_api::{Event, EventStream, Wait};
use bulbil_control::{ErrorCode, InstanceState, InstanceView, LaunchRequest};

use super::{Context, image, instance};
use crate::cli::LaunchArgs;
use crate::error::{CliError, CliResult};
use crate::progress::{BootReport, boot_spinner, seconds};

/// The most user data read from a file; the daemon knows the limit of each personality.
const MAX_USER_DATA_BYTES: u64 = 1 << 20;

/// What names of disk image files end with.
const DISK_EXTENSIONS: [&str; 8] = ["qcow2", "raw", "img", "vhd", "vhdx", "vmdk", "vdi", "ova"];

pub(crate) async fn launch(context: &Context<'_>, arguments: LaunchArgs) -> CliResult<()> {
    let user_data = arguments.user_data.as_deref().map(read_user_data).transpose()?;
    let public_keys = arguments.key.iter().map(|path| read_key(path)).collect::<CliResult<Vec<_>>>()?;
    let mut request = LaunchRequest {
        image: arguments.image.clone(),
        name: arguments.name,
        count: arguments.count,
        cpus: arguments.cpus,
        memory_bytes: arguments.memory.0,
        disk_bytes: arguments.disk.map(|size| size.0),
        public_keys,
        user_data,
        personality: arguments.personality,
        publish: arguments.publish,
        dry_run: arguments.dry_run,
    };
    let started = std::time::Instant::now();
    if let Some(file) = file_meant_by(context, &arguments.image).await? {
        if request.dry_run {
            std::fs::metadata(&file).map_err(|e| CliError::cannot_open(&file, &e))?;
            context
                .printer
                .note(&format!("would import `{}` first; nothing was created: this was a dry run", file.display()));
            return Ok(());
        }
        // What is wrong must not be found out after a long import.
        context.client.check_launch(&request).await.map_err(|e| with_launch_hints(e.into(), &request))?;
        // A launch takes no format.
        let format_option = format!("bulbil image import {} --format", file.display());
        let imported = image::import(context, &file, None, None, arguments.input, &format_option);
        let imported = imported.await.map_err(|mut error| {
            if error.code == Some(ErrorCode::InUse) {
                let file = file.display();
                error.hint = Some(format!(
                    "import it under a name of its own first: bulbil image import {file} --as NAME:VERSION"
                ));
            }
            error
        })?;
        request.image = imported.id.to_string();
    } else if let Some(option) = arguments.input.first_given() {
        let text = format!("{option} fits a file that is imported; `{}` is an image", request.image);
        return Err(CliError::usage(text).hint("leave it out, or give the file with a slash: ./FILE"));
    }
    let events = context.client.launch(&request, arguments.wait.wait).await;
    let events = events.map_err(|e| with_launch_hints(e.into(), &request))?;
    if request.dry_run {
        let planned = collect(events).await?;
        context.printer.note("nothing was created: this was a dry run");
        return if context.printer.is_json() { print(context, &planned) } else { Ok(()) };
    }
    let instances = follow(context, events, request.count > 1).await?;
    conclude(context, &instances, arguments.wait.wait, started)
}

fn with_launch_hints(error: CliError, request: &LaunchRequest) -> CliError {
    let error = image::with_image_hint(error);
    let name = request.name.as_ref().map(ToString::to_string).unwrap_or_default();
    if error.code == Some(ErrorCode::InUse) && error.message.contains("named") {
        return error.hint(format!("choose another --name, or remove it: bulbil rm {name} --force"));
    }
    error
        .hint_for(ErrorCode::InUse, "choose another port of the host: --publish HOST:GUEST")
        .hint_for(ErrorCode::MissingProgram, "install it, then see: bulbil doctor")
}

pub(crate) async fn start(context: &Context<'_>, name: &str, wait: Wait) -> CliResult<()> {
    let started = std::time::Instant::now();
    let events = context.client.start(name, wait).await.map_err(|e| instance::with_hints(e.into(), name))?;
    let instances = follow(context, events, false).await?;
    conclude(context, &instances, wait, started)
}

pub(crate) async fn reboot(context: &Context<'_>, name: &str, force: bool, wait: Wait) -> CliResult<()> {
    const GRACE_S: u64 = 60;
    let stopped = context.client.stop(name, GRACE_S, force).await.map_err(|e| instance::with_hints(e.into(), name))?;
    context.printer.note(&format!("{} is stopped", stopped.record.name));
    start(context, name, wait).await
}

/// The file, when what was typed is one: it has a slash or a disk's extension, or there is such a
/// file and no such image.
async fn file_meant_by(context: &Context<'_>, typed: &str) -> CliResult<Option<PathBuf>> {
    let path = Path::new(typed);
    let disk_extension = path.extension().is_some_and(|e| DISK_EXTENSIONS.iter().any(|known| e == *known));
    if typed.contains('/') {
        return Ok(Some(path.to_owned()));
    }
    if (disk_extension || path.is_file()) && context.client.image(typed).await.is_err() {
        return Ok(Some(path.to_owned()));
    }
    Ok(None)
}

fn read_user_data(path: &Path) -> CliResult<Vec<u8>> {
    let fail = |e: std::io::Error| CliError::io(format!("cannot read the user data `{}`", path.display()), &e);
    let len = std::fs::metadata(path).map_err(fail)?.len();
    if len > MAX_USER_DATA_BYTES {
        let text = format!(
            "the user data `{}` has {len} bytes; the most any personality takes is {MAX_USER_DATA_BYTES}",
            path.display()
        );
        return Err(CliError::new(text).hint("compress it with gzip, or let it fetch the rest: `#include URL`"));
    }
    std::fs::read(path).map_err(fail)
}

fn read_key(path: &Path) -> CliResult<String> {
    std::fs::read_to_string(path).map_err(|e| {
        CliError::io(format!("cannot read the public key `{}`", path.display()), &e)
            .hint("make a key pair with: ssh-keygen -t ed25519")
    })
}

async fn collect(mut events: EventStream) -> CliResult<Vec<InstanceView>> {
    let mut instances = Vec::new();
    while let Some(event) = events.next().await? {
        if let Event::Instance { instance } = event {
            instances.push(*instance);
        }
    }
    Ok(instances)
}

/// Shows each phase as it comes; returns the instances as they were last.
async fn follow(context: &Context<'_>, mut events: EventStream, several: bool) -> CliResult<Vec<InstanceView>> {
    let mut report = BootReport::default();
    let mut instances: Vec<InstanceView> = Vec::new();
    let spinner = boot_spinner();
    while let Some(event) = events.next().await.inspect_err(|_| spinner.finish_and_clear())? {
        let Event::Instance { instance } = event else { continue };
        spinner.suspend(|| {
            match instances.iter_mut().find(|known| known.record.id == instance.record.id) {
                Some(known) => *known = *instance.clone(),
                None => {
                    context.printer.note(&format!(
                        "{} {} ({}) from {}",
                        instance.run.state, instance.record.name, instance.record.id, instance.record.image
                    ));
                    instances.push(*instance.clone());
                }
            }
            report.show(&instance, several, context.printer);
        });
    }
    spinner.finish_and_clear();
    Ok(instances)
}

fn conclude(
    context: &Context<'_>,
    instances: &[InstanceView],
    wait: Wait,
    started: std::time::Instant,
) -> CliResult<()> {
    let elapsed = seconds(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
    print(context, instances)?;
    let mut failed = None;
    for instance in instances {
        let name = &instance.record.name;
        match bad_end(instance) {
            Some(error) => {
                if let Some(earlier) = failed.replace(error) {
                    context.printer.error(&earlier);
                }
            }
            None if wait == Wait::Ready => {
                context
                    .printer
                    .note(&format!("{name} is {} after {elapsed}; log in: bulbil shell {name}", instance.health));
                show_degradation(context, instance);
            }
            None => context.printer.note(&format!("{name} is {} after {elapsed}", instance.run.state)),
        }
    }
    failed.map_or(Ok(()), Err)
}

fn show_degradation(context: &Context<'_>, instance: &InstanceView) {
    if let Some(bulbil_control::BootVerdict::Degraded { errors }) = &instance.run.boot {
        for error in errors {
            context.printer.note(&format!("  did not happen: {error}"));
        }
        let name = &instance.record.name;
        context.printer.note(&format!("hint: see more: bulbil exec {name} -- sudo cat /var/log/cloud-init.log"));
    }
}

/// The error of an instance that is not up.
fn bad_end(instance: &InstanceView) -> Option<CliError> {
    let name = &instance.record.name;
    let hint = format!("see the whole console: bulbil logs {name}");
    if let Some(bulbil_control::BootVerdict::Failed { cause, evidence, last_lines }) = &instance.run.boot {
        let mut error = CliError::new(format!("instance `{name}` did not come up: {cause}"));
        if let Some(evidence) = evidence {
            error = error.caused_by(evidence.clone());
        }
        for line in last_lines.iter().rev().take(8).rev() {
            error = error.caused_by(format!("console: {line}"));
        }
        return Some(error.hint(hint));
    }
    (instance.run.state == InstanceState::Stopped).then(|| {
        let reason = instance.run.reason.clone().unwrap_or_else(|| "no reason is known".to_owned());
        CliError::new(format!("instance `{name}` stopped")).caused_by(reason).hint(hint)
    })
}

fn print(context: &Context<'_>, instances: &[InstanceView]) -> CliResult<()> {
    let ids = || instances.iter().map(|i| i.record.id.to_string()).collect::<Vec<_>>().join("\n");
    match instances {
        [one] => context.printer.result(one, ids),
        several => context.printer.result(&several, ids),
    }
}
