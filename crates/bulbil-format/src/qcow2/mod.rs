//! qcow2, versions 2 and 3: read, and written as version 3.
//!
//! ```text
//!   disk offset ─┬─ L1 index ──► L1 table   in memory, at most 32 MiB
//!                ├─ L2 index ──► L2 table   cached, at most 32 MiB
//!                └─ in cluster             zero | host offset | compressed range ──► decoded, cached, 16 MiB
//! ```
//!
//! [`BlockMap::run_at`] turns a disk offset into a [`Run`], a value that says where its bytes are; reading and listing
//! extents both go through it. [`validate`](validate::validate) has looked at every entry before the first of these
//! calls. Entries are parsed again at each use all the same, since the file may have been changed in between.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::bytes::{be_words, to_u64, to_usize};
use crate::cache::SharedCache;
use crate::detect::check_expansion;
use crate::mapped::{BlockMap, CompressedRange, Mapped, Run, Source};
use crate::{DiskContent, DiskInfo, Format, FormatError, OpenOptions, ReadAt, SnapshotInfo};

mod decode;
mod entry;
mod header;
mod snapshots;
mod validate;
mod write;

use decode::{Decoder, DecoderPool};
use entry::{Cluster, SUBCLUSTER_BITS, parse_l1, parse_l2};
use header::Header;
use snapshots::Snapshots;
use validate::{Census, split_entry, validate};
pub(crate) use write::write;

/// Memory for L2 tables; with clusters of 64 KiB they map 256 GiB of disk.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// Entries of either cache, so that small clusters do not make it mostly bookkeeping.
const MAX_CACHE_ENTRIES: u64 = 16384;

/// The tables of an image.
pub(crate) struct Qcow2Map {
    header: Header,
    census: Census,
    /// All there are; one of them may be what is read.
    snapshots: Vec<SnapshotInfo>,
    /// The entries the disk needs.
    l1: Box<[u64]>,
    l2_tables: SharedCache<Box<[u64]>>,
    decoders: DecoderPool,
}

impl fmt::Debug for Qcow2Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Map").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Reads the L2 table at a host offset.
fn read_l2_table(file: &dyn ReadAt, header: &Header, host_offset: u64) -> Result<Box<[u64]>, FormatError> {
    read_words(file, host_offset, header.cluster_bytes())
}

fn read_words(file: &dyn ReadAt, offset: u64, len_bytes: u64) -> Result<Box<[u64]>, FormatError> {
    let mut bytes = vec![0; to_usize(len_bytes)];
    file.read_exact_at(&mut bytes, offset).map_err(FormatError::read(offset))?;
    Ok(be_words(&bytes))
}

fn cache_entries(memory_bytes: u64, header: &Header) -> usize {
    to_usize((memory_bytes >> header.cluster_bits).min(MAX_CACHE_ENTRIES))
}

