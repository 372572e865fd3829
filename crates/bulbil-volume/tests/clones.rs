//! Clones that share files with their parents, through writes, snapshots, merges, removals and crashes.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use bulbil_store::{DirObjects, OwnerId, Store, StoreKey, StoreOptions};
use bulbil_testkit::{DiskOracle, MemoryDisk, PowerLossDirectory, Rng, tagged};
use bulbil_types::VolumeId;
use bulbil_volume::{
    BlockDevice as _, HostDirectory, StorageDirectory, Volume, VolumeDirectory, VolumeErrorKind, VolumeRecord,
};
use support::{Image, check_after, kill_or_lose_power, read_all, step};

/// A directory whose syncs cost nothing, where there is one: what is tested is the volume's directory.
fn quick_directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn nobody() -> MemoryDisk {
    MemoryDisk(Vec::new())
}

fn rounds(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap())
}

/// Volumes beside each other on a machine that may lose its power.
struct Machine<'a> {
    image: &'a Image,
    disk: PowerLossDirectory,
}

impl<'a> Machine<'a> {
    fn new(image: &'a Image) -> Self {
        Self { image, disk: PowerLossDirectory::default() }
    }

    fn create(&self) -> VolumeId {
        let id = VolumeId::random();
        let size_bytes = self.image.content.len() as u64;
        Volume::create_in(&*self.directory(&id), &id, size_bytes, Some(&self.image.manifest)).unwrap();
        id
    }

    fn directory(&self, id: &VolumeId) -> Arc<dyn StorageDirectory> {
        self.disk.subdirectory(id.as_str())
    }

    fn try_open(&self, id: &VolumeId) -> Result<Volume, bulbil_volume::VolumeError> {
        Volume::open_in(self.directory(id), &self.image.store, &self.image.cache)
    }

    fn open(&self, id: &VolumeId) -> Volume {
        self.try_open(id).unwrap()
    }

    fn crash(&self, rng: &mut Rng) -> bool {
        kill_or_lose_power(&self.disk, rng)
    }
}

/// A volume with what it must hold.
struct Member {
    id: VolumeId,
    oracle: DiskOracle,
    volume: Option<Volume>,
}

/// A parent with its clones, their clones, and so on.
struct Family<'a> {
    machine: Machine<'a>,
    members: Vec<Member>,
    /// A clone that was asked for without an answer, and what it must hold if it is there.
    asked: Option<(VolumeId, DiskOracle)>,
    clones: u64,
    refused: u64,
}

const MAX_MEMBERS: usize = 6;

