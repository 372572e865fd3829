//! An instance described in a JSON file, for a metadata server without an instance.

use std::net::Ipv4Addr;

use bulbil_types::{ImageId, InstanceId, Personality};
use bytes::Bytes;
use serde::Deserialize;

use crate::view::{HopLimit, InstanceView, Ipv4Cidr, PublicKey, TokenMode};

/// The text is not a description of an instance.
#[derive(Debug, thiserror::Error)]
pub enum InstanceFileError {
    /// The JSON is broken, or a field is unknown or has a wrong value.
    #[error("the instance file is not understood")]
    Json(#[from] serde_json::Error),
    /// The MAC address is not six pairs of hexadecimal digits.
    #[error("`{0}` is not a MAC address of the form `52:54:00:12:34:56`")]
    Mac(String),
}

/// Unset fields keep the defaults of [`InstanceView::new`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InstanceFile {
    instance_id: Option<InstanceId>,
    image_id: Option<ImageId>,
    mac: Option<String>,
    local_ipv4: Option<Ipv4Addr>,
    public_ipv4: Option<Ipv4Addr>,
    gateway: Option<Ipv4Addr>,
    subnet_cidr: Option<Ipv4Cidr>,
    vpc_cidr: Option<Ipv4Cidr>,
    name: Option<String>,
    hostname: Option<String>,
    instance_type: Option<String>,
    owner_id: Option<String>,
    region: Option<String>,
    zone: Option<String>,
    zone_id: Option<String>,
    launched_at: Option<u64>,
    #[serde(default)]
    public_keys: Vec<PublicKey>,
    user_data: Option<String>,
    vendor_data: Option<String>,
    tags: Option<std::collections::BTreeMap<String, String>>,
    personality: Option<Personality>,
    token_mode: Option<TokenMode>,
    hop_limit: Option<HopLimit>,
    endpoint_enabled: Option<bool>,
}

/// Reads an instance's description: a JSON object whose members are named like the fields of
/// [`InstanceView`]; all may be missing, unknown ones are refused. Ids that are missing are made
/// anew. Tags are an object, and are shown to the guest when they are given.
///
/// # Errors
/// If the text is not such an object.
pub fn parse_instance_file(json: &str) -> Result<InstanceView, InstanceFileError> {
    let file: InstanceFile = serde_json::from_str(json)?;
    let mac = file.mac.as_deref().map_or(Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56]), parse_mac)?;
    let mut view = InstanceView::new(
        file.instance_id.unwrap_or_else(InstanceId::random),
        file.image_id.unwrap_or_else(ImageId::random),
        mac,
        file.local_ipv4.unwrap_or(Ipv4Addr::new(10, 0, 2, 15)),
    );
    macro_rules! set {
        ($($field:ident),+) => { $(if let Some(value) = file.$field { view.$field = value; })+ };
    }
    set!(gateway, subnet_cidr, vpc_cidr, name, hostname, instance_type, owner_id, region, zone, zone_id, launched_at);
    set!(personality, token_mode, hop_limit, endpoint_enabled);
    view.public_ipv4 = file.public_ipv4;
    view.public_keys = file.public_keys;
    view.user_data = file.user_data.map(Bytes::from);
    view.vendor_data = file.vendor_data.map(Bytes::from);
    view.tags_shown = file.tags.is_some();
    view.tags = file.tags.unwrap_or_default().into_iter().collect();
    Ok(view)
}

fn parse_mac(text: &str) -> Result<[u8; 6], InstanceFileError> {
    let is_pair = |pair: &str| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
    let pair = |pair: &str| u8::from_str_radix(pair, 16).ok().filter(|_| is_pair(pair));
    let bytes: Option<Vec<u8>> = text.split(':').map(pair).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| InstanceFileError::Mac(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_members_get_defaults_and_given_ones_are_kept() {
        assert_eq!(parse_instance_file("{}").unwrap().personality, Personality::Ec2);
        let view = parse_instance_file(
            r#"{"mac": "52:54:00:AA:bb:01", "personality": "alibaba", "token_mode": "required", "hop_limit": 1,
                "subnet_cidr": "10.9.0.0/16", "user_data": "echo\n", "tags": {"Name": "web"}}"#,
        )
        .unwrap();
        assert_eq!(view.mac_text(), "52:54:00:aa:bb:01");
        assert_eq!(view.personality, Personality::Alibaba);
        assert_eq!(view.token_mode, TokenMode::Required);
        assert_eq!(view.user_data.as_deref(), Some(&b"echo\n"[..]));
        assert!(view.tags_shown);
    }

    #[test]
    fn wrong_members_are_refused() {
        for json in [
            "",
            "[]",
            r#"{"hostnam": "x"}"#,
            r#"{"hop_limit": 0}"#,
            r#"{"mac": "52:54:00:aa:bb"}"#,
            r#"{"mac": "+2:54:00:aa:bb:01:02"}"#,
            r#"{"mac": "52:54:00:aa:bb:+1"}"#,
            r#"{"local_ipv4": "10.0.0"}"#,
            r#"{"instance_id": "web"}"#,
        ] {
            assert!(parse_instance_file(json).is_err(), "{json}");
        }
    }
}
