//! What is done to volumes that are not open: snapshots, resizing, and what they refer to.

use std::sync::Arc;

use bulbil_store::{Digest, ImportObserver, ImportReport, Store};
use bulbil_types::VolumeId;

use crate::cache::BaseCache;
use crate::error::{VolumeError, VolumeErrorKind};
use crate::record::{RECORD_NAME, VolumeRecord, check_size};
use crate::storage::{HostDirectory, StorageDirectory as _};
use crate::volume::{VolumeDirectory, lock_volume};

impl VolumeDirectory {
    /// Takes a snapshot of a volume that nobody has open; as [`Volume::snapshot`](crate::Volume::snapshot).
    ///
    /// The volume lies above the new content afterwards, without writes of its own.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `Cancelled`, `NoSpace`, `Corrupt`, `Io`. The volume then holds what it held.
    pub fn snapshot(
        &self,
        id: &VolumeId,
        store: &Arc<Store>,
        cache: &Arc<BaseCache>,
        observer: &dyn ImportObserver,
    ) -> Result<ImportReport, VolumeError> {
        self.open_volume(id, store, cache)?.snapshot(observer)
    }

    /// Makes a volume that nobody has open larger, by zeroes at its end. Durable when this returns.
    ///
    /// # Errors
    /// `BadSize` when it is smaller, over the limit or not a multiple of 512 bytes; `NotFound`, `InUse`,
    /// `NoSpace`, `Corrupt`, `Io`.
    pub fn resize(&self, id: &VolumeId, size_bytes: u64) -> Result<VolumeRecord, VolumeError> {
        let directory = self.volume_path(id);
        let lock = lock_volume(&directory, id)?;
        let record = self.record(id)?;
        check_size(size_bytes, record.size_bytes)?;
        let record = VolumeRecord { size_bytes, ..record };
        HostDirectory::new(&directory)
            .replace(RECORD_NAME, &record.encode())
            .map_err(|e| VolumeError::io(format!("cannot make volume {id} larger"), e))?;
        drop(lock);
        Ok(record)
    }

    /// Lists the volumes with the contents that each one needs, in no order.
    ///
    /// A volume that is put above a snapshot meanwhile is listed with its old content or the new one.
    ///
    /// # Errors
    /// `Io`; `Corrupt` when a record cannot be read, and then nothing may be concluded.
    pub fn bases(&self) -> Result<Vec<(VolumeId, Vec<Digest>)>, VolumeError> {
        let failed = |e| VolumeError::io(format!("cannot list `{}`", self.path.display()), e);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<VolumeId>().ok()) else { continue };
            match self.record(&id) {
                Ok(record) => found.push((id, record.base.into_iter().collect())),
                // Being made, or being removed.
                Err(e) if e.kind() == VolumeErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }
}
