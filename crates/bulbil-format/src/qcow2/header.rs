//! The header of a qcow2 image, its extensions, and every bound that follows from them.
//!
//! ```text
//! offset  bytes  field                         offset  bytes  field (version 3)
//!      0      4  "QFI\xfb"                         72      8  incompatible features
//!      4      4  version: 2 or 3                   80      8  compatible features
//!      8      8  backing file name offset          88      8  autoclear features
//!     16      4  backing file name length          96      4  refcount order
//!     20      4  cluster bits: 9 to 21            100      4  header length
//!     24      8  virtual size in bytes            104      1  compression type
//!     32      4  encryption method
//!     36      4  L1 entries                     then, at 72 or at the header length,
//!     40      8  L1 table offset                extensions: type u32, length u32,
//!     48      8  refcount table offset          data padded to 8 bytes; type 0 ends
//!     56      4  refcount table clusters        them. All lies in the first cluster.
//!     60      4  snapshots
//!     64      8  snapshot table offset
//! ```
//!
//! Compatible and autoclear features need no support by a reader and are not looked at.

use std::ops::Range;

use crate::bytes::{be_u32, be_u64, to_u64, to_usize};
use crate::disk::check_size;
use crate::error::need;
use crate::{Compression, FormatError, ReadAt};

const V2_HEADER_BYTES: usize = 72;
const V3_HEADER_BYTES: usize = 104;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Extended L2 entries divide a cluster by 32, and no part may be below a sector.
const EXTENDED_L2_MIN_CLUSTER_BITS: u32 = 14;

/// QEMU's own limit (`QCOW_MAX_L1_SIZE`).
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// QEMU's own limit (`QCOW_MAX_REFTABLE_SIZE`).
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// QEMU's own limit (`QCOW_MAX_SNAPSHOTS`).
const MAX_SNAPSHOTS: u32 = 65536;
/// The part of a snapshot table entry that every snapshot has.
pub(super) const SNAPSHOT_ENTRY_BYTES: u64 = 40;
/// QEMU's own limit for the name of a backing file; no more of any name is repeated in a message.
const MAX_NAME_BYTES: u32 = 1023;
/// 2 to the power of 6 is 64 bits, the widest reference count.
const MAX_REFCOUNT_ORDER: u32 = 6;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_FEATURES: u64 = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

const EXT_END: u32 = 0;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Type (0: incompatible), bit number, name of 46 bytes.
const FEATURE_NAME_BYTES: usize = 48;

/// A header whose every field is within its bounds and whose tables lie in the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size_bytes: u64,
    pub(super) l1_offset: u64,
    /// How many L1 entries there are, which may be more than the disk needs.
    pub(super) l1_entries: u32,
    pub(super) refcount_table: Range<u64>,
    /// The table as far as its length is known from the header.
    pub(super) snapshot_table: Range<u64>,
    pub(super) snapshots: u32,
    pub(super) dirty: bool,
    pub(super) compression: Compression,
    pub(super) extended_l2: bool,
    /// The name of the backing file, which is never opened.
    pub(super) backing_file: Option<String>,
}

impl Header {
    /// Reads and checks the header of a file that begins with the magic number. A backing file is an error unless
    /// `has_parent` says that somebody supplies its content.
    pub(super) fn read(file: &dyn ReadAt, has_parent: bool) -> Result<Self, FormatError> {
        let len_bytes = file.len_bytes();
        let max_cluster_bytes = 1_u64 << CLUSTER_BITS.end();
        let mut bytes = vec![0; to_usize(len_bytes.min(max_cluster_bytes))];
        file.read_exact_at(&mut bytes, 0).map_err(FormatError::read(0))?;
        Self::parse(&bytes, len_bytes, has_parent)
    }

