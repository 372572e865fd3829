//! What is known of an image before its first cluster: the header, and the limits that the size of the disk sets.

use crate::bytes::to_u64;
use crate::disk::check_size;
use crate::{Compression, ConvertError, Format, Qcow2Options};

use crate::qcow2::header::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};

/// 2^4 = 16 bits for each count, as every writer has it.
const REFCOUNT_ORDER: u32 = 4;
/// The bytes of one count.
pub(super) const REFCOUNT_BYTES: u64 = 2;
const MIN_CLUSTER_BYTES: u64 = 512;
const MAX_CLUSTER_BYTES: u64 = 2 << 20;
const MAX_NAME_BYTES: usize = 1023;

const HEADER_BYTES: u32 = 104;
/// With the compression type and seven bytes of padding.
const HEADER_WITH_COMPRESSION_BYTES: u32 = 112;
const INCOMPATIBLE_COMPRESSION_TYPE: u64 = 1 << 3;
const COMPRESSION_TYPE_ZSTD: u64 = 1 << 56;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// What a reader that does not know the feature will say; 46 bytes with the zeros behind.
const COMPRESSION_FEATURE_NAME: &[u8] = b"compression type";
const FEATURE_NAME_BYTES: usize = 46;

/// The header's constant part.
#[derive(Debug)]
pub(super) struct Layout {
    size_bytes: u64,
    cluster_bits: u32,
    compression: Option<Compression>,
    /// The name of the backing file and its format as QEMU calls it.
    backing: Option<(String, &'static str)>,
}

/// Where the tables came to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables {
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
}

