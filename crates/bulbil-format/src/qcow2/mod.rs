//! The qcow2 reader, versions 2 and 3, read only.
//!
//! ```text
//!   disk offset ─┬─ L1 index ──► L1 table   in memory, at most 32 MiB
//!                ├─ L2 index ──► L2 table   cached, at most 32 MiB
//!                └─ in cluster             zero | host offset | compressed range ──► decoded, cached, 16 MiB
//! ```
//!
//! [`Qcow2Disk::run_at`] turns a disk offset into a [`Run`], a value that says where its bytes are; reading and listing
//! extents both go through it. [`validate`](validate::validate) has looked at every entry before the first of these
//! calls. Entries are parsed again at each use all the same, since the file may have been changed in between.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::bytes::{be_words, to_u64, to_usize};
use crate::cache::SharedCache;
use crate::disk::check_range;
use crate::{Disk, DiskInfo, Extent, ExtentKind, Format, FormatError, Qcow2Info, ReadAt};

mod decode;
mod entry;
mod header;
mod validate;

use decode::{Decoder, DecoderPool};
use entry::{Cluster, CompressedRange, SUBCLUSTER_BITS, parse_l1, parse_l2};
use header::Header;
use validate::{Census, split_entry, validate};

/// Memory for L2 tables; with clusters of 64 KiB they map 256 GiB of disk.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// Memory for decoded clusters: eight of the largest.
const DECODED_CACHE_BYTES: u64 = 16 << 20;
/// Entries of either cache, so that small clusters do not make it mostly bookkeeping.
const MAX_CACHE_ENTRIES: u64 = 16384;

/// An open qcow2 image.
pub(crate) struct Qcow2Disk {
    file: Arc<dyn ReadAt>,
    header: Header,
    /// The entries the disk needs.
    l1: Box<[u64]>,
    l2_tables: SharedCache<Box<[u64]>>,
    /// Decoded clusters by host offset. Only reads of a part of a cluster come here.
    decoded: SharedCache<Vec<u8>>,
    decoders: DecoderPool,
    census: Census,
}

impl fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Disk").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Where a range of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    len_bytes: u64,
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Zero,
    /// From this byte of the file on.
    Host(u64),
    /// In a compressed cluster, from this byte of its content on.
    Compressed {
        range: CompressedRange,
        skip_bytes: u64,
    },
}

impl Source {
    fn kind(self) -> ExtentKind {
        match self {
            Self::Zero => ExtentKind::Zero,
            Self::Host(_) | Self::Compressed { .. } => ExtentKind::Data,
        }
    }

    /// Whether `next`, which begins `len_bytes` later on the disk, goes on where this one ends.
    fn is_followed_by(self, len_bytes: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) => true,
            (Self::Host(here), Self::Host(there)) => here.checked_add(len_bytes) == Some(there),
            _ => false,
        }
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

impl Qcow2Disk {
    /// Opens an image that begins with the magic number of qcow2, and checks all of its tables.
    pub(crate) fn open(file: Arc<dyn ReadAt>) -> Result<Self, FormatError> {
        let header = Header::read(&*file)?;
        let l1 = read_words(&*file, header.l1_offset, header.l1_entries_needed() * 8)?;
        let census = validate(&*file, &header, &l1)?;
        tracing::debug!(
            version = header.version,
            cluster_bytes = header.cluster_bytes(),
            data_bytes = census.data_bytes,
            "qcow2 image checked"
        );
        Ok(Self {
            l2_tables: SharedCache::new(cache_entries(L2_CACHE_BYTES, &header)),
            decoded: SharedCache::new(cache_entries(DECODED_CACHE_BYTES, &header)),
            decoders: DecoderPool::new(header.compression),
            file,
            header,
            l1,
            census,
        })
    }

    /// Returns where the bytes from `offset` on are, up to the first break or a little more than `wanted_bytes`.
    ///
    /// `offset` is on the disk; the run does not pass the end of the disk.
    fn run_at(&self, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let rest_of_disk = self.header.size_bytes.saturating_sub(offset);
        let run = match self.l2_table(offset)? {
            None => Run { len_bytes: self.unmapped_bytes(offset)?, source: Source::Zero },
            Some(table) => self.run_in_table(&table, offset, wanted_bytes.min(rest_of_disk))?,
        };
        Ok(Run { len_bytes: run.len_bytes.min(rest_of_disk), ..run })
    }

    /// Returns the L2 table that maps a disk offset, or `None` if there is none.
    fn l2_table(&self, offset: u64) -> Result<Option<Arc<Box<[u64]>>>, FormatError> {
        let index = offset / self.header.l2_coverage_bytes();
        let Some(host_offset) = self.l2_offset(index)? else { return Ok(None) };
        self.l2_tables.get_or_load(index, || read_l2_table(&*self.file, &self.header, host_offset)).map(Some)
    }

