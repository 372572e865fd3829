//! UDP (RFC 768).

use std::net::{Ipv4Addr, SocketAddrV4};

use super::{be16, internet_checksum, ipv4, len16};

/// Bytes before the payload.
pub(crate) const HEADER_BYTES: usize = 8;
/// Bytes that IPv4 and UDP put before the payload.
pub(crate) const OVERHEAD_BYTES: usize = ipv4::HEADER_BYTES + HEADER_BYTES;

/// A datagram as it came in. Its checksum is not looked at: it crossed a unix socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Udp<'a> {
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Udp<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let len = usize::from(be16(bytes, 4)?);
        Some(Self {
            source_port: be16(bytes, 0)?,
            destination_port: be16(bytes, 2)?,
            payload: bytes.get(..len)?.get(HEADER_BYTES..)?,
        })
    }
}

/// Writes an IPv4 packet with a datagram into `out`, which is [`OVERHEAD_BYTES`] longer than `payload`.
pub(crate) fn write_packet(out: &mut [u8], source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) {
    let (headers, body) = out.split_at_mut(OVERHEAD_BYTES);
    let udp_len = HEADER_BYTES + payload.len();
    let ip = ipv4::header(*source.ip(), *destination.ip(), ipv4::PROTOCOL_UDP, udp_len, ipv4::DEFAULT_TTL);
    let udp = header(source, destination, payload);
    headers[..ipv4::HEADER_BYTES].copy_from_slice(&ip);
    headers[ipv4::HEADER_BYTES..].copy_from_slice(&udp);
    body.copy_from_slice(payload);
}

fn header(source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) -> [u8; HEADER_BYTES] {
    let len = len16(HEADER_BYTES + payload.len());
    let mut header = [0; HEADER_BYTES];
    header[..2].copy_from_slice(&source.port().to_be_bytes());
    header[2..4].copy_from_slice(&destination.port().to_be_bytes());
    header[4..6].copy_from_slice(&len.to_be_bytes());
    let pseudo = pseudo_header(*source.ip(), *destination.ip(), len);
    let checksum = match internet_checksum(&[&pseudo, &header, payload]) {
        0 => 0xffff,
        checksum => checksum,
    };
    header[6..].copy_from_slice(&checksum.to_be_bytes());
    header
}

fn pseudo_header(source: Ipv4Addr, destination: Ipv4Addr, len: u16) -> [u8; 12] {
    let mut pseudo = [0; 12];
    pseudo[..4].copy_from_slice(&source.octets());
    pseudo[4..8].copy_from_slice(&destination.octets());
    pseudo[9] = ipv4::PROTOCOL_UDP;
    pseudo[10..].copy_from_slice(&len.to_be_bytes());
    pseudo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_packet_is_what_smoltcp_reads() {
        use smoltcp::wire::{Ipv4Packet, UdpPacket};
        let (a, b) = ("10.0.2.2:53".parse().unwrap(), "10.0.2.15:4242".parse().unwrap());
        let mut out = [0; OVERHEAD_BYTES + 5];
        write_packet(&mut out, a, b, b"hello");
        let ip = Ipv4Packet::new_checked(&out[..]).unwrap();
        assert!(ip.verify_checksum());
        let udp = UdpPacket::new_checked(ip.payload()).unwrap();
        assert!(udp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
        assert_eq!((udp.src_port(), udp.dst_port(), udp.payload()), (53, 4242, &b"hello"[..]));
    }

    #[test]
    fn length_beyond_the_packet_is_refused() {
        assert!(Udp::parse(&[0, 1, 0, 2, 0, 9, 0, 0]).is_none());
        assert!(Udp::parse(&[0, 1, 0, 2, 0, 7, 0, 0]).is_none());
        assert!(Udp::parse(&[0, 1, 0, 2, 0, 8, 0, 0]).unwrap().payload.is_empty());
    }
}