    /// Parses `bytes`, the beginning of a file of `len_bytes` bytes: the first cluster, and perhaps more.
    fn parse(bytes: &[u8], len_bytes: u64, has_parent: bool) -> Result<Self, FormatError> {
        need(len_bytes, V2_HEADER_BYTES as u64, "the header")?;
        let version = be_u32(bytes, 4);
        let header_bytes = match version {
            1 => return Err(FormatError::UnsupportedFormat { name: "qcow version 1".to_owned() }),
            2 => V2_HEADER_BYTES,
            3 => v3_header_bytes(bytes, len_bytes)?,
            _ => return Err(FormatError::UnsupportedFormat { name: format!("qcow2 version {version}") }),
        };
        let cluster_bits = be_u32(bytes, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(FormatError::corrupt(format!("cluster size of 2^{cluster_bits} bytes is not 512 B to 2 MiB")));
        }
        let first_cluster = bytes.get(..1 << cluster_bits).unwrap_or(bytes);
        if header_bytes > first_cluster.len() {
            return Err(FormatError::corrupt(format!("header of {header_bytes} bytes is larger than a cluster")));
        }
        let backing_file = backing_file(first_cluster, has_parent)?;
        if be_u32(bytes, 32) != 0 {
            let what = if be_u32(bytes, 32) == 2 { "the content, with LUKS" } else { "the content, with AES" };
            return Err(FormatError::Encrypted { what });
        }
        let incompatible = if version == 3 { be_u64(bytes, 72) } else { 0 };
        let extensions = Extensions::parse(first_cluster, header_bytes)?;
        check_features(incompatible, &extensions)?;

        let header = Self {
            version,
            cluster_bits,
            size_bytes: be_u64(bytes, 24),
            l1_offset: be_u64(bytes, 40),
            l1_entries: be_u32(bytes, 36),
            refcount_table: table_range(be_u64(bytes, 48), u64::from(be_u32(bytes, 56)) << cluster_bits)?,
            snapshot_table: table_range(be_u64(bytes, 64), u64::from(be_u32(bytes, 60)) * SNAPSHOT_ENTRY_BYTES)?,
            snapshots: be_u32(bytes, 60),
            dirty: incompatible & DIRTY != 0,
            compression: compression(bytes, header_bytes, incompatible)?,
            extended_l2: incompatible & EXTENDED_L2 != 0,
            backing_file,
        };
        header.check(bytes, len_bytes)?;
        Ok(header)
    }

    fn check(&self, bytes: &[u8], len_bytes: u64) -> Result<(), FormatError> {
        check_size(self.size_bytes)?;
        if self.extended_l2 && self.cluster_bits < EXTENDED_L2_MIN_CLUSTER_BITS {
            return Err(FormatError::corrupt("extended L2 entries with clusters below 16 KiB"));
        }
        if self.version == 3 && be_u32(bytes, 96) > MAX_REFCOUNT_ORDER {
            return Err(FormatError::corrupt(format!("refcount order {} is over 6", be_u32(bytes, 96))));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(FormatError::corrupt(format!("snapshot table too large: {} snapshots", self.snapshots)));
        }
        if self.refcount_table.is_empty() {
            return Err(FormatError::corrupt("no refcount table"));
        }
        let l1_table = table_range(self.l1_offset, u64::from(self.l1_entries) * 8)?;
        self.check_l1_covers_disk()?;
        self.check_table(&l1_table, MAX_L1_BYTES, "L1 table", "the L1 table", len_bytes)?;
        let reftable = (&self.refcount_table, MAX_REFCOUNT_TABLE_BYTES);
        self.check_table(reftable.0, reftable.1, "refcount table", "the refcount table", len_bytes)?;
        if self.snapshots > 0 {
            self.check_table(&self.snapshot_table, u64::MAX, "snapshot table", "the snapshot table", len_bytes)?;
        }
        Ok(())
    }

    fn check_l1_covers_disk(&self) -> Result<(), FormatError> {
        let needed = self.l1_entries_needed();
        if u64::from(self.l1_entries) >= needed {
            return Ok(());
        }
        Err(FormatError::corrupt(format!("L1 table too small: {} of {needed} entries", self.l1_entries)))
    }

