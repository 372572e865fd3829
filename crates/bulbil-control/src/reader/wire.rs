//! Messages between the daemon and an image reader. All numbers are little-endian.
//!
//! ```text
//! control, daemon to reader: Setup              length u32, JSON
//! control, reader to daemon: Answer             length u32, JSON
//! then on control: which ranges have data?      offset u64
//!                  reply                        status u32 = 0, length u32, covered to u64, (start u64, end u64)…
//! on a lane:       read                         offset u64, length u32, zero u32
//!                  reply                        status u32 = 0, length u32, bytes
//! on both:         reply to what failed         status u32 = 1, length u32, JSON of RemoteError
//! ```

use std::ops::Range;

use bulbil_format::{DiskInfo, Format, FormatError};
use bulbil_types::MAX_DISK_BYTES;
use bulbil_vm::console::plain_text;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk_file::is_no_space;
use crate::sandbox::SandboxReport;

/// The longest JSON document.
pub(super) const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The most bytes of one read; a longer one is made in pieces.
pub(super) const MAX_READ_BYTES: usize = 2 << 20;

/// The most ranges of one batch: 128 KiB of them.
pub(super) const MAX_RANGES: usize = 8192;

/// The most parents of an image, and of lanes.
pub(super) const MAX_PARENTS: usize = 32;
pub(super) const MAX_LANES: usize = 8;

/// The lanes, a directory, and two for each image: its file, and one to unpack it to.
pub(super) const MAX_DESCRIPTORS: usize = MAX_LANES + 1 + 2 * (1 + MAX_PARENTS);

/// Of all texts that a reader may tell: characters, and how many.
const MAX_TEXT_CHARS: usize = 4096;
const MAX_CAUSES: usize = 16;
const MAX_NOTES: usize = 64;
const MAX_SNAPSHOTS: usize = 1000;

/// The other side does not keep to the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WireError {
    #[error("a message of {len_bytes} bytes, at most {limit_bytes}")]
    TooLong { len_bytes: usize, limit_bytes: usize },
    #[error("an unknown status, {0}")]
    Status(u32),
    #[error("{len_bytes} bytes instead of {wanted_bytes}")]
    Length { len_bytes: usize, wanted_bytes: usize },
    #[error("not a message of this protocol: {0}")]
    Json(String),
    #[error("a description that cannot be: {0}")]
    Description(&'static str),
    #[error("ranges that cannot be: {0}")]
    Ranges(&'static str),
    #[error("a read past the end of the disk, or too long")]
    Read,
}

/// What the reader is to open. The descriptors come beside it, in this order: the lanes; for the image and then each
/// parent its file and an empty one without a name, which takes what a compressed file unpacks to; the directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setup {
    /// The declared format of the image.
    pub(super) format: Option<String>,
    /// The internal snapshot to read.
    pub(super) snapshot: Option<String>,
    /// How many lanes there are.
    pub(super) lanes: usize,
    /// The declared format of each parent, the image's own first.
    pub(super) parents: Vec<Option<String>>,
    /// Whether there is a directory with extents.
    pub(super) extent_dir: bool,
    /// Whether to go on where the platform has no sandbox.
    pub(super) allow_unsandboxed: bool,
}

impl Setup {
    /// How many descriptors go with it; `None` if there are more than may be.
    pub(super) fn descriptors(&self) -> Option<usize> {
        let within = self.parents.len() <= MAX_PARENTS && (1..=MAX_LANES).contains(&self.lanes);
        within.then(|| self.lanes + 2 * (1 + self.parents.len()) + usize::from(self.extent_dir))
    }
}

/// The reader's first words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// The image is open.
    Opened {
        /// What it is.
        disk: Box<Description>,
        /// Whether the disk is the image file byte for byte, so that the daemon may read it there.
        is_file: bool,
        /// What holds the reader back.
        sandbox: SandboxReport,
    },
    /// It is not, and the reader ends.
    Refused {
        /// Why.
        error: RemoteError,
    },
}

/// An error of the reader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemoteError {
    /// The short code of [`FormatError`], [`RemoteError::NO_SPACE`], or that of the sandbox.
    pub(super) code: String,
    /// What failed and its causes, nearest first; never empty once it is checked.
    pub(super) causes: Vec<String>,
    /// Which parent it is about, counted from the image's own; `None` for the image.
    pub(super) parent: Option<usize>,
}

