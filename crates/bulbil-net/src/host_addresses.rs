//! The host's own addresses, which no guest reaches through the NAT.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::Instant;

use crate::limits::HOST_ADDRESSES_MAX_AGE;

/// The kernel's routing trie of this network namespace: unprivileged, one read, no netlink.
const FIB_TRIE: &str = "/proc/net/fib_trie";

/// The host's own addresses as of a moment ago.
#[derive(Debug, Default)]
pub(crate) struct HostAddresses {
    known: HashSet<Ipv4Addr>,
    read_at: Option<Instant>,
}

impl HostAddresses {
    /// Whether `ip` is one of the host's own. Reads the list again when it is old; a list that cannot be
    /// read leaves the one before in force.
    pub(crate) fn contains(&mut self, ip: Ipv4Addr, now: Instant) -> bool {
        let old = self.read_at.is_none_or(|at| now.saturating_duration_since(at) >= HOST_ADDRESSES_MAX_AGE);
        if old {
            self.read_at = Some(now);
            match std::fs::read_to_string(FIB_TRIE) {
                Ok(text) => self.known = parse_fib_trie(&text),
                Err(error) => tracing::warn!(%error, path = FIB_TRIE, "cannot list the host's addresses"),
            }
        }
        self.known.contains(&ip)
    }
}

/// The addresses marked `host LOCAL`, each on the line before its mark.
fn parse_fib_trie(text: &str) -> HashSet<Ipv4Addr> {
    let mut last: Option<Ipv4Addr> = None;
    let mut local = HashSet::new();
    for line in text.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.ends_with("host LOCAL") {
            local.extend(last);
        }
    }
    local
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_addresses_are_found_and_networks_are_not() {
        let text = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    \x20    +-- 127.0.0.0/8 2 0 2\n        |-- 127.0.0.1\n           /32 host LOCAL\n\
                    \x20       |-- 192.0.2.0\n           /24 link UNICAST\n        |-- 192.0.2.2\n\
                    \x20          /32 host LOCAL\n        |-- 192.0.2.255\n           /32 link BROADCAST\n";
        let expected = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(192, 0, 2, 2)];
        assert_eq!(parse_fib_trie(text), HashSet::from(expected));
    }

    #[test]
    fn this_host_has_a_loopback_address() {
        assert!(HostAddresses::default().contains(Ipv4Addr::LOCALHOST, Instant::now()));
    }
}
