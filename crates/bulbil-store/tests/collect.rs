//! Garbage collection through the public interface: what goes, what stays and why.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic and makes small numbers")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bulbil_store::{
    AttachmentKind, Digest, DiskSource, GcOptions, GcReport, Objects, PackFate, SourceError, Store, StoreError,
    StoreErrorKind, StoreOptions,
};
use bulbil_testkit::{FaultRates, FaultyObjects, ManualClock, MemoryDisk, MemoryObjects, Rng};
use bulbil_types::BLOCK_LEN;

struct Fixture {
    objects: MemoryObjects,
    clock: Arc<ManualClock>,
    state: tempfile::TempDir,
    opened: AtomicU64,
}

impl Fixture {
    fn new() -> Self {
        let (objects, state) = (MemoryObjects::default(), tempfile::tempdir().unwrap());
        Self { objects, clock: Arc::default(), state, opened: AtomicU64::new(0) }
    }

    /// Another host, with a state of its own.
    fn store(&self) -> Store {
        self.store_of(Arc::new(self.objects.clone()))
    }

    fn store_of(&self, objects: Arc<dyn Objects>) -> Store {
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let owner = "0000000000000001".parse().unwrap();
        let options = StoreOptions {
            state_directory: self.state.path().join(number.to_string()),
            owner,
            ..StoreOptions::default()
        };
        let clock: Arc<ManualClock> = Arc::clone(&self.clock);
        Store::open(objects, options).unwrap().with_clock(clock)
    }

    fn packs(&self) -> usize {
        self.objects.names().iter().filter(|name| name.ends_with(".pack")).count()
    }

    fn count(&self, directory: &str) -> usize {
        self.objects.names().iter().filter(|name| name.starts_with(directory)).count()
    }
}

/// Objects that do something else before the first put of an object whose name begins so.
struct Interrupted {
    inner: MemoryObjects,
    prefix: &'static str,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl Objects for Interrupted {
    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        if name.starts_with(self.prefix) {
            let meanwhile = self.meanwhile.lock().unwrap().take();
            meanwhile.into_iter().for_each(|meanwhile| meanwhile());
        }
        self.inner.put_if_absent(name, bytes)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.put(name, bytes)
    }

    fn get_range(&self, name: &str, offset: u64, len_bytes: usize) -> Result<Vec<u8>, StoreError> {
        self.inner.get_range(name, offset, len_bytes)
    }

    fn get(&self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.inner.get(name, limit_bytes)
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        self.inner.list(directory)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.inner.delete(name)
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// A store in which `meanwhile` happens before the first manifest is put.
fn interrupted(fixture: &Fixture, meanwhile: impl FnOnce() + Send + 'static) -> Store {
    let meanwhile: Box<dyn FnOnce() + Send> = Box::new(meanwhile);
    let inner = fixture.objects.clone();
    fixture.store_of(Arc::new(Interrupted { inner, prefix: "manifests/", meanwhile: Mutex::new(Some(meanwhile)) }))
}

/// Reads the first block of every extent of everything that is visible.
fn check_visible(store: &Store) {
    for digest in store.digests().unwrap() {
        let manifest = store.manifest(&digest).unwrap();
        for extent in manifest.extents() {
            store.read_frame(&manifest.packs()[extent.pack as usize], extent.block_in_pack / 32).unwrap();
        }
    }
}

#[test]
fn a_writer_that_sleeps_before_its_last_put_and_is_taken_for_dead_publishes_nothing() {
    let fixture = Fixture::new();
    let gone = import(&fixture.store(), &disk(90));
    let (other, clock) = (fixture.store(), Arc::clone(&fixture.clock));
    let late = interrupted(&fixture, move || {
        clock.advance_ms(11 * 60_000);
        other.remove_manifest(&gone).unwrap();
        assert!(other.sweep().unwrap() > 0);
    });
    let part = MemoryDisk(disk(90).0[..50 * BLOCK_LEN].to_vec());
    assert_eq!(late.import(&part, &part).unwrap_err().kind(), StoreErrorKind::Timeout);
    assert!(fixture.store().digests().unwrap().is_empty());
    let again = import(&fixture.store(), &part);
    assert_eq!(fixture.store().digests().unwrap(), [again]);
    check_visible(&fixture.store());
}

#[test]
fn a_repack_carries_no_reference_to_a_condemned_pack_over() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (first, second) = (disk(91), disk(92));
    let (first_digest, second_digest) = (import(&store, &first), import(&store, &second));
    // Most of the first pack and a little of the second one.
    let both = MemoryDisk([&first.0[..200 * BLOCK_LEN], &second.0[..20 * BLOCK_LEN]].concat());
    let other = fixture.store();
    let writer = interrupted(&fixture, move || {
        // The pack of the first is condemned although the import that is under way refers to it.
        other.remove_manifest(&first_digest).unwrap();
        assert_eq!(fates(&collect(&other, NO_GRACE)), [&PackFate::Condemned]);
    });
    let kept = import(&writer, &both);
    store.remove_manifest(&second_digest).unwrap();
    let other = fixture.store();
    let repacker = interrupted(&fixture, move || {
        other.remove_manifest(&kept).unwrap();
        other.sweep().unwrap();
    });
    let options = GcOptions { grace: NO_GRACE, dry_run: false, repack_below_percent: 50 };
    assert_eq!(repacker.collect(&options).unwrap().repack.unwrap().postponed_manifests, 1);
    check_visible(&store);
    let report = store.collect(&options).unwrap().repack.unwrap();
    assert_eq!(report.rewritten_manifests, 1, "the next one does it");
    store.sweep().unwrap();
    check_visible(&store);
    assert_eq!(store.digests().unwrap(), [kept]);
}

