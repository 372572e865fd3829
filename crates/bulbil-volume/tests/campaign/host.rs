//! One host: processes that follow each other, each killed now and then, and what is owed to them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{Digest, FrameHealer, GcOptions, ImportOptions, OwnerId, ScrubOptions, SecondStore, Store};
use bulbil_testkit::{FaultyObjects, MemoryDisk, Rng, StoredContent};
use bulbil_volume::{BaseCache, CacheHealer, CacheOptions};

use crate::backing::Which;
use crate::host_volume::HostVolume;
use crate::world::{Content, World};

pub(crate) struct Host {
    pub(crate) actor: usize,
    pub(crate) owner: OwnerId,
    pub(crate) rng: Rng,
    /// What has been imported or made by a snapshot, and not been removed since.
    pub(crate) owed: BTreeSet<Digest>,
    /// What was copied to the second store.
    pub(crate) copies: BTreeSet<Digest>,
    pub(crate) volumes: Vec<HostVolume>,
    pub(crate) next_tag: u64,
    directory: PathBuf,
}

/// A running process of a host.
pub(crate) struct Process<'w> {
    pub(crate) world: &'w World,
    pub(crate) store: Arc<Store>,
    pub(crate) cache: Arc<BaseCache>,
    objects: Arc<FaultyObjects>,
    /// The other store, once it was needed.
    second: Option<(Store, Arc<FaultyObjects>)>,
    kill_second_at: Option<u64>,
}

impl Process<'_> {
    fn is_killed(&self, actor: usize) -> bool {
        self.world.is_dead(actor)
            || self.objects.is_killed()
            || self.second.as_ref().is_some_and(|(_, objects)| objects.is_killed())
    }

    /// What is left of a process that is gone does nothing more.
    fn end(&self) {
        for objects in [Some(&self.objects), self.second.as_ref().map(|(_, objects)| objects)].into_iter().flatten() {
            objects.kill();
            self.world.count_all("faults", objects.faults());
        }
    }
}

impl Host {
    pub(crate) fn new(world: &World, actor: usize) -> Self {
        let directory = world.directory.join(actor.to_string());
        let owner = format!("{:016x}", actor + 1).parse().unwrap();
        let rng = Rng::new(world.seed.wrapping_mul(31).wrapping_add(actor as u64));
        let (owed, copies, volumes) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        Self { actor, owner, rng, owed, copies, volumes, next_tag: (actor as u64 + 1) << 40, directory }
    }

    pub(crate) fn run(&mut self, world: &World) {
        for _ in 0..2 + self.rng.below(5) {
            self.life(world);
        }
    }

    /// From the start of a process to its end, in order or not.
    fn life(&mut self, world: &World) {
        self.restart(world);
        let kill_at = self.rng.one_in(3).then(|| 1 + self.rng.below(120));
        let objects =
            world.backing(Which::First).for_process(&world.schedule, self.actor, &mut self.rng, world.rates, kill_at);
        let Ok(objects) = objects else { return };
        let state = self.state_directory(world);
        let store = world.open(Which::First, Arc::clone(&objects) as _, self.owner, &state);
        let Ok(store) = store else {
            objects.kill();
            // The next process has more luck.
            return drop(world.open_now(Which::First, self.owner, &self.directory, "after an opening that failed"));
        };
        let options = if self.rng.one_in(3) { CacheOptions::bounded(1 << 20) } else { CacheOptions::default() };
        let cache = Arc::new(BaseCache::open_with(&self.directory.join("cache"), options).unwrap());
        let kill_second_at = self.rng.one_in(3).then(|| 1 + self.rng.below(40));
        let mut process = Process { world, store: Arc::new(store), cache, objects, second: None, kill_second_at };
        for volume in &self.volumes {
            volume.disk.arm(&mut self.rng);
        }
        for _ in 0..4 + self.rng.below(12) {
            self.step(&mut process);
            if process.is_killed(self.actor) || self.volumes.iter().any(HostVolume::is_broken) {
                break;
            }
        }
        process.end();
        self.crash(&process);
    }

