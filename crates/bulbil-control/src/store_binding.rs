//! Which store a data directory keeps its images in.
//!
//! ```text
//! store.json   { "format_version": 1, "location", "owner": 16 hexadecimal digits, "key": null or where the key is }
//! ```
//! Written once, when the store has been opened for the first time, durable before anything is stored. From then on the
//! data directory belongs to that store: its catalog and its volumes name contents that are nowhere else. The location
//! `store` is the directory of that name in the data directory, so that a data directory may be moved.
//!
//! A data directory from before this file was written has its store in `store`, as the owner 0.

use std::io;
use std::path::Path;

use bulbil_store::{OwnerId, Store};
use serde::{Deserialize, Serialize};

use crate::data_dir::{DataDir, read_small_file, replace_file};
use crate::error::{ControlError, ErrorCode};
use crate::store_ops::{self, KeySource, OpenRequest, StoreLocation};

const FORMAT_VERSION: u32 = 1;

/// The location of a store that lies in the data directory itself.
const INSIDE: &str = "store";

/// What was said about the store on a command line; nothing means: the one that is bound, or the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreChoice {
    /// Where it lies.
    pub location: Option<StoreLocation>,
    /// Where its key is found.
    pub key: Option<KeySource>,
}

/// The store that a data directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreBinding {
    /// Where it lies.
    pub location: StoreLocation,
    /// Under which id this data directory publishes in it.
    pub owner: OwnerId,
    /// Where its key is found; the key itself is kept nowhere.
    pub key: Option<KeySource>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format_version: u32,
    location: String,
    owner: String,
    key: Option<String>,
}

impl StoreBinding {
    /// Reads what a data directory is bound to; `None` when it was never used.
    ///
    /// # Errors
    /// `Failed` when `store.json` cannot be read or understood.
    pub fn read(data_root: &Path) -> Result<Option<Self>, ControlError> {
        let path = data_root.join("store.json");
        match read_small_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::of_earlier_versions(data_root)),
            Err(e) => Err(ControlError::io(format!("cannot read `{}`", path.display()), &e)),
            Ok(bytes) => Self::parse(&bytes, data_root).map(Some).map_err(|cause| {
                let cause = io::Error::other(cause);
                ControlError::with_source(ErrorCode::Failed, format!("cannot understand `{}`", path.display()), &cause)
            }),
        }
    }

    fn of_earlier_versions(data_root: &Path) -> Option<Self> {
        let location = StoreLocation::Directory(data_root.join(INSIDE));
        let there = data_root.join(INSIDE).join("bulbil-store.json").exists();
        there.then(|| Self { location, owner: OwnerId::default(), key: None })
    }

    fn parse(bytes: &[u8], data_root: &Path) -> Result<Self, String> {
        let document: Document = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if document.format_version != FORMAT_VERSION {
            return Err(format!("format version {} is not known; use a newer bulbil", document.format_version));
        }
        let location = match document.location.as_str() {
            INSIDE => StoreLocation::Directory(data_root.join(INSIDE)),
            text => text.parse().map_err(|e| format!("{e}"))?,
        };
        let owner = document.owner.parse().map_err(|e| format!("{e}"))?;
        let key = document.key.map(|text| text.parse()).transpose().map_err(|e| format!("{e}"))?;
        Ok(Self { location, owner, key })
    }

    fn encode(&self, data_root: &Path) -> Vec<u8> {
        let inside = StoreLocation::Directory(data_root.join(INSIDE));
        let document = Document {
            format_version: FORMAT_VERSION,
            location: if self.location == inside { INSIDE.to_owned() } else { self.location.to_string() },
            owner: self.owner.to_string(),
            key: self.key.as_ref().map(ToString::to_string),
        };
        serde_json::to_vec_pretty(&document).expect("a binding is plain data")
    }

    /// Checks that a data directory is not bound to another store than the one that was chosen.
    ///
    /// # Errors
    /// `OtherStore`.
    pub fn check(&self, data_root: &Path, choice: &StoreChoice) -> Result<(), ControlError> {
        match &choice.location {
            Some(wanted) if !store_ops::is_same_location(wanted, &self.location) => {
                let (root, bound) = (data_root.display(), &self.location);
                let text =
                    format!("the data directory `{root}` has its images in the store `{bound}`, not in `{wanted}`");
                Err(ControlError::new(ErrorCode::OtherStore, text))
            }
            _ => Ok(()),
        }
    }

    /// Keeps another source of the key. Durable when this returns.
    pub(crate) fn save(&self, data: &DataDir) -> Result<(), ControlError> {
        let path = data.store_binding();
        replace_file(&path, &self.encode(data.root()))
            .map_err(|e| ControlError::io(format!("cannot write `{}`", path.display()), &e))
    }
}

