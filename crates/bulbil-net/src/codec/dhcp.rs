//! DHCP, the server's side for one client and one address (RFC 2131, 2132, 3442).
//!
//! The link knows its guest, so there is no pool and nothing to remember: every question is answered from
//! the configuration. [`Server::answer`] is the whole decision.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::ethernet::{BROADCAST_MAC, Mac};
use super::{array, be16, ipv4_at};
use crate::config::LinkConfig;
use crate::limits::LEASE;

pub(crate) const SERVER_PORT: u16 = 67;
pub(crate) const CLIENT_PORT: u16 = 68;

const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Bytes before the options, cookie included.
const FIXED_BYTES: usize = 240;
/// Old clients refuse anything shorter.
const MIN_REPLY_BYTES: usize = 300;
/// What a client that names no size must be able to take, without IP and UDP headers.
const DEFAULT_MAX_BYTES: usize = 576 - 28;
/// Options looked at in one message.
const MAX_OPTIONS: usize = 128;
const BROADCAST_FLAG: u16 = 0x8000;

mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const DOMAIN: u8 = 15;
    pub(super) const MTU: u8 = 26;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED_IP: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_ID: u8 = 54;
    pub(super) const MAX_SIZE: u8 = 57;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const ROUTES: u8 = 121;
    pub(super) const END: u8 = 255;
}

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    Discover,
    Request,
    Inform,
    /// Decline or release: nothing is answered.
    Goodbye,
}

/// What the server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Offer = 2,
    Ack = 5,
    Nak = 6,
}

/// A client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    ask: Ask,
    transaction: [u8; 4],
    flags: u16,
    client_ip: Ipv4Addr,
    relay_ip: Ipv4Addr,
    client_mac: Mac,
    requested_ip: Option<Ipv4Addr>,
    server_id: Option<Ipv4Addr>,
    max_bytes: usize,
}

impl Message {
    /// Reads a client's message for an Ethernet address; anything else is `None`.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let ethernet = bytes.get(..3)? == [BOOT_REQUEST, 1, 6];
        if !ethernet || array::<4>(bytes, FIXED_BYTES - 4)? != COOKIE {
            return None;
        }
        let options = Options { rest: bytes.get(FIXED_BYTES..)?, left: MAX_OPTIONS };
        let find = |wanted: u8| options.clone().find(|(code, _)| *code == wanted).map(|(_, value)| value);
        let address = |wanted: u8| find(wanted).and_then(|value| ipv4_at(value, 0));
        let ask = match find(option::MESSAGE_TYPE)? {
            [1] => Ask::Discover,
            [3] => Ask::Request,
            [4 | 7] => Ask::Goodbye,
            [8] => Ask::Inform,
            _ => return None,
        };
        let max_size = find(option::MAX_SIZE).and_then(|value| be16(value, 0)).map(usize::from);
        Some(Self {
            ask,
            transaction: array(bytes, 4)?,
            flags: be16(bytes, 10)?,
            client_ip: ipv4_at(bytes, 12)?,
            relay_ip: ipv4_at(bytes, 24)?,
            client_mac: array(bytes, 28)?,
            requested_ip: address(option::REQUESTED_IP),
            server_id: address(option::SERVER_ID),
            max_bytes: max_size.map_or(DEFAULT_MAX_BYTES, |size| size.saturating_sub(28)).max(DEFAULT_MAX_BYTES),
        })
    }
}

/// The options of a message, up to the end mark, a cut-off option or the limit.
#[derive(Clone)]
struct Options<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        while let [option::PAD, rest @ ..] = self.rest {
            self.rest = rest;
        }
        let [code, len, rest @ ..] = self.rest else { return None };
        if *code == option::END || self.left == 0 {
            return None;
        }
        let (value, rest) = rest.split_at_checked(usize::from(*len))?;
        self.rest = rest;
        self.left -= 1;
        Some((*code, value))
    }
}

/// An answer and where to send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) verdict: Verdict,
    pub(crate) mac: Mac,
    pub(crate) destination: SocketAddrV4,
    pub(crate) payload: Vec<u8>,
}

