//! Tables of 32-bit words, as VHD and VDI keep them.

use crate::bytes::{to_u64, to_usize};
use crate::{FormatError, ReadAt};

/// What is read at once, so that the bytes of a large table are not in memory beside its words.
const PIECE_BYTES: u64 = 64 << 10;
const WORD_BYTES: u64 = 4;

/// Reads a table of `words` words and has each checked, with its index, as soon as it is read: a large table that is
/// wrong at its beginning costs next to nothing. The caller knows that it lies in the file and is not too large.
pub(crate) fn read_u32_table(
    file: &dyn ReadAt,
    offset: u64,
    words: u64,
    decode: fn([u8; 4]) -> u32,
    mut check: impl FnMut(u64, u32) -> Result<(), FormatError>,
) -> Result<Box<[u32]>, FormatError> {
    let mut table = Vec::with_capacity(to_usize(words));
    let mut piece = vec![0; to_usize(PIECE_BYTES)];
    while to_u64(table.len()) < words {
        let done_bytes = to_u64(table.len()) * WORD_BYTES;
        let len_bytes = PIECE_BYTES.min(words * WORD_BYTES - done_bytes);
        let bytes = piece.get_mut(..to_usize(len_bytes)).unwrap_or_default();
        let at = offset + done_bytes;
        file.read_exact_at(bytes, at).map_err(FormatError::read(at))?;
        for word in bytes.as_chunks::<4>().0 {
            let word = decode(*word);
            check(to_u64(table.len()), word)?;
            table.push(word);
        }
    }
    Ok(table.into_boxed_slice())
}
