//! Test support: fakes that fail and forget, oracles, reproducible random numbers.
//!
//! Only tests depend on this crate.

#![forbid(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "helpers of tests may panic, and work on small disks"
)]

mod disk;
mod http_proxy;
mod late;
mod objects;
mod objects_conformance;
mod oracle;
mod power_loss;
mod power_loss_mount;
mod rng;
mod s3_server;
mod schedule;
mod scripted;
mod stored;

pub use disk::MemoryDisk;
pub use http_proxy::{Fault, HttpFaultProxy, HttpFaultRates, LoggedRequest, Passed, ProxyOptions};
pub use late::{LateObjects, LateRates};
pub use objects::{FaultRates, FaultyObjects, ManualClock, MemoryObjects};
pub use objects_conformance::objects_conformance;
pub use oracle::{DiskOracle, tagged};
pub use power_loss::{DirectoryFaults, PowerLossDirectory};
pub use power_loss_mount::{MountFaults, PowerLossMachine, PowerLossMount};
pub use rng::Rng;
pub use s3_server::S3Server;
pub use schedule::{Schedule, ScheduledObjects};
pub use scripted::{Answer, Request, ScriptedObjects};
pub use stored::StoredContent;