    fn l2_offset(&self, index: u64) -> Result<Option<u64>, FormatError> {
        let entry = self.l1.get(to_usize(index)).copied().unwrap_or_default();
        parse_l1(entry, self.header.cluster_bytes()).map_err(FormatError::corrupt)
    }

    /// Counts the bytes from `offset` to the next L2 table that exists; there is none at `offset`.
    fn unmapped_bytes(&self, offset: u64) -> Result<u64, FormatError> {
        let coverage = self.header.l2_coverage_bytes();
        let mut index = offset / coverage + 1;
        while index < to_u64(self.l1.len()) && self.l2_offset(index)?.is_none() {
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
            Source::Zero | Source::Host(_) => unit_bytes - offset % unit_bytes,
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
            Cluster::Zero { .. } => Source::Zero,
            Cluster::Data { host_offset } => Source::Host(host_offset + in_cluster),
            Cluster::Compressed(range) => Source::Compressed { range, skip_bytes: in_cluster },
            Cluster::Subclusters { host_offset, allocated } => {
                let stored = allocated & (1 << (in_cluster >> self.unit_bits())) != 0;
                if stored { Source::Host(host_offset + in_cluster) } else { Source::Zero }
            }
        })
    }

    fn read_run(&self, source: Source, buf: &mut [u8]) -> Result<(), FormatError> {
        match source {
            Source::Zero => {
                buf.fill(0);
                Ok(())
            }
            Source::Host(offset) => self.file.read_exact_at(buf, offset).map_err(FormatError::read(offset)),
            Source::Compressed { range, .. } if to_u64(buf.len()) == self.header.cluster_bytes() => {
                self.decode(range, buf)
            }
            Source::Compressed { range, skip_bytes } => {
                let cluster = self.decoded.get_or_load(range.host_offset, || {
                    let mut cluster = vec![0; to_usize(self.header.cluster_bytes())];
                    self.decode(range, &mut cluster).map(|()| cluster)
                })?;
                let start = to_usize(skip_bytes);
                buf.copy_from_slice(cluster.get(start..start + buf.len()).expect("a run ends with its cluster"));
                Ok(())
            }
        }
    }

    /// Decodes a compressed cluster into a buffer of one cluster.
    fn decode(&self, range: CompressedRange, cluster: &mut [u8]) -> Result<(), FormatError> {
        let failed = |source| FormatError::Io { operation: "read", offset_bytes: range.host_offset, source };
        let decoded = self.decoders.with(|decoder: &mut Decoder| {
            let in_file = self.file.len_bytes().saturating_sub(range.host_offset);
            decoder.input.resize(to_usize(range.len_bytes.min(in_file)), 0);
            self.file.read_exact_at(&mut decoder.input, range.host_offset)?;
            Ok::<_, io::Error>(decoder.decode(cluster))
        });
        let at = range.host_offset;
        decoded
            .map_err(failed)?
            .map_err(|reason| FormatError::corrupt(format!("compressed cluster at {at:#x}: {reason}")))
    }
}

impl Disk for Qcow2Disk {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        check_range(buf.len(), offset_bytes, self.header.size_bytes)?;
        let (mut rest, mut offset) = (buf, offset_bytes);
        while !rest.is_empty() {
            let run = self.run_at(offset, to_u64(rest.len()))?;
            let len_bytes = run.len_bytes.min(to_u64(rest.len()));
            let (part, after) = rest.split_at_mut(to_usize(len_bytes));
            self.read_run(run.source, part)?;
            (rest, offset) = (after, offset + len_bytes);
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        if offset_bytes >= self.header.size_bytes {
            return Ok(None);
        }
        let first = self.run_at(offset_bytes, u64::MAX)?;
        let mut extent = Extent { offset_bytes, len_bytes: first.len_bytes, kind: first.source.kind() };
        while extent.end_bytes() < self.header.size_bytes {
            let next = self.run_at(extent.end_bytes(), u64::MAX)?;
            if next.source.kind() != extent.kind {
                break;
            }
            extent.len_bytes += next.len_bytes;
        }
        Ok(Some(extent))
    }

    fn info(&self) -> DiskInfo {
        DiskInfo {
            format: Format::Qcow2,
            size_bytes: self.header.size_bytes,
            file_bytes: self.file.len_bytes(),
            data_bytes: Some(self.census.data_bytes),
            qcow2: Some(Qcow2Info {
                version: self.header.version,
                cluster_bytes: self.header.cluster_bytes(),
                compression: self.header.compression,
                compressed_clusters: self.census.compressed_clusters,
                extended_l2: self.header.extended_l2,
                snapshots: self.header.snapshots,
                dirty: self.header.dirty,
            }),
        }
    }
}
