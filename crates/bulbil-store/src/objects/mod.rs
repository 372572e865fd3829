//! The seam to storage: objects with names, put durably, read by range.
//!
//! [`DirObjects`] keeps them as files, [`RemoteObjects`] in a bucket of an S3 service. A
//! [`StoreLocation`] says which, and [`open_objects`] opens either.

mod directory;
mod location;
mod open;
mod remote;

pub use directory::DirObjects;
pub use location::{ParseLocationError, S3Location, StoreLocation};
pub use open::open_objects;
pub use remote::{RemoteObjects, RemoteOptions, RemoteStats};

use crate::error::StoreError;

/// Named objects; most are immutable.
///
/// Names are relative paths of `[A-Za-z0-9._-]` components separated by `/`. All methods block,
/// may be called from many threads at once, and end: an implementation behind a network has
/// deadlines. A method that fails with `Timeout` or `Io` may or may not have had its effect, unless
/// it says otherwise.
pub trait Objects: Send + Sync + std::fmt::Debug {
    /// Stores an object that must not exist yet. Returns `false`, having changed nothing, when
    /// one with other content does. Durable when this returns; no reader can see a part of it.
    ///
    /// An object that is there with exactly these bytes counts as stored: over a network the answer to
    /// an earlier attempt may have been lost. Who must know that it was first puts something random
    /// into the bytes.
    ///
    /// # Errors
    /// `NoSpace`, `Io` or `Timeout`. The object is then not there, or there whole but perhaps not durable.
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError>;

    /// Stores an object in place of any other of this name. Durable when this returns; a reader sees
    /// the old object or the new one.
    ///
    /// # Errors
    /// `NoSpace`, `Io` or `Timeout`. The object is then the old or the new one.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// Reads `len_bytes` from `offset`.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Timeout`, or `Corrupt` when the object is shorter.
    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError>;

    /// Reads a whole object of at most `limit_bytes`.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Timeout`, or `Corrupt` when the object is longer.
    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError>;

    /// Lists the objects under a directory with their sizes, in no order.
    ///
    /// Everything whose put had returned before this was called is in the list.
    ///
    /// # Errors
    /// `Io` or `Timeout`. A directory that does not exist is empty.
    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError>;

    /// Removes an object; one that is not there is fine.
    ///
    /// # Errors
    /// `Io` or `Timeout`.
    fn delete(&self, name: &str) -> Result<(), StoreError>;

    /// Makes objects durable that were seen, and that another process may have put without coming to its end.
    ///
    /// # Errors
    /// `Io`.
    fn make_durable(&self, _names: &[String]) -> Result<(), StoreError> {
        Ok(())
    }

    /// Whether each request crosses a network: readers then ask for more at once, and ahead.
    fn is_remote(&self) -> bool {
        false
    }
}
