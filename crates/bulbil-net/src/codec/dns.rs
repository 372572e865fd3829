//! DNS messages, as far as a relay reads them (RFC 1035), and the names a link answers itself.

use std::net::{IpAddr, Ipv4Addr};

use super::{be16, len16};
use crate::config::{Ipv4Net, LinkConfig};

pub(crate) const PORT: u16 = 53;

const HEADER_BYTES: usize = 12;
const MAX_NAME_BYTES: usize = 255;
const MAX_LABEL_BYTES: usize = 63;
/// Seconds a local answer may be kept.
const TTL_S: u32 = 30;

const FLAG_RESPONSE: u16 = 0x8000;
const FLAG_TRUNCATED: u16 = 0x0200;
const FLAG_RECURSION_DESIRED: u16 = 0x0100;
const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
const MASK_OPCODE: u16 = 0x7800;

const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_AAAA: u16 = 28;
const TYPE_HTTPS: u16 = 65;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;

/// A response code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rcode {
    NoError = 0,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
}

/// A record of a local answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Address(Ipv4Addr),
    /// The name an address belongs to.
    Name(String),
}

/// A question: one name, as clients send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Query<'a> {
    id: u16,
    flags: u16,
    /// Lower case, labels joined by dots, no final dot.
    name: String,
    kind: u16,
    class: u16,
    /// The question as it stood in the message.
    question: &'a [u8],
}

impl<'a> Query<'a> {
    /// Reads a question; an answer, or anything but one whole question first, is `None`.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let flags = be16(bytes, 2)?;
        if flags & FLAG_RESPONSE != 0 || be16(bytes, 4)? != 1 {
            return None;
        }
        let (name, end) = read_name(bytes, HEADER_BYTES)?;
        Some(Self {
            id: be16(bytes, 0)?,
            flags,
            name,
            kind: be16(bytes, end)?,
            class: be16(bytes, end + 2)?,
            question: bytes.get(HEADER_BYTES..end + 4)?,
        })
    }

    fn asks(&self, kind: u16) -> bool {
        self.kind == kind || self.kind == TYPE_ANY
    }

    /// Whether it asks for addresses, in the ways a stub resolver does.
    fn asks_for_address(&self) -> bool {
        matches!(self.kind, TYPE_A | TYPE_AAAA | TYPE_HTTPS | TYPE_ANY)
    }

    /// An answer of the link's own, for this question only.
    pub(crate) fn respond(&self, rcode: Rcode, records: &[Record]) -> Vec<u8> {
        self.message(rcode as u16, records)
    }

    /// The answer that sends the client to TCP.
    pub(crate) fn respond_truncated(&self) -> Vec<u8> {
        self.message(FLAG_TRUNCATED, &[])
    }

    fn message(&self, flags: u16, records: &[Record]) -> Vec<u8> {
        let kept = self.flags & (MASK_OPCODE | FLAG_RECURSION_DESIRED);
        let flags = flags | kept | FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE;
        let mut bytes = Vec::with_capacity(512);
        for field in [self.id, flags, 1, len16(records.len()), 0, 0] {
            bytes.extend(field.to_be_bytes());
        }
        bytes.extend_from_slice(self.question);
        for record in records {
            write_record(&mut bytes, record);
        }
        bytes
    }
}

