//! What `doctor` tells of the store: which it is, and whether it can be read from here. Changes nothing.

use std::path::Path;

use bulbil_store::OwnerId;

use crate::control::{HostCheck, HostReport};
use crate::error::ControlError;
use crate::store_binding::{StoreBinding, StoreChoice};
use crate::store_ops::{self, OpenRequest, StoreLocation};

impl HostReport {
    /// Looks at the store of a data directory, as this process reaches it.
    pub async fn add_store(&mut self, data_root: &Path, choice: &StoreChoice) {
        let (data_root, choice) = (data_root.to_owned(), choice.clone());
        let looked = tokio::task::spawn_blocking(move || look(&data_root, &choice)).await;
        let (ok, detail) = match looked {
            Ok(Ok(detail)) => (true, detail),
            Ok(Err(error)) => (false, with_causes(&error)),
            Err(error) => (false, error.to_string()),
        };
        self.checks.push(HostCheck { name: "store".to_owned(), ok, optional: false, detail });
    }
}

fn with_causes(error: &ControlError) -> String {
    std::iter::once(error.to_string()).chain(error.causes().iter().cloned()).collect::<Vec<_>>().join(": ")
}

fn look(data_root: &Path, choice: &StoreChoice) -> Result<String, ControlError> {
    let bound = StoreBinding::read(data_root)?;
    if let Some(bound) = &bound {
        bound.check(data_root, choice)?;
    }
    let is_bound = bound.is_some();
    let (location, key, owner) = match bound {
        Some(bound) => (bound.location, choice.key.clone().or(bound.key), bound.owner),
        None => {
            let inside = || StoreLocation::Directory(data_root.join("store"));
            (choice.location.clone().unwrap_or_else(inside), choice.key.clone(), OwnerId::default())
        }
    };
    let failed = |e| ControlError::store(format!("cannot open the store `{location}`"), &e);
    // An index that is made while looking goes when this ends.
    let state = tempfile::tempdir().map_err(|e| ControlError::io("cannot make a temporary directory", &e))?;
    let request = OpenRequest { location: &location, key: key.as_ref(), owner, state_directory: state.path() };
    let opened = store_ops::open_existing(&request).map_err(failed)?;
    let key = key.map(|key| format!(", its key is at {key}")).unwrap_or_default();
    Ok(match (opened.is_some(), is_bound) {
        (true, true) => format!("{location}{key}"),
        (true, false) => format!("{location}{key}; the data directory will belong to it"),
        (false, false) => format!("will be made at {location}{key}"),
        (false, true) => {
            return Err(ControlError::new(crate::ErrorCode::NotFound, format!("there is no store at `{location}`")));
        }
    })
}
