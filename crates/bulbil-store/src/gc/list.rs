//! The list of condemned packs: which packs nothing referred to when a collection looked.
//!
//! ```text
//! gc/<generation, 16 digits>   sealed JSON, put if absent: see docs/formats/gc.md
//! ```
//! Each collection puts the next generation. The newest list counts; older ones are deleted.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;
use crate::pack::PackId;
use crate::sealed;

pub(crate) const DIRECTORY: &str = "gc";
const FORMAT_VERSION: u32 = 1;

/// Looks for the newest list so often: each time another collection has replaced it meanwhile.
const ATTEMPTS: u32 = 100;

/// A pack that nothing referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Condemned {
    pub(crate) id: PackId,
    /// The first generation of the unbroken row of lists that name the pack.
    pub(crate) generation: u64,
    /// When that list was made, by the clock of who made it.
    pub(crate) since_ms: u64,
    /// Whether its deletion was decided: then it stays in the lists until it is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) doomed: bool,
}

/// One generation's list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CondemnedList {
    pub(crate) format_version: u32,
    pub(crate) generation: u64,
    /// Random, so that no two collections put the same bytes and both believe they were first.
    pub(crate) collector: String,
    pub(crate) packs: Vec<Condemned>,
    /// Names of manifests whose content has a newer edition of the same owner: the next collection
    /// deletes them.
    #[serde(default)]
    pub(crate) superseded: Vec<String>,
}

impl CondemnedList {
    pub(crate) fn new(generation: u64, packs: Vec<Condemned>, superseded: Vec<String>) -> Result<Self, StoreError> {
        let collector = sealed::random_id()?;
        Ok(Self { format_version: FORMAT_VERSION, generation, collector, packs, superseded })
    }

    pub(crate) fn by_id(&self) -> HashMap<PackId, Condemned> {
        self.packs.iter().map(|pack| (pack.id, *pack)).collect()
    }
}

pub(crate) fn object_name(generation: u64) -> String {
    format!("{DIRECTORY}/{generation:016x}")
}

fn generation_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("gc/").filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// What lists there are.
#[derive(Debug)]
pub(crate) struct Newest {
    /// The newest generation; 0 when there is no list.
    pub(crate) generation: u64,
    /// The newest list; `None` when there is none. An error when it is damaged.
    pub(crate) list: Result<Option<CondemnedList>, StoreError>,
    /// Names of older lists.
    pub(crate) older: Vec<String>,
}

/// Reads the newest list.
///
/// # Errors
/// `Io` or `Timeout`; `UnsupportedVersion`.
pub(crate) fn read_newest(objects: &dyn Objects) -> Result<Newest, StoreError> {
    for _ in 0..ATTEMPTS {
        let mut found: Vec<_> = objects.list(DIRECTORY)?.iter().filter_map(|(name, _)| generation_of(name)).collect();
        found.sort_unstable();
        let Some(generation) = found.pop() else {
            return Ok(Newest { generation: 0, list: Ok(None), older: Vec::new() });
        };
        let older = found.into_iter().map(object_name).collect();
        match read(objects, generation) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => {}
            Err(e) if e.kind() == StoreErrorKind::Corrupt => return Ok(Newest { generation, list: Err(e), older }),
            other => return Ok(Newest { generation, list: Ok(Some(other?)), older }),
        }
    }
    Err(StoreError::new(StoreErrorKind::Timeout, "the list of condemned packs changes faster than it can be read"))
}

fn read(objects: &dyn Objects, generation: u64) -> Result<CondemnedList, StoreError> {
    let name = object_name(generation);
    let list: CondemnedList = sealed::get(objects, &name)?;
    if list.format_version != FORMAT_VERSION {
        let text = format!("object `{name}` has format version {}, which is not known", list.format_version);
        return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
    }
    if list.generation != generation {
        return Err(StoreError::corrupt(format!("object `{name}` is of generation {}", list.generation)));
    }
    Ok(list)
}
