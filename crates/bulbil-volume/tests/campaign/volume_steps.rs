//! What hosts do with their volumes.

use std::sync::Arc;

use bulbil_store::{Digest, Store};
use bulbil_testkit::{MemoryDisk, Rng, tagged};
use bulbil_volume::{BlockDevice as _, BlockError, BlockErrorKind, Volume, VolumeErrorKind};

use crate::host::{Host, Process};
use crate::host_volume::HostVolume;
use crate::world::World;

impl Host {
    /// Opens a volume if it is not, and does a few things with it.
    pub(crate) fn use_volume(&mut self, process: &Process<'_>) -> &'static str {
        if self.volumes.is_empty() {
            return "no volume";
        }
        let number = self.rng.below(self.volumes.len() as u64) as usize;
        if !self.volumes[number].open(process.world, &process.store, &process.cache) {
            return "volume does not open";
        }
        let step = match self.rng.below(10) {
            0..6 => {
                self.requests(process.world, number);
                "requests"
            }
            6..8 => {
                self.snapshot(process, number);
                "snapshot"
            }
            8 => {
                if let Some(digest) = self.snapshot(process, number).filter(|_| self.volumes.len() < 3) {
                    self.make_volume(process, Some(digest));
                }
                "clone"
            }
            _ => {
                self.grow(process, number);
                "resize"
            }
        };
        // One whose last request failed, and cannot be read, is looked at after the restart.
        if !self.volumes[number].is_broken() && self.rng.one_in(3) {
            self.volumes[number].check_running(process.world);
        }
        step
    }

    fn requests(&mut self, world: &World, number: usize) {
        let volume = &mut self.volumes[number];
        world.tell(self.actor, format_args!("requests to volume {number}"));
        for _ in 0..1 + self.rng.below(12) {
            self.next_tag += 1;
            volume.request(world, &mut self.rng, self.next_tag);
            if volume.is_broken() {
                return;
            }
        }
    }

    fn grow(&mut self, process: &Process<'_>, number: usize) {
        let blocks = 1 + self.rng.below(6);
        let volume = &mut self.volumes[number];
        let Some(open) = &volume.open else { return };
        let size_bytes = open.size_bytes() + blocks * 4096;
        if size_bytes > 1 << 20 {
            return;
        }
        volume.asked_size = Some(size_bytes);
        let grown = open.grow(size_bytes);
        process.world.tell(self.actor, format_args!("volume {number} to {size_bytes} bytes: {grown:?}"));
        match grown {
            Ok(()) => {
                volume.asked_size = None;
                volume.oracle.grow(blocks);
            }
            Err(error) => volume.broken = error.kind() != VolumeErrorKind::NoSpace,
        }
        if !volume.broken && volume.open.as_ref().is_some_and(|open| open.size_bytes() < size_bytes) {
            volume.asked_size = None;
        }
    }

    /// Takes a snapshot, at once or with requests between its parts; its content, when that is acknowledged.
    fn snapshot(&mut self, process: &Process<'_>, number: usize) -> Option<Digest> {
        let volume = &mut self.volumes[number];
        let open = volume.open.take()?;
        let taken = if self.rng.one_in(2) {
            volume.snapshot_at_once(process, &open)
        } else {
            volume.snapshot_in_parts(process, &open, &mut self.rng, &mut self.next_tag)
        };
        volume.open = Some(open);
        process.world.tell(self.actor, format_args!("snapshot of volume {number}: {taken:?}"));
        match taken {
            Some(digest) => drop(self.owed.insert(digest)),
            // A store that fails is no reason to give the volume up.
            None => volume.broken |= volume.is_poisoned(),
        }
        taken
    }
}

impl HostVolume {
    /// Whether it answers no flush any more, and never will.
    fn is_poisoned(&mut self) -> bool {
        let Some(volume) = self.open.as_ref().filter(|_| !self.is_broken()) else { return true };
        match volume.flush() {
            Ok(()) => {
                self.oracle.flushed();
                false
            }
            Err(error) => error.kind() != BlockErrorKind::NoSpace,
        }
    }

    fn snapshot_at_once(&mut self, process: &Process<'_>, open: &Volume) -> Option<Digest> {
        let expected = process.world.register(&Arc::new(self.oracle.newest()));
        self.bases.insert(expected);
        let report = open.snapshot(&MemoryDisk(Vec::new())).ok()?;
        assert_eq!(report.digest, expected, "seed {}: a snapshot", process.world.seed);
        self.oracle.flushed();
        self.bases = [expected].into();
        Some(expected)
    }