impl Family<'_> {
    /// One random act on one of them; `false` when it failed: the machine is off.
    fn act(&mut self, rng: &mut Rng, tag: u64) -> bool {
        let chosen = rng.below(self.members.len() as u64) as usize;
        match rng.below(24) {
            0 | 1 if self.members.len() < MAX_MEMBERS => self.clone_open(chosen),
            2 if self.members.len() < MAX_MEMBERS => self.clone_closed(chosen),
            3 if self.members.len() > 1 => {
                // Nobody hears of it again, so it does not matter how far that goes.
                let gone = self.members.swap_remove(chosen);
                drop(gone.volume);
                let directory = self.machine.directory(&gone.id);
                let names = directory.list().unwrap();
                names.iter().filter(|name| *name != "volume.json").all(|name| directory.remove(name).is_ok())
            }
            act => Self::act_alone(&mut self.members[chosen], act, rng, tag),
        }
    }

    fn act_alone(member: &mut Member, act: u64, rng: &mut Rng, tag: u64) -> bool {
        let volume = member.volume.as_ref().unwrap();
        match act {
            4 => {
                let taken = volume.snapshot(&nobody());
                if taken.is_ok() {
                    member.oracle.flushed();
                }
                taken.is_ok()
            }
            // A snapshot that failed.
            5 => {
                let frozen = volume.freeze().is_ok();
                if frozen {
                    member.oracle.flushed();
                }
                frozen
            }
            6 => volume.compact().is_ok(),
            _ => step(volume, &mut member.oracle, rng, tag),
        }
    }

    fn clone_open(&mut self, parent: usize) -> bool {
        let member = &mut self.members[parent];
        let id = VolumeId::random();
        self.asked = Some((id.clone(), member.oracle.clone()));
        let made = member.volume.as_ref().unwrap().clone_as(&id);
        if made.is_ok() {
            member.oracle.flushed();
        }
        let oracle = member.oracle.clone();
        self.take_in(id, oracle, made)
    }

    fn clone_closed(&mut self, parent: usize) -> bool {
        let member = &mut self.members[parent];
        let id = VolumeId::random();
        self.asked = Some((id.clone(), member.oracle.clone()));
        // What was not flushed is there, as when a process is killed.
        member.volume = None;
        let made = Volume::clone_in(self.machine.directory(&member.id), &id);
        let Ok(volume) = self.machine.try_open(&member.id) else { return false };
        let mut content = vec![0; volume.size_bytes() as usize];
        if volume.read_at(&mut content, 0).is_err() {
            return false;
        }
        member.oracle.check_after_kill(&content).unwrap();
        let volume = member.volume.insert(volume);
        if volume.flush().is_err() {
            return false;
        }
        let oracle = member.oracle.clone();
        self.take_in(id, oracle, made)
    }

    fn take_in(
        &mut self,
        id: VolumeId,
        oracle: DiskOracle,
        made: Result<Option<VolumeRecord>, bulbil_volume::VolumeError>,
    ) -> bool {
        let Ok(made) = made else { return false };
        self.asked = None;
        if made.is_none() {
            self.refused += 1;
            return true;
        }
        self.clones += 1;
        let volume = self.machine.try_open(&id);
        let opened = volume.is_ok();
        if opened {
            self.members.push(Member { id, oracle, volume: volume.ok() });
        } else {
            // Made, but the machine went off before it was opened.
            self.asked = None;
            self.members.push(Member { id, oracle, volume: None });
        }
        opened
    }

    fn check_running(&self, context: &str) {
        for member in &self.members {
            let volume = member.volume.as_ref().unwrap();
            let mut content = vec![0; volume.size_bytes() as usize];
            if volume.read_at(&mut content, 0).is_ok() {
                member.oracle.check_running(&content).unwrap_or_else(|e| panic!("{context}, {}: {e}", member.id));
            }
        }
    }

    fn crash_and_check(&mut self, rng: &mut Rng, context: &str) {
        self.members.iter_mut().for_each(|member| member.volume = None);
        let killed = self.machine.crash(rng);
        if let Some((id, oracle)) = self.asked.take() {
            match self.machine.try_open(&id) {
                Ok(volume) => self.members.push(Member { id, oracle, volume: Some(volume) }),
                Err(e) => assert_eq!(e.kind(), VolumeErrorKind::NotFound, "{context}: {e}"),
            }
        }
        for member in &mut self.members {
            let volume = member.volume.take().unwrap_or_else(|| self.machine.open(&member.id));
            assert!(volume.frozen_layers() <= 12, "{context}: {} layers", volume.frozen_layers());
            let content = read_all(&volume);
            let checked = check_after(killed, &mut member.oracle, &content);
            checked.unwrap_or_else(|e| panic!("{context}, {}: {e}", member.id));
            member.volume = Some(volume);
        }
    }
}

