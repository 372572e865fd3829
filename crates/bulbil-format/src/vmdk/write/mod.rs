//! Writes VMDK images: one file each, sparse or as a stream.

mod sparse;
mod stream;

use crate::bytes::to_usize;
use crate::convert::Identity;
use crate::disk::SECTOR_BYTES;

pub(crate) use sparse::SparseWriter;
pub(crate) use stream::StreamWriter;

use super::descriptor::CreateType;

/// The grain everybody writes, 64 KiB.
const GRAIN_SECTORS: u64 = 128;
const GRAIN_BYTES: u64 = GRAIN_SECTORS * SECTOR_BYTES;
/// Where the embedded descriptor is, and the room it has, as VMware and QEMU choose them.
const DESCRIPTOR_SECTOR: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;
/// Whole grains, and within what one grain table maps.
const PIECE_BYTES: u64 = 2 << 20;

/// Makes the text of the embedded descriptor, padded with zeros to its room.
fn descriptor(create_type: CreateType, size_bytes: u64, identity: &Identity) -> Vec<u8> {
    let sectors = size_bytes / SECTOR_BYTES;
    let (cylinders, heads, sectors_per_track) = geometry(sectors);
    let long_id: String = identity.derive(1).iter().map(|byte| format!("{byte:02x}")).collect();
    // As VMware has it, the short identifier is the end of the long one.
    let short_id = long_id.get(24..).unwrap_or_default();
    let (kind, access) = match create_type {
        CreateType::StreamOptimized => ("stream", "RDONLY"),
        _ => ("disk", "RW"),
    };
    let text = format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={short_id}\n\
         parentCID=ffffffff\n\
         createType=\"{}\"\n\
         \n\
         # Extent description\n\
         {access} {sectors} SPARSE \"{kind}.vmdk\"\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.adapterType = \"lsilogic\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{sectors_per_track}\"\n\
         ddb.longContentID = \"{long_id}\"\n\
         ddb.uuid = \"{}\"\n\
         ddb.virtualHWVersion = \"10\"\n",
        create_type.as_str(),
        uuid_text(identity.derive(2)),
    );
    let mut bytes = text.into_bytes();
    bytes.resize(to_usize(DESCRIPTOR_SECTORS * SECTOR_BYTES), 0);
    bytes
}

/// Cylinders, heads and sectors, as VMware gives a SCSI disk of this many sectors.
fn geometry(sectors: u64) -> (u64, u64, u64) {
    const SECTORS_OF_GIB: u64 = (1 << 30) / SECTOR_BYTES;
    let (heads, per_track) = match sectors {
        small if small < SECTORS_OF_GIB => (64, 32),
        medium if medium < 2 * SECTORS_OF_GIB => (128, 32),
        _ => (255, 63),
    };
    ((sectors / heads / per_track).max(1), heads, per_track)
}

/// An identifier as VMware writes it: `60 00 C2 9a 1d 7b 49 44-dc 53 e6 d3 e5 89 7b 0d`.
fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let (first, second) = hex.split_at(8);
    format!("{}-{}", first.join(" "), second.join(" "))
}
