//! What every opened image can do.

use std::fmt;
use std::str::FromStr;

use crate::FormatError;
use crate::bytes::to_u64;

/// An image format that can be read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// Microsoft's VHD: fixed, dynamic, differencing.
    Vhd,
    /// Microsoft's VHDX.
    Vhdx,
    /// VMware's VMDK.
    Vmdk,
    /// VirtualBox's VDI.
    Vdi,
}

impl Format {
    /// Every format, in the order help texts list them.
    pub const ALL: &'static [Self] = &[Self::Raw, Self::Qcow2, Self::Vhd, Self::Vhdx, Self::Vmdk, Self::Vdi];

    /// The word users type and read.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The word is not a format that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown image format `{word}`: use raw, qcow2, vhd, vhdx, vmdk or vdi")]
pub struct ParseFormatError {
    word: String,
}

impl FromStr for Format {
    type Err = ParseFormatError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        // `vpc` is what QEMU calls VHD.
        let wanted = if word == "vpc" { "vhd" } else { word };
        let found = Self::ALL.iter().copied().find(|format| format.as_str() == wanted);
        found.ok_or_else(|| ParseFormatError { word: word.to_owned() })
    }
}

/// Whether a range of a disk has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Stored in the image as it is; may be anything, zeros included.
    Data,
    /// Stored in the image and compressed; may be anything, zeros included.
    Compressed,
    /// Reads as zeros without a look at the content.
    Zero,
}

impl ExtentKind {
    /// Whether the range must be read to know what it holds.
    #[must_use]
    pub fn has_content(self) -> bool {
        self != Self::Zero
    }
}

/// A range of a disk of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first byte, counted on the disk, not in the image file.
    pub offset_bytes: u64,
    /// The length; never zero.
    pub len_bytes: u64,
    /// What the range holds.
    pub kind: ExtentKind,
}

impl Extent {
    /// One after the last byte.
    #[must_use]
    pub fn end_bytes(&self) -> u64 {
        self.offset_bytes.saturating_add(self.len_bytes)
    }
}

/// How compressed parts of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// Deflate, with or without the header of zlib.
    Zlib,
    /// One Zstandard frame for each cluster; qcow2 only.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// What an image says about itself, for display and for budgets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskInfo {
    /// The format.
    pub format: Format,
    /// The variant of the format as its users call it: `version 3`, `dynamic`, `streamOptimized`.
    pub variant: Option<String>,
    /// The size of the disk.
    pub size_bytes: u64,
    /// The length of the image file.
    pub file_bytes: u64,
    /// How much of the disk has content ([`ExtentKind::has_content`]), what was only set aside for content included;
    /// `None` where that is not counted beforehand.
    pub data_bytes: Option<u64>,
    /// The unit of allocation: cluster, block or grain.
    pub cluster_bytes: Option<u64>,
    /// What compressed clusters, if there are any, are compressed with.
    pub compression: Option<Compression>,
    /// How many clusters are compressed.
    pub compressed_clusters: u64,
    /// The snapshots inside of the image.
    pub snapshots: Vec<SnapshotInfo>,
    /// The identifier the image gives itself, by which a child names its parent.
    pub identifier: Option<String>,
    /// The program that made the image, if it says so.
    pub creator: Option<String>,
    /// What a person should know beside all this, one sentence each: that the image was not closed cleanly, for
    /// example.
    pub notes: Vec<String>,
}

impl DiskInfo {
    /// An image of which nothing more is known.
    pub(crate) fn new(format: Format, size_bytes: u64, file_bytes: u64) -> Self {
        Self {
            format,
            variant: None,
            size_bytes,
            file_bytes,
            data_bytes: None,
            cluster_bytes: None,
            compression: None,
            compressed_clusters: 0,
            snapshots: Vec::new(),
            identifier: None,
            creator: None,
            notes: Vec::new(),
        }
    }
}

/// A snapshot inside of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The identifier, unique in the image.
    pub id: String,
    /// The name somebody gave it.
    pub name: String,
    /// The size of the disk at that time.
    pub size_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub created_unix_s: u64,
}