fn disk(seed: u64) -> MemoryDisk {
    MemoryDisk(Rng::new(seed).bytes(1 << 20))
}

fn import(store: &Store, disk: &MemoryDisk) -> Digest {
    store.import(disk, disk).unwrap().digest
}

fn collect(store: &Store, grace: Duration) -> GcReport {
    store.collect(&GcOptions { grace, dry_run: false, repack_below_percent: 0 }).unwrap()
}

fn fates(report: &GcReport) -> Vec<&PackFate> {
    report.packs.iter().map(|pack| &pack.fate).collect()
}

const NO_GRACE: Duration = Duration::ZERO;

#[test]
fn what_nobody_needs_is_condemned_first_and_goes_after_the_grace_time() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (kept, gone) = (import(&store, &disk(1)), import(&store, &disk(2)));
    store.remove_manifest(&gone).unwrap();
    let grace = Duration::from_secs(60);
    assert_eq!(fates(&collect(&store, grace)), [&PackFate::Condemned]);
    assert!(matches!(fates(&collect(&store, grace))[..], [PackFate::Grace { .. }]));
    fixture.clock.advance_ms(60_000);
    let dry = store.collect(&GcOptions { grace, dry_run: true, repack_below_percent: 50 }).unwrap();
    assert_eq!(fates(&dry), [&PackFate::Deleted], "it says what it would do");
    assert_eq!((dry.deleted_packs, fixture.packs()), (0, 2), "and does nothing");
    let report = collect(&store, grace);
    assert_eq!((report.deleted_packs, fixture.packs()), (1, 1));
    assert!(report.freed_bytes > 1 << 20);
    store.manifest(&kept).unwrap();
    assert!(fates(&collect(&store, grace)).is_empty());
}

/// A disk that tells when it is read, and waits to be allowed.
struct SlowDisk {
    disk: MemoryDisk,
    reading: Mutex<mpsc::Sender<()>>,
    allowed: Mutex<mpsc::Receiver<()>>,
}

impl DiskSource for SlowDisk {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn next_data(&self, offset: u64) -> Result<Option<std::ops::Range<u64>>, SourceError> {
        self.disk.next_data(offset)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.reading.lock().unwrap().send(()).unwrap();
        self.allowed.lock().unwrap().recv().unwrap();
        self.disk.read_exact_at(buf, offset)
    }
}

/// Runs `meanwhile` while an import of a disk of one scan is under way.
fn import_with(store: &Store, disk: MemoryDisk, meanwhile: impl FnOnce()) -> Result<Digest, StoreErrorKind> {
    let ((reading, is_reading), (allow, allowed)) = (mpsc::channel(), mpsc::channel());
    let slow = SlowDisk { disk, reading: Mutex::new(reading), allowed: Mutex::new(allowed) };
    std::thread::scope(|scope| {
        let import = scope.spawn(|| store.import(&slow, &MemoryDisk(Vec::new())));
        is_reading.recv().unwrap();
        meanwhile();
        allow.send(()).unwrap();
        import.join().unwrap().map(|report| report.digest).map_err(|e| e.kind())
    })
}

#[test]
fn a_collection_runs_beside_an_import_and_takes_nothing_that_it_may_refer_to() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let shared = disk(3);
    let gone = import(&store, &shared);
    let mut longer = shared.0.clone();
    longer.truncate(200 * BLOCK_LEN);
    let imported = import_with(&store, MemoryDisk(longer.clone()), || {
        let other = fixture.store();
        other.remove_manifest(&gone).unwrap();
        for _ in 0..3 {
            let report = collect(&other, NO_GRACE);
            assert_eq!(report.deleted_packs, 0);
            assert_eq!(report.leases.len(), 1);
        }
        let dry = other.collect(&GcOptions { grace: NO_GRACE, dry_run: true, repack_below_percent: 0 }).unwrap();
        assert!(matches!(&fates(&dry)[..], [PackFate::Leased { purpose, .. }] if purpose == "import"), "{dry:?}");
    });
    imported.unwrap();
    assert_eq!(fixture.packs(), 1, "the blocks were not stored again");
    assert_eq!(fixture.count("leases/") + fixture.count("ends/"), 0);
    assert_eq!(store.sweep().unwrap(), 0);
}

