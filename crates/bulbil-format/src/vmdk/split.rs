//! A disk of several extents, in files beside the descriptor.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::bytes::{to_u64, to_usize};
use crate::disk::{SECTOR_BYTES, check_range};
use crate::error::need;
use crate::mapped::Mapped;
use crate::{Disk, DiskContent, DiskInfo, Extent, ExtentKind, Format, FormatError, OpenGate, ReadAt};

use super::descriptor::{Descriptor, ExtentLine, ExtentSource};
use super::header::Header;
use super::sparse::{About, SparseMap};

/// The extents of a disk, in order and without gaps.
pub(super) struct SplitDisk {
    parts: Vec<Part>,
    size_bytes: u64,
    info: DiskInfo,
}

struct Part {
    /// The first byte on the disk.
    start_bytes: u64,
    len_bytes: u64,
    content: PartContent,
}

enum PartContent {
    Zero,
    Flat { file: Arc<dyn ReadAt>, offset_bytes: u64 },
    Sparse(Box<Mapped<SparseMap>>),
}

impl fmt::Debug for SplitDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitDisk").field("parts", &self.parts.len()).field("info", &self.info).finish_non_exhaustive()
    }
}

impl SplitDisk {
    /// Opens every extent of a descriptor through the gate.
    pub(super) fn open(descriptor: &Descriptor, file_bytes: u64, gate: &dyn OpenGate) -> Result<Self, FormatError> {
        check_not_shared(&descriptor.extents)?;
        let size_bytes = descriptor.size_bytes();
        let mut info = DiskInfo::new(Format::Vmdk, size_bytes, file_bytes);
        info.variant = Some(descriptor.create_type.as_str().to_owned());
        info.identifier = Some(format!("{:08x}", descriptor.content_id));
        info.data_bytes = Some(0);
        let mut disk = Self { parts: Vec::with_capacity(descriptor.extents.len()), size_bytes, info };
        let mut start_bytes = 0;
        for line in &descriptor.extents {
            let len_bytes = line.sectors * SECTOR_BYTES;
            let content = disk.open_part(line, gate)?;
            disk.parts.push(Part { start_bytes, len_bytes, content });
            start_bytes += len_bytes;
        }
        Ok(disk)
    }

    fn open_part(&mut self, line: &ExtentLine, gate: &dyn OpenGate) -> Result<PartContent, FormatError> {
        let len_bytes = line.sectors * SECTOR_BYTES;
        let file = match &line.source {
            ExtentSource::Zero => return Ok(PartContent::Zero),
            ExtentSource::Flat { name, .. } | ExtentSource::Sparse { name } => gate.open_extent(name)?,
        };
        self.info.file_bytes = self.info.file_bytes.saturating_add(file.len_bytes());
        let content = match &line.source {
            ExtentSource::Flat { first_sector, .. } => {
                let offset_bytes = first_sector.saturating_mul(SECTOR_BYTES);
                need(file.len_bytes(), offset_bytes.saturating_add(len_bytes), "an extent")?;
                self.add_data(len_bytes);
                PartContent::Flat { file, offset_bytes }
            }
            _ => {
                let header = Header::read(&*file)?;
                // No program writes them, and each extent would keep decoded grains of its own.
                if header.is_compressed() {
                    return Err(FormatError::UnsupportedFormat {
                        name: "VMDK of several compressed extents".to_owned(),
                    });
                }
                check_extent_size(&header, line.sectors)?;
                let map = SparseMap::new(&*file, header, len_bytes, About::default())?;
                let sparse = Mapped::new(file, map, None);
                self.add_sparse(&sparse.info());
                PartContent::Sparse(Box::new(sparse))
            }
        };
        Ok(content)
    }

    fn add_data(&mut self, data_bytes: u64) {
        self.info.data_bytes = self.info.data_bytes.map(|sum| sum.saturating_add(data_bytes));
    }

    fn add_sparse(&mut self, part: &DiskInfo) {
        self.add_data(part.data_bytes.unwrap_or_default());
        self.info.cluster_bytes = self.info.cluster_bytes.max(part.cluster_bytes);
        self.info.compression = self.info.compression.or(part.compression);
        self.info.compressed_clusters += part.compressed_clusters;
        if self.info.notes.is_empty() {
            self.info.notes.clone_from(&part.notes);
        }
    }

    /// Returns the part that has the byte at `offset`, which is on the disk.
    fn part_at(&self, offset: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.start_bytes <= offset);
        self.parts.get(after.saturating_sub(1)).expect("a disk has at least one extent, which begins at 0")
    }
}