#[test]
fn families_of_clones_never_see_each_other_through_crashes() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let (mut tag, mut crashes, mut clones, mut refused) = (1 << 32, 0, 0, 0);
    for seed in 0..rounds("BULBIL_TEST_CLONE_SEEDS", 24) {
        let mut rng = Rng::new(seed);
        let machine = Machine::new(&image);
        let id = machine.create();
        let volume = Some(machine.open(&id));
        let members = vec![Member { id, oracle: DiskOracle::new(&image.content), volume }];
        let mut family = Family { machine, members, asked: None, clones: 0, refused: 0 };
        for _ in 0..12 {
            family.machine.disk.set_fuse(rng.below(400));
            loop {
                tag += 1;
                if !family.act(&mut rng, tag) {
                    break;
                }
                if rng.one_in(20) {
                    family.check_running(&format!("seed {seed}, running"));
                }
            }
            assert!(family.machine.disk.is_dead(), "seed {seed}: something failed before the crash");
            crashes += 1;
            family.crash_and_check(&mut rng, &format!("seed {seed}, crash {crashes}"));
        }
        clones += family.clones;
        refused += family.refused;
    }
    println!("{crashes} crashes, {clones} clones, {refused} not shared");
    assert!(clones > crashes);
}

/// Clones an open or a closed volume, with a crash after each number of file operations.
#[test]
fn a_crash_at_any_operation_of_a_clone_leaves_it_whole_or_not_there() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let (mut whole, mut missing) = (0, 0);
    for seed in 0..12 {
        for fuse in 0.. {
            let context = format!("seed {seed}, fuse {fuse}");
            let mut rng = Rng::new(seed << 16 | fuse);
            let machine = Machine::new(&image);
            let (id, clone) = (machine.create(), VolumeId::random());
            let mut oracle = DiskOracle::new(&image.content);
            let volume = machine.open(&id);
            for layer in 0..seed % 3 {
                assert!((0..3).all(|tag| step(&volume, &mut oracle, &mut rng, 100 * (layer + 1) + tag)));
                drop(volume.freeze().unwrap());
                oracle.flushed();
            }
            assert!((0..4).all(|tag| step(&volume, &mut oracle, &mut rng, 1000 + tag)));
            let open = seed % 2 == 0;
            let volume = open.then_some(volume);
            machine.disk.set_fuse(fuse);
            let made = match &volume {
                Some(volume) => volume.clone_as(&clone),
                None => Volume::clone_in(machine.directory(&id), &clone),
            };
            assert!(made.is_ok() || machine.disk.is_dead(), "{context}: something failed before the crash");
            if open && made.is_ok() {
                oracle.flushed();
            }
            drop(volume);
            let mut killed = machine.crash(&mut rng);
            // The parent first, or the clone: none waits for the other.
            let mut before = None;
            if rng.one_in(2) {
                before = Some(check_opened(&machine, killed, &id, &mut oracle, &context));
            }
            let mut of_clone = oracle.clone();
            match machine.try_open(&clone) {
                Ok(volume) => {
                    whole += 1;
                    let content = read_all(&volume);
                    check_after(killed, &mut of_clone, &content).unwrap_or_else(|e| panic!("{context}, clone: {e}"));
                    assert!(
                        before.as_ref().is_none_or(|volume| read_all(volume) == content),
                        "{context}: not the same"
                    );
                    drop(volume);
                }
                Err(e) => {
                    missing += 1;
                    assert!(made.is_err() && e.kind() == VolumeErrorKind::NotFound, "{context}: {e}");
                    of_clone = DiskOracle::new(&[]);
                }
            }
            // Nothing that the parent does from now on is the clone's, and nothing of the clone the parent's.
            let volume = before.unwrap_or_else(|| check_opened(&machine, killed, &id, &mut oracle, &context));
            assert!((0..20).all(|tag| step(&volume, &mut oracle, &mut rng, 2000 + tag)));
            drop(volume);
            machine.disk.lose_power(&mut rng);
            killed = false;
            if !of_clone.newest().is_empty() {
                let volume = check_opened(&machine, killed, &clone, &mut of_clone, &format!("{context}, clone again"));
                assert!((0..20).all(|tag| step(&volume, &mut of_clone, &mut rng, 3000 + tag)));
            }
            drop(check_opened(&machine, killed, &id, &mut oracle, &format!("{context}, again")));
            if made.is_ok() {
                break;
            }
        }
    }
    println!("{whole} whole, {missing} missing");
    assert!(whole >= 12 && missing > 60, "{whole} whole, {missing} missing");
}

