//! Pure readers and writers of what is on the wire; no I/O, no clock, no panic on any input.

pub(crate) mod arp;
pub(crate) mod dhcp;
pub(crate) mod dns;
pub(crate) mod ethernet;
pub(crate) mod icmp;
pub(crate) mod ipv4;
pub(crate) mod resolv;
pub(crate) mod tcp;
pub(crate) mod udp;

use std::net::Ipv4Addr;

/// `N` bytes at `at`, if the input is that long.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The big-endian 16-bit number at `at`.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// The big-endian 32-bit number at `at`.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

/// The IPv4 address at `at`.
pub(crate) fn ipv4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    array::<4>(bytes, at).map(Ipv4Addr::from)
}

/// The length of something already known to fit 16 bits; longer counts as the maximum.
pub(crate) fn len16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// The internet checksum of `parts` taken one after the other; all but the last have an even length.
pub(crate) fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        let (words, rest) = part.as_chunks::<4>();
        sum += words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>();
        let mut tail = [0; 4];
        tail[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_be_bytes(tail));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_matches_the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(internet_checksum(&[&bytes]), !0xddf2);
        assert_eq!(internet_checksum(&[&bytes[..2], &bytes[2..6], &bytes[6..]]), !0xddf2);
    }

    #[test]
    fn checksum_pads_an_odd_end_with_zero() {
        assert_eq!(internet_checksum(&[&[0x12]]), !0x1200);
    }
}
