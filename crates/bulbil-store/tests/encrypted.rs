//! Encrypted stores through the public interface: what can be read with which key, and what without.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod support;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{
    AttachmentKind, Digest, DirObjects, GcOptions, KeySource, OwnerId, ScrubOptions, Store, StoreError, StoreErrorKind,
    StoreKey, StoreOptions, window_leaf, write_new_key_file,
};
use bulbil_testkit::MemoryDisk;
use bulbil_types::{BLOCK_LEN, FRAME_LEN};
use support::{files, noise, read_disk, text};

fn key(number: u8) -> StoreKey {
    StoreKey::from_bytes([number; 32])
}

fn options(directory: &Path) -> StoreOptions {
    StoreOptions::new(&directory.join("index"), OwnerId::default())
}

fn open_with(directory: &Path, options: StoreOptions) -> Result<Store, StoreError> {
    Store::open(Arc::new(DirObjects::open(directory).unwrap()), options)
}

/// Opens an encrypted store, or makes one.
fn open(directory: &Path, number: u8) -> Result<Store, StoreError> {
    open_with(directory, options(directory).with_key(key(number)).encrypt_new())
}

fn kind<T>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.err().expect("this fails").kind()
}

/// Text, which compresses, noise, which does not, and a hole.
fn sample() -> MemoryDisk {
    let mut bytes = text(0, 40);
    bytes.resize(1 << 20, 0);
    bytes.extend(noise(1, 50));
    MemoryDisk(bytes)
}

/// Blocks of the sample at other places, and some of its own.
fn related() -> MemoryDisk {
    MemoryDisk([noise(2, 3), text(7, 20), noise(3, 4), noise(1, 50)[5 * BLOCK_LEN..].to_vec()].concat())
}

fn import(store: &Store, disk: &MemoryDisk) -> Digest {
    store.import(disk, disk).unwrap().digest
}

#[test]
fn an_encrypted_store_gives_back_what_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1).unwrap();
    let digests = [sample(), related()].map(|disk| import(&store, &disk));
    for attachment in [&b""[..], b"which frames a boot reads first"] {
        store.put_attachment(&digests[0], AttachmentKind::BootTrace, attachment).unwrap();
        assert_eq!(store.attachment(&digests[0], AttachmentKind::BootTrace).unwrap(), attachment);
    }
    assert_eq!(kind(store.attachment(&digests[1], AttachmentKind::BootTrace)), StoreErrorKind::NotFound);
    drop(store);

    let store = open(dir.path(), 1).unwrap();
    assert!(store.is_encrypted());
    assert_eq!(store.digests().unwrap().into_iter().collect::<HashSet<_>>(), HashSet::from(digests));
    for (digest, disk) in digests.iter().zip([sample(), related()]) {
        assert!(read_disk(&store, digest) == disk.0);
        assert!(store.import(&disk, &disk).unwrap().existed);
    }
    store.remove_manifest(&digests[0]).unwrap();
    store.sweep().unwrap();
    assert!(read_disk(&store, &digests[1]) == related().0);
    assert_eq!(store.digests().unwrap(), [digests[1]]);
}

/// What must not be found in any stored byte: parts of the content, and hashes that would confirm it.
fn markers(store: &Store, disks: &[MemoryDisk]) -> Vec<Vec<u8>> {
    let mut markers = Vec::new();
    for disk in disks {
        for block in disk.0.chunks(BLOCK_LEN).filter(|block| block.iter().any(|byte| *byte != 0)) {
            markers.extend([block[..16].to_vec(), blake3::hash(block).as_bytes()[..16].to_vec()]);
        }
        markers.extend(disk.0.chunks(FRAME_LEN).map(|window| window_leaf(window)[..16].to_vec()));
        let digest = import(store, disk);
        markers.extend([digest.as_bytes()[..16].to_vec(), digest.to_hex().into_bytes()[..32].to_vec()]);
        let manifest = store.manifest(&digest).unwrap();
        for pack in manifest.packs() {
            for frame in (0..).map_while(|frame| store.read_frame(pack, frame).ok()) {
                markers.push(blake3::hash(&frame).as_bytes()[..16].to_vec());
            }
        }
    }
    markers
}

