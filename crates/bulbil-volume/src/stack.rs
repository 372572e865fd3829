//! The layers of an open volume: one that is written to, those frozen below it, and the image.
//!
//! ```text
//! request ─► layer 3 ── base? ──► layer 2 ── base? ──► layer 0 ── base? ──► image
//!            written to           frozen: never changes again
//! ```
//! In a layer's map *base* means: look below.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bulbil_types::BLOCK_BYTES;

use crate::base::Base;
use crate::device::{BlockError, ExtentKind, StatusExtent};
use crate::live_map::LIVE_MAP_NAME;
use crate::map::BlockState;
use crate::overlay::{Overlay, io_error};
use crate::storage::{REMOVED_PREFIX, StorageDirectory};
use crate::volume::usize_of;

/// One layer with its files.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) number: u64,
    pub(crate) overlay: Overlay,
    volume: Arc<dyn StorageDirectory>,
    /// No record names it any more: its files go with the last request that reads them.
    retired: AtomicBool,
}

impl Layer {
    pub(crate) fn new(number: u64, overlay: Overlay, volume: &Arc<dyn StorageDirectory>) -> Arc<Self> {
        Arc::new(Self { number, overlay, volume: Arc::clone(volume), retired: AtomicBool::new(false) })
    }

    /// The directory of a layer's files.
    pub(crate) fn directory(volume: &Arc<dyn StorageDirectory>, number: u64) -> Arc<dyn StorageDirectory> {
        match number {
            0 => Arc::clone(volume),
            _ => volume.subdirectory(&directory_name(number)),
        }
    }

    /// Whether a clone has it as well; then nothing may ever write to it.
    ///
    /// No clone has a layer without having its map.
    pub(crate) fn is_shared(&self) -> Result<bool, BlockError> {
        let map = match self.number {
            0 => MAP_NAME.to_owned(),
            number => format!("{}/{MAP_NAME}", directory_name(number)),
        };
        let links = self.volume.links(&map);
        Ok(links.map_err(|e| io_error("cannot see who shares the overlay", e))?.is_some_and(|links| links > 1))
    }

    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if self.retired.load(Ordering::Acquire)
            && let Err(error) = remove_files(&*self.volume, |number| number == self.number)
        {
            tracing::warn!(layer = self.number, %error, "cannot remove a layer; the next start of the volume will");
        }
    }
}

/// The file of a layer that says which blocks it has.
pub(crate) const MAP_NAME: &str = "map";

pub(crate) fn directory_name(number: u64) -> String {
    format!("layer.{number}")
}

/// The layer that a name in a volume's directory belongs to.
fn layer_of(name: &str) -> Option<u64> {
    match name.split_once('.') {
        None if name == MAP_NAME => Some(0),
        Some(_) if name == LIVE_MAP_NAME => Some(0),
        Some(("data", segment)) => segment.parse::<u64>().ok().map(|_| 0),
        Some(("layer", number)) => number.parse().ok().filter(|number| *number > 0),
        _ => None,
    }
}

/// Removes what earlier processes had begun to remove.
pub(crate) fn remove_leftovers(volume: &dyn StorageDirectory) -> std::io::Result<()> {
    let names = volume.list()?;
    names.iter().filter(|name| name.starts_with(REMOVED_PREFIX)).try_for_each(|name| volume.remove(name))
}

/// Removes the files of chosen layers.
pub(crate) fn remove_files(volume: &dyn StorageDirectory, chosen: impl Fn(u64) -> bool) -> std::io::Result<()> {
    let names = volume.list()?;
    let gone = |name: &&String| layer_of(name).is_some_and(&chosen);
    names.iter().filter(gone).try_for_each(|name| volume.remove(name))
}

/// Where the content of a run of blocks is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// In the image, or zero where there is none.
    Base,
    /// In a layer's data.
    Data(&'a Overlay),
    /// Nowhere: it is zero.
    Zero,
}

/// Layers above an image.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    /// The newest first.
    pub(crate) layers: Vec<Arc<Layer>>,
    pub(crate) base: Option<Arc<Base>>,
}

impl Layers {
    /// Where the content of `first` is and how many blocks from it, at most `limit`, are in the same place.
    pub(crate) fn run(&self, first: u64, limit: u64) -> Result<(Place<'_>, u64), BlockError> {
        let mut blocks = limit;
        for layer in &self.layers {
            let (state, len) = layer.overlay.run(first, blocks)?;
            blocks = len;
            match state {
                BlockState::Base => {}
                BlockState::Data => return Ok((Place::Data(&layer.overlay), blocks)),
                BlockState::Zero => return Ok((Place::Zero, blocks)),
            }
        }
        Ok((Place::Base, blocks))
    }

