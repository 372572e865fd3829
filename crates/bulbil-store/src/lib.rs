//! The image store: disks as deduplicated blocks in compressed, verified frames.
//!
//! ```text
//! disk ── 4 KiB blocks ── match against known blocks ── new ones, densely ── 128 KiB frames ── packs
//!   └── SHA-256 tree over 128 KiB windows = digest          extents ── manifest, published last
//! ```
//!
//! | module | what it decides or does |
//! |---|---|
//! | [`digest`](Digest) | the identity of a disk's content, the same in every store |
//! | `frame`, `pack`, `manifest` | the stored formats, pure encoders and parsers |
//! | `matching` | which blocks of a window are referenced and which are stored (pure) |
//! | `index` | where a block with a given hash is stored; rebuildable, needed by import only |
//! | `import` | the pipeline that reads, matches, compresses and writes in parallel; whole disks, or changes of one |
//! | `leaves` | the hashes of a content's windows, so that a change needs no reading of the rest |
//! | `objects` | the seam to storage: named objects, durable when put |
//! | `published` | how manifests are named: by content, owner and edition |
//! | `settings` | what a store is: its format and keys |
//! | `store` | opens a store; frames, manifests and space for the rest of Bulbil |
//!
//! # Trust
//! Manifest → pack footer digest → frame hash: every byte handed out was hashed against a value
//! that leads back to the manifest. A frame that does not verify is an error, never data.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

mod attachment;
mod cipher;
mod digest;
mod error;
mod frame;
mod import;
mod index;
mod leaves;
mod manifest;
mod matching;
mod objects;
mod pack;
mod published;
mod settings;
mod store;

pub use attachment::AttachmentKind;
pub use cipher::BlockCipher;
pub use digest::{Digest, DigestBuilder, ParseDigestError, window_leaf};
pub use error::{StoreError, StoreErrorKind};
pub use import::{ChangedDisk, DiskSource, ImportObserver, ImportReport, SourceError};
pub use manifest::{Extent, Manifest, PackRef};
pub use objects::{DirObjects, Objects};
pub use pack::PackId;
pub use published::OwnerId;
pub use store::{Store, StoreOptions, StoreUsage};
