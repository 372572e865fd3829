//! ISO 9660 with Rock Ridge and Joliet: the file system that cloud-init and every operating system read.
//!
//! ```text
//! sector  content (sectors of 2048 bytes)
//!   0-15  zeros, where boot code would be
//!     16  primary volume descriptor
//!     17  supplementary volume descriptor (Joliet)
//!     18  end of the descriptors
//!     19  path tables: primary little-endian, big-endian; Joliet little-endian, big-endian
//!    ...  directories of the primary tree, names in 8.3 with the true ones in Rock Ridge fields
//!    ...  directories of the Joliet tree, names in UCS-2
//!    ...  the files, shared by both trees
//!    ...  zeros, up to 512 KiB
//! ```
//!
//! Linux prefers Rock Ridge, Windows and most BSDs read Joliet, firmware reads 8.3. The label is stored in both
//! descriptors in the case given: the standard asks for upper case, but `blkid` and the data sources of cloud-init
//! compare what is there.

#![allow(clippy::indexing_slicing, reason = "every index is a node of the tree, and every list has one entry for each")]

use super::tree::{Node, Tree};
use super::{MAX_SEED_BYTES, SeedError};
use crate::bytes::to_u64;

const SECTOR_BYTES: usize = 2048;
/// The first sector after the volume descriptors.
const FIRST_FREE_SECTOR: u32 = 19;
/// The smallest image, 512 KiB. Programs that look for labels try every file system they know, some of which lie beyond
/// 64 KiB; busybox (1.35) gives up on a disk that ends before, and does not find the label.
const MIN_SECTORS: u32 = 256;
/// Sectors in a block of 4 KiB, of which the image has a whole number.
const BLOCK_SECTORS: u32 = 2;
/// The length Joliet gives a volume label.
const MAX_LABEL_LEN: usize = 16;
/// The last second that fits into the one byte a directory record has for the year: the end of 2155.
const MAX_UNIX_S: u64 = 5_869_583_999;

const DIRECTORY_MODE: u32 = 0o040_555;
const FILE_MODE: u32 = 0o100_444;
const DIRECTORY_FLAG: u8 = 2;

/// Writes a file system with the given files and returns the image, a multiple of 4096 bytes and at least 512 KiB.
///
/// `files` are paths (`user-data`, `openstack/latest/meta_data.json`) and contents; missing directories are made. All
/// is owned by root and readable by everyone. The same arguments give the same bytes: `created_unix_s`, seconds since
/// 1970 in UTC and taken as the end of 2155 if it is later, is the one time stored.
///
/// # Errors
/// [`SeedError`] if the label or a path cannot be stored as given, or there is too much.
///
/// # Examples
/// ```
/// let files = [("meta-data", b"instance-id: i-1\n".as_slice()), ("user-data", b"#cloud-config\n")];
/// let image = bulbil_format::seed::write_iso9660("cidata", &files, 1_700_000_000)?;
/// assert_eq!(&image[0x8028..0x802e], b"cidata");
/// # Ok::<(), bulbil_format::seed::SeedError>(())
/// ```
pub fn write_iso9660(label: &str, files: &[(&str, &[u8])], created_unix_s: u64) -> Result<Vec<u8>, SeedError> {
    let label_fits = (1..=MAX_LABEL_LEN).contains(&label.len());
    if !label_fits || !label.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return Err(SeedError::Label { label: label.to_owned() });
    }
    let total_bytes: u64 = files.iter().map(|(_, content)| to_u64(content.len())).sum();
    if total_bytes > MAX_SEED_BYTES {
        return Err(SeedError::TooLarge);
    }
    let tree = Tree::build(files)?;
    Ok(Writer::new(label, &tree, Time::from_unix(created_unix_s)).write())
}

/// Which of the two trees is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    Primary,
    Joliet,
}