    fn crash(&mut self, process: &Process<'_>) {
        let killed = process.is_killed(self.actor);
        let must = self.volumes.iter().any(|volume| volume.disk.must_lose_power());
        let loses_power = must || (process.world.machine.is_none() && self.rng.one_in(2));
        process.world.count(if loses_power { "ends: power lost" } else { "ends: killed" }, u64::from(killed));
        process.world.tell(self.actor, format_args!("ends; killed {killed}, loses power {loses_power}"));
        for volume in &mut self.volumes {
            volume.crash(loses_power, &mut self.rng);
        }
        if loses_power {
            self.forget_cache();
        }
    }

    /// A machine that has lost power starts again, or just a process.
    fn restart(&self, world: &World) {
        if world.restart(self.actor) {
            world.tell(self.actor, format_args!("starts again after a loss of power"));
            self.forget_cache();
        }
        if let Some(machine) = &world.machine {
            machine.arm(self.actor, &mut self.rng.clone());
        }
    }

    /// Another boot of the host: its cache is not believed.
    fn forget_cache(&self) {
        drop(std::fs::remove_dir_all(self.directory.join("cache")));
    }

    fn state_directory(&self, world: &World) -> PathBuf {
        world.machine.as_ref().map_or_else(|| self.directory.clone(), |machine| machine.host_directory(self.actor))
    }

    fn step(&mut self, process: &mut Process<'_>) {
        let world = process.world;
        let step = match self.rng.below(40) {
            0..5 => self.import(process),
            5..7 => self.remove(process),
            7..9 => self.tidy(process),
            9..13 => self.launch(process),
            13..29 => self.use_volume(process),
            29..32 => self.collect(process),
            32 => {
                drop(process.store.sweep());
                "sweep"
            }
            33..35 => self.scrub(process),
            35..38 => self.copy(process),
            _ => {
                world.clock.advance_ms(self.rng.below(15 * 60_000));
                "leap of the clock"
            }
        };
        world.count(&format!("steps: {step}"), 1);
        world.tell(self.actor, format_args!("{step}"));
        if self.rng.one_in(4) {
            self.read(world);
        }
    }

