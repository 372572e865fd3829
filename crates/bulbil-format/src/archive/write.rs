//! Writes an OVA.
//!
//! ```text
//! header │ NAME.ovf │ header │ NAME.mf │ header │ NAME-disk1.vmdk │ two blocks of zeros
//! ```
//!
//! The disk goes straight to its place, for the lengths of what comes before are known: the manifest has digests of a
//! fixed length, and the description is filled up with empty lines. The digest of the disk needs one more pass over it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::bytes::{to_u64, to_usize};
use crate::convert::{Identity, run, write_at};
use crate::disk::SECTOR_BYTES;
use crate::vmdk::StreamWriter;
use crate::{ConvertError, ConvertObserver, DiskContent, WriteAt};

use super::manifest::hex;

const BLOCK_BYTES: u64 = 512;
/// The most that eleven octal digits can say; a larger size is written as a binary number.
const MAX_OCTAL: u64 = (1 << 33) - 1;
const BUFFER_BYTES: u64 = 1 << 20;

/// Writes an OVA with a streamOptimized VMDK.
pub(crate) fn write_ova(
    name: &str,
    source: &dyn DiskContent,
    file: &dyn WriteAt,
    identity: &Identity,
    observer: &dyn ConvertObserver,
) -> Result<(), ConvertError> {
    let package = Package { vm_name: name, base: file_base(name), size_bytes: source.size_bytes() };
    let room = to_u64(package.description(u64::MAX).len());
    let manifest_at = BLOCK_BYTES + padded(room);
    let manifest_len = to_u64(package.manifest("", "").len()) + 2 * 64;
    let disk_at = manifest_at + BLOCK_BYTES + padded(manifest_len) + BLOCK_BYTES;

    let disk = Shifted { file, base: disk_at, len_bytes: AtomicU64::new(0) };
    run(&StreamWriter::new(source.size_bytes(), identity), source, &disk, observer)?;
    let disk_len = disk.len_bytes.load(Ordering::Relaxed);

    let mut description = package.description(disk_len);
    description.push_str(&"\n".repeat(to_usize(room).saturating_sub(description.len())));
    let manifest = package.manifest(&hex(&Sha256::digest(&description)), &digest_of(&disk, disk_len)?);
    let created = identity.created_unix_s;
    write_member(file, 0, &format!("{}.ovf", package.base), description.as_bytes(), created)?;
    write_member(file, manifest_at, &format!("{}.mf", package.base), manifest.as_bytes(), created)?;
    write_at(file, &header(&package.disk_name(), disk_len, created), disk_at - BLOCK_BYTES)?;
    let end_bytes = disk_at + padded(disk_len) + 2 * BLOCK_BYTES;
    file.set_len(end_bytes).map_err(ConvertError::write(end_bytes))
}

fn padded(len_bytes: u64) -> u64 {
    len_bytes.next_multiple_of(BLOCK_BYTES)
}

fn write_member(file: &dyn WriteAt, at: u64, name: &str, bytes: &[u8], created: u64) -> Result<(), ConvertError> {
    write_at(file, &header(name, to_u64(bytes.len()), created), at)?;
    write_at(file, bytes, at + BLOCK_BYTES)
}

/// A file within a file, from `base` on to the end.
struct Shifted<'a> {
    file: &'a dyn WriteAt,
    base: u64,
    /// The length that was set.
    len_bytes: AtomicU64,
}

impl WriteAt for Shifted<'_> {
    fn write_all_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_all_at(buf, self.base + offset_bytes)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.len_bytes.store(len_bytes, Ordering::Relaxed);
        self.file.set_len(self.base + len_bytes)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, self.base + offset_bytes)
    }
}

fn digest_of(file: &dyn WriteAt, len_bytes: u64) -> Result<String, ConvertError> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; to_usize(BUFFER_BYTES.min(len_bytes))];
    let mut offset = 0;
    while offset < len_bytes {
        let piece_len = (len_bytes - offset).min(BUFFER_BYTES);
        let piece = buffer.get_mut(..to_usize(piece_len)).unwrap_or_default();
        file.read_exact_at(piece, offset).map_err(ConvertError::write(offset))?;
        hasher.update(&*piece);
        offset += piece_len;
    }
    Ok(hex(&hasher.finalize()))
}

