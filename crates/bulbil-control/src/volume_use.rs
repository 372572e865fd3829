//! Volumes and images as block devices of this process, for the commands that serve and mount them.
//!
//! The daemon is asked what a name means, and nothing more: these processes live without it. A volume is locked by who
//! has it open, an image's content is kept in the store by a lease.

use std::sync::Arc;

use bulbil_store::{Digest, Store, StoreErrorKind};
use bulbil_types::VolumeId;
use bulbil_volume::{
    BaseCache, BlockDevice, BlockError, BlockErrorKind, HostDirectory, StatusExtent, Volume, VolumeDirectory,
};

use crate::content_lease::ContentLease;
use crate::data_dir::DataDir;
use crate::error::{ControlError, ErrorCode};
use crate::shim::raise_file_limit;
use crate::store_binding::{StoreChoice, open_store};
use crate::store_ops::open_cache;
use crate::volume_ops::{open_volume, volume_error};

/// A device that this process has to itself.
pub struct UsedDevice {
    /// What to serve.
    pub device: Arc<dyn BlockDevice>,
    /// A volume, where it is one.
    volume: Option<Arc<Volume>>,
    /// Where an image's overlay would be, which nothing is written to.
    _scratch: Option<tempfile::TempDir>,
    _lease: Option<ContentLease>,
}

impl std::fmt::Debug for UsedDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UsedDevice").field("size_bytes", &self.device.size_bytes()).finish_non_exhaustive()
    }
}

impl UsedDevice {
    /// Prepares for a machine that starts from the volume; see [`Volume::expect_boot`]. Nothing to do for an image.
    pub fn expect_boot(&self) {
        if let Some(volume) = &self.volume {
            volume.expect_boot();
        }
    }
}

/// Opens a volume for this process alone.
///
/// # Errors
/// `InUse` when an instance runs on it or another process has it; `NotFound`, `Failed`.
pub fn use_volume(data: &DataDir, id: &VolumeId, read_only: bool) -> Result<UsedDevice, ControlError> {
    let (store, cache) = open_both(data)?;
    let volumes = VolumeDirectory::open(&data.volumes()).map_err(|e| volume_error("cannot open the volumes", &e))?;
    let volume = open_volume(&volumes, id, &store, &cache);
    let volume = volume.map_err(|e| volume_error(format!("cannot open volume {id}"), &e))?;
    let volume = Arc::new(volume);
    let device: Arc<dyn BlockDevice> = Arc::clone(&volume) as _;
    let device = if read_only { Arc::new(ReadOnly(device)) } else { device };
    Ok(UsedDevice { device, volume: Some(volume), _scratch: None, _lease: None })
}

/// Opens the content of an image for reading; it stays in the store meanwhile, also when the image is removed.
///
/// # Errors
/// `NotFound` when it is not in the store any more; `Failed`.
pub fn use_content(data: &DataDir, digest: &Digest) -> Result<UsedDevice, ControlError> {
    let failed = |e: &(dyn std::error::Error + 'static)| {
        ControlError::with_source(ErrorCode::Failed, format!("cannot open the content {digest}"), e)
    };
    let (store, cache) = open_both(data)?;
    let (lease, manifest) = ContentLease::begin(data, digest, || {
        store.manifest(digest).map_err(|e| match e.kind() {
            StoreErrorKind::NotFound => ControlError::new(ErrorCode::NotFound, "the image was removed meanwhile"),
            _ => failed(&e),
        })
    })?;
    let scratch = tempfile::Builder::new().prefix("read-").tempdir_in(data.run()).map_err(|e| failed(&e))?;
    let storage = Arc::new(HostDirectory::new(scratch.path()));
    let volume = Volume::over_image(manifest.size_bytes(), manifest, &store, &cache, storage);
    let volume = volume.map_err(|e| failed(&e))?;
    Ok(UsedDevice {
        device: Arc::new(ReadOnly(Arc::new(volume))),
        volume: None,
        _scratch: Some(scratch),
        _lease: Some(lease),
    })
}

fn open_both(data: &DataDir) -> Result<(Arc<Store>, Arc<BaseCache>), ControlError> {
    raise_file_limit();
    let (store, _) = open_store(data, &StoreChoice::default())?;
    Ok((Arc::new(store), Arc::new(open_cache(data)?)))
}

/// A device whose changing requests are refused.
struct ReadOnly(Arc<dyn BlockDevice>);

fn refused() -> Result<(), BlockError> {
    Err(BlockError::new(BlockErrorKind::ReadOnly, "it was opened for reading only"))
}

impl BlockDevice for ReadOnly {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn on_resize(&self, listener: Box<dyn Fn(u64) + Send + Sync>) {
        self.0.on_resize(listener);
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.0.read_at(buf, offset)
    }

    fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        self.0.is_fast(offset, len_bytes)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64, _fua: bool) -> Result<(), BlockError> {
        refused()
    }

    fn write_zeroes(&self, _offset: u64, _len_bytes: u64, _fua: bool) -> Result<(), BlockError> {
        refused()
    }

    fn discard(&self, _offset: u64, _len_bytes: u64, _fua: bool) -> Result<(), BlockError> {
        refused()
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        self.0.status(offset, len_bytes, max_extents)
    }
}
