//! Replies of the transmission phase.
//!
//! ```text
//! simple   u32 magic | u32 error | u64 cookie | data (reads)
//! chunk    u32 magic | u16 flags | u16 type | u64 cookie | u32 length | payload
//! ```
//!
//! Without structured replies everything is a simple reply. With them reads and status are
//! chunks, every failure is an error chunk with a text, and other successes stay simple, which
//! saves four bytes and is allowed ("Structured replies").

use super::request::Cookie;
use super::{Errno, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use bulbil_volume::{ExtentKind, StatusExtent};

/// Bytes of a simple reply before its data.
pub const SIMPLE_HEADER_BYTES: usize = 16;
/// Bytes of a chunk before its payload.
pub const CHUNK_HEADER_BYTES: usize = 20;
/// Bytes before the data of a read's content chunk: the chunk header and the offset.
pub const DATA_CHUNK_HEADER_BYTES: usize = CHUNK_HEADER_BYTES + 8;

const FLAG_DONE: u16 = 1;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = (1 << 15) | 1;

/// The id given to `base:allocation`.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;
const STATE_HOLE: u32 = 1 << 0;
const STATE_ZERO: u32 = 1 << 1;

/// Why a request failed, as the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The error value.
    pub errno: Errno,
    /// A text for people, sent only in structured replies.
    pub message: &'static str,
}

impl Failure {
    /// Makes a failure; `message` is for people and is cut to fit a [`ShortReply`].
    #[must_use]
    pub const fn new(errno: Errno, message: &'static str) -> Self {
        Self { errno, message }
    }
}

/// A reply without data, on the stack.
#[derive(Debug, Clone, Copy)]
pub struct ShortReply {
    bytes: [u8; Self::MAX_BYTES],
    len: usize,
}

impl ShortReply {
    /// The most bytes a short reply has.
    pub const MAX_BYTES: usize = 128;

    fn new() -> Self {
        Self { bytes: [0; Self::MAX_BYTES], len: 0 }
    }

    fn push(mut self, part: &[u8]) -> Self {
        let end = self.len + part.len();
        self.bytes[self.len..end].copy_from_slice(part);
        self.len = end;
        self
    }