impl Naming {
    fn name_of<'t>(self, node: &'t Node<'_>) -> &'t str {
        match self {
            Self::Primary => &node.short_name,
            Self::Joliet => node.name,
        }
    }

    fn encode(self, text: &str) -> Vec<u8> {
        match self {
            Self::Primary => text.as_bytes().to_vec(),
            Self::Joliet => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
        }
    }

    /// A text field of a volume descriptor, filled up with spaces.
    fn field(self, text: &str, len: usize) -> Vec<u8> {
        let mut bytes = self.encode(text);
        let space = self.encode(" ");
        bytes.extend(space.iter().cycle().take((len - bytes.len()) / space.len() * space.len()));
        bytes.resize(len, 0);
        bytes
    }
}

/// One of the two trees: its directories in the order of its path table, and where they are.
#[derive(Debug)]
struct Hierarchy {
    naming: Naming,
    directories: Vec<usize>,
    path_table_bytes: usize,
    little_endian_table_at: u32,
    big_endian_table_at: u32,
    /// For each node, the first sector and the length of its directory or file.
    extents: Vec<Extent>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Extent {
    sector: u32,
    len_bytes: u32,
}

struct Writer<'t> {
    label: &'t str,
    tree: &'t Tree<'t>,
    time: Time,
    primary: Hierarchy,
    joliet: Hierarchy,
    sectors: u32,
}

/// Hands out sectors one after the other.
struct Allocator {
    next: u32,
}

impl Allocator {
    fn take(&mut self, len_bytes: usize) -> u32 {
        let sector = self.next;
        self.next += u32_from(len_bytes.div_ceil(SECTOR_BYTES));
        sector
    }
}

/// # Panics
/// Never: everything is far below [`MAX_SEED_BYTES`] or bounded by the number of entries.
fn u32_from(len: usize) -> u32 {
    u32::try_from(len).expect("a seed disk is smaller than 4 GiB")
}

impl<'t> Writer<'t> {
    fn new(label: &'t str, tree: &'t Tree<'t>, time: Time) -> Self {
        let hierarchy = |naming: Naming| {
            let directories = tree.directories(|node| naming.name_of(node));
            let extents = vec![Extent::default(); tree.nodes.len()];
            let (little_endian_table_at, big_endian_table_at) = (0, 0);
            Hierarchy { naming, directories, path_table_bytes: 0, little_endian_table_at, big_endian_table_at, extents }
        };
        let (primary, joliet) = (hierarchy(Naming::Primary), hierarchy(Naming::Joliet));
        let mut writer = Self { label, tree, time, primary, joliet, sectors: 0 };
        writer.lay_out();
        writer
    }

    /// Gives everything its place. The length of a directory does not depend on the places of what it holds, so its
    /// records are simply made once before these are known and once after.
    fn lay_out(&mut self) {
        let mut free = Allocator { next: FIRST_FREE_SECTOR };
        for naming in [Naming::Primary, Naming::Joliet] {
            let table_bytes = self.path_table(self.hierarchy(naming), u32::to_le_bytes, u16::to_le_bytes).len();
            let hierarchy = self.hierarchy_mut(naming);
            hierarchy.path_table_bytes = table_bytes;
            hierarchy.little_endian_table_at = free.take(table_bytes);
            hierarchy.big_endian_table_at = free.take(table_bytes);
        }
        for naming in [Naming::Primary, Naming::Joliet] {
            for directory in self.hierarchy(naming).directories.clone() {
                let len_bytes = self.directory(self.hierarchy(naming), directory).len();
                let extent = Extent { sector: free.take(len_bytes), len_bytes: u32_from(len_bytes) };
                self.hierarchy_mut(naming).extents[directory] = extent;
            }
        }
        for (node, content) in self.tree.nodes.iter().map(|node| node.content).enumerate() {
            if let Some(content) = content {
                let extent = Extent { sector: free.take(content.len()), len_bytes: u32_from(content.len()) };
                self.primary.extents[node] = extent;
                self.joliet.extents[node] = extent;
            }
        }
        self.sectors = free.next.next_multiple_of(BLOCK_SECTORS).max(MIN_SECTORS);
    }

