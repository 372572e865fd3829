//! The manifest of an OVA: digests of its files.
//!
//! ```text
//! SHA256(web.ovf)= 9f86d081884c7d65…
//! SHA1 (web-disk1.vmdk) = 648e20a1e1625b1b…
//! ```

use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use crate::bytes::to_usize;
use crate::{FormatError, ReadAt};

use super::bad;

const BUFFER_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
}

/// One line of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    algorithm: Algorithm,
    /// In lower case.
    digest: String,
}

/// Parses a manifest.
pub(super) fn parse(text: &[u8]) -> Result<Vec<Entry>, FormatError> {
    let text = std::str::from_utf8(text).map_err(|_| bad("the manifest is not text in UTF-8"))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| parse_line(line).ok_or_else(|| bad(format!("the manifest: {:?}", first_of(line))))).collect()
}

fn first_of(line: &str) -> String {
    line.chars().take(80).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let (algorithm, rest) = line.split_once('(')?;
    let (name, digest) = rest.rsplit_once(')')?;
    let algorithm = match algorithm.trim().to_ascii_uppercase().as_str() {
        "SHA1" => Algorithm::Sha1,
        "SHA256" => Algorithm::Sha256,
        "SHA512" => Algorithm::Sha512,
        _ => return None,
    };
    let digest = digest.trim_start().strip_prefix('=')?.trim().to_ascii_lowercase();
    Some(Entry { name: name.trim().to_owned(), algorithm, digest })
}

impl Entry {
    /// Reads all of a file and compares.
    pub(super) fn check(&self, file: &dyn ReadAt) -> Result<(), FormatError> {
        let found = match self.algorithm {
            Algorithm::Sha1 => digest_of::<Sha1>(file)?,
            Algorithm::Sha256 => digest_of::<Sha256>(file)?,
            Algorithm::Sha512 => digest_of::<Sha512>(file)?,
        };
        if found == self.digest {
            Ok(())
        } else {
            Err(FormatError::checksum(format!("{:?} in the manifest", self.name)))
        }
    }
}

fn digest_of<D: Digest>(file: &dyn ReadAt) -> Result<String, FormatError> {
    let mut hasher = D::new();
    let mut buffer = vec![0; to_usize(BUFFER_BYTES.min(file.len_bytes()))];
    let mut offset = 0;
    while offset < file.len_bytes() {
        let len_bytes = (file.len_bytes() - offset).min(BUFFER_BYTES);
        let piece = buffer.get_mut(..to_usize(len_bytes)).unwrap_or_default();
        file.read_exact_at(piece, offset).map_err(FormatError::read(offset))?;
        hasher.update(&*piece);
        offset += len_bytes;
    }
    Ok(hex(&hasher.finalize()))
}

/// Returns bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
