//! What the hosts of a schedule share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bulbil_store::{Digest, DigestBuilder, Objects, OwnerId, Store, StoreError, StoreKey, StoreOptions, window_leaf};
use bulbil_testkit::{FaultRates, ManualClock, PowerLossMachine, Rng, Schedule, StoredContent, tagged};
use bulbil_types::{BLOCK_LEN, FRAME_LEN};

use crate::backing::{Backing, Servers, Which};
use crate::figures::Figures;
use crate::machine::Machine;

pub(crate) type Content = Arc<Vec<u8>>;

/// Disks that hosts import.
const DISKS: usize = 6;

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) actors: usize,
    pub(crate) schedule: Arc<Schedule>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) disks: Vec<Content>,
    pub(crate) rates: FaultRates,
    pub(crate) directory: PathBuf,
    encrypted: bool,
    verbose: bool,
    /// The machine on which all hosts are processes, in schedules with one.
    pub(crate) machine: Option<Arc<Machine>>,
    stores: [Backing; 2],
    /// Every content that may be stored anywhere, by its digest.
    contents: Mutex<HashMap<Digest, Content>>,
    figures: Mutex<Figures>,
}

pub(crate) fn digest_of(content: &[u8]) -> Digest {
    let mut builder = DigestBuilder::new(content.len() as u64);
    for (index, window) in content.chunks(FRAME_LEN).enumerate() {
        builder.push(index as u64, window_leaf(window));
    }
    builder.finish()
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// Disks of tagged sectors that share runs of blocks in many ways.
fn make_disks(rng: &mut Rng) -> Vec<Content> {
    let disk = |rng: &mut Rng| {
        let mut bytes = Vec::new();
        for _ in 0..1 + rng.below(5) {
            match rng.below(5) {
                0 => bytes.extend(tagged(rng.next_u64() | 1, BLOCK_LEN / 512)),
                1 => bytes.resize(bytes.len() + BLOCK_LEN * (1 + rng.below(20) as usize), 0),
                _ => {
                    let first = 1 + rng.below(60);
                    let blocks = first..first + 1 + rng.below(30);
                    blocks.for_each(|block| bytes.extend(tagged(block, BLOCK_LEN / 512)));
                }
            }
        }
        Arc::new(bytes)
    };
    (0..DISKS).map(|_| disk(rng)).collect()
}

/// The two stores of a schedule, and the machine on which they lie if they do.
fn make_stores(
    seed: u64,
    directory: &Path,
    actors: usize,
    servers: &Servers,
    rng: &mut Rng,
) -> ([Backing; 2], Option<Arc<Machine>>) {
    let drawn = match seed % 40 {
        7 => "s3",
        2 | 12 | 22 | 32 if PowerLossMachine::is_possible() => "mount",
        _ => "memory",
    };
    match std::env::var("BULBIL_CAMPAIGN_BACKING").as_deref().unwrap_or(drawn) {
        "memory" => ([Backing::memory(rng), Backing::memory(rng)], None),
        "mount" => {
            let machine = Arc::new(Machine::new(directory, actors, rng));
            let on = |name| Backing::Mount { machine: Arc::clone(&machine), name };
            ([on("first"), on("second")], Some(machine))
        }
        "s3" => (["first", "second"].map(|name| Backing::s3(servers, &format!("{seed}-{name}"), rng)), None),
        other => panic!("BULBIL_CAMPAIGN_BACKING is memory, mount or s3, not `{other}`"),
    }
}

impl World {
    pub(crate) fn new(seed: u64, directory: &Path, servers: &Servers) -> Self {
        let mut rng = Rng::new(seed);
        let actors = 2 + rng.below(3) as usize;
        let mut often = |n| if rng.one_in(2) { 0 } else { n };
        let rates = FaultRates {
            fail_before: often(60),
            fail_after: often(60),
            no_space: often(60),
            corrupt_read: often(60),
            truncated_read: often(100),
        };
        let (stores, machine) = make_stores(seed, directory, actors, servers, &mut rng);
        let disks = make_disks(&mut rng);
        let world = Self {
            seed,
            actors,
            schedule: Schedule::new(rng.next_u64(), actors),
            clock: Arc::default(),
            rates,
            directory: directory.to_owned(),
            encrypted: rng.one_in(5),
            verbose: std::env::var_os("BULBIL_CAMPAIGN_VERBOSE").is_some(),
            machine,
            stores,
            contents: Mutex::default(),
            figures: Mutex::default(),
            disks,
        };
        for disk in &world.disks {
            world.register(disk);
        }
        world.count(&format!("schedules: {}", world.backing(Which::First).kind()), 1);
        world.count("schedules: encrypted", u64::from(world.encrypted));
        world
    }

    pub(crate) fn backing(&self, which: Which) -> &Backing {
        &self.stores[which as usize]
    }

    /// Opens a store over these objects.
    pub(crate) fn open(
        &self,
        which: Which,
        objects: Arc<dyn Objects>,
        owner: OwnerId,
        directory: &Path,
    ) -> Result<Store, StoreError> {
        let mut options = StoreOptions::new(&directory.join(format!("{which:?}")), owner);
        if self.encrypted {
            options = options.with_key(StoreKey::from_bytes([which as u8 + 1; 32])).encrypt_new();
        }
        let clock: Arc<ManualClock> = Arc::clone(&self.clock);
        Ok(Store::open(objects, options)?.with_clock(clock))
    }

    /// Opens a store as a process does that meets no faults. A store that does not open is lost.
    pub(crate) fn open_now(&self, which: Which, owner: OwnerId, directory: &Path, what: &str) -> Store {
        self.count("fault-free openings", 1);
        let store = self.open(which, self.backing(which).without_faults(), owner, directory);
        self.must(store, &format!("{what}: the {which:?} store does not open"))
    }

    /// Notes a content that may be stored from now on.
    pub(crate) fn register(&self, content: &Content) -> Digest {
        let digest = digest_of(content);
        self.contents.lock().unwrap().insert(digest, Arc::clone(content));
        digest
    }

    pub(crate) fn content(&self, digest: &Digest) -> Content {
        let found = self.contents.lock().unwrap().get(digest).cloned();
        found.unwrap_or_else(|| self.fail(&format!("nobody has stored {digest}")))
    }

    /// Reads a content that must be there, and right.
    pub(crate) fn check_content(&self, store: &Store, digest: &Digest, what: &str) {
        let expected = self.content(digest);
        let read = self.must(StoredContent::read(store, digest), &format!("{what}: {digest} is lost"));
        self.count("bytes checked: contents", read.len() as u64);
        if read != *expected {
            self.fail(&format!("{what}: {digest} has wrong bytes"));
        }
    }

    /// Whether the process of a host was killed, or its machine has lost power.
    pub(crate) fn is_dead(&self, actor: usize) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.is_dead(actor))
    }

    /// Another process of a host begins; whether its machine had lost power.
    pub(crate) fn restart(&self, actor: usize) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.restart(actor, &self.schedule))
    }

    pub(crate) fn host_is_done(&self, actor: usize) {
        self.schedule.finish(actor);
        if let Some(machine) = &self.machine {
            machine.finish();
        }
    }

    pub(crate) fn count(&self, name: &str, more: u64) {
        self.figures.lock().unwrap().count(name, more);
    }

    /// Tells what happens, where somebody wants to know.
    pub(crate) fn tell(&self, actor: usize, text: std::fmt::Arguments<'_>) {
        if self.verbose {
            println!("host {actor}: {text}");
        }
    }

    pub(crate) fn count_all(&self, group: &str, counts: std::collections::BTreeMap<&'static str, u64>) {
        self.figures.lock().unwrap().count_all(group, counts);
    }

    /// The result of what nothing hinders.
    pub(crate) fn must<T>(&self, result: Result<T, StoreError>, what: &str) -> T {
        result.unwrap_or_else(|e| self.fail(&format!("{what}: {}", chain(&e))))
    }

    pub(crate) fn fail(&self, text: &str) -> ! {
        panic!("seed {}: {text}", self.seed)
    }

    pub(crate) fn finish(self) -> Figures {
        self.stores.iter().for_each(|store| self.count_all("faults", store.faults()));
        if let Some(machine) = &self.machine {
            self.count_all("faults", machine.faults());
        }
        self.count("operations on objects", self.schedule.steps());
        self.figures.into_inner().unwrap()
    }
}