/// The server of one link.
#[derive(Debug)]
pub(crate) struct Server<'a> {
    pub(crate) config: &'a LinkConfig,
}

impl Server<'_> {
    /// The answer to `message`, or `None` when the protocol wants silence: another client's message, a
    /// relayed one, one for another server, or a goodbye.
    pub(crate) fn answer(&self, message: &Message) -> Option<Reply> {
        let relayed = !message.relay_ip.is_unspecified();
        if relayed || message.client_mac != self.config.guest_mac {
            return None;
        }
        match message.ask {
            Ask::Goodbye => None,
            Ask::Discover => Some(self.reply(message, Verdict::Offer)),
            Ask::Inform => Some(self.reply(message, Verdict::Ack)),
            Ask::Request => self.answer_request(message),
        }
    }

    fn answer_request(&self, message: &Message) -> Option<Reply> {
        if message.server_id.is_some_and(|id| id != self.config.gateway_ip) {
            return None;
        }
        let wanted = message.requested_ip.unwrap_or(message.client_ip);
        let verdict = if wanted == self.config.guest_ip { Verdict::Ack } else { Verdict::Nak };
        Some(self.reply(message, verdict))
    }

    fn reply(&self, message: &Message, verdict: Verdict) -> Reply {
        let (mac, ip) = self.destination(message, verdict);
        Reply { verdict, mac, destination: SocketAddrV4::new(ip, CLIENT_PORT), payload: self.payload(message, verdict) }
    }

    /// RFC 2131 section 4.1: a refusal and whoever asks for it by broadcast, the others by unicast, though
    /// they may not have the address yet.
    fn destination(&self, message: &Message, verdict: Verdict) -> (Mac, Ipv4Addr) {
        let has_address = message.client_ip == self.config.guest_ip;
        if verdict == Verdict::Nak || (!has_address && message.flags & BROADCAST_FLAG != 0) {
            return (BROADCAST_MAC, Ipv4Addr::BROADCAST);
        }
        (self.config.guest_mac, self.config.guest_ip)
    }

    fn payload(&self, message: &Message, verdict: Verdict) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_BYTES];
        bytes[..3].copy_from_slice(&[BOOT_REPLY, 1, 6]);
        bytes[4..8].copy_from_slice(&message.transaction);
        bytes[10..12].copy_from_slice(&message.flags.to_be_bytes());
        if verdict != Verdict::Nak {
            bytes[12..16].copy_from_slice(&message.client_ip.octets());
        }
        if verdict != Verdict::Nak && message.ask != Ask::Inform {
            bytes[16..20].copy_from_slice(&self.config.guest_ip.octets());
        }
        bytes[28..34].copy_from_slice(&message.client_mac);
        bytes[FIXED_BYTES - 4..].copy_from_slice(&COOKIE);
        let mut writer = OptionWriter { bytes, limit: message.max_bytes - 1 };
        self.write_options(&mut writer, message, verdict);
        let mut bytes = writer.bytes;
        bytes.push(option::END);
        bytes.resize(bytes.len().max(MIN_REPLY_BYTES), 0);
        bytes
    }

    /// What a client cannot do without comes first: the writer leaves out what no longer fits.
    fn write_options(&self, writer: &mut OptionWriter, message: &Message, verdict: Verdict) {
        let config = self.config;
        writer.put(option::MESSAGE_TYPE, &[verdict as u8]);
        writer.put(option::SERVER_ID, &config.gateway_ip.octets());
        if verdict == Verdict::Nak {
            return;
        }
        if message.ask != Ask::Inform {
            let lease = u32::try_from(LEASE.as_secs()).unwrap_or(u32::MAX);
            writer.put(option::LEASE, &lease.to_be_bytes());
            writer.put(option::RENEWAL, &(lease / 2).to_be_bytes());
            writer.put(option::REBINDING, &(lease / 8 * 7).to_be_bytes());
        }
        writer.put(option::MASK, &config.network().netmask().octets());
        writer.put(option::ROUTER, &config.gateway_ip.octets());
        writer.put(option::ROUTES, &routes(config));
        writer.put(option::DNS, &config.dns_ip.octets());
        writer.put(option::MTU, &config.mtu.to_be_bytes());
        writer.put(option::BROADCAST, &config.network().broadcast().octets());
        writer.put(option::HOST_NAME, config.hostname.as_bytes());
        if let Some(domain) = &config.domain {
            writer.put(option::DOMAIN, domain.as_bytes());
        }
    }
}

