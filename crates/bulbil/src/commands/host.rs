//! Commands about this machine and the daemon.

use std::path::Path;
use std::process::ExitCode;

use bulbil_api::{Client, ClientError};
use bulbil_control::{DataDir, HostCheck, HostReport, StoreChoice};

use crate::daemon;
use crate::error::{CliError, CliResult};
use crate::output::{Printer, table};

/// Tries KVM; the parent kills this process when it hangs.
pub(crate) fn kvm_probe() -> CliResult<ExitCode> {
    bulbil_control::probe_kvm().map_err(CliError::new)?;
    Ok(ExitCode::SUCCESS)
}

/// Reads an image for the daemon, or tells how well it would be held back doing so.
pub(crate) fn image_reader(self_test: bool, printer: &Printer) -> CliResult<ExitCode> {
    if self_test {
        let test = bulbil_control::run_self_test()
            .map_err(|e| CliError::new("cannot restrict this process").caused_by(e.to_string()))?;
        let mut document = serde_json::to_vec(&test).expect("a report is plain data");
        document.push(b'\n');
        printer.raw(&document)?;
        return Ok(if test.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    bulbil_control::run_image_reader()?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn doctor(data_root: &Path, store: &StoreChoice, printer: &Printer) -> CliResult<ExitCode> {
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    let mut report = HostReport::of_this_host(data_root, &daemon::own_program()?, &search_path).await;
    let daemon = match Client::new(&data_root.join("run/bulbil.sock")).health().await {
        Ok(health) => (true, format!("version {}, process {}", health.version, health.pid)),
        Err(ClientError::NoDaemon(_)) => (true, "not running; it is started when it is needed".to_owned()),
        Err(error) => (false, error.to_string()),
    };
    let (ok, detail) = daemon;
    report.checks.push(HostCheck { name: "daemon".to_owned(), ok, optional: false, detail });
    report.add_store(data_root, store).await;
    printer.result(&report, || {
        let row = |check: &HostCheck| {
            let word = match (check.ok, check.optional) {
                (true, _) => "ok",
                (false, true) => "no",
                (false, false) => "missing",
            };
            vec![check.name.clone(), word.to_owned(), check.detail.clone()]
        };
        table(&["CHECK", "IS", "SEEN"], &report.checks.iter().map(row).collect::<Vec<_>>())
    })?;
    let broken = report.checks.iter().any(|check| !check.ok && !check.optional);
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(crate) async fn shutdown(data_root: &Path, printer: &Printer) -> CliResult<()> {
    let data = DataDir::open(data_root)?;
    match Client::new(&data.socket()).shutdown().await {
        Ok(health) => {
            // Gone when its lock is: a command that follows must not meet the old one.
            let socket = data.socket();
            for _ in 0..500 {
                if !socket.exists() {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            printer.note(&format!("the daemon (process {}) has ended; instances go on", health.pid));
            Ok(())
        }
        Err(ClientError::NoDaemon(_)) => {
            printer.note("no daemon is running");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}
