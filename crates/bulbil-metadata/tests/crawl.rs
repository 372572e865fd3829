//! What a crawl finds: everything that is listed answers, and nothing changes unnoticed.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::fmt::Write as _;

use bulbil_metadata::{Dir, InstanceView, Node, nocloud_seed};
use bulbil_types::Personality;
use bytes::Bytes;
use common::{ALIBABA, EC2, Guest, bare_view, full_view, text};
use http::Method;

/// Walks listings the way cloud-init does and writes down every path and value.
fn crawl(guest: &Guest, path: &str, found: &mut String) {
    let response = guest.get(path);
    assert_eq!(response.status, 200, "{path} is listed");
    assert!(!response.body.ends_with(b"\n"), "{path}: no newline at the end of a listing");
    for line in text(&response).lines() {
        if let Some(directory) = line.strip_suffix('/') {
            crawl(guest, &format!("{path}{directory}/"), found);
        } else if let Some((index, _)) = line.split_once('=').filter(|(index, _)| index.parse::<u32>().is_ok()) {
            writeln!(found, "{path} lists {line}").unwrap();
            crawl(guest, &format!("{path}{index}/"), found);
        } else {
            let leaf = format!("{path}{}", line.replace('=', "%3D").replace('@', "%40"));
            let response = guest.get(&leaf);
            assert_eq!(response.status, 200, "{leaf} is listed");
            writeln!(found, "{leaf} [{}] {:?}", response.content_type, text(&response)).unwrap();
        }
    }
}

fn crawled(view: InstanceView, paths: &[&str]) -> String {
    let guest = Guest::new(view);
    let mut found = String::new();
    for path in paths {
        crawl(&guest, path, &mut found);
    }
    found
}

fn check_golden(found: &str, golden: &str) {
    assert!(found == golden, "the crawl has changed; if that is meant, this is the new golden file:\n{found}");
}

#[test]
fn a_full_ec2_crawl() {
    let found = crawled(full_view(Personality::Ec2), &["/latest/"]);
    check_golden(&found, include_str!("golden/ec2-full.txt"));
}

#[test]
fn a_bare_ec2_crawl() {
    let found = crawled(bare_view(Personality::Ec2), &["/latest/"]);
    check_golden(&found, include_str!("golden/ec2-bare.txt"));
}

#[test]
fn a_full_alibaba_crawl() {
    let found = crawled(full_view(Personality::Alibaba), &["/2016-01-01/"]);
    check_golden(&found, include_str!("golden/alibaba-full.txt"));
}

#[test]
fn a_bare_alibaba_crawl() {
    let found = crawled(bare_view(Personality::Alibaba), &["/2016-01-01/", "/latest/"]);
    check_golden(&found, include_str!("golden/alibaba-bare.txt"));
}

#[test]
fn a_full_nocloud_crawl() {
    let found = crawled(full_view(Personality::NoCloud), &["/"]);
    check_golden(&found, include_str!("golden/nocloud-full.txt"));
}

#[test]
fn every_listed_version_has_the_whole_ec2_tree() {
    let guest = Guest::new(full_view(Personality::Ec2));
    let root = text(&guest.get("/"));
    let versions: Vec<&str> = root.lines().collect();
    for wanted in ["1.0", "2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest"] {
        assert!(versions.contains(&wanted), "{wanted}");
    }
    let latest = crawled(full_view(Personality::Ec2), &["/latest/"]);
    for version in versions {
        let found = crawled(full_view(Personality::Ec2), &[&format!("/{version}/")]);
        assert_eq!(found.replace(&format!("/{version}/"), "/latest/"), latest, "{version}");
    }
    assert_eq!(guest.get("/2099-01-01/meta-data/").status, 404);
}

/// Everything in the tree, listed or not, answers at its path.
#[test]
fn every_node_answers() {
    fn walk(guest: &Guest, dir: &Dir, path: &str) -> usize {
        let mut count = 0;
        for (name, node) in dir.entries() {
            let path = format!("{path}/{name}");
            assert_eq!(guest.get(&path).status, 200, "{path}");
            assert_eq!(guest.get(&format!("{path}/")).status, 200, "{path}/");
            count += 1 + if let Node::Dir(dir) = node { walk(guest, dir, &path) } else { 0 };
        }
        count
    }
    for personality in Personality::ALL {
        for view in [full_view(*personality), bare_view(*personality)] {
            let guest = Guest::new(view);
            assert!(walk(&guest, guest.site.root(), "") >= 5);
        }
    }
}

