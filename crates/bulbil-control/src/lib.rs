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
//! | `catalog` | images and instances by name and id |
//! | `images` | files into the store: reading, boot mode |
//! | `instances` | launch, stop, start, remove |
//! | `model` | the records and views that the API shows |
//! | `shim` | the process beside each virtual machine |

#![forbid(unsafe_code)]

mod catalog;
mod control;
mod data_dir;
mod error;
mod images;
mod instances;
mod keys;
mod model;
pub mod shim;

pub use bulbil_vm::console::plain_text;
pub use bulbil_vm::{BootPhase, BootVerdict, PhaseReached};
pub use control::{Control, HostCheck, HostReport, probe_kvm};
pub use data_dir::DataDir;
pub use error::{ControlError, ErrorCode};
pub use images::{ImportProgress, ImportRequest};
pub use instances::LaunchRequest;
pub use model::{
    ImageRecord, InstanceRecord, InstanceState, InstanceView, LoginKey, PublishedPort, RunState, SshAccess,
};

/// The hidden command lines that this crate starts of its own binary, and the environment it reads.
pub mod process {
    /// `bulbil shim --data-dir DIR INSTANCE`
    pub const SHIM_COMMAND: &str = "shim";
    /// `bulbil kvm-probe`
    pub const KVM_PROBE_COMMAND: &str = "kvm-probe";
    /// `auto`, `kvm` or `tcg`
    pub const ACCEL_VARIABLE: &str = "BULBIL_ACCEL";
}