    fn hierarchy(&self, naming: Naming) -> &Hierarchy {
        match naming {
            Naming::Primary => &self.primary,
            Naming::Joliet => &self.joliet,
        }
    }

    fn hierarchy_mut(&mut self, naming: Naming) -> &mut Hierarchy {
        match naming {
            Naming::Primary => &mut self.primary,
            Naming::Joliet => &mut self.joliet,
        }
    }

    /// Writes everything in the order of [`Writer::lay_out`].
    fn write(&self) -> Vec<u8> {
        let mut image = vec![0; 16 * SECTOR_BYTES];
        image.extend(self.volume_descriptor(&self.primary));
        image.extend(self.volume_descriptor(&self.joliet));
        image.extend(b"\xffCD001\x01");
        pad_to_sector(&mut image);
        for hierarchy in [&self.primary, &self.joliet] {
            image.extend(self.path_table(hierarchy, u32::to_le_bytes, u16::to_le_bytes));
            pad_to_sector(&mut image);
            image.extend(self.path_table(hierarchy, u32::to_be_bytes, u16::to_be_bytes));
            pad_to_sector(&mut image);
        }
        for hierarchy in [&self.primary, &self.joliet] {
            for directory in &hierarchy.directories {
                image.extend(self.directory(hierarchy, *directory));
            }
        }
        for content in self.tree.nodes.iter().filter_map(|node| node.content) {
            image.extend(content);
            pad_to_sector(&mut image);
        }
        let len_bytes = self.sectors as usize * SECTOR_BYTES;
        assert!(image.len() <= len_bytes, "the layout counts every sector");
        image.resize(len_bytes, 0);
        image
    }

