//! From a location to objects.

use std::sync::Arc;

use super::{DirObjects, Objects, RemoteObjects, RemoteOptions, StoreLocation};
use crate::error::StoreError;

/// Opens the objects at a location; a directory is made where there is none, a bucket is not.
///
/// # Errors
/// As [`DirObjects::open`] and [`RemoteObjects::open`].
pub fn open_objects(location: &StoreLocation, options: &RemoteOptions) -> Result<Arc<dyn Objects>, StoreError> {
    Ok(match location {
        StoreLocation::Directory(path) => Arc::new(DirObjects::open(path)?),
        StoreLocation::S3(location) => Arc::new(RemoteObjects::open(location, options)?),
    })
}
