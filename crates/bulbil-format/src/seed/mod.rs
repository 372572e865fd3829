//! Seed disks: small read-only disks from which an instance takes its first configuration.
//!
//! A guest finds a seed disk by its label (`cidata`, `config-2`) and mounts it as ISO 9660. See [`write_iso9660`].

mod iso9660;
mod tree;

pub use iso9660::write_iso9660;

/// The most that all files of a seed disk together may have.
pub const MAX_SEED_BYTES: u64 = 64 << 20;

/// The most files and directories a seed disk may have, the root not counted.
pub const MAX_SEED_ENTRIES: usize = 1000;

/// A seed disk cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// The label does not fit into both volume descriptors as it is.
    #[error("label {label:?}: use 1 to 16 printable ASCII characters")]
    Label {
        /// The label.
        label: String,
    },
    /// A path has a part that is no portable file name, or is too deep.
    #[error(
        "path {path:?}: use at most 8 parts of 1 to 64 printable ASCII characters without `*`, `:`, `;`, `?` and `\\`"
    )]
    Path {
        /// The path.
        path: String,
    },
    /// A path is given twice, or names both a file and a directory.
    #[error("path {path:?} is there already")]
    Duplicate {
        /// The path.
        path: String,
    },
    /// There is more than fits.
    #[error("more than {MAX_SEED_ENTRIES} entries or {MAX_SEED_BYTES} bytes")]
    TooLarge,
}