    /// ECMA-119, 8.4 and 8.5.
    fn volume_descriptor(&self, hierarchy: &Hierarchy) -> Vec<u8> {
        let naming = hierarchy.naming;
        let mut bytes = Vec::with_capacity(SECTOR_BYTES);
        bytes.push(if naming == Naming::Primary { 1 } else { 2 });
        bytes.extend(b"CD001\x01\0");
        bytes.extend(naming.field("", 32));
        bytes.extend(naming.field(self.label, 32));
        bytes.extend([0; 8]);
        bytes.extend(both_u32(self.sectors));
        // Joliet, level 3: UCS-2.
        let escape: &[u8] = if naming == Naming::Primary { b"" } else { b"%/E" };
        bytes.extend(escape);
        bytes.resize(120, 0);
        bytes.extend(both_u16(1));
        bytes.extend(both_u16(1));
        bytes.extend(both_u16(2048));
        bytes.extend(both_u32(u32_from(hierarchy.path_table_bytes)));
        bytes.extend(hierarchy.little_endian_table_at.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(hierarchy.big_endian_table_at.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.record(hierarchy, 0, &[0], &[]));
        for len in [128, 128, 128, 128, 37, 37, 37] {
            bytes.extend(naming.field("", len));
        }
        bytes.extend(self.time.long());
        bytes.extend(self.time.long());
        bytes.extend(Time::LONG_UNSET);
        bytes.extend(Time::LONG_UNSET);
        bytes.push(1);
        bytes.resize(SECTOR_BYTES, 0);
        bytes
    }

    /// ECMA-119, 9.4.
    fn path_table(
        &self,
        hierarchy: &Hierarchy,
        u32_bytes: fn(u32) -> [u8; 4],
        u16_bytes: fn(u16) -> [u8; 2],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        for directory in &hierarchy.directories {
            let node = &self.tree.nodes[*directory];
            let name = if *directory == 0 { vec![0] } else { hierarchy.naming.encode(hierarchy.naming.name_of(node)) };
            let parent = hierarchy.directories.iter().position(|other| *other == node.parent).unwrap_or_default();
            bytes.push(u8_from(name.len()));
            bytes.push(0);
            bytes.extend(u32_bytes(hierarchy.extents[*directory].sector));
            bytes.extend(u16_bytes(u16::try_from(parent + 1).expect("there are at most 1001 directories")));
            bytes.extend(&name);
            pad_to_even(&mut bytes);
        }
        bytes
    }

    /// The records of a directory; none crosses a sector.
    fn directory(&self, hierarchy: &Hierarchy, directory: usize) -> Vec<u8> {
        let rock_ridge = hierarchy.naming == Naming::Primary;
        let parent = self.tree.nodes[directory].parent;
        let fields = |node, extra: Vec<u8>| if rock_ridge { [extra, self.posix_fields(node)].concat() } else { vec![] };
        let mut records = vec![
            self.record(
                hierarchy,
                directory,
                &[0],
                &fields(directory, if directory == 0 { susp_fields() } else { vec![] }),
            ),
            self.record(hierarchy, parent, &[1], &fields(parent, vec![])),
        ];
        for child in self.tree.sorted_children(directory, |node| hierarchy.naming.name_of(node)) {
            let node = &self.tree.nodes[child];
            let name = match (hierarchy.naming, node.content) {
                (Naming::Joliet, Some(_)) => format!("{};1", node.name),
                _ => hierarchy.naming.name_of(node).to_owned(),
            };
            let fields = fields(child, name_field(node.name));
            records.push(self.record(hierarchy, child, &hierarchy.naming.encode(&name), &fields));
        }
        let mut bytes = Vec::new();
        for record in records {
            if bytes.len() % SECTOR_BYTES + record.len() > SECTOR_BYTES {
                pad_to_sector(&mut bytes);
            }
            bytes.extend(record);
        }
        pad_to_sector(&mut bytes);
        bytes
    }

    /// ECMA-119, 9.1: a directory record with its system use fields.
    fn record(&self, hierarchy: &Hierarchy, node: usize, name: &[u8], system_use: &[u8]) -> Vec<u8> {
        let extent = hierarchy.extents[node];
        let is_directory = self.tree.nodes[node].content.is_none();
        let mut bytes = vec![0, 0];
        bytes.extend(both_u32(extent.sector));
        bytes.extend(both_u32(extent.len_bytes));
        bytes.extend(self.time.short());
        bytes.extend([if is_directory { DIRECTORY_FLAG } else { 0 }, 0, 0]);
        bytes.extend(both_u16(1));
        bytes.push(u8_from(name.len()));
        bytes.extend(name);
        pad_to_even(&mut bytes);
        bytes.extend(system_use);
        pad_to_even(&mut bytes);
        bytes[0] = u8_from(bytes.len());
        bytes
    }

    /// Rock Ridge: mode, links, owner (`PX`) and times of change, access and attributes (`TF`).
    fn posix_fields(&self, node: usize) -> Vec<u8> {
        let node = &self.tree.nodes[node];
        let subdirectories = node.children.iter().filter(|child| self.tree.nodes[**child].content.is_none()).count();
        let (mode, links) = match node.content {
            None => (DIRECTORY_MODE, 2 + u32_from(subdirectories)),
            Some(_) => (FILE_MODE, 1),
        };
        let mut bytes = b"PX\x24\x01".to_vec();
        for value in [mode, links, 0, 0] {
            bytes.extend(both_u32(value));
        }
        bytes.extend(b"TF\x1a\x01\x0e");
        for _ in 0..3 {
            bytes.extend(self.time.short());
        }
        bytes
    }
}

/// Marks the root as having system use fields (`SP`), and those as Rock Ridge (`ER`).
fn susp_fields() -> Vec<u8> {
    const ID: &[u8] = b"RRIP_1991A";
    const TEXT: &[u8] = b"THE ROCK RIDGE INTERCHANGE PROTOCOL PROVIDES SUPPORT FOR POSIX FILE SYSTEM SEMANTICS";
    let mut bytes = b"SP\x07\x01\xbe\xef\0ER".to_vec();
    bytes.extend([u8_from(8 + ID.len() + TEXT.len()), 1, u8_from(ID.len()), u8_from(TEXT.len()), 0, 1]);
    bytes.extend(ID);
    bytes.extend(TEXT);
    bytes
}

/// Rock Ridge: the name as given (`NM`).
fn name_field(name: &str) -> Vec<u8> {
    let mut bytes = b"NM".to_vec();
    bytes.extend([u8_from(5 + name.len()), 1, 0]);
    bytes.extend(name.as_bytes());
    bytes
}

/// # Panics
/// Never: a record has at most 33 + 128 bytes in Joliet and 33 + 14 + 62 + 69 in the primary tree, where the root has
/// 34 + 109 + 62.
fn u8_from(len: usize) -> u8 {
    u8::try_from(len).expect("names are short enough for a directory record")
}

fn both_u32(value: u32) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

fn both_u16(value: u16) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

fn pad_to_even(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(2), 0);
}

