//! What each command does.

mod console;
mod disk;
mod host;
mod image;
mod image_copy;
mod instance;
mod launch;
mod store;
mod volume;
mod volume_use;

use std::path::PathBuf;
use std::process::ExitCode;

use bulbil_control::{CacheSize, DataDir, StoreChoice};
use clap::CommandFactory as _;

use crate::cli::{Cli, Command};
use crate::cli_store::{KeyCommand, StoreCommand};
use crate::daemon;
use crate::error::{CliError, CliResult};
use crate::output::Printer;

/// What most commands need: where things lie, the daemon, and where to write.
pub(crate) struct Context<'a> {
    pub(crate) data: DataDir,
    pub(crate) client: bulbil_api::Client,
    pub(crate) printer: &'a Printer,
}

/// Runs a command; the exit status is that of a command in a guest, or success.
pub(crate) fn run(cli: Cli, printer: &Printer) -> CliResult<ExitCode> {
    let (store, cache_size) = (cli.global.store_choice(), cli.global.cache_size);
    let data_root = || cli.global.data_dir.clone().map_or_else(daemon::default_data_dir, Ok);
    match cli.command {
        Command::Serve { detached } => {
            log_to_stderr("info");
            daemon::serve(&data_root()?, &store, cache_size, detached)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Shim { instance } => {
            log_to_stderr("info");
            bulbil_control::shim::run_shim(&data_root()?, &instance, daemon::own_program()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Disk(command) => {
            log_to_stderr("warn");
            disk::run(command, printer)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::DiskConverter => {
            log_to_stderr("warn");
            bulbil_control::convert_worker(std::io::stdin(), std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::ImageReader { self_test } => {
            log_to_stderr("warn");
            host::image_reader(self_test, printer)
        }
        Command::KvmProbe => host::kvm_probe(),
        Command::Store(StoreCommand::Key(KeyCommand::New { file })) => {
            store::new_key(&file, printer)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "bulbil", &mut script);
            printer.raw(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        command => {
            log_to_stderr("warn");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|e| CliError::io("cannot start the runtime", &e))?;
            let result = runtime.block_on(run_client(command, data_root()?, &store, cache_size, printer));
            // A read of standard input that never ends must not keep the process.
            runtime.shutdown_background();
            result
        }
    }
}

async fn run_client(
    command: Command,
    data_root: PathBuf,
    store: &StoreChoice,
    cache_size: Option<CacheSize>,
    printer: &Printer,
) -> CliResult<ExitCode> {
    if matches!(command, Command::Doctor) {
        return host::doctor(&data_root, store, printer).await;
    }
    if let Command::Shutdown = command {
        host::shutdown(&data_root, printer).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let data = DataDir::open(&data_root)?;
    let client = daemon::connect(&data, store).await?;
    cache_size.map_or(Ok(()), |size| size.set(&data))?;
    let context = Context { data, client, printer };
    match command {
        Command::Image(command) => image::run(&context, command).await?,
        Command::Volume(command) => volume::run(&context, command).await?,
        Command::Snapshot(command) => volume::run_snapshot(&context, command).await?,
        Command::Launch(arguments) => launch::launch(&context, arguments).await?,
        Command::List => instance::list(&context).await?,
        Command::Show { instance } => instance::show(&context, &instance).await?,
        Command::Shell { instance, user, command } => {
            return instance::shell(&context, &instance, user.as_deref(), &command).await;
        }
        Command::Exec { instance, user, command } => {
            return instance::exec(&context, &instance, user.as_deref(), &command).await;
        }
        Command::Logs { instance, follow, lines } => console::logs(&context, &instance, follow, lines).await?,
        Command::Console { instance } => console::attach(&context, &instance).await?,
        Command::Stop { instance, force, timeout } => instance::stop(&context, &instance, force, timeout).await?,
        Command::Start { instance, wait } => launch::start(&context, &instance, wait.wait).await?,
        Command::Reboot { instance, force, wait } => launch::reboot(&context, &instance, force, wait.wait).await?,
        Command::Rm { instances, all, force } => instance::remove(&context, instances, all, force).await?,
        Command::Store(command) => return store::run(&context, command).await,
        Command::Doctor
        | Command::Shutdown
        | Command::Serve { .. }
        | Command::Shim { .. }
        | Command::Disk(_)
        | Command::DiskConverter
        | Command::ImageReader { .. }
        | Command::KvmProbe
        | Command::Completion { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Logs to standard error; `BULBIL_LOG` chooses what, in the form of `tracing`'s `EnvFilter`.
fn log_to_stderr(default_level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BULBIL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default_level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
