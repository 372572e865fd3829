//! As much of a TCP segment as is needed to find its flow; smoltcp reads the rest.

use super::be16;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Ports and flags of a segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    flags: u8,
}

impl Segment {
    /// Reads a segment with a whole header and neither port zero.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let header_len = usize::from(*bytes.get(12)? >> 4) * 4;
        if header_len < 20 || bytes.len() < header_len {
            return None;
        }
        let segment = Self { source_port: be16(bytes, 0)?, destination_port: be16(bytes, 2)?, flags: *bytes.get(13)? };
        (segment.source_port != 0 && segment.destination_port != 0).then_some(segment)
    }

    /// Whether it opens a connection and does nothing else.
    pub(crate) fn is_opening(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    pub(crate) fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(flags: u8, offset: u8) -> Option<Segment> {
        let mut bytes = [0u8; 20];
        bytes[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
        bytes[12] = offset << 4;
        bytes[13] = flags;
        Segment::parse(&bytes)
    }

    #[test]
    fn only_a_lone_syn_opens() {
        assert!(segment(SYN, 5).unwrap().is_opening());
        for flags in [0, SYN | ACK, SYN | RST, SYN | FIN, ACK] {
            assert!(!segment(flags, 5).unwrap().is_opening(), "{flags:#x}");
        }
    }

    #[test]
    fn header_that_is_not_all_there_is_refused() {
        assert!(segment(SYN, 4).is_none());
        assert!(segment(SYN, 6).is_none());
        assert!(Segment::parse(&[0; 19]).is_none());
    }
}
