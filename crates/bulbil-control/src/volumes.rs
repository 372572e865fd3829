//! Volumes and snapshots: create, list, resize, snapshot, remove.
//!
//! A snapshot is a content in the store, taken of a volume at one moment; the volume goes on above it. It is consistent
//! as after a loss of power: what the guest had flushed is in it, and a journal may have to be replayed. A running
//! instance's volume is open in its shim, so the shim takes the snapshot and makes the volume larger.
//!
//! What a volume or a snapshot refers to stays in the store, whether or not the image it came from is removed.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use bulbil_store::Digest;
use bulbil_types::{ByteSize, MAX_DISK_BYTES, Name, SnapshotId, VolumeId};
use bulbil_volume::VolumeErrorKind;

use crate::catalog_volumes::snapshot_name_taken;
use crate::control::{Control, now};
use crate::data_dir::replace_file;
use crate::error::{ControlError, ErrorCode};
use crate::model::{InstanceRecord, InstanceState, InstanceView};
use crate::shim::{self, ShimRequest};
use crate::store_ops::open_cache;
use crate::volume_model::{SnapshotRecord, VolumeRecord, VolumeRequest, VolumeState, VolumeView};
use crate::volume_ops::{self, TakenContent, blocking, volume_error};

/// What a new volume begins as.
pub(crate) struct Beginning {
    pub(crate) digest: Option<Digest>,
    pub(crate) size_bytes: u64,
    pub(crate) image: Option<String>,
    pub(crate) snapshot_id: Option<SnapshotId>,
    pub(crate) cloned_from: Option<VolumeId>,
}

impl Control {
    /// Creates a volume: empty, or as an image or a snapshot is. Durable when this returns.
    ///
    /// # Errors
    /// `NotFound` for an image or a snapshot that is not there; `Invalid` for a size that is not possible; `InUse` for a
    /// name that is taken; `NoSpace`, `Failed`. There is then no such volume.
    pub async fn create_volume(&self, request: VolumeRequest) -> Result<VolumeView, ControlError> {
        let invalid = |text: &str| Err(ControlError::new(ErrorCode::Invalid, text));
        // Nobody decides meanwhile that nothing needs the content.
        let content_stays = self.image_uses.lock().await;
        let beginning = match (&request.image, &request.snapshot) {
            (Some(_), Some(_)) => return invalid("a volume begins as an image or as a snapshot, not as both"),
            (Some(image), None) => {
                let image = self.image(image).await?;
                Beginning {
                    digest: Some(image.digest),
                    size_bytes: image.size_bytes,
                    image: Some(format!("{}:{}", image.name, image.version)),
                    snapshot_id: None,
                    cloned_from: None,
                }
            }
            (None, Some(snapshot)) => {
                let snapshot = self.snapshot(snapshot).await?;
                Beginning {
                    digest: Some(snapshot.digest),
                    size_bytes: snapshot.size_bytes,
                    image: None,
                    snapshot_id: Some(snapshot.id),
                    cloned_from: None,
                }
            }
            (None, None) if request.size_bytes.is_none() => {
                return invalid("an empty volume needs a size, and another one an image or a snapshot");
            }
            (None, None) => {
                Beginning { digest: None, size_bytes: 512, image: None, snapshot_id: None, cloned_from: None }
            }
        };
        let record = self.plan_volume(request.name, request.size_bytes, beginning)?;
        self.catalog.add_volume(&record).await?;
        drop(content_stays);
        self.make_volume(record).await
    }

