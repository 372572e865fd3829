//! OVA and other tar archives with one disk.
//!
//! ```text
//! tar ──► members ─┬─ *.ovf        which member is the disk   ──► Section ──► detected again
//!                  ├─ *.mf         digests, verified
//!                  ├─ *.cert       not looked at
//!                  └─ disk.raw     alone and without *.ovf: as Google Compute Engine takes it
//! ```

use std::sync::Arc;

use crate::detect::check_expansion;
use crate::holes::stored_bytes;
use crate::{FormatError, ReadAt};

mod manifest;
mod ovf;
mod section;
mod tar;
mod write;

use manifest::Entry;
use tar::Member;
pub(crate) use write::write_ova;

/// The longest description or manifest.
const MAX_TEXT_BYTES: u64 = 1 << 20;
/// The one member of an archive without a description.
const RAW_MEMBER: &str = "disk.raw";

/// The names of an archive's members may be long; a message is read by people.
const MAX_REASON_CHARS: usize = 1000;

fn bad(reason: impl Into<String>) -> FormatError {
    FormatError::BadArchive { reason: reason.into().chars().take(MAX_REASON_CHARS).collect() }
}

/// Returns the disk image in an archive, after a comparison with the digests in its manifest, if there is one: then
/// all of it is read once.
pub(crate) fn disk_in(file: Arc<dyn ReadAt>) -> Result<Arc<dyn ReadAt>, FormatError> {
    let members = tar::members(&*file)?;
    match only_with_suffix(&members, ".ovf")? {
        Some(description) => disk_of_ova(&file, &members, description),
        None => match members.as_slice() {
            [only] if only.name == RAW_MEMBER => Ok(only.open(&file)),
            _ => Err(bad(format!("it has neither a description (.ovf) nor {RAW_MEMBER} alone"))),
        },
    }
}

fn disk_of_ova(
    file: &Arc<dyn ReadAt>,
    members: &[Member],
    description: &Member,
) -> Result<Arc<dyn ReadAt>, FormatError> {
    let disk_file = ovf::disk_file(&description.read(file, MAX_TEXT_BYTES)?)?;
    let disk = only_named(members, &disk_file.name)?;
    if disk_file.len_bytes.is_some_and(|said| said > disk.len_bytes) {
        let needed_bytes = disk_file.len_bytes.unwrap_or_default();
        return Err(FormatError::Truncated { at_bytes: disk.len_bytes, needed_bytes, what: "the disk in the archive" });
    }
    let content = disk.open(file);
    if let Some(list) = only_with_suffix(members, ".mf")? {
        let entries = manifest::parse(&list.read(file, MAX_TEXT_BYTES)?)?;
        verify(&entries, description, &*description.open(file))?;
        // A member that is mostly a hole is read quickly, but not digested.
        check_expansion("a disk to digest", disk.len_bytes, stored_bytes(&*content)?)?;
        verify(&entries, disk, &*content)?;
    }
    Ok(content)
}

/// Compares a member with its digest in the manifest, if it has one there.
fn verify(entries: &[Entry], member: &Member, content: &dyn ReadAt) -> Result<(), FormatError> {
    let mut found = entries.iter().filter(|entry| entry.name == member.name);
    match (found.next(), found.next()) {
        (Some(entry), None) => entry.check(content),
        (None, _) => Ok(()),
        (Some(_), Some(_)) => Err(bad(format!("the manifest has {:?} twice", member.name))),
    }
}

fn only_with_suffix<'a>(members: &'a [Member], suffix: &str) -> Result<Option<&'a Member>, FormatError> {
    let mut found = members.iter().filter(|member| member.name.to_ascii_lowercase().ends_with(suffix));
    match (found.next(), found.next()) {
        (first, None) => Ok(first),
        (Some(first), Some(second)) => Err(bad(format!("it has both {:?} and {:?}", first.name, second.name))),
        (None, Some(_)) => Ok(None),
    }
}

fn only_named<'a>(members: &'a [Member], name: &str) -> Result<&'a Member, FormatError> {
    let mut found = members.iter().filter(|member| member.name == name);
    match (found.next(), found.next()) {
        (Some(member), None) => Ok(member),
        (None, _) => Err(bad(format!("it does not have the disk {name:?}"))),
        (Some(_), Some(_)) => Err(bad(format!("it has {name:?} twice"))),
    }
}