/// Reads a name without compression: its text and where it ends.
fn read_name(bytes: &[u8], start: usize) -> Option<(String, usize)> {
    let mut at = start;
    let mut name = String::new();
    loop {
        let len = usize::from(*bytes.get(at)?);
        let label = bytes.get(at + 1..at + 1 + len)?;
        at += 1 + len;
        if len == 0 {
            return Some((name, at));
        }
        if len > MAX_LABEL_BYTES || at - start >= MAX_NAME_BYTES {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
    }
}

fn write_record(bytes: &mut Vec<u8>, record: &Record) {
    let (kind, data) = match record {
        Record::Address(ip) => (TYPE_A, ip.octets().to_vec()),
        Record::Name(name) => (TYPE_PTR, name_bytes(name)),
    };
    // A pointer to the name of the question.
    bytes.extend([0xc0, 0x0c]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(CLASS_IN.to_be_bytes());
    bytes.extend(TTL_S.to_be_bytes());
    bytes.extend(len16(data.len()).to_be_bytes());
    bytes.extend(data);
}

/// A checked host name as labels.
fn name_bytes(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(0));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// Whether `answer` is a response to the message `query` (same id, response bit).
pub(crate) fn is_answer_to(query: &[u8], answer: &[u8]) -> bool {
    let response = be16(answer, 2).is_some_and(|flags| flags & FLAG_RESPONSE != 0);
    response && answer.len() >= HEADER_BYTES && be16(answer, 0) == be16(query, 0)
}

/// Whether `answer` shows that its sender resolves names: success, or a name that is not there.
pub(crate) fn is_useful(answer: &[u8]) -> bool {
    be16(answer, 2).is_some_and(|flags| matches!(flags & 0xf, 0 | 3))
}

/// The question for the root's name servers, sent to find out whether a resolver is there.
pub(crate) fn root_query(id: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(17);
    for field in [id, FLAG_RECURSION_DESIRED, 1, 0, 0, 0] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend([0, 0, 2, 0, 1]);
    bytes
}

/// The names a link answers by itself.
#[derive(Debug, Clone)]
pub(crate) struct LocalZone {
    hostname: String,
    full_name: Option<String>,
    guest_ip: Ipv4Addr,
    gateway_ip: Ipv4Addr,
    network: Ipv4Net,
    tencent: Option<Ipv4Addr>,
}

/// Tencent Cloud's metadata service by name, which its agents ask for.
const TENCENT_NAME: &str = "metadata.tencentyun.com";
const TENCENT_IP: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 23);

impl LocalZone {
    pub(crate) fn new(config: &LinkConfig) -> Self {
        let hostname = config.hostname.to_ascii_lowercase();
        let full_name = config.domain.as_ref().map(|domain| format!("{hostname}.{}", domain.to_ascii_lowercase()));
        Self {
            hostname,
            full_name,
            guest_ip: config.guest_ip,
            gateway_ip: config.gateway_ip,
            network: config.network(),
            tencent: config.metadata_ips.contains(&IpAddr::V4(TENCENT_IP)).then_some(TENCENT_IP),
        }
    }

    /// The link's own answer to `query`; `None` when the host's resolvers are to be asked.
    pub(crate) fn answer(&self, query: &Query<'_>) -> Option<Vec<u8>> {
        if query.flags & MASK_OPCODE != 0 {
            return Some(query.respond(Rcode::NotImp, &[]));
        }
        if query.class != CLASS_IN {
            return None;
        }
        if let Some(ip) = self.address_of(&query.name) {
            let records = if query.asks(TYPE_A) { vec![Record::Address(ip)] } else { Vec::new() };
            return Some(query.respond(Rcode::NoError, &records));
        }
        if let Some(ip) = reverse_name(&query.name)
            && (self.network.contains(ip) || ip.is_link_local() || ip.is_loopback())
        {
            return Some(self.answer_reverse(query, ip));
        }
        is_known_missing(query).then(|| query.respond(Rcode::NxDomain, &[]))
    }

    fn address_of(&self, name: &str) -> Option<Ipv4Addr> {
        match name {
            "localhost" => Some(Ipv4Addr::LOCALHOST),
            "gateway" | "_gateway" => Some(self.gateway_ip),
            TENCENT_NAME => self.tencent,
            name if name == self.hostname || Some(name) == self.full_name.as_deref() => Some(self.guest_ip),
            _ => None,
        }
    }

    fn answer_reverse(&self, query: &Query<'_>, ip: Ipv4Addr) -> Vec<u8> {
        let name = match ip {
            ip if ip == self.guest_ip => self.full_name.as_ref().unwrap_or(&self.hostname).clone(),
            ip if ip == self.gateway_ip => "gateway".to_owned(),
            _ => return query.respond(Rcode::NxDomain, &[]),
        };
        let records = if query.asks(TYPE_PTR) { vec![Record::Name(name)] } else { Vec::new() };
        query.respond(Rcode::NoError, &records)
    }
}

/// The address whose reverse name this is.
fn reverse_name(name: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut labels = name.strip_suffix(".in-addr.arpa")?.split('.');
    for octet in octets.iter_mut().rev() {
        *octet = labels.next()?.parse().ok()?;
    }
    labels.next().is_none().then_some(Ipv4Addr::from(octets))
}

/// Names that exist nowhere and cost a guest seconds where no resolver answers.
///
/// * cloud-init asks for `instance-data`, which a stranger in the same network once could answer
///   (LP 1040200), also with the search domains behind it.
/// * cloud-init asks for `does-not-exist.example.com`, `example.invalid` and a random lone label to find
///   out whether the resolver answers everything.
/// * No lone label has an address in the public tree; other record types of a top-level domain do exist.
fn is_known_missing(query: &Query<'_>) -> bool {
    let name = query.name.as_str();
    let last = name.rsplit('.').next().unwrap_or_default();
    let lone_label = !name.is_empty() && !name.contains('.');
    name == "instance-data"
        || name.starts_with("instance-data.")
        || name == "does-not-exist.example.com"
        || matches!(last, "invalid" | "localhost" | "localdomain")
        || (lone_label && query.asks_for_address())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        if name.is_empty() {
            bytes.push(0);
        } else {
            bytes.extend(name_bytes(name));
        }
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes
    }

    fn zone() -> LocalZone {
        let config = LinkConfig { domain: Some("Lan".into()), ..LinkConfig::new([2; 6], "Web") };
        LocalZone::new(&config)
    }

    /// The response code and the answers' bytes, or `None` when the question is relayed.
    fn check(name: &str, kind: u16, expected: Option<(u8, &[u8])>) {
        let bytes = question(name, kind);
        let answer = zone().answer(&Query::parse(&bytes).unwrap());
        let seen = answer.as_ref().map(|answer| {
            assert!(is_answer_to(&bytes, answer));
            let records = &answer[bytes.len()..];
            (answer[3] & 0xf, records.get(12..).unwrap_or_default())
        });
        assert_eq!(seen, expected, "{name} {kind}");
    }

    #[test]
    fn own_names_are_answered_without_regard_to_case() {
        check("WEB", TYPE_A, Some((0, &[10, 0, 2, 15])));
        check("web.lan", TYPE_A, Some((0, &[10, 0, 2, 15])));
        check("web", TYPE_AAAA, Some((0, &[])));
        check("_gateway", TYPE_A, Some((0, &[10, 0, 2, 2])));
        check("metadata.tencentyun.com", TYPE_A, Some((0, &[169, 254, 0, 23])));
    }

    #[test]
    fn tencent_name_is_relayed_when_its_address_is_not_served() {
        let config = LinkConfig { metadata_ips: Vec::new(), ..LinkConfig::new([2; 6], "web") };
        let bytes = question(TENCENT_NAME, TYPE_A);
        assert_eq!(LocalZone::new(&config).answer(&Query::parse(&bytes).unwrap()), None);
    }

    #[test]
    fn probes_of_cloud_init_do_not_exist() {
        for name in ["instance-data", "instance-data.", "instance-data.lan", "does-not-exist.example.com"] {
            check(name.trim_end_matches('.'), TYPE_A, Some((3, &[])));
        }
        check("example.invalid", TYPE_AAAA, Some((3, &[])));
        check("xkjhsdf", TYPE_A, Some((3, &[])));
    }

    #[test]
    fn other_names_are_relayed() {
        check("example.com", TYPE_A, None);
        check("com", 43, None);
        check("", 2, None);
        check("8.8.8.8.in-addr.arpa", TYPE_PTR, None);
    }

    #[test]
    fn reverse_names_of_the_network_are_answered() {
        check("15.2.0.10.in-addr.arpa", TYPE_PTR, Some((0, b"\x03web\x03lan\0")));
        check("99.2.0.10.in-addr.arpa", TYPE_PTR, Some((3, &[])));
        check("254.169.254.169.in-addr.arpa", TYPE_PTR, Some((3, &[])));
    }

    #[test]
    fn malformed_questions_are_refused() {
        let good = question("web", TYPE_A);
        for len in 0..good.len() {
            assert_eq!(Query::parse(&good[..len]), None);
        }
        let mut pointer = good.clone();
        pointer[12] = 0xc0;
        assert_eq!(Query::parse(&pointer), None);
        let mut answer = good.clone();
        answer[2] |= 0x80;
        assert_eq!(Query::parse(&answer), None);
        let long = question(&["a".repeat(63).as_str(); 5].join("."), TYPE_A);
        assert_eq!(Query::parse(&long), None);
    }
}