    /// The bytes to send.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The header of a simple reply; `error` is zero for success.
#[must_use]
pub fn simple_header(cookie: Cookie, error: u32) -> [u8; SIMPLE_HEADER_BYTES] {
    let mut header = [0; SIMPLE_HEADER_BYTES];
    header[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..].copy_from_slice(&cookie.0.to_be_bytes());
    header
}

fn chunk_header(kind: u16, cookie: Cookie, payload_bytes: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut header = [0; CHUNK_HEADER_BYTES];
    header[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&FLAG_DONE.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.0.to_be_bytes());
    header[16..].copy_from_slice(&payload_bytes.to_be_bytes());
    header
}

/// The reply to a request that succeeded and has no data.
#[must_use]
pub fn success(cookie: Cookie) -> ShortReply {
    ShortReply::new().push(&simple_header(cookie, 0))
}

/// The reply to a request that failed.
#[must_use]
pub fn failure(structured: bool, cookie: Cookie, failure: Failure) -> ShortReply {
    let errno = failure.errno as u32;
    if !structured {
        return ShortReply::new().push(&simple_header(cookie, errno));
    }
    let room = ShortReply::MAX_BYTES - CHUNK_HEADER_BYTES - 6;
    let text = &failure.message.as_bytes()[..failure.message.floor_char_boundary(room)];
    let text_bytes = u16::try_from(text.len()).expect("the text was cut to the room in a short reply");
    ShortReply::new()
        .push(&chunk_header(TYPE_ERROR, cookie, 6 + u32::from(text_bytes)))
        .push(&errno.to_be_bytes())
        .push(&text_bytes.to_be_bytes())
        .push(text)
}

/// Bytes in front of the data of a read's reply.
#[must_use]
pub fn read_header_bytes(structured: bool) -> usize {
    if structured { DATA_CHUNK_HEADER_BYTES } else { SIMPLE_HEADER_BYTES }
}

/// Writes what stands in front of a read's data: `header` is [`read_header_bytes`] long.
///
/// The whole range is one content chunk and the last of its reply, so it must be sent only after
/// the data has been read. `len_bytes` is not zero: an empty read has [`empty_read`].
///
/// # Panics
/// When `header` has another length.
pub fn write_read_header(structured: bool, header: &mut [u8], cookie: Cookie, offset: u64, len_bytes: u32) {
    if structured {
        let (chunk, start) = header.split_at_mut(CHUNK_HEADER_BYTES);
        chunk.copy_from_slice(&chunk_header(TYPE_OFFSET_DATA, cookie, len_bytes + 8));
        start.copy_from_slice(&offset.to_be_bytes());
    } else {
        header.copy_from_slice(&simple_header(cookie, 0));
    }
}

/// The reply to a read of no bytes; a content chunk "MUST describe at least one byte".
#[must_use]
pub fn empty_read(structured: bool, cookie: Cookie) -> ShortReply {
    if structured { ShortReply::new().push(&chunk_header(TYPE_NONE, cookie, 0)) } else { success(cookie) }
}

/// Appends the reply to a status request: `extents` cut to `len_bytes`, without empty ones.
///
/// Returns false and appends nothing when no extent is left, which the protocol cannot express.
pub fn push_block_status(out: &mut Vec<u8>, cookie: Cookie, len_bytes: u32, extents: &[StatusExtent]) -> bool {
    let start = out.len();
    out.extend_from_slice(&[0; CHUNK_HEADER_BYTES]);
    out.extend_from_slice(&ALLOCATION_CONTEXT_ID.to_be_bytes());
    let mut left = len_bytes;
    let mut count = 0u32;
    for extent in extents {
        let len = u32::try_from(extent.len_bytes).unwrap_or(u32::MAX).min(left);
        if len == 0 {
            continue;
        }
        let flags = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
        };
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
        left -= len;
        count += 1;
    }
    if count == 0 {
        out.truncate(start);
        return false;
    }
    out[start..start + CHUNK_HEADER_BYTES].copy_from_slice(&chunk_header(TYPE_BLOCK_STATUS, cookie, 4 + 8 * count));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn replies_have_the_documented_bytes() {
        let cookie = Cookie(0x0102_0304_0506_0708);
        assert_eq!(hex(success(cookie).as_bytes()), "67446698000000000102030405060708");
        let perm = Failure::new(Errno::Perm, "no");
        assert_eq!(hex(failure(false, cookie, perm).as_bytes()), "67446698000000010102030405060708");
        assert_eq!(
            hex(failure(true, cookie, perm).as_bytes()),
            "668e33ef0001800101020304050607080000000800000001".to_owned() + "00026e6f"
        );
        let mut header = [0; DATA_CHUNK_HEADER_BYTES];
        write_read_header(true, &mut header, cookie, 0x1000, 512);
        assert_eq!(hex(&header), "668e33ef000100010102030405060708000002080000000000001000");
        assert_eq!(hex(empty_read(true, cookie).as_bytes()), "668e33ef00010000010203040506070800000000");
    }

    #[test]
    fn status_is_cut_to_the_request() {
        let extents = [
            StatusExtent { len_bytes: 10, kind: ExtentKind::Data },
            StatusExtent { len_bytes: 0, kind: ExtentKind::Data },
            StatusExtent { len_bytes: 1 << 40, kind: ExtentKind::Hole },
            StatusExtent { len_bytes: 1, kind: ExtentKind::Data },
        ];
        let mut out = Vec::new();
        assert!(push_block_status(&mut out, Cookie(1), 30, &extents));
        assert_eq!(hex(&out[16..]), "00000014".to_owned() + "00000001" + "0000000a00000000" + "0000001400000003");
        assert!(!push_block_status(&mut out, Cookie(1), 30, &[]));
    }

    #[test]
    fn a_long_message_is_cut() {
        let long = "é".repeat(300).leak();
        let reply = failure(true, Cookie(1), Failure::new(Errno::Io, long));
        assert!(reply.as_bytes().len() <= ShortReply::MAX_BYTES);
    }
}