    /// Returns the header as if the state of a snapshot were the current one.
    ///
    /// # Errors
    /// If the disk of that time has no possible size, or more of it than the snapshot's L1 table maps.
    pub(super) fn at_snapshot(&self, size_bytes: u64, l1_offset: u64, l1_entries: u32) -> Result<Self, FormatError> {
        check_size(size_bytes)?;
        let header = Self { size_bytes, l1_offset, l1_entries, ..self.clone() };
        header.check_l1_covers_disk()?;
        Ok(header)
    }

    /// Checks that a table is not too long, at a cluster, and in the file.
    pub(super) fn check_table(
        &self,
        table: &Range<u64>,
        max_bytes: u64,
        name: &str,
        what: &'static str,
        len_bytes: u64,
    ) -> Result<(), FormatError> {
        if table.end - table.start > max_bytes {
            return Err(FormatError::corrupt(format!("{name} too large: {} bytes", table.end - table.start)));
        }
        if table.start == 0 || !table.start.is_multiple_of(self.cluster_bytes()) {
            return Err(FormatError::corrupt(format!("{name} at {:#x} is not at a cluster", table.start)));
        }
        need(len_bytes, table.end, what)
    }

    /// The size of a cluster: 512 B to 2 MiB.
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The number of 64-bit words of one L2 entry: two if it has a map of subclusters.
    pub(super) fn l2_entry_words(&self) -> u64 {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// How many clusters one L2 table maps; the table itself is one cluster.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8 / self.l2_entry_words()
    }

    /// How much of the disk one L2 table maps: at most 512 GiB.
    pub(super) fn l2_coverage_bytes(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Where the L1 table is.
    pub(super) fn l1_table(&self) -> Range<u64> {
        self.l1_offset..self.l1_offset.saturating_add(u64::from(self.l1_entries) * 8)
    }

    /// How many L1 entries the disk needs.
    pub(super) fn l1_entries_needed(&self) -> u64 {
        self.size_bytes.div_ceil(self.l2_coverage_bytes())
    }
}

pub(super) fn table_range(offset: u64, bytes: u64) -> Result<Range<u64>, FormatError> {
    let end = offset.checked_add(bytes);
    let end = end.ok_or_else(|| FormatError::corrupt(format!("table at {offset:#x} does not end")))?;
    Ok(offset..end)
}

fn v3_header_bytes(bytes: &[u8], len_bytes: u64) -> Result<usize, FormatError> {
    need(len_bytes, V3_HEADER_BYTES as u64, "the header")?;
    let header_bytes = to_usize(u64::from(be_u32(bytes, 100)));
    if header_bytes < V3_HEADER_BYTES || !header_bytes.is_multiple_of(8) {
        return Err(FormatError::corrupt(format!("header length of {header_bytes} bytes")));
    }
    Ok(header_bytes)
}

/// Returns the name of the backing file, or `None` if there is none; with a name, somebody must supply its content.
fn backing_file(first_cluster: &[u8], has_parent: bool) -> Result<Option<String>, FormatError> {
    let offset = be_u64(first_cluster, 8);
    let len = be_u32(first_cluster, 16);
    if offset == 0 && len == 0 {
        if has_parent {
            return Err(FormatError::ParentMismatch { reason: "the qcow2 image has no backing file".to_owned() });
        }
        return Ok(None);
    }
    let rest = usize::try_from(offset).ok().and_then(|offset| first_cluster.get(offset..)).unwrap_or_default();
    let name = rest.get(..to_usize(u64::from(len.min(MAX_NAME_BYTES)))).unwrap_or(rest);
    let text = String::from_utf8_lossy(name).into_owned();
    if !has_parent {
        return Err(FormatError::HasBackingFile { name: text });
    }
    if offset == 0 || name.is_empty() || to_u64(name.len()) != u64::from(len) {
        return Err(FormatError::corrupt(format!("backing file name of {len} bytes at {offset:#x}")));
    }
    Ok(Some(text))
}

fn check_features(incompatible: u64, extensions: &Extensions) -> Result<(), FormatError> {
    if incompatible & EXTERNAL_DATA_FILE != 0 || extensions.data_file.is_some() {
        return Err(FormatError::ExternalDataFile { name: extensions.data_file.clone().unwrap_or_default() });
    }
    if extensions.encryption {
        return Err(FormatError::Encrypted { what: "the content, with LUKS" });
    }
    let unknown = incompatible & !KNOWN_FEATURES;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        return Err(FormatError::UnsupportedFeature { bit, name: extensions.feature_name(bit) });
    }
    if incompatible & CORRUPT != 0 { Err(FormatError::MarkedCorrupt) } else { Ok(()) }
}

