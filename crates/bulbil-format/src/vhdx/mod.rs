//! VHDX, Microsoft's format for Hyper-V since Windows Server 2012 (MS-VHDX).
//!
//! ```text
//! header ─► log ─► overlay ─► region tables ─┬─► metadata   block and sector size, size of the disk
//!            in memory, if it was in use     └─► BAT        disk offset ─► block in the file
//! ```
//!
//! Everything is read at open: the blocks that are present are kept as runs, and reading needs no table. A log in use
//! is applied in memory, so that an image of a machine that lost power is read as Windows would read it, and the file
//! stays as it is.

use std::sync::Arc;

use crate::bytes::to_usize;
use crate::claims::ClusterSet;
use crate::mapped::{BlockMap, CompressedRange, Mapped, Run};
use crate::{Disk, DiskInfo, Format, FormatError, OpenOptions, ReadAt};

mod bat;
mod guid;
mod header;
mod log;
mod metadata;
mod overlay;
mod write;

use bat::BlockTable;
use guid::Guid;
use header::{Header, Regions};
use metadata::Metadata;
pub(crate) use write::VhdxWriter;

/// The unit in which everything but the headers is placed.
const MIB: u64 = 1 << 20;
/// 128 TiB, twice the largest disk: 16 MiB of bits find what is used twice.
const MAX_FILE_MIB: u64 = 1 << 27;

/// Opens an image.
pub(crate) fn open(file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let file_bytes = file.len_bytes();
    let creator = header::read_creator(&*file)?;
    let header = Header::read(&*file)?;
    let (file, replayed_entries) = if header.log_guid == Guid::ZERO {
        (file, None)
    } else {
        let replayed = log::replay(file, &header)?;
        (replayed.file, Some(replayed.entries))
    };
    let regions = Regions::read(&*file)?;
    let metadata = Metadata::read(&*file, &regions.metadata, options)?;
    if options.parent.is_some() {
        return Err(FormatError::ParentMismatch { reason: "this VHDX image has no parent".to_owned() });
    }
    let mut used = claim_structures(file.len_bytes(), &header, &regions)?;
    let blocks = BlockTable::read(&*file, &regions.bat, &metadata, &mut used)?;
    tracing::debug!(
        block_bytes = metadata.block_bytes,
        data_bytes = blocks.data_bytes,
        replayed_entries,
        "VHDX image checked"
    );
    let identifier = metadata.disk_id.unwrap_or(header.data_write_guid).to_string();
    let map = VhdxMap { metadata, blocks, file_bytes, identifier, creator, replayed_entries };
    Ok(Box::new(Mapped::new(file, map, None)))
}

/// Returns the MiB of the file that headers, log and regions use, each of them once.
fn claim_structures(len_bytes: u64, header: &Header, regions: &Regions) -> Result<ClusterSet, FormatError> {
    let file_mib = len_bytes.div_ceil(MIB);
    if file_mib > MAX_FILE_MIB {
        return Err(FormatError::TooLarge { what: format!("a file of {file_mib} MiB"), limit: MAX_FILE_MIB });
    }
    let mut used = ClusterSet::new(file_mib);
    for range in [&(0..MIB), &header.log].into_iter().chain(&regions.all) {
        for offset in range.clone().step_by(to_usize(MIB)) {
            used.claim(offset, MIB.trailing_zeros())?;
        }
    }
    Ok(used)
}

/// The tables of an image.
#[derive(Debug)]
struct VhdxMap {
    metadata: Metadata,
    blocks: BlockTable,
    /// The length of the file as it is, without what the log adds.
    file_bytes: u64,
    identifier: String,
    creator: Option<String>,
    replayed_entries: Option<usize>,
}

impl BlockMap for VhdxMap {
    const FORMAT: Format = Format::Vhdx;

    fn info(&self, _file_bytes: u64) -> DiskInfo {
        let mut info = DiskInfo::new(Format::Vhdx, self.metadata.size_bytes, self.file_bytes);
        info.variant = Some(if self.metadata.fixed { "fixed" } else { "dynamic" }.to_owned());
        info.data_bytes = Some(self.blocks.data_bytes);
        info.cluster_bytes = Some(self.metadata.block_bytes);
        info.identifier = Some(self.identifier.clone());
        info.creator.clone_from(&self.creator);
        if self.metadata.sector_bytes != 512 {
            info.notes.push(format!("the disk has logical sectors of {} bytes", self.metadata.sector_bytes));
        }
        if let Some(entries) = self.replayed_entries {
            info.notes.push(format!("not closed cleanly; {entries} entries of its log were applied in memory"));
        }
        info
    }

    fn size_bytes(&self) -> u64 {
        self.metadata.size_bytes
    }

    fn cluster_bytes(&self) -> u64 {
        self.metadata.block_bytes
    }

    fn run_at(&self, _file: &dyn ReadAt, offset: u64, _wanted_bytes: u64) -> Result<Run, FormatError> {
        Ok(self.blocks.run_at(offset))
    }

    fn decode(&self, _file: &dyn ReadAt, range: CompressedRange, _cluster: &mut [u8]) -> Result<(), FormatError> {
        Err(corrupt(format!("nothing is compressed at {:#x}", range.host_offset)))
    }
}

fn corrupt(what: impl Into<String>) -> FormatError {
    FormatError::corrupt(what)
}

fn read_vec(file: &dyn ReadAt, offset: u64, len_bytes: u64) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0; to_usize(len_bytes)];
    file.read_exact_at(&mut bytes, offset).map_err(FormatError::read(offset))?;
    Ok(bytes)
}

/// Where every structure with a checksum has it.
const CHECKSUM: std::ops::Range<usize> = 4..8;

/// Returns the CRC-32C of a structure with its checksum field as zeros.
fn checksum(bytes: &[u8]) -> u32 {
    checksum_of(std::iter::once(bytes))
}

/// As `checksum`, of a structure in several pieces, of which the first has the checksum field.
fn checksum_of<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> u32 {
    pieces.enumerate().fold(0, |crc, (index, piece)| {
        if index > 0 {
            return crc32c::crc32c_append(crc, piece);
        }
        let before = piece.get(..CHECKSUM.start).unwrap_or_default();
        let after = piece.get(CHECKSUM.end..).unwrap_or_default();
        crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
    })
}
