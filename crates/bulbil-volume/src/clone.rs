//! Clones that share what their parent has written.
//!
//! ```text
//! parent  [3] ─► [2] ─► [0] ─► base            [3] was written to: it is frozen first, or by the next
//!                 │      │       │             process that opens the parent
//! clone   [N] ─► [2] ─► [0] ─► base            the same files by a second name
//! ```
//! A file of a layer that has more than one name is never written to again, by nobody. The count of
//! names is the host's, so it stays right whoever is killed, and whichever of them is removed.
//!
//! A clone numbers its own layers from a random distance on: where overlays are encrypted, it shares
//! the parent's `cipher`, and the number of a layer is what keeps their keys apart.

use std::sync::Arc;

use bulbil_types::VolumeId;

use crate::device::BlockDevice as _;
use crate::error::{VolumeError, VolumeErrorKind};
use crate::overlay::{Overlay, lock};
use crate::record::{MAX_FROZEN_LAYERS, MAX_LAYER_NUMBER, RECORD_NAME, VolumeRecord};
use crate::stack::{Layer, MAP_NAME, directory_name};
use crate::storage::{HostDirectory, StorageDirectory};
use crate::volume::{Volume, VolumeDirectory, lock_volume};

/// A clone's own layers begin within 2^52 above its parent's: so far that no two of many clones, each
/// of which goes on by one with a snapshot, ever meet; and a thousand clones of clones have room.
const DISTANCE_BITS: u32 = 52;

/// The file that holds the key of an encrypted overlay, see `encrypted`.
const CIPHER_NAME: &str = "cipher";

impl VolumeDirectory {
    /// Makes a volume that holds what another one holds, which nobody has open, and shares its files.
    ///
    /// Takes the same time whatever the volume's size and however much was written to it. `None` when
    /// the files cannot be shared: the host has no second names for them, or no more of them, or the
    /// volume has too many layers. A [`snapshot`](Self::snapshot) makes that possible again. Durable
    /// when this returns; a crash before leaves the whole clone or none, and the volume as it was. What a
    /// process that was killed had written without a flush is in both, and durable when either of them
    /// is opened, which is before anybody sees it.
    ///
    /// # Errors
    /// `NotFound`, `InUse`, `NoSpace`, `Corrupt`, `Io`. There is then no such clone.
    pub fn clone_volume(&self, id: &VolumeId, clone: &VolumeId) -> Result<Option<VolumeRecord>, VolumeError> {
        let directory = self.volume_path(id);
        let _lock = lock_volume(&directory, id)?;
        let record = self.record(id)?;
        recover_and_share(Arc::new(HostDirectory::new(&directory)), &record, clone)
    }
}

/// Clones a volume that nobody has open: whoever had it last may have been killed.
fn recover_and_share(
    directory: Arc<dyn StorageDirectory>,
    record: &VolumeRecord,
    clone: &VolumeId,
) -> Result<Option<VolumeRecord>, VolumeError> {
    for number in &record.layers {
        Overlay::recover(Layer::directory(&directory, *number), record.size_bytes)
            .map_err(|e| VolumeError::block(format!("cannot recover volume {}", record.id), e))?;
    }
    share(&*directory, record, &record.layers, clone)
}

impl Volume {
    /// As [`clone_volume`](VolumeDirectory::clone_volume), in any directory; the clone lies beside it.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Corrupt`, `Io`.
    pub fn clone_in(
        directory: Arc<dyn StorageDirectory>,
        clone: &VolumeId,
    ) -> Result<Option<VolumeRecord>, VolumeError> {
        let record = VolumeRecord::read(&*directory)?;
        recover_and_share(directory, &record, clone)
    }