/// How many markers are in the content of a file, or its name.
fn found(directory: &Path, markers: &[Vec<u8>]) -> Vec<PathBuf> {
    let by_start: HashSet<&[u8]> = markers.iter().map(|marker| &marker[..16]).collect();
    let holds = |bytes: &[u8]| bytes.windows(16).any(|window| by_start.contains(window));
    let stored = files(directory).into_iter();
    stored
        .filter(|(name, bytes)| holds(bytes) || holds(name.to_str().unwrap().as_bytes()))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn no_stored_byte_of_an_encrypted_store_tells_of_the_content() {
    let fill = |directory: &Path, store: Store| {
        let disks = [sample(), related()];
        let markers = markers(&store, &disks);
        store.put_attachment(&import(&store, &disks[0]), AttachmentKind::Leaves, &disks[0].0[..4096]).unwrap();
        assert!(markers.len() > 200);
        found(directory, &markers)
    };
    let (plain, encrypted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let told = fill(plain.path(), Store::open_or_create(plain.path()).unwrap());
    let kinds = ["packs", "manifests", "attachments"];
    assert!(kinds.iter().all(|kind| told.iter().any(|file| file.starts_with(kind))), "a plain store tells: {told:?}");
    let told = fill(encrypted.path(), open(encrypted.path(), 1).unwrap());
    assert_eq!(told, Vec::<PathBuf>::new());
}

#[test]
fn an_encrypted_store_deduplicates_like_a_plain_one() {
    let (plain, encrypted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stores = [Store::open_or_create(plain.path()).unwrap(), open(encrypted.path(), 1).unwrap()];
    for disk in [sample(), related()] {
        let [plain, encrypted] = [&stores[0], &stores[1]].map(|store| store.import(&disk, &disk).unwrap());
        assert_eq!(
            (plain.digest, plain.data_bytes, plain.new_bytes),
            (encrypted.digest, encrypted.data_bytes, encrypted.new_bytes)
        );
        // A tag for each frame and footer; header, tag and hash for the manifest.
        let frames = plain.new_bytes.div_ceil(FRAME_LEN as u64);
        let expected = plain.stored_bytes + (frames + 1) * 16 + 96;
        // The names of packs are random, and do not always compress alike in the manifest.
        assert!(encrypted.stored_bytes.abs_diff(expected) <= 32, "{} and {expected}", encrypted.stored_bytes);
    }
}

#[test]
fn a_missing_or_wrong_key_and_a_key_too_many_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1).unwrap();
    let slot = store.key_slots().unwrap().remove(0).id;
    let missing = open_with(dir.path(), options(dir.path())).unwrap_err();
    assert_eq!(missing.kind(), StoreErrorKind::Key);
    assert!(
        missing.to_string().contains("--store-key") && missing.to_string().contains("BULBIL_STORE_KEY"),
        "{missing}"
    );
    let wrong = open(dir.path(), 2).unwrap_err();
    assert_eq!(wrong.kind(), StoreErrorKind::Key);
    assert!(wrong.to_string().contains(&slot), "{wrong}");

    let plain = tempfile::tempdir().unwrap();
    assert_eq!(
        kind(open_with(plain.path(), options(plain.path()).with_key(key(1)))),
        StoreErrorKind::Key,
        "no store yet"
    );
    assert_eq!(kind(open_with(plain.path(), options(plain.path()).encrypt_new())), StoreErrorKind::Key, "no key");
    let store = Store::open_or_create(plain.path()).unwrap();
    assert!(!store.is_encrypted());
    assert_eq!(kind(open(plain.path(), 1)), StoreErrorKind::Key, "it is not encrypted, whatever the user believes");
    assert_eq!(kind(store.rotate_key(&key(2))), StoreErrorKind::Key);
    assert_eq!(kind(store.add_data_key()), StoreErrorKind::Key);
    assert_eq!(store.key_slots().unwrap(), []);
}

#[test]
fn the_key_may_come_from_a_file_or_a_command() {
    let dir = tempfile::tempdir().unwrap();
    let (path, store) = (dir.path().join("key"), dir.path().join("store"));
    write_new_key_file(&path).unwrap();
    let from = |source: &str| options(&store).with_key(source.parse::<KeySource>().unwrap());
    let file = format!("file:{}", path.display());
    drop(open_with(&store, from(&file).encrypt_new()).unwrap());
    let opened = open_with(&store, from(&format!("command:cat {}", path.display()))).unwrap();
    assert_eq!(opened.key_slots().unwrap()[0].provider, "file");
    assert_eq!(kind(open_with(&store, from("command:false"))), StoreErrorKind::Key);
    let secret = std::fs::read_to_string(&path).unwrap();
    assert!(!format!("{opened:?}").contains(secret.trim()));
}

fn packs(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    files(&directory.join("packs"))
}

#[test]
fn a_key_is_replaced_without_writing_data_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1).unwrap();
    let digest = import(&store, &sample());
    let stored = packs(dir.path());
    store.rotate_key(&key(2)).unwrap();
    assert!(packs(dir.path()) == stored);
    assert_eq!(kind(open(dir.path(), 1)), StoreErrorKind::Key);
    assert!(read_disk(&open(dir.path(), 2).unwrap(), &digest) == sample().0);
    // Who has it open goes on, and may replace the key again.
    assert!(read_disk(&store, &digest) == sample().0);
    import(&store, &related());
    store.rotate_key(&key(3)).unwrap();
    assert_eq!(kind(open(dir.path(), 2)), StoreErrorKind::Key);
    assert_eq!(open(dir.path(), 3).unwrap().digests().unwrap().len(), 2);
    assert_eq!(files(&dir.path().join("keys")).len(), 1, "nothing is left that an old key opens");
}

