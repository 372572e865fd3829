//! Commands that serve or mount a volume or an image themselves, and end when that ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_control::fuse::{FuseError, FuseMount, FuseOptions};
use bulbil_control::nbd::{Export, NbdServer, ServeError, ServerHandle as NbdHandle};
use bulbil_control::vhost_user::{Options, VhostUserHandle, VhostUserServer};
use bulbil_control::{ErrorCode, UsedDevice, VolumeState, use_content, use_volume};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Context, image, volume};
use crate::cli_volume::ServeArgs;
use crate::error::{CliError, CliResult};

/// What a command writes when others can begin.
#[derive(Serialize)]
struct Offered {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
    size_bytes: u64,
    read_only: bool,
}

/// The signals that end a command of this kind.
struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl EndSignals {
    fn new() -> CliResult<Self> {
        let listen = |kind| signal(kind).map_err(|e| CliError::io("cannot wait for signals", &e));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

fn open_volume(context: &Context<'_>, view: &bulbil_control::VolumeView, read_only: bool) -> CliResult<UsedDevice> {
    if view.state == VolumeState::Incomplete {
        let text = format!("the creation of volume {} was interrupted", view.record.id);
        return Err(CliError::new(text).hint(format!("remove it: bulbil volume rm {}", view.record.id)));
    }
    use_volume(&context.data, &view.record.id, read_only).map_err(|error| {
        let error = CliError::from(error);
        match &view.instance {
            Some(name) => error.hint_for(ErrorCode::InUse, format!("stop the instance first: bulbil stop {name}")),
            None => volume::with_hints(error),
        }
    })
}

/// What serves a volume, until it is dropped.
enum Server {
    Nbd(NbdHandle),
    VhostUser(VhostUserHandle),
}

impl Server {
    fn shutdown(&self) {
        match self {
            Self::Nbd(server) => server.shutdown(),
            Self::VhostUser(server) => server.shutdown(),
        }
    }
}

pub(crate) async fn serve(context: &Context<'_>, arguments: ServeArgs) -> CliResult<()> {
    let mut signals = EndSignals::new()?;
    let view = volume::find(context, &arguments.volume).await?;
    let (typed, is_nbd) = match (&arguments.nbd, &arguments.vhost_user) {
        (Some(address), _) => (&address.0, true),
        (None, Some(path)) => (path, false),
        (None, None) => return Err(CliError::usage("say how to serve it: --nbd unix:PATH or --vhost-user PATH")),
    };
    let path =
        std::path::absolute(typed).map_err(|e| CliError::io(format!("cannot serve at `{}`", typed.display()), &e))?;
    let used = open_volume(context, &view, arguments.read_only)?;
    // What connects is a machine, as far as is known; a mount is none.
    used.expect_boot();
    let server = if is_nbd {
        let export = Export { name: String::new(), description: view.title(), device: Arc::clone(&used.device) };
        let served = NbdServer::bind(&path).and_then(|server| server.export(export)).and_then(NbdServer::spawn);
        Server::Nbd(served.map_err(|e| serve_error(&e))?)
    } else {
        let options = Options { serial: view.record.id.to_string(), ..Options::default() };
        let served = VhostUserServer::bind(&path, Arc::clone(&used.device), options);
        Server::VhostUser(served.and_then(VhostUserServer::spawn).map_err(|e| serve_error(&e))?)
    };
    let uri = is_nbd.then(|| format!("nbd+unix:///?socket={}", path.display()));
    let shown = uri.clone().unwrap_or_else(|| path.display().to_string());
    let offered = Offered {
        id: view.record.id.to_string(),
        path: Some(path),
        uri,
        size_bytes: used.device.size_bytes(),
        read_only: used.device.is_read_only(),
    };
    context.printer.result(&offered, || shown)?;
    context.printer.note(&format!("serving {} until Ctrl-C", view.title()));
    signals.next().await;
    server.shutdown();
    if !used.device.is_read_only() {
        let flushed = used.device.flush();
        flushed.map_err(|e| CliError::new("cannot make the volume's last writes durable").caused_by(e.to_string()))?;
    }
    Ok(())
}

fn serve_error(error: &ServeError) -> CliError {
    let mut failed = CliError::new(error.to_string());
    if let Some(source) = std::error::Error::source(error) {
        failed = failed.caused_by(source.to_string());
    }
    match error {
        ServeError::InUse { .. } | ServeError::NotASocket { .. } => failed.hint("choose another path"),
        ServeError::PathTooLong { .. } => failed.hint("choose a shorter path"),
        _ => failed,
    }
}

pub(crate) async fn mount_volume(
    context: &Context<'_>,
    name: &str,
    directory: &Path,
    read_only: bool,
) -> CliResult<()> {
    let view = volume::find(context, name).await?;
    let used = open_volume(context, &view, read_only)?;
    mount(context, &view.record.id.to_string(), &view.title(), used, directory).await
}

pub(crate) async fn mount_image(context: &Context<'_>, name: &str, directory: &Path) -> CliResult<()> {
    let found = context.client.image(name).await.map_err(|e| image::with_image_hint(e.into()))?;
    let used = use_content(&context.data, &found.digest)?;
    let title = format!("{}:{}", found.name, found.version);
    mount(context, &found.id.to_string(), &title, used, directory).await
}

/// Mounts, tells the file's path, and ends when it is unmounted by whomever.
async fn mount(context: &Context<'_>, id: &str, title: &str, used: UsedDevice, directory: &Path) -> CliResult<()> {
    let mut signals = EndSignals::new()?;
    let options = FuseOptions { label: id.to_owned(), ..FuseOptions::default() };
    let mounted = FuseMount::mount(Arc::clone(&used.device), directory, &options);
    let mounted = Arc::new(mounted.map_err(|e| mount_error(&e, directory))?);
    let file = mounted.file();
    let offered = Offered {
        id: id.to_owned(),
        path: Some(file.clone()),
        uri: None,
        size_bytes: used.device.size_bytes(),
        read_only: used.device.is_read_only(),
    };
    context.printer.result(&offered, || file.display().to_string())?;
    context.printer.note(&format!("{title} is mounted until Ctrl-C or: umount {}", mounted.directory().display()));
    let waiting = Arc::clone(&mounted);
    let mut ended = tokio::task::spawn_blocking(move || waiting.wait());
    let mut asked = false;
    loop {
        tokio::select! {
            done = &mut ended => {
                let done = done.map_err(|e| CliError::new("the mount broke off").caused_by(e.to_string()))?;
                return done.map_err(|e| mount_error(&e, directory));
            }
            () = signals.next() => {}
        }
        if asked {
            mounted.detach().map_err(|e| mount_error(&e, directory))?;
            return Err(CliError::new(format!("`{}` was taken away while it was in use", file.display())));
        }
        asked = true;
        let unmounting = Arc::clone(&mounted);
        let unmounted = tokio::task::spawn_blocking(move || unmounting.unmount()).await;
        match unmounted.map_err(|e| CliError::new("the mount broke off").caused_by(e.to_string()))? {
            // How it ended is told above.
            Ok(()) | Err(FuseError::Served { .. }) => {}
            Err(FuseError::Busy { .. }) => context.printer.note(&format!(
                "`{}` is in use: end what uses it (a mounted loop device?), or press Ctrl-C again to take it away all the same",
                file.display()
            )),
            Err(error) => return Err(mount_error(&error, directory)),
        }
    }
}

fn mount_error(error: &FuseError, directory: &Path) -> CliError {
    let mut failed = CliError::new(error.to_string());
    if let Some(source) = std::error::Error::source(error) {
        failed = failed.caused_by(source.to_string());
    }
    let shown = directory.display();
    match error {
        FuseError::NoFuse { .. } => failed.hint("load it: modprobe fuse; in a container, give it /dev/fuse"),
        FuseError::NoHelper => failed.hint("install it (Debian, Ubuntu): apt install fuse3"),
        FuseError::NotAnEmptyDirectory { .. } => failed.hint("choose an empty directory"),
        FuseError::Directory { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            failed.hint(format!("make it first: mkdir {shown}"))
        }
        FuseError::Stale { .. } => failed.hint(format!("unmount it first: fusermount3 -u {shown}")),
        _ => failed,
    }
}