#[test]
fn what_was_condemned_before_an_import_began_goes_while_it_runs_and_is_not_matched() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let gone = import(&store, &disk(4));
    store.remove_manifest(&gone).unwrap();
    collect(&store, NO_GRACE);
    let again = import_with(&store, disk(4), || {
        assert_eq!(collect(&fixture.store(), NO_GRACE).deleted_packs, 1);
    });
    assert_eq!(again.unwrap(), gone);
    let manifest = store.manifest(&gone).unwrap();
    manifest.packs().iter().for_each(|pack| drop(store.read_frame(pack, 0).unwrap()));
}

#[test]
fn an_import_that_was_taken_for_dead_publishes_nothing() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let shared = disk(5);
    let gone = import(&store, &shared);
    let late = import_with(&store, MemoryDisk(shared.0[..100 * BLOCK_LEN].to_vec()), || {
        fixture.clock.advance_ms(11 * 60_000);
        let other = fixture.store();
        other.remove_manifest(&gone).unwrap();
        assert!(other.sweep().unwrap() > 0, "nobody waits for the dead");
    });
    assert_eq!(late, Err(StoreErrorKind::Timeout));
    assert!(store.digests().unwrap().is_empty());
    assert_eq!(fixture.packs(), 0);
}

#[test]
fn a_killed_import_leaves_what_a_later_collection_frees() {
    let fixture = Fixture::new();
    drop(fixture.store());
    for kill_at in 2..20 {
        let faulty =
            FaultyObjects::new(Arc::new(fixture.objects.clone()), kill_at, FaultRates::default(), Some(kill_at));
        let source = disk(6 + kill_at);
        drop(fixture.store_of(Arc::new(faulty)).import(&source, &source));
    }
    let store = fixture.store();
    let visible = store.digests().unwrap();
    fixture.clock.advance_ms(11 * 60_000);
    store.sweep().unwrap();
    assert_eq!(fixture.packs(), visible.len());
    assert_eq!(store.digests().unwrap(), visible);
}

#[test]
fn mostly_unused_packs_are_rewritten_and_read_the_same() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let whole = disk(40);
    let part = MemoryDisk(whole.0[32 * BLOCK_LEN..60 * BLOCK_LEN].to_vec());
    let gone = import(&store, &whole);
    let kept = import(&store, &part);
    assert_eq!(fixture.packs(), 1);
    store.remove_manifest(&gone).unwrap();
    let options = GcOptions { grace: NO_GRACE, dry_run: false, repack_below_percent: 50 };
    let dry = store.collect(&GcOptions { dry_run: true, ..options.clone() }).unwrap().repack.unwrap();
    assert_eq!((dry.packs[0].live_blocks, dry.packs[0].blocks), (28, 256));
    assert!(dry.gain_bytes() > 800 << 10);
    let before = store.usage().unwrap();
    let report = store.collect(&options).unwrap().repack.unwrap();
    assert_eq!((report.new_packs, report.rewritten_manifests), (1, 1));
    store.sweep().unwrap();
    let after = store.usage().unwrap();
    assert!(after.packs == 1 && after.manifests == 1 && after.pack_bytes < before.pack_bytes / 5, "{after:?}");
    let manifest = store.manifest(&kept).unwrap();
    let frame = store.read_frame(&manifest.packs()[0], 0).unwrap();
    assert!(frame == part.0);
    assert!(store.collect(&options).unwrap().repack.unwrap().packs.is_empty());
}

#[test]
fn a_manifest_that_cannot_be_read_stops_every_deletion_and_is_named() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (kept, gone) = (import(&store, &disk(50)), import(&store, &disk(51)));
    store.remove_manifest(&gone).unwrap();
    collect(&store, NO_GRACE);
    let names = fixture.objects.names();
    let name = names.iter().find(|name| name.starts_with("manifests/") && name.contains(&kept.to_hex())).unwrap();
    fixture.objects.flip(name, 100, 1);
    let error = store.sweep().unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    assert!(std::error::Error::source(&error).unwrap().to_string().contains(name), "{error:?}");
    assert_eq!(fixture.packs(), 2);
}

