//! What a link is told about its guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use crate::codec::ethernet::{GATEWAY_MAC, Mac};

/// Most entries in each list of a [`LinkConfig`].
const MAX_LIST: usize = 256;
/// Most metadata addresses: their routes must fit one DHCP option.
const MAX_METADATA_IPS: usize = 8;

/// An IPv4 network: an address and a prefix length, as in `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ipv4Net {
    address: Ipv4Addr,
    prefix_len: u8,
}

/// An [`Ipv4Net`] that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an IPv4 network such as 10.0.0.0/8")]
pub struct ParseNetError {
    text: String,
}

impl Ipv4Net {
    /// The network of `prefix_len` bits that holds `address`; a length above 32 counts as 32.
    pub const fn new(address: Ipv4Addr, prefix_len: u8) -> Self {
        let prefix_len = if prefix_len > 32 { 32 } else { prefix_len };
        let address = Ipv4Addr::from_bits(address.to_bits() & Self::mask_bits(prefix_len));
        Self { address, prefix_len }
    }

    const fn mask_bits(prefix_len: u8) -> u32 {
        match u32::MAX.checked_shl(32 - prefix_len as u32) {
            Some(mask) => mask,
            None => 0,
        }
    }

    /// Whether `address` lies in this network.
    pub const fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & Self::mask_bits(self.prefix_len) == self.address.to_bits()
    }

    /// The network's mask, as in 255.255.255.0.
    pub const fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(Self::mask_bits(self.prefix_len))
    }

    /// The network's last address.
    pub const fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !Self::mask_bits(self.prefix_len))
    }

    /// The network's first address.
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

impl FromStr for Ipv4Net {
    type Err = ParseNetError;

    /// Reads `address/length`, or a lone address as a network of one.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseNetError { text: text.to_owned() };
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let address = address.parse().map_err(|_| refused())?;
        let length: u8 = length.parse().map_err(|_| refused())?;
        if length > 32 {
            return Err(refused());
        }
        Ok(Self::new(address, length))
    }
}

/// What a link is told about its guest and about what the guest may reach.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The guest NIC's MAC; frames from any other source are dropped.
    pub guest_mac: Mac,
    /// The one address leased to the guest.
    pub guest_ip: Ipv4Addr,
    /// Prefix length of the guest's network, 8 to 30.
    pub prefix_len: u8,
    /// The link's own address: router, DHCP server, source of forwarded connections.
    pub gateway_ip: Ipv4Addr,
    /// The name server's address.
    pub dns_ip: Ipv4Addr,
    /// IP MTU in bytes, 576 to 65520, given to the guest by DHCP.
    pub mtu: u16,
    /// Host name given to the guest by DHCP and answered by the name server.
    pub hostname: String,
    /// Domain given to the guest by DHCP.
    pub domain: Option<String>,
    /// Addresses whose TCP port 80 is the metadata service. IPv6 ones are kept for later and unused now.
    pub metadata_ips: Vec<IpAddr>,
    /// IP TTL of metadata answers until the service asks for another ([`crate::HopLimit`]).
    pub metadata_ttl: u8,
    /// Destinations refused besides those that always are.
    pub deny: Vec<Ipv4Net>,
    /// Destinations let through although they would be refused. It wins over everything, the host's own
    /// and link-local addresses included: only for what an operator named.
    pub allow: Vec<Ipv4Net>,
    /// TCP ports of the host's 127.0.0.1 that the guest reaches at the gateway's address.
    pub allow_host_ports: Vec<u16>,
    /// Resolvers that DNS questions are relayed to, in order of preference; see
    /// [`crate::parse_resolv_conf`]. Link-local and metadata addresses in it are never used.
    pub upstream_dns: Vec<SocketAddr>,
}

/// A [`LinkConfig`] that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The MAC is zero, a group address or the gateway's own.
    #[error("the guest's mac address is zero, a group address or the gateway's own")]
    Mac,
    /// The prefix length is not 8 to 30.
    #[error("prefix length {0} is not 8 to 30")]
    PrefixLen(u8),
    /// An address is outside the guest's network, at its edge, or used twice.
    #[error("{0} is outside the guest's network, at its edge, or used twice")]
    Address(Ipv4Addr),
    /// The MTU is not 576 to 65520.
    #[error("mtu {0} is not 576 to 65520")]
    Mtu(u16),
    /// The host name or domain is not letters, digits and hyphens in labels of at most 63 bytes.
    #[error("`{0}` is not a host name")]
    Name(String),
    /// A metadata address is not a unicast address outside the guest's network.
    #[error("{0} cannot be a metadata address")]
    MetadataIp(IpAddr),
    /// The TTL is zero.
    #[error("the metadata ttl is zero")]
    Ttl,
    /// A list is too long.
    #[error("`{name}` has {len} entries, more than {limit}")]
    TooMany {
        /// The field.
        name: &'static str,
        /// Its length.
        len: usize,
        /// The most it may have.
        limit: usize,
    },
}

