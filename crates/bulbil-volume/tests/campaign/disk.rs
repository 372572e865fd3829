//! Where a volume's writes go.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bulbil_store::Manifest;
use bulbil_testkit::{DirectoryFaults, PowerLossDirectory, Rng};
use bulbil_types::VolumeId;
use bulbil_volume::{HostDirectory, StorageDirectory, Volume, VolumeDirectory, VolumeError};

use crate::machine::Machine;

/// The directory of a volume.
#[derive(Clone)]
pub(crate) enum Disk {
    /// In memory, with faults of its own.
    Memory(PowerLossDirectory),
    /// On the file system of a machine.
    Mount { machine: Arc<Machine>, host: usize, id: VolumeId },
}

impl Disk {
    /// Makes a volume, as a launch does.
    pub(crate) fn create(
        machine: Option<&Arc<Machine>>,
        host: usize,
        size_bytes: u64,
        base: Option<&Manifest>,
    ) -> Result<Self, VolumeError> {
        let id = VolumeId::random();
        match machine {
            None => {
                let directory = PowerLossDirectory::default();
                Volume::create_in(&directory, &id, size_bytes, base)?;
                Ok(Self::Memory(directory))
            }
            Some(machine) => {
                let volumes = VolumeDirectory::open(&machine.host_directory(host).join("volumes"))?;
                volumes.create(&id, size_bytes, base)?;
                Ok(Self::Mount { machine: Arc::clone(machine), host, id })
            }
        }
    }

    pub(crate) fn storage(&self, without_faults: bool) -> Arc<dyn StorageDirectory> {
        match self {
            Self::Memory(directory) => Arc::new(directory.clone()),
            Self::Mount { machine, host, id } => {
                let root = if without_faults { machine.observer() } else { machine.path(*host) };
                let path: PathBuf = root.join(format!("host-{host}")).join("volumes").join(id.as_str());
                Arc::new(HostDirectory::new(&path).in_boot(machine.boot_id()))
            }
        }
    }

    /// Makes the directory fail from an operation on, or by chance.
    pub(crate) fn arm(&self, rng: &mut Rng) {
        let Self::Memory(directory) = self else { return };
        if rng.one_in(4) {
            directory.set_fuse(rng.below(150));
        }
        if rng.one_in(3) {
            let mut often = |n| if rng.one_in(2) { 0 } else { n };
            let faults = DirectoryFaults {
                no_space: often(12),
                failed_write: often(40),
                failed_read: often(100),
                failed_sync: often(12),
            };
            directory.set_faults(faults, rng.next_u64());
        }
    }

    /// Whether the process cannot go on with it.
    pub(crate) fn is_dead(&self) -> bool {
        match self {
            Self::Memory(directory) => directory.is_dead(),
            Self::Mount { machine, host, .. } => machine.is_dead(*host),
        }
    }

    /// Which boot of its machine this is.
    pub(crate) fn boot_id(&self) -> String {
        match self {
            Self::Memory(directory) => directory.boot_id().unwrap(),
            Self::Mount { machine, .. } => machine.boot_id(),
        }
    }

    /// Whether nobody knows what a restarted process would find.
    pub(crate) fn must_lose_power(&self) -> bool {
        matches!(self, Self::Memory(directory) if directory.sync_has_failed())
    }

    /// A machine loses power as a whole, and not here.
    pub(crate) fn crash(&self, loses_power: bool, rng: &mut Rng) {
        let Self::Memory(directory) = self else { return };
        directory.clear_faults();
        if loses_power {
            directory.lose_power(rng);
        } else {
            directory.kill_process();
        }
    }

    pub(crate) fn remove(&self) {
        if let Self::Mount { machine, host, id } = self {
            let volumes = VolumeDirectory::open(&machine.host_directory(*host).join("volumes"));
            drop(volumes.and_then(|volumes| volumes.remove(id)));
        }
    }

    pub(crate) fn faults(&self) -> BTreeMap<&'static str, u64> {
        match self {
            Self::Memory(directory) => directory.faults(),
            Self::Mount { .. } => BTreeMap::new(),
        }
    }
}