    /// Calls `each` with every run in one place: (place, offset, length), cut at the range's ends.
    fn for_each_run(
        &self,
        offset: u64,
        len_bytes: u64,
        mut each: impl FnMut(Place<'_>, u64, u64) -> Result<bool, BlockError>,
    ) -> Result<(), BlockError> {
        let end = offset + len_bytes;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let (place, blocks) = self.run(block, end.div_ceil(BLOCK_BYTES) - block)?;
            let run_end = end.min((block + blocks) * BLOCK_BYTES);
            if !each(place, at, run_end - at)? {
                break;
            }
            at = run_end;
        }
        Ok(())
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.for_each_run(offset, buf.len() as u64, |place, at, len| {
            let part = &mut buf[usize_of(at - offset)..usize_of(at - offset + len)];
            match (place, &self.base) {
                (Place::Data(overlay), _) => overlay.read(part, at)?,
                (Place::Base, Some(base)) => base.read(part, at)?,
                (Place::Base, None) | (Place::Zero, _) => part.fill(0),
            }
            Ok(true)
        })
    }

    /// Whether nothing of a range needs to be fetched.
    pub(crate) fn is_fast(&self, offset: u64, len_bytes: u64) -> bool {
        let mut fast = true;
        let looked = self.for_each_run(offset, len_bytes, |place, at, len| {
            fast = match (place, &self.base) {
                (Place::Base, Some(base)) => base.is_fast(at, len),
                _ => true,
            };
            Ok(fast)
        });
        looked.is_ok() && fast
    }

    /// Describes a range as at most `max_extents` runs of data and holes.
    pub(crate) fn status(
        &self,
        offset: u64,
        len_bytes: u64,
        max_extents: usize,
    ) -> Result<Vec<StatusExtent>, BlockError> {
        let mut runs: Vec<StatusExtent> = Vec::new();
        let mut add = |len_bytes: u64, kind: ExtentKind| {
            let room = runs.len() < max_extents.max(1);
            match runs.last_mut() {
                Some(last) if last.kind == kind => last.len_bytes += len_bytes,
                _ if room => runs.push(StatusExtent { len_bytes, kind }),
                _ => return false,
            }
            true
        };
        self.for_each_run(offset, len_bytes, |place, at, len| match (place, &self.base) {
            (Place::Data(_), _) => Ok(add(len, ExtentKind::Data)),
            (Place::Base, Some(base)) => {
                let mut from = at;
                while from < at + len {
                    let block = from / BLOCK_BYTES;
                    let (hole, blocks) = base.hole_run(block, (at + len).div_ceil(BLOCK_BYTES) - block);
                    let to = (at + len).min((block + blocks) * BLOCK_BYTES);
                    if !add(to - from, if hole { ExtentKind::Hole } else { ExtentKind::Data }) {
                        return Ok(false);
                    }
                    from = to;
                }
                Ok(true)
            }
            (Place::Zero | Place::Base, _) => Ok(add(len, ExtentKind::Hole)),
        })?;
        Ok(runs)
    }

    /// The first run of blocks at or after `first`, before `end`, that is not the image's: (first, count).
    pub(crate) fn next_changed(&self, first: u64, end: u64) -> Result<Option<(u64, u64)>, BlockError> {
        let mut next: Option<(u64, u64)> = None;
        for layer in &self.layers {
            // What begins later than another layer's run is not the first.
            let end = next.map_or(end, |(found, _)| found);
            next = layer.overlay.next_changed(first, end)?.or(next);
        }
        Ok(next)
    }
}

/// What an open volume reads and writes at one moment; replaced as a whole.
#[derive(Debug)]
pub(crate) struct Stack {
    pub(crate) layers: Layers,
    /// What must happen before anything written to the newest layer may be called durable.
    pub(crate) rotation: Option<Rotation>,
}

/// A new layer that was begun; that below it is perhaps not on disk as a whole yet.
#[derive(Debug)]
pub(crate) struct Rotation {
    pub(crate) settled: AtomicBool,
    pub(crate) settling: Mutex<()>,
}

impl Stack {
    /// The layer that is written to.
    pub(crate) fn top(&self) -> &Overlay {
        &self.layers.layers[0].overlay
    }

    /// The layers below that one, the newest first.
    pub(crate) fn frozen(&self) -> &[Arc<Layer>] {
        &self.layers.layers[1..]
    }
}

#[cfg(test)]
mod tests {
    use super::layer_of;

    #[test]
    fn files_are_known_by_their_names() {
        let names = ["map", "data.0", "data.63", "layer.7", "volume.json", "volume.json.new", "layer.0", "data.x"];
        assert_eq!(names.map(layer_of), [Some(0), Some(0), Some(0), Some(7), None, None, None, None]);
    }
}