impl LinkConfig {
    /// The usual network, 10.0.2.0/24, with all metadata addresses and nothing opened.
    pub fn new(guest_mac: Mac, hostname: impl Into<String>) -> Self {
        Self {
            guest_mac,
            guest_ip: Ipv4Addr::new(10, 0, 2, 15),
            prefix_len: 24,
            gateway_ip: Ipv4Addr::new(10, 0, 2, 2),
            dns_ip: Ipv4Addr::new(10, 0, 2, 3),
            mtu: 1500,
            hostname: hostname.into(),
            domain: None,
            metadata_ips: vec![
                Ipv4Addr::new(169, 254, 169, 254).into(),
                Ipv4Addr::new(100, 100, 100, 200).into(),
                Ipv4Addr::new(169, 254, 0, 23).into(),
            ],
            metadata_ttl: 64,
            deny: Vec::new(),
            allow: Vec::new(),
            allow_host_ports: Vec::new(),
            upstream_dns: Vec::new(),
        }
    }

    /// The guest's network.
    pub fn network(&self) -> Ipv4Net {
        Ipv4Net::new(self.gateway_ip, self.prefix_len)
    }

    pub(crate) fn metadata_v4(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.metadata_ips.iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        })
    }

    /// Whether `ip` is one of the addresses the link answers ARP and ICMP echo for.
    pub(crate) fn is_own_address(&self, ip: Ipv4Addr) -> bool {
        ip == self.gateway_ip || ip == self.dns_ip || self.metadata_v4().any(|own| own == ip)
    }

    /// Checks everything a link relies on.
    ///
    /// # Errors
    ///
    /// The first thing found wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_mac()?;
        self.validate_addresses()?;
        self.validate_metadata()?;
        self.validate_names()?;
        if !(576..=65_520).contains(&self.mtu) {
            return Err(ConfigError::Mtu(self.mtu));
        }
        let lists = [
            ("metadata_ips", self.metadata_ips.len(), MAX_METADATA_IPS),
            ("deny", self.deny.len(), MAX_LIST),
            ("allow", self.allow.len(), MAX_LIST),
            ("allow_host_ports", self.allow_host_ports.len(), MAX_LIST),
            ("upstream_dns", self.upstream_dns.len(), MAX_LIST),
        ];
        match lists.into_iter().find(|(_, len, limit)| len > limit) {
            Some((name, len, limit)) => Err(ConfigError::TooMany { name, len, limit }),
            None => Ok(()),
        }
    }

    fn validate_mac(&self) -> Result<(), ConfigError> {
        let group = self.guest_mac[0] & 1 == 1;
        if group || self.guest_mac == [0; 6] || self.guest_mac == GATEWAY_MAC {
            return Err(ConfigError::Mac);
        }
        Ok(())
    }

    fn validate_addresses(&self) -> Result<(), ConfigError> {
        if !(8..=30).contains(&self.prefix_len) {
            return Err(ConfigError::PrefixLen(self.prefix_len));
        }
        let network = self.network();
        let all = [self.gateway_ip, self.dns_ip, self.guest_ip];
        for (index, ip) in all.into_iter().enumerate() {
            let edge = ip == network.address() || ip == network.broadcast();
            let twice = all[..index].contains(&ip);
            if edge || twice || !network.contains(ip) || ip.is_multicast() || ip.is_loopback() {
                return Err(ConfigError::Address(ip));
            }
        }
        Ok(())
    }

    fn validate_metadata(&self) -> Result<(), ConfigError> {
        if self.metadata_ttl == 0 {
            return Err(ConfigError::Ttl);
        }
        let network = self.network();
        let bad = |ip: &Ipv4Addr| {
            ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_loopback() || network.contains(*ip)
        };
        match self.metadata_v4().find(bad) {
            Some(ip) => Err(ConfigError::MetadataIp(ip.into())),
            None => Ok(()),
        }
    }

    fn validate_names(&self) -> Result<(), ConfigError> {
        let names = std::iter::once(&self.hostname).chain(&self.domain);
        match names.into_iter().find(|name| !is_host_name(name)) {
            Some(name) => Err(ConfigError::Name(name.clone())),
            None => Ok(()),
        }
    }
}

fn is_host_name(name: &str) -> bool {
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 200 && name.split('.').all(label_ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LinkConfig {
        LinkConfig::new([0x52, 0x54, 0, 0, 0, 1], "web")
    }

    #[test]
    fn usual_network_is_valid() {
        assert_eq!(config().validate(), Ok(()));
    }

    #[test]
    fn gateway_outside_the_network_is_refused() {
        let guest_ip = Ipv4Addr::new(10, 0, 3, 15);
        assert_eq!(LinkConfig { guest_ip, ..config() }.validate(), Err(ConfigError::Address(guest_ip)));
    }

    #[test]
    fn gateway_mac_is_refused_for_the_guest() {
        assert_eq!(LinkConfig { guest_mac: GATEWAY_MAC, ..config() }.validate(), Err(ConfigError::Mac));
    }

    #[test]
    fn names_that_dhcp_or_dns_could_misread_are_refused() {
        for name in ["", "a b", "-a", "a.", "a\0b"] {
            let result = LinkConfig { hostname: name.into(), ..config() }.validate();
            assert_eq!(result, Err(ConfigError::Name(name.into())));
        }
    }

    #[test]
    fn networks_contain_what_their_prefix_says() {
        let net: Ipv4Net = "10.1.2.3/8".parse().unwrap();
        assert_eq!(net.to_string(), "10.0.0.0/8");
        assert!(net.contains(Ipv4Addr::new(10, 255, 0, 1)));
        assert!(!net.contains(Ipv4Addr::new(11, 0, 0, 1)));
        assert!("0.0.0.0/0".parse::<Ipv4Net>().unwrap().contains(Ipv4Addr::BROADCAST));
        assert!("10.0.0.0/33".parse::<Ipv4Net>().is_err());
    }
}
