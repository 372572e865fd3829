//! The Alibaba Cloud tree: "View instance metadata" in the ECS user guide.
//!
//! Left out, and so answered 404: `ram/` (no role), `kms-server`, `wsus-server` and
//! `source-address` (Alibaba's own mirrors are not reachable), `disks/`, IPv6 and the signed
//! identity (`pkcs7`).

use std::sync::Arc;

use bulbil_types::Personality;
use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::ec2::versions;
use crate::identity::system_uuid;
use crate::tree::{Dir, Leaf, Listed, Node};
use crate::view::InstanceView;

/// Everything under `/` at 100.100.100.200.
pub(crate) fn tree(view: &InstanceView) -> Dir {
    let mut common = Dir::new();
    common.attach("meta-data", Arc::new(Node::Dir(meta_data(view))), Listed::ByName);
    common.set("dynamic/instance-identity/document", identity_document(view));
    common.set("maintenance/active-system-events", "[]");
    let mut dated = common.clone();
    let mut latest = common;
    set_data(&mut latest, "user-data", view.user_data.clone());
    set_data(&mut latest, "vendor-data", view.vendor_data.clone());
    // cloud-init 25.1 to 26.2 logs a traceback for a 404 here, and `cloud-init status` then says
    // degraded: its callbacks have the wrong signature (`DataSourceAliYun.py`). So the version that
    // it asks for answers with nothing instead, though Alibaba documents the 404.
    set_data(&mut dated, "user-data", Some(view.user_data.clone().unwrap_or_default()));
    set_data(&mut dated, "vendor-data", Some(view.vendor_data.clone().unwrap_or_default()));
    let mut root = versions(&["2016-01-01"], &Arc::new(Node::Dir(dated)));
    root.attach("latest", Arc::new(Node::Dir(latest)), Listed::As("latest".to_owned()));
    root
}

fn set_data(dir: &mut Dir, name: &str, data: Option<Bytes>) {
    if let Some(data) = data {
        dir.insert(name, Node::Leaf(Leaf::octets(data)));
    }
}

fn meta_data(view: &InstanceView) -> Dir {
    let mut dir = Dir::new();
    set_identity(&mut dir, view);
    set_addresses(&mut dir, view);
    *dir.subdir("network").subdir("interfaces").subdir("macs").subdir(&view.mac_text()) = interface(view);
    for key in view.listed_keys() {
        dir.subdir("public-keys").subdir(&key.name).set("openssh-key", key.openssh);
    }
    for (key, value) in view.listed_tags() {
        dir.subdir("tags").subdir("instance").insert(key, Node::Leaf(Leaf::text(value.to_owned())));
    }
    // Not listed: cloud-init asks for it by name, and who walks the tree has everything already.
    let all = Leaf::text(as_json(&dir).to_string());
    dir.attach("all", Arc::new(Node::Leaf(all)), Listed::Hidden);
    dir
}

fn set_identity(dir: &mut Dir, view: &InstanceView) {
    dir.set("hibernation/configured", "false");
    dir.set("hostname", host_label(view).to_owned());
    dir.set("image-id", view.image_id.to_string());
    dir.set("instance-id", view.instance_id.to_string());
    dir.set("instance/instance-name", view.name.clone());
    dir.set("instance/instance-type", view.instance_type.clone());
    dir.set("instance/virtualization-solution", "ECS Virt");
    dir.set("instance/virtualization-solution-version", "2.0");
    dir.set("owner-account-id", view.owner_id.clone());
    dir.set("region-id", view.region.clone());
    dir.set("serial-number", serial_number(view));
    dir.set("zone-id", view.zone.clone());
}

/// A published address is a NAT address like Alibaba's EIP (`eipv4`); software that only knows
/// `public-ipv4` finds it there too.
fn set_addresses(dir: &mut Dir, view: &InstanceView) {
    dir.set("dns-conf/nameservers", nameservers(view));
    dir.set("mac", view.mac_text());
    dir.set("network-type", "vpc");
    dir.set("private-ipv4", view.local_ipv4.to_string());
    dir.set("sub-private-ipv4-list", "");
    dir.set("vpc-cidr-block", view.vpc_cidr.to_string());
    dir.set("vpc-id", view.vpc_id.clone());
    dir.set("vswitch-cidr-block", view.subnet_cidr.to_string());
    dir.set("vswitch-id", vswitch_id(view));
    if !view.ntp_servers.is_empty() {
        dir.set("ntp-conf/ntp-servers", view.ntp_servers.join("\n"));
    }
    if let Some(address) = view.public_ipv4 {
        dir.set("eipv4", address.to_string());
        dir.set("public-ipv4", address.to_string());
    }
}

fn interface(view: &InstanceView) -> Dir {
    let mut nic = Dir::new();
    nic.set("gateway", view.gateway.to_string());
    nic.set("netmask", view.subnet_cidr.netmask().to_string());
    nic.set("network-interface-id", view.interface_id.clone());
    nic.set("primary-ip-address", view.local_ipv4.to_string());
    nic.set("private-ipv4s", format!("[\"{}\"]", view.local_ipv4));
    nic.set("vpc-cidr-block", view.vpc_cidr.to_string());
    nic.set("vpc-id", view.vpc_id.clone());
    nic.set("vswitch-cidr-block", view.subnet_cidr.to_string());
    nic.set("vswitch-id", vswitch_id(view));
    nic
}

/// The first label: cloud-init makes the whole value the guest's host name (`DataSourceAliYun.py`),
/// where it cuts that of `ec2` itself.
fn host_label(view: &InstanceView) -> &str {
    view.hostname.split('.').next().unwrap_or_default()
}

fn nameservers(view: &InstanceView) -> String {
    if view.nameservers.is_empty() {
        return view.gateway.to_string();
    }
    view.nameservers.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// The same digits as the subnet id, in Alibaba's spelling.
fn vswitch_id(view: &InstanceView) -> String {
    let digits = view.subnet_id.split_once('-').map_or(view.subnet_id.as_str(), |(_, digits)| digits);
    format!("vsw-{digits}")
}

/// Equal to the SMBIOS serial number, as on Alibaba Cloud.
fn serial_number(view: &InstanceView) -> String {
    system_uuid(&view.instance_id, Personality::Alibaba)
}

fn identity_document(view: &InstanceView) -> String {
    let document = json!({
        "zone-id": view.zone,
        "serial-number": serial_number(view),
        "instance-id": view.instance_id.as_str(),
        "region-id": view.region,
        "private-ipv4": view.local_ipv4.to_string(),
        "owner-account-id": view.owner_id,
        "mac": view.mac_text(),
        "image-id": view.image_id.as_str(),
        "instance-type": view.instance_type,
    });
    document.to_string()
}

/// The tree as `meta-data/all` has it: several lines are separated by `\r\n`
/// (`cloudinit/sources/helpers/aliyun.py`).
fn as_json(dir: &Dir) -> Value {
    let value = |node: &Node| match node {
        Node::Dir(dir) => as_json(dir),
        Node::Leaf(leaf) => Value::from(String::from_utf8_lossy(&leaf.body).replace('\n', "\r\n")),
    };
    Value::Object(dir.entries().map(|(name, node)| (name.to_owned(), value(node))).collect::<Map<_, _>>())
}
