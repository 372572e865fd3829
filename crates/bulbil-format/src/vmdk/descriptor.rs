//! The descriptor: a text that says what a disk consists of.
//!
//! ```text
//! # Disk DescriptorFile                   comments and empty lines anywhere
//! version=1
//! CID=fffffffe                            changes with each write; a child names its parent by it
//! parentCID=ffffffff                      no parent
//! createType="twoGbMaxExtentFlat"
//! RW 4192256 FLAT "disk-f001.vmdk" 0      access, sectors, type, file, first sector in the file
//! RW 2048 ZERO
//! ddb.adapterType = "lsilogic"            the disk data base: geometry, tools, identifiers
//! ```
//!
//! It comes from somebody else and names files. So a line that is not understood is refused, as is a name that is more
//! than the name of a file; see [`plain_name`].

use std::collections::BTreeMap;

use crate::FormatError;
use crate::disk::{SECTOR_BYTES, check_size};

/// A disk of 8 TiB in files of 2 GiB.
const MAX_EXTENTS: usize = 4096;
/// The longest content identifier in a text.
const CONTENT_ID_DIGITS: usize = 8;
const NO_PARENT: u32 = u32::MAX;

/// How a disk is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CreateType {
    MonolithicSparse,
    StreamOptimized,
    MonolithicFlat,
    TwoGbMaxExtentFlat,
    TwoGbMaxExtentSparse,
    Vmfs,
}

impl CreateType {
    const ALL: [Self; 6] = [
        Self::MonolithicSparse,
        Self::StreamOptimized,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentFlat,
        Self::TwoGbMaxExtentSparse,
        Self::Vmfs,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::StreamOptimized => "streamOptimized",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::Vmfs => "vmfs",
        }
    }

    /// Whether the disk is in one file together with its descriptor.
    pub(super) fn is_one_file(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::StreamOptimized)
    }

    fn takes(self, kind: &ExtentSource) -> bool {
        match kind {
            ExtentSource::Zero => !self.is_one_file(),
            ExtentSource::Sparse { .. } => self.is_one_file() || self == Self::TwoGbMaxExtentSparse,
            ExtentSource::Flat { .. } => matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat | Self::Vmfs),
        }
    }
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) sectors: u64,
    pub(super) source: ExtentSource,
}

/// Where the bytes of an extent are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ExtentSource {
    Zero,
    /// In a file with a header of its own.
    Sparse {
        name: String,
    },
    /// As they are, from this sector of a file on.
    Flat {
        name: String,
        first_sector: u64,
    },
}

/// A descriptor that was understood completely, of a disk without a parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) create_type: CreateType,
    pub(super) content_id: u32,
    /// At least one; their sizes are a disk's when added up.
    pub(super) extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Parses the bytes of a descriptor, which may be padded with zeros.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let lines = Lines::parse(&text(bytes)?)?;
        lines.check_readable()?;
        lines.check_no_parent()?;
        let create_type = lines.create_type()?;
        let content_id = parse_id(lines.required("cid")?)?;
        let extents = lines.extents.iter().map(|line| parse_extent(line)).collect::<Result<Vec<_>, _>>()?;
        if let Some(extent) = extents.iter().find(|extent| !create_type.takes(&extent.source)) {
            let found = extent.source.name();
            return Err(bad(format!("{} disk with the extent {found:?}", create_type.as_str())));
        }
        let descriptor = Self { create_type, content_id, extents };
        if descriptor.extents.is_empty() {
            return Err(bad("there is no extent"));
        }
        check_size(descriptor.size_bytes())?;
        Ok(descriptor)
    }

    /// The size of the disk.
    pub(super) fn size_bytes(&self) -> u64 {
        let sectors = self.extents.iter().fold(0_u64, |sum, extent| sum.saturating_add(extent.sectors));
        sectors.saturating_mul(SECTOR_BYTES)
    }
}

impl ExtentSource {
    /// The name of the file; empty if there is none.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Zero => "",
            Self::Sparse { name } | Self::Flat { name, .. } => name,
        }
    }
}

fn bad(reason: impl Into<String>) -> FormatError {
    FormatError::BadDescriptor { reason: reason.into() }
}

/// Whether what comes after the text is zeros, but for the end of a text that was there before and was a little longer.
///
/// `qemu-img` 7.2 writes a new content identifier without leading zeros over the old one. That makes the text shorter,
/// and leaves the last bytes of the old one behind a zero.
fn is_padding(padding: &[u8], text: &[u8]) -> bool {
    let start = padding.iter().position(|byte| *byte != 0).unwrap_or(padding.len());
    let end = padding.iter().rposition(|byte| *byte != 0).map_or(start, |last| last + 1);
    let left_over = padding.get(start..end).unwrap_or_default();
    left_over.len() < CONTENT_ID_DIGITS && text.ends_with(left_over)
}