impl Qcow2Map {
    /// Opens an image that begins with the magic number of qcow2, and checks all tables that are used.
    pub(crate) fn open(file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Mapped<Self>, FormatError> {
        let header = Header::read(&*file, options.parent.is_some())?;
        let snapshots = Snapshots::read(&*file, &header)?;
        let mut tables = vec![header.l1_table(), header.refcount_table.clone(), snapshots.table.clone()];
        tables.extend(snapshots.list.iter().map(|snapshot| snapshot.l1_table.clone()));
        let header = match &options.snapshot {
            None => header,
            Some(wanted) => {
                let found = snapshots.find(wanted)?;
                header.at_snapshot(found.info.size_bytes, found.l1_table.start, found.l1_entries)?
            }
        };
        let mut l1 = read_words(&*file, header.l1_offset, header.l1_entries_needed() * 8)?;
        let census = validate(&*file, &header, &tables, &mut l1)?;
        // Of an image without a parent the caller checks this as well, but with one the sum is not known there.
        check_expansion("a disk", census.data_bytes, file.len_bytes())?;
        tracing::debug!(
            version = header.version,
            cluster_bytes = header.cluster_bytes(),
            data_bytes = census.data_bytes,
            "qcow2 image checked"
        );
        let map = Self {
            census,
            snapshots: snapshots.list.into_iter().map(|snapshot| snapshot.info).collect(),
            l2_tables: SharedCache::new(cache_entries(L2_CACHE_BYTES, &header)),
            decoders: DecoderPool::new(header.compression),
            header,
            l1,
        };
        let parent = options.parent.clone().map(|parent| parent as Arc<dyn DiskContent>);
        Ok(Mapped::new(file, map, parent))
    }

    /// Returns the L2 table that maps a disk offset, or `None` if there is none.
    fn l2_table(&self, file: &dyn ReadAt, offset: u64) -> Result<Option<Arc<Box<[u64]>>>, FormatError> {
        let index = offset / self.header.l2_coverage_bytes();
        let Some(host_offset) = self.l2_offset(index)? else { return Ok(None) };
        self.l2_tables.get_or_load(index, || read_l2_table(file, &self.header, host_offset)).map(Some)
    }

    fn l2_offset(&self, index: u64) -> Result<Option<u64>, FormatError> {
        let entry = self.l1.get(to_usize(index)).copied().unwrap_or_default();
        parse_l1(entry, self.header.cluster_bytes()).map_err(FormatError::corrupt)
    }

    /// Counts the bytes from `offset` to the next L2 table that exists, up to a little more than `wanted_bytes`; there
    /// is none at `offset`.
    fn unmapped_bytes(&self, offset: u64, wanted_bytes: u64) -> Result<u64, FormatError> {
        let coverage = self.header.l2_coverage_bytes();
        let last = offset.saturating_add(wanted_bytes) / coverage;
        let mut index = offset / coverage + 1;
        while index < to_u64(self.l1.len()) && index <= last && self.l2_offset(index)?.is_none() {
            index += 1;
        }
        Ok(index.saturating_mul(coverage).saturating_sub(offset))
    }

    fn run_in_table(&self, table: &[u64], offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let unit_bytes = 1_u64 << self.unit_bits();
        let table_end = (offset / self.header.l2_coverage_bytes() + 1).saturating_mul(self.header.l2_coverage_bytes());
        let source = self.source_at(table, offset)?;
        let mut len_bytes = match source {
            Source::Compressed { skip_bytes, .. } => {
                return Ok(Run { len_bytes: self.header.cluster_bytes() - skip_bytes, source });
            }
            Source::Zero | Source::Host(_) | Source::Parent => unit_bytes - offset % unit_bytes,
        };
        while len_bytes < wanted_bytes && offset + len_bytes < table_end {
            if !source.is_followed_by(len_bytes, self.source_at(table, offset + len_bytes)?) {
                break;
            }
            len_bytes += unit_bytes;
        }
        Ok(Run { len_bytes, source })
    }

    /// The smallest unit that is stored or not: a cluster, or a subcluster.
    fn unit_bits(&self) -> u32 {
        self.header.cluster_bits - if self.header.extended_l2 { SUBCLUSTER_BITS } else { 0 }
    }

    /// Returns where the byte at `offset` is; `table` is the L2 table that maps it.
    fn source_at(&self, table: &[u64], offset: u64) -> Result<Source, FormatError> {
        let words = to_usize(self.header.l2_entry_words());
        let index = to_usize((offset >> self.header.cluster_bits) % self.header.l2_entries());
        let in_cluster = offset % self.header.cluster_bytes();
        let (entry, subclusters) = split_entry(table.get(index * words..(index + 1) * words).unwrap_or_default());
        let cluster = parse_l2(&self.header, entry, subclusters).map_err(FormatError::corrupt)?;
        Ok(match cluster {
            Cluster::Unallocated => Source::Parent,
            Cluster::Zero { .. } => Source::Zero,
            Cluster::Data { host_offset } => Source::Host(host_offset + in_cluster),
            Cluster::Compressed(range) => Source::Compressed { range, skip_bytes: in_cluster },
            Cluster::Subclusters { reserved_at, map } => {
                let bit = 1 << (in_cluster >> self.unit_bits());
                match reserved_at {
                    Some(host_offset) if map.allocated & bit != 0 => Source::Host(host_offset + in_cluster),
                    _ if map.zeros & bit != 0 => Source::Zero,
                    _ => Source::Parent,
                }
            }
        })
    }
}

impl BlockMap for Qcow2Map {
    const FORMAT: Format = Format::Qcow2;

    fn info(&self, file_bytes: u64) -> DiskInfo {
        let header = &self.header;
        let mut info = DiskInfo::new(Format::Qcow2, header.size_bytes, file_bytes);
        info.variant = Some(format!("version {}", header.version));
        // What the parent has is not counted here.
        info.data_bytes = header.backing_file.is_none().then_some(self.census.data_bytes);
        info.snapshots = self.snapshots.clone();
        info.cluster_bytes = Some(header.cluster_bytes());
        info.compression = Some(header.compression);
        info.compressed_clusters = self.census.compressed_clusters;
        if let Some(name) = &header.backing_file {
            info.notes.push(format!("has only what differs from its backing file, {name:?}"));
        }
        if header.extended_l2 {
            info.notes.push("clusters are allocated in 32 parts each (extended L2)".to_owned());
        }
        if header.dirty {
            info.notes.push("not closed cleanly; only reference counts, which are not used, may be wrong".to_owned());
        }
        info
    }

    fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    fn run_at(&self, file: &dyn ReadAt, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        match self.l2_table(file, offset)? {
            None => Ok(Run { len_bytes: self.unmapped_bytes(offset, wanted_bytes)?, source: Source::Parent }),
            Some(table) => self.run_in_table(&table, offset, wanted_bytes),
        }
    }

    fn decode(&self, file: &dyn ReadAt, range: CompressedRange, cluster: &mut [u8]) -> Result<(), FormatError> {
        let failed = |source| FormatError::Io { operation: "read", offset_bytes: range.host_offset, source };
        let decoded = self.decoders.with(|decoder: &mut Decoder| {
            let in_file = file.len_bytes().saturating_sub(range.host_offset);
            decoder.input.resize(to_usize(range.len_bytes.min(in_file)), 0);
            file.read_exact_at(&mut decoder.input, range.host_offset)?;
            Ok::<_, io::Error>(decoder.decode(cluster))
        });
        let at = range.host_offset;
        decoded
            .map_err(failed)?
            .map_err(|reason| FormatError::corrupt(format!("compressed cluster at {at:#x}: {reason}")))
    }
}
