//! Where the two stores of a schedule lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bulbil_store::{DirObjects, Objects, RemoteOptions, StoreError, StoreLocation, open_objects};
use bulbil_testkit::{
    Fault, FaultRates, FaultyObjects, HttpFaultProxy, HttpFaultRates, LateObjects, LateRates, MemoryObjects,
    ProxyOptions, Rng, S3Server, Schedule,
};

use crate::machine::Machine;

/// The store of the hosts, and the one that contents are copied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    First,
    Second,
}

/// What schedules use one after another, because it is slow to start.
#[derive(Default)]
pub(crate) struct Servers {
    s3: OnceLock<S3Server>,
}

impl Servers {
    fn s3(&self) -> &S3Server {
        self.s3.get_or_init(S3Server::start)
    }
}

/// A store of a schedule.
pub(crate) enum Backing {
    /// Objects in memory behind a network that is late.
    Memory { late: Arc<LateObjects>, plain: MemoryObjects },
    /// A directory of a machine that loses power.
    Mount { machine: Arc<Machine>, name: &'static str },
    /// A bucket behind a proxy that does what networks do wrong.
    S3 { proxy: HttpFaultProxy, behind_proxy: Box<StoreLocation>, plain: Arc<dyn Objects>, files: PathBuf },
}

impl Backing {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Memory { .. } => "memory",
            Self::Mount { .. } => "directory that loses power",
            Self::S3 { .. } => "s3",
        }
    }

    pub(crate) fn memory(rng: &mut Rng) -> Self {
        let plain = MemoryObjects::default();
        let mut often = |n| if rng.one_in(2) { 0 } else { n };
        let rates = LateRates { duplicated: often(40), given_up: often(60), tried_again: often(30) };
        let late = Arc::new(LateObjects::new(Arc::new(plain.clone()), rng.next_u64(), rates));
        Self::Memory { late, plain }
    }

    pub(crate) fn s3(servers: &Servers, prefix: &str, rng: &mut Rng) -> Self {
        let server = servers.s3();
        let faults = HttpFaultRates::all(rng.next_u64(), 20).and(Fault::Silent, 4).and(Fault::Corrupt(0), 10);
        let proxy = HttpFaultProxy::start(server.address(), ProxyOptions { faults, ..ProxyOptions::default() });
        let behind_proxy = Box::new(S3Server::location_at(&proxy.endpoint(), prefix));
        let plain = open_objects(&server.location(prefix), &S3Server::options()).unwrap();
        Self::S3 { proxy, behind_proxy, plain, files: server.objects().join(prefix) }
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
        let (objects, rates): (Arc<dyn Objects>, _) = match self {
            Self::Memory { late, .. } => (Arc::clone(late) as _, rates),
            Self::Mount { machine, name } => {
                // Its own faults, and what a disk gives back wrongly.
                let rates = FaultRates { fail_before: 0, fail_after: 0, no_space: 0, ..rates };
                (Arc::new(DirObjects::open(&machine.path(actor).join(name))?), rates)
            }
            Self::S3 { behind_proxy, .. } => {
                // Few attempts, so that operations fail at times.
                let options = RemoteOptions {
                    attempt_timeout: Duration::from_millis(300),
                    deadline: Duration::from_millis(600),
                    ..S3Server::options()
                };
                (open_objects(behind_proxy, &options)?, FaultRates::default())
            }
        };
        let turns = schedule.objects(actor, objects);
        Ok(Arc::new(FaultyObjects::new(Arc::new(turns), rng.next_u64(), rates, kill_at)))
    }

    /// The objects as a process sees them that meets no faults.
    pub(crate) fn without_faults(&self) -> Arc<dyn Objects> {
        match self {
            Self::Memory { plain, .. } => Arc::new(plain.clone()),
            Self::Mount { machine, name } => Arc::new(DirObjects::open(&machine.observer().join(name)).unwrap()),
            Self::S3 { plain, .. } => Arc::clone(plain),
        }
    }

    /// Lets everything arrive that is under way, and nothing fail any more.
    pub(crate) fn settle(&self) {
        match self {
            Self::Memory { late, .. } => late.settle(),
            Self::Mount { machine, .. } => machine.settle(),
            Self::S3 { proxy, .. } => proxy.set(ProxyOptions::default()),
        }
    }

    /// Flips a bit of one byte of an object.
    pub(crate) fn rot(&self, name: &str, rng: &mut Rng) {
        let flip_in = |path: &Path, rng: &mut Rng| {
            let bytes = std::fs::read(path).unwrap();
            let position = rng.below(bytes.len() as u64);
            let changed = bytes[position as usize] ^ 1 << rng.below(8);
            File::options().write(true).open(path).unwrap().write_all_at(&[changed], position).unwrap();
        };
        match self {
            Self::Memory { plain, .. } => {
                let position = rng.below(plain.len_bytes(name) as u64) as usize;
                plain.flip(name, position, 1 << rng.below(8));
            }
            Self::Mount { machine, name: store } => flip_in(&machine.observer().join(store).join(name), rng),
            Self::S3 { files, .. } => flip_in(&files.join(name), rng),
        }
    }

    pub(crate) fn faults(&self) -> BTreeMap<&'static str, u64> {
        match self {
            Self::Memory { late, .. } => late.faults(),
            // Of the machine, which both stores share.
            Self::Mount { .. } => BTreeMap::new(),
            Self::S3 { proxy, .. } => {
                [("s3: 500, 503, silent, cut, duplicated, slow, corrupted", proxy.faults())].into()
            }
        }
    }
}
