//! The map of one sparse extent.
//!
//! ```text
//!   disk offset ─┬─ directory index ──► grain directory   in memory, at most 32 MiB
//!                ├─ table index ──────► grain table       cached, at most 32 MiB
//!                └─ in grain            zero | host offset | compressed grain ──► decoded, cached
//! ```

use std::fmt;
use std::sync::Arc;

use crate::bytes::{to_u64, to_usize};
use crate::cache::SharedCache;
use crate::disk::SECTOR_BYTES;
use crate::mapped::{BlockMap, CompressedRange, Run, Source};
use crate::{Compression, DiskInfo, Format, FormatError, ReadAt};

use super::grain::DecoderPool;
use super::header::{Header, TABLE_BYTES};
use super::validate::{Census, Grain, parse_entry, read_words, validate};

/// Memory for grain tables; with grains of 64 KiB they map 512 GiB of disk.
const TABLE_CACHE_BYTES: u64 = 32 << 20;

/// The checked tables of a sparse extent.
pub(super) struct SparseMap {
    header: Header,
    size_bytes: u64,
    census: Census,
    directory: Box<[u32]>,
    tables: SharedCache<Box<[u32]>>,
    decoders: DecoderPool,
    about: About,
}

/// What the descriptor says for display.
#[derive(Debug, Clone, Default)]
pub(super) struct About {
    pub(super) create_type: String,
    pub(super) content_id: Option<u32>,
}

impl fmt::Debug for SparseMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SparseMap").field("header", &self.header).finish_non_exhaustive()
    }
}

impl SparseMap {
    /// Checks all tables of an extent of which the first `size_bytes` are read; the header has as many or more.
    pub(super) fn new(file: &dyn ReadAt, header: Header, size_bytes: u64, about: About) -> Result<Self, FormatError> {
        let directory_offset = header.directory_sector * SECTOR_BYTES;
        let mut directory = read_words(file, directory_offset, header.directory_entries() * 4)?;
        let census = validate(file, &header, size_bytes, &mut directory)?;
        tracing::debug!(
            version = header.version,
            grain_bytes = header.grain_bytes(),
            data_bytes = census.data_bytes,
            "vmdk extent checked"
        );
        let tables = SharedCache::new(to_usize(TABLE_CACHE_BYTES / TABLE_BYTES));
        Ok(Self { header, size_bytes, census, directory, tables, decoders: DecoderPool::default(), about })
    }

    /// The sector of the table with an index, or `None` if there is none.
    fn table_sector(&self, index: u64) -> Option<u32> {
        self.directory.get(to_usize(index)).copied().filter(|sector| *sector != 0)
    }

    /// Counts the bytes from `offset` to the next grain table that exists, up to a little more than `wanted_bytes`;
    /// there is none at `offset`.
    fn unmapped_bytes(&self, offset: u64, wanted_bytes: u64) -> u64 {
        let coverage = self.header.table_coverage_bytes();
        let next = offset / coverage + 1;
        let rest = self.directory.get(to_usize(next)..).unwrap_or_default();
        let wanted = rest.iter().take(to_usize(wanted_bytes.div_ceil(coverage)));
        let gap = to_u64(wanted.take_while(|sector| **sector == 0).count());
        (next + gap) * coverage - offset
    }

    fn run_in_table(&self, table: &[u32], offset: u64, wanted_bytes: u64) -> Run {
        let grain_bytes = self.header.grain_bytes();
        let coverage = self.header.table_coverage_bytes();
        let table_end = (offset / coverage + 1) * coverage;
        let source = self.source_at(table, offset);
        let mut len_bytes = grain_bytes - offset % grain_bytes;
        while len_bytes < wanted_bytes && offset + len_bytes < table_end {
            if !source.is_followed_by(len_bytes, self.source_at(table, offset + len_bytes)) {
                break;
            }
            len_bytes += grain_bytes;
        }
        Run { len_bytes, source }
    }

    /// Returns where the byte at `offset` is; `table` is the grain table that maps it.
    fn source_at(&self, table: &[u32], offset: u64) -> Source {
        let index = to_usize(offset % self.header.table_coverage_bytes() / self.header.grain_bytes());
        let in_grain = offset % self.header.grain_bytes();
        match parse_entry(&self.header, table.get(index).copied().unwrap_or_default()) {
            Grain::Zero => Source::Zero,
            Grain::At(host_offset) if self.header.is_compressed() => {
                let range = CompressedRange { host_offset, len_bytes: self.header.grain_bytes() };
                Source::Compressed { range, skip_bytes: in_grain }
            }
            Grain::At(host_offset) => Source::Host(host_offset + in_grain),
        }
    }
}

impl BlockMap for SparseMap {
    const FORMAT: Format = Format::Vmdk;

    fn info(&self, file_bytes: u64) -> DiskInfo {
        let mut info = DiskInfo::new(Format::Vmdk, self.size_bytes, file_bytes);
        info.variant = Some(self.about.create_type.clone());
        info.data_bytes = Some(self.census.data_bytes);
        info.cluster_bytes = Some(self.header.grain_bytes());
        if self.header.is_compressed() {
            info.compression = Some(Compression::Zlib);
            info.compressed_clusters = self.census.grains;
        }
        info.identifier = self.about.content_id.map(|id| format!("{id:08x}"));
        if self.header.unclean {
            info.notes.push("not closed cleanly; a write to it may have been lost".to_owned());
        }
        info
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    fn run_at(&self, file: &dyn ReadAt, offset: u64, wanted_bytes: u64) -> Result<Run, FormatError> {
        let index = offset / self.header.table_coverage_bytes();
        let Some(sector) = self.table_sector(index) else {
            return Ok(Run { len_bytes: self.unmapped_bytes(offset, wanted_bytes), source: Source::Zero });
        };
        let load = || read_words(file, u64::from(sector) * SECTOR_BYTES, TABLE_BYTES);
        let table: Arc<Box<[u32]>> = self.tables.get_or_load(index, load)?;
        Ok(self.run_in_table(&table, offset, wanted_bytes))
    }

    fn decode(&self, file: &dyn ReadAt, range: CompressedRange, cluster: &mut [u8]) -> Result<(), FormatError> {
        let is_tail = self.census.tail_offset == Some(range.host_offset);
        let tail_bytes = is_tail.then(|| self.size_bytes % self.header.grain_bytes());
        self.decoders.decode(file, range.host_offset, cluster, tail_bytes)
    }
}