/// Classless static routes: one to each metadata address, and the default route, since a client that
/// understands this option must not look at the router option.
fn routes(config: &LinkConfig) -> Vec<u8> {
    let gateway = config.gateway_ip.octets();
    let mut bytes = Vec::new();
    for ip in config.metadata_v4() {
        bytes.push(32);
        bytes.extend(ip.octets());
        bytes.extend(gateway);
    }
    bytes.push(0);
    bytes.extend(gateway);
    bytes
}

struct OptionWriter {
    bytes: Vec<u8>,
    limit: usize,
}

impl OptionWriter {
    /// Appends an option, unless it is too long or no longer fits what the client can take.
    fn put(&mut self, code: u8, value: &[u8]) {
        let Ok(len) = u8::try_from(value.len()) else { return };
        if self.bytes.len() + 2 + value.len() > self.limit {
            return;
        }
        self.bytes.extend([code, len]);
        self.bytes.extend_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];
    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    fn config() -> LinkConfig {
        LinkConfig::new(MAC, "web")
    }

    /// A message as a client writes it.
    fn client(kind: u8, edit: impl FnOnce(&mut Vec<u8>), options: &[u8]) -> Message {
        let mut bytes = vec![0; FIXED_BYTES];
        bytes[..3].copy_from_slice(&[BOOT_REQUEST, 1, 6]);
        bytes[4..8].copy_from_slice(&[1, 2, 3, 4]);
        bytes[28..34].copy_from_slice(&MAC);
        bytes[FIXED_BYTES - 4..].copy_from_slice(&COOKIE);
        edit(&mut bytes);
        bytes.extend([option::MESSAGE_TYPE, 1, kind]);
        bytes.extend(options);
        bytes.push(option::END);
        Message::parse(&bytes).unwrap()
    }

    fn answer(message: &Message) -> Option<Reply> {
        Server { config: &config() }.answer(message)
    }

    fn option_of(reply: &Reply, wanted: u8) -> Option<Vec<u8>> {
        let mut options = Options { rest: &reply.payload[FIXED_BYTES..], left: MAX_OPTIONS };
        options.find(|(code, _)| *code == wanted).map(|(_, value)| value.to_vec())
    }

    #[test]
    fn discover_is_offered_the_one_address_with_everything() {
        let reply = answer(&client(1, |_| (), &[])).unwrap();
        assert_eq!(reply.verdict, Verdict::Offer);
        assert_eq!(reply.payload[16..20], GUEST.octets());
        assert_eq!((reply.mac, *reply.destination.ip()), (MAC, GUEST));
        assert_eq!(option_of(&reply, option::MASK).unwrap(), [255, 255, 255, 0]);
        assert_eq!(option_of(&reply, option::ROUTER).unwrap(), [10, 0, 2, 2]);
        assert_eq!(option_of(&reply, option::DNS).unwrap(), [10, 0, 2, 3]);
        assert_eq!(option_of(&reply, option::HOST_NAME).unwrap(), b"web");
        assert_eq!(option_of(&reply, option::MTU).unwrap(), [5, 220]);
        assert_eq!(option_of(&reply, option::LEASE).unwrap(), 86_400u32.to_be_bytes());
        assert!(reply.payload.len() >= MIN_REPLY_BYTES);
    }

    #[test]
    fn routes_lead_to_metadata_and_everywhere_through_the_gateway() {
        let reply = answer(&client(1, |_| (), &[])).unwrap();
        let expected = [
            &[32, 169, 254, 169, 254, 10, 0, 2, 2][..],
            &[32, 100, 100, 100, 200, 10, 0, 2, 2],
            &[32, 169, 254, 0, 23, 10, 0, 2, 2],
            &[0, 10, 0, 2, 2],
        ];
        assert_eq!(option_of(&reply, option::ROUTES).unwrap(), expected.concat());
    }