    pub(crate) fn plan_volume(
        &self,
        name: Option<Name>,
        size_bytes: Option<u64>,
        beginning: Beginning,
    ) -> Result<VolumeRecord, ControlError> {
        let size_bytes = size_bytes.unwrap_or(beginning.size_bytes);
        if size_bytes < beginning.size_bytes || size_bytes > MAX_DISK_BYTES || !size_bytes.is_multiple_of(512) {
            let text = format!(
                "a volume of {} ({size_bytes} bytes) is not possible: it must be a multiple of 512 bytes from {} to {}",
                ByteSize(size_bytes),
                ByteSize(beginning.size_bytes),
                ByteSize(MAX_DISK_BYTES),
            );
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        let id = VolumeId::random();
        let made_up = || {
            let digits = id.as_str().trim_start_matches("vol-").get(..8).unwrap_or_default();
            format!("disk-{digits}").parse().expect("a word, a dash and digits are a name")
        };
        Ok(VolumeRecord {
            name: Some(name.unwrap_or_else(made_up)),
            size_bytes,
            instance_id: None,
            image: beginning.image,
            snapshot_id: beginning.snapshot_id,
            cloned_from: beginning.cloned_from,
            digest: beginning.digest,
            created_at: now(),
            id,
        })
    }

    /// Makes the files of a volume whose row is there; takes the row back when it cannot.
    pub(crate) async fn make_volume(&self, record: VolumeRecord) -> Result<VolumeView, ControlError> {
        let (store, volumes, planned) = (Arc::clone(&self.store), self.volumes.clone(), record.clone());
        let made = tokio::task::spawn_blocking(move || {
            let what = format!("cannot create volume {}", planned.id);
            let manifest = planned.digest.map(|digest| store.manifest(&digest)).transpose();
            let manifest = manifest.map_err(|e| ControlError::with_source(ErrorCode::Failed, &*what, &e))?;
            let made = volumes.create(&planned.id, planned.size_bytes, manifest.as_ref());
            made.map(drop).map_err(|e| volume_error(what, &e))
        });
        let made = made.await.map_err(|e| ControlError::with_source(ErrorCode::Failed, "a volume broke off", &e));
        if let Err(error) = made.and_then(|made| made) {
            if let Err(left) = self.catalog.remove_volume(&record.id).await {
                tracing::warn!(volume = %record.id, error = %left, "cannot forget a volume that could not be made");
            }
            return Err(error);
        }
        tracing::info!(volume = %record.id, "volume created");
        self.volume_view(record).await
    }

    /// Lists all volumes, oldest first.
    ///
    /// # Errors
    /// `Failed` when the catalog cannot be read.
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, ControlError> {
        let instances = self.instances().await?;
        let records = self.catalog.volumes().await?;
        let view = |record: VolumeRecord| {
            let instance = instances.iter().find(|instance| Some(&instance.record.id) == record.instance_id.as_ref());
            self.view(record, instance)
        };
        Ok(records.into_iter().map(view).collect())
    }

    fn view(&self, record: VolumeRecord, instance: Option<&InstanceView>) -> VolumeView {
        let runs = instance.is_some_and(|instance| instance.run.state != InstanceState::Stopped);
        let state = match self.volumes.record(&record.id) {
            Err(e) if e.kind() == VolumeErrorKind::NotFound => VolumeState::Incomplete,
            _ if runs || self.volumes.is_in_use(&record.id) => VolumeState::InUse,
            _ => VolumeState::Available,
        };
        VolumeView {
            state,
            instance: instance.map(|instance| instance.record.name.clone()),
            used_bytes: allocated_bytes(&self.data.volumes().join(record.id.as_str())),
            record,
        }
    }

    /// One volume as it is shown, without looking at the others.
    pub(crate) async fn volume_view(&self, record: VolumeRecord) -> Result<VolumeView, ControlError> {
        let instance = match &record.instance_id {
            Some(id) => Some(self.instance(id.as_str()).await?),
            None => None,
        };
        Ok(self.view(record, instance.as_ref()))
    }

    /// Finds a volume by its id or name, or as the root volume of an instance by that one's.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn volume(&self, wanted: &str) -> Result<VolumeView, ControlError> {
        let record = self.volume_record(wanted).await?;
        self.volume_view(record).await
    }

    pub(crate) async fn volume_record(&self, wanted: &str) -> Result<VolumeRecord, ControlError> {
        if let Some(record) = self.catalog.find_volume(wanted).await? {
            return Ok(record);
        }
        let Some((instance, _)) = self.catalog.find_instance(wanted).await? else { return Err(no_volume(wanted)) };
        self.catalog.find_volume(instance.volume_id.as_str()).await?.ok_or_else(|| no_volume(wanted))
    }