    fn snapshot_in_parts(
        &mut self,
        process: &Process<'_>,
        open: &Volume,
        rng: &mut Rng,
        next_tag: &mut u64,
    ) -> Option<Digest> {
        let (world, store): (_, &Store) = (process.world, &process.store);
        let expected = world.register(&Arc::new(self.oracle.newest()));
        let frozen = open.freeze().ok()?;
        self.oracle.flushed();
        for _ in 0..rng.below(5) {
            *next_tag += 1;
            self.request_to(world, open, rng, *next_tag);
            if self.is_broken() {
                break;
            }
        }
        self.bases.insert(expected);
        let base = frozen.base();
        let report = store.import_changes(base.as_ref(), frozen.size_bytes(), &frozen, &MemoryDisk(Vec::new()));
        let manifest = report.and_then(|report| {
            assert_eq!(report.digest, expected, "seed {}: a frozen content", world.seed);
            store.manifest(&report.digest)
        });
        open.rebase(frozen, manifest.ok()?).ok()?;
        self.bases = [expected].into();
        Some(expected)
    }

    fn request(&mut self, world: &World, rng: &mut Rng, tag: u64) {
        if let Some(open) = self.open.take() {
            self.request_to(world, &open, rng, tag);
            self.open = Some(open);
        }
    }

    /// One random request; the oracle hears of it first.
    fn request_to(&mut self, world: &World, volume: &Volume, rng: &mut Rng, tag: u64) {
        let sectors_in_all = volume.size_bytes() / 512;
        let first = rng.below(sectors_in_all);
        let whole_blocks = rng.one_in(2);
        let first = if whole_blocks { first / 8 * 8 } else { first };
        let longest = if rng.one_in(4) { 80 } else { 12 };
        let sectors = (1 + rng.below(longest)).min(sectors_in_all - first);
        let sectors = if whole_blocks { sectors.next_multiple_of(8) } else { sectors };
        let (offset, len_bytes) = (first * 512, sectors * 512);
        let fua = rng.one_in(8);
        let (kind, done) = match rng.below(10) {
            0..=5 => {
                self.oracle.write(first, sectors, tag);
                ("write", volume.write_at(&tagged(tag, sectors as usize), offset, fua))
            }
            6 => {
                self.oracle.write(first, sectors, 0);
                ("write zeroes", volume.write_zeroes(offset, len_bytes, fua))
            }
            7 => {
                // A discard takes whole blocks only.
                let (from, to) = (first.next_multiple_of(8), (first + sectors) / 8 * 8);
                if from < to {
                    self.oracle.write(from, to - from, 0);
                }
                ("discard", volume.discard(offset, len_bytes, fua))
            }
            _ => {
                world.count("requests: flush", 1);
                let flushed = volume.flush();
                world.tell(self.host, format_args!("flush: {flushed:?}"));
                return match flushed {
                    Ok(()) => self.oracle.flushed(),
                    Err(error) => {
                        self.check_poisoned(world, volume);
                        self.broken = error.kind() != BlockErrorKind::NoSpace;
                    }
                };
            }
        };
        world.count(&format!("requests: {kind}"), 1);
        world.tell(self.host, format_args!("{kind} {tag:x} at {first}+{sectors}, fua {fua}: {done:?}"));
        match done {
            // This volume makes everything durable with a FUA write.
            Ok(()) if fua => self.oracle.flushed(),
            Ok(()) => self.oracle.answered(),
            Err(error) => self.after_failed_write(world, volume, &error, first / 8, (first + sectors).div_ceil(8)),
        }
    }

    /// What a failed request has left is what its blocks hold from now on, if they can be read.
    fn after_failed_write(&mut self, world: &World, volume: &Volume, error: &BlockError, first: u64, end: u64) {
        world.count("requests: failed", 1);
        self.check_poisoned(world, volume);
        let mut content = vec![0; (end - first) as usize * 4096];
        if error.kind() == BlockErrorKind::Poisoned || volume.read_at(&mut content, first * 4096).is_err() {
            self.broken = true;
            return;
        }
        let left = self.oracle.write_failed(first, &content);
        left.unwrap_or_else(|e| world.fail(&format!("a failed write: {e}")));
    }
}