    #[test]
    fn broadcast_flag_is_honoured_until_the_client_has_its_address() {
        let broadcast = |bytes: &mut Vec<u8>| bytes[10] = 0x80;
        let reply = answer(&client(1, broadcast, &[])).unwrap();
        assert_eq!((reply.mac, *reply.destination.ip()), (BROADCAST_MAC, Ipv4Addr::BROADCAST));
        let renewing = |bytes: &mut Vec<u8>| {
            bytes[10] = 0x80;
            bytes[12..16].copy_from_slice(&GUEST.octets());
        };
        let reply = answer(&client(3, renewing, &[])).unwrap();
        assert_eq!((reply.verdict, *reply.destination.ip()), (Verdict::Ack, GUEST));
    }

    #[test]
    fn request_for_the_lease_is_acknowledged_in_every_state() {
        let requested = [option::REQUESTED_IP, 4, 10, 0, 2, 15];
        let selecting = [&requested[..], &[option::SERVER_ID, 4, 10, 0, 2, 2]].concat();
        for options in [&requested[..], &selecting] {
            assert_eq!(answer(&client(3, |_| (), options)).unwrap().verdict, Verdict::Ack);
        }
    }

    #[test]
    fn request_for_another_address_is_refused_by_broadcast() {
        let reply = answer(&client(3, |_| (), &[option::REQUESTED_IP, 4, 192, 168, 1, 7])).unwrap();
        assert_eq!((reply.verdict, reply.mac), (Verdict::Nak, BROADCAST_MAC));
        assert_eq!(reply.payload[16..20], [0; 4]);
        assert_eq!(option_of(&reply, option::LEASE), None);
        assert_eq!(answer(&client(3, |_| (), &[])).unwrap().verdict, Verdict::Nak);
    }

    #[test]
    fn request_to_another_server_and_goodbyes_are_not_answered() {
        let other = [option::REQUESTED_IP, 4, 10, 0, 2, 15, option::SERVER_ID, 4, 10, 0, 2, 9];
        assert_eq!(answer(&client(3, |_| (), &other)), None);
        assert_eq!(answer(&client(4, |_| (), &[])), None);
        assert_eq!(answer(&client(7, |_| (), &[])), None);
    }

    #[test]
    fn another_client_or_a_relay_is_not_answered() {
        assert_eq!(answer(&client(1, |bytes| bytes[33] = 9, &[])), None);
        assert_eq!(answer(&client(1, |bytes| bytes[24] = 9, &[])), None);
    }

    #[test]
    fn inform_is_told_everything_but_a_lease() {
        let reply = answer(&client(8, |bytes| bytes[12..16].copy_from_slice(&GUEST.octets()), &[])).unwrap();
        assert_eq!(reply.verdict, Verdict::Ack);
        assert_eq!(reply.payload[16..20], [0; 4]);
        assert_eq!(option_of(&reply, option::LEASE), None);
        assert!(option_of(&reply, option::DNS).is_some());
    }

    #[test]
    fn small_client_loses_names_but_no_routes() {
        let config = LinkConfig { domain: Some("d".repeat(63)), hostname: ["h"; 90].join("."), ..config() };
        let reply = Server { config: &config }.answer(&client(1, |_| (), &[])).unwrap();
        assert!(reply.payload.len() <= DEFAULT_MAX_BYTES);
        assert!(option_of(&reply, option::ROUTES).is_some());
    }

    #[test]
    fn cut_off_options_end_the_list() {
        let mut bytes = vec![0; FIXED_BYTES];
        bytes[..3].copy_from_slice(&[BOOT_REQUEST, 1, 6]);
        bytes[FIXED_BYTES - 4..].copy_from_slice(&COOKIE);
        bytes.extend([option::MESSAGE_TYPE, 200, 1]);
        assert_eq!(Message::parse(&bytes), None);
    }
}