impl RemoteError {
    pub(super) fn new(code: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(error), |error| (*error).source()).map(ToString::to_string);
        Self { code: code.to_owned(), causes: causes.collect(), parent: None }.checked()
    }

    /// The code of a disk that is full, on which a compressed file is unpacked.
    pub(super) const NO_SPACE: &str = "no-space";

    pub(super) fn of_format(error: &FormatError) -> Self {
        Self::new(if is_no_space(error) { Self::NO_SPACE } else { error.code() }, error)
    }

    /// Bounds every text and frees it of control characters.
    pub(super) fn checked(self) -> Self {
        let mut causes: Vec<String> = self.causes.iter().take(MAX_CAUSES).map(|cause| bounded(cause)).collect();
        if causes.is_empty() {
            causes.push("no reason was given".to_owned());
        }
        let parent = self.parent.filter(|parent| *parent < MAX_PARENTS);
        Self { code: bounded(&self.code), causes, parent }
    }
}

/// What an image says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    /// The format, as the word that people type.
    pub(super) format: String,
    /// The variant of the format.
    pub(super) variant: Option<String>,
    /// The size of the disk.
    pub(super) size_bytes: u64,
    /// The length of the image file.
    pub(super) file_bytes: u64,
    /// How much of the disk has content, where that is counted.
    pub(super) data_bytes: Option<u64>,
    /// The unit of allocation.
    pub(super) cluster_bytes: Option<u64>,
    /// What compressed clusters are compressed with.
    pub(super) compression: Option<String>,
    /// How many clusters are compressed.
    pub(super) compressed_clusters: u64,
    /// The first thousand snapshots inside of the image.
    pub(super) snapshots: Vec<Snapshot>,
    /// The identifier the image gives itself.
    pub(super) identifier: Option<String>,
    /// The program that made the image.
    pub(super) creator: Option<String>,
    /// What a person should know beside all this.
    pub(super) notes: Vec<String>,
}

/// A snapshot inside of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    /// The identifier.
    pub(super) id: String,
    /// The name.
    pub(super) name: String,
    /// The size of the disk at that time.
    pub(super) size_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub(super) created_unix_s: u64,
}

impl Description {
    pub(super) fn of(info: &DiskInfo) -> Self {
        let snapshots = info.snapshots.iter().take(MAX_SNAPSHOTS).map(|snapshot| Snapshot {
            id: short(&snapshot.id),
            name: short(&snapshot.name),
            size_bytes: snapshot.size_bytes,
            created_unix_s: snapshot.created_unix_s,
        });
        Self {
            format: info.format.to_string(),
            variant: info.variant.as_deref().map(bounded),
            size_bytes: info.size_bytes,
            file_bytes: info.file_bytes,
            data_bytes: info.data_bytes,
            cluster_bytes: info.cluster_bytes,
            compression: info.compression.map(|compression| compression.to_string()),
            compressed_clusters: info.compressed_clusters,
            snapshots: snapshots.collect(),
            identifier: info.identifier.as_deref().map(bounded),
            creator: info.creator.as_deref().map(bounded),
            notes: info.notes.iter().take(MAX_NOTES).map(|note| bounded(note)).collect(),
        }
    }

    /// Checks what a reader told: the disk is one there can be, and no text is long or steers a terminal.
    pub(super) fn checked(mut self) -> Result<Self, WireError> {
        if self.format.parse::<Format>().is_err() {
            return Err(WireError::Description("an unknown format"));
        }
        if !(512..=MAX_DISK_BYTES).contains(&self.size_bytes) || !self.size_bytes.is_multiple_of(512) {
            return Err(WireError::Description("the size of the disk"));
        }
        if self.snapshots.len() > MAX_SNAPSHOTS || self.notes.len() > MAX_NOTES {
            return Err(WireError::Description("too many snapshots or notes"));
        }
        for text in [&mut self.variant, &mut self.compression, &mut self.identifier, &mut self.creator] {
            *text = text.as_deref().map(bounded);
        }
        for snapshot in &mut self.snapshots {
            (snapshot.id, snapshot.name) = (short(&snapshot.id), short(&snapshot.name));
        }
        self.notes = self.notes.iter().map(|note| bounded(note)).collect();
        Ok(self)
    }
}

