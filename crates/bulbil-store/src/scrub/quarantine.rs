//! Packs that are known to be damaged: nothing new refers to them.
//!
//! ```text
//! quarantine/<pack id, 32 digits>   sealed JSON: which frames, since when; see docs/formats/quarantine.md
//! ```

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::objects::Objects;
use crate::pack::PackId;
use crate::sealed;

pub(crate) const DIRECTORY: &str = "quarantine";
const FORMAT_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QuarantineDocument {
    pub(crate) format_version: u32,
    /// Frames that do not verify; empty when the pack as a whole cannot be read.
    pub(crate) frames: Vec<u32>,
    /// When this was found, by the clock of who found it.
    pub(crate) since_ms: u64,
}

/// The packs in quarantine. Their names are enough: what is in the objects is for people.
pub(crate) fn packs(objects: &dyn Objects) -> Result<HashSet<PackId>, StoreError> {
    let id = |name: &str| PackId::from_hex(name.strip_prefix("quarantine/")?);
    Ok(objects.list(DIRECTORY)?.iter().filter_map(|(name, _)| id(name)).collect())
}

pub(crate) fn object_name(pack: PackId) -> String {
    format!("{DIRECTORY}/{pack}")
}

/// Notes damage. Durable when this returns.
pub(crate) fn put(objects: &dyn Objects, pack: PackId, frames: &[u32], since_ms: u64) -> Result<(), StoreError> {
    let document = QuarantineDocument { format_version: FORMAT_VERSION, frames: frames.to_vec(), since_ms };
    objects.put(&object_name(pack), &sealed::encode(&document))
}