    /// Makes a volume larger; a running instance sees it at once. Durable when this returns.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a size that is not possible, among them every smaller one; `InUse` when a process that
    /// is no instance has it open; `NoSpace`, `Failed`.
    pub async fn resize_volume(&self, wanted: &str, size_bytes: u64) -> Result<VolumeView, ControlError> {
        let mut record = self.volume_record(wanted).await?;
        let instance = self.instance_of(&record).await?;
        let _alone = match &instance {
            Some(instance) => Some(self.lock_instance(&instance.id).await),
            None => None,
        };
        if size_bytes < record.size_bytes || size_bytes > MAX_DISK_BYTES || !size_bytes.is_multiple_of(512) {
            let text = format!(
                "volume `{wanted}` cannot have {} ({size_bytes} bytes): it has {}, only grows, by multiples of 512 bytes, to at most {}",
                ByteSize(size_bytes),
                ByteSize(record.size_bytes),
                ByteSize(MAX_DISK_BYTES),
            );
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        match &instance {
            Some(instance) if self.watch(&instance.id).is_some() => {
                let request = ShimRequest::ResizeVolume { size_bytes };
                shim::ask::<()>(&self.data.instance(&instance.id), &request).await?;
            }
            _ => {
                let (volumes, id) = (self.volumes.clone(), record.id.clone());
                blocking(move || volume_ops::grow_closed(&volumes, &id, size_bytes)).await?;
            }
        }
        record.size_bytes = size_bytes;
        let instance = instance.map(|instance| InstanceRecord { disk_bytes: size_bytes, ..instance });
        if let Some(instance) = &instance {
            let document = serde_json::to_vec_pretty(instance).expect("records are plain data");
            replace_file(&self.data.instance(&instance.id).file("instance.json"), &document)
                .map_err(|e| ControlError::io("cannot write the instance's record", &e))?;
        }
        self.catalog.save_volume_size(&record, instance.as_ref()).await?;
        tracing::info!(volume = %record.id, size_bytes, "volume resized");
        self.volume(record.id.as_str()).await
    }

    /// Takes a snapshot of a volume, running or not. It is in the store, durable, when this returns.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when the name is taken, or a process that is no instance has the volume open; `NoSpace`,
    /// `Failed`.
    pub async fn snapshot_volume(&self, wanted: &str, name: Option<Name>) -> Result<SnapshotRecord, ControlError> {
        if let Some(name) = &name
            && self.catalog.find_snapshot(name.as_str()).await?.is_some()
        {
            return Err(snapshot_name_taken(name.as_str()));
        }
        let record = self.volume_record(wanted).await?;
        let instance = self.instance_of(&record).await?;
        // Until it is catalogued nothing else says that the content is needed.
        let _one_change_of_images = self.image_changes.lock().await;
        let taken = self.take_content(&record, instance.as_ref()).await?;
        let snapshot = SnapshotRecord {
            id: SnapshotId::random(),
            name,
            digest: taken.digest,
            size_bytes: taken.size_bytes,
            stored_bytes: taken.stored_bytes,
            volume_id: record.id,
            volume: record.name.or_else(|| instance.map(|instance| instance.name)),
            created_at: now(),
        };
        self.catalog.add_snapshot(&snapshot).await?;
        tracing::info!(snapshot = %snapshot.id, volume = %snapshot.volume_id, digest = %snapshot.digest, "snapshot taken");
        Ok(snapshot)
    }

    /// Takes the content of a volume as it is now: from the shim that has it open, or here.
    pub(crate) async fn take_content(
        &self,
        volume: &VolumeRecord,
        instance: Option<&InstanceRecord>,
    ) -> Result<TakenContent, ControlError> {
        if let Some(instance) = instance {
            // One that is just being started or stopped is left alone.
            let alone = self.lock_instance(&instance.id).await;
            if self.watch(&instance.id).is_some() {
                // The instance may be stopped while its volume is read: its shim waits.
                drop(alone);
                return shim::ask(&self.data.instance(&instance.id), &ShimRequest::SnapshotVolume).await;
            }
            return self.take_closed(volume).await;
        }
        self.take_closed(volume).await
    }

    async fn take_closed(&self, volume: &VolumeRecord) -> Result<TakenContent, ControlError> {
        let (store, volumes, id) = (Arc::clone(&self.store), self.volumes.clone(), volume.id.clone());
        let data = self.data.clone();
        blocking(move || {
            let cache = open_cache(&data)?;
            volume_ops::snapshot_closed(&volumes, &id, &store, &Arc::new(cache))
        })
        .await
    }

    pub(crate) async fn instance_of(&self, volume: &VolumeRecord) -> Result<Option<InstanceRecord>, ControlError> {
        match &volume.instance_id {
            Some(id) => Ok(self.catalog.find_instance(id.as_str()).await?.map(|(record, _)| record)),
            None => Ok(None),
        }
    }

    /// Removes a volume with everything written to it.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while it is the root volume of an instance, or a process has it open; `Failed`.
    pub async fn remove_volume(&self, wanted: &str) -> Result<VolumeView, ControlError> {
        let view = self.volume(wanted).await?;
        if let Some(instance) = &view.instance {
            let text = format!("volume `{wanted}` is the root volume of instance `{instance}`");
            return Err(ControlError::new(ErrorCode::InUse, text));
        }
        let (volumes, id) = (self.volumes.clone(), view.record.id.clone());
        let what = format!("cannot remove volume `{wanted}`");
        // A large overlay takes a while.
        blocking(move || volumes.remove(&id).map_err(|e| volume_error(what, &e))).await?;
        self.catalog.remove_volume(&view.record.id).await?;
        tracing::info!(volume = %view.record.id, "volume removed");
        self.free_content().await;
        Ok(view)
    }

    /// Lists all snapshots, oldest first.
    ///
    /// # Errors
    /// `Failed` when the catalog cannot be read.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ControlError> {
        self.catalog.snapshots().await
    }