/// Bounds what a reader tells about its sandbox and frees it of control characters, for the log.
pub(super) fn checked_report(report: SandboxReport) -> SandboxReport {
    let missing = report.missing.iter().take(MAX_CAUSES).map(|phrase| bounded(phrase)).collect();
    SandboxReport { missing, ..report }
}

fn bounded(text: &str) -> String {
    one_line(text, MAX_TEXT_CHARS)
}

/// For texts of which there are many, so that all of them fit into one message.
fn short(text: &str) -> String {
    one_line(text, 100)
}

/// Free of control characters, and of line ends as well: what follows one could pass for a line of our own.
fn one_line(text: &str, max_chars: usize) -> String {
    plain_text(&text.chars().take(max_chars).collect::<String>()).replace('\n', " ")
}

pub(super) fn to_json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages are plain data")
}

pub(super) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(bytes).map_err(|error| WireError::Json(bounded(&error.to_string())))
}

/// Checks the length of a JSON document before it is read.
pub(super) fn message_len(header: [u8; 4]) -> Result<usize, WireError> {
    let len_bytes = u32::from_le_bytes(header) as usize;
    if len_bytes > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLong { len_bytes, limit_bytes: MAX_MESSAGE_BYTES });
    }
    Ok(len_bytes)
}

/// A read of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadRequest {
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u32,
}

impl ReadRequest {
    pub(super) const BYTES: usize = 16;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.offset_bytes.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes
    }

    /// Reads a request for a disk of this size.
    pub(super) fn decode(bytes: [u8; Self::BYTES], size_bytes: u64) -> Result<Self, WireError> {
        let (offset_bytes, len_bytes) = (le_u64(&bytes, 0), le_u32(&bytes, 8));
        let end_bytes = offset_bytes.checked_add(u64::from(len_bytes));
        let fits = end_bytes.is_some_and(|end_bytes| end_bytes <= size_bytes);
        let known = le_u32(&bytes, 12) == 0;
        if !fits || !known || len_bytes as usize > MAX_READ_BYTES {
            return Err(WireError::Read);
        }
        Ok(Self { offset_bytes, len_bytes })
    }
}

/// The beginning of a reply: what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// What was asked for, so many bytes.
    Data(usize),
    /// A [`RemoteError`], so many bytes.
    Error(usize),
}

impl Reply {
    pub(super) const BYTES: usize = 8;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let (status, len) = match self {
            Self::Data(len) => (0_u32, len),
            Self::Error(len) => (1, len),
        };
        let len = u32::try_from(len).expect("replies are bounded");
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&status.to_le_bytes());
        bytes[4..].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, WireError> {
        let len_bytes = le_u32(&bytes, 4) as usize;
        match le_u32(&bytes, 0) {
            0 => Ok(Self::Data(len_bytes)),
            1 if len_bytes <= MAX_MESSAGE_BYTES => Ok(Self::Error(len_bytes)),
            1 => Err(WireError::TooLong { len_bytes, limit_bytes: MAX_MESSAGE_BYTES }),
            status => Err(WireError::Status(status)),
        }
    }
}

/// Checks that a reply has the bytes of a read and no others.
pub(super) fn check_read(len_bytes: usize, wanted_bytes: usize) -> Result<(), WireError> {
    if len_bytes == wanted_bytes { Ok(()) } else { Err(WireError::Length { len_bytes, wanted_bytes }) }
}

/// Where a disk has data, for a stretch of it: what lies between the ranges reads as zeros.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct DataRanges {
    /// In order, not empty, and apart.
    pub(super) ranges: Vec<Range<u64>>,
    /// The stretch, in bytes of the disk.
    pub(super) covered: Range<u64>,
}

/// What a batch knows of the first data at or after an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// It is here.
    Range(Range<u64>),
    /// There is none up to this offset, where the batch ends.
    NoneUpTo(u64),
    /// Nothing: the offset lies elsewhere.
    Unknown,
}

impl DataRanges {
    pub(super) const MAX_BYTES: usize = 8 + 16 * MAX_RANGES;

    pub(super) fn encode(&self) -> Vec<u8> {
        let numbers = self.ranges.iter().flat_map(|range| [range.start, range.end]);
        std::iter::once(self.covered.end).chain(numbers).flat_map(u64::to_le_bytes).collect()
    }

    /// Checks the length of a reply before it is read.
    pub(super) fn check_len(len_bytes: usize) -> Result<(), WireError> {
        if len_bytes > Self::MAX_BYTES {
            return Err(WireError::TooLong { len_bytes, limit_bytes: Self::MAX_BYTES });
        }
        if len_bytes % 16 == 8 { Ok(()) } else { Err(WireError::Ranges("half a range")) }
    }

