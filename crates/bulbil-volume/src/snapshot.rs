//! Snapshots of an open volume, and what becomes of its layers.
//!
//! ```text
//!            freeze                      import_changes             rebase
//! [2]─────► [3] 2 frozen, guest goes on ─────────────────► store ─────────► [3] over the new content
//!                         └── failed or killed: 2 stays frozen, the next snapshot takes it along
//! ```
//! The record names the new layer before that takes the first write, so that no answered write is in a
//! layer that nobody knows. The old one is synced after that; until it is, no flush is answered.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulbil_store::{ChangedDisk, Digest, ImportObserver, ImportReport, Manifest, SourceError};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

use crate::base::Base;
use crate::device::{BlockDevice as _, BlockError};
use crate::error::{VolumeError, VolumeErrorKind};
use crate::overlay::{Overlay, io_error, lock};
use crate::record::{MAX_FROZEN_LAYERS, RECORD_NAME, VolumeRecord};
use crate::stack::{Layer, Layers, Place, Rotation, Stack};
use crate::volume::{Volume, usize_of};

/// How often requests that read a layer are waited for, a millisecond each; then it goes with a later one.
const MAX_WAITS_FOR_READERS: u32 = 100;

/// Blocks copied at a time when layers are merged, 1 MiB.
const BLOCKS_PER_COPY: u64 = 256;

/// The content of a volume at the moment it was frozen; while one is there the volume gives no other.
#[derive(Debug)]
pub struct FrozenState {
    layers: Layers,
    base: Option<Digest>,
    size_bytes: u64,
    running: Running,
}

/// Keeps a volume from having two snapshots at a time.
#[derive(Debug)]
pub(crate) struct Running(Arc<AtomicBool>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl FrozenState {
    /// The content that this one is a change of; `None` for a disk of zeroes.
    #[must_use]
    pub fn base(&self) -> Option<Digest> {
        self.base
    }

    /// The size of the volume when it was frozen, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether blocks were written or the size was changed since the base content was taken.
    ///
    /// # Errors
    /// `Io`.
    pub fn is_changed(&self, base: &Manifest) -> Result<bool, VolumeError> {
        let changed = self.layers.next_changed(0, self.blocks());
        let changed = changed.map_err(|e| VolumeError::block("cannot read the map of a frozen layer", e))?;
        Ok(changed.is_some() || base.size_bytes() != self.size_bytes)
    }

    fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES)
    }
}

impl ChangedDisk for FrozenState {
    fn next_changed(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let found = self.layers.next_changed(offset / BLOCK_BYTES, self.blocks())?;
        Ok(found.map(|(first, count)| {
            (first * BLOCK_BYTES).max(offset)..((first + count) * BLOCK_BYTES).min(self.size_bytes)
        }))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        Ok(self.layers.read(buf, offset)?)
    }
}

impl Volume {
    /// Takes a snapshot into the store that the volume was opened with, and goes on above it.
    ///
    /// Takes time for what was written since the last one; requests are answered meanwhile. The
    /// content is durable when this returns, and includes every write that had returned before. A
    /// volume without changes gives the content below it at once.
    ///
    /// # Errors
    /// `InUse` while another snapshot is taken; `Cancelled`, `NoSpace`, `Corrupt`, `Io`. The volume
    /// then goes on as before.
    pub fn snapshot(&self, observer: &dyn ImportObserver) -> Result<ImportReport, VolumeError> {
        let frozen = self.freeze()?;
        let (store, _) = self.images()?;
        let failed = |e| VolumeError::store("cannot take a snapshot", e);
        if let Some(digest) = frozen.base() {
            let manifest = store.manifest(&digest).map_err(failed)?;
            if !frozen.is_changed(&manifest)? {
                let (size_bytes, data_bytes) = (manifest.size_bytes(), manifest.data_bytes());
                return Ok(ImportReport {
                    digest,
                    size_bytes,
                    data_bytes,
                    new_bytes: 0,
                    stored_bytes: 0,
                    existed: true,
                });
            }
        }
        let report = store.import_changes(frozen.base().as_ref(), frozen.size_bytes(), &frozen, observer);
        let report = report.map_err(failed)?;
        self.rebase(frozen, store.manifest(&report.digest).map_err(failed)?)?;
        Ok(report)
    }

