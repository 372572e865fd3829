//! The snapshot table: what states of the disk are kept in an image beside the current one.
//!
//! ```text
//! offset  bytes  field of one entry
//!      0      8  L1 table offset
//!      8      4  L1 entries
//!     12      2  id length
//!     14      2  name length
//!     16      4  time, in seconds since 1970
//!     20      4  nanoseconds of it
//!     24      8  time the guest has run, in nanoseconds
//!     32      4  length of the saved memory of the guest
//!     36      4  extra data length
//!     40      …  extra data: length of the saved memory u64, size of the disk u64, ...
//!      …      …  id, name, padding to 8 bytes
//! ```
//!
//! Entries follow one another; only a walk over all of them tells where the table ends. The layout is that of
//! QEMU's `docs/interop/qcow2.txt`.

use std::ops::Range;

use crate::bytes::{be_u16, be_u32, be_u64, to_u64, to_usize};
use crate::error::need;
use crate::{FormatError, ReadAt, SnapshotInfo};

use super::header::{Header, MAX_L1_BYTES, SNAPSHOT_ENTRY_BYTES, table_range};

/// QEMU's own limit (`QCOW_MAX_SNAPSHOTS_SIZE`).
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// QEMU's own limit (`QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const MAX_EXTRA_BYTES: u64 = 1024;
/// For names and ids; QEMU cuts them to 255 and 127 bytes.
const MAX_NAME_BYTES: u64 = 1023;
/// Extra data of this length has the size of the disk.
const EXTRA_WITH_DISK_SIZE_BYTES: u64 = 16;
/// How many snapshots a message lists.
const MAX_LISTED: usize = 20;

/// A snapshot whose L1 table lies in the file.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) info: SnapshotInfo,
    pub(super) l1_table: Range<u64>,
    pub(super) l1_entries: u32,
}

/// All snapshots of an image.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Where the table is; empty without snapshots.
    pub(super) table: Range<u64>,
}

impl Snapshots {
    /// Reads and checks the snapshot table; the number of entries was checked with the header.
    pub(super) fn read(file: &dyn ReadAt, header: &Header) -> Result<Self, FormatError> {
        let mut snapshots = Self { list: Vec::new(), table: header.snapshot_table.start..header.snapshot_table.start };
        for number in 1..=header.snapshots {
            let (snapshot, end) = read_entry(file, header, number, snapshots.table.end)?;
            snapshots.table.end = end;
            if end - snapshots.table.start > MAX_TABLE_BYTES {
                let what = format!("snapshot table too large: over {MAX_TABLE_BYTES} bytes");
                return Err(FormatError::corrupt(what));
            }
            snapshots.list.push(snapshot);
        }
        Ok(snapshots)
    }

    /// Returns the one snapshot of this name or id.
    pub(super) fn find(&self, wanted: &str) -> Result<&Snapshot, FormatError> {
        let is_wanted = |snapshot: &&Snapshot| snapshot.info.name == wanted || snapshot.info.id == wanted;
        let found: Vec<_> = self.list.iter().filter(is_wanted).collect();
        let available = match found.as_slice() {
            [only] => return Ok(only),
            [] if self.list.is_empty() => "none".to_owned(),
            [] => listed(&self.list.iter().collect::<Vec<_>>()),
            several => format!("several: {}", listed(several)),
        };
        Err(FormatError::NoSuchSnapshot { name: wanted.to_owned(), available })
    }
}

fn listed(snapshots: &[&Snapshot]) -> String {
    let name = |snapshot: &&Snapshot| format!("{:?} (id {:?})", snapshot.info.name, snapshot.info.id);
    let mut list = snapshots.iter().take(MAX_LISTED).map(name).collect::<Vec<_>>().join(", ");
    if let Some(more @ 1..) = snapshots.len().checked_sub(MAX_LISTED) {
        list.push_str(&format!(" and {more} more"));
    }
    list
}

/// Reads the entry at `at`; returns it and where the next one begins.
fn read_entry(file: &dyn ReadAt, header: &Header, number: u32, at: u64) -> Result<(Snapshot, u64), FormatError> {
    let fixed = read_part(file, at, SNAPSHOT_ENTRY_BYTES)?;
    let extra_bytes = u64::from(be_u32(&fixed, 36));
    let (id_bytes, name_bytes) = (u64::from(be_u16(&fixed, 12)), u64::from(be_u16(&fixed, 14)));
    if extra_bytes > MAX_EXTRA_BYTES {
        return Err(FormatError::corrupt(format!("snapshot {number} has {extra_bytes} bytes of extra data")));
    }
    if id_bytes.max(name_bytes) > MAX_NAME_BYTES {
        let what = format!("the name or id of snapshot {number}");
        return Err(FormatError::TooLarge { what, limit: MAX_NAME_BYTES });
    }
    let variable = read_part(file, at + SNAPSHOT_ENTRY_BYTES, extra_bytes + id_bytes + name_bytes)?;
    let (extra, names) = variable.split_at(to_usize(extra_bytes));
    let (id, name) = names.split_at(to_usize(id_bytes));
    let has_size = extra_bytes >= EXTRA_WITH_DISK_SIZE_BYTES;
    let info = SnapshotInfo {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        size_bytes: if has_size { be_u64(extra, 8) } else { header.size_bytes },
        created_unix_s: u64::from(be_u32(&fixed, 16)),
    };
    let l1_entries = be_u32(&fixed, 8);
    let l1_table = table_range(be_u64(&fixed, 0), u64::from(l1_entries) * 8)?;
    if l1_entries > 0 {
        let name = format!("L1 table of snapshot {number}");
        header.check_table(&l1_table, MAX_L1_BYTES, &name, "the L1 table of a snapshot", file.len_bytes())?;
    }
    let end = (at + SNAPSHOT_ENTRY_BYTES + to_u64(variable.len())).next_multiple_of(8);
    Ok((Snapshot { info, l1_table, l1_entries }, end))
}

/// Reads a part of the table. `at` is at most a table's length past an offset in the file, and `len_bytes` is small.
fn read_part(file: &dyn ReadAt, at: u64, len_bytes: u64) -> Result<Vec<u8>, FormatError> {
    need(file.len_bytes(), at.saturating_add(len_bytes), "the snapshot table")?;
    let mut bytes = vec![0; to_usize(len_bytes)];
    file.read_exact_at(&mut bytes, at).map_err(FormatError::read(at))?;
    Ok(bytes)
}