    /// Reads what a reader said about a disk of `size_bytes`, asked from `from` on.
    pub(super) fn decode(bytes: &[u8], from: u64, size_bytes: u64) -> Result<Self, WireError> {
        Self::check_len(bytes.len())?;
        let covered = from..le_u64(bytes, 0);
        if covered.end <= from || covered.end > size_bytes {
            return Err(WireError::Ranges("they do not get on, or pass the end of the disk"));
        }
        let mut end_of_last = from;
        let mut ranges = Vec::with_capacity(bytes.len() / 16);
        for at in (8..bytes.len()).step_by(16) {
            let range = le_u64(bytes, at)..le_u64(bytes, at + 8);
            if range.start < end_of_last || range.is_empty() || range.end > covered.end {
                return Err(WireError::Ranges("they are not in order"));
            }
            end_of_last = range.end;
            ranges.push(range);
        }
        Ok(Self { ranges, covered })
    }

    pub(super) fn find(&self, offset_bytes: u64) -> Found {
        if !self.covered.contains(&offset_bytes) {
            return Found::Unknown;
        }
        let next = self.ranges.partition_point(|range| range.end <= offset_bytes);
        match self.ranges.get(next) {
            Some(range) => Found::Range(range.start.max(offset_bytes)..range.end),
            None => Found::NoneUpTo(self.covered.end),
        }
    }
}

