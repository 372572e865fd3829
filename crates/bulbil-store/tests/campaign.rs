//! Imports, removals, collections and repacks of several hosts at the same time, with kills and faults between
//! any two operations on the objects: nothing that was acknowledged is lost, and no garbage stays for ever.
//!
//! `BULBIL_CAMPAIGN_SCHEDULES` is the number of schedules; `BULBIL_CAMPAIGN_SEED` the seed of the first one.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test may panic and makes small numbers"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulbil_store::{Digest, GcOptions, Objects, OwnerId, ScrubOptions, Store, StoreError, StoreOptions};
use bulbil_testkit::{FaultRates, FaultyObjects, ManualClock, MemoryDisk, MemoryObjects, Rng, Schedule, StoredContent};
use bulbil_types::BLOCK_LEN;

const DISKS: usize = 10;

/// Disks that share runs of blocks in many ways.
fn disks(rng: &mut Rng) -> Vec<MemoryDisk> {
    let library: Vec<Vec<u8>> = (0..96).map(|_| rng.bytes(64).repeat(BLOCK_LEN / 64)).collect();
    let disk = |rng: &mut Rng| {
        let mut bytes = Vec::new();
        for _ in 0..1 + rng.below(6) {
            match rng.below(5) {
                0 => bytes.extend(rng.bytes(64).repeat(BLOCK_LEN / 64)),
                1 => bytes.resize(bytes.len() + BLOCK_LEN * 3, 0),
                _ => {
                    let first = rng.below(90) as usize;
                    let end = (first + 1 + rng.below(40) as usize).min(library.len());
                    bytes.extend(library[first..end].concat());
                }
            }
        }
        MemoryDisk(bytes)
    };
    // Each of another size, so that no two are the same content.
    let mut disks: Vec<_> = (0..DISKS).map(|_| disk(rng)).collect();
    disks.iter_mut().zip(1..).for_each(|(disk, n)| disk.0.resize(disk.0.len().next_multiple_of(1 << 20) + n * 512, 0));
    disks
}

/// What the store owes to whom.
#[derive(Default)]
struct Oracle {
    owed: BTreeSet<(OwnerId, usize)>,
    /// Removals begun, and those still going on.
    removals: BTreeMap<(OwnerId, usize), (u64, u64)>,
}

struct World {
    seed: u64,
    objects: MemoryObjects,
    schedule: Arc<Schedule>,
    clock: Arc<ManualClock>,
    disks: Vec<MemoryDisk>,
    digests: Vec<Digest>,
    oracle: Mutex<Oracle>,
    rates: FaultRates,
    done: [AtomicU64; 7],
}

impl World {
    fn open(&self, objects: Arc<dyn Objects>, owner: OwnerId, directory: &Path) -> Result<Store, StoreError> {
        let options = StoreOptions { state_directory: directory.to_owned(), owner, ..StoreOptions::default() };
        let clock: Arc<ManualClock> = Arc::clone(&self.clock);
        Ok(Store::open(objects, options)?.with_clock(clock))
    }

    fn check_read(&self, store: &Store, disk: usize, what: &str) {
        let bytes = StoredContent::read(store, &self.digests[disk]);
        let bytes = bytes.unwrap_or_else(|e| panic!("seed {}: {what}: disk {disk} is lost: {}", self.seed, chain(&e)));
        assert!(bytes == self.disks[disk].0, "seed {}: {what}: disk {disk} has wrong bytes", self.seed);
    }
}

fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// One host: a process that does one thing after another, is killed now and then, and starts again.
struct Host<'a> {
    world: &'a World,
    actor: usize,
    owner: OwnerId,
    directory: &'a Path,
    rng: Rng,
}

