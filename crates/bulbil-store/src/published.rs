//! How manifests are named: by content, owner and edition.
//!
//! ```text
//! manifests/<content, 64 digits>/<owner, 16 digits>-<edition, 8 digits>.manifest
//! manifests/<content, 64 digits>.manifest           stores made before owners were told apart
//! ```
//! The name of a content is its digest, or in an encrypted store a keyed hash of it.
//!
//! Each owner of a content, that is each data directory that has an image or a volume of it, publishes
//! a manifest of its own. So an owner gives a content up by deleting its own manifests, and takes
//! nothing away from others. A new edition of a manifest, with the same content in other packs, is put
//! before the old one is deleted; the highest edition counts.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};

/// Who publishes manifests in a store: one data directory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct OwnerId(u64);

impl OwnerId {
    /// Draws an id at random.
    ///
    /// # Errors
    /// `Io` when the system has no random bytes.
    pub fn random() -> Result<Self, StoreError> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes)
            .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
        Ok(Self(u64::from_le_bytes(bytes)))
    }

    /// The lower half: a random number where the id is one.
    pub(crate) fn low_bits(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).expect("masked")
    }
}

impl serde::Serialize for OwnerId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for OwnerId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for OwnerId {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let value = (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
        value.map(Self).ok_or_else(|| StoreError::corrupt(format!("`{text}` is not the id of an owner")))
    }
}

/// How a content is named in a store: by its digest, or in an encrypted store by a keyed hash of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ContentName(pub(crate) [u8; 32]);

impl fmt::Display for ContentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Digest::from_bytes(self.0).to_hex())
    }
}

impl ContentName {
    pub(crate) fn parse(hex: &str) -> Option<Self> {
        format!("sha256:{hex}").parse().ok().map(|digest: Digest| Self(*digest.as_bytes()))
    }
}

/// A manifest object by its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Published {
    pub(crate) content: ContentName,
    /// `None` in stores made before owners were told apart.
    pub(crate) owner: Option<OwnerId>,
    pub(crate) edition: u32,
}

impl Published {
    pub(crate) fn object_name(&self) -> String {
        let directory = directory(self.content);
        match self.owner {
            Some(owner) => format!("{directory}/{owner}-{:08x}.manifest", self.edition),
            None => format!("{directory}.manifest"),
        }
    }

    pub(crate) fn parse(object_name: &str) -> Option<Self> {
        let rest = object_name.strip_prefix("manifests/")?.strip_suffix(".manifest")?;
        let Some((hex, file)) = rest.split_once('/') else {
            return Some(Self { content: ContentName::parse(rest)?, owner: None, edition: 0 });
        };
        let (owner, edition) = file.split_once('-')?;
        let edition = (edition.len() == 8).then(|| u32::from_str_radix(edition, 16).ok())??;
        Some(Self { content: ContentName::parse(hex)?, owner: Some(owner.parse().ok()?), edition })
    }
}

/// The directory of all manifests of a content.
pub(crate) fn directory(content: ContentName) -> String {
    format!("manifests/{content}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_others_are_ignored() {
        let content = ContentName([7; 32]);
        for owner in [None, Some(OwnerId(0)), Some(OwnerId(u64::MAX))] {
            let published = Published { content, owner, edition: if owner.is_some() { 300 } else { 0 } };
            assert_eq!(Published::parse(&published.object_name()), Some(published));
        }
        let hex = content.to_string();
        for name in [
            format!("manifests/{hex}/0-0.manifest"),
            format!("manifests/{hex}/0000000000000000-00000000.manifest.new"),
            "manifests/12.manifest".to_owned(),
            format!("packs/{hex}.manifest"),
        ] {
            assert_eq!(Published::parse(&name), None, "{name}");
        }
    }
}