/// Checks what an extent's header and its line in the descriptor say of its size: the header may round it up to whole
/// grains, as the specification wants it.
pub(super) fn check_extent_size(header: &Header, sectors: u64) -> Result<(), FormatError> {
    let spare = header.capacity_sectors.checked_sub(sectors);
    if spare.is_some_and(|spare| spare < header.grain_sectors) {
        return Ok(());
    }
    let capacity = header.capacity_sectors;
    let reason = format!("the extent has {capacity} sectors, the descriptor says {sectors}");
    Err(FormatError::BadDescriptor { reason })
}

/// Refuses a file that is used twice over the same bytes: a small file could claim to be a large disk.
fn check_not_shared(extents: &[ExtentLine]) -> Result<(), FormatError> {
    let mut uses: Vec<(&str, Range<u64>)> = extents.iter().filter_map(file_range).collect();
    uses.sort_unstable_by(|a, b| (a.0, a.1.start).cmp(&(b.0, b.1.start)));
    for ((first_name, first), (second_name, second)) in uses.iter().zip(uses.iter().skip(1)) {
        if first_name == second_name && second.start < first.end {
            return Err(FormatError::BadDescriptor { reason: format!("extent {first_name:?} is used twice") });
        }
    }
    Ok(())
}

fn file_range(extent: &ExtentLine) -> Option<(&str, Range<u64>)> {
    match &extent.source {
        ExtentSource::Zero => None,
        ExtentSource::Sparse { name } => Some((name, 0..u64::MAX)),
        ExtentSource::Flat { name, first_sector } => {
            Some((name, *first_sector..first_sector.saturating_add(extent.sectors)))
        }
    }
}

impl Part {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        match &self.content {
            PartContent::Zero => {
                buf.fill(0);
                Ok(())
            }
            PartContent::Flat { file, offset_bytes: base } => {
                let at = base + offset_bytes;
                file.read_exact_at(buf, at).map_err(FormatError::read(at))
            }
            PartContent::Sparse(sparse) => sparse.read_exact_at(buf, offset_bytes),
        }
    }

    /// Returns the kind at an offset in the part and how far it reaches, within the part.
    fn kind_at(&self, offset_bytes: u64) -> Result<(u64, ExtentKind), FormatError> {
        let rest_bytes = self.len_bytes - offset_bytes;
        match &self.content {
            PartContent::Zero => Ok((rest_bytes, ExtentKind::Zero)),
            PartContent::Flat { file, offset_bytes: base } => flat_kind(&**file, base + offset_bytes, rest_bytes),
            PartContent::Sparse(sparse) => {
                let extent = sparse.next_extent(offset_bytes)?;
                Ok(extent
                    .map_or((rest_bytes, ExtentKind::Zero), |extent| (extent.len_bytes.min(rest_bytes), extent.kind)))
            }
        }
    }
}

fn flat_kind(file: &dyn ReadAt, at: u64, rest_bytes: u64) -> Result<(u64, ExtentKind), FormatError> {
    let next = file.next_data(at);
    let next = next.map_err(|source| FormatError::Io { operation: "map", offset_bytes: at, source })?;
    Ok(match next {
        None => (rest_bytes, ExtentKind::Zero),
        Some((start, _)) if start > at => ((start - at).min(rest_bytes), ExtentKind::Zero),
        Some((_, end)) => ((end - at).min(rest_bytes), ExtentKind::Data),
    })
}

impl DiskContent for SplitDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        check_range(buf.len(), offset_bytes, self.size_bytes)?;
        let (mut rest, mut offset) = (buf, offset_bytes);
        while !rest.is_empty() {
            let part = self.part_at(offset);
            let in_part = offset - part.start_bytes;
            let len_bytes = (part.len_bytes - in_part).min(to_u64(rest.len()));
            let (piece, after) = rest.split_at_mut(to_usize(len_bytes));
            part.read_exact_at(piece, in_part)?;
            (rest, offset) = (after, offset + len_bytes);
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let mut found: Option<Extent> = None;
        let mut offset = offset_bytes;
        while offset < self.size_bytes {
            let part = self.part_at(offset);
            let (len_bytes, kind) = part.kind_at(offset - part.start_bytes)?;
            match &mut found {
                None => found = Some(Extent { offset_bytes, len_bytes, kind }),
                Some(extent) if extent.kind == kind => extent.len_bytes += len_bytes,
                Some(_) => break,
            }
            offset += len_bytes;
        }
        Ok(found)
    }
}

impl Disk for SplitDisk {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn info(&self) -> DiskInfo {
        self.info.clone()
    }
}
