//! Where the two stores of a schedule lie, and how the volumes' directories fail.

use std::path::Path;
use std::sync::Arc;

use bulbil_store::{Objects, StoreError};
use bulbil_testkit::{
    DirectoryFaults, FaultRates, FaultyObjects, LateObjects, LateRates, MemoryObjects, PowerLossDirectory, Rng,
    Schedule,
};
use bulbil_volume::StorageDirectory;

/// The store of the hosts, and the one that contents are copied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    First,
    Second,
}

/// Machines that schedules use one after another, because they are slow to make.
#[derive(Default)]
pub(crate) struct Machines {}

/// A store of a schedule.
pub(crate) enum Backing {
    /// Objects in memory behind a network that is late.
    Memory { late: Arc<LateObjects>, plain: MemoryObjects },
}

impl Backing {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Memory { .. } => "memory",
        }
    }

    pub(crate) fn memory(rng: &mut Rng) -> Self {
        let plain = MemoryObjects::default();
        let mut often = |n| if rng.one_in(2) { 0 } else { n };
        let rates = LateRates { duplicated: often(40), given_up: often(60), tried_again: often(30) };
        let late = Arc::new(LateObjects::new(Arc::new(plain.clone()), rng.next_u64(), rates));
        Self::Memory { late, plain }
    }

    /// The objects as a process of a host sees them until it is killed.
    pub(crate) fn for_process(
        &self,
        schedule: &Arc<Schedule>,
        actor: usize,
        rng: &mut Rng,
        rates: FaultRates,
        kill_at: Option<u64>,
    ) -> Result<Arc<FaultyObjects>, StoreError> {
        let seed = rng.next_u64();
        match self {
            Self::Memory { late, .. } => {
                let turns = schedule.objects(actor, Arc::clone(late) as Arc<dyn Objects>);
                Ok(Arc::new(FaultyObjects::new(Arc::new(turns), seed, rates, kill_at)))
            }
        }
    }

    /// The objects as a process sees them that meets no faults.
    pub(crate) fn without_faults(&self) -> Arc<dyn Objects> {
        match self {
            Self::Memory { plain, .. } => Arc::new(plain.clone()),
        }
    }

    /// Lets everything arrive that is under way, and nothing fail any more.
    pub(crate) fn settle(&self) {
        match self {
            Self::Memory { late, .. } => late.settle(),
        }
    }

    /// Flips a bit of one byte of an object.
    pub(crate) fn rot(&self, name: &str, rng: &mut Rng) {
        match self {
            Self::Memory { plain, .. } => {
                let position = rng.below(plain.len_bytes(name) as u64) as usize;
                plain.flip(name, position, 1 << rng.below(8));
            }
        }
    }

    pub(crate) fn faults(&self) -> std::collections::BTreeMap<&'static str, u64> {
        match self {
            Self::Memory { late, .. } => late.faults(),
        }
    }
}

/// The directory of a volume.
#[derive(Debug, Clone)]
pub(crate) enum Disk {
    Memory(PowerLossDirectory),
}

impl Disk {
    pub(crate) fn storage(&self) -> Arc<dyn StorageDirectory> {
        match self {
            Self::Memory(directory) => Arc::new(directory.clone()),
        }
    }

    /// Makes the directory fail from an operation on, or by chance.
    pub(crate) fn arm(&self, rng: &mut Rng) {
        let Self::Memory(directory) = self;
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
        let Self::Memory(directory) = self;
        directory.is_dead()
    }

    /// Whether nobody knows what a restarted process would find.
    pub(crate) fn must_lose_power(&self) -> bool {
        let Self::Memory(directory) = self;
        directory.sync_has_failed()
    }

    pub(crate) fn crash(&self, loses_power: bool, rng: &mut Rng) {
        let Self::Memory(directory) = self;
        directory.clear_faults();
        if loses_power {
            directory.lose_power(rng);
        } else {
            directory.kill_process();
        }
    }

    pub(crate) fn faults(&self) -> std::collections::BTreeMap<&'static str, u64> {
        let Self::Memory(directory) = self;
        directory.faults()
    }
}

pub(crate) fn new_disk(_scratch: &Path) -> Disk {
    Disk::Memory(PowerLossDirectory::default())
}
