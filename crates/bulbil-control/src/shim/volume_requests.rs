//! Requests about the volume that a shim has open: it alone can take a snapshot of it, clone it or make it larger.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bulbil_export::nbd::ServerHandle;
use bulbil_types::VolumeId;
use bulbil_vm::Qmp;
use bulbil_volume::Volume;
use serde_json::json;

use super::machine::DiskServer;
use super::{ShimAnswer, ShimRequest, answer_line};
use crate::content_lease::without_removals;
use crate::data_dir::DataDir;
use crate::error::{ControlError, ErrorCode};
use crate::volume_ops::{self, TakenContent, blocking};

/// The name of the disk in QEMU.
pub(super) const DISK_NODE: &str = "disk0";

/// How long QEMU may take to see a new size of the disk.
const RESIZE_LIMIT: Duration = Duration::from_secs(20);

/// How long one command may take for that.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);

/// The volume as requests find it; each part is there once the shim has come so far.
#[derive(Debug, Default)]
pub(super) struct OpenDisk {
    volume: OnceLock<(Arc<Volume>, DiskServer)>,
    data: OnceLock<DataDir>,
    qmp: OnceLock<Qmp>,
    /// Sizes change one at a time.
    resizing: tokio::sync::Mutex<()>,
}

impl OpenDisk {
    pub(super) fn set_volume(&self, data: &DataDir, volume: Arc<Volume>, server: DiskServer) {
        // Set once, when the shim starts.
        drop(self.data.set(data.clone()));
        drop(self.volume.set((volume, server)));
    }

    /// Keeps with the image what the boot has read of it, in the background.
    pub(super) fn boot_is_over(&self) {
        let Some((volume, _)) = self.volume.get() else { return };
        let volume = Arc::clone(volume);
        tokio::task::spawn_blocking(move || match volume.finish_recording() {
            Ok(kept) => tracing::info!(kept, reads = ?volume.read_stats(), "the boot's reads were recorded"),
            Err(error) => tracing::warn!(%error, "cannot keep what the boot has read"),
        });
    }

    pub(super) fn set_qmp(&self, qmp: Qmp) {
        drop(self.qmp.set(qmp));
    }

    /// Does what was asked for and gives the line to answer; `None` for other requests.
    pub(super) async fn answer(&self, request: &ShimRequest) -> Option<Vec<u8>> {
        match request {
            ShimRequest::SnapshotVolume => Some(line(self.snapshot().await)),
            ShimRequest::CloneVolume { clone } => Some(line(self.clone_as(clone.clone()).await)),
            ShimRequest::ResizeVolume { size_bytes } => Some(line(self.resize(*size_bytes).await)),
            ShimRequest::Watch | ShimRequest::Stop { .. } => None,
        }
    }

    fn volume(&self) -> Result<&(Arc<Volume>, DiskServer), ControlError> {
        self.volume.get().ok_or_else(|| ControlError::new(ErrorCode::InUse, "the instance is just being started"))
    }

    /// Requests of the guest are answered meanwhile.
    async fn snapshot(&self) -> Result<TakenContent, ControlError> {
        let volume = Arc::clone(&self.volume()?.0);
        let data = self.data.get().cloned();
        blocking(move || {
            // The daemon sees to it as well, as long as it lives.
            let _no_removal = data.map(|data| without_removals(&data)).transpose()?;
            volume_ops::snapshot_open(&volume)
        })
        .await
    }

    /// Requests of the guest are answered meanwhile.
    async fn clone_as(&self, clone: VolumeId) -> Result<Option<u64>, ControlError> {
        let volume = Arc::clone(&self.volume()?.0);
        let data = self.data.get().cloned();
        blocking(move || {
            let _no_removal = data.map(|data| without_removals(&data)).transpose()?;
            volume_ops::clone_open(&volume, &clone)
        })
        .await
    }

    async fn resize(&self, size_bytes: u64) -> Result<(), ControlError> {
        let _alone = self.resizing.lock().await;
        let (volume, server) = self.volume()?.clone();
        let grown = Arc::clone(&volume);
        blocking(move || volume_ops::grow_open(&grown, size_bytes)).await?;
        // The volume is larger already, and durably so: without what follows the guest sees it when it starts again.
        match server {
            DiskServer::VhostUser(server) => {
                if !server.notify_resize() {
                    tracing::warn!("the machine is not connected, so it is not told the new size of its disk");
                }
            }
            DiskServer::Nbd(server) => {
                if let Err(error) = self.resize_nbd(server, volume, size_bytes).await {
                    tracing::warn!(%error, causes = ?error.causes(), "the guest does not see the new size of its disk");
                }
            }
        }
        Ok(())
    }

    async fn resize_nbd(
        &self,
        server: Arc<ServerHandle>,
        volume: Arc<Volume>,
        size_bytes: u64,
    ) -> Result<(), ControlError> {
        let failed = |e: &(dyn std::error::Error + 'static)| {
            ControlError::with_source(ErrorCode::Failed, "cannot serve the larger disk", e)
        };
        // A client learns the size of an NBD export when it connects; QEMU connects again by itself.
        blocking(move || server.replace_device("", volume).map_err(|e| failed(&e))).await?;
        match self.qmp.get() {
            Some(qmp) => tell_guest(qmp, size_bytes).await.map_err(|e| failed(&e)),
            None => Ok(()),
        }
    }
}

/// Makes the disk larger in the machine, which tells its guest.
async fn tell_guest(qmp: &Qmp, size_bytes: u64) -> Result<(), bulbil_vm::QmpError> {
    let deadline = Instant::now() + RESIZE_LIMIT;
    loop {
        // QEMU connects again when it next reads, which an idle guest may not do for long.
        let read = json!({ "command-line": format!("qemu-io {DISK_NODE} \"read 0 512\"") });
        qmp.execute_within("human-monitor-command", read, COMMAND_LIMIT).await?;
        let resize = json!({ "node-name": DISK_NODE, "size": size_bytes });
        match qmp.execute_within("block_resize", resize, COMMAND_LIMIT).await {
            Err(error) if Instant::now() < deadline => {
                tracing::debug!(%error, "the machine does not see the new size yet");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return other.map(drop),
        }
    }
}

fn line<T: serde::Serialize>(done: Result<T, ControlError>) -> Vec<u8> {
    answer_line(&match done {
        Ok(value) => ShimAnswer::Done(value),
        Err(error) => ShimAnswer::Failed(error),
    })
}
