//! Boot traces: which blocks of an image a boot touches first, in order.
//!
//! ```text
//! 0       8      magic "BULBTRAC"
//! 8       4      format version, 1
//! 12      4      n, runs
//! 16      …      n × (distance from the end of the run before, signed │ blocks), each a varint
//! ```
//! A varint has seven bits in each byte, the lowest first; a set high bit says that another follows. A
//! signed one is doubled, and negative ones have one less: 0, -1, 1, -2 are 0, 1, 2, 3.
//!
//! Blocks are those of the disk, not of packs: so a trace stays true when blocks move in the store, and
//! for a snapshot whose disk differs in some of them.

use std::collections::HashMap;

use bulbil_types::{BLOCK_BYTES, MAX_DISK_BYTES};

const MAGIC: &[u8; 8] = b"BULBTRAC";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const MAX_BLOCK: u64 = MAX_DISK_BYTES / BLOCK_BYTES;

/// A recording ends with so many blocks: 256 MiB.
pub(crate) const MAX_RECORDED_BLOCKS: u64 = (256 << 20) / BLOCK_BYTES;

/// A trace merged from several boots, and one that is read, has at most twice as many.
const MAX_BLOCKS: u64 = 2 * MAX_RECORDED_BLOCKS;

/// Blocks of a disk, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockRun {
    pub(crate) first_block: u64,
    pub(crate) blocks: u64,
}

/// The order of first touches, each block once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace {
    runs: Vec<BlockRun>,
    blocks: u64,
    /// Which blocks are in it: 64 to a word.
    seen: HashMap<u64, u64>,
}

impl Trace {
    pub(crate) fn runs(&self) -> &[BlockRun] {
        &self.runs
    }

    /// The number of blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Appends those of the blocks that are not in the trace; leaves out what is over the limit.
    pub(crate) fn add(&mut self, first_block: u64, blocks: u64, limit: u64) {
        for block in first_block..first_block.saturating_add(blocks).min(MAX_BLOCK) {
            let word = self.seen.entry(block / 64).or_default();
            let bit = 1 << (block % 64);
            if *word & bit != 0 {
                continue;
            }
            if self.blocks >= limit {
                return;
            }
            *word |= bit;
            self.blocks += 1;
            match self.runs.last_mut() {
                Some(last) if last.first_block + last.blocks == block => last.blocks += 1,
                _ => self.runs.push(BlockRun { first_block: block, blocks: 1 }),
            }
        }
    }

    /// This trace and behind it what the other one has besides, as far as there is room.
    pub(crate) fn merged_with(&self, other: &Self) -> Self {
        let mut merged = self.clone();
        for run in &other.runs {
            merged.add(run.first_block, run.blocks, MAX_BLOCKS);
        }
        merged
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.runs.len()).expect("runs are bounded by blocks").to_le_bytes());
        let mut end = 0_u64;
        for run in &self.runs {
            let distance = run.first_block.wrapping_sub(end).cast_signed();
            put_varint(&mut bytes, ((distance << 1) ^ (distance >> 63)).cast_unsigned());
            put_varint(&mut bytes, run.blocks);
            end = run.first_block + run.blocks;
        }
        bytes
    }

    /// Parses a trace; `Err` says what is wrong with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let (header, mut rest) = bytes.split_at_checked(HEADER_BYTES).ok_or("too short")?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if &header[..8] != MAGIC {
            return Err("not a boot trace");
        }
        if u32_at(8) != VERSION {
            return Err("unknown format version");
        }
        let mut trace = Self::default();
        let mut end = 0_u64;
        for _ in 0..u32_at(12) {
            let distance = take_varint(&mut rest)?;
            let distance = (distance >> 1).cast_signed() ^ -(distance & 1).cast_signed();
            let blocks = take_varint(&mut rest)?;
            let first_block = end.checked_add_signed(distance).ok_or("run before the disk")?;
            end = first_block.checked_add(blocks).filter(|end| *end <= MAX_BLOCK).ok_or("run past the largest disk")?;
            let room = MAX_BLOCKS - trace.blocks;
            if blocks == 0 || blocks > room {
                return Err("empty run, or too many blocks");
            }
            let before = trace.blocks;
            trace.add(first_block, blocks, MAX_BLOCKS);
            if trace.blocks - before != blocks {
                return Err("a block twice");
            }
        }
        if rest.is_empty() { Ok(trace) } else { Err("bytes behind the last run") }
    }
}