/// The caller knows that the bytes are there.
fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("fixed layouts"))
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("fixed layouts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn description() -> Description {
        Description {
            format: "qcow2".to_owned(),
            variant: None,
            size_bytes: SIZE,
            file_bytes: 1,
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

    #[test]
    fn reads_are_of_the_disk_and_bounded() {
        let check = |offset_bytes, len_bytes, accepted: bool| {
            let request = ReadRequest { offset_bytes, len_bytes };
            let expected = if accepted { Ok(request) } else { Err(WireError::Read) };
            assert_eq!(ReadRequest::decode(request.encode(), 4 * SIZE), expected, "{request:?}");
        };
        check(0, 512, true);
        check(4 * SIZE - 512, 512, true);
        check(4 * SIZE - 512, 513, false);
        check(u64::MAX, 1, false);
        check(0, 2 << 20, true);
        check(0, (2 << 20) + 1, false);
    }

    #[test]
    fn replies_that_lie_about_their_length_are_refused() {
        for reply in [Reply::Data(MAX_READ_BYTES), Reply::Error(MAX_MESSAGE_BYTES)] {
            assert_eq!(Reply::decode(reply.encode()), Ok(reply));
        }
        assert!(matches!(Reply::decode(Reply::Error(MAX_MESSAGE_BYTES + 1).encode()), Err(WireError::TooLong { .. })));
        assert_eq!(Reply::decode([2, 0, 0, 0, 0, 0, 0, 0]), Err(WireError::Status(2)));
        assert!(check_read(512, 512).is_ok());
        assert_eq!(check_read(513, 512), Err(WireError::Length { len_bytes: 513, wanted_bytes: 512 }));
        assert_eq!(message_len([0, 0, 16, 0]), Ok(MAX_MESSAGE_BYTES));
        assert!(message_len([1, 0, 16, 0]).is_err());
    }

    #[test]
    fn ranges_come_back_and_are_found() {
        let ranges = DataRanges { ranges: vec![4096..8192, 8192..12288, 65536..SIZE], covered: 512..SIZE };
        let decoded = DataRanges::decode(&ranges.encode(), 512, SIZE).unwrap();
        assert_eq!(decoded, ranges);
        assert_eq!(decoded.find(0), Found::Unknown);
        assert_eq!(decoded.find(512), Found::Range(4096..8192));
        assert_eq!(decoded.find(5000), Found::Range(5000..8192));
        assert_eq!(decoded.find(12288), Found::Range(65536..SIZE));
        assert_eq!(decoded.find(SIZE), Found::Unknown);
        let empty = DataRanges { ranges: Vec::new(), covered: 0..SIZE };
        assert_eq!(DataRanges::decode(&empty.encode(), 0, SIZE).unwrap().find(7), Found::NoneUpTo(SIZE));
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are meant")]
    fn ranges_that_cannot_be_are_refused() {
        let refuse = |ranges: &[Range<u64>], covered: Range<u64>| {
            let bytes = DataRanges { ranges: ranges.to_vec(), covered: covered.clone() }.encode();
            let decoded = DataRanges::decode(&bytes, covered.start, SIZE);
            assert!(matches!(decoded, Err(WireError::Ranges(_))), "{ranges:?} {covered:?}: {decoded:?}");
        };
        refuse(&[0..512], 512..SIZE);
        refuse(&[0..512, 511..1024], 0..SIZE);
        refuse(&[512..1024, 0..512], 0..SIZE);
        refuse(&[512..512], 0..SIZE);
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        refuse(&[1024..512], 0..SIZE);
        refuse(&[0..SIZE + 1], 0..SIZE);
        refuse(&[0..1024], 0..1000);
        refuse(&[], 0..SIZE + 1);
        // Without progress a walk would never end.
        refuse(&[], 512..512);
        assert!(DataRanges::check_len(DataRanges::MAX_BYTES).is_ok());
        assert!(DataRanges::check_len(DataRanges::MAX_BYTES + 16).is_err());
        for len in [0, 4, 16, 17] {
            assert!(DataRanges::decode(&vec![0; len], 0, SIZE).is_err());
        }
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused_and_texts_are_made_plain() {
        assert!(description().checked().is_ok());
        for size_bytes in [0, 511, 513, MAX_DISK_BYTES + 512, u64::MAX] {
            assert!(Description { size_bytes, ..description() }.checked().is_err(), "{size_bytes}");
        }
        assert!(Description { format: "qed".to_owned(), ..description() }.checked().is_err());
        assert!(Description { notes: vec![String::new(); 65], ..description() }.checked().is_err());
        let text = format!("\u{1b}[31m\nhint: {}", "x".repeat(100_000));
        let checked = Description { creator: Some(text.clone()), ..description() }.checked().unwrap();
        let creator = checked.creator.unwrap();
        assert!(!creator.contains(['\u{1b}', '\n']) && creator.len() <= MAX_TEXT_CHARS, "{creator}");
        let error = RemoteError { code: text.clone(), causes: vec![text; 50], parent: Some(99) }.checked();
        assert_eq!((error.causes.len(), error.parent), (MAX_CAUSES, None));
        assert!(!error.causes[0].contains(['\u{1b}', '\n']));
    }

    #[test]
    fn what_is_told_about_a_sandbox_is_made_plain() {
        let landlock = crate::sandbox::LandlockLevel::None;
        let missing = vec![format!("\u{1b}[2J\n{}", "x".repeat(100_000)); 50];
        let report = checked_report(SandboxReport { landlock, seccomp: true, missing });
        assert_eq!(report.missing.len(), MAX_CAUSES);
        assert!(!report.to_string().contains(['\u{1b}', '\n']));
        assert!(report.missing[0].len() <= MAX_TEXT_CHARS);
    }

    #[test]
    fn a_setup_says_how_many_descriptors_go_with_it() {
        let setup = Setup {
            format: None,
            snapshot: None,
            lanes: 2,
            parents: vec![None; 3],
            extent_dir: false,
            allow_unsandboxed: false,
        };
        assert_eq!(setup.descriptors(), Some(2 + 2 * 4));
        assert_eq!(Setup { lanes: 0, ..setup.clone() }.descriptors(), None);
        assert_eq!(Setup { parents: vec![None; MAX_PARENTS + 1], ..setup.clone() }.descriptors(), None);
        let most = Setup { lanes: MAX_LANES, parents: vec![None; MAX_PARENTS], extent_dir: true, ..setup };
        assert_eq!(most.descriptors(), Some(MAX_DESCRIPTORS));
    }

    #[test]
    fn the_longest_description_fits_into_a_message() {
        let text = "\u{7f7f}".repeat(MAX_TEXT_CHARS);
        let snapshot = Snapshot { id: text.clone(), name: text.clone(), size_bytes: SIZE, created_unix_s: 0 };
        let worst = Description {
            variant: Some(text.clone()),
            identifier: Some(text.clone()),
            creator: Some(text),
            snapshots: vec![snapshot; MAX_SNAPSHOTS],
            ..description()
        };
        let len = to_json(&worst.checked().unwrap()).len();
        assert!(len < MAX_MESSAGE_BYTES, "{len}");
    }
}