fn check_opened(machine: &Machine<'_>, killed: bool, id: &VolumeId, oracle: &mut DiskOracle, context: &str) -> Volume {
    let volume = machine.open(id);
    check_after(killed, oracle, &read_all(&volume)).unwrap_or_else(|e| panic!("{context}: {e}"));
    volume
}

#[test]
fn without_second_names_or_with_too_many_layers_nothing_is_shared_until_a_snapshot() {
    let dir = quick_directory();
    let image = Image::make(dir.path());
    let machine = Machine::new(&image);
    let id = machine.create();
    let mut volume = machine.open(&id);
    let write = |volume: &Volume, tag: u64| volume.write_at(&tagged(tag, 8), 4096 * (tag % 9), true).unwrap();
    write(&volume, 1);
    machine.disk.set_without_links(true);
    let (one, two) = (VolumeId::random(), VolumeId::random());
    assert_eq!(volume.clone_as(&one).unwrap(), None);
    assert_eq!(machine.try_open(&one).unwrap_err().kind(), VolumeErrorKind::NotFound);
    machine.disk.set_without_links(false);
    let mut clones = Vec::new();
    for tag in 2..10 {
        let clone = VolumeId::random();
        let shared = if tag % 2 == 0 {
            volume.clone_as(&clone).unwrap()
        } else {
            drop(volume);
            let shared = Volume::clone_in(machine.directory(&id), &clone).unwrap();
            volume = machine.open(&id);
            shared
        };
        assert_eq!(shared.unwrap().layers.len(), tag as usize);
        clones.push((machine.open(&clone), read_all(&volume)));
        write(&volume, tag);
    }
    assert_eq!(volume.frozen_layers(), 8);
    assert_eq!(volume.clone_as(&two).unwrap(), None);
    drop(volume);
    assert_eq!(Volume::clone_in(machine.directory(&id), &two).unwrap(), None);
    let volume = machine.open(&id);
    // They are shared, so they are not merged; a snapshot that fails is taken along all the same.
    for tag in 20..40 {
        drop(volume.freeze().unwrap());
        write(&volume, tag);
        volume.compact().unwrap();
        assert!(volume.frozen_layers() <= 10);
    }
    let expected = read_all(&volume);
    volume.snapshot(&nobody()).unwrap();
    assert_eq!(volume.frozen_layers(), 0);
    let clone = volume.clone_as(&two).unwrap().unwrap();
    assert_eq!(clone.layers.len(), 1);
    assert!(read_all(&machine.open(&two)) == expected);
    assert!(clones.iter().all(|(clone, expected)| read_all(clone) == *expected));
}

/// Volumes in directories of the host.
struct Host {
    dir: tempfile::TempDir,
    volumes: VolumeDirectory,
    image: Image,
    id: VolumeId,
}

impl Host {
    fn new(key: Option<StoreKey>) -> Self {
        let dir = quick_directory();
        let path = dir.path().join("store");
        let options = StoreOptions::new(&path.join("index"), OwnerId::default());
        let options = match key {
            Some(key) => options.with_key(key).encrypt_new(),
            None => options,
        };
        let store = Store::open(Arc::new(DirObjects::open(&path).unwrap()), options).unwrap();
        let image = Image::make_in(dir.path(), Arc::new(store));
        let volumes = VolumeDirectory::open(&dir.path().join("volumes")).unwrap();
        let id = VolumeId::random();
        volumes.create(&id, image.content.len() as u64, Some(&image.manifest)).unwrap();
        Self { dir, volumes, image, id }
    }

    fn path(&self, id: &VolumeId) -> std::path::PathBuf {
        self.dir.path().join("volumes").join(id.as_str())
    }

    fn open(&self, id: &VolumeId) -> Volume {
        self.volumes.open_volume(id, &self.image.store, &self.image.cache).unwrap()
    }