/// Takes the bytes before the padding as text.
fn text(bytes: &[u8]) -> Result<String, FormatError> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (text, padding) = bytes.split_at(end);
    if !is_padding(padding, text) {
        return Err(bad("there is a zero byte in the text"));
    }
    // VMware on Windows writes names in the encoding of the machine and says so. Such names are good for display only.
    let text = match std::str::from_utf8(text) {
        Ok(text) => text.to_owned(),
        Err(_) if declares_other_encoding(text) => String::from_utf8_lossy(text).into_owned(),
        Err(_) => return Err(bad("it is not text in UTF-8")),
    };
    match text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
        Some(control) => Err(bad(format!("there is the control character {control:?} in the text"))),
        None => Ok(text),
    }
}

fn declares_other_encoding(text: &[u8]) -> bool {
    let lossy = String::from_utf8_lossy(text).to_ascii_lowercase();
    lossy.lines().any(|line| line.starts_with("encoding") && !line.contains("utf-8"))
}

/// The lines by what they are. Keys are in lower case.
#[derive(Debug, Default)]
struct Lines {
    values: BTreeMap<String, String>,
    extents: Vec<String>,
}

/// Keys that have nothing to do with the content, beside those looked at here.
const OTHER_KEYS: &[&str] = &[
    "version",
    "cid",
    "parentcid",
    "createtype",
    "parentfilenamehint",
    "isnativesnapshot",
    "encoding",
    "changetrackpath",
];

impl Lines {
    fn parse(text: &str) -> Result<Self, FormatError> {
        let mut lines = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                lines
                    .take(line)
                    .map_err(|reason| bad(format!("line {}: {reason}: {:?}", index + 1, shortened(line))))?;
            }
        }
        Ok(lines)
    }

    fn take(&mut self, line: &str) -> Result<(), &'static str> {
        if ["rw ", "rdonly ", "noaccess "].iter().any(|access| has_prefix(line, access)) {
            self.extents.push(line.to_owned());
            return if self.extents.len() > MAX_EXTENTS { Err("too many extents") } else { Ok(()) };
        }
        let (key, value) = line.split_once('=').ok_or("not understood")?;
        let key = key.trim().to_ascii_lowercase();
        let value = unquoted(value.trim()).ok_or("the quotes do not match")?;
        if !key.starts_with("ddb.") && !is_encryption_key(&key) && !OTHER_KEYS.contains(&key.as_str()) {
            return Err("unknown key");
        }
        match self.values.insert(key, value.to_owned()) {
            // Several entries of the data base may well have one name; they are not used.
            Some(old) if old != value && !has_prefix(line, "ddb.") => Err("said twice"),
            _ => Ok(()),
        }
    }

    fn required(&self, key: &str) -> Result<&str, FormatError> {
        self.values.get(key).map(String::as_str).ok_or_else(|| bad(format!("there is no {key}")))
    }

    /// Checks the version and that the content is not encrypted.
    fn check_readable(&self) -> Result<(), FormatError> {
        if self
            .values
            .iter()
            .any(|(key, value)| is_encryption_key(key) || (key == "ddb.iofilters" && value.contains("crypt")))
        {
            return Err(FormatError::Encrypted { what: "the content, by VMware" });
        }
        // 2 came with the encryption of Workstation, which shows in its keys; 3 says that ESXi keeps a file of changed
        // blocks. All else means the same.
        match self.required("version")? {
            "1" | "2" | "3" => Ok(()),
            other => Err(bad(format!("version {:?}", shortened(other)))),
        }
    }

    fn check_no_parent(&self) -> Result<(), FormatError> {
        let hint = self.values.get("parentfilenamehint");
        if parse_id(self.required("parentcid")?)? == NO_PARENT && hint.is_none() {
            return Ok(());
        }
        let name = hint.map(|name| shortened(name).to_owned()).unwrap_or_default();
        Err(FormatError::Differencing { format: crate::Format::Vmdk, name })
    }

    fn create_type(&self) -> Result<CreateType, FormatError> {
        let word = self.required("createtype")?;
        let known = CreateType::ALL.into_iter().find(|known| known.as_str().eq_ignore_ascii_case(word));
        known.ok_or_else(|| FormatError::UnsupportedFormat { name: format!("VMDK of type {:?}", shortened(word)) })
    }
}

fn is_encryption_key(key: &str) -> bool {
    key.starts_with("encryption") || key == "keysafe"
}