    /// Freezes the content of this moment, with every write that has returned; later ones go to a new
    /// layer. Requests are answered meanwhile; a flush waits for the end.
    ///
    /// Durable when this returns: a crash from then on, or before, changes no content.
    ///
    /// # Errors
    /// `InUse` while an earlier frozen state is there; `NoSpace`, `Io`.
    pub fn freeze(&self) -> Result<FrozenState, VolumeError> {
        let running = self.begin_snapshot()?;
        let mut record = lock(&self.record);
        let failed = |e| VolumeError::block("cannot freeze the volume", e);
        // Most of what is to be synced is so while nothing waits for it.
        self.flush().map_err(failed)?;
        if self.stack().frozen().len() >= MAX_FROZEN_LAYERS {
            self.merge_frozen(&mut record).map_err(failed)?;
        }
        let stack = self.rotate(&mut record).map_err(failed)?;
        self.settle(&stack).map_err(failed)?;
        let layers = Layers { layers: stack.frozen().to_vec(), base: stack.layers.base.clone() };
        Ok(FrozenState { layers, base: record.base, size_bytes: self.size_bytes(), running })
    }

    /// Puts the volume above the stored content of a frozen state and drops the layers of that.
    ///
    /// Durable when this returns: a crash before leaves the frozen layers, which hold the same.
    ///
    /// # Errors
    /// `BadSize` when the content is not that of the frozen state; `NoSpace`, `Io`. The volume then
    /// goes on above its frozen layers.
    ///
    /// # Panics
    /// If the frozen state is of another volume.
    pub fn rebase(&self, frozen: FrozenState, manifest: Manifest) -> Result<(), VolumeError> {
        assert!(Arc::ptr_eq(&frozen.running.0, &self.snapshot_running), "the state of this volume");
        if manifest.size_bytes() != frozen.size_bytes {
            let text = format!("the content has {} bytes, the volume {}", manifest.size_bytes(), frozen.size_bytes);
            return Err(VolumeError::new(VolumeErrorKind::BadSize, text));
        }
        let (store, cache) = self.images()?;
        let failed = |e| VolumeError::block("cannot put the volume above its snapshot", e);
        let mut record = lock(&self.record);
        let old = self.stack();
        self.settle(&old).map_err(failed)?;
        let top = Arc::clone(&old.layers.layers[0]);
        let next = VolumeRecord { base: Some(manifest.digest()), layers: vec![top.number], ..record.clone() };
        self.write_record(&next).map_err(failed)?;
        *record = next;
        let base = Base::new(Arc::clone(store), Arc::clone(cache), manifest);
        if let Some(base) = &old.layers.base {
            let mut before = lock(&self.stats_before);
            *before = before.plus(&base.stats());
        }
        self.replace_stack(Stack { layers: Layers { layers: vec![top], base: Some(Arc::new(base)) }, rotation: None });
        let gone = old.frozen().to_vec();
        drop((record, old, frozen));
        self.retire(gone);
        Ok(())
    }