#[test]
fn a_store_may_have_several_keys_and_never_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1).unwrap();
    let second = store.add_key(&key(2)).unwrap();
    let other = open(dir.path(), 2).unwrap();
    let slots = other.key_slots().unwrap();
    assert_eq!(slots.iter().map(|slot| slot.in_use).collect::<Vec<_>>(), [false, true]);
    assert_eq!(slots[1].id, second);
    other.remove_key(&slots[0].id).unwrap();
    assert_eq!(kind(open(dir.path(), 1)), StoreErrorKind::Key);
    assert_eq!(kind(other.remove_key(&slots[0].id)), StoreErrorKind::NotFound);
    assert_eq!(kind(other.remove_key(&second)), StoreErrorKind::Key, "the last one");
    for number in 0..15 {
        other.add_key(&key(100 + number)).unwrap();
    }
    assert_eq!(kind(other.add_key(&key(200))), StoreErrorKind::Key, "16 are the limit");
    drop(open(dir.path(), 114).unwrap());
}

/// Numbers of the data keys that packs say they are encrypted with.
fn data_keys_of_packs(directory: &Path) -> Vec<u16> {
    let mut numbers: Vec<_> = packs(directory).values().map(|p| u16::from_le_bytes([p[14], p[15]])).collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn packs_of_an_old_data_key_stay_readable() {
    let dir = tempfile::tempdir().unwrap();
    let (store, elsewhere) = (open(dir.path(), 1).unwrap(), open(dir.path(), 1).unwrap());
    let first = import(&store, &sample());
    assert_eq!(store.add_data_key().unwrap(), 2);
    let second = import(&store, &related());
    assert_eq!(data_keys_of_packs(dir.path()), [1, 2]);
    store.rotate_key(&key(2)).unwrap();
    // One that was open before the key was there, and one that was opened after.
    for store in [&elsewhere, &open(dir.path(), 2).unwrap()] {
        assert!(read_disk(store, &first) == sample().0);
        assert!(read_disk(store, &second) == related().0);
    }
    import(&elsewhere, &MemoryDisk(noise(9, 3)));
    assert_eq!(data_keys_of_packs(dir.path()), [1, 2, 2]);
    assert_eq!(elsewhere.add_data_key().unwrap(), 3);
}

#[test]
fn of_keys_replaced_at_the_same_time_one_counts_and_the_others_know() {
    let dir = tempfile::tempdir().unwrap();
    let digest = import(&open(dir.path(), 1).unwrap(), &sample());
    for round in 0..5_u8 {
        let old = if round == 0 { 1 } else { 10 * round + winner(dir.path(), round) };
        let done: Vec<u8> = std::thread::scope(|scope| {
            let stores: Vec<_> = (0..4).map(|_| open(dir.path(), old).unwrap()).collect();
            let start = |(number, store): (u8, Store)| {
                scope.spawn(move || (number, store.rotate_key(&key(10 * (round + 1) + number))))
            };
            let rotations: Vec<_> = (0..).zip(stores).map(start).collect();
            let rotations: Vec<_> = rotations.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(
                rotations.iter().filter_map(|(_, done)| done.as_ref().err()).all(|e| e.kind() == StoreErrorKind::Key)
            );
            rotations.into_iter().filter(|(_, done)| done.is_ok()).map(|(number, _)| number).collect()
        });
        assert_eq!(done, [winner(dir.path(), round + 1)]);
    }
    assert!(read_disk(&open(dir.path(), 50 + winner(dir.path(), 5)).unwrap(), &digest) == sample().0);
}

/// Which of the keys of a round opens the store; exactly one does.
fn winner(directory: &Path, round: u8) -> u8 {
    let winners: Vec<_> = (0..4).filter(|number| open(directory, 10 * round + number).is_ok()).collect();
    assert_eq!(winners.len(), 1, "{winners:?}");
    winners[0]
}

#[test]
fn additions_at_the_same_time_are_all_there() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), 1).unwrap());
    let mut numbers = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let store = open(dir.path(), 1).unwrap();
                scope.spawn(move || {
                    store.add_key(&key(10 + number)).unwrap();
                    store.add_data_key().unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    numbers.sort_unstable();
    assert_eq!(numbers, [2, 3, 4, 5]);
    for number in [1, 10, 11, 12, 13] {
        assert_eq!(open(dir.path(), number).unwrap().key_slots().unwrap().len(), 5);
    }
}

#[test]
fn a_change_of_keys_cut_off_anywhere_leaves_a_store_that_one_key_opens() {
    type Change = fn(&Store) -> Result<(), StoreError>;
    let changes: [Change; 2] = [|store| store.rotate_key(&key(2)), |store| store.add_data_key().map(drop)];
    for (change, lost_answer) in changes.into_iter().flat_map(|change| [(change, false), (change, true)]) {
        let mut completed = false;
        for operations in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let digest = import(&open(dir.path(), 1).unwrap(), &sample());
            let objects = Arc::new(support::CutOff::new(dir.path(), lost_answer));
            let store =
                Store::open(Arc::<support::CutOff>::clone(&objects), options(dir.path()).with_key(key(1))).unwrap();
            objects.cut_after(operations);
            let done = change(&store);
            let opened: Vec<_> = [1, 2].into_iter().filter_map(|number| open(dir.path(), number).ok()).collect();
            assert_eq!(opened.len(), 1, "after {operations} operations");
            assert!(read_disk(&opened[0], &digest) == sample().0);
            import(&opened[0], &related());
            if !objects.was_cut() {
                done.unwrap();
                completed = true;
                break;
            }
        }
        assert!(completed, "a change is a few operations");
    }
}