impl Host<'_> {
    fn run(mut self, steps: u32) {
        let plain = Arc::new(self.world.schedule.objects(self.actor, Arc::new(self.world.objects.clone())));
        for _ in 0..steps {
            let kill_at = self.rng.one_in(4).then(|| 1 + self.rng.below(60));
            let objects: Arc<dyn Objects> = Arc::clone(&plain) as _;
            let faulty = FaultyObjects::new(objects, self.rng.next_u64(), self.world.rates, kill_at);
            let store = self.world.open(Arc::new(faulty), self.owner, self.directory);
            // Opening may have met a fault; the next process has more luck.
            let Ok(store) = store else { continue };
            for _ in 0..1 + self.rng.below(3) {
                self.step(&store);
            }
        }
        self.world.schedule.finish(self.actor);
    }

    fn step(&mut self, store: &Store) {
        let kind = match self.rng.below(15) {
            0..5 => self.import(store),
            5..7 => self.remove(store),
            7..10 => self.collect(store, 0),
            10..11 => {
                drop(store.sweep());
                3
            }
            11..13 => {
                let percent = 30 + self.rng.below(71) as u8;
                self.collect(store, percent)
            }
            13..14 => {
                drop(store.scrub(&ScrubOptions { heal: self.rng.one_in(2), ..ScrubOptions::default() }, &()));
                6
            }
            _ => {
                self.world.clock.advance_ms(self.rng.below(15 * 60_000));
                5
            }
        };
        self.world.done[kind].fetch_add(1, Ordering::Relaxed);
        if self.rng.one_in(3) {
            self.read();
        }
    }

    fn import(&mut self, store: &Store) -> usize {
        let disk = self.rng.below(DISKS as u64) as usize;
        let key = (self.owner, disk);
        let before = self.world.oracle.lock().unwrap().removals.get(&key).copied().unwrap_or_default();
        let source = &self.world.disks[disk];
        if let Ok(report) = store.import(source, source) {
            assert_eq!(report.digest, self.world.digests[disk], "seed {}", self.world.seed);
            let mut oracle = self.world.oracle.lock().unwrap();
            // Beside a removal of the same owner nobody can say which came last.
            if before.1 == 0 && oracle.removals.get(&key).copied().unwrap_or_default() == before {
                oracle.owed.insert(key);
            }
        }
        0
    }

    fn remove(&mut self, store: &Store) -> usize {
        let disk = self.rng.below(DISKS as u64) as usize;
        let key = (self.owner, disk);
        {
            let mut oracle = self.world.oracle.lock().unwrap();
            oracle.owed.remove(&key);
            let removal = oracle.removals.entry(key).or_default();
            *removal = (removal.0 + 1, removal.1 + 1);
        }
        drop(store.remove_manifest(&self.world.digests[disk]));
        self.world.oracle.lock().unwrap().removals.get_mut(&key).unwrap().1 -= 1;
        1
    }

    fn collect(&mut self, store: &Store, repack_below_percent: u8) -> usize {
        let grace = if self.rng.one_in(3) { Duration::from_secs(600) } else { Duration::ZERO };
        let dry_run = self.rng.one_in(8);
        drop(store.collect(&GcOptions { grace, dry_run, repack_below_percent }));
        if repack_below_percent > 0 { 4 } else { 2 }
    }

    /// Reads something that is owed, by a process that meets no faults.
    fn read(&mut self) {
        let mine: Vec<_> = {
            let oracle = self.world.oracle.lock().unwrap();
            oracle.owed.iter().filter(|(owner, _)| *owner == self.owner).map(|(_, disk)| *disk).collect()
        };
        if mine.is_empty() {
            return;
        }
        let disk = mine[self.rng.below(mine.len() as u64) as usize];
        let key = (self.owner, disk);
        let before = self.world.oracle.lock().unwrap().removals.get(&key).copied();
        let objects = self.world.schedule.objects(self.actor, Arc::new(self.world.objects.clone()));
        let store = self.world.open(Arc::new(objects), self.owner, self.directory).unwrap();
        let read = StoredContent::read(&store, &self.world.digests[disk]);
        if self.world.oracle.lock().unwrap().removals.get(&key).copied() != before {
            return;
        }
        let seed = self.world.seed;
        let read = read.unwrap_or_else(|e| panic!("seed {seed}: disk {disk} of {} is lost: {}", self.owner, chain(&e)));
        assert!(read == self.world.disks[disk].0, "seed {seed}: disk {disk} has wrong bytes");
    }
}

/// When everything has come to rest: all is there, and after collections nothing else is.
fn check_at_rest(world: &World, owners: &BTreeSet<OwnerId>, directory: &Path) {
    world.clock.advance_ms(3_600_000);
    let stores: Vec<_> = owners
        .iter()
        .enumerate()
        .map(|(n, owner)| {
            let directory = directory.join(format!("rest-{n}"));
            (*owner, world.open(Arc::new(world.objects.clone()), *owner, &directory).unwrap())
        })
        .collect();
    let check_all = |what: &str| {
        for (owner, store) in &stores {
            for (_, disk) in world.oracle.lock().unwrap().owed.iter().filter(|(o, _)| o == owner) {
                world.check_read(store, *disk, what);
            }
            for digest in store.digests().unwrap() {
                let disk = world.digests.iter().position(|d| *d == digest).unwrap();
                world.check_read(store, disk, what);
            }
        }
    };
    check_all("at rest");
    let (_, store) = &stores[0];
    store.collect(&GcOptions { grace: Duration::ZERO, repack_below_percent: 100, ..GcOptions::default() }).unwrap();
    store.sweep().unwrap();
    check_all("after a repack and a sweep");
    let report = store.scrub(&ScrubOptions::default(), &()).unwrap();
    assert!(report.damaged_packs.is_empty() && report.damaged_manifests.is_empty(), "seed {}: {report:?}", world.seed);
    let stats = store.stats().unwrap();
    let names = world.objects.names();
    assert_eq!(stats.packs, names.iter().filter(|name| name.ends_with(".pack")).count() as u64);

    let seed = world.seed;
    let mut used = BTreeSet::new();
    for (_, store) in &stores {
        for digest in store.digests().unwrap() {
            used.extend(store.manifest(&digest).unwrap().packs().iter().map(|pack| pack.id.to_string()));
        }
    }
    let packs: BTreeSet<_> = names.iter().filter_map(|n| n.strip_suffix(".pack")?.rsplit('/').next()).collect();
    assert_eq!(packs, used.iter().map(String::as_str).collect(), "seed {seed}: garbage stays");
    let leases: Vec<_> = names.iter().filter(|name| name.starts_with("leases/")).collect();
    assert!(leases.is_empty(), "seed {seed}: leases stay: {leases:?}");
    assert!(names.iter().filter(|name| name.starts_with("gc/")).count() <= 1, "seed {seed}: old lists stay");
    for (disk, source) in world.disks.iter().enumerate() {
        store.import(source, source).unwrap();
        world.check_read(store, disk, "imported at rest");
    }
}