    /// Gives layers up that no record names any more, as soon as no request reads them.
    ///
    /// Not by the last of these requests: removing files is not a guest's business.
    fn retire(&self, layers: Vec<Arc<Layer>>) {
        layers.iter().for_each(|layer| layer.retire());
        let mut retired = lock(&self.retired);
        retired.extend(layers);
        for _ in 0..MAX_WAITS_FOR_READERS {
            retired.retain(|layer| Arc::strong_count(layer) > 1);
            if retired.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Merges the layers that failed snapshots have left into one. Takes time for what they hold.
    ///
    /// Changes no content; a crash at any time leaves the layers as they were, or merged.
    ///
    /// # Errors
    /// `InUse` while a frozen state is there; `NoSpace`, `Io`.
    pub fn compact(&self) -> Result<(), VolumeError> {
        let _running = self.begin_snapshot()?;
        let mut record = lock(&self.record);
        let failed = |e| VolumeError::block("cannot merge the layers of the volume", e);
        self.settle(&self.stack()).map_err(failed)?;
        self.merge_frozen(&mut record).map_err(failed)
    }

    /// Number of layers that are not written to any more.
    #[must_use]
    pub fn frozen_layers(&self) -> usize {
        self.stack().frozen().len()
    }

    pub(crate) fn begin_snapshot(&self) -> Result<Running, VolumeError> {
        if self.snapshot_running.swap(true, Ordering::AcqRel) {
            let text = "another snapshot of this volume is being taken";
            return Err(VolumeError::new(VolumeErrorKind::InUse, text));
        }
        Ok(Running(Arc::clone(&self.snapshot_running)))
    }

    /// Puts an empty layer on top, unless the one there is empty: first in the record, then for requests.
    pub(crate) fn rotate(&self, record: &mut VolumeRecord) -> Result<Arc<Stack>, BlockError> {
        let stack = self.stack();
        if stack.top().is_untouched() {
            return Ok(stack);
        }
        let number = record.layers[0] + 1;
        let files = Layer::directory(&self.directory, number);
        let top =
            Layer::new(number, Overlay::open(files, self.size_bytes(), Arc::clone(&self.poisoned))?, &self.directory);
        top.overlay.create_files_of(self.stack().top())?;
        let mut next = record.clone();
        next.layers.insert(0, number);
        self.write_record(&next)?;
        *record = next;
        let rotation = Rotation { settled: AtomicBool::new(false), settling: Mutex::default() };
        let _alone = self.merging.write().unwrap_or_else(PoisonError::into_inner);
        let mut layers = self.stack().layers.clone();
        layers.layers.insert(0, top);
        Ok(self.replace_stack(Stack { layers, rotation: Some(rotation) }))
    }

    /// Completes a rotation: the layer below the newest is made durable.
    pub(crate) fn settle(&self, stack: &Stack) -> Result<(), BlockError> {
        let Some(rotation) = stack.rotation.as_ref().filter(|r| !r.settled.load(Ordering::Acquire)) else {
            return Ok(());
        };
        let _one_at_a_time = lock(&rotation.settling);
        if !rotation.settled.load(Ordering::Acquire) {
            stack.frozen()[0].overlay.flush()?;
            rotation.settled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Replaces the record. When it is not known which one is on disk, the volume is poisoned.
    pub(crate) fn write_record(&self, record: &VolumeRecord) -> Result<(), BlockError> {
        self.stack().top().check_usable()?;
        self.directory.replace(RECORD_NAME, &record.encode()).map_err(|e| {
            let error = io_error("cannot write the volume's record", e);
            if error.kind() != crate::BlockErrorKind::NoSpace {
                self.poisoned.store(true, Ordering::Release);
            }
            error
        })
    }

    /// Merges each frozen layer into the one below it, from the oldest on; never into one that a clone shares.
    ///
    /// What is written into the lower layer is hidden by the upper one as long as that is named.
    fn merge_frozen(&self, record: &mut VolumeRecord) -> Result<(), BlockError> {
        loop {
            let stack = self.stack();
            let Some([upper, lower]) = mergeable(stack.frozen())? else { return Ok(()) };
            copy_changes(upper, lower, self.size_bytes().div_ceil(BLOCK_BYTES))?;
            lower.overlay.flush()?;
            let mut next = record.clone();
            next.layers.retain(|number| *number != upper.number);
            self.write_record(&next)?;
            *record = next;
            let mut layers = stack.layers.clone();
            layers.layers.retain(|layer| layer.number != upper.number);
            self.replace_stack(Stack { layers, rotation: None });
            let upper = vec![Arc::clone(upper)];
            drop(stack);
            self.retire(upper);
        }
    }

    pub(crate) fn replace_stack(&self, stack: Stack) -> Arc<Stack> {
        let stack = Arc::new(stack);
        *self.stack.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&stack);
        stack
    }

    fn images(&self) -> Result<&(Arc<bulbil_store::Store>, Arc<crate::BaseCache>), VolumeError> {
        let text = "a volume that was opened without a store has no snapshots";
        self.images.as_ref().ok_or_else(|| VolumeError::new(VolumeErrorKind::NotFound, text))
    }
}

/// The oldest two neighbours of which the lower one may be written to: (upper, lower).
fn mergeable(frozen: &[Arc<Layer>]) -> Result<Option<[&Arc<Layer>; 2]>, BlockError> {
    for pair in frozen.windows(2).rev() {
        let [upper, lower] = pair else { continue };
        if !lower.is_shared()? {
            return Ok(Some([upper, lower]));
        }
    }
    Ok(None)
}

fn copy_changes(upper: &Arc<Layer>, lower: &Layer, blocks: u64) -> Result<(), BlockError> {
    let only_upper = Layers { layers: vec![Arc::clone(upper)], base: None };
    let mut buf = vec![0; usize_of(BLOCKS_PER_COPY) * BLOCK_LEN];
    let mut at = 0;
    while let Some((first, count)) = only_upper.next_changed(at, blocks)? {
        let (place, count) = only_upper.run(first, count)?;
        at = first + count;
        match place {
            Place::Base => {}
            Place::Zero => lower.overlay.zero(first, count)?,
            Place::Data(overlay) => {
                at = first + count.min(BLOCKS_PER_COPY);
                let part = &mut buf[..usize_of(at - first) * BLOCK_LEN];
                overlay.read(part, first * BLOCK_BYTES)?;
                lower.overlay.write(part, first * BLOCK_BYTES)?;
            }
        }
    }
    Ok(())
}