#[test]
fn a_new_store_cut_off_anywhere_is_made_by_the_next_who_opens_it() {
    for (operations, lost_answer) in (0..8).flat_map(|operations| [(operations, false), (operations, true)]) {
        let dir = tempfile::tempdir().unwrap();
        let objects = Arc::new(support::CutOff::new(dir.path(), lost_answer));
        objects.cut_after(operations);
        let first =
            Store::open(Arc::<support::CutOff>::clone(&objects), options(dir.path()).with_key(key(1)).encrypt_new());
        assert!(first.is_ok() || objects.was_cut());
        let store = open(dir.path(), 1).unwrap();
        let digest = import(&store, &sample());
        assert!(read_disk(&store, &digest) == sample().0);
        let raced: Vec<_> = (0..3).map(|_| open(dir.path(), 1).unwrap()).collect();
        assert!(raced.iter().all(|store| store.digests().unwrap() == [digest]));
    }
}

#[test]
fn a_changed_byte_of_an_encrypted_store_is_never_content() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk(text(0, 2));
    let digest = import(&open(dir.path(), 1).unwrap(), &disk);
    let mut flips = 0;
    let kinds = ["bulbil-store.json", "keys", "packs", "manifests", "attachments"];
    let content_files =
        files(dir.path()).into_iter().filter(|(path, _)| kinds.iter().any(|kind| path.starts_with(kind)));
    // The disk, and what is attached to it.
    let read_all = || {
        let store = open(dir.path(), 1)?;
        store.attachment(&digest, AttachmentKind::Leaves)?;
        support::try_read_disk(&store, &digest)
    };
    for (path, bytes) in content_files {
        let full = dir.path().join(&path);
        for position in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[position] ^= 0x40;
            support::overwrite(&full, &bad);
            let read = read_all();
            // The header of a pack is not asked when frames are read.
            let harmless = path.starts_with("packs") && position < 32;
            match read {
                Ok(content) => assert!(harmless && content == disk.0, "{} at {position}", path.display()),
                Err(error) => assert_ne!(error.kind(), StoreErrorKind::Io, "{error}"),
            }
            flips += 1;
        }
        support::overwrite(&full, &bytes);
    }
    assert!(flips > 1000);
    assert!(read_disk(&open(dir.path(), 1).unwrap(), &digest) == disk.0);
}