/// The content of a disk: positioned reads and a map of what must be read.
///
/// All methods may be called from many threads at once.
pub trait DiskContent: Send + Sync + fmt::Debug {
    /// Returns the size of the disk in bytes: a multiple of 512, from 512 to [`bulbil_types::MAX_DISK_BYTES`].
    fn size_bytes(&self) -> u64;

    /// Fills `buf` with the bytes of the disk from `offset_bytes` on; any offset and length will do.
    ///
    /// # Errors
    /// [`FormatError::OutOfRange`] past the end of the disk, [`FormatError::Io`] if the file cannot be read,
    /// [`FormatError::Corrupt`] if a compressed cluster does not decode. `buf` then has no defined content.
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError>;

    /// Returns the extent that begins at `offset_bytes`, or `None` at or past the end of the disk.
    ///
    /// It reaches as far as the kind stays the same. The cost follows what is allocated, not the size of the disk: an
    /// empty disk of 16 TiB is one extent and takes milliseconds.
    ///
    /// # Errors
    /// [`FormatError::Io`] if the file cannot be read.
    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError>;
}

/// A disk image that passed every check that needs no look at the content.
pub trait Disk: DiskContent {
    /// Returns the format.
    fn format(&self) -> Format;

    /// Returns what the image says about itself.
    fn info(&self) -> DiskInfo;
}

impl dyn DiskContent + '_ {
    /// Iterates over the extents that have content ([`ExtentKind::has_content`]) in order; after an error there are no
    /// more.
    #[must_use]
    pub fn data_extents(&self) -> DataExtents<'_> {
        DataExtents { disk: self, next_bytes: Some(0) }
    }
}

impl dyn Disk + '_ {
    /// As `data_extents` of [`DiskContent`].
    #[must_use]
    pub fn data_extents(&self) -> DataExtents<'_> {
        (self as &dyn DiskContent).data_extents()
    }
}

/// The extents of a disk that have content, in order. Made by `data_extents` of a `dyn` [`DiskContent`].
#[derive(Debug)]
pub struct DataExtents<'a> {
    disk: &'a (dyn DiskContent + 'a),
    next_bytes: Option<u64>,
}

impl Iterator for DataExtents<'_> {
    type Item = Result<Extent, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(offset_bytes) = self.next_bytes.take() {
            match self.disk.next_extent(offset_bytes) {
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
                Ok(Some(extent)) => {
                    self.next_bytes = Some(extent.end_bytes());
                    if extent.kind.has_content() {
                        return Some(Ok(extent));
                    }
                }
            }
        }
        None
    }
}

/// Checks that a read lies within a disk.
pub(crate) fn check_range(len: usize, offset_bytes: u64, size_bytes: u64) -> Result<(), FormatError> {
    let end_bytes = offset_bytes.saturating_add(to_u64(len));
    if end_bytes > size_bytes { Err(FormatError::OutOfRange { offset_bytes, end_bytes, size_bytes }) } else { Ok(()) }
}

/// Checks the size an image gives its disk.
pub(crate) fn check_size(size_bytes: u64) -> Result<(), FormatError> {
    let reason = if size_bytes == 0 {
        "is an empty disk"
    } else if size_bytes > bulbil_types::MAX_DISK_BYTES {
        "is more than the largest disk, 64 TiB"
    } else if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        "is not a multiple of 512"
    } else {
        return Ok(());
    };
    Err(FormatError::VirtualSize { size_bytes, reason })
}

/// The smallest unit a disk is addressed in.
pub(crate) const SECTOR_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_parse_back_and_unknown_ones_name_the_choices() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), *format);
        }
        assert_eq!("vpc".parse::<Format>().unwrap(), Format::Vhd);
        let message = "qed".parse::<Format>().unwrap_err().to_string();
        assert_eq!(message, "unknown image format `qed`: use raw, qcow2, vhd, vhdx, vmdk or vdi");
    }

    #[test]
    fn sizes_are_checked() {
        for size_bytes in [512, 1 << 20, bulbil_types::MAX_DISK_BYTES] {
            assert!(check_size(size_bytes).is_ok());
        }
        for size_bytes in [0, 511, bulbil_types::MAX_DISK_BYTES + 512, u64::MAX] {
            assert_eq!(check_size(size_bytes).unwrap_err().code(), "virtual-size");
        }
    }
}
