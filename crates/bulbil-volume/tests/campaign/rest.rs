//! When everything has come to rest: all that is owed is there, and after collections nothing else is.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{FrameHealer, GcOptions, ImportOptions, Objects, ScrubOptions, SecondStore, Store};
use bulbil_testkit::{MemoryDisk, Rng, StoredContent};
use bulbil_volume::BaseCache;

use crate::backing::Which;
use crate::host::Host;
use crate::world::World;

type Open = (Host, Arc<Store>, Store);

pub(crate) fn check(world: &World, hosts: Vec<Host>) {
    for which in [Which::First, Which::Second] {
        world.backing(which).settle();
    }
    world.clock.advance_ms(3_600_000);
    let mut hosts: Vec<Open> = hosts
        .into_iter()
        .map(|host| {
            let directory = world.directory.join(format!("rest-{}", host.actor));
            let open = |which| world.open_now(which, host.owner, &directory, "at rest");
            let (first, second) = (open(Which::First), open(Which::Second));
            (host, Arc::new(first), second)
        })
        .collect();
    check_volumes(world, &mut hosts);
    check_owed(world, &hosts, "at rest");
    for (host, first, second) in &hosts {
        give_up_unnamed(world, first, &host.named());
        give_up_unnamed(world, second, &host.copies);
    }
    let stores: [Vec<&Store>; 2] =
        [hosts.iter().map(|(_, first, _)| &**first).collect(), hosts.iter().map(|(_, _, second)| second).collect()];
    for (which, stores) in [Which::First, Which::Second].into_iter().zip(&stores) {
        check_no_garbage(world, which, stores);
    }
    check_owed(world, &hosts, "after a repack and a sweep");
    let mut rng = Rng::new(world.seed ^ 0xb17);
    if rng.one_in(4) {
        check_healing(world, &hosts, &mut rng);
    }
    for (_, first, _) in &hosts[..1] {
        for disk in &world.disks {
            let source = MemoryDisk(disk.to_vec());
            let report = world.must(first.import(&source, &source), "imported at rest");
            world.check_content(first, &report.digest, "imported at rest");
        }
    }
    hosts.iter().flat_map(|(host, ..)| &host.volumes).for_each(|volume| volume.end(world));
}

fn check_volumes(world: &World, hosts: &mut [Open]) {
    for (host, first, _) in hosts {
        let cache = cache_of(&world.directory.join(format!("rest-{}", host.actor)));
        for volume in &mut host.volumes {
            volume.open_now(world, first, &cache);
            volume.open = None;
        }
    }
}

fn cache_of(directory: &Path) -> Arc<BaseCache> {
    Arc::new(BaseCache::open(&directory.join("cache")).unwrap())
}

fn check_owed(world: &World, hosts: &[Open], what: &str) {
    for (host, first, second) in hosts {
        for digest in host.named() {
            // What a snapshot was to become and was not is in no store.
            if host.owed.contains(&digest) || host.volumes.iter().any(|volume| volume.bases.contains(&digest)) {
                world.check_content(first, &digest, what);
            }
        }
        for digest in &host.copies {
            world.check_content(second, digest, what);
        }
    }
}

/// As the control plane does with what no image and no volume names.
fn give_up_unnamed(world: &World, store: &Store, named: &BTreeSet<bulbil_store::Digest>) {
    let digests = world.must(store.digests(), "contents at rest");
    for digest in digests.iter().filter(|digest| !named.contains(digest)) {
        world.must(store.remove_manifest(digest), "removal at rest");
    }
}

fn check_no_garbage(world: &World, which: Which, stores: &[&Store]) {
    let what = format!("at rest, {which:?}");
    let store = stores[0];
    let options = GcOptions { grace: Duration::ZERO, repack_below_percent: 100, ..GcOptions::default() };
    world.must(store.collect(&options), &what);
    world.must(store.sweep(), &what);
    let report = world.must(store.scrub(&ScrubOptions::default(), &()), &what);
    let sound = report.damaged_packs.is_empty() && report.damaged_manifests.is_empty();
    if !sound {
        world.fail(&format!("damage in the {which:?} store: {report:?}"));
    }
    let objects = world.backing(which).without_faults();
    let mut used = BTreeSet::new();
    for store in stores {
        for digest in world.must(store.digests(), &what) {
            world.check_content(store, &digest, "everything that is listed");
            let manifest = world.must(store.manifest(&digest), &what);
            used.extend(manifest.packs().iter().map(|pack| pack.id.to_string()));
        }
    }
    let list = |directory: &str| world.must(objects.list(directory), &what);
    let packs = list("packs");
    let packs: BTreeSet<_> =
        packs.iter().filter_map(|(name, _)| name.strip_suffix(".pack")?.rsplit('/').next()).collect();
    if packs != used.iter().map(String::as_str).collect() {
        world.fail(&format!("garbage stays in the {which:?} store: {packs:?}, used are {used:?}"));
    }
    let leases = list("leases");
    if !leases.is_empty() || list("gc").len() > 1 {
        world.fail(&format!("leases or old lists stay in the {which:?} store: {leases:?}, {:?}", list("gc")));
    }
}

/// Bytes of packs change; with everything in the second store a scrub puts all of them right.
fn check_healing(world: &World, hosts: &[Open], rng: &mut Rng) {
    for (host, first, second) in hosts {
        for digest in host.named() {
            let options = ImportOptions { expected_digest: Some(digest), ..ImportOptions::default() };
            let source = world.must(StoredContent::open(first, &digest), "copied at rest");
            let copied = second.import_with_options(&source, &MemoryDisk(Vec::new()), &options);
            world.must(copied, "copied at rest");
        }
    }
    let objects: Arc<dyn Objects> = world.backing(Which::First).without_faults();
    let packs = objects.list("packs").unwrap();
    for _ in 0..3.min(packs.len()) {
        let (name, _) = &packs[rng.below(packs.len() as u64) as usize];
        world.backing(Which::First).rot(name, rng);
        world.count("bytes rotted", 1);
    }
    let directory = world.directory.join("healing");
    let first = world.open_now(Which::First, hosts[0].0.owner, &directory, "after damage");
    let second = SecondStore::new(&hosts[0].2);
    let healers: [&dyn FrameHealer; 1] = [&second];
    let scrub = ScrubOptions { heal: true, healers: &healers, ..ScrubOptions::default() };
    let report = world.must(first.scrub(&scrub, &()), "healing");
    if !report.is_sound() {
        world.fail(&format!("not everything is healed: {report:?}"));
    }
    for (host, ..) in hosts {
        let store = world.open_now(Which::First, host.owner, &directory, "after healing");
        for digest in host.named() {
            world.check_content(&store, &digest, "after healing");
        }
    }
}
