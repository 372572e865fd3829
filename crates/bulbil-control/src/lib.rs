//! Catalog and use cases: what Bulbil does, apart from how it is asked.
//!
//! ```text
//! daemon: Control ── catalog (SQLite)
//!            │   └── store: import
//!            └── one shim process per instance ── volume ─ NBD ─┐
//!                    │                            link ─ Ethernet ─┤ QEMU
//!                    └── state.json, control socket  metadata    ─┘
//! ```
//! A shim outlives the daemon: the daemon only starts it, asks it, and finds it again by its
//! socket. Whatever is known of an instance that is not running lies in the catalog and in the
//! instance's directory.
//!
//! | module | what it does |
//! |---|---|
//! | `data_dir` | where everything lies |
//! | `store_binding` | which store a data directory belongs to |
//! | `store_ops` | how a store is opened |
//! | `store_stats` | what it holds and what each image costs |
//! | `store_scrub` | reads it again, names whom damage hits, heals |
//! | `store_keys` | the keys of an encrypted one |
//! | `store_gc` | frees what nothing uses |
//! | `store_check` | what `doctor` tells of it |
//! | `cache_settings` | how large the base cache may become |
//! | `catalog` | images and instances by name and id |
//! | `catalog`, `catalog_volumes` | images, instances, volumes and snapshots by name and id |
//! | `images` | files into the store: import, boot mode |
//! | `reader` | the process that reads a file for an import |
//! | [`sandbox`] | takes a process every right it does not need |
//! | `export` | images out of the store: `image_content` reads, `new_file` gives a name to what is complete |
//! | `image_copy` | images from store to store |
//! | `image_warm` | images into the base cache |
//! | `disk_file`, `conversion` | disk image files as such, without a store |
//! | `target` | which image file to write, in words |
//! | `instances` | launch, stop, start, remove |
//! | `volumes`, `volume_clone` | volumes and snapshots: create, resize, snapshot, remove; clone; `volume_ops` is what is done to a content |
//! | `volume_use`, `content_lease` | volumes and images as devices of a process beside the daemon |
//! | `model`, `volume_model` | the records and views that the API shows |
//! | `shim` | the process beside each virtual machine |

#![forbid(unsafe_code)]

mod cache_settings;
mod catalog;
mod catalog_volumes;
mod content_lease;
mod control;
mod conversion;
mod data_dir;
mod disk_file;
mod error;
mod export;
mod image_content;
mod image_copy;
mod image_warm;
mod images;
mod instances;
mod keys;
mod model;
mod new_file;
mod reader;
pub mod sandbox;
pub mod shim;
mod store_binding;
mod store_check;
mod store_gc;
mod store_keys;
mod store_ops;
mod store_scrub;
mod store_stats;
mod target;
mod volume_clone;
mod volume_model;
mod volume_ops;
mod volume_use;
mod volumes;

pub use bulbil_export::{fuse, nbd, vhost_user};
pub use bulbil_format::{ConvertObserver, Format};
pub use bulbil_store::StoredImage;
pub use bulbil_vm::console::plain_text;
pub use bulbil_vm::{BootPhase, BootVerdict, PhaseReached};
pub use cache_settings::CacheSize;
pub use control::{Control, HostCheck, HostReport, probe_kvm};
pub use conversion::{ConvertRequest, convert_file, convert_worker};
pub use data_dir::DataDir;
pub use disk_file::{DiskDescription, DiskFile, SnapshotDescription, check_disks, describe_disks};
pub use error::{ControlError, ErrorCode};
pub use export::{ExportProgress, ExportRequest, WrittenFile};
pub use image_copy::{CopiedImage, CopyFromRequest, CopyToRequest, OfferedImages, OtherStore};
pub use image_warm::WarmedImage;
pub use images::{ImportProgress, ImportRequest};
pub use instances::LaunchRequest;
pub use model::{
    ImageRecord, InstanceRecord, InstanceState, InstanceView, LoginKey, PublishedPort, RunState, SshAccess,
};
pub use new_file::FileSize;
pub use reader::{Attempt, SelfTest, run_image_reader, run_self_test};
pub use store_binding::{StoreBinding, StoreChoice, open_store};
pub use store_gc::{GcFate, GcPack, GcReport, GcRequest};
pub use store_keys::{AddedDataKey, RotateKeyRequest, StoreKeySlot, write_new_key_file};
pub use store_ops::{KeySource, StoreLocation, open_cache, parse_key_source, parse_location};
pub use store_scrub::{Damage, DamageKind, DamagedVolume, ScrubProgress, ScrubReport, ScrubRequest};
pub use store_stats::{ContentStats, StoreStats};
pub use target::{Subformat, TargetCompression, TargetError, TargetFormat, TargetOptions};
pub use volume_model::{SnapshotRecord, VolumeRecord, VolumeRequest, VolumeState, VolumeView};
pub use volume_use::{UsedDevice, use_content, use_volume};

/// The hidden command lines that this crate starts of its own binary, and the environment it reads.
pub mod process {
    /// `bulbil shim --data-dir DIR INSTANCE`
    pub const SHIM_COMMAND: &str = "shim";
    /// `bulbil disk-converter`
    pub const CONVERT_COMMAND: &str = "disk-converter";
    /// `bulbil image-reader [--self-test]`
    pub const IMAGE_READER_COMMAND: &str = "image-reader";
    /// The option of it with which it tries what its sandbox refuses.
    pub const SELF_TEST_OPTION: &str = "--self-test";
    /// `bulbil kvm-probe`
    pub const KVM_PROBE_COMMAND: &str = "kvm-probe";
    /// `auto`, `kvm` or `tcg`
    pub const ACCEL_VARIABLE: &str = "BULBIL_ACCEL";
    /// `auto`, `nbd` or `vhost-user`
    pub const DISK_VARIABLE: &str = "BULBIL_DISK";
}
