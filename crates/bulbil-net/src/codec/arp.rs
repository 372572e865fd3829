//! ARP for IPv4 over Ethernet (RFC 826).

use std::net::Ipv4Addr;

use super::ethernet::{GATEWAY_MAC, Mac};
use super::{array, ipv4_at};

/// Ethernet, IPv4, address lengths 6 and 4.
const FIXED: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];
const BYTES: usize = 28;

/// A question: who has `target_ip`?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ArpRequest {
    pub(crate) sender_mac: Mac,
    /// Unspecified when the sender only probes whether an address is taken.
    pub(crate) sender_ip: Ipv4Addr,
    pub(crate) target_ip: Ipv4Addr,
}

impl ArpRequest {
    /// Reads a question; an answer or anything malformed is `None`.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        if payload.get(..6)? != FIXED || payload.get(6..8)? != REQUEST {
            return None;
        }
        Some(Self {
            sender_mac: array(payload, 8)?,
            sender_ip: ipv4_at(payload, 14)?,
            target_ip: ipv4_at(payload, 24)?,
        })
    }

    /// The answer "the link has it".
    pub(crate) fn reply(&self) -> [u8; BYTES] {
        let mut reply = [0; BYTES];
        reply[..6].copy_from_slice(&FIXED);
        reply[6..8].copy_from_slice(&REPLY);
        reply[8..14].copy_from_slice(&GATEWAY_MAC);
        reply[14..18].copy_from_slice(&self.target_ip.octets());
        reply[18..24].copy_from_slice(&self.sender_mac);
        reply[24..].copy_from_slice(&self.sender_ip.octets());
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_swaps_the_two_sides() {
        let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1];
        bytes.extend([2, 0, 0, 0, 0, 9, 10, 0, 2, 15]);
        bytes.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        let request = ArpRequest::parse(&bytes).unwrap();
        let reply = request.reply();
        assert_eq!(reply[6..8], REPLY);
        assert_eq!(reply[14..18], [10, 0, 2, 2]);
        assert_eq!(reply[18..28], bytes[8..18]);
        assert!(ArpRequest::parse(&reply).is_none(), "an answer is no question");
        assert!(ArpRequest::parse(&bytes[..27]).is_none());
    }
}
