//! What a guest may learn about its instance: the input of every tree.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use bulbil_types::{Architecture, ImageId, InstanceId, Personality};
use bytes::Bytes;

/// Whether a session token is demanded (AWS `HttpTokens`, Alibaba `HttpTokens`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenMode {
    /// Requests with and without a token are answered; a wrong token is refused all the same.
    ///
    /// The default, because no cloud-init before 23.2 speaks tokens to Alibaba's tree, no
    /// Cloudbase-Init speaks them at all, and NoCloud has none.
    #[default]
    Optional,
    /// Requests without a valid token are refused.
    ///
    /// The `nocloud` dialect has no tokens: with this mode its HTTP tree refuses everything and
    /// only the seed disk remains.
    Required,
}

/// The hop limit is outside 1..=64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("hop limit {0} is not between 1 and 64")]
pub struct HopLimitError(u8);

/// The IP time-to-live of answers that carry a token: 1..=64.
///
/// AWS: `HttpPutResponseHopLimit` in "Configure the instance metadata options". The default is 2,
/// the value AWS gives to images marked `imds-support: v2.0`, so that a container on a bridge
/// inside the guest still gets a token and a machine behind the guest does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "u8")]
pub struct HopLimit(u8);

impl HopLimit {
    /// Checks the range.
    ///
    /// # Errors
    /// If `hops` is not between 1 and 64.
    pub fn new(hops: u8) -> Result<Self, HopLimitError> {
        if (1..=64).contains(&hops) { Ok(Self(hops)) } else { Err(HopLimitError(hops)) }
    }

    /// The number of hops.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for HopLimit {
    fn default() -> Self {
        Self(2)
    }
}

impl TryFrom<u8> for HopLimit {
    type Error = HopLimitError;

    fn try_from(hops: u8) -> Result<Self, Self::Error> {
        Self::new(hops)
    }
}

/// The text is not an IPv4 network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an IPv4 network of the form `10.0.0.0/16`")]
pub struct ParseCidrError(String);

/// An IPv4 network, for example `10.0.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Ipv4Cidr {
    network: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Cidr {
    /// The network that `address` lies in when the first `prefix` bits name it.
    ///
    /// Prefixes above 32 count as 32.
    #[must_use]
    pub fn containing(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { network: Ipv4Addr::from_bits(address.to_bits() & mask_bits(prefix)), prefix }
    }

    /// The netmask, for example `255.255.0.0`.
    #[must_use]
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask_bits(self.prefix))
    }
}

fn mask_bits(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Ipv4Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseCidrError(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(error)?;
        let address: Ipv4Addr = address.parse().map_err(|_| error())?;
        let prefix: u8 = prefix.parse().map_err(|_| error())?;
        if prefix <= 32 { Ok(Self::containing(address, prefix)) } else { Err(error()) }
    }
}

impl TryFrom<String> for Ipv4Cidr {
    type Error = ParseCidrError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// An SSH public key and the name it was registered under.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct PublicKey {
    /// The name of the key pair.
    pub name: String,
    /// The key as one line of `authorized_keys`.
    pub openssh: String,
}

