//! Commands about instances that are there.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use bulbil_control::{BootVerdict, ErrorCode, InstanceState, InstanceView};
use bulbil_types::ByteSize;

use super::{Context, image};
use crate::error::{CliError, CliResult};
use crate::output::{fields, table};
use crate::progress::seconds;
use crate::ssh;

pub(crate) fn with_hints(error: CliError, name: &str) -> CliError {
    error
        .hint_for(ErrorCode::NotFound, "see which there are: bulbil list")
        .hint_for(ErrorCode::Timeout, format!("switch it off: bulbil stop {name} --force"))
        .hint_for(ErrorCode::InUse, format!("see it: bulbil show {name}"))
}

async fn find(context: &Context<'_>, name: &str) -> CliResult<InstanceView> {
    context.client.instance(name).await.map_err(|e| with_hints(e.into(), name))
}

pub(crate) async fn list(context: &Context<'_>) -> CliResult<()> {
    let instances = context.client.instances().await?;
    context.printer.result(&instances, || {
        let rows: Vec<_> = instances
            .iter()
            .map(|instance| {
                let ssh = instance.run.ssh.as_ref().map(|ssh| format!("{}:{}", ssh.address, ssh.port));
                vec![
                    instance.record.name.to_string(),
                    instance.record.id.to_string(),
                    instance.run.state.to_string(),
                    instance.health.clone(),
                    instance.record.image.clone(),
                    instance.record.personality.to_string(),
                    instance.memory().to_string(),
                    ssh.unwrap_or_else(|| "-".to_owned()),
                ]
            })
            .collect();
        table(&["NAME", "ID", "STATE", "HEALTH", "IMAGE", "PERSONALITY", "MEMORY", "SSH"], &rows)
    })
}

pub(crate) async fn show(context: &Context<'_>, name: &str) -> CliResult<()> {
    let instance = find(context, name).await?;
    context.printer.result(&instance, || describe(&instance))
}

fn describe(instance: &InstanceView) -> String {
    let (record, run) = (&instance.record, &instance.run);
    let size = |bytes: u64| format!("{} ({bytes})", ByteSize(bytes));
    let mut pairs = vec![
        ("id", record.id.to_string()),
        ("name", record.name.to_string()),
        ("state", run.state.to_string()),
        ("health", instance.health.clone()),
    ];
    if let Some(reason) = &run.reason {
        pairs.push(("reason", reason.clone()));
    }
    pairs.extend([
        ("image", format!("{} ({})", record.image, record.image_id)),
        ("personality", record.personality.to_string()),
        ("processors", record.cpus.to_string()),
        ("memory", size(record.memory_bytes)),
        ("disk", format!("{} on {}", size(record.disk_bytes), record.volume_id)),
        ("boot mode", record.boot_mode.to_string()),
        ("host name", record.hostname.clone()),
        ("address", format!("{} ({})", instance.private_ip, record.mac)),
        ("keys", record.public_keys.iter().map(|login| login.name.as_str()).collect::<Vec<_>>().join(", ")),
        ("user data", size(record.user_data_bytes)),
    ]);
    if let Some(accelerator) = &run.accelerator {
        pairs.push(("runs on", accelerator.clone()));
    }
    for port in &record.publish {
        pairs.push(("published", port.to_string()));
    }
    if let Some(ssh) = &run.ssh {
        pairs.push(("ssh", format!("{}@{}:{}", ssh.user.as_deref().unwrap_or("?"), ssh.address, ssh.port)));
    }
    if let (Some(shim), Some(vm)) = (run.shim_pid, run.vm_pid) {
        pairs.push(("processes", format!("shim {shim}, machine {vm}")));
    }
    pairs.push(("launched", image::when(record.created_at)));
    for reached in &run.phases {
        pairs.push(("phase", format!("{:<20} {}", reached.phase, seconds(reached.at_ms))));
    }
    if let Some(BootVerdict::Degraded { errors }) = &run.boot {
        pairs.extend(errors.iter().map(|error| ("did not happen", error.clone())));
    }
    if let Some(BootVerdict::Failed { cause, evidence, .. }) = &run.boot {
        pairs.push(("failed", cause.clone()));
        pairs.extend(evidence.iter().map(|line| ("evidence", line.clone())));
    }
    fields(&pairs)
}

pub(crate) async fn stop(context: &Context<'_>, name: &str, force: bool, grace_s: u64) -> CliResult<()> {
    let stopped = context.client.stop(name, grace_s, force).await.map_err(|e| with_hints(e.into(), name))?;
    let reason = stopped.run.reason.as_deref().unwrap_or_default();
    context.printer.note(&format!("{} is stopped: {reason}", stopped.record.name));
    if context.printer.is_json() { context.printer.result(&stopped, String::new) } else { Ok(()) }
}

pub(crate) async fn remove(context: &Context<'_>, names: Vec<String>, all: bool, force: bool) -> CliResult<()> {
    let names = match all {
        true => context.client.instances().await?.into_iter().map(|i| i.record.id.to_string()).collect(),
        false => names,
    };
    let mut removed = Vec::new();
    let mut errors = Vec::new();
    for name in &names {
        match context.client.remove_instance(name, force).await {
            Ok(gone) => {
                context.printer.note(&format!("removed {}", gone.record.name));
                removed.push(gone);
            }
            Err(error) => {
                let hint = format!("stop it first: bulbil stop {name}, or: bulbil rm {name} --force");
                errors.push(with_hints(CliError::from(error).hint_for(ErrorCode::InUse, hint), name));
            }
        }
    }
    context.printer.removed(&removed, errors)
}

pub(crate) async fn shell(
    context: &Context<'_>,
    name: &str,
    user: Option<&str>,
    command: &[String],
) -> CliResult<ExitCode> {
    let instance = find(context, name).await?;
    let mut ssh = ssh_command(&instance, user, &[], command)?;
    // Takes this process's place, so that the terminal is ssh's alone.
    Err(ssh_missing(&ssh.exec()))
}

pub(crate) async fn exec(
    context: &Context<'_>,
    name: &str,
    user: Option<&str>,
    command: &[String],
) -> CliResult<ExitCode> {
    let instance = find(context, name).await?;
    if instance.run.state == InstanceState::Running && instance.run.boot.is_none() {
        context.printer.note(&format!("{name} is still booting"));
    }
    // In batch mode: nobody may be there to answer a question.
    let mut ssh = ssh_command(&instance, user, &["-o", "BatchMode=yes"], command)?;
    let status = ssh.status().map_err(|e| ssh_missing(&e))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

/// `ssh` with its options, the destination and the command, whose words the guest's shell reads back.
fn ssh_command(
    instance: &InstanceView,
    user: Option<&str>,
    options: &[&str],
    command: &[String],
) -> CliResult<Command> {
    let mut ssh = Command::new("ssh");
    ssh.args(options).args(ssh::arguments(instance, user)?).args(command.iter().map(|word| ssh::quote(word)));
    Ok(ssh)
}

fn ssh_missing(error: &std::io::Error) -> CliError {
    CliError::io("cannot run `ssh`", error).hint("install it (Debian, Ubuntu): apt install openssh-client")
}