    fn clone_closed(&self, id: &VolumeId) -> VolumeId {
        let clone = VolumeId::random();
        self.volumes.clone_volume(id, &clone).unwrap().unwrap();
        clone
    }
}

#[test]
fn many_clones_add_no_layers_and_take_no_space() {
    let host = Host::new(None);
    let volume = host.open(&host.id);
    volume.write_at(&tagged(5, 80), 8192, true).unwrap();
    let expected = read_all(&volume);
    let open: Vec<_> = (0..50).map(|_| VolumeId::random()).collect();
    for clone in &open {
        volume.clone_as(clone).unwrap().unwrap();
        assert_eq!(volume.frozen_layers(), 1);
    }
    drop(volume);
    let record = host.volumes.record(&host.id).unwrap();
    let closed: Vec<_> = (0..50).map(|_| host.clone_closed(&host.id)).collect();
    assert_eq!(host.volumes.record(&host.id).unwrap(), record);
    let data = std::fs::metadata(host.path(&host.id).join("data.0")).unwrap();
    assert_eq!(data.nlink(), 101);
    let mut numbers = Vec::new();
    for clone in open.iter().chain(&closed) {
        assert!(read_all(&host.open(clone)) == expected);
        assert_eq!(std::fs::metadata(host.path(clone).join("data.0")).unwrap().ino(), data.ino());
        numbers.push(host.volumes.record(clone).unwrap().layers[0]);
    }
    // What two clones write never lies under the same number.
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 100);
    // Once nobody shares it any more, the layer is the parent's again.
    for clone in open.iter().chain(&closed) {
        host.volumes.remove(clone).unwrap();
    }
    let volume = host.open(&host.id);
    drop(volume.freeze().unwrap());
    volume.write_at(&tagged(6, 8), 0, true).unwrap();
    drop(volume.freeze().unwrap());
    volume.compact().unwrap();
    assert_eq!(volume.frozen_layers(), 1);
}

#[test]
fn a_clone_outlives_its_parent_and_needs_its_base() {
    let host = Host::new(None);
    let volume = host.open(&host.id);
    volume.write_at(&tagged(5, 80), 8192, true).unwrap();
    let clone = VolumeId::random();
    volume.clone_as(&clone).unwrap().unwrap();
    assert_eq!(host.volumes.clone_volume(&host.id, &VolumeId::random()).unwrap_err().kind(), VolumeErrorKind::InUse);
    let expected = read_all(&volume);
    volume.write_at(&tagged(6, 8), 8192, true).unwrap();
    volume.write_zeroes(16384, 8192, true).unwrap();
    volume.snapshot(&nobody()).unwrap();
    drop(volume);
    let of_clone = host.clone_closed(&clone);
    // Through the snapshot the parent lies above another content.
    let bases = host.volumes.bases().unwrap();
    let base = |id: &VolumeId| bases.iter().find(|(found, _)| found == id).unwrap().1.clone();
    assert_eq!(base(&clone), [host.image.manifest.digest()]);
    assert_eq!(base(&of_clone), [host.image.manifest.digest()]);
    assert_ne!(base(&host.id), base(&clone));
    host.volumes.remove(&host.id).unwrap();
    assert!(read_all(&host.open(&clone)) == expected);
    host.open(&clone).write_at(&tagged(7, 8), 0, true).unwrap();
    host.volumes.remove(&clone).unwrap();
    assert!(read_all(&host.open(&of_clone)) == expected);
    // It has the layer alone now, and its snapshot is that of the whole disk.
    let volume = host.open(&of_clone);
    let report = volume.snapshot(&nobody()).unwrap();
    let whole = MemoryDisk(expected.clone());
    assert_eq!(report.digest, host.image.store.import(&whole, &whole).unwrap().digest);
    assert!(read_all(&volume) == expected);
}