/// Everything about an instance that its metadata says.
///
/// [`InstanceView::new`] fills in defaults; the fields are public so that a caller sets what it
/// knows. `Debug` shows neither user data nor vendor data, only their sizes.
#[derive(Clone)]
pub struct InstanceView {
    /// The instance.
    pub instance_id: InstanceId,
    /// The image it was launched from.
    pub image_id: ImageId,
    /// For example `t3.micro`.
    pub instance_type: String,
    /// The full local host name, for example `web.local-1.compute.internal`.
    pub hostname: String,
    /// The name the user gave (Alibaba `instance/instance-name`).
    pub name: String,
    /// The owner's account number (12 digits).
    pub owner_id: String,
    /// The launch request this instance belongs to, `r-…`.
    pub reservation_id: String,
    /// For example `local-1`.
    pub region: String,
    /// The zone's name, for example `local-1a`.
    pub zone: String,
    /// The zone's id, for example `loc1-az1`.
    pub zone_id: String,
    /// The address of the first network interface.
    pub local_ipv4: Ipv4Addr,
    /// An address from which the instance can be reached from outside, if there is one.
    pub public_ipv4: Option<Ipv4Addr>,
    /// The guest's own MAC address: cloud-init finds the interface by it.
    pub mac: [u8; 6],
    /// The default router.
    pub gateway: Ipv4Addr,
    /// DNS servers (Alibaba `dns-conf/nameservers`); empty means the gateway.
    pub nameservers: Vec<Ipv4Addr>,
    /// NTP servers (Alibaba `ntp-conf/ntp-servers`); not listed when empty.
    pub ntp_servers: Vec<String>,
    /// The subnet.
    pub subnet_cidr: Ipv4Cidr,
    /// The network around it.
    pub vpc_cidr: Ipv4Cidr,
    /// `vpc-…`
    pub vpc_id: String,
    /// `subnet-…`; Alibaba's `vsw-…` has the same digits.
    pub subnet_id: String,
    /// `eni-…`
    pub interface_id: String,
    /// `sg-…`
    pub security_group_id: String,
    /// The security group's name.
    pub security_group_name: String,
    /// The index among the instances of one launch request.
    pub launch_index: u32,
    /// When it was launched, in seconds since 1970-01-01 UTC.
    pub launched_at: u64,
    /// SSH keys for the default user.
    pub public_keys: Vec<PublicKey>,
    /// User data as it was given: bytes, never decoded.
    pub user_data: Option<Bytes>,
    /// Vendor data; the `ec2` dialect has no place for it.
    pub vendor_data: Option<Bytes>,
    /// Tags in the order they were given.
    pub tags: Vec<(String, String)>,
    /// Whether the guest sees the tags (AWS, Alibaba: `InstanceMetadataTags`).
    pub tags_shown: bool,
    /// For example `/dev/vda`.
    pub root_device_name: String,
    /// The processor architecture.
    pub architecture: Architecture,
    /// Which cloud the guest sees.
    pub personality: Personality,
    /// Whether session tokens are demanded.
    pub token_mode: TokenMode,
    /// The IP time-to-live of answers with a token.
    pub hop_limit: HopLimit,
    /// `false`: every request is refused with 403 (AWS, Alibaba: `HttpEndpoint`).
    pub endpoint_enabled: bool,
}

impl InstanceView {
    /// A view with everything but identity and address set to defaults.
    ///
    /// Ids of network, subnet, interface, security group and reservation are derived from the
    /// instance id, so they stay the same for as long as the instance exists.
    #[must_use]
    pub fn new(instance_id: InstanceId, image_id: ImageId, mac: [u8; 6], local_ipv4: Ipv4Addr) -> Self {
        let subnet_cidr = Ipv4Cidr::containing(local_ipv4, 24);
        Self {
            image_id,
            instance_type: "t3.micro".to_owned(),
            hostname: format!("ip-{}", local_ipv4.to_string().replace('.', "-")),
            name: instance_id.to_string(),
            owner_id: "000000000000".to_owned(),
            reservation_id: derived_id("r", &instance_id),
            region: "local-1".to_owned(),
            zone: "local-1a".to_owned(),
            zone_id: "loc1-az1".to_owned(),
            local_ipv4,
            public_ipv4: None,
            mac,
            gateway: Ipv4Addr::from_bits(subnet_cidr.network.to_bits() | 1),
            nameservers: Vec::new(),
            ntp_servers: Vec::new(),
            subnet_cidr,
            vpc_cidr: Ipv4Cidr::containing(local_ipv4, 16),
            vpc_id: derived_id("vpc", &instance_id),
            subnet_id: derived_id("subnet", &instance_id),
            interface_id: derived_id("eni", &instance_id),
            security_group_id: derived_id("sg", &instance_id),
            security_group_name: "default".to_owned(),
            launch_index: 0,
            launched_at: 0,
            public_keys: Vec::new(),
            user_data: None,
            vendor_data: None,
            tags: Vec::new(),
            tags_shown: false,
            root_device_name: "/dev/vda".to_owned(),
            architecture: Architecture::X86_64,
            personality: Personality::Ec2,
            token_mode: TokenMode::Optional,
            hop_limit: HopLimit::default(),
            endpoint_enabled: true,
            instance_id,
        }
    }

