//! Imports of what changed: a content like another one, but for some ranges.
//!
//! ```text
//! windows of the base content     │ taken over: extents from its manifest, leaves from its attachment
//! windows with a changed byte     │ read whole, hashed, matched and stored as those of any disk
//! ```
//! Nothing of the first kind is read, unless the leaves of the base are missing: then its windows are
//! read to hash them, and their extents are taken over all the same.

use std::iter::Peekable;
use std::ops::Range;
use std::vec;

use bulbil_types::{BLOCK_BYTES, BLOCKS_PER_FRAME, FRAME_BYTES, MAX_DISK_BYTES};

use super::{
    DiskSource, Import, ImportObserver, ImportOptions, ImportReport, Leaf, ScannedWindow, SourceError, import_with,
    source_error,
};
use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::lease::WriteLease;
use crate::manifest::{Extent, Manifest, PackRef, push_run};
use crate::matching::Location;
use crate::store::Store;

/// A disk that is known to be like another content but for some ranges.
pub trait ChangedDisk: Sync {
    /// The first range at or after `offset` whose bytes may differ from the base content.
    ///
    /// Ranges are in ascending order and not empty. What lies past the end of the base content and
    /// in no range is zero.
    ///
    /// # Errors
    /// When the map of changes cannot be read.
    fn next_changed(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError>;

    /// Fills `buf` from `offset` of the new disk, changed or not; called from many threads at once.
    ///
    /// # Errors
    /// When the disk cannot be read or does not verify.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError>;
}

impl Store {
    /// Imports a disk of `size_bytes` that is like a content of this store (`None`: all zero) but for
    /// some ranges. Takes time for the changes only.
    ///
    /// Gives the digest that [`import`](Self::import) would give for the same bytes. Durable, and its
    /// manifest visible, when this returns `Ok`. Another import of the same store is waited for.
    ///
    /// # Errors
    /// `NotFound` when the store does not hold the base content; `Source` when the disk cannot be read
    /// or is smaller than the base; `Cancelled`, `NoSpace`, `Io`, `Corrupt`. The store then holds what
    /// it held before.
    pub fn import_changes(
        &self,
        base: Option<&Digest>,
        size_bytes: u64,
        changes: &dyn ChangedDisk,
        observer: &dyn ImportObserver,
    ) -> Result<ImportReport, StoreError> {
        let lock = self.lock_for_changes()?;
        let lease = WriteLease::begin(self, "import of changes")?;
        // Under the lease: a repack may have replaced the manifest that the caller read through.
        let base = match base {
            Some(digest) => self.manifest(digest)?,
            None => Manifest::empty(0)?,
        };
        if size_bytes < base.size_bytes() || size_bytes > MAX_DISK_BYTES {
            let text = format!("a disk of {} bytes cannot become one of {size_bytes}", base.size_bytes());
            return Err(StoreError::new(StoreErrorKind::Source, text));
        }
        let leaves = self.leaves(&base.digest(), base.size_bytes());
        let leaves = leaves.or_else(|| base.extents().is_empty().then(Default::default));
        let source = ChangesAsSource { changes, size_bytes, base: leaves.is_none().then_some(&base) };
        let leaves: Option<Vec<_>> = leaves.map(|leaves| leaves.iter().map(|(window, leaf)| (window, *leaf)).collect());
        let carried = Carried {
            extents: base.extents().to_vec(),
            packs: base.packs().to_vec(),
            next_extent: 0,
            next_window: 0,
            leaves: leaves.map(|leaves| leaves.into_iter().peekable()),
            changes,
        };
        let (report, leftover) =
            import_with(self, lease, &source, Some(carried), observer, &ImportOptions::default(), false);
        drop(lock);
        self.free_leftover(leftover);
        report
    }
}

/// What the pipeline reads: windows with changes, and those of `base` when their leaves are not known.
struct ChangesAsSource<'a> {
    changes: &'a dyn ChangedDisk,
    size_bytes: u64,
    base: Option<&'a Manifest>,
}

impl DiskSource for ChangesAsSource<'_> {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let changed = self.changes.next_changed(offset)?;
        let unknown = self.base.and_then(|base| base.extent_at_or_after(offset / BLOCK_BYTES));
        let unknown = unknown.map(|extent| extent.first_block * BLOCK_BYTES..extent.end_block() * BLOCK_BYTES);
        let Some(next) = changed.into_iter().chain(unknown).min_by_key(|range| range.start) else { return Ok(None) };
        let (start, end) = (next.start / FRAME_BYTES * FRAME_BYTES, next.end.next_multiple_of(FRAME_BYTES));
        let next = start.max(offset)..end.min(self.size_bytes);
        Ok((next.start < next.end).then_some(next))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.changes.read_exact_at(buf, offset)
    }
}