#[test]
fn a_clone_that_lacks_a_file_was_never_completed() {
    let host = Host::new(None);
    host.open(&host.id).write_at(&tagged(5, 8), 0, true).unwrap();
    for name in ["map", "data.0"] {
        let clone = host.clone_closed(&host.id);
        std::fs::remove_file(host.path(&clone).join(name)).unwrap();
        assert_eq!(host.volumes.record(&clone).unwrap_err().kind(), VolumeErrorKind::NotFound);
        let opened = host.volumes.open_volume(&clone, &host.image.store, &host.image.cache);
        assert_eq!(opened.unwrap_err().kind(), VolumeErrorKind::NotFound);
        assert!(!host.volumes.bases().unwrap().iter().any(|(id, _)| *id == clone));
        host.volumes.remove(&clone).unwrap();
    }
}

#[test]
fn clones_of_an_encrypted_volume_read_it_and_share_no_key() {
    let host = Host::new(Some(StoreKey::from_bytes([1; 32])));
    let volume = host.open(&host.id);
    volume.write_at(&tagged(5, 80), 8192, true).unwrap();
    let expected = read_all(&volume);
    let clone = VolumeId::random();
    volume.clone_as(&clone).unwrap().unwrap();
    drop(volume);
    let of_clone = host.clone_closed(&clone);
    let sibling = host.clone_closed(&host.id);
    // All write the same to the same place.
    let mut seen = Vec::new();
    for id in [&host.id, &clone, &of_clone, &sibling] {
        let volume = host.open(id);
        assert!(read_all(&volume) == expected, "{id}");
        volume.write_at(&tagged(9, 8), 4096, true).unwrap();
        assert!(read_all(&volume)[4096..8192] == tagged(9, 8));
        assert!(read_all(&volume)[8192..] == expected[8192..]);
        let layer = host.volumes.record(id).unwrap().layers[0];
        let data = std::fs::read(host.path(id).join(format!("layer.{layer}/data.0"))).unwrap();
        seen.push(data[4096..4112].to_vec());
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 4, "the same plain text gives the same encrypted one");
    let salt = |id: &VolumeId| std::fs::read(host.path(id).join("cipher")).unwrap();
    assert_eq!(salt(&host.id), salt(&of_clone));
}

#[test]
fn a_clone_under_writers_is_of_one_moment() {
    let host = Host::new(None);
    let volume = host.open(&host.id);
    let counter = |volume: &Volume, block: u64| {
        let mut bytes = [0; 8];
        volume.read_at(&mut bytes, block * 4096).unwrap();
        u64::from_le_bytes(bytes)
    };
    volume.write_zeroes(0, 96 * 4096, true).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for count in 1_u64.. {
                for block in [3, 77] {
                    volume.write_at(&tagged(count, 8), block * 4096, false).unwrap();
                }
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
            }
        });
        let mut last = 0;
        for round in 0..60 {
            let clone = VolumeId::random();
            if volume.clone_as(&clone).unwrap().is_none() {
                volume.snapshot(&nobody()).unwrap();
                continue;
            }
            let opened = host.open(&clone);
            let (first, second) = (counter(&opened, 3), counter(&opened, 77));
            assert!(first == second || first == second + 1, "round {round}: {first} and {second}");
            assert!(second >= last, "round {round}: went back");
            last = second;
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// Files that may not have a second name: the clone is not there, and what was begun is gone.
#[test]
fn a_clone_that_fails_leaves_nothing() {
    let host = Host::new(None);
    host.open(&host.id).write_at(&tagged(5, 8), 0, true).unwrap();
    let taken = host.path(&host.id);
    assert!(host.volumes.clone_volume(&host.id, &host.id).is_err(), "it is there already");
    assert!(Path::new(&taken).join("volume.json").exists());
    // A name that is a directory cannot be linked.
    std::fs::create_dir(taken.join("data.1")).unwrap();
    let clone = VolumeId::random();
    assert_eq!(host.volumes.clone_volume(&host.id, &clone).unwrap(), None);
    assert!(!host.path(&clone).exists());
    let directory = HostDirectory::new(&taken);
    assert_eq!(directory.links("data.0").unwrap(), Some(1));
}
