//! IPv4 packets (RFC 791).

use std::net::Ipv4Addr;

use super::{be16, internet_checksum, ipv4_at, len16};

/// Bytes of a header without options, the only kind the link writes.
pub(crate) const HEADER_BYTES: usize = 20;
/// TTL of packets the link makes, but for metadata answers.
pub(crate) const DEFAULT_TTL: u8 = 64;

pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;

const DONT_FRAGMENT: u16 = 0x4000;
/// More fragments, or an offset.
const FRAGMENT_MASK: u16 = 0x3fff;

/// A packet as it came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ipv4<'a> {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) protocol: u8,
    /// Whether this is only a part of a packet.
    pub(crate) is_fragment: bool,
    /// Header and payload, without what Ethernet padded.
    pub(crate) packet: &'a [u8],
    pub(crate) payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Reads a packet whose version, lengths and header checksum are right.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let first = *bytes.first()?;
        let header_len = usize::from(first & 0x0f) * 4;
        let total_len = usize::from(be16(bytes, 2)?);
        if first >> 4 != 4 || header_len < HEADER_BYTES || total_len < header_len {
            return None;
        }
        let packet = bytes.get(..total_len)?;
        let header = packet.get(..header_len)?;
        if internet_checksum(&[header]) != 0 {
            return None;
        }
        Some(Self {
            source: ipv4_at(header, 12)?,
            destination: ipv4_at(header, 16)?,
            protocol: *header.get(9)?,
            is_fragment: be16(header, 6)? & FRAGMENT_MASK != 0,
            packet,
            payload: packet.get(header_len..)?,
        })
    }
}

/// A header for `payload_len` bytes, which must be below 65516.
pub(crate) fn header(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    payload_len: usize,
    ttl: u8,
) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&len16(HEADER_BYTES + payload_len).to_be_bytes());
    header[6..8].copy_from_slice(&DONT_FRAGMENT.to_be_bytes());
    header[8] = ttl;
    header[9] = protocol;
    header[12..16].copy_from_slice(&source.octets());
    header[16..].copy_from_slice(&destination.octets());
    let checksum = internet_checksum(&[&header]);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn written_header_reads_back_without_ethernet_padding() {
        let mut bytes = header(A, B, PROTOCOL_UDP, 3, 1).to_vec();
        bytes.extend([1, 2, 3, 0, 0, 0]);
        let packet = Ipv4::parse(&bytes).unwrap();
        assert_eq!((packet.source, packet.destination, packet.protocol), (A, B, PROTOCOL_UDP));
        assert_eq!(packet.payload, [1, 2, 3]);
        assert!(!packet.is_fragment);
    }

    #[test]
    fn wrong_checksum_or_length_is_refused() {
        let good = header(A, B, PROTOCOL_UDP, 0, 64);
        for (at, value) in [(0, 0x44), (0, 0x46), (0, 0x65), (3, 19), (3, 21), (8, 63)] {
            let mut bad = good;
            bad[at] = value;
            assert!(Ipv4::parse(&bad).is_none(), "byte {at} = {value:#x}");
        }
    }
}