fn has_prefix(line: &str, prefix: &str) -> bool {
    line.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// Takes the quotes off; `None` if there is but one.
fn unquoted(value: &str) -> Option<&str> {
    match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains('"')),
        None => (!value.contains('"')).then_some(value),
    }
}

/// Enough of a text for a message.
fn shortened(text: &str) -> &str {
    text.char_indices().nth(80).map_or(text, |(end, _)| text.get(..end).unwrap_or_default())
}

fn parse_id(word: &str) -> Result<u32, FormatError> {
    let plain = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = if plain { u32::from_str_radix(word, 16).ok() } else { None };
    id.ok_or_else(|| bad(format!("content identifier {:?}", shortened(word))))
}

fn parse_number(word: &str) -> Option<u64> {
    if word.bytes().all(|byte| byte.is_ascii_digit()) { word.parse().ok() } else { None }
}

/// Parses `RW 2048 FLAT "name" 0`.
fn parse_extent(line: &str) -> Result<ExtentLine, FormatError> {
    let bad_line = |reason: &str| bad(format!("extent {:?}: {reason}", shortened(line)));
    let (words, name, rest) = match line.split_once('"') {
        None => (line, None, ""),
        Some((words, rest)) => {
            let (name, rest) = rest.split_once('"').ok_or_else(|| bad_line("the quotes do not match"))?;
            (words, Some(name), rest)
        }
    };
    let words: Vec<&str> = words.split_ascii_whitespace().collect();
    let [access, sectors, kind] = words.as_slice() else { return Err(bad_line("not understood")) };
    if access.eq_ignore_ascii_case("NOACCESS") {
        return Err(bad_line("it may not be read"));
    }
    let sectors = parse_number(sectors).filter(|sectors| *sectors > 0).ok_or_else(|| bad_line("no size"))?;
    let source = extent_source(&kind.to_ascii_uppercase(), name, rest.trim(), bad_line)?;
    Ok(ExtentLine { sectors, source })
}

fn extent_source(
    kind: &str,
    name: Option<&str>,
    rest: &str,
    bad_line: impl Fn(&str) -> FormatError,
) -> Result<ExtentSource, FormatError> {
    let offset = if rest.is_empty() { Some(0) } else { parse_number(rest) };
    match (kind, name, offset) {
        ("ZERO", None, Some(0)) => Ok(ExtentSource::Zero),
        ("SPARSE", Some(name), Some(0)) => Ok(ExtentSource::Sparse { name: plain_name(name)?.to_owned() }),
        ("FLAT" | "VMFS", Some(name), Some(first_sector)) => {
            Ok(ExtentSource::Flat { name: plain_name(name)?.to_owned(), first_sector })
        }
        ("ZERO" | "SPARSE" | "FLAT" | "VMFS", ..) => Err(bad_line("not understood")),
        _ => Err(FormatError::UnsupportedFormat { name: format!("VMDK with an extent of type {:?}", shortened(kind)) }),
    }
}

/// Returns a name if it is that of a file beside the descriptor and nothing else.
///
/// # Errors
/// [`FormatError::ExternalExtent`] for a path, a drive or a URL in any system's spelling: `json:`, `nbd:`, `fd:` and
/// their like are names of files nowhere.
pub(crate) fn plain_name(name: &str) -> Result<&str, FormatError> {
    let reason = if name.is_empty() {
        "it has no name"
    } else if name.len() > 255 {
        "its name is too long"
    } else if name.contains(['/', '\\']) {
        "it is not beside the image"
    } else if name.contains(':') {
        "its name is that of a drive or a protocol"
    } else if matches!(name, "." | "..") {
        "its name is that of a folder"
    } else if name.chars().any(char::is_control) {
        "its name has control characters"
    } else {
        return Ok(name);
    };
    Err(FormatError::ExternalExtent { name: shortened(name).to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_an_older_text_may_follow_a_zero() {
        let line = b"ddb.toolsVersion = \"2147483647\"\n";
        for (padding, is_fine) in [
            (&b""[..], true),
            (b"\0\0\0", true),
            (b"\0\n", true),
            (b"\0\n\0\0", true),
            (b"\0\0\"\n\0", true),
            (b"\x0083647\"\n", true),
            (b"\x00483647\"\n", false),
            (b"\0\0x\n", false),
            (b"\0\n\0\n", false),
            (b"\0RW 1 FLAT \"/etc/passwd\" 0\n", false),
        ] {
            let found = text(&[&line[..], padding].concat());
            assert_eq!(found.is_ok(), is_fine, "{padding:?}");
            assert!(found.is_err() || found.is_ok_and(|text| text.as_bytes() == line));
        }
    }
}