/// Opens the store of a data directory, which is bound to it from then on.
///
/// # Errors
/// `OtherStore` when the data directory is bound to another one; `StoreKey` when it is encrypted and the key is missing
/// or wrong; `Timeout`, `NoSpace` or `Failed` when it cannot be opened. The binding is then as it was.
pub fn open_store(data: &DataDir, choice: &StoreChoice) -> Result<(Store, StoreBinding), ControlError> {
    let kept = StoreBinding::read(data.root())?;
    let binding = match &kept {
        Some(kept) => {
            kept.check(data.root(), choice)?;
            let key = choice.key.as_ref().or(kept.key.as_ref()).cloned();
            StoreBinding { key, ..kept.clone() }
        }
        None => {
            let owner = OwnerId::random().map_err(|e| ControlError::store("cannot make an owner's id", &e))?;
            let location = choice.location.clone().unwrap_or_else(|| StoreLocation::Directory(data.store()));
            StoreBinding { location, owner, key: choice.key.clone() }
        }
    };
    let store = store_ops::open_or_create(&OpenRequest {
        location: &binding.location,
        key: binding.key.as_ref(),
        owner: binding.owner,
        state_directory: &data.store_state(),
    });
    let what = || format!("cannot open the store `{}`", binding.location);
    let store = store.map_err(|e| ControlError::store(what(), &e))?;
    if kept.as_ref() != Some(&binding) || !data.store_binding().exists() {
        binding.save(data)?;
    }
    Ok((store, binding))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> (tempfile::TempDir, DataDir) {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let data = DataDir::open(&dir.path().join("d")).unwrap();
        (dir, data)
    }

    fn at(path: &Path) -> StoreChoice {
        StoreChoice { location: Some(StoreLocation::Directory(path.to_owned())), key: None }
    }

    #[test]
    fn a_data_directory_is_bound_at_its_first_use_and_keeps_its_owner() {
        let (dir, data) = data();
        let elsewhere = dir.path().join("elsewhere");
        let (_, bound) = open_store(&data, &at(&elsewhere)).unwrap();
        assert_ne!(bound.owner, OwnerId::default());
        for choice in [StoreChoice::default(), at(&elsewhere)] {
            assert_eq!(open_store(&data, &choice).unwrap().1, bound);
        }
        assert!(!data.store().exists());
        let refused = open_store(&data, &at(&dir.path().join("other"))).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::OtherStore);
        assert!(!dir.path().join("other").exists(), "a store that is refused is not made");
    }

    #[test]
    fn a_store_that_cannot_be_opened_binds_nothing() {
        let (dir, data) = data();
        let file = dir.path().join("file");
        std::fs::File::create(&file).unwrap();
        open_store(&data, &at(&file.join("store"))).unwrap_err();
        assert_eq!(StoreBinding::read(data.root()).unwrap(), None);
        open_store(&data, &StoreChoice::default()).unwrap();
    }

    #[test]
    fn a_moved_data_directory_finds_its_store() {
        let (dir, data) = data();
        let (_, bound) = open_store(&data, &StoreChoice::default()).unwrap();
        let moved = dir.path().join("moved");
        std::fs::rename(data.root(), &moved).unwrap();
        let (_, found) = open_store(&DataDir::open(&moved).unwrap(), &StoreChoice::default()).unwrap();
        assert_eq!((found.owner, found.location.to_string()), (bound.owner, moved.join("store").display().to_string()));
    }

    #[test]
    fn a_data_directory_of_an_earlier_version_has_owner_0_and_its_own_store() {
        let (dir, data) = data();
        drop(Store::open_or_create(&data.store()).unwrap());
        assert_eq!(open_store(&data, &at(&dir.path().join("other"))).unwrap_err().code(), ErrorCode::OtherStore);
        let (_, bound) = open_store(&data, &at(&data.store())).unwrap();
        assert_eq!(bound.owner, OwnerId::default());
    }

    #[test]
    fn a_binding_that_is_not_understood_is_an_error() {
        let (_dir, data) = data();
        for text in [
            "",
            "{}",
            r#"{"format_version":2,"location":"store","owner":"0000000000000000","key":null}"#,
            r#"{"format_version":1,"location":"store","owner":"x","key":null}"#,
            r#"{"format_version":1,"location":"http://x","owner":"0000000000000000","key":null}"#,
            r#"{"format_version":1,"location":"store","owner":"0000000000000000","key":"secret"}"#,
        ] {
            replace_file(&data.store_binding(), text.as_bytes()).unwrap();
            let error = open_store(&data, &StoreChoice::default()).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Failed, "{text}");
            assert!(!data.store().exists());
        }
    }
}
