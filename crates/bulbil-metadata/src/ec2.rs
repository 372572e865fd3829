//! The EC2 tree: AWS, "Instance metadata categories".
//!
//! Only what Bulbil can answer truthfully is listed. Left out, and so answered 404, as AWS does for
//! an instance without them: `iam/` (no role), `spot/`, `autoscaling/`, IPv6, and in
//! `dynamic/instance-identity/` the signatures (there is no AWS key to sign with).

use std::sync::Arc;

use crate::time::utc_text;
use crate::tree::{Dir, Leaf, Listed, Node};
use crate::view::InstanceView;

/// The versions AWS lists at `/`. All lead to the same tree: cloud-init asks for 2009-04-04,
/// 2016-09-02, 2018-09-24 and 2021-03-23, other software for `latest`.
const VERSIONS: &[&str] = &[
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-09-24",
    "2024-04-11",
    "latest",
];

/// Everything under `/` at 169.254.169.254.
pub(crate) fn tree(view: &InstanceView) -> Dir {
    let mut version = Dir::new();
    version.insert("meta-data", Node::Dir(meta_data(view)));
    version.set("dynamic/fws/instance-monitoring", "disabled");
    version.set("dynamic/instance-identity/document", identity_document(view));
    if let Some(user_data) = &view.user_data {
        version.insert("user-data", Node::Leaf(Leaf::octets(user_data.clone())));
    }
    versions(VERSIONS, &Arc::new(Node::Dir(version)))
}

/// A root that lists `names` without a slash, as both clouds do, each leading to `node`.
pub(crate) fn versions(names: &[&str], node: &Arc<Node>) -> Dir {
    let mut root = Dir::new();
    for name in names {
        root.attach(*name, Arc::clone(node), Listed::As((*name).to_owned()));
    }
    root
}

fn meta_data(view: &InstanceView) -> Dir {
    let mut dir = Dir::new();
    set_identity(&mut dir, view);
    set_addresses(&mut dir, view);
    set_placement(&mut dir, view);
    dir.set("block-device-mapping/ami", view.root_device_name.clone());
    dir.set("block-device-mapping/root", view.root_device_name.clone());
    dir.set("events/maintenance/history", "[]");
    dir.set("events/maintenance/scheduled", "[]");
    *dir.subdir("network").subdir("interfaces").subdir("macs").subdir(&view.mac_text()) = interface(view);
    set_keys(&mut dir, view);
    set_tags(&mut dir, view);
    dir
}

fn set_identity(dir: &mut Dir, view: &InstanceView) {
    dir.set("ami-id", view.image_id.to_string());
    dir.set("ami-launch-index", view.launch_index.to_string());
    dir.set("ami-manifest-path", "(unknown)");
    dir.set("instance-action", "none");
    dir.set("instance-id", view.instance_id.to_string());
    dir.set("instance-life-cycle", "on-demand");
    dir.set("instance-type", view.instance_type.clone());
    dir.set("profile", "default-hvm");
    dir.set("reservation-id", view.reservation_id.clone());
    dir.set("security-groups", view.security_group_name.clone());
}

fn set_addresses(dir: &mut Dir, view: &InstanceView) {
    dir.set("hostname", view.hostname.clone());
    dir.set("local-hostname", view.hostname.clone());
    dir.set("local-ipv4", view.local_ipv4.to_string());
    dir.set("mac", view.mac_text());
    if let Some(address) = view.public_ipv4 {
        dir.set("public-ipv4", address.to_string());
    }
}

fn set_placement(dir: &mut Dir, view: &InstanceView) {
    let (domain, partition) =
        if view.region.starts_with("cn-") { ("amazonaws.com.cn", "aws-cn") } else { ("amazonaws.com", "aws") };
    dir.set("placement/availability-zone", view.zone.clone());
    dir.set("placement/availability-zone-id", view.zone_id.clone());
    dir.set("placement/region", view.region.clone());
    dir.set("services/domain", domain);
    dir.set("services/partition", partition);
}