impl PartialEq for Trace {
    fn eq(&self, other: &Self) -> bool {
        self.runs == other.runs
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).expect("seven bits"));
}

fn take_varint(rest: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0_u64;
    for shift in (0..63).step_by(7) {
        let (byte, after) = rest.split_first().ok_or("cut")?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("number too long")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(runs: &[(u64, u64)]) -> Trace {
        let mut trace = Trace::default();
        runs.iter().for_each(|(first, blocks)| trace.add(*first, *blocks, MAX_BLOCKS));
        trace
    }

    #[test]
    fn the_format_never_changes() {
        let bytes = trace(&[(300, 2), (5, 1), (302, 200)]).encode();
        let expected = [
            b"BULBTRAC".as_slice(),
            &[1, 0, 0, 0, 3, 0, 0, 0],
            // 300 from 0; 5 from 302 is -297; 302 from 6 is 296.
            &[0xd8, 0x04, 2, 0xd1, 0x04, 1, 0xd0, 0x04, 0xc8, 0x01],
        ];
        assert_eq!(bytes, expected.concat());
        assert_eq!(Trace::parse(&bytes).unwrap(), trace(&[(300, 2), (5, 1), (302, 200)]));
    }

    #[test]
    fn a_block_is_in_a_trace_once_and_runs_join() {
        let trace = trace(&[(10, 2), (12, 1), (11, 4), (0, 1)]);
        let runs: Vec<_> = trace.runs().iter().map(|run| (run.first_block, run.blocks)).collect();
        assert_eq!(runs, [(10, 5), (0, 1)]);
        assert_eq!(trace.blocks(), 6);
    }

    #[test]
    fn a_merged_trace_keeps_the_old_order_and_its_bound() {
        let merged = trace(&[(8, 1), (4, 1)]).merged_with(&trace(&[(4, 2), (8, 1), (100, 1)]));
        assert_eq!(merged, trace(&[(8, 1), (4, 1), (5, 1), (100, 1)]));
        let full = trace(&[(1_000_000, MAX_BLOCKS)]);
        assert_eq!(full.merged_with(&trace(&[(0, 9)])), full);
    }

    #[test]
    fn damaged_traces_are_refused() {
        let good = trace(&[(300, 2), (5, 1)]).encode();
        for len in 0..good.len() {
            assert!(Trace::parse(&good[..len]).is_err(), "cut at {len}");
        }
        let with =
            |runs: u32, body: &[u8]| [MAGIC.as_slice(), &VERSION.to_le_bytes(), &runs.to_le_bytes(), body].concat();
        assert!(Trace::parse(&with(0, &[])).is_ok());
        let huge = [0xff; 9];
        for (why, bytes) in [
            ("an empty run", with(1, &[0, 0])),
            ("before the disk", with(1, &[1, 1])),
            ("a block twice", with(2, &[0, 2, 1, 1])),
            ("more than are there", with(u32::MAX, &[0, 1])),
            ("bytes behind", with(1, &[0, 1, 0])),
            ("a long number", with(1, &[huge.as_slice(), &[0, 1]].concat())),
            ("past the largest disk", with(1, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1])),
            ("too many blocks", with(1, &[0, 0xff, 0xff, 0xff, 0xff, 0x0f])),
            ("another version", [MAGIC.as_slice(), &2_u32.to_le_bytes(), &[0; 4]].concat()),
        ] {
            assert!(Trace::parse(&bytes).is_err(), "{why}");
        }
    }
}