/// The compression type must be in the header exactly if the feature bit says so.
fn compression(bytes: &[u8], header_bytes: usize, incompatible: u64) -> Result<Compression, FormatError> {
    let in_header = header_bytes > V3_HEADER_BYTES;
    let kind = if in_header { bytes.get(V3_HEADER_BYTES).copied().unwrap_or_default() } else { 0 };
    match (kind, incompatible & COMPRESSION_TYPE != 0) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0 | 1, flagged) => {
            let flag = if flagged { "with" } else { "without" };
            Err(FormatError::corrupt(format!("compression type {kind} {flag} the compression type feature bit")))
        }
        (kind, _) => Err(FormatError::UnsupportedFeature { bit: 3, name: format!("compression type {kind}") }),
    }
}

/// The header extensions that matter to a reader.
#[derive(Debug, Default)]
struct Extensions {
    data_file: Option<String>,
    encryption: bool,
    incompatible_names: Vec<(u32, String)>,
}

impl Extensions {
    /// Reads the extensions from `at` up to the end mark or the end of the first cluster. Their number is bounded by
    /// the cluster: each takes 8 bytes or more.
    fn parse(first_cluster: &[u8], mut at: usize) -> Result<Self, FormatError> {
        let mut extensions = Self::default();
        while let Some(rest) = first_cluster.get(at..).filter(|rest| rest.len() >= 8) {
            let kind = be_u32(rest, 0);
            let len = to_usize(u64::from(be_u32(rest, 4)));
            if kind == EXT_END {
                break;
            }
            let data = rest.get(8..).and_then(|data| data.get(..len)).ok_or_else(|| {
                FormatError::corrupt(format!("header extension {kind:#010x} at {at:#x} is larger than the header"))
            })?;
            extensions.take(kind, data);
            at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
        }
        Ok(extensions)
    }

    fn take(&mut self, kind: u32, data: &[u8]) {
        match kind {
            EXT_DATA_FILE => {
                let name = data.get(..to_usize(u64::from(MAX_NAME_BYTES))).unwrap_or(data);
                self.data_file = Some(String::from_utf8_lossy(name).into_owned());
            }
            EXT_ENCRYPTION => self.encryption = true,
            EXT_FEATURE_NAMES => {
                let incompatible = data.chunks_exact(FEATURE_NAME_BYTES).filter(|entry| entry.first() == Some(&0));
                self.incompatible_names.extend(incompatible.map(feature_name));
            }
            _ => {}
        }
    }

    fn feature_name(&self, bit: u32) -> String {
        let known = self.incompatible_names.iter().find(|(number, _)| *number == bit);
        known.map_or_else(|| "unknown".to_owned(), |(_, name)| name.clone())
    }
}

/// Reads one entry of the feature name table. Only plain characters are kept: the name goes into a message.
fn feature_name(entry: &[u8]) -> (u32, String) {
    let bit = entry.get(1).copied().unwrap_or_default();
    let name = entry.get(2..).unwrap_or_default();
    let plain = name.iter().take_while(|byte| byte.is_ascii_graphic() || **byte == b' ');
    (u32::from(bit), plain.map(|byte| char::from(*byte)).collect())
}
