//! What all formats with a block map share: a map says where bytes are, this reads them.
//!
//! ```text
//! offset ──► BlockMap::run_at ──► Run { length, Zero | Host | Compressed | Parent } ──► bytes, extents
//! ```
//!
//! A format supplies [`BlockMap`], a value that was checked at open; reading, listing extents, decoding once for
//! neighbouring reads and falling through to a parent are here.

use std::fmt;
use std::sync::Arc;

use crate::bytes::{to_u64, to_usize};
use crate::cache::SharedCache;
use crate::disk::check_range;
use crate::holes::Holes;
use crate::layer::Layer;
use crate::{Disk, DiskContent, DiskInfo, Extent, ExtentKind, Format, FormatError, ReadAt};

/// Memory for decoded clusters.
const DECODED_CACHE_BYTES: u64 = 16 << 20;
/// Entries of the cache, so that small clusters do not make it mostly bookkeeping.
const MAX_CACHE_ENTRIES: u64 = 16384;

/// Stored blocks that are a hole of the file of at least this length are not content: they were only set aside, and a
/// small file may have terabytes of them. Shorter ones are read rather than told apart.
const MIN_HOLE_BYTES: u64 = 4 << 20;

/// What is there if nothing is.
const ZEROS: (u64, ExtentKind) = (u64::MAX, ExtentKind::Zero);

/// Where a range of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Not zero.
    pub(crate) len_bytes: u64,
    pub(crate) source: Source,
}

/// Where bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// They are zeros.
    Zero,
    /// From this byte of the file on.
    Host(u64),
    /// In a compressed cluster, from this byte of its content on.
    Compressed {
        /// The compressed bytes.
        range: CompressedRange,
        /// How much of the content comes before.
        skip_bytes: u64,
    },
    /// At the same offset of the parent; zeros if there is none, or past its end.
    Parent,
}

impl Source {
    /// Whether `next`, which begins `len_bytes` later on the disk, goes on where this one ends.
    pub(crate) fn is_followed_by(self, len_bytes: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) | (Self::Parent, Self::Parent) => true,
            (Self::Host(here), Self::Host(there)) => here.checked_add(len_bytes) == Some(there),
            _ => false,
        }
    }
}

/// Where the bytes of a compressed cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CompressedRange {
    /// Any byte of the file.
    pub(crate) host_offset: u64,
    /// How much to read there; what follows the compressed bytes may be included.
    pub(crate) len_bytes: u64,
}

impl CompressedRange {
    pub(crate) fn end(self) -> u64 {
        self.host_offset.saturating_add(self.len_bytes)
    }
}

/// The checked map of an image.
pub(crate) trait BlockMap: Send + Sync + fmt::Debug {
    /// The format this is the map of.
    const FORMAT: Format;

    /// Returns what the image says about itself.
    fn info(&self, file_bytes: u64) -> DiskInfo;

    /// The size of the disk.
    fn size_bytes(&self) -> u64;

    /// How many bytes a compressed cluster has when it is decoded; any number for a format without.
    fn cluster_bytes(&self) -> u64;

    /// Returns where the bytes from `offset` on are, up to the first break or a little more than `wanted_bytes`.
    ///
    /// `offset` is on the disk. The run may pass the end of the disk.
    fn run_at(&self, file: &dyn ReadAt, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError>;

    /// Decodes a compressed cluster into a buffer of one cluster.
    fn decode(&self, file: &dyn ReadAt, range: CompressedRange, cluster: &mut [u8]) -> Result<(), FormatError>;
}

/// An image file with its map.
pub(crate) struct Mapped<M> {
    file: Arc<dyn ReadAt>,
    map: M,
    parent: Option<Layer<Arc<dyn DiskContent>>>,
    /// Decoded clusters by host offset. Only reads of a part of a cluster come here.
    decoded: SharedCache<Vec<u8>>,
}

impl<M: BlockMap> fmt::Debug for Mapped<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped").field("map", &self.map).field("parent", &self.parent).finish_non_exhaustive()
    }
}