#[test]
fn the_important_leaves_of_ec2() {
    let guest = Guest::new(full_view(Personality::Ec2));
    for (path, value) in [
        ("instance-id", "i-0123456789abcdef0"),
        ("ami-id", "ami-0fedcba9876543210"),
        ("local-hostname", "web.local-1.compute.internal"),
        ("mac", "52:54:00:ab:cd:01"),
        ("network/interfaces/macs/52:54:00:ab:cd:01/device-number", "0"),
        ("network/interfaces/macs/52:54:00:ab:cd:01/local-ipv4s", "10.0.0.15"),
        ("network/interfaces/macs/52:54:00:ab:cd:01/subnet-ipv4-cidr-block", "10.0.0.0/24"),
        ("network/interfaces/macs/52:54:00:ab:cd:01/ipv4-associations/203.0.113.9", "10.0.0.15"),
        ("placement/availability-zone/", "local-1a"),
        ("public-keys/", "0=me\n1=me-2\n2=a-b-"),
        ("public-keys/0/openssh-key", "ssh-ed25519 AAAA me@host"),
        ("tags/instance/a%3Db", "c"),
        ("tags/instance/Name", "web"),
    ] {
        assert_eq!(text(&guest.get(&format!("/2021-03-23/meta-data/{path}"))), value, "{path}");
    }
    assert_eq!(text(&guest.get("/latest/dynamic/instance-identity/")), "document");
    for absent in ["iam/", "iam/security-credentials/", "spot/instance-action", "ipv6", "tags/instance/0=x", "nothing"]
    {
        assert_eq!(guest.get(&format!("/latest/meta-data/{absent}")).status, 404, "{absent}");
    }
    for absent in ["signature", "pkcs7", "rsa2048"] {
        assert_eq!(guest.get(&format!("/latest/dynamic/instance-identity/{absent}")).status, 404, "{absent}");
    }
}

#[test]
fn the_ec2_identity_document_is_as_amazon_writes_it() {
    let guest = Guest::new(full_view(Personality::Ec2));
    let document = text(&guest.get("/latest/dynamic/instance-identity/document"));
    assert!(document.starts_with("{\n  \"accountId\" : \"123456789012\",\n"), "{document}");
    let json: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(json["pendingTime"], "2026-11-22T06:10:55Z");
    assert_eq!(json["instanceId"], "i-0123456789abcdef0");
    assert_eq!(json["version"], "2017-09-30");
}

#[test]
fn alibaba_all_is_the_tree_as_json() {
    let guest = Guest::new(full_view(Personality::Alibaba));
    assert!(!text(&guest.get("/2016-01-01/meta-data/")).lines().any(|line| line == "all"));
    let all: serde_json::Value = serde_json::from_slice(&guest.get("/2016-01-01/meta-data/all").body).unwrap();
    assert_eq!(all["dns-conf"]["nameservers"], "10.0.0.2\r\n10.0.0.3");
    assert_eq!(all["public-keys"]["me"]["openssh-key"], "ssh-ed25519 AAAA me@host");
    assert_eq!(all["network"]["interfaces"]["macs"]["52:54:00:ab:cd:01"]["netmask"], "255.255.255.0");
    assert_eq!(all["hostname"], "web");
    assert!(all.get("all").is_none());
}

#[test]
fn alibaba_user_data_is_empty_rather_than_missing_on_the_dated_version_only() {
    let guest = Guest::new(bare_view(Personality::Alibaba));
    for name in ["user-data", "vendor-data"] {
        let dated = guest.get(&format!("/2016-01-01/{name}"));
        assert_eq!((dated.status.as_u16(), dated.body.len()), (200, 0), "{name}");
        assert_eq!(guest.get(&format!("/latest/{name}")).status, 404, "{name}");
    }
    assert_eq!(Guest::new(bare_view(Personality::Ec2)).get("/latest/user-data").status, 404);
}

