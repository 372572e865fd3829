//! The description in an OVA: which file holds the disk (DMTF DSP0243, Open Virtualization Format 1 and 2).
//!
//! ```text
//! Envelope
//!   References   File    id  href  size  compression  chunkSize
//!   DiskSection  Disk    diskId  fileRef  parentRef
//! ```

use roxmltree::{Document, Node, ParsingOptions};

use crate::FormatError;
use crate::vmdk::plain_name;

use super::bad;

/// Far more than any description has, so that a small text does not become a large tree.
const MAX_NODES: u32 = 50_000;

/// Two quotes for each attribute: far more than any element has. The parser compares each one with all before it.
const MAX_QUOTES_IN_TAG: usize = 2048;
/// Far more than any description declares. The parser looks through those in scope for each name with a prefix.
const MAX_NAMESPACES: usize = 512;

/// The file that a description says is the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskFile {
    pub(super) name: String,
    /// The length, if the description has it.
    pub(super) len_bytes: Option<u64>,
}

/// Finds the one disk of a description.
pub(super) fn disk_file(text: &[u8]) -> Result<DiskFile, FormatError> {
    let text = std::str::from_utf8(text).map_err(|_| bad("the OVF is not text in UTF-8"))?;
    let text = text.trim_start_matches('\u{feff}').trim_matches(['\0', ' ', '\r', '\n', '\t']);
    check_work(text)?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| bad(xml_error(&error)))?;
    let envelope = document.root_element();
    if envelope.tag_name().name() != "Envelope" {
        return Err(bad("the OVF has no Envelope"));
    }
    if envelope.descendants().any(|node| node.tag_name().name() == "EncryptionSection") {
        return Err(FormatError::Encrypted { what: "the files of the OVA" });
    }
    let file_id = only_disk(envelope)?;
    let mut files = sections(envelope, "References", "File").filter(|file| attribute(*file, "id") == Some(file_id));
    match (files.next(), files.next()) {
        (Some(file), None) => parse_file(file),
        _ => Err(bad(format!("the OVF does not say which file {file_id:?} is"))),
    }
}

/// The parser's message quotes the text, which may hold anything.
fn xml_error(error: &roxmltree::Error) -> String {
    let message = error.to_string();
    format!("the OVF: {}", message.chars().filter(|c| !c.is_control()).collect::<String>())
}

/// Refuses a text that is short but would take the parser long.
fn check_work(text: &str) -> Result<(), FormatError> {
    // A value cannot have a `<` in it, so that between two of them there is one tag at most.
    let quotes = |part: &str| part.bytes().filter(|byte| matches!(byte, b'"' | b'\'')).count();
    if text.split('<').any(|part| quotes(part) > MAX_QUOTES_IN_TAG) {
        return Err(bad("the OVF has an element with too many attributes"));
    }
    if text.matches("xmlns").count() > MAX_NAMESPACES {
        return Err(bad("the OVF declares too many namespaces"));
    }
    Ok(())
}

/// Returns what the one disk calls its file.
fn only_disk<'a>(envelope: Node<'a, '_>) -> Result<&'a str, FormatError> {
    let disks: Vec<Node<'a, '_>> = sections(envelope, "DiskSection", "Disk").collect();
    match disks.as_slice() {
        [] => Err(bad("the OVF has no disk")),
        [disk] if attribute(*disk, "parentRef").is_some() => Err(bad("the disk of the OVF has a parent")),
        [disk] => attribute(*disk, "fileRef").ok_or_else(|| bad("the disk of the OVF is empty: it has no file")),
        disks => {
            let names: Vec<&str> = disks.iter().take(16).filter_map(|disk| attribute(*disk, "diskId")).collect();
            Err(bad(format!("the OVF has {} disks: {names:?}; import each one on its own", disks.len())))
        }
    }
}

fn parse_file(file: Node<'_, '_>) -> Result<DiskFile, FormatError> {
    let href = attribute(file, "href").ok_or_else(|| bad("a file of the OVF has no name"))?;
    if attribute(file, "chunkSize").is_some() {
        return Err(bad(format!("{href:?} is in pieces; join them first")));
    }
    match attribute(file, "compression") {
        None | Some("" | "identity" | "gzip") => {}
        Some(other) => return Err(bad(format!("{href:?} is compressed by {other:?}"))),
    }
    let name = plain_name(&percent_decoded(href))?.to_owned();
    let len_bytes = attribute(file, "size").and_then(|size| size.parse().ok());
    Ok(DiskFile { name, len_bytes })
}

/// The children of all sections of a name. Namespaces differ between versions of the format and between writers.
fn sections<'a, 'i: 'a>(
    envelope: Node<'a, 'i>,
    section: &'static str,
    child: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    let sections = envelope.children().filter(move |node| node.tag_name().name() == section);
    sections.flat_map(move |node| node.children().filter(move |node| node.tag_name().name() == child))
}

fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.attributes().find(|attribute| attribute.name() == name).map(|attribute| attribute.value())
}

/// A file is referred to by a URL, in which a space is `%20`.
fn percent_decoded(href: &str) -> String {
    let mut bytes = Vec::with_capacity(href.len());
    let mut rest = href.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let code = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