impl<M: BlockMap> Mapped<M> {
    /// Joins a file, its map, and the parent that takes what the map does not have.
    pub(crate) fn new(file: Arc<dyn ReadAt>, map: M, parent: Option<Arc<dyn DiskContent>>) -> Self {
        let entries = (DECODED_CACHE_BYTES / map.cluster_bytes().max(1)).min(MAX_CACHE_ENTRIES);
        let parent = parent.map(Layer::new);
        Self { file, map, parent, decoded: SharedCache::new(to_usize(entries)) }
    }

    /// As [`BlockMap::run_at`], up to the end of the disk, and without a parent where there is none.
    fn run_at(&self, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let rest_of_disk = self.map.size_bytes().saturating_sub(offset);
        let run = self.map.run_at(&*self.file, offset, wanted_bytes.min(rest_of_disk))?;
        let source = match run.source {
            Source::Parent if self.parent.is_none() => Source::Zero,
            source => source,
        };
        Ok(Run { len_bytes: run.len_bytes.min(rest_of_disk), source })
    }

    /// As `run_at`, with the parent asked for the kind of what is its own, and the file for holes in what it has.
    fn kind_at(&self, offset: u64, holes: &mut Holes<'_>) -> Result<(u64, ExtentKind), FormatError> {
        let run = self.run_at(offset, u64::MAX)?;
        let (len_bytes, kind) = match run.source {
            Source::Zero => ZEROS,
            Source::Host(at) => match holes.kind_at(at)? {
                (len_bytes, ExtentKind::Zero) if len_bytes < MIN_HOLE_BYTES => (len_bytes, ExtentKind::Data),
                found => found,
            },
            Source::Compressed { .. } => (run.len_bytes, ExtentKind::Compressed),
            Source::Parent => self.parent.as_ref().map_or(Ok(ZEROS), |parent| parent.kind_at(offset))?,
        };
        Ok((len_bytes.min(run.len_bytes), kind))
    }

    fn read_run(&self, source: Source, offset: u64, buf: &mut [u8]) -> Result<(), FormatError> {
        match source {
            Source::Zero => {
                buf.fill(0);
                Ok(())
            }
            Source::Host(at) => self.file.read_exact_at(buf, at).map_err(FormatError::read(at)),
            Source::Compressed { range, .. } if to_u64(buf.len()) == self.map.cluster_bytes() => {
                self.map.decode(&*self.file, range, buf)
            }
            Source::Compressed { range, skip_bytes } => {
                let cluster = self.decoded.get_or_load(range.host_offset, || {
                    let mut cluster = vec![0; to_usize(self.map.cluster_bytes())];
                    self.map.decode(&*self.file, range, &mut cluster).map(|()| cluster)
                })?;
                let start = to_usize(skip_bytes);
                buf.copy_from_slice(cluster.get(start..start + buf.len()).expect("a run ends with its cluster"));
                Ok(())
            }
            Source::Parent => match &self.parent {
                Some(parent) => parent.read(buf, offset),
                None => {
                    buf.fill(0);
                    Ok(())
                }
            },
        }
    }
}

impl<M: BlockMap> DiskContent for Mapped<M> {
    fn size_bytes(&self) -> u64 {
        self.map.size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        check_range(buf.len(), offset_bytes, self.map.size_bytes())?;
        let (mut rest, mut offset) = (buf, offset_bytes);
        while !rest.is_empty() {
            let run = self.run_at(offset, to_u64(rest.len()))?;
            let len_bytes = run.len_bytes.min(to_u64(rest.len()));
            let (part, after) = rest.split_at_mut(to_usize(len_bytes));
            self.read_run(run.source, offset, part)?;
            (rest, offset) = (after, offset + len_bytes);
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        if offset_bytes >= self.map.size_bytes() {
            return Ok(None);
        }
        let mut holes = Holes::new(&*self.file);
        let (len_bytes, kind) = self.kind_at(offset_bytes, &mut holes)?;
        let mut extent = Extent { offset_bytes, len_bytes, kind };
        while extent.end_bytes() < self.map.size_bytes() {
            let (len_bytes, kind) = self.kind_at(extent.end_bytes(), &mut holes)?;
            if kind != extent.kind {
                break;
            }
            extent.len_bytes += len_bytes;
        }
        Ok(Some(extent))
    }
}

impl<M: BlockMap> Disk for Mapped<M> {
    fn format(&self) -> Format {
        M::FORMAT
    }

    fn info(&self) -> DiskInfo {
        self.map.info(self.file.len_bytes())
    }
}