    /// Makes a volume beside this one that holds what this one holds at this moment, with every write
    /// that has returned, and shares its files.
    ///
    /// Requests are answered meanwhile; a flush waits for the end. Takes time for what was not flushed
    /// yet. `None` as with [`clone_volume`](VolumeDirectory::clone_volume). Durable when this returns.
    ///
    /// # Errors
    /// `InUse` while a frozen state is there; `NoSpace`, `Io`. There is then no such clone.
    pub fn clone_as(&self, clone: &VolumeId) -> Result<Option<VolumeRecord>, VolumeError> {
        let _running = self.begin_snapshot()?;
        let mut record = lock(&self.record);
        let failed = |e| VolumeError::block("cannot freeze the volume", e);
        self.flush().map_err(failed)?;
        if !self.stack().top().is_untouched() && self.frozen_layers() >= MAX_FROZEN_LAYERS {
            return Ok(None);
        }
        let stack = self.rotate(&mut record).map_err(failed)?;
        self.settle(&stack).map_err(failed)?;
        let frozen: Vec<u64> = stack.frozen().iter().map(|layer| layer.number).collect();
        share(&*self.directory, &record, &frozen, clone)
    }

    /// Puts an empty layer above one that a clone shares, before anything is written.
    pub(crate) fn leave_shared_layer(&self) -> Result<(), VolumeError> {
        let mut record = lock(&self.record);
        let failed = |e| VolumeError::block("cannot go on above what a clone shares", e);
        if self.stack().layers.layers[0].is_shared().map_err(failed)? {
            let stack = self.rotate(&mut record).map_err(failed)?;
            self.settle(&stack).map_err(failed)?;
        }
        Ok(())
    }
}

/// Makes a clone of the chosen layers of a volume; nobody writes to these meanwhile.
fn share(
    volume: &dyn StorageDirectory,
    record: &VolumeRecord,
    layers: &[u64],
    clone: &VolumeId,
) -> Result<Option<VolumeRecord>, VolumeError> {
    let failed = |e| VolumeError::io(format!("cannot make volume {clone} as a clone of {}", record.id), e);
    let (shared, linked) = files_of(volume, layers).map_err(failed)?;
    let mut of_clone = VolumeRecord::new(clone, record.size_bytes, record.base);
    if let Some(newest) = shared.first() {
        let number = newest + 1 + random_distance().map_err(failed)?;
        if shared.len() > MAX_FROZEN_LAYERS || number > MAX_LAYER_NUMBER {
            return Ok(None);
        }
        of_clone.layers = [vec![number], shared].concat();
        of_clone.linked = linked;
    }
    match volume.link_sibling(clone.as_str(), &of_clone.linked, RECORD_NAME, &of_clone.encode()) {
        Ok(()) => Ok(Some(of_clone)),
        Err(e) if e.kind() == std::io::ErrorKind::Unsupported => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// The layers that hold something, and the names of their files.
///
/// One without a map holds nothing, whatever its data files do.
fn files_of(volume: &dyn StorageDirectory, layers: &[u64]) -> std::io::Result<(Vec<u64>, Vec<String>)> {
    let (mut shared, mut files) = (Vec::new(), Vec::new());
    for number in layers {
        let (names, prefix) = match number {
            0 => (volume.list()?, String::new()),
            _ => (volume.subdirectory(&directory_name(*number)).list()?, format!("{}/", directory_name(*number))),
        };
        if names.iter().any(|name| name == MAP_NAME) {
            let of_layer = names.iter().filter(|name| *name == MAP_NAME || name.starts_with("data."));
            files.extend(of_layer.map(|name| format!("{prefix}{name}")));
            shared.push(*number);
        }
    }
    if !shared.is_empty() && volume.links(CIPHER_NAME)?.is_some() {
        files.push(CIPHER_NAME.to_owned());
    }
    Ok((shared, files))
}

fn random_distance() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(u64::from_le_bytes(bytes) >> (64 - DISTANCE_BITS))
}

/// Refuses a clone whose making was cut off: a record that was there before all files that it shares.
pub(crate) fn check_complete(directory: &dyn StorageDirectory, record: &VolumeRecord) -> Result<(), VolumeError> {
    for name in &record.linked {
        let links = directory.links(name);
        if links.map_err(|e| VolumeError::io(format!("cannot read volume {}", record.id), e))?.is_none() {
            let text = format!("volume {} was never completed", record.id);
            return Err(VolumeError::new(VolumeErrorKind::NotFound, text));
        }
    }
    Ok(())
}