#[test]
fn a_damaged_list_stops_writers_until_the_next_collection_makes_a_new_one() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let gone = import(&store, &disk(60));
    store.remove_manifest(&gone).unwrap();
    collect(&store, NO_GRACE);
    let names = fixture.objects.names();
    let list = names.iter().find(|name| name.starts_with("gc/")).unwrap();
    fixture.objects.flip(list, 30, 1);
    let source = disk(61);
    assert_eq!(store.import(&source, &source).unwrap_err().kind(), StoreErrorKind::Corrupt);
    assert_eq!(collect(&store, NO_GRACE).deleted_packs, 0, "condemned anew");
    import(&store, &source);
    assert_eq!(collect(&store, NO_GRACE).deleted_packs, 1);
}

#[test]
fn attachments_go_with_their_content() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let (kept, gone) = (import(&store, &disk(70)), import(&store, &disk(71)));
    for digest in [&kept, &gone] {
        store.put_attachment(digest, AttachmentKind::BootTrace, b"order").unwrap();
    }
    store.remove_manifest(&gone).unwrap();
    assert_eq!(collect(&store, NO_GRACE).deleted_attachments, 2, "the boot trace and the leaves");
    store.attachment(&kept, AttachmentKind::BootTrace).unwrap();
    assert_eq!(store.attachment(&gone, AttachmentKind::BootTrace).unwrap_err().kind(), StoreErrorKind::NotFound);
}

#[test]
fn statistics_tell_what_each_content_alone_costs() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let first = disk(80);
    let mut bytes = first.0[..128 * BLOCK_LEN].to_vec();
    bytes.extend(Rng::new(81).bytes(64 * BLOCK_LEN));
    bytes.resize(8 << 20, 0);
    let (first_digest, second_digest) = (import(&store, &first), import(&store, &MemoryDisk(bytes)));
    let stats = store.stats().unwrap();
    let blocks = |count: u64| count * BLOCK_LEN as u64;
    assert_eq!((stats.logical_bytes, stats.data_bytes), (9 << 20, blocks(256 + 192)));
    assert_eq!((stats.unique_bytes, stats.dead_bytes), (blocks(256 + 64), 0));
    let usage = store.usage().unwrap();
    assert_eq!(stats.stored_bytes, usage.pack_bytes + usage.manifest_bytes + stats.attachment_bytes);
    let of = |digest| stats.contents.iter().find(|content| content.digest == digest).unwrap();
    let (first, second) = (of(first_digest), of(second_digest));
    assert_eq!((first.shared_bytes, second.shared_bytes), (blocks(128), blocks(128)));
    let near = |bytes: u64, expected: u64| (expected..expected + 2000).contains(&bytes);
    assert!(near(first.alone_bytes, blocks(128)) && near(second.alone_bytes, blocks(64)), "{stats:?}");
    store.remove_manifest(&first_digest).unwrap();
    let after = store.stats().unwrap();
    assert!(near(after.dead_bytes, blocks(128)), "{after:?}");
    assert!(after.reduction() > 0.5 && after.deduplication() == 1.0);
}

#[test]
fn a_removal_that_is_carried_out_late_takes_nothing_that_was_imported_since() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let disk = disk(77);
    let digest = import(&store, &disk);
    let names =
        || fixture.objects.names().into_iter().filter(|name| name.starts_with("manifests/")).collect::<Vec<_>>();
    // The removal gets no answer, and its request stays under way.
    let under_way = names();
    assert!(store.import(&disk, &disk).unwrap().existed);
    fixture.objects.delete(&under_way[0]).unwrap();
    check_visible(&store);
    assert!(store.digests().unwrap() == [digest]);
    // One that was answered, and carried out twice, meets no name that is used again.
    let used: std::collections::BTreeSet<_> = (0..20)
        .map(|_| {
            let newest = names().into_iter().next_back().unwrap();
            store.remove_manifest(&digest).unwrap();
            import(&store, &disk);
            newest
        })
        .collect();
    assert_eq!(used.len(), 20);
}

#[test]
fn a_manifest_that_is_put_once_more_after_its_removal_hides_nothing_that_was_imported_since() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let disk = disk(78);
    for _ in 0..20 {
        let digest = import(&store, &disk);
        let names = fixture.objects.names();
        let name = names.iter().rfind(|name| name.starts_with("manifests/")).unwrap();
        let manifest = fixture.objects.get(name, 1 << 20).unwrap();
        store.remove_manifest(&digest).unwrap();
        store.sweep().unwrap();
        import(&store, &disk);
        // The request of the first import, carried out a second time.
        fixture.objects.put_if_absent(name, &manifest).unwrap();
        check_visible(&store);
        store.remove_manifest(&digest).unwrap();
        assert_eq!(store.digests().unwrap(), []);
    }
}
