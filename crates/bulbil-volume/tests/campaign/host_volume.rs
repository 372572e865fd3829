//! A volume of a host, and what it must hold.

use std::collections::BTreeSet;

use bulbil_store::{Digest, Store};
use bulbil_testkit::{DiskOracle, Rng};
use bulbil_volume::{BlockDevice as _, Volume, VolumeRecord, open_for_store};
use std::sync::Arc;

use crate::disk::Disk;
use crate::host::Process;
use crate::world::{World, chain};

/// The size of a volume without an image, in blocks.
const EMPTY_BLOCKS: u64 = 24;

pub(crate) struct HostVolume {
    pub(crate) host: usize,
    pub(crate) disk: Disk,
    pub(crate) oracle: DiskOracle,
    /// Contents that its record may name.
    pub(crate) bases: BTreeSet<Digest>,
    /// A size that was asked for without an answer.
    pub(crate) asked_size: Option<u64>,
    /// The volume as the running process has it open.
    pub(crate) open: Option<Volume>,
    /// The process has failed at it in a way that only a restart ends.
    pub(crate) broken: bool,
    /// The boot of the machine in which the process ended that had it open last.
    ended_in: Option<String>,
}

impl HostVolume {
    /// Makes a volume; `None` when that failed.
    pub(crate) fn create(process: &Process<'_>, host: usize, base: Option<Digest>, rng: &mut Rng) -> Option<Self> {
        let manifest = match base {
            Some(digest) => Some(process.store.manifest(&digest).ok()?),
            None => None,
        };
        let mut content = match base {
            Some(digest) => process.world.content(&digest).to_vec(),
            None => vec![0; EMPTY_BLOCKS as usize * 4096],
        };
        content.resize(content.len() + rng.below(3) as usize * 4096, 0);
        let machine = process.world.machine.as_ref();
        let disk = Disk::create(machine, host, content.len() as u64, manifest.as_ref()).ok()?;
        Some(Self {
            host,
            disk,
            oracle: DiskOracle::new(&content),
            bases: base.into_iter().collect(),
            asked_size: None,
            open: None,
            broken: false,
            ended_in: None,
        })
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken || self.disk.is_dead() || self.disk.must_lose_power()
    }

    /// After a failed sync no later one may be believed, and so none acknowledged.
    pub(crate) fn check_poisoned(&self, world: &World, volume: &Volume) {
        if self.disk.must_lose_power() && volume.flush().is_ok() {
            world.fail("a flush is acknowledged after a sync has failed");
        }
    }

    /// The process that had it open is gone.
    pub(crate) fn crash(&mut self, loses_power: bool, rng: &mut Rng) {
        self.open = None;
        // One that was not opened since has waited from then on.
        self.ended_in.get_or_insert_with(|| self.disk.boot_id());
        self.disk.crash(loses_power, rng);
        self.broken = false;
    }

    pub(crate) fn end(&self, world: &World) {
        world.count_all("faults", self.disk.faults());
    }

    /// Opens it unless it is open; after a crash it is checked first. Whether it is open.
    pub(crate) fn open(&mut self, world: &World, store: &Arc<Store>, cache: &Arc<bulbil_volume::BaseCache>) -> bool {
        if self.open.is_some() {
            return true;
        }
        let files = open_for_store(self.disk.storage(false), store);
        let volume = files.and_then(|files| Volume::open_in(files, store, cache));
        world.tell(self.host, format_args!("opens a volume: {:?}", volume.as_ref().map(drop)));
        let Ok(volume) = volume else { return false };
        if self.ended_in.is_some() && !self.check_after_crash(world, &volume) {
            return false;
        }
        self.open = Some(volume);
        true
    }

    /// As [`open`](Self::open), where nothing may fail.
    pub(crate) fn open_now(&mut self, world: &World, store: &Arc<Store>, cache: &Arc<bulbil_volume::BaseCache>) {
        let files = open_for_store(self.disk.storage(true), store);
        let volume = files.and_then(|files| Volume::open_in(files, store, cache));
        let volume = volume.unwrap_or_else(|e| world.fail(&format!("a volume does not open: {}", chain(&e))));
        if !self.check_after_crash(world, &volume) {
            let mut content = vec![0; volume.size_bytes() as usize];
            let error = volume.read_at(&mut content, 0).unwrap_err();
            world.fail(&format!("a volume cannot be read: {}", chain(&error)));
        }
        self.open = Some(volume);
    }

    /// `false` when it cannot be read now.
    fn check_after_crash(&mut self, world: &World, volume: &Volume) -> bool {
        let mut content = vec![0; volume.size_bytes() as usize];
        if volume.read_at(&mut content, 0).is_err() {
            return false;
        }
        let before = self.oracle.newest().len();
        if self.asked_size.take() == Some(content.len() as u64) {
            self.oracle.grow((content.len() - before) as u64 / 4096);
        }
        if content.len() != self.oracle.newest().len() {
            world.fail(&format!("a volume has {} bytes after a crash, {before} before", content.len()));
        }
        let is_same_boot = self.ended_in.take().is_none_or(|boot| boot == self.disk.boot_id());
        if is_same_boot {
            self.oracle.check_after_kill(&content).unwrap_or_else(|e| world.fail(&format!("after a kill: {e}")));
            world.count("bytes checked: volumes after kills", content.len() as u64);
        } else {
            self.oracle.check_after_crash(&content).unwrap_or_else(|e| world.fail(&format!("after a crash: {e}")));
            world.count("bytes checked: volumes after losses of power", content.len() as u64);
        }
        let record = self.disk.storage(true).read("volume.json").unwrap_or(None);
        if let Some(record) = record.and_then(|bytes| serde_json::from_slice::<VolumeRecord>(&bytes).ok()) {
            if let Some(base) = record.base.filter(|base| !self.bases.contains(base)) {
                world.fail(&format!("a volume lies above {base}, which it was never put above"));
            }
            self.bases = record.base.into_iter().collect();
        }
        true
    }

    /// Checks what it serves while it runs, where it can be read.
    pub(crate) fn check_running(&self, world: &World) {
        let Some(volume) = &self.open else { return };
        let mut content = vec![0; volume.size_bytes() as usize];
        if volume.read_at(&mut content, 0).is_ok() {
            self.oracle.check_running(&content).unwrap_or_else(|e| world.fail(&format!("while it runs: {e}")));
            world.count("bytes checked: running volumes", content.len() as u64);
        }
    }
}
