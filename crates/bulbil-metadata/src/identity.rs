//! The firmware tables from which a guest recognises its cloud.
//!
//! cloud-init's `tools/ds-identify` reads them before anything else: they alone decide which
//! address a stock image asks.

use bulbil_types::{InstanceId, Personality};

use crate::view::InstanceView;

/// The serial number that makes a stock image read its seed over HTTP instead of from a disk:
/// the NoCloud datasource parses it like a kernel command line.
pub const NOCLOUD_HTTP_SERIAL: &str = "ds=nocloud-net;s=http://169.254.169.254/nocloud/";

/// One SMBIOS structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmbiosTable {
    /// The structure's type: 1 system, 2 base board, 3 chassis.
    pub table: u8,
    /// Field names as QEMU's `-smbios` takes them, and their values (in which QEMU wants a comma
    /// doubled; only an instance type could hold one).
    pub fields: Vec<(&'static str, String)>,
}

/// The tables of an instance, by its personality.
///
/// - `ec2`: cloud-init up to 24.1 wants uuid and serial number equal and beginning with `ec2`
///   (`DataSourceEc2.py identify_aws`); manufacturer and chassis asset tag are what AWS's own
///   "Identify EC2 instances" page and other detectors look at, the board's asset tag is the
///   instance id on Nitro.
/// - `alibaba`: the product name must be exactly `Alibaba Cloud ECS` (`DataSourceAliYun.py`).
/// - `nocloud`: names no cloud; the seed disk's label is what counts.
#[must_use]
pub fn smbios(view: &InstanceView) -> Vec<SmbiosTable> {
    let uuid = system_uuid(&view.instance_id, view.personality);
    match view.personality {
        Personality::Ec2 => ec2(view, &uuid),
        Personality::Alibaba => {
            vec![system("Alibaba Cloud", "Alibaba Cloud ECS", &uuid, &uuid), chassis("Alibaba Cloud", None)]
        }
        Personality::NoCloud => {
            vec![system("Bulbil", "Bulbil", view.instance_id.as_str(), &uuid), chassis("Bulbil", None)]
        }
    }
}

fn ec2(view: &InstanceView, uuid: &str) -> Vec<SmbiosTable> {
    let board = vec![("manufacturer", "Amazon EC2".to_owned()), ("asset", view.instance_id.to_string())];
    vec![
        system("Amazon EC2", &view.instance_type, uuid, uuid),
        SmbiosTable { table: 2, fields: board },
        chassis("Amazon EC2", Some("Amazon EC2")),
    ]
}

fn system(manufacturer: &str, product: &str, serial: &str, uuid: &str) -> SmbiosTable {
    let fields = [("manufacturer", manufacturer), ("product", product), ("serial", serial), ("uuid", uuid)];
    SmbiosTable { table: 1, fields: fields.map(|(name, value)| (name, value.to_owned())).to_vec() }
}

fn chassis(manufacturer: &str, asset: Option<&str>) -> SmbiosTable {
    let mut fields = vec![("manufacturer", manufacturer.to_owned())];
    fields.extend(asset.map(|asset| ("asset", asset.to_owned())));
    SmbiosTable { table: 3, fields }
}

