//! Writes qcow2 images, version 3.
//!
//! ```text
//! header, names │ clusters, in the order of the disk │ L2 tables │ L1 table │ refcount blocks │ refcount table
//! one cluster   │ compressed ones packed             │ written at the end
//! ```
//!
//! A cluster of zeros has no place in the file. With a backing file neither has one that is the same there, and one
//! that became zero says so in its L2 entry. A compressed cluster begins at any byte, right behind the one before where
//! that can be; what does not become smaller is stored as it is. Nothing here depends on which thread was first.

use std::ops::Range;

use crate::bytes::{is_zero, to_u64, to_usize};
use crate::convert::{Writer, run};
use crate::layer::Layer;
use crate::{ConvertError, ConvertObserver, DiskContent, Qcow2Options, WriteAt};

mod changed;
mod compress;
mod finish;
mod layout;
mod place;

use changed::Changed;
use compress::Compressor;
use layout::Layout;
use place::{Found, Placer};

/// One piece: of the largest clusters, one.
const PIECE_BYTES: u64 = 2 << 20;

/// Writes the content of `source` to a new file.
pub(crate) fn write(
    source: &dyn DiskContent,
    file: &dyn WriteAt,
    options: &Qcow2Options,
    observer: &dyn ConvertObserver,
) -> Result<(), ConvertError> {
    let layout = Layout::new(source.size_bytes(), options)?;
    let below = options.backing.as_ref().map(|backing| &*backing.content);
    let writer = Qcow2Writer { layout, backing: below.map(Layer::new) };
    match below {
        None => run(&writer, source, file, observer),
        // Also where only the backing file has content there is something to write: that it became zero.
        Some(below) => run(&writer, &Changed::new(source, below), file, observer),
    }
}

struct Qcow2Writer<'a> {
    layout: Layout,
    backing: Option<Layer<&'a dyn DiskContent>>,
}

/// What one thread keeps.
struct Worker {
    compressor: Option<Compressor>,
    /// A piece of the backing file.
    below: Vec<u8>,
    /// The last cluster of a disk that ends within it.
    padded: Vec<u8>,
}

/// A piece on its way.
struct Prepared {
    /// What its clusters are.
    found: Vec<Found>,
    /// The compressed clusters, one after another.
    packed: Vec<u8>,
    /// Where they go.
    writes: Vec<Placed>,
}

/// Bytes with a place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Placed {
    host_offset: u64,
    bytes: PieceRange,
}

/// A range of a piece, or of its compressed clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PieceRange {
    Plain(Range<usize>),
    Packed(Range<usize>),
}

impl Qcow2Writer<'_> {
    /// Returns what a cluster is, and adds its compressed bytes to `packed`.
    fn look_at(
        &self,
        worker: &mut Worker,
        range: Range<usize>,
        piece: &[u8],
        packed: &mut Vec<u8>,
    ) -> Result<Found, ConvertError> {
        let cluster = piece.get(range.clone()).unwrap_or_default();
        let below = worker.below.get(range.clone()).filter(|_| self.backing.is_some());
        if below.is_some_and(|below| below == cluster) {
            return Ok(Found::Unallocated);
        }
        if is_zero(cluster) {
            return Ok(if below.is_some() { Found::Zero } else { Found::Unallocated });
        }
        let Some(compressor) = &mut worker.compressor else { return Ok(Found::Plain(range)) };
        let cluster_bytes = to_usize(self.layout.cluster_bytes());
        let whole = if cluster.len() == cluster_bytes {
            cluster
        } else {
            worker.padded.clear();
            worker.padded.extend_from_slice(cluster);
            worker.padded.resize(cluster_bytes, 0);
            &worker.padded
        };
        let start = packed.len();
        let fits = compressor.compress(whole, packed)?;
        Ok(if fits { Found::Packed(start..packed.len()) } else { Found::Plain(range) })
    }
}

impl Writer for Qcow2Writer<'_> {
    type Worker = Worker;
    type Prepared = Prepared;
    type State = Placer;

    fn piece_bytes(&self) -> u64 {
        PIECE_BYTES
    }

    fn worker(&self) -> Result<Worker, ConvertError> {
        let compressor = self.layout.compression().map(Compressor::new).transpose()?;
        Ok(Worker { compressor, below: Vec::new(), padded: Vec::new() })
    }

    fn begin(&self, _file: &dyn WriteAt) -> Result<Placer, ConvertError> {
        Ok(Placer::new(self.layout.cluster_bits()))
    }

    fn prepare(&self, worker: &mut Worker, offset: u64, piece: &[u8]) -> Result<Prepared, ConvertError> {
        if let Some(backing) = &self.backing {
            worker.below.resize(piece.len(), 0);
            backing.read(&mut worker.below, offset).map_err(ConvertError::Read)?;
        }
        let mut prepared = Prepared { found: Vec::new(), packed: Vec::new(), writes: Vec::new() };
        let cluster_bytes = to_usize(self.layout.cluster_bytes());
        for start in (0..piece.len()).step_by(cluster_bytes) {
            let range = start..(start + cluster_bytes).min(piece.len());
            let found = self.look_at(worker, range, piece, &mut prepared.packed)?;
            prepared.found.push(found);
        }
        Ok(prepared)
    }

    fn place(&self, placer: &mut Placer, offset: u64, prepared: &mut Prepared) -> Result<(), ConvertError> {
        let first = offset >> self.layout.cluster_bits();
        for (cluster, found) in (first..).zip(&prepared.found) {
            if let Some(placed) = placer.place(cluster, found) {
                push_joined(&mut prepared.writes, placed);
            }
        }
        Ok(())
    }

    fn write(&self, file: &dyn WriteAt, _offset: u64, piece: &[u8], prepared: &Prepared) -> Result<(), ConvertError> {
        for placed in &prepared.writes {
            let bytes = match &placed.bytes {
                PieceRange::Plain(range) => piece.get(range.clone()),
                PieceRange::Packed(range) => prepared.packed.get(range.clone()),
            };
            let bytes = bytes.unwrap_or_default();
            file.write_all_at(bytes, placed.host_offset).map_err(ConvertError::write(placed.host_offset))?;
        }
        Ok(())
    }

    fn finish(&self, file: &dyn WriteAt, placer: Placer) -> Result<(), ConvertError> {
        finish::finish(file, &self.layout, placer)
    }
}

/// Adds bytes to others before them, as one write where they touch on both sides.
fn push_joined(writes: &mut Vec<Placed>, next: Placed) {
    let Some(last) = writes.last_mut() else { return writes.push(next) };
    match (&mut last.bytes, &next.bytes) {
        (PieceRange::Plain(last_range), PieceRange::Plain(range))
        | (PieceRange::Packed(last_range), PieceRange::Packed(range))
            if last_range.end == range.start && last.host_offset + to_u64(last_range.len()) == next.host_offset =>
        {
            last_range.end = range.end;
        }
        _ => writes.push(next),
    }
}