impl Layout {
    /// Checks what is asked for.
    pub(super) fn new(size_bytes: u64, options: &Qcow2Options) -> Result<Self, ConvertError> {
        check_size(size_bytes).map_err(|error| ConvertError::unsupported(error.to_string()))?;
        let cluster_bytes = options.cluster_bytes;
        if !cluster_bytes.is_power_of_two() || !(MIN_CLUSTER_BYTES..=MAX_CLUSTER_BYTES).contains(&cluster_bytes) {
            let reason = format!("a qcow2 cluster of {cluster_bytes} bytes: use a power of two from 512 to 2097152");
            return Err(ConvertError::unsupported(reason));
        }
        if !fits(size_bytes, cluster_bytes) {
            let mut least = cluster_bytes;
            while !fits(size_bytes, least) {
                least *= 2;
            }
            let reason = format!("a qcow2 disk of {size_bytes} bytes needs clusters of at least {least} bytes");
            return Err(ConvertError::unsupported(reason));
        }
        let backing = options.backing.as_ref().map(|backing| (backing.name.clone(), qemu_name(backing.format)));
        if backing.as_ref().is_some_and(|(name, _)| !(1..=MAX_NAME_BYTES).contains(&name.len())) {
            return Err(ConvertError::unsupported("the name of a backing file has 1 to 1023 bytes"));
        }
        let cluster_bits = cluster_bytes.trailing_zeros();
        let layout = Self { size_bytes, cluster_bits, compression: options.compression, backing };
        let header = layout.header(Tables { l1_offset: 0, refcount_table_offset: 0, refcount_table_clusters: 0 })?;
        if to_u64(header.len()) > cluster_bytes {
            return Err(ConvertError::unsupported("the name of the backing file does not fit in the first cluster"));
        }
        Ok(layout)
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn compression(&self) -> Option<Compression> {
        self.compression
    }

    /// How many entries an L2 table has.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// How many L1 entries the disk needs: at most 2^22.
    pub(super) fn l1_entries(&self) -> u64 {
        l1_entries(self.size_bytes, self.cluster_bytes())
    }

    /// Makes the header with its extensions and the name of the backing file.
    pub(super) fn header(&self, tables: Tables) -> Result<Vec<u8>, ConvertError> {
        let zstd = self.compression == Some(Compression::Zstd);
        let names = [self.backing_format_extension(), self.feature_name_extension(zstd), vec![0; 8]].concat();
        let header_bytes = if zstd { HEADER_WITH_COMPRESSION_BYTES } else { HEADER_BYTES };
        let name = self.backing.as_ref().map_or("", |(name, _)| name);
        let name_offset = if name.is_empty() { 0 } else { u64::from(header_bytes) + to_u64(names.len()) };

        let mut header = b"QFI\xfb".to_vec();
        header.extend(3_u32.to_be_bytes());
        header.extend(name_offset.to_be_bytes());
        header.extend(word(to_u64(name.len()))?);
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(self.size_bytes.to_be_bytes());
        header.extend(0_u32.to_be_bytes()); // not encrypted
        header.extend(word(self.l1_entries())?);
        header.extend(tables.l1_offset.to_be_bytes());
        header.extend(tables.refcount_table_offset.to_be_bytes());
        header.extend(word(tables.refcount_table_clusters)?);
        header.extend(0_u32.to_be_bytes()); // no snapshots,
        header.extend(0_u64.to_be_bytes()); // no table of them
        header.extend(if zstd { INCOMPATIBLE_COMPRESSION_TYPE } else { 0 }.to_be_bytes());
        header.extend(0_u64.to_be_bytes()); // no compatible features
        header.extend(0_u64.to_be_bytes()); // nor autoclear features
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend(header_bytes.to_be_bytes());
        if zstd {
            header.extend(COMPRESSION_TYPE_ZSTD.to_be_bytes());
        }
        header.extend(names);
        header.extend(name.as_bytes());
        Ok(header)
    }

    fn backing_format_extension(&self) -> Vec<u8> {
        self.backing.as_ref().map_or_else(Vec::new, |(_, format)| extension(EXT_BACKING_FORMAT, format.as_bytes()))
    }

    /// Names the one feature that old readers may not know.
    fn feature_name_extension(&self, zstd: bool) -> Vec<u8> {
        // In the smallest clusters the room is for the name of the backing file.
        if !zstd || self.cluster_bytes() == MIN_CLUSTER_BYTES {
            return Vec::new();
        }
        let mut entry = vec![0, 3]; // incompatible, bit 3
        entry.extend(COMPRESSION_FEATURE_NAME);
        entry.resize(2 + FEATURE_NAME_BYTES, 0);
        extension(EXT_FEATURE_NAMES, &entry)
    }
}

fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_be_bytes().to_vec();
    bytes.extend(u32::try_from(data.len()).unwrap_or_default().to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A header field of 32 bits.
fn word(value: u64) -> Result<[u8; 4], ConvertError> {
    let value = u32::try_from(value).map_err(|_| ConvertError::unsupported("the image would become too large"))?;
    Ok(value.to_be_bytes())
}

/// What QEMU calls a format.
fn qemu_name(format: Format) -> &'static str {
    match format {
        Format::Vhd => "vpc",
        Format::Raw | Format::Qcow2 | Format::Vhdx | Format::Vmdk | Format::Vdi => format.as_str(),
    }
}

fn l1_entries(size_bytes: u64, cluster_bytes: u64) -> u64 {
    size_bytes.div_ceil(cluster_bytes / 8 * cluster_bytes)
}

/// Whether the tables of a disk with content everywhere stay within the limits of QEMU.
fn fits(size_bytes: u64, cluster_bytes: u64) -> bool {
    let l1_bytes = l1_entries(size_bytes, cluster_bytes) * 8;
    let data_and_l2 = size_bytes.div_ceil(cluster_bytes) + l1_entries(size_bytes, cluster_bytes);
    let clusters = 1 + data_and_l2 + l1_bytes.div_ceil(cluster_bytes);
    let refcount_table_bytes = refcount_clusters(clusters, cluster_bytes).1 * cluster_bytes;
    l1_bytes <= MAX_L1_BYTES && refcount_table_bytes <= MAX_REFCOUNT_TABLE_BYTES
}

/// Returns how many refcount blocks, and clusters of the table of them, count the references to so many other clusters
/// and to themselves.
pub(super) fn refcount_clusters(other_clusters: u64, cluster_bytes: u64) -> (u64, u64) {
    let (mut blocks, mut table) = (0, 0);
    loop {
        let clusters = other_clusters + blocks + table;
        let needed = clusters.div_ceil(cluster_bytes / REFCOUNT_BYTES);
        let needed_table = needed.div_ceil(cluster_bytes / 8);
        if (needed, needed_table) == (blocks, table) {
            return (blocks, table);
        }
        (blocks, table) = (needed, needed_table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_count_themselves() {
        for cluster_bytes in [512, 4096, 65536, 2 << 20] {
            for others in (0..2000).chain([1 << 20, (1 << 30) - 1]) {
                let (blocks, table) = refcount_clusters(others, cluster_bytes);
                assert!((others + blocks + table) * REFCOUNT_BYTES <= blocks * cluster_bytes);
                assert!(blocks * 8 <= table * cluster_bytes);
            }
        }
    }

    #[test]
    fn the_least_cluster_size_is_named() {
        let error = |size_bytes, cluster_bytes| {
            let options = Qcow2Options { cluster_bytes, ..Qcow2Options::default() };
            Layout::new(size_bytes, &options).unwrap_err().to_string()
        };
        let message = error(64 << 40, 4096);
        assert!(message.ends_with("needs clusters of at least 16384 bytes"), "{message}");
        let message = error(127 << 30, 512);
        assert!(message.ends_with("needs clusters of at least 1024 bytes"), "{message}");
        for cluster_bytes in [0, 256, 513, 4 << 20] {
            assert!(error(1 << 20, cluster_bytes).contains("a power of two from 512 to 2097152"));
        }
    }
}
