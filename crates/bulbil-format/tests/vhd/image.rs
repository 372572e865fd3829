//! VHDs made by hand, for what no tool at hand writes.

use std::ops::Range;

pub(crate) const FIXED: u32 = 2;
pub(crate) const DYNAMIC: u32 = 3;
pub(crate) const DIFFERENCING: u32 = 4;
pub(crate) const HEADER_AT: usize = 512;
pub(crate) const TABLE_AT: usize = 1536;
pub(crate) const PARENT_ID: [u8; 16] = *b"the parent's id.";

pub(crate) fn put(bytes: &mut [u8], at: usize, poke: &[u8]) {
    bytes[at..at + poke.len()].copy_from_slice(poke);
}

/// Computes the checksum of a structure and puts it in its place.
fn seal(bytes: &mut [u8], structure: Range<usize>, checksum_at: usize) {
    let structure = &mut bytes[structure];
    put(structure, checksum_at, &[0; 4]);
    let sum: u32 = structure.iter().map(|byte| u32::from(*byte)).sum();
    put(structure, checksum_at, &(!sum).to_be_bytes());
}

/// Changes what is at `at` of the footer at `footer_at` and makes its checksum right again.
pub(crate) fn poke_footer(bytes: &mut [u8], footer_at: usize, at: usize, poke: &[u8]) {
    put(bytes, footer_at + at, poke);
    seal(bytes, footer_at..footer_at + 512, 64);
}

/// Changes what is at `at` of the dynamic header and makes its checksum right again.
pub(crate) fn poke_header(bytes: &mut [u8], at: usize, poke: &[u8]) {
    put(bytes, HEADER_AT + at, poke);
    seal(bytes, HEADER_AT..HEADER_AT + 1024, 36);
}

pub(crate) fn footer(kind: u32, size_bytes: u64, creator: &[u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    put(&mut bytes, 0, b"conectix");
    put(&mut bytes, 8, &2_u32.to_be_bytes());
    put(&mut bytes, 12, &0x0001_0000_u32.to_be_bytes());
    put(&mut bytes, 16, &if kind == FIXED { u64::MAX } else { 512 }.to_be_bytes());
    put(&mut bytes, 28, creator);
    put(&mut bytes, 40, &size_bytes.to_be_bytes());
    put(&mut bytes, 48, &size_bytes.to_be_bytes());
    // A geometry far below the size: nothing may depend on it.
    put(&mut bytes, 56, &[0, 1, 4, 17]);
    put(&mut bytes, 60, &kind.to_be_bytes());
    put(&mut bytes, 68, b"an identifier...");
    seal(&mut bytes, 0..512, 64);
    bytes
}

/// One block of a dynamic or differencing disk.
pub(crate) struct Block {
    pub(crate) index: usize,
    /// A bit for each sector, in whole sectors.
    pub(crate) bitmap: Vec<u8>,
    pub(crate) content: Vec<u8>,
}

/// Makes a dynamic or differencing image of which the blocks are stored in the order of `blocks`.
pub(crate) fn sparse(kind: u32, size_bytes: u64, block_bytes: usize, blocks: &[Block]) -> Vec<u8> {
    let entries = size_bytes.div_ceil(block_bytes as u64);
    let mut table = vec![0xff; usize::try_from(entries * 4).unwrap().next_multiple_of(512)];
    let footer = footer(kind, size_bytes, b"test");
    let mut bytes = [&footer[..], &[0; 1024], &table].concat();
    for block in blocks {
        put(&mut table, block.index * 4, &u32::try_from(bytes.len() / 512).unwrap().to_be_bytes());
        bytes.extend_from_slice(&block.bitmap);
        bytes.extend_from_slice(&block.content);
    }
    bytes.extend_from_slice(&footer);
    put(&mut bytes, TABLE_AT, &table);
    poke_header(&mut bytes, 0, b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff");
    poke_header(&mut bytes, 16, &(TABLE_AT as u64).to_be_bytes());
    poke_header(&mut bytes, 24, &0x0001_0000_u32.to_be_bytes());
    poke_header(&mut bytes, 28, &u32::try_from(entries).unwrap().to_be_bytes());
    poke_header(&mut bytes, 32, &u32::try_from(block_bytes).unwrap().to_be_bytes());
    if kind == DIFFERENCING {
        let name: Vec<u8> = "C:\\disks\\Größe\u{1b}[31m.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
        poke_header(&mut bytes, 40, &PARENT_ID);
        poke_header(&mut bytes, 64, &name);
    }
    bytes
}

/// Makes a fixed image.
pub(crate) fn fixed(content: &[u8], creator: &[u8; 4]) -> Vec<u8> {
    [content, &footer(FIXED, content.len() as u64, creator)].concat()
}
