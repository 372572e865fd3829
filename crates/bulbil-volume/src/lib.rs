//! Copy-on-write volumes: a manifest below, an overlay above, and the base cache between.
//!
//! ```text
//! request ─► volume: map says ─┬─ data ─► overlay's own file
//!                              ├─ zero
//!                              └─ base ─► frozen layers, if any ─► manifest ─► base cache ─► store: frame, verified
//! ```
//!
//! | module | what it decides or does |
//! |---|---|
//! | `device` | the contract that servers export |
//! | `volume` | creates, opens, removes; routes a request to overlay or base; merges partial blocks |
//! | `directory` | snapshots and resizes volumes that are not open; lists what they refer to |
//! | `snapshot` | freezes an open volume, puts it above its snapshot, merges layers |
//! | `resize` | makes an open volume larger |
//! | `record` | what a volume is, by its directory (pure) |
//! | `stack` | reads through the layers of a volume |
//! | `map` | two bits per block, in pages (pure) |
//! | `overlay` | order of data, map and syncs |
//! | `base`, `cache` | reads an image through frames that were verified once |
//! | `storage` | the seam to files, for crash tests |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

mod base;
mod cache;
mod device;
mod directory;
mod error;
mod map;
mod overlay;
mod record;
mod resize;
mod snapshot;
mod stack;
mod storage;
mod volume;

pub use cache::BaseCache;
pub use device::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
pub use error::{VolumeError, VolumeErrorKind};
pub use record::VolumeRecord;
pub use snapshot::FrozenState;
pub use storage::{HostDirectory, StorageDirectory, StorageFile};
pub use volume::{Volume, VolumeDirectory};