/// The base content, as far as it was not taken over yet.
pub(super) struct Carried<'a> {
    extents: Vec<Extent>,
    packs: Vec<PackRef>,
    /// The first extent that ends after what was taken over.
    next_extent: usize,
    next_window: u64,
    /// Leaves of windows from `next_window` on; `None` when they are made from what is read.
    leaves: Option<Peekable<vec::IntoIter<(u64, Leaf)>>>,
    changes: &'a dyn ChangedDisk,
}

impl Carried<'_> {
    /// The parts of extents that lie in the windows from `next_window` to before `end_window`.
    fn take_extents(&mut self, end_window: u64) -> Vec<Extent> {
        let blocks = self.next_window * BLOCKS_PER_FRAME..end_window.saturating_mul(BLOCKS_PER_FRAME);
        let mut taken = Vec::new();
        while let Some(extent) = self.extents.get(self.next_extent).filter(|e| e.first_block < blocks.end) {
            let (first, end) = (extent.first_block.max(blocks.start), extent.end_block().min(blocks.end));
            if first < end {
                let narrow = |count: u64| u32::try_from(count).expect("a part of an extent");
                taken.push(Extent {
                    first_block: first,
                    blocks: narrow(end - first),
                    pack: extent.pack,
                    block_in_pack: extent.block_in_pack + narrow(first - extent.first_block),
                });
            }
            if extent.end_block() > blocks.end {
                break;
            }
            self.next_extent += 1;
        }
        self.next_window = end_window;
        taken
    }

    fn take_leaves(&mut self, end_window: u64) -> Vec<(u64, Leaf)> {
        let Some(leaves) = &mut self.leaves else { return Vec::new() };
        std::iter::from_fn(|| leaves.next_if(|(window, _)| *window < end_window)).collect()
    }

    /// Whether a window that was read differs from the base content, as far as its disk knows.
    fn is_changed(&self, window: u64) -> Result<bool, StoreError> {
        if self.leaves.is_some() {
            return Ok(true);
        }
        let start = window * FRAME_BYTES;
        let changed = self.changes.next_changed(start).map_err(source_error)?;
        Ok(changed.is_some_and(|range| range.start < start + FRAME_BYTES))
    }
}

impl Import<'_> {
    /// Takes over what the base content holds before a window that was read, and says whether that one
    /// is taken over as well and needs its leaf only.
    pub(super) fn carry_to(&mut self, window: u64, scanned: &ScannedWindow) -> Result<bool, StoreError> {
        let Some(mut carried) = self.carried.take() else { return Ok(false) };
        let changed = carried.is_changed(window)?;
        self.carry(&mut carried, window)?;
        let leaf = scanned.as_ref().filter(|_| !changed).map(|(leaf, _)| *leaf);
        if let Some(leaf) = leaf {
            self.push_leaf(window, leaf);
            self.carry(&mut carried, window + 1)?;
        } else {
            carried.take_extents(window + 1);
            carried.take_leaves(window + 1);
        }
        self.carried = Some(carried);
        Ok(leaf.is_some())
    }

    /// Takes over what is left of the base content.
    pub(super) fn carry_rest(&mut self) -> Result<(), StoreError> {
        match self.carried.take() {
            Some(mut carried) => self.carry(&mut carried, u64::MAX),
            None => Ok(()),
        }
    }

    fn carry(&mut self, carried: &mut Carried<'_>, end_window: u64) -> Result<(), StoreError> {
        for (window, leaf) in carried.take_leaves(end_window) {
            self.push_leaf(window, leaf);
        }
        for extent in carried.take_extents(end_window) {
            let pack = self.carried_pack(&carried.packs[extent.pack as usize])?;
            // What is not indexed is not matched against.
            if (pack as usize) < self.known.index.packs().len() {
                self.previous = Some(Location { pack, block: extent.block_in_pack + extent.blocks - 1 });
            }
            push_run(&mut self.extents, Extent { pack, ..extent });
        }
        Ok(())
    }

    /// The number by which this import knows a pack of the base content.
    ///
    /// One that is damaged is not indexed, and still what the base content consists of.
    fn carried_pack(&mut self, pack: &PackRef) -> Result<u32, StoreError> {
        if self.lease.condemned().contains(&pack.id) {
            let text =
                format!("pack {} of the base content was condemned before it was in use; try again later", pack.id);
            return Err(StoreError::new(StoreErrorKind::Timeout, text));
        }
        let from_the_end = u32::try_from(self.carried_packs.len()).unwrap_or(u32::MAX);
        let number = *self.numbers.entry(pack.id).or_insert(u32::MAX - from_the_end);
        self.carried_packs.insert(number, *pack);
        Ok(number)
    }
}
