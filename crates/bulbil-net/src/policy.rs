//! Which destinations a guest reaches, and how.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use crate::codec::dns;
use crate::config::{Ipv4Net, LinkConfig};
use crate::host_addresses::HostAddresses;

const HTTP_PORT: u16 = 80;

/// Destinations that are never forwarded, whatever the host's routes say.
const ALWAYS_DENIED: [Ipv4Net; 9] = [
    net(0, 0, 0, 0, 8),
    net(127, 0, 0, 0, 8),
    // Link-local: metadata of nearly every cloud.
    net(169, 254, 0, 0, 16),
    // Alibaba Cloud's metadata.
    net(100, 100, 100, 200, 32),
    // Azure's wire server, and its name server.
    net(168, 63, 129, 16, 32),
    // Oracle Cloud's metadata for classic images.
    net(192, 0, 0, 192, 32),
    net(224, 0, 0, 0, 4),
    net(240, 0, 0, 0, 4),
    net(255, 255, 255, 255, 32),
];

const fn net(a: u8, b: u8, c: u8, d: u8, prefix_len: u8) -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::new(a, b, c, d), prefix_len)
}

/// What becomes of a connection or datagram of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// To the instance's metadata service.
    Metadata,
    /// To the link's name server.
    Dns,
    /// To this address, by a socket of the host. `own_host` when that may be the host itself.
    Host { to: SocketAddrV4, own_host: bool },
    /// Nowhere.
    Denied,
}

/// The rules of one link.
#[derive(Debug)]
pub(crate) struct Policy {
    network: Ipv4Net,
    gateway_ip: Ipv4Addr,
    dns_ip: Ipv4Addr,
    metadata: Vec<Ipv4Addr>,
    host_ports: HashSet<u16>,
    deny: Vec<Ipv4Net>,
    allow: Vec<Ipv4Net>,
    host: HostAddresses,
}

impl Policy {
    pub(crate) fn new(config: &LinkConfig) -> Self {
        Self {
            network: config.network(),
            gateway_ip: config.gateway_ip,
            dns_ip: config.dns_ip,
            metadata: config.metadata_v4().collect(),
            host_ports: config.allow_host_ports.iter().copied().collect(),
            deny: config.deny.clone(),
            allow: config.allow.clone(),
            host: HostAddresses::default(),
        }
    }

    /// Where a TCP connection to `to` goes.
    pub(crate) fn route_tcp(&mut self, to: SocketAddrV4, now: Instant) -> Route {
        let (ip, port) = (*to.ip(), to.port());
        if self.metadata.contains(&ip) {
            return if port == HTTP_PORT { Route::Metadata } else { Route::Denied };
        }
        if ip == self.gateway_ip && self.host_ports.contains(&port) {
            return Route::Host { to: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), own_host: true };
        }
        if ip == self.dns_ip && port == dns::PORT {
            return Route::Dns;
        }
        self.route_outside(to, now)
    }

    /// Where a UDP datagram to `to` goes.
    pub(crate) fn route_udp(&mut self, to: SocketAddrV4, now: Instant) -> Route {
        if self.metadata.contains(to.ip()) {
            return Route::Denied;
        }
        if *to.ip() == self.dns_ip && to.port() == dns::PORT {
            return Route::Dns;
        }
        self.route_outside(to, now)
    }

    fn route_outside(&mut self, to: SocketAddrV4, now: Instant) -> Route {
        let ip = *to.ip();
        if self.allow.iter().any(|net| net.contains(ip)) {
            return Route::Host { to, own_host: true };
        }
        let listed = ALWAYS_DENIED.iter().chain(&self.deny).any(|net| net.contains(ip));
        if listed || self.network.contains(ip) || self.host.contains(ip, now) {
            return Route::Denied;
        }
        Route::Host { to, own_host: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(edit: impl FnOnce(&mut LinkConfig)) -> Policy {
        let mut config = LinkConfig::new([2; 6], "web");
        edit(&mut config);
        Policy::new(&config)
    }

    fn tcp(policy: &mut Policy, to: &str) -> Route {
        policy.route_tcp(to.parse().unwrap(), Instant::now())
    }

    #[test]
    fn metadata_is_port_80_only() {
        let mut policy = policy(|_| ());
        for ip in ["169.254.169.254", "100.100.100.200", "169.254.0.23"] {
            assert_eq!(tcp(&mut policy, &format!("{ip}:80")), Route::Metadata);
            assert_eq!(tcp(&mut policy, &format!("{ip}:8080")), Route::Denied);
        }
    }

    #[test]
    fn what_leaks_credentials_or_reaches_the_host_is_denied() {
        let mut policy = policy(|config| config.metadata_ips.clear());
        for ip in [
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "239.255.255.250",
            "250.0.0.1",
            "255.255.255.255",
            "10.0.2.2",
            "10.0.2.9",
        ] {
            assert_eq!(tcp(&mut policy, &format!("{ip}:80")), Route::Denied, "{ip}");
            let udp = policy.route_udp(format!("{ip}:123").parse().unwrap(), Instant::now());
            assert_eq!(udp, Route::Denied, "{ip}");
        }
    }

    #[test]
    fn opened_host_port_is_reached_at_the_gateway_only() {
        let mut policy = policy(|config| config.allow_host_ports.push(8080));
        let loopback = Route::Host { to: "127.0.0.1:8080".parse().unwrap(), own_host: true };
        assert_eq!(tcp(&mut policy, "10.0.2.2:8080"), loopback);
        assert_eq!(tcp(&mut policy, "10.0.2.2:8081"), Route::Denied);
        assert_eq!(tcp(&mut policy, "127.0.0.1:8080"), Route::Denied);
    }

    #[test]
    fn operator_denies_and_allows() {
        let mut policy = policy(|config| {
            config.deny.push("10.0.0.0/8".parse().unwrap());
            config.allow.push("10.1.0.0/16".parse().unwrap());
        });
        assert_eq!(tcp(&mut policy, "10.2.0.1:22"), Route::Denied);
        assert!(matches!(tcp(&mut policy, "10.1.0.1:22"), Route::Host { .. }));
        assert!(matches!(tcp(&mut policy, "198.51.100.7:22"), Route::Host { own_host: false, .. }));
    }
}
