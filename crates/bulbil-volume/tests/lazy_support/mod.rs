//! A host whose store is scripted.
#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_store::{Digest, Manifest, Store, StoreOptions};
use bulbil_testkit::{MemoryDisk, Request, Rng, ScriptedObjects};
use bulbil_types::VolumeId;
use bulbil_volume::{BaseCache, BlockDevice as _, Volume, VolumeDirectory};

pub(crate) const FRAME: usize = 128 << 10;

/// A directory with a store, a cache and volumes.
pub(crate) struct Host {
    pub(crate) path: PathBuf,
    pub(crate) objects: Arc<ScriptedObjects>,
    pub(crate) store: Arc<Store>,
    pub(crate) volumes: VolumeDirectory,
}

impl Host {
    pub(crate) fn open(path: &Path, remote: bool) -> Self {
        Self::with_objects(path, ScriptedObjects::open(&path.join("store"), remote))
    }

    pub(crate) fn with_objects(path: &Path, objects: Arc<ScriptedObjects>) -> Self {
        let store = open_store(path, &objects);
        let volumes = VolumeDirectory::open(&path.join("volumes")).unwrap();
        Self { path: path.to_owned(), objects, store, volumes }
    }

    /// Imports a disk; what the import has read is not counted.
    pub(crate) fn import(&mut self, content: &[u8]) -> Manifest {
        let disk = MemoryDisk(content.to_vec());
        let digest = self.store.import(&disk, &disk).unwrap().digest;
        // Opened anew: the import has left footers in memory.
        self.store = open_store(&self.path, &self.objects);
        self.objects.take_requests();
        self.store.manifest(&digest).unwrap()
    }

    pub(crate) fn cache(&self) -> Arc<BaseCache> {
        Arc::new(BaseCache::open(&self.path.join("cache")).unwrap())
    }

    pub(crate) fn forget_cache(&self) {
        drop(std::fs::remove_dir_all(self.path.join("cache")));
    }

    /// A new volume that somebody boots from.
    pub(crate) fn volume(&self, manifest: &Manifest, cache: &Arc<BaseCache>) -> Volume {
        let volume = self.quiet_volume(manifest, cache);
        volume.expect_boot();
        volume
    }

    /// A new volume that nobody boots from.
    pub(crate) fn quiet_volume(&self, manifest: &Manifest, cache: &Arc<BaseCache>) -> Volume {
        let id = VolumeId::random();
        self.volumes.create(&id, manifest.size_bytes(), Some(manifest)).unwrap();
        self.volumes.open_volume(&id, &self.store, cache).unwrap()
    }

    pub(crate) fn pack_bytes(&self, manifest: &Manifest) -> HashMap<String, u64> {
        let named = |pack: &bulbil_store::PackRef| {
            let id = pack.id.to_string();
            (format!("packs/{}/{id}.pack", &id[..2]), pack.len_bytes)
        };
        manifest.packs().iter().map(named).collect()
    }

    /// Those of the requests that read frames.
    pub(crate) fn frame_requests(&self, manifest: &Manifest, requests: Vec<Request>) -> Vec<Request> {
        let packs = self.pack_bytes(manifest);
        requests.into_iter().filter(|r| r.reads_frames(packs[&r.name])).collect()
    }
}

fn open_store(path: &Path, objects: &Arc<ScriptedObjects>) -> Arc<Store> {
    let options = StoreOptions { state_directory: path.join("state"), ..StoreOptions::default() };
    Arc::new(Store::open(Arc::clone(objects) as Arc<_>, options).unwrap())
}

pub(crate) fn open_manifest(host: &Host, digest: &Digest) -> Manifest {
    host.store.manifest(digest).unwrap()
}

/// Bytes that do not compress, without zero blocks.
pub(crate) fn noise(seed: u64, frames: usize) -> Vec<u8> {
    Rng::new(seed).bytes(frames * FRAME)
}

pub(crate) fn check_read(volume: &Volume, image: &[u8], offset: usize, len: usize) {
    let mut found = vec![0xee; len];
    volume.read_at(&mut found, offset as u64).unwrap();
    assert!(found == image[offset..offset + len], "{len} bytes at {offset:#x}");
}

/// Panics when two requests have read the same byte of an object.
pub(crate) fn check_disjoint(requests: &[Request]) {
    let mut ranges: Vec<_> = requests.iter().map(|r| (&r.name, r.offset, r.offset + r.len_bytes as u64)).collect();
    ranges.sort();
    for pair in ranges.windows(2) {
        let twice = pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2;
        assert!(!twice, "read twice: {:?} and {:?}", pair[0], pair[1]);
    }
}

/// Waits until something is so, and panics when it is not so in half a minute.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
