//! Clones of volumes: by sharing the files of the parent's layers, or through a content in the store.
//!
//! ```text
//! row with the parent's base ─► files shared, by the shim or here ─► done
//!                                     └── not possible ─► row taken back ─► content into the store ─► volume above it
//! ```
//! The base of a clone stays in the store: it is written into the clone's row while nobody can decide that nothing needs
//! it. A snapshot of the parent that comes between moves the parent to another base, of which the clone's own record
//! speaks: no content is given up while a snapshot is taken, and none by somebody who has not seen that record.

use bulbil_types::{Name, VolumeId};

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::model::InstanceRecord;
use crate::shim::{self, ShimRequest};
use crate::volume_model::{VolumeRecord, VolumeView};
use crate::volume_ops::{self, blocking, volume_error};
use crate::volumes::Beginning;

impl Control {
    /// Makes a volume that begins as another one is now, running or not. Durable when this returns.
    ///
    /// Takes the same time whatever was written to it, where the host's file system has hard links; otherwise, and with
    /// every ninth clone between which the parent was written to, it takes time for what changed.
    ///
    /// # Errors
    /// As [`snapshot_volume`](Self::snapshot_volume) and [`create_volume`](Self::create_volume).
    pub async fn clone_volume(&self, wanted: &str, name: Option<Name>) -> Result<VolumeView, ControlError> {
        if let Some(name) = &name
            && self.catalog.find_volume(name.as_str()).await?.is_some()
        {
            return Err(ControlError::new(ErrorCode::InUse, format!("a volume named `{name}` exists already")));
        }
        let parent = self.volume_record(wanted).await?;
        let instance = self.instance_of(&parent).await?;
        match self.clone_by_sharing(&parent, instance.as_ref(), name.clone()).await {
            Ok(Some(clone)) => return Ok(clone),
            Err(error) if error.code() != ErrorCode::InUse => return Err(error),
            Ok(None) | Err(_) => {}
        }
        let _one_change_of_images = self.image_changes.lock().await;
        // A snapshot of it that was under way is done.
        if let Some(clone) = self.clone_by_sharing(&parent, instance.as_ref(), name.clone()).await? {
            return Ok(clone);
        }
        let taken = self.take_content(&parent, instance.as_ref()).await?;
        let beginning = Beginning {
            digest: Some(taken.digest),
            size_bytes: taken.size_bytes,
            image: parent.image,
            snapshot_id: None,
            cloned_from: Some(parent.id),
        };
        let clone = self.plan_volume(name, None, beginning)?;
        self.catalog.add_volume(&clone).await?;
        self.make_volume(clone).await
    }

    /// `None` when files cannot be shared.
    async fn clone_by_sharing(
        &self,
        parent: &VolumeRecord,
        instance: Option<&InstanceRecord>,
        name: Option<Name>,
    ) -> Result<Option<VolumeView>, ControlError> {
        // Nobody decides meanwhile that nothing needs the base.
        let content_stays = self.image_uses.lock().await;
        let record = self.volumes.record(&parent.id);
        let record = record.map_err(|e| volume_error(format!("cannot clone volume {}", parent.id), &e))?;
        let beginning = Beginning {
            digest: record.base,
            size_bytes: record.size_bytes,
            image: parent.image.clone(),
            snapshot_id: None,
            cloned_from: Some(parent.id.clone()),
        };
        let mut clone = self.plan_volume(name, None, beginning)?;
        self.catalog.add_volume(&clone).await?;
        drop(content_stays);
        let shared = self.share_files(parent, instance, &clone.id).await;
        if !matches!(shared, Ok(Some(_)))
            && let Err(left) = self.catalog.remove_volume(&clone.id).await
        {
            tracing::warn!(volume = %clone.id, error = %left, "cannot forget a volume that could not be made");
        }
        let Some(size_bytes) = shared? else { return Ok(None) };
        if size_bytes != clone.size_bytes {
            // The parent has grown meanwhile.
            clone.size_bytes = size_bytes;
            self.catalog.save_volume_size(&clone, None).await?;
        }
        tracing::info!(volume = %clone.id, parent = %parent.id, "volume cloned");
        self.volume_view(clone).await.map(Some)
    }

    /// Gives the size of the clone in bytes; `None` when its files cannot be shared.
    async fn share_files(
        &self,
        parent: &VolumeRecord,
        instance: Option<&InstanceRecord>,
        clone: &VolumeId,
    ) -> Result<Option<u64>, ControlError> {
        if let Some(instance) = instance {
            // One that is just being started or stopped is left alone.
            let _alone = self.lock_instance(&instance.id).await;
            if self.watch(&instance.id).is_some() {
                let request = ShimRequest::CloneVolume { clone: clone.clone() };
                return shim::ask(&self.data.instance(&instance.id), &request).await;
            }
        }
        let (volumes, parent, clone) = (self.volumes.clone(), parent.id.clone(), clone.clone());
        blocking(move || volume_ops::clone_closed(&volumes, &parent, &clone)).await
    }
}