    /// The MAC address in lower case, as cloud-init compares it with the interface's own.
    #[must_use]
    pub fn mac_text(&self) -> String {
        let [a, b, c, d, e, f] = self.mac;
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }

    /// The SSH keys, one line each, under names that are unique and safe in a listing.
    ///
    /// cloud-init keeps the keys of a listing in a map by name, so of two keys with one name it
    /// would install only the second; and it takes a name that ends in `/` for a directory.
    pub(crate) fn listed_keys(&self) -> Vec<PublicKey> {
        let lines =
            self.public_keys.iter().flat_map(|key| key.openssh.lines().map(move |line| (&key.name, line.trim())));
        let mut keys: Vec<PublicKey> = Vec::new();
        for (name, line) in lines.filter(|(_, line)| !line.is_empty()) {
            let name = unique_name(&segment_name(name), &keys);
            keys.push(PublicKey { name, openssh: line.to_owned() });
        }
        keys
    }

    /// The tags a listing can hold, if the guest may see tags.
    pub(crate) fn listed_tags(&self) -> impl Iterator<Item = (&str, &str)> {
        let tags = if self.tags_shown { self.tags.as_slice() } else { &[] };
        tags.iter().filter(|(key, _)| is_tag_key_shown(key)).map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

impl fmt::Debug for InstanceView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstanceView")
            .field("instance_id", &self.instance_id)
            .field("image_id", &self.image_id)
            .field("personality", &self.personality)
            .field("hostname", &self.hostname)
            .field("local_ipv4", &self.local_ipv4)
            .field("mac", &self.mac_text())
            .field("token_mode", &self.token_mode)
            .field("endpoint_enabled", &self.endpoint_enabled)
            .field("user_data_len_bytes", &self.user_data.as_ref().map(Bytes::len))
            .field("vendor_data_len_bytes", &self.vendor_data.as_ref().map(Bytes::len))
            .finish_non_exhaustive()
    }
}

/// Whether a tag with this key can be shown in instance metadata.
///
/// AWS, "Access to instance tags in the instance metadata": letters, digits and `+ - = . , _ : @`,
/// no space and no `/`, and not `.`, `..` or `_index`. One more kind is left out: in `12=x` or `-1=x`
/// cloud-init reads the entry of a list of SSH keys, asks for `12/openssh-key`, and on the 404
/// throws the whole tree away.
#[must_use]
pub fn is_tag_key_shown(key: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-=.,_:@".contains(c);
    let shape = !key.is_empty() && key.len() <= 128 && key.chars().all(allowed);
    shape && ![".", "..", "_index"].contains(&key) && !looks_like_key_entry(key)
}

/// Whether Python's `int()` could accept what stands before the first `=`.
fn looks_like_key_entry(key: &str) -> bool {
    let Some((before, _)) = key.split_once('=') else { return false };
    let digits = before.trim_start_matches(['+', '-']);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'_')
}

fn segment_name(name: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || "-_.@:+".contains(c) { c } else { '-' };
    let name: String = name.chars().take(128).map(keep).collect();
    if name.trim_matches('.').is_empty() { "key".to_owned() } else { name }
}

fn unique_name(name: &str, taken: &[PublicKey]) -> String {
    let is_free = |candidate: &str| taken.iter().all(|key| key.name != candidate);
    if is_free(name) {
        return name.to_owned();
    }
    // One of `taken.len() + 1` different candidates is free.
    let mut candidates = (2..=taken.len() + 2).map(|n| format!("{name}-{n}"));
    candidates.find(|candidate| is_free(candidate)).unwrap_or_else(|| format!("{name}-{}", taken.len() + 3))
}

