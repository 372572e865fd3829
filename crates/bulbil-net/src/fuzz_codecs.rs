//! Random bytes through every reader of guest bytes: nothing panics.

use crate::codec::{arp::ArpRequest, dhcp, dns, ethernet, icmp, ipv4::Ipv4, resolv, tcp::Segment, udp::Udp};
use crate::config::LinkConfig;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, seed: &[u8]) -> Vec<u8> {
        let len = usize::try_from(self.next() % 400).unwrap();
        let mut bytes: Vec<u8> = (0..len).map(|_| self.next().to_le_bytes()[0]).collect();
        let keep = usize::try_from(self.next() % 64).unwrap().min(len).min(seed.len());
        bytes[..keep].copy_from_slice(&seed[..keep]);
        bytes
    }
}

fn read_everything(bytes: &[u8], config: &LinkConfig) {
    let _frame = ethernet::Ethernet::parse(bytes);
    let _split = ethernet::split_frame(bytes);
    let _arp = ArpRequest::parse(bytes).map(|request| request.reply());
    let _ip = Ipv4::parse(bytes);
    let _udp = Udp::parse(bytes);
    let _segment = Segment::parse(bytes);
    let _echo = icmp::is_echo_request(bytes);
    let _text = resolv::parse_resolv_conf(&String::from_utf8_lossy(bytes));
    if let Some(message) = dhcp::Message::parse(bytes) {
        let _reply = dhcp::Server { config }.answer(&message);
    }
    if let Some(query) = dns::Query::parse(bytes) {
        let _answer = dns::LocalZone::new(config).answer(&query);
    }
}

#[test]
fn random_bytes_never_panic() {
    let seed = 0x9e37_79b9_7f4a_7c15;
    println!("seed {seed:#x}");
    let mut random = Random(seed);
    let config = LinkConfig::new([2; 6], "web");
    let mut dhcp = vec![1, 1, 6, 0];
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 3]);
    let dns = [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3, b'w', b'e', b'b', 0, 0, 1, 0, 1];
    for _ in 0..40_000 {
        for start in [&[][..], &[0x45, 0, 0, 40], &dns, &[0, 1, 8, 0, 6, 4, 0, 1]] {
            read_everything(&random.bytes(start), &config);
        }
        let mut message = dhcp.clone();
        message.extend(random.bytes(&[50, 4, 10, 0, 2, 15]));
        read_everything(&message, &config);
    }
}