#[test]
fn a_scrub_finds_any_changed_byte_of_an_encrypted_store_and_names_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let digest = import(&open(dir.path(), 1).unwrap(), &sample());
    let store = open(dir.path(), 1).unwrap();
    store.add_key(&key(2)).unwrap();
    let scrub = || {
        let report = store.scrub(&ScrubOptions::default(), &()).unwrap();
        let named = report.damaged_packs.iter().any(|pack| pack.contents.iter().any(|hit| hit.digest == digest));
        (report.damaged_packs.len() + report.damaged_manifests.len() + report.damaged_objects.len(), named)
    };
    assert_eq!(scrub(), (0, false));
    let kinds = ["bulbil-store.json", "keys", "packs", "manifests", "attachments"];
    for (path, bytes) in
        files(dir.path()).into_iter().filter(|(path, _)| kinds.iter().any(|kind| path.starts_with(kind)))
    {
        for round in 0..15 {
            // The version; where packs name their data key.
            let position = [9, 14].get(round).copied().unwrap_or(round * 7919 % bytes.len());
            let mut bad = bytes.clone();
            bad[position] ^= 0x04;
            support::overwrite(&dir.path().join(&path), &bad);
            let (damaged, named) = scrub();
            assert_eq!(damaged, 1, "{} at {position}", path.display());
            assert_eq!(named, path.starts_with("packs"), "{} at {position}", path.display());
        }
        support::overwrite(&dir.path().join(&path), &bytes);
    }
    assert_eq!(scrub(), (0, false));
}