/// An id of the given kind that always comes out the same for one instance.
fn derived_id(prefix: &str, instance_id: &InstanceId) -> String {
    let material = format!("{prefix}\n{instance_id}");
    let hash = blake3::Hash::from(blake3::derive_key(
        "bulbil-metadata 2026 ids derived from an instance id",
        material.as_bytes(),
    ));
    let digits: String = hash.to_hex().chars().take(17).collect();
    format!("{prefix}-{digits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> InstanceView {
        let instance_id = "i-0123456789abcdef0".parse().unwrap();
        let image_id = "ami-0fedcba9876543210".parse().unwrap();
        InstanceView::new(instance_id, image_id, [0x52, 0x54, 0, 0xAB, 0xCD, 1], Ipv4Addr::new(10, 0, 0, 15))
    }

    #[test]
    fn debug_shows_no_user_data() {
        let mut view = view();
        view.user_data = Some(Bytes::from_static(b"password: hunter2"));
        view.vendor_data = Some(Bytes::from_static(b"hunter3"));
        let text = format!("{view:?}");
        assert!(!text.contains("hunter"), "{text}");
        assert!(text.contains("user_data_len_bytes: Some(17)"), "{text}");
    }

    #[test]
    fn derived_ids_are_stable_and_differ_between_instances() {
        assert_eq!(view().vpc_id, view().vpc_id);
        let other = InstanceView::new(InstanceId::random(), ImageId::random(), [2; 6], Ipv4Addr::LOCALHOST);
        assert_ne!(view().vpc_id, other.vpc_id);
        assert_eq!(view().vpc_id.len(), "vpc-".len() + 17);
    }

    #[test]
    fn networks_parse_and_give_their_mask() {
        let cidr: Ipv4Cidr = "10.1.2.3/20".parse().unwrap();
        assert_eq!(cidr.to_string(), "10.1.0.0/20");
        assert_eq!(cidr.netmask(), Ipv4Addr::new(255, 255, 240, 0));
        assert_eq!("0.0.0.0/0".parse::<Ipv4Cidr>().unwrap().netmask(), Ipv4Addr::UNSPECIFIED);
        for text in ["10.0.0.0", "10.0.0.0/33", "10.0.0/8", "/8", "10.0.0.0/-1"] {
            assert!(text.parse::<Ipv4Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn hop_limits_are_1_to_64() {
        assert_eq!(HopLimit::default().get(), 2);
        assert!(HopLimit::new(0).is_err() && HopLimit::new(65).is_err());
        assert!(HopLimit::new(1).is_ok() && HopLimit::new(64).is_ok());
    }

    #[test]
    fn key_names_become_unique_safe_segments() {
        let mut view = view();
        let key = |name: &str, line: &str| PublicKey { name: name.to_owned(), openssh: line.to_owned() };
        view.public_keys = vec![
            key("me", "ssh-ed25519 A"),
            key("me", "ssh-ed25519 B\n\nssh-ed25519 C\r\n"),
            key("x/", "D"),
            key("..", "E"),
        ];
        let names: Vec<String> = view.listed_keys().into_iter().map(|key| key.name).collect();
        assert_eq!(names, ["me", "me-2", "me-3", "x-", "key"]);
    }

    #[test]
    fn tag_keys_a_listing_cannot_hold_are_left_out() {
        for key in ["Name", "a=b", "aws:cloud", "env.prod", "a_1", "x=1", "=1"] {
            assert!(is_tag_key_shown(key), "{key}");
        }
        for key in ["", "a b", "a/b", ".", "..", "_index", "0=x", "+12=x", "-1=x", "1_0=x", "a\nb", "é"] {
            assert!(!is_tag_key_shown(key), "{key}");
        }
    }
}
