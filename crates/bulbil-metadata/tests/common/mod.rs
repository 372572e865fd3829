//! An instance with every value set, and a client of the pure core.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(clippy::print_stdout, reason = "a random test says its seed")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bulbil_metadata::{InstanceView, PublicKey, Request, Response, Site, TokenStore, respond};
use bulbil_types::Personality;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

pub(crate) const EC2: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
pub(crate) const ALIBABA: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200));
pub(crate) const T0: Duration = Duration::from_secs(100);

pub(crate) const EC2_TOKEN: &str = "x-aws-ec2-metadata-token";
pub(crate) const EC2_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
pub(crate) const ALIBABA_TOKEN: &str = "x-aliyun-ecs-metadata-token";
pub(crate) const ALIBABA_TTL: &str = "x-aliyun-ecs-metadata-token-ttl-seconds";

/// An instance with a value in every place that has one.
pub(crate) fn full_view(personality: Personality) -> InstanceView {
    let instance_id = "i-0123456789abcdef0".parse().unwrap();
    let image_id = "ami-0fedcba9876543210".parse().unwrap();
    let mac = [0x52, 0x54, 0x00, 0xAB, 0xCD, 0x01];
    let key = |name: &str, openssh: &str| PublicKey { name: name.to_owned(), openssh: openssh.to_owned() };
    let tag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    InstanceView {
        personality,
        hostname: "web.local-1.compute.internal".to_owned(),
        name: "web".to_owned(),
        owner_id: "123456789012".to_owned(),
        launched_at: 1_795_327_855,
        public_ipv4: Some(Ipv4Addr::new(203, 0, 113, 9)),
        nameservers: vec![Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)],
        ntp_servers: vec!["ntp.example".to_owned()],
        public_keys: vec![
            key("me", "ssh-ed25519 AAAA me@host\n"),
            key("me", "ssh-rsa BBBB"),
            key("a/b\n", "ssh-rsa CCCC"),
        ],
        user_data: Some(Bytes::from_static(b"#cloud-config\n{}\n")),
        vendor_data: Some(Bytes::from_static(b"#cloud-config\nvendor: 1\n")),
        tags: vec![
            tag("Name", "web"),
            tag("a=b", "c"),
            tag("0=x", "left out"),
            tag("a b", "left out"),
            tag("+@:,", "odd"),
        ],
        tags_shown: true,
        ..InstanceView::new(instance_id, image_id, mac, Ipv4Addr::new(10, 0, 0, 15))
    }
}

/// An instance with as little as an instance can have.
pub(crate) fn bare_view(personality: Personality) -> InstanceView {
    let full = full_view(personality);
    InstanceView { personality, ..InstanceView::new(full.instance_id, full.image_id, full.mac, full.local_ipv4) }
}

pub(crate) fn address(personality: Personality) -> IpAddr {
    match personality {
        Personality::Alibaba => ALIBABA,
        Personality::Ec2 | Personality::NoCloud => EC2,
    }
}

/// A site, its tokens and a clock that stands still until it is told otherwise.
pub(crate) struct Guest {
    pub(crate) site: Site,
    pub(crate) tokens: TokenStore,
    pub(crate) now: Duration,
}

impl Guest {
    pub(crate) fn new(view: InstanceView) -> Self {
        Self { site: Site::new(view), tokens: TokenStore::new(), now: T0 }
    }

    pub(crate) fn at(&self, destination: IpAddr, method: &Method, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(name.parse::<HeaderName>().unwrap(), value);
        }
        respond(&Request { destination, method, path, headers: &map }, &self.site, &self.tokens, self.now)
    }

    pub(crate) fn ask(&self, method: &Method, path: &str, headers: &[(&str, &str)]) -> Response {
        self.at(address(self.site.view().personality), method, path, headers)
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.ask(&Method::GET, path, &[])
    }

    pub(crate) fn status(&self, method: &Method, path: &str, headers: &[(&str, &str)]) -> u16 {
        self.ask(method, path, headers).status.as_u16()
    }

    pub(crate) fn token(&self) -> String {
        let header = if self.site.view().personality == Personality::Alibaba { ALIBABA_TTL } else { EC2_TTL };
        let response = self.ask(&Method::PUT, "/latest/api/token", &[(header, "60")]);
        assert_eq!(response.status, 200);
        text(&response)
    }
}

pub(crate) fn text(response: &Response) -> String {
    String::from_utf8(response.body.to_vec()).unwrap()
}

/// A linear congruential generator: enough to make strange input, and the same every time.
pub(crate) struct Random(u64);

impl Random {
    /// Begins at `BULBIL_TEST_SEED`, or where it always begins; the seed is printed.
    pub(crate) fn seeded() -> Self {
        let seed = std::env::var("BULBIL_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
        println!("BULBIL_TEST_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}