fn run_schedule(seed: u64, directory: &Path) -> [u64; 8] {
    let mut rng = Rng::new(seed);
    let clock = Arc::new(ManualClock::new());
    let actors = 2 + rng.below(3) as usize;
    let disks = disks(&mut rng);
    let digests = {
        let options = StoreOptions {
            state_directory: directory.join("digests"),
            owner: OwnerId::default(),
            ..StoreOptions::default()
        };
        let store = Store::open(Arc::new(MemoryObjects::default()), options).unwrap();
        disks.iter().map(|disk| store.import(disk, disk).unwrap().digest).collect()
    };
    let mut often = |n| if rng.one_in(2) { 0 } else { n };
    let rates = FaultRates {
        fail_before: often(60),
        fail_after: often(60),
        no_space: often(60),
        corrupt_read: often(60),
        truncated_read: often(100),
    };
    let world = World {
        seed,
        objects: MemoryObjects::default(),
        schedule: Schedule::new(seed, actors),
        clock,
        disks,
        digests,
        oracle: Mutex::default(),
        rates,
        done: Default::default(),
    };
    // The store is there before anything goes wrong.
    drop(world.open(Arc::new(world.objects.clone()), OwnerId::default(), &directory.join("first")).unwrap());
    let one_owner = rng.one_in(4);
    let owner = |actor: usize| -> OwnerId { format!("{:016x}", if one_owner { 7 } else { actor }).parse().unwrap() };
    let directories: Vec<_> = (0..actors).map(|actor| directory.join(actor.to_string())).collect();
    std::thread::scope(|scope| {
        for (actor, directory) in directories.iter().enumerate() {
            let host = Host { world: &world, actor, owner: owner(actor), directory, rng: Rng::new(rng.next_u64()) };
            let (world, steps) = (&world, 2 + rng.below(5) as u32);
            scope.spawn(move || {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| host.run(steps)));
                if let Err(panic) = outcome {
                    world.schedule.finish(actor);
                    std::panic::resume_unwind(panic);
                }
            });
        }
    });
    check_at_rest(&world, &(0..actors).map(owner).collect(), directory);
    let mut done = [0; 8];
    for (sum, count) in done.iter_mut().zip(&world.done) {
        *sum = count.load(Ordering::Relaxed);
    }
    done[7] = world.schedule.steps();
    done
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn no_schedule_of_hosts_kills_and_faults_loses_content_or_keeps_garbage() {
    let schedules = from_environment("BULBIL_CAMPAIGN_SCHEDULES", 200);
    let first = from_environment("BULBIL_CAMPAIGN_SEED", 1);
    println!("seeds {first} to {}", first + schedules - 1);
    let shared_memory = Path::new("/dev/shm");
    let next = AtomicU64::new(first);
    let total = Mutex::new([0; 8]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + schedules {
                        return;
                    }
                    // The index syncs its files, which need not reach a disk here.
                    let directory = match shared_memory.is_dir() {
                        true => tempfile::tempdir_in(shared_memory),
                        false => tempfile::tempdir(),
                    };
                    let done = run_schedule(seed, directory.unwrap().path());
                    total.lock().unwrap().iter_mut().zip(done).for_each(|(sum, n)| *sum += n);
                }
            });
        }
    });
    let [imports, removals, collections, sweeps, repacks, waits, scrubs, operations] = *total.lock().unwrap();
    println!(
        "{schedules} schedules: {imports} imports, {removals} removals, {collections} collections, {sweeps} sweeps, \
         {repacks} repacks, {scrubs} scrubs, {waits} leaps of the clock, {operations} operations on objects"
    );
}