/// Makes the header of a member (ustar).
fn header(name: &str, len_bytes: u64, created_unix_s: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in header.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if len_bytes <= MAX_OCTAL {
        put(124, format!("{len_bytes:011o}").as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &len_bytes.to_be_bytes());
    }
    put(136, format!("{:011o}", created_unix_s.min(MAX_OCTAL)).as_bytes());
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    for (to, from) in header.iter_mut().skip(148).zip(format!("{sum:06o}\0 ").bytes()) {
        *to = from;
    }
    header
}

/// Makes the name of a file of the name of a machine.
fn file_base(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let base: String = name.chars().take(80).map(plain).collect();
    let base = base.trim_start_matches(['.', '-']);
    if base.is_empty() { "disk".to_owned() } else { base.to_owned() }
}

struct Package<'a> {
    vm_name: &'a str,
    /// What the names of all files begin with.
    base: String,
    size_bytes: u64,
}

impl Package<'_> {
    fn disk_name(&self) -> String {
        format!("{}-disk1.vmdk", self.base)
    }

    fn manifest(&self, description_digest: &str, disk_digest: &str) -> String {
        let base = &self.base;
        format!("SHA256({base}.ovf)= {description_digest}\nSHA256({})= {disk_digest}\n", self.disk_name())
    }

    /// The description; the longer the disk's file, the longer it is.
    fn description(&self, disk_len: u64) -> String {
        let (vm_name, base, disk_name) = (xml_text(self.vm_name), &self.base, self.disk_name());
        let sectors = self.size_bytes / SECTOR_BYTES;
        // Whole mebibytes where possible: some importers round other units down.
        let (capacity, units) = match self.size_bytes % (1 << 20) {
            0 => (self.size_bytes >> 20, "byte * 2^20"),
            _ => (sectors * SECTOR_BYTES, "byte"),
        };
        format!(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:href="{disk_name}" ovf:id="file1" ovf:size="{disk_len}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="{units}" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <VirtualSystem ovf:id="{base}">
    <Info>A virtual machine</Info>
    <Name>{vm_name}</Name>
    <OperatingSystemSection ovf:id="1">
      <Info>The guest operating system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{base}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Number of virtual CPUs</rasd:Description>
        <rasd:ElementName>1 virtual CPU</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>1</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory size</rasd:Description>
        <rasd:ElementName>1024 MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>1024</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>Hard disk 1</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
        )
    }
}

/// Escapes text; what XML cannot hold is left out.
fn xml_text(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')) {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::tar;
    use std::sync::Arc;

    #[test]
    fn headers_say_sizes_that_octal_digits_cannot() {
        for len_bytes in [0, 512, MAX_OCTAL, MAX_OCTAL + 1, 1 << 41] {
            let mut file = crate::archive::section::tests::Zeros { head: Vec::new(), len_bytes: len_bytes + 512 };
            file.head.extend(header("a.vmdk", len_bytes, u64::MAX));
            let members = tar::members(&Arc::new(file)).unwrap();
            let found: Vec<_> = members.iter().map(|member| (member.name.as_str(), member.len_bytes)).collect();
            assert_eq!(found, [("a.vmdk", len_bytes)]);
        }
    }

    #[test]
    fn file_names_are_plain_and_text_is_escaped() {
        let names = ["web", "a b/c", "../../x", "", "...", "Grün", "x\u{1b}[1m"].map(file_base);
        assert_eq!(names, ["web", "a-b-c", "x", "disk", "disk", "Gr-n", "x--1m"].map(str::to_owned));
        assert_eq!(file_base(&"x".repeat(500)).len(), 80);
        assert_eq!(xml_text("a<b>&\u{1b}\u{ffff}c"), "a&lt;b&gt;&amp;c");
    }
}