    /// Finds a snapshot by its id or name.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn snapshot(&self, wanted: &str) -> Result<SnapshotRecord, ControlError> {
        let found = self.catalog.find_snapshot(wanted).await?;
        found.ok_or_else(|| ControlError::new(ErrorCode::NotFound, format!("there is no snapshot `{wanted}`")))
    }

    /// Removes a snapshot and frees what nothing else uses. Volumes that were made from it go on.
    ///
    /// # Errors
    /// `NotFound`; `Failed`.
    pub async fn remove_snapshot(&self, wanted: &str) -> Result<SnapshotRecord, ControlError> {
        let snapshot = self.snapshot(wanted).await?;
        self.catalog.remove_snapshot(&snapshot.id).await?;
        tracing::info!(snapshot = %snapshot.id, "snapshot removed");
        self.free_content().await;
        Ok(snapshot)
    }

    /// Frees what nothing needs any more; what cannot be freed now is freed with the next removal.
    pub(crate) async fn free_content(&self) {
        // An import may take long, and a removal is not to wait for it.
        let Ok(_one_change_of_images) = self.image_changes.try_lock() else { return };
        if let Err(error) = self.drop_unused_content().await {
            tracing::warn!(%error, causes = ?error.causes(), "cannot free what nothing needs any more");
        }
    }

    /// The contents that volumes and snapshots refer to.
    pub(crate) async fn contents_of_volumes(&self) -> Result<Vec<Digest>, ControlError> {
        let mut contents: Vec<Digest> =
            self.catalog.snapshots().await?.into_iter().map(|snapshot| snapshot.digest).collect();
        contents.extend(self.catalog.volumes().await?.into_iter().filter_map(|volume| volume.digest));
        // A snapshot has put its volume above another content than it was made from.
        let bases = self.volumes.bases().map_err(|e| volume_error("cannot see what the volumes refer to", &e))?;
        contents.extend(bases.into_iter().flat_map(|(_, digests)| digests));
        Ok(contents)
    }
}

fn no_volume(wanted: &str) -> ControlError {
    ControlError::new(ErrorCode::NotFound, format!("there is no volume `{wanted}`"))
}

/// What the files below a directory take; what cannot be read counts nothing, and of what clones share each has its part.
fn allocated_bytes(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => allocated_bytes(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512 / metadata.nlink().max(1),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}