/// `network/interfaces/macs/<mac>/`. `network-card` is the name cloud-init reads
/// (`DataSourceEc2.py`), `network-card-index` the one AWS documents.
fn interface(view: &InstanceView) -> Dir {
    let mut nic = Dir::new();
    nic.set("device-number", "0");
    nic.set("interface-id", view.interface_id.clone());
    nic.set("local-hostname", view.hostname.clone());
    nic.set("local-ipv4s", view.local_ipv4.to_string());
    nic.set("mac", view.mac_text());
    nic.set("network-card", "0");
    nic.set("network-card-index", "0");
    nic.set("owner-id", view.owner_id.clone());
    nic.set("security-group-ids", view.security_group_id.clone());
    nic.set("security-groups", view.security_group_name.clone());
    nic.set("subnet-id", view.subnet_id.clone());
    nic.set("subnet-ipv4-cidr-block", view.subnet_cidr.to_string());
    nic.set("vpc-id", view.vpc_id.clone());
    nic.set("vpc-ipv4-cidr-block", view.vpc_cidr.to_string());
    nic.set("vpc-ipv4-cidr-blocks", view.vpc_cidr.to_string());
    if let Some(address) = view.public_ipv4 {
        nic.set("public-ipv4s", address.to_string());
        nic.set(&format!("ipv4-associations/{address}"), view.local_ipv4.to_string());
    }
    nic
}

/// `public-keys/` lists `0=name` and holds `0/openssh-key`; absent without keys.
fn set_keys(dir: &mut Dir, view: &InstanceView) {
    for (index, key) in view.listed_keys().into_iter().enumerate() {
        let mut entry = Dir::new();
        entry.set("openssh-key", key.openssh);
        let listed = Listed::As(format!("{index}={}", key.name));
        dir.subdir("public-keys").attach(index.to_string(), Arc::new(Node::Dir(entry)), listed);
    }
}

fn set_tags(dir: &mut Dir, view: &InstanceView) {
    for (key, value) in view.listed_tags() {
        let value = Node::Leaf(Leaf::text(value.to_owned()));
        dir.subdir("tags").subdir("instance").insert(key, value);
    }
}

/// AWS, "Instance identity documents": the pairs in AWS's order and with its spacing.
fn identity_document(view: &InstanceView) -> String {
    let text = |value: &str| Some(value.to_owned());
    let pairs = [
        ("accountId", text(&view.owner_id)),
        ("architecture", text(view.architecture.as_str())),
        ("availabilityZone", text(&view.zone)),
        ("billingProducts", None),
        ("devpayProductCodes", None),
        ("marketplaceProductCodes", None),
        ("imageId", text(view.image_id.as_str())),
        ("instanceId", text(view.instance_id.as_str())),
        ("instanceType", text(&view.instance_type)),
        ("kernelId", None),
        ("pendingTime", Some(utc_text(view.launched_at))),
        ("privateIp", Some(view.local_ipv4.to_string())),
        ("ramdiskId", None),
        ("region", text(&view.region)),
        ("version", text("2017-09-30")),
    ];
    let line = |(key, value): (&str, Option<String>)| format!("  \"{key}\" : {}", serde_json::Value::from(value));
    format!("{{\n{}\n}}", pairs.map(line).join(",\n"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_identity_document_is_json_whatever_the_values_hold() {
        let (instance, image) = ("i-0123456789abcdef0".parse().unwrap(), "ami-0fedcba9876543210".parse().unwrap());
        let mut view = InstanceView::new(instance, image, [2; 6], Ipv4Addr::new(10, 0, 0, 15));
        view.instance_type = "odd\"\\\n".to_owned();
        let document: serde_json::Value = serde_json::from_str(&identity_document(&view)).unwrap();
        assert_eq!(document["instanceType"], "odd\"\\\n");
        assert_eq!(document["kernelId"], serde_json::Value::Null);
        assert_eq!(document["pendingTime"], "1970-01-01T00:00:00Z");
    }
}
