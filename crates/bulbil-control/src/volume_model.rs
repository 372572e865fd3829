//! Records and views of volumes and snapshots. Field names are the API's and stay.

use std::fmt;

use bulbil_store::Digest;
use bulbil_types::{InstanceId, Name, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// A volume in the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its name, unique on this host; the root volume of an instance has none.
    pub name: Option<Name>,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The instance whose root volume it is.
    pub instance_id: Option<InstanceId>,
    /// The image it was made from, by name and version.
    pub image: Option<String>,
    /// The snapshot it was made from.
    pub snapshot_id: Option<SnapshotId>,
    /// The volume it is a clone of.
    pub cloned_from: Option<VolumeId>,
    /// The content it was made from, of a clone the one that its parent lay above; `None` for a disk of zeroes.
    pub digest: Option<Digest>,
    /// When it was made, in seconds since 1970.
    pub created_at: i64,
}

/// Whether a volume can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Nothing has it open.
    Available,
    /// An instance runs on it, or it is served or mounted.
    InUse,
    /// Its creation was interrupted; it can only be removed.
    Incomplete,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Incomplete => "incomplete",
        })
    }
}

/// A volume as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeView {
    /// What it is.
    #[serde(flatten)]
    pub record: VolumeRecord,
    /// Whether it can be used.
    pub state: VolumeState,
    /// The name of the instance whose root volume it is.
    pub instance: Option<Name>,
    /// Bytes that its own writes take on this host; of what clones share each has its part.
    pub used_bytes: u64,
}

impl VolumeView {
    /// What people know it by: its name, or the instance's, or its id.
    #[must_use]
    pub fn title(&self) -> String {
        match (&self.record.name, &self.instance) {
            (Some(name), _) => name.to_string(),
            (None, Some(instance)) => format!("{} (root of {instance})", self.record.id),
            (None, None) => self.record.id.to_string(),
        }
    }
}

/// A snapshot in the catalog: a content that a volume had at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique on this host.
    pub name: Option<Name>,
    /// Identity of the disk's content.
    pub digest: Digest,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes the store grew by when it was taken.
    pub stored_bytes: u64,
    /// The volume it was taken of, which may be gone.
    pub volume_id: VolumeId,
    /// What that volume, or its instance, was called.
    pub volume: Option<Name>,
    /// When it was taken, in seconds since 1970.
    pub created_at: i64,
}

/// What volume to make.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VolumeRequest {
    /// Its name; by default made up.
    pub name: Option<Name>,
    /// Its size in bytes; by default that of what it is made from.
    pub size_bytes: Option<u64>,
    /// The image it begins as: id, name, or name and version.
    pub image: Option<String>,
    /// The snapshot it begins as: id or name.
    pub snapshot: Option<String>,
}
