//! Ethernet frames, and the framing of QEMU's stream.

use super::{array, be16, be32};
use crate::limits::MAX_FRAME_BYTES;

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// The link's own address, in the locally administered range; the same on every link.
pub(crate) const GATEWAY_MAC: Mac = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];
/// Everyone on the wire.
pub(crate) const BROADCAST_MAC: Mac = [0xff; 6];
/// Bytes before the payload.
pub(crate) const HEADER_BYTES: usize = 14;
/// Bytes of QEMU's length prefix.
pub(crate) const PREFIX_BYTES: usize = 4;

pub(crate) const TYPE_IPV4: u16 = 0x0800;
pub(crate) const TYPE_ARP: u16 = 0x0806;

/// A frame as it came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ethernet<'a> {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) ethertype: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub(crate) fn parse(frame: &'a [u8]) -> Option<Self> {
        Some(Self {
            destination: array(frame, 0)?,
            source: array(frame, 6)?,
            ethertype: be16(frame, 12)?,
            payload: frame.get(HEADER_BYTES..)?,
        })
    }
}

/// The header of a frame from the link.
pub(crate) fn header(destination: Mac, ethertype: u16) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..6].copy_from_slice(&destination);
    header[6..12].copy_from_slice(&GATEWAY_MAC);
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    header
}

/// A length prefix that no frame can have: the stream is out of step and cannot be followed further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameTooLong(pub(crate) u32);

/// Takes the first frame off `bytes`: the frame, and how many bytes it took with its prefix. `None` when
/// more must be read first.
pub(crate) fn split_frame(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, FrameTooLong> {
    let Some(prefix) = be32(bytes, 0) else { return Ok(None) };
    let len = usize::try_from(prefix).unwrap_or(usize::MAX);
    if len > MAX_FRAME_BYTES {
        return Err(FrameTooLong(prefix));
    }
    let end = PREFIX_BYTES + len;
    Ok(bytes.get(PREFIX_BYTES..end).map(|frame| (frame, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_frame_waits_for_the_whole_frame() {
        let stream = [0, 0, 0, 2, 7, 8, 0, 0];
        assert_eq!(split_frame(&stream[..3]), Ok(None));
        assert_eq!(split_frame(&stream[..5]), Ok(None));
        assert_eq!(split_frame(&stream), Ok(Some((&[7, 8][..], 6))));
    }

    #[test]
    fn split_frame_refuses_an_impossible_length() {
        assert_eq!(split_frame(&[0xff, 0, 0, 0]), Err(FrameTooLong(0xff00_0000)));
    }

    #[test]
    fn short_frame_is_no_frame() {
        assert!(Ethernet::parse(&[0; 13]).is_none());
        assert!(Ethernet::parse(&[0; 14]).is_some());
    }
}