/// The machine's UUID (RFC 9562 version 8), in lower case: always the same for one instance and
/// personality, different for any two. systemd may make the machine id from it.
///
/// Those of `ec2` begin with `ec2`. The others begin with `b`, and their fourth byte is below
/// 0x80: `ds-identify` takes a first field that begins with `ec2`, or ends in `2?ec` (the same in
/// the other byte order), for AWS, which one random UUID in 2000 would be.
#[must_use]
pub fn system_uuid(instance_id: &InstanceId, personality: Personality) -> String {
    let material = format!("{personality}\n{instance_id}");
    let hash = blake3::derive_key("bulbil-metadata 2026 system uuid of an instance", material.as_bytes());
    let mut bits = hash.iter().take(16).fold(0_u128, |bits, byte| (bits << 8) | u128::from(*byte));
    let version_and_variant = (8 << 76) | (2 << 62);
    bits = bits & !((0xF << 76) | (3 << 62)) | version_and_variant;
    bits = match personality {
        Personality::Ec2 => bits & (u128::MAX >> 12) | (0xEC2 << 116),
        Personality::Alibaba | Personality::NoCloud => bits & !(0xF << 124 | 0x80 << 96) | (0xB << 124),
    };
    let hex = format!("{bits:032x}");
    let field = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", field(0, 8), field(8, 12), field(12, 16), field(16, 20), field(20, 32))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use bulbil_types::ImageId;

    use super::*;

    fn tables(personality: Personality) -> Vec<SmbiosTable> {
        let id = "i-0123456789abcdef0".parse().unwrap();
        let mut view = InstanceView::new(id, ImageId::random(), [2; 6], Ipv4Addr::new(10, 0, 0, 15));
        view.personality = personality;
        smbios(&view)
    }

    fn field(tables: &[SmbiosTable], table: u8, name: &str) -> String {
        let table = tables.iter().find(|candidate| candidate.table == table).unwrap();
        table.fields.iter().find(|(field, _)| *field == name).unwrap().1.clone()
    }

    #[test]
    fn ec2_has_equal_lower_case_uuid_and_serial_beginning_with_ec2() {
        let tables = tables(Personality::Ec2);
        let uuid = field(&tables, 1, "uuid");
        assert!(uuid.starts_with("ec2"), "{uuid}");
        assert_eq!(uuid, uuid.to_lowercase());
        assert_eq!(uuid, field(&tables, 1, "serial"));
        assert_eq!(field(&tables, 1, "manufacturer"), "Amazon EC2");
        assert_eq!(field(&tables, 2, "asset"), "i-0123456789abcdef0");
        assert_eq!(field(&tables, 3, "asset"), "Amazon EC2");
    }

    #[test]
    fn alibaba_is_recognised_by_its_product_name() {
        let tables = tables(Personality::Alibaba);
        assert_eq!(field(&tables, 1, "product"), "Alibaba Cloud ECS");
        assert_eq!(field(&tables, 1, "manufacturer"), "Alibaba Cloud");
        assert_eq!(field(&tables, 1, "serial"), field(&tables, 1, "uuid"));
    }

    #[test]
    fn nocloud_names_no_cloud() {
        let tables = tables(Personality::NoCloud);
        assert_eq!(field(&tables, 1, "manufacturer"), "Bulbil");
        assert_eq!(field(&tables, 1, "serial"), "i-0123456789abcdef0");
    }

    #[test]
    fn a_uuid_never_changes_and_no_two_instances_share_one() {
        let id: InstanceId = "i-0123456789abcdef0".parse().unwrap();
        // A change here gives every existing instance a new machine id.
        assert_eq!(system_uuid(&id, Personality::Ec2), "ec265f55-b1d5-8b9b-a49e-0863971f497c");
        assert_eq!(system_uuid(&id, Personality::Alibaba), "b46bb30d-7dab-848d-ac44-e24201825685");
        assert_eq!(system_uuid(&id, Personality::NoCloud), "b9d51075-1c55-8404-939d-e54954382e31");
        let uuids: std::collections::HashSet<String> =
            (0..1000).map(|_| system_uuid(&InstanceId::random(), Personality::Ec2)).collect();
        assert_eq!(uuids.len(), 1000);
    }

    #[test]
    fn only_ec2_looks_like_ec2_and_all_are_well_formed() {
        for personality in Personality::ALL {
            for _ in 0..20_000 {
                let uuid = system_uuid(&InstanceId::random(), *personality);
                let parts: Vec<&str> = uuid.split('-').collect();
                assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12], "{uuid}");
                assert!(parts[2].starts_with('8') && "89ab".contains(&parts[3][..1]), "{uuid}");
                let swapped = &parts[0][4..5] == "2" && parts[0].ends_with("ec");
                let like_ec2 = uuid.starts_with("ec2") || swapped;
                assert_eq!(*personality == Personality::Ec2, uuid.starts_with("ec2"), "{uuid}");
                assert!(*personality == Personality::Ec2 || !like_ec2, "{uuid}");
            }
        }
    }
}