fn pad_to_sector(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES), 0);
}

/// A time in UTC, in the fields that ISO 9660 stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Time {
    year: u64,
    month: u64,
    day: u64,
    second_of_day: u64,
}

impl Time {
    /// The long form of no time.
    const LONG_UNSET: [u8; 17] = *b"0000000000000000\0";

    fn from_unix(unix_s: u64) -> Self {
        let unix_s = unix_s.min(MAX_UNIX_S);
        let (mut day, mut year) = (unix_s / 86400, 1970);
        while day >= days_in_year(year) {
            day -= days_in_year(year);
            year += 1;
        }
        let mut month = 1;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        Self { year, month, day: day + 1, second_of_day: unix_s % 86400 }
    }

    /// Hour, minute, second.
    fn clock(self) -> [u64; 3] {
        [self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60]
    }

    /// ECMA-119, 9.1.5.
    fn short(self) -> [u8; 7] {
        let [hour, minute, second] = self.clock();
        [self.year - 1900, self.month, self.day, hour, minute, second, 0]
            .map(|value| u8::try_from(value).expect("the year is at most 2155"))
    }

    /// ECMA-119, 8.4.26.1.
    fn long(self) -> Vec<u8> {
        let [hour, minute, second] = self.clock();
        let Self { year, month, day, .. } = self;
        format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}00\0").into_bytes()
    }
}

fn days_in_year(year: u64) -> u64 {
    (1..=12).map(|month| days_in_month(year, month)).sum()
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (unix_s, text) in [
            (0, "1970010100000000\0"),
            (951_782_400, "2000022900000000\0"),
            (1_700_000_000, "2023111422132000\0"),
            (4_107_542_400, "2100030100000000\0"),
            (MAX_UNIX_S, "2155123123595900\0"),
            (u64::MAX, "2155123123595900\0"),
        ] {
            assert_eq!(Time::from_unix(unix_s).long(), text.as_bytes());
        }
        assert_eq!(Time::from_unix(1_700_000_000).short(), [123, 11, 14, 22, 13, 20, 0]);
    }

    #[test]
    fn labels_are_checked() {
        for label in ["", "seventeen letters", "naïve", "a\n"] {
            assert!(matches!(write_iso9660(label, &[], 0), Err(SeedError::Label { .. })), "{label:?}");
        }
    }

    #[test]
    fn as_many_files_with_as_long_names_as_allowed_are_written() {
        let names: Vec<String> = (0..super::super::MAX_SEED_ENTRIES).map(|n| format!("{n:064}")).collect();
        let mut files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), b"x".as_slice())).collect();
        assert!(write_iso9660("cidata", &files, 0).is_ok());
        files.push(("one more", b""));
        assert_eq!(write_iso9660("cidata", &files, 0), Err(SeedError::TooLarge));
    }
}
