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
//! | `import` | the pipeline that reads, matches, compresses and writes in parallel |
//! | `publish`, `lease` | how a manifest becomes visible, and what protects its packs until then |
//! | `marking`, `gc` | which packs are in use, and how the others go |
//! | `scrub` | reads everything again, quarantines what is damaged |
//! | `import` | the pipeline that reads, matches, compresses and writes in parallel; whole disks, or changes of one |
//! | `leaves` | the hashes of a content's windows, so that a change needs no reading of the rest |
//! | `repack`, `relocate` | moves blocks in use out of packs that go |
//! | `scrub` | reads everything again, quarantines what is damaged, heals |
//! | `objects` | the seam to storage: named objects, durable when put |
//! | `image_record` | images that a store offers by name |
//! | `published` | how manifests are named: by content, owner and edition |
//! | `reads` | several frames of a pack with one request |
//! | `settings` | what a store is: its format and keys |
//! | `encryption` | keys, where they come from, encrypted packs and objects |
//! | `cipher` | encryption of blocks in files of this host |
//! | `stats` | what the store holds and what each content costs |
//! | `store` | opens a store; frames, manifests and space for the rest of Bulbil |
//!
//! # Trust
//! Manifest → pack footer digest → frame hash: every byte handed out was hashed against a value
//! that leads back to the manifest. A frame that does not verify is an error, never data.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

mod attachment;
mod cipher;
mod clock;
mod digest;
mod durable;
mod encryption;
mod error;
mod frame;
mod gc;
#[cfg(test)]
mod golden;
mod image_record;
mod import;
mod index;
mod lease;
mod leaves;
mod liveness;
mod manifest;
mod marking;
mod matching;
mod objects;
mod pack;
mod pack_rebuild;
mod pack_writer;
mod process;
mod publish;
mod published;
mod reads;
mod relocate;
mod repack;
mod scrub;
mod sealed;
mod settings;
mod stats;
mod store;
mod stored_disk;

pub use attachment::AttachmentKind;
pub use cipher::{BlockCipher, OverlayKey};
pub use clock::{Clock, SystemClock};
pub use digest::{Digest, DigestBuilder, ParseDigestError, window_leaf};
pub use durable::make_directory;
pub use encryption::{KeyProvider, KeySlot, KeySource, StoreKey, write_new_key_file};
pub use error::{StoreError, StoreErrorKind};
pub use gc::{GcOptions, GcReport, LeaseReport, PackFate, PackReport};
pub use image_record::{StoredImage, StoredImages};
pub use import::{ChangedDisk, DiskSource, ImportObserver, ImportOptions, ImportReport, SourceError};
pub use manifest::{Extent, Manifest, PackRef};
pub use objects::{
    DirObjects, Objects, ParseLocationError, RemoteObjects, RemoteOptions, RemoteStats, S3Location, StoreLocation,
    open_objects,
};
pub use pack::PackId;
pub use published::OwnerId;
pub use reads::{FrameRun, PackLayout};
pub use repack::{RepackReport, RepackedPack};
pub use scrub::{
    BlockUse, ContentHit, FrameHealer, ManifestDamage, ObjectDamage, PackDamage, ScrubObserver, ScrubOptions,
    ScrubReport, SecondStore, WantedFrame,
};
pub use stats::{ContentStats, StoreStats};
pub use store::{Store, StoreOptions, StoreUsage};