#[test]
fn what_is_packed_again_is_encrypted_and_readable() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1).unwrap();
    let gone = import(&store, &sample());
    let kept = import(&store, &related());
    store.add_data_key().unwrap();
    store.remove_manifest(&gone).unwrap();
    let before: HashSet<_> = packs(dir.path()).into_keys().collect();
    let options = GcOptions { grace: Duration::ZERO, repack_below_percent: 99, ..GcOptions::default() };
    for _ in 0..4 {
        store.collect(&options).unwrap();
    }
    let after: HashSet<_> = packs(dir.path()).into_keys().collect();
    assert!(!after.is_superset(&before), "one pack had something to free");
    assert_eq!(data_keys_of_packs(dir.path()), [1, 2]);
    assert!(read_disk(&open(dir.path(), 1).unwrap(), &kept) == related().0);
    let stats = store.stats().unwrap();
    assert_eq!((stats.contents.len(), stats.contents[0].digest), (1, kept));
}

#[test]
fn objects_of_a_plain_store_are_not_taken_for_those_of_an_encrypted_one() {
    let (plain, encrypted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let digest = import(&Store::open_or_create(plain.path()).unwrap(), &sample());
    let store = open(encrypted.path(), 1).unwrap();
    import(&store, &sample());
    let stored = files(encrypted.path());
    let manifest = stored.keys().find(|path| path.starts_with("manifests")).unwrap();
    let planted = files(plain.path()).into_iter().find(|(path, _)| path.starts_with("manifests")).unwrap().1;
    support::overwrite(&encrypted.path().join(manifest), &planted);
    let error = store.manifest(&digest).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("not encrypted"), "{error}: {cause}");
    // A planted pack is not matched against.
    let (path, pack) = packs(plain.path()).into_iter().next().unwrap();
    let target = encrypted.path().join("packs").join(path);
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    support::overwrite(&target, &pack);
    support::overwrite(&encrypted.path().join(manifest), &stored[manifest]);
    import(&store, &related());
    assert!(read_disk(&open(encrypted.path(), 1).unwrap(), &digest) == sample().0);
}

/// The key of the kept store.
const FIXTURE_KEY: u8 = 0x42;
const FIXTURE_DIGEST: &str = "sha256:e105bcb5e9a638a88c659f15693e7120eda59099b903482d062aca5ef3f088d4";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encrypted-v1")
}

#[test]
fn an_encrypted_store_of_version_1_is_read() {
    let copy = tempfile::tempdir().unwrap();
    for (path, bytes) in files(&fixture()) {
        let target = copy.path().join(path);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        support::overwrite(&target, &bytes);
    }
    let store = open_with(copy.path(), options(copy.path()).with_key(key(FIXTURE_KEY))).unwrap();
    let digest: Digest = FIXTURE_DIGEST.parse().unwrap();
    assert_eq!(store.digests().unwrap(), [digest]);
    assert!(read_disk(&store, &digest) == sample().0);
    assert_eq!(store.attachment(&digest, AttachmentKind::BootTrace).unwrap(), b"a trace");
    assert_eq!(data_keys_of_packs(copy.path()), [1, 2]);
    assert_eq!(store.import(&related(), &related()).unwrap().new_bytes, 7 * BLOCK_LEN as u64, "blocks are recognised");
}

/// Writes the fixture of the current format version; for a new version, in a new directory.
#[test]
#[ignore = "writes a fixture that is then kept for ever"]
fn write_the_encrypted_store() {
    let target = fixture();
    assert!(!target.exists(), "{} is never written again", target.display());
    let store = open(&target, FIXTURE_KEY).unwrap();
    let first = import(&store, &MemoryDisk(sample().0[..FRAME_LEN].to_vec()));
    store.add_data_key().unwrap();
    let digest = import(&store, &sample());
    store.put_attachment(&digest, AttachmentKind::BootTrace, b"a trace").unwrap();
    store.remove_manifest(&first).unwrap();
    println!("{digest}");
    for directory in ["index", "tmp"] {
        std::fs::remove_dir_all(target.join(directory)).unwrap();
    }
}