#[test]
fn nocloud_over_http_answers_all_four_files_even_without_data() {
    let guest = Guest::new(bare_view(Personality::NoCloud));
    for (name, empty) in [("meta-data", false), ("user-data", true), ("vendor-data", true), ("network-config", true)] {
        let response = guest.get(&format!("/nocloud/{name}"));
        assert_eq!((response.status.as_u16(), response.body.is_empty()), (200, empty), "{name}");
    }
}

#[test]
fn a_seed_disk_has_the_four_files() {
    let data: Vec<u8> = (0..=255).collect();
    let view = InstanceView { user_data: Some(Bytes::from(data.clone())), ..full_view(Personality::NoCloud) };
    let files = nocloud_seed(&view);
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["meta-data", "user-data", "vendor-data", "network-config"]);
    assert_eq!(files[0].1, Guest::new(full_view(Personality::NoCloud)).get("/nocloud/meta-data").body);
    assert_eq!(files[1].1, data);
    let network = "version: 2\nethernets:\n  eth0:\n    match:\n      macaddress: \"52:54:00:ab:cd:01\"\n    \
                   set-name: eth0\n    dhcp4: true\n";
    assert_eq!(String::from_utf8_lossy(&files[3].1), network);
    let bare = nocloud_seed(&bare_view(Personality::NoCloud));
    assert!(bare[1].1.is_empty() && bare[2].1.is_empty());
}

#[test]
fn user_data_comes_back_byte_for_byte() {
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = vec![0xA5; 16 << 10];
    for data in [
        b"".as_slice(),
        b"#!/bin/sh\necho hi\n",
        b"#cloud-config\r\nruncmd: [ls]",
        b"Content-Type: multipart/mixed; boundary=\"x\"\n\n--x--\n",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        b"aGVsbG8=",
        b"\n\n\n",
        &every_byte,
        &large,
    ] {
        for (personality, path) in [
            (Personality::Ec2, "/latest/user-data"),
            (Personality::Ec2, "/2009-04-04/user-data/"),
            (Personality::Alibaba, "/2016-01-01/user-data"),
            (Personality::Alibaba, "/latest/user-data"),
            (Personality::NoCloud, "/nocloud/user-data"),
        ] {
            let mut view = bare_view(personality);
            view.user_data = Some(Bytes::copy_from_slice(data));
            let response = Guest::new(view).get(path);
            assert_eq!(response.status, 200, "{path}");
            assert_eq!(response.content_type, "application/octet-stream", "{path}");
            assert_eq!(&response.body[..], data, "{path}");
        }
    }
}

#[test]
fn tags_are_listed_only_when_shown() {
    for personality in [Personality::Ec2, Personality::Alibaba] {
        let mut view = full_view(personality);
        view.tags_shown = false;
        let guest = Guest::new(view);
        assert_eq!(guest.get("/latest/meta-data/tags/instance/Name").status, 404);
        assert!(!text(&guest.get("/latest/meta-data/")).contains("tags"));
    }
}

#[test]
fn an_instance_answers_only_at_its_own_clouds_address() {
    let tencent = [169, 254, 0, 23].into();
    let ec2_over_ipv6 = "fd00:ec2::254".parse().unwrap();
    let anywhere = [10, 0, 0, 1].into();
    for (personality, own) in [
        (Personality::Ec2, vec![EC2, ec2_over_ipv6]),
        (Personality::Alibaba, vec![ALIBABA]),
        (Personality::NoCloud, vec![EC2]),
    ] {
        let guest = Guest::new(full_view(personality));
        for destination in [EC2, ec2_over_ipv6, ALIBABA, tencent, anywhere] {
            let status = guest.at(destination, &Method::GET, "/", &[]).status.as_u16();
            assert_eq!(status, if own.contains(&destination) { 200 } else { 404 }, "{personality} {destination}");
        }
    }
    assert_eq!(Guest::new(full_view(Personality::NoCloud)).get("/latest/meta-data/").status, 404);
    assert_eq!(Guest::new(full_view(Personality::Ec2)).get("/nocloud/meta-data").status, 404);
    assert_eq!(Guest::new(full_view(Personality::Ec2)).get("/openstack").status, 404);
}
