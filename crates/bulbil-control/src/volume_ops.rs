//! What is done to a volume's content, apart from what the catalog knows of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_store::{Digest, ImportObserver, Store};
use bulbil_types::VolumeId;
use bulbil_volume::{BaseCache, Volume, VolumeDirectory, VolumeError, VolumeErrorKind};

use crate::error::{ControlError, ErrorCode};

/// A content that was taken of a volume; it is in the store, durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct TakenContent {
    /// Identity of the content.
    pub(crate) digest: Digest,
    /// Size of the disk in bytes.
    pub(crate) size_bytes: u64,
    /// Bytes the store grew by.
    pub(crate) stored_bytes: u64,
}

/// How long a volume that is in use is waited for: who only looks whether it is has it for a moment.
const IN_USE_LIMIT: Duration = Duration::from_millis(200);

/// Opens a volume.
pub(crate) fn open_volume(
    volumes: &VolumeDirectory,
    id: &VolumeId,
    store: &Arc<Store>,
    cache: &Arc<BaseCache>,
) -> Result<Volume, VolumeError> {
    once_let_go(|| volumes.open_volume(id, store, cache))
}

fn once_let_go<T>(mut attempt: impl FnMut() -> Result<T, VolumeError>) -> Result<T, VolumeError> {
    let deadline = Instant::now() + IN_USE_LIMIT;
    loop {
        match attempt() {
            Err(e) if e.kind() == VolumeErrorKind::InUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Takes a snapshot of a volume that nothing has open.
pub(crate) fn snapshot_closed(
    volumes: &VolumeDirectory,
    id: &VolumeId,
    store: &Arc<Store>,
    cache: &Arc<BaseCache>,
) -> Result<TakenContent, ControlError> {
    let volume = open_volume(volumes, id, store, cache);
    let volume = volume.map_err(|e| volume_error(format!("cannot take a snapshot of volume {id}"), &e))?;
    snapshot_open(&volume)
}

/// Makes a clone of a volume that nothing has open, and gives its size in bytes; `None` when files cannot be shared.
pub(crate) fn clone_closed(
    volumes: &VolumeDirectory,
    id: &VolumeId,
    clone: &VolumeId,
) -> Result<Option<u64>, ControlError> {
    let made = once_let_go(|| volumes.clone_volume(id, clone));
    let made = made.map_err(|e| volume_error(format!("cannot clone volume {id}"), &e))?;
    Ok(made.map(|record| record.size_bytes))
}

/// Makes a clone of an open volume while it is written to, as [`clone_closed`].
pub(crate) fn clone_open(volume: &Volume, clone: &VolumeId) -> Result<Option<u64>, ControlError> {
    let made = volume.clone_as(clone).map_err(|e| volume_error("cannot clone the volume", &e))?;
    Ok(made.map(|record| record.size_bytes))
}

/// Takes a snapshot of an open volume while it is written to.
pub(crate) fn snapshot_open(volume: &Volume) -> Result<TakenContent, ControlError> {
    let taken = volume.snapshot(&Silent).map_err(|e| volume_error("cannot take a snapshot of the volume", &e))?;
    Ok(TakenContent { digest: taken.digest, size_bytes: taken.size_bytes, stored_bytes: taken.stored_bytes })
}

/// Makes a volume larger that nothing has open.
pub(crate) fn grow_closed(volumes: &VolumeDirectory, id: &VolumeId, size_bytes: u64) -> Result<(), ControlError> {
    let grown = volumes.resize(id, size_bytes);
    grown.map(drop).map_err(|e| volume_error(format!("cannot make volume {id} larger"), &e))
}

/// Makes an open volume larger; durable when this returns.
pub(crate) fn grow_open(volume: &Volume, size_bytes: u64) -> Result<(), ControlError> {
    volume.grow(size_bytes).map_err(|e| volume_error("cannot make the volume larger", &e))
}

/// Listens to nothing: who asks waits for the end.
struct Silent;

impl ImportObserver for Silent {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64, _stored_bytes: u64) {}
}

/// Runs work on a volume that blocks, beside what else this process does.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ControlError> + Send + 'static,
) -> Result<T, ControlError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the work on a volume broke off", &e))?
}

/// An error of a volume as a user meets it.
pub(crate) fn volume_error(what: impl Into<String>, error: &VolumeError) -> ControlError {
    let code = match error.kind() {
        VolumeErrorKind::NotFound => ErrorCode::NotFound,
        VolumeErrorKind::InUse => ErrorCode::InUse,
        VolumeErrorKind::BadSize => ErrorCode::Invalid,
        VolumeErrorKind::NoSpace => ErrorCode::NoSpace,
        _ => ErrorCode::Failed,
    };
    ControlError::with_source(code, what, error)
}
