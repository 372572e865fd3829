//! The NoCloud seed, as files of a disk labelled `cidata` and over HTTP.
//!
//! cloud-init, "NoCloud" datasource (`DataSourceNoCloud.py`): `meta-data` and `user-data` must
//! exist, empty user data is accepted without a warning, and keys under `public-keys` in
//! `meta-data` go to the default user (`DataSource.get_public_ssh_keys`, 22.4.2 and later).

use std::fmt::Write as _;

use bytes::Bytes;

use crate::tree::{Dir, Leaf, Node};
use crate::view::InstanceView;

/// The files of a seed disk: `meta-data`, `user-data`, `vendor-data`, `network-config`.
///
/// Data the instance does not have becomes an empty file.
#[must_use]
pub fn nocloud_seed(view: &InstanceView) -> Vec<(String, Vec<u8>)> {
    let data = |data: &Option<Bytes>| data.as_ref().map(|bytes| bytes.to_vec()).unwrap_or_default();
    vec![
        ("meta-data".to_owned(), meta_data(view).into_bytes()),
        ("user-data".to_owned(), data(&view.user_data)),
        ("vendor-data".to_owned(), data(&view.vendor_data)),
        ("network-config".to_owned(), network_config(view).into_bytes()),
    ]
}

/// Everything under `/` at 169.254.169.254: the four files in `nocloud/`.
///
/// All four answer 200, if need be with nothing: cloud-init asks ten times, one second apart, for
/// one that does not (`util.read_seeded`). `network-config` is always empty here: who reads it over
/// HTTP has a working network, and cloud-init would rename the interface it is using.
pub(crate) fn tree(view: &InstanceView) -> Dir {
    let mut seed = Dir::new();
    seed.set("meta-data", meta_data(view));
    seed.set("network-config", "");
    seed.insert("user-data", Node::Leaf(Leaf::octets(view.user_data.clone().unwrap_or_default())));
    seed.insert("vendor-data", Node::Leaf(Leaf::octets(view.vendor_data.clone().unwrap_or_default())));
    let mut root = Dir::new();
    root.insert("nocloud", Node::Dir(seed));
    root
}

fn meta_data(view: &InstanceView) -> String {
    let id = quoted(view.instance_id.as_str());
    let mut yaml = format!("instance-id: {id}\nlocal-hostname: {}\n", quoted(&view.hostname));
    let keys = view.listed_keys();
    if !keys.is_empty() {
        yaml.push_str("public-keys:\n");
    }
    for key in keys {
        yaml.push_str("  - ");
        yaml.push_str(&quoted(&key.openssh));
        yaml.push('\n');
    }
    yaml
}

/// Network configuration version 2: DHCP on the interface with the instance's MAC address.
///
/// `set-name` is needed: the eni and sysconfig renderers take the configuration's key for the
/// interface's name and ignore `match`, so without renaming a guest that calls its interface
/// `enp0s2` would configure an `eth0` it does not have.
fn network_config(view: &InstanceView) -> String {
    format!(
        "version: 2\nethernets:\n  eth0:\n    match:\n      macaddress: {}\n    set-name: eth0\n    dhcp4: true\n",
        quoted(&view.mac_text())
    )
}

/// A YAML double-quoted scalar in which everything but printable ASCII and letters is escaped.
fn quoted(text: &str) -> String {
    let mut yaml = String::with_capacity(text.len() + 2);
    yaml.push('"');
    for c in text.chars() {
        push_escaped(&mut yaml, c);
    }
    yaml.push('"');
    yaml
}

fn push_escaped(yaml: &mut String, c: char) {
    match c {
        '"' | '\\' => yaml.extend(['\\', c]),
        ' '..='~' => yaml.push(c),
        c if c.is_alphanumeric() => yaml.push(c),
        c => write!(yaml, "\\U{:08x}", u32::from(c)).expect("writing to a string does not fail"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_scalars_cannot_be_broken_out_of() {
        for (text, yaml) in [
            ("web", "\"web\""),
            ("a\"b\\c", "\"a\\\"b\\\\c\""),
            ("x\ny: 1", "\"x\\U0000000ay: 1\""),
            ("\u{7f}\u{85}\u{2028}", "\"\\U0000007f\\U00000085\\U00002028\""),
            ("é", "\"é\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted(text), yaml);
        }
    }
}
