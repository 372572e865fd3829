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
//! | `clone` | makes volumes that share the layers of another one |
//! | `resize` | makes an open volume larger |
//! | `record` | what a volume is, by its directory (pure) |
//! | `stack` | reads through the layers of a volume |
//! | `map` | two bits per block, in pages (pure) |
//! | `overlay` | order of data, map and syncs |
//! | `base`, `cache` | reads an image through frames that were verified once |
//! | `encrypted` | the same files with their content encrypted |
//! | `base`, `image` | reads an image through frames that were verified once |
//! | `cache`, `cache_file`, `cache_upkeep` | the cache's files, their bound |
//! | `cache_heal` | damaged frames of the store are healed from the cache |
//! | `fetch`, `fetch_pool`, `fetch_ahead` | each missing frame once, together with its neighbours, and ahead |
//! | `trace`, `trace_record`, `trace_replay` | what a boot touches: stored form, recording, prefetch |
//! | `warm` | fills the cache with an image |
//! | `storage`, `link` | the seam to files, for crash tests; second names of files |

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "tests make small numbers"))]

mod base;
mod cache;
mod cache_file;
mod cache_heal;
mod cache_upkeep;
mod clone;
mod device;
mod directory;
mod encrypted;
mod error;
mod fetch;
mod fetch_ahead;
mod fetch_pool;
mod image;
mod link;
mod live_map;
mod map;
mod overlay;
mod read_stats;
mod record;
mod resize;
mod snapshot;
mod stack;
mod storage;
mod trace;
mod trace_record;
mod trace_replay;
mod volume;
mod warm;
mod working_set;

pub use cache::{BaseCache, CacheOptions};
pub use cache_heal::CacheHealer;
pub use device::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
pub use encrypted::open_for_store;
pub use error::{VolumeError, VolumeErrorKind};
pub use read_stats::ReadStats;
pub use record::VolumeRecord;
pub use snapshot::FrozenState;
pub use storage::{HostDirectory, StorageDirectory, StorageFile};
pub use trace_record::inherit_trace;
pub use volume::{Volume, VolumeDirectory};
pub use warm::{WarmEnd, WarmObserver, WarmReport, warm};
pub use working_set::{WorkingSet, boot_working_set};
