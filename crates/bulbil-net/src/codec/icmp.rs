//! ICMP for IPv4 (RFC 792): echo, and telling the guest why nothing will come.

use std::net::Ipv4Addr;

use super::{internet_checksum, ipv4};

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const HEADER_BYTES: usize = 8;
/// Bytes of the packet in question that are sent back: a header with options and eight bytes more.
const QUOTE_BYTES: usize = 68;

/// Why a packet could not be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Host = 1,
    Port = 3,
    Prohibited = 13,
}

/// Whether `payload` is a well-formed echo request.
pub(crate) fn is_echo_request(payload: &[u8]) -> bool {
    payload.len() >= HEADER_BYTES && payload.starts_with(&[ECHO_REQUEST, 0]) && internet_checksum(&[payload]) == 0
}

/// The IPv4 packet that answers the echo request `payload`.
pub(crate) fn echo_reply(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut body = payload.to_vec();
    if let Some(kind) = body.first_mut() {
        *kind = ECHO_REPLY;
    }
    packet(source, destination, body)
}

/// The IPv4 packet that tells `destination` that `original`, which it sent, was not delivered.
pub(crate) fn unreachable(source: Ipv4Addr, destination: Ipv4Addr, reason: Unreachable, original: &[u8]) -> Vec<u8> {
    let mut body = vec![UNREACHABLE, reason as u8, 0, 0, 0, 0, 0, 0];
    body.extend_from_slice(&original[..original.len().min(QUOTE_BYTES)]);
    packet(source, destination, body)
}

fn packet(source: Ipv4Addr, destination: Ipv4Addr, mut body: Vec<u8>) -> Vec<u8> {
    if let Some(field) = body.get_mut(2..4) {
        field.fill(0);
    }
    let checksum = internet_checksum(&[&body]);
    if let Some(field) = body.get_mut(2..4) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
    let header = ipv4::header(source, destination, ipv4::PROTOCOL_ICMP, body.len(), ipv4::DEFAULT_TTL);
    [header.as_slice(), &body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::ipv4::Ipv4;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

    #[test]
    fn echo_reply_keeps_identity_and_data() {
        let request = packet(A, B, vec![ECHO_REQUEST, 0, 0, 0, 1, 2, 3, 4, 5]);
        let request = Ipv4::parse(&request).unwrap();
        assert!(is_echo_request(request.payload));
        let reply = echo_reply(B, A, request.payload);
        let reply = Ipv4::parse(&reply).unwrap();
        assert_eq!(internet_checksum(&[reply.payload]), 0);
        assert_eq!(reply.payload[0], ECHO_REPLY);
        assert_eq!(reply.payload[4..], [1, 2, 3, 4, 5]);
        assert!(!is_echo_request(reply.payload), "an answer is never answered");
    }

    #[test]
    fn unreachable_quotes_a_part_of_the_packet() {
        let bytes = unreachable(B, A, Unreachable::Port, &[7; 500]);
        let packet = Ipv4::parse(&bytes).unwrap();
        assert_eq!(packet.payload[..2], [3, 3]);
        assert_eq!(packet.payload.len(), HEADER_BYTES + QUOTE_BYTES);
    }
}
