//! Copy-on-write volumes: a manifest below, an overlay above, and the base cache between.
//!
//! ```text
//! request ─► volume: map says ─┬─ data ─► overlay's own file
//!                              ├─ zero
//!                              └─ base ─► manifest ─► base cache ─► store: frame, verified
//! ```
//!
//! | module | what it decides or does |
//! |---|---|
//! | `device` | the contract that servers export |
//! | `volume` | creates, opens, removes; routes a request to overlay or base; merges partial blocks |
//! | `map` | two bits per block, in pages (pure) |
//! | `overlay` | order of data, map and syncs |
//! | `base`, `cache` | reads an image through frames that were verified once |
//! | `encrypted` | the same files with their content encrypted |
//! | `storage` | the seam to files, for crash tests |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

mod base;
mod cache;
mod device;
mod encrypted;
mod error;
mod map;
mod overlay;
mod storage;
mod volume;

pub use cache::BaseCache;
pub use device::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
pub use encrypted::open_for_store;
pub use error::{VolumeError, VolumeErrorKind};
pub use storage::{HostDirectory, StorageDirectory, StorageFile};
pub use volume::{Volume, VolumeDirectory, VolumeRecord};