    fn import(&mut self, process: &Process<'_>) -> &'static str {
        let world = process.world;
        let disk: &Content = &world.disks[self.rng.below(world.disks.len() as u64) as usize];
        let digest = world.register(disk);
        let source = MemoryDisk(disk.to_vec());
        let imported = process.store.import(&source, &source);
        world.tell(self.actor, format_args!("import of {digest}: {imported:?}"));
        if let Ok(report) = imported {
            assert_eq!(report.digest, digest, "seed {}", world.seed);
            self.owed.insert(digest);
        }
        "import"
    }

    fn any_owed(&mut self) -> Option<Digest> {
        let owed: Vec<_> = self.owed.iter().copied().collect();
        (!owed.is_empty()).then(|| owed[self.rng.below(owed.len() as u64) as usize])
    }

    /// Contents that something on this host names.
    pub(crate) fn named(&self) -> BTreeSet<Digest> {
        self.volumes.iter().flat_map(|volume| volume.bases.iter()).chain(&self.owed).copied().collect()
    }

    /// Removes an image: its content goes when no volume lies above it.
    fn remove(&mut self, process: &Process<'_>) -> &'static str {
        let Some(digest) = self.any_owed() else { return "nothing to remove" };
        self.owed.remove(&digest);
        self.give_up(process, &digest);
        "remove"
    }

    /// Gives up what nothing on this host names.
    fn tidy(&mut self, process: &Process<'_>) -> &'static str {
        for digest in process.store.digests().unwrap_or_default() {
            self.give_up(process, &digest);
        }
        "tidy"
    }

    /// Gives a content up, unless something on this host names it.
    fn give_up(&self, process: &Process<'_>, digest: &Digest) {
        if !self.named().contains(digest) {
            let removed = process.store.remove_manifest(digest);
            process.world.tell(self.actor, format_args!("removal of {digest}: {removed:?}"));
        }
    }

    fn launch(&mut self, process: &Process<'_>) -> &'static str {
        if self.volumes.len() >= 3 {
            let gone = self.volumes.swap_remove(self.rng.below(3) as usize);
            gone.end(process.world);
            gone.disk.remove();
            return "remove volume";
        }
        let base = if self.rng.one_in(6) { None } else { self.any_owed() };
        self.make_volume(process, base);
        "launch"
    }

    pub(crate) fn make_volume(&mut self, process: &Process<'_>, base: Option<Digest>) {
        if let Some(volume) = HostVolume::create(process, self.actor, base, &mut self.rng) {
            volume.disk.arm(&mut self.rng);
            self.volumes.push(volume);
        }
    }

    fn collect(&mut self, process: &Process<'_>) -> &'static str {
        let grace = if self.rng.one_in(3) { Duration::from_secs(600) } else { Duration::ZERO };
        let repacks = self.rng.one_in(2);
        let repack_below_percent = if repacks { 30 + self.rng.below(71) as u8 } else { 0 };
        let dry_run = self.rng.one_in(8);
        drop(process.store.collect(&GcOptions { grace, dry_run, repack_below_percent }));
        if repacks { "repack and collect" } else { "collect" }
    }

    fn scrub(&mut self, process: &mut Process<'_>) -> &'static str {
        let heal = self.rng.one_in(2);
        self.open_second(process);
        let second = process.second.as_ref().map(|(store, _)| SecondStore::new(store));
        let cache = CacheHealer::new(&process.cache, &process.store);
        let mut healers: Vec<&dyn FrameHealer> = vec![&cache];
        healers.extend(second.as_ref().map(|second| second as &dyn FrameHealer));
        drop(process.store.scrub(&ScrubOptions { heal, healers: &healers, ..ScrubOptions::default() }, &()));
        if heal { "scrub and heal" } else { "scrub" }
    }

    fn open_second(&mut self, process: &mut Process<'_>) {
        if process.second.is_some() {
            return;
        }
        let (world, kill_at) = (process.world, process.kill_second_at);
        let backing = world.backing(Which::Second);
        let Ok(objects) = backing.for_process(&world.schedule, self.actor, &mut self.rng, world.rates, kill_at) else {
            return;
        };
        let state = self.state_directory(world);
        let store = world.open(Which::Second, Arc::clone(&objects) as _, self.owner, &state);
        process.second = store.ok().map(|store| (store, objects));
    }

    /// Copies an image to the second store, or gives a copy up.
    fn copy(&mut self, process: &mut Process<'_>) -> &'static str {
        let Some(digest) = self.any_owed() else { return "nothing to copy" };
        self.open_second(process);
        let Some((second, _)) = &process.second else { return "copy" };
        if self.copies.contains(&digest) && self.rng.one_in(2) {
            self.copies.remove(&digest);
            drop(second.remove_manifest(&digest));
            return "remove copy";
        }
        let Ok(source) = StoredContent::open(&process.store, &digest) else { return "copy" };
        let options = ImportOptions { keep_on_failure: true, expected_digest: Some(digest) };
        if second.import_with_options(&source, &MemoryDisk(Vec::new()), &options).is_ok() {
            self.copies.insert(digest);
        }
        "copy"
    }

    /// Reads something that is owed, by a process that meets no faults.
    fn read(&mut self, world: &World) {
        let (which, digest) = if self.rng.one_in(4) {
            (Which::Second, self.copies.iter().next().copied())
        } else {
            (Which::First, self.any_owed())
        };
        let Some(digest) = digest else { return };
        let store = world.open_now(which, self.owner, &self.directory, "while hosts work");
        world.check_content(&store, &digest, "while hosts work");
    }
}
