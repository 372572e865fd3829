//! Integers out of untrusted bytes, without panics.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("disk offsets are kept in memory sizes: only 64-bit machines are supported");

/// Returns a byte count as an index.
///
/// # Panics
/// Never: only 64-bit machines are supported.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a usize has 64 bits")
}

/// Returns an index or length as a byte count.
///
/// # Panics
/// Never: only 64-bit machines are supported.
pub(crate) fn to_u64(value: usize) -> u64 {
    u64::try_from(value).expect("a usize has 64 bits")
}

/// Returns the `N` bytes at `at`, or zeros where `bytes` is too short.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Reads a big-endian integer; zero past the end of `bytes`.
pub(crate) fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

/// Reads a big-endian integer; zero past the end of `bytes`.
pub(crate) fn be_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

/// Turns a table of big-endian words into numbers; a rest of less than eight bytes is left out.
pub(crate) fn be_words(bytes: &[u8]) -> Box<[u64]> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

/// Reads a big-endian integer; zero past the end of `bytes`.
pub(crate) fn be_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, at))
}

/// Reads a little-endian integer; zero past the end of `bytes`.
pub(crate) fn le_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

/// Reads a little-endian integer; zero past the end of `bytes`.
pub(crate) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// Reads a little-endian integer; zero past the end of `bytes`.
pub(crate) fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// Returns the `N` bytes at `at`, or zeros where `bytes` is too short.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    array_at(bytes, at)
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In steps, so that content is known for what it is at its first bytes and zeros are compared many at a time.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Writes `value` at `at`; nothing where `bytes` is too short.
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value;
    }
}

/// Writes an identifier in the usual form, its bytes in order.
pub(crate) fn uuid_text(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |start: usize, end: usize| hex.get(start..end).unwrap_or_default();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}
