//! `resolv.conf`.

use std::net::{IpAddr, SocketAddr};

/// Most resolvers used; glibc uses three.
const MAX_RESOLVERS: usize = 3;
const DNS_PORT: u16 = 53;

/// The resolvers named in a `resolv.conf`, at most three, in their order.
///
/// Left out are lines that do not parse, addresses with a zone, and link-local and cloud metadata
/// addresses: a guest's questions are never relayed there.
pub fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let nameserver = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse::<IpAddr>().ok())?
    };
    text.lines()
        .filter_map(nameserver)
        .filter(is_relay_target)
        .map(|ip| SocketAddr::new(ip, DNS_PORT))
        .take(MAX_RESOLVERS)
        .collect()
}

/// Whether DNS questions may be relayed to `ip`. Loopback may: a host's stub resolver listens there.
pub(crate) fn is_relay_target(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let metadata = ip.octets() == [100, 100, 100, 200];
            !(ip.is_link_local() || ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || metadata)
        }
        IpAddr::V6(ip) => {
            let metadata = ip.segments() == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254];
            let mapped = ip.to_ipv4_mapped().is_some();
            !(ip.is_unicast_link_local() || ip.is_unspecified() || ip.is_multicast() || metadata || mapped)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_resolvers_are_taken_in_order() {
        let text = "# a comment\nsearch example.com\nnameserver 192.0.2.1 # first\n\tnameserver\t127.0.0.53\n\
                    nameserver 169.254.169.253\nnameserver fe80::1%eth0\nnameserver fe80::1\nnameserver oops\n\
                    nameserver 100.100.100.200\nnameserver 2001:db8::1\nnameserver 192.0.2.9\n";
        let expected = ["192.0.2.1:53", "127.0.0.53:53", "[2001:db8::1]:53"];
        assert_eq!(parse_resolv_conf(text), expected.map(|text| text.parse().unwrap()));
    }

    #[test]
    fn empty_file_has_no_resolver() {
        assert!(parse_resolv_conf("").is_empty());
    }
}
