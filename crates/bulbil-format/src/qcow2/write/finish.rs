//! What is written when all clusters have their places: tables, reference counts, header.

use crate::bytes::{is_zero, to_u64, to_usize};
use crate::convert::write_at;
use crate::{ConvertError, WriteAt};

use super::layout::{Layout, REFCOUNT_BYTES, Tables, refcount_clusters};
use super::place::{ClusterMap, Placer};
use crate::qcow2::entry;

/// Tables are written in steps of this size or of one cluster.
const BUFFER_BYTES: usize = 1 << 20;

/// Completes an image.
pub(super) fn finish(file: &dyn WriteAt, layout: &Layout, mut placer: Placer) -> Result<(), ConvertError> {
    let map = placer.take_map();
    let l1 = write_l2_tables(file, layout, &mut placer, &map)?;
    drop(map);
    let l1_clusters = (layout.l1_entries() * 8).div_ceil(layout.cluster_bytes());
    let l1_offset = placer.append_clusters(l1_clusters);
    write_l1_table(file, l1_offset, &l1)?;
    let tables = write_refcounts(file, layout, &mut placer, l1_offset)?;
    write_at(file, &layout.header(tables)?, 0)?;
    file.set_len(placer.end_bytes()).map_err(ConvertError::write(placer.end_bytes()))
}

/// Writes the L2 tables one after another; returns the L1 indexes and entries of those there are.
fn write_l2_tables(
    file: &dyn WriteAt,
    layout: &Layout,
    placer: &mut Placer,
    map: &ClusterMap,
) -> Result<Vec<(u64, u64)>, ConvertError> {
    let mut l1: Vec<(u64, u64)> = Vec::new();
    let mut output = Sequential::new(file, placer.end_bytes());
    for (cluster, entry) in map.iter() {
        let (index, in_table) = (cluster / layout.l2_entries(), cluster % layout.l2_entries());
        if l1.last().is_none_or(|(last, _)| *last != index) {
            output.fill_to(placer.end_bytes())?;
            l1.push((index, entry::plain_entry(placer.append_clusters(1))));
        }
        let table_offset = placer.end_bytes() - layout.cluster_bytes();
        output.fill_to(table_offset + in_table * 8)?;
        output.push(entry)?;
    }
    output.end()?;
    Ok(l1)
}

fn write_l1_table(file: &dyn WriteAt, offset: u64, l1: &[(u64, u64)]) -> Result<(), ConvertError> {
    let mut output = Sequential::new(file, offset);
    for (index, entry) in l1 {
        output.fill_to(offset + index * 8)?;
        output.push(*entry)?;
    }
    output.end()
}

/// Writes the reference counts of all clusters, those of the counts included.
fn write_refcounts(
    file: &dyn WriteAt,
    layout: &Layout,
    placer: &mut Placer,
    l1_offset: u64,
) -> Result<Tables, ConvertError> {
    let clusters = to_u64(placer.refcounts().len());
    let (blocks, refcount_table_clusters) = refcount_clusters(clusters, layout.cluster_bytes());
    let blocks_offset = placer.append_clusters(blocks);
    let refcount_table_offset = placer.append_clusters(refcount_table_clusters);
    let mut output = Sequential::new(file, blocks_offset);
    for counts in placer.refcounts().chunks(BUFFER_BYTES / to_usize(REFCOUNT_BYTES)) {
        output.extend(counts.iter().flat_map(|count| count.to_be_bytes()))?;
    }
    output.fill_to(refcount_table_offset)?;
    for block in 0..blocks {
        output.push(blocks_offset + block * layout.cluster_bytes())?;
    }
    output.end()?;
    Ok(Tables { l1_offset, refcount_table_offset, refcount_table_clusters })
}

/// Writes numbers at rising offsets with few calls; what is left out stays a hole.
struct Sequential<'a> {
    file: &'a dyn WriteAt,
    /// Where the buffer goes.
    offset: u64,
    buffer: Vec<u8>,
}

impl<'a> Sequential<'a> {
    fn new(file: &'a dyn WriteAt, offset: u64) -> Self {
        Self { file, offset, buffer: Vec::new() }
    }

    fn push(&mut self, word: u64) -> Result<(), ConvertError> {
        self.extend(word.to_be_bytes())
    }

    fn extend(&mut self, bytes: impl IntoIterator<Item = u8>) -> Result<(), ConvertError> {
        self.buffer.extend(bytes);
        if self.buffer.len() >= BUFFER_BYTES { self.write_out() } else { Ok(()) }
    }

    /// Goes on at `offset`, which is not before what was written.
    fn fill_to(&mut self, offset: u64) -> Result<(), ConvertError> {
        let end = self.offset + to_u64(self.buffer.len());
        let gap = to_usize(offset - end);
        if self.buffer.len() + gap < BUFFER_BYTES {
            self.buffer.resize(self.buffer.len() + gap, 0);
            return Ok(());
        }
        self.write_out()?;
        self.offset = offset;
        Ok(())
    }

    fn write_out(&mut self) -> Result<(), ConvertError> {
        if !is_zero(&self.buffer) {
            write_at(self.file, &self.buffer, self.offset)?;
        }
        self.offset += to_u64(self.buffer.len());
        self.buffer.clear();
        Ok(())
    }

    fn end(mut self) -> Result<(), ConvertError> {
        self.write_out()
    }
}
