//! Damage in any stored byte is found, told to whom it belongs, never served, and healed where it can be.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic and makes small numbers")]

use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{
    AttachmentKind, Digest, DiskSource as _, FrameHealer, GcOptions, OwnerId, ScrubOptions, ScrubReport, SecondStore,
    Store, StoreError, StoreOptions, WantedFrame,
};
use bulbil_testkit::{MemoryDisk, MemoryObjects, Rng};
use bulbil_types::BLOCK_LEN;

struct Fixture {
    objects: MemoryObjects,
    disks: Vec<(Digest, MemoryDisk)>,
    state: tempfile::TempDir,
}

fn open_as(objects: &MemoryObjects, state: &tempfile::TempDir, owner: &str) -> Result<Store, StoreError> {
    let name = format!("{:016x}", Rng::new(state.path().as_os_str().len() as u64).next_u64());
    let options = StoreOptions {
        state_directory: state.path().join(name + owner),
        owner: owner.parse().unwrap(),
        ..StoreOptions::default()
    };
    Store::open(Arc::new(objects.clone()), options)
}

const FIRST: &str = "0000000000000001";
const SECOND: &str = "0000000000000002";

impl Fixture {
    /// Three disks that share blocks, of two owners, with attachments and a list of condemned packs.
    fn new(seed: u64) -> Self {
        let state = tempfile::tempdir().unwrap();
        let objects = MemoryObjects::default();
        let mut rng = Rng::new(seed);
        let shared: Vec<u8> = (0..80).flat_map(|_| rng.bytes(128).repeat(BLOCK_LEN / 128)).collect();
        let mut disks = Vec::new();
        for (number, owner) in [(1, FIRST), (2, FIRST), (3, SECOND)] {
            let store = open_as(&objects, &state, owner).unwrap();
            let mut bytes = rng.bytes(40 * BLOCK_LEN);
            bytes.extend(&shared[number * 5 * BLOCK_LEN..]);
            bytes.resize(1 << 20, 0);
            let disk = MemoryDisk(bytes);
            let digest = store.import(&disk, &disk).unwrap().digest;
            store.put_attachment(&digest, AttachmentKind::BootTrace, &rng.bytes(50)).unwrap();
            disks.push((digest, disk));
        }
        let gone = MemoryDisk(rng.bytes(1 << 20));
        let store = open_as(&objects, &state, FIRST).unwrap();
        let digest = store.import(&gone, &gone).unwrap().digest;
        store.remove_manifest(&digest).unwrap();
        store.collect(&GcOptions::default()).unwrap();
        Self { objects, disks, state }
    }

    fn store(&self) -> Store {
        open_as(&self.objects, &self.state, FIRST).unwrap()
    }

    fn check_all(&self) {
        for (digest, disk) in &self.disks {
            assert!(read(&self.store(), digest).unwrap() == disk.0);
        }
    }

    fn packs(&self) -> Vec<String> {
        let used = self.disks.iter().flat_map(|(digest, _)| self.store().manifest(digest).unwrap().packs().to_vec());
        let mut names: Vec<_> =
            used.map(|p| p.id.to_string()).map(|id| format!("packs/{}/{id}.pack", &id[..2])).collect();
        names.sort();
        names.dedup();
        names
    }
}

fn read(store: &Store, digest: &Digest) -> Result<Vec<u8>, StoreError> {
    let manifest = store.manifest(digest)?;
    let mut bytes = vec![0; manifest.size_bytes() as usize];
    for extent in manifest.extents() {
        for index in 0..extent.blocks {
            let at = (extent.block_in_pack + index) as usize;
            let frame = store.read_frame(&manifest.packs()[extent.pack as usize], (at / 32) as u32)?;
            let block = &frame[at % 32 * BLOCK_LEN..][..BLOCK_LEN];
            bytes[(extent.first_block + u64::from(index)) as usize * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(block);
        }
    }
    Ok(bytes)
}

fn scrub(store: &Store) -> ScrubReport {
    store.scrub(&ScrubOptions::default(), &()).unwrap()
}

fn heal(store: &Store, healers: &[&dyn FrameHealer]) -> ScrubReport {
    store.scrub(&ScrubOptions { heal: true, healers, ..ScrubOptions::default() }, &()).unwrap()
}

fn damages(report: &ScrubReport) -> usize {
    report.damaged_packs.len() + report.damaged_manifests.len() + report.damaged_objects.len()
}

fn named(report: &ScrubReport) -> Vec<Digest> {
    let packs = report.damaged_packs.iter().flat_map(|damage| damage.contents.iter().map(|hit| hit.digest));
    packs.chain(report.damaged_manifests.iter().filter_map(|damage| damage.digest)).collect()
}

#[test]
fn a_sound_store_is_found_sound() {
    let fixture = Fixture::new(1);
    let report = scrub(&fixture.store());
    assert_eq!(damages(&report), 0, "{report:?}");
    assert_eq!(
        (report.packs, report.manifests, report.attachments),
        (fixture.packs().len() as u64 + 1, 3, 6),
        "each content has leaves and a boot trace"
    );
}

#[test]
fn any_of_100_flipped_bytes_is_never_served_and_a_scrub_finds_it_and_names_the_contents() {
    const SEED: u64 = 0x5c12_0b01;
    println!("seed {SEED:#x}");
    let fixture = Fixture::new(SEED);
    let mut rng = Rng::new(SEED);
    let names = fixture.objects.names();
    for flip in 0..100 {
        let name = &names[rng.below(names.len() as u64) as usize];
        // Packs have their footers at the end, so that both are hit often.
        let len = fixture.objects.len_bytes(name) as u64;
        let position = if rng.one_in(2) { rng.below(len) } else { len - 1 - rng.below(len.min(4000)) };
        let mask = 1 << rng.below(8);
        let what = format!("flip {flip}: {name} at {position} of {len}, mask {mask:#x}");
        let objects = fixture.objects.deep_copy();
        objects.flip(name, position as usize, mask);
        let Ok(store) = open_as(&objects, &fixture.state, FIRST) else {
            assert_eq!(name, "bulbil-store.json", "{what}");
            continue;
        };
        let mut lost = Vec::new();
        for (digest, disk) in &fixture.disks {
            match read(&store, digest) {
                Ok(bytes) => assert!(bytes == disk.0, "{what}: wrong bytes are served"),
                Err(_) => lost.push(*digest),
            }
        }
        let report = scrub(&store);
        let harmless = name == "bulbil-store.json" && lost.is_empty();
        assert!(damages(&report) > 0 || harmless, "{what}: not found");
        for digest in lost {
            assert!(named(&report).contains(&digest), "{what}: {digest} is not named: {report:?}");
        }
        if name.starts_with("packs/") && fixture.packs().contains(name) {
            assert!(!named(&report).is_empty(), "{what}: nobody is named");
        }
    }
}

#[test]
fn what_is_damaged_is_not_matched_any_more() {
    let fixture = Fixture::new(2);
    let (digest, disk) = &fixture.disks[0];
    for name in fixture.packs() {
        fixture.objects.flip(&name, 200, 1);
    }
    let report = scrub(&fixture.store());
    assert_eq!(report.damaged_packs.len(), fixture.packs().len());
    assert!(report.damaged_packs.iter().all(|damage| damage.frames == [0] && !damage.healed), "{report:?}");
    let mut longer = disk.0.clone();
    longer.extend([7; BLOCK_LEN]);
    let longer = MemoryDisk(longer);
    let imported = fixture.store().import(&longer, &longer).unwrap();
    assert_eq!(imported.new_bytes, imported.data_bytes, "every block is stored again");
    assert!(read(&fixture.store(), &imported.digest).unwrap() == longer.0);
    assert!(read(&fixture.store(), digest).is_err());
}

#[test]
fn the_shares_together_are_everything() {
    let fixture = Fixture::new(3);
    let read = |share| {
        let options = ScrubOptions { share: Some(share), ..ScrubOptions::default() };
        fixture.store().scrub(&options, &()).unwrap().packs
    };
    let all: u64 = (0..3).map(|index| read((index, 3))).sum();
    assert_eq!(all, scrub(&fixture.store()).packs);
    assert!(read((0, 1)) == all);
}

/// A store of the same contents, made from other imports, so that its packs are other ones.
fn twin(fixture: &Fixture) -> (Fixture, OwnerId) {
    let twin = Fixture { objects: MemoryObjects::default(), disks: Vec::new(), state: tempfile::tempdir().unwrap() };
    for (_, disk) in fixture.disks.iter().rev() {
        twin.store().import(disk, disk).unwrap();
    }
    (twin, FIRST.parse().unwrap())
}

#[test]
fn damaged_frames_are_healed_from_a_second_store() {
    let fixture = Fixture::new(4);
    let (twin, _) = twin(&fixture);
    for name in fixture.packs() {
        fixture.objects.flip(&name, 200, 1);
    }
    let second = twin.store();
    let second = SecondStore::new(&second);
    let report = heal(&fixture.store(), &[&second]);
    assert!(damages(&report) > 0 && report.is_sound(), "{report:?}");
    fixture.check_all();
    let after = fixture.store();
    for _ in 0..4 {
        after.collect(&GcOptions { grace: Duration::ZERO, repack_below_percent: 0, ..GcOptions::default() }).unwrap();
    }
    assert_eq!(damages(&scrub(&after)), 0, "the damaged packs are gone");
    fixture.check_all();
}

#[test]
fn missing_packs_and_packs_that_cannot_be_read_at_all_are_healed_from_a_second_store() {
    let fixture = Fixture::new(5);
    let (twin, _) = twin(&fixture);
    let packs = fixture.packs();
    bulbil_store::Objects::delete(&fixture.objects, &packs[0]).unwrap();
    for position in (33..fixture.objects.len_bytes(&packs[1])).step_by(50) {
        fixture.objects.flip(&packs[1], position, 1);
    }
    let found = scrub(&fixture.store());
    assert_eq!(found.damaged_packs.len(), 2, "{found:?}");
    let second = twin.store();
    let second = SecondStore::new(&second);
    let report = heal(&fixture.store(), &[&second]);
    assert!(report.is_sound(), "{report:?}");
    fixture.check_all();
    let other = open_as(&fixture.objects, &fixture.state, SECOND).unwrap();
    let (digest, disk) = &fixture.disks[2];
    assert!(read(&other, digest).unwrap() == disk.0);
}

#[test]
fn a_damaged_footer_or_header_is_healed_from_the_pack_itself() {
    let fixture = Fixture::new(6);
    let packs = fixture.packs();
    fixture.objects.flip(&packs[0], 3, 1);
    for name in &packs[1..] {
        fixture.objects.flip(name, fixture.objects.len_bytes(name) - 100, 1);
    }
    let report = heal(&fixture.store(), &[]);
    assert_eq!(report.damaged_packs.len(), packs.len());
    assert!(report.is_sound(), "{report:?}");
    fixture.check_all();
}

#[test]
fn a_damaged_manifest_is_healed_from_another_owner_or_a_second_store() {
    let fixture = Fixture::new(7);
    let (digest, disk) = &fixture.disks[0];
    let other = open_as(&fixture.objects, &fixture.state, SECOND).unwrap();
    let manifests = |digest: &Digest| -> Vec<String> {
        let names = fixture.objects.names().into_iter();
        names.filter(|name| name.starts_with(&format!("manifests/{}/", digest.to_hex()))).collect()
    };
    other.import(disk, disk).unwrap();
    let own = manifests(digest).into_iter().find(|name| name.contains(FIRST)).unwrap();
    fixture.objects.flip(&own, 90, 1);
    assert!(fixture.store().collect(&GcOptions::default()).is_err(), "nothing is deleted on a guess");
    let report = heal(&fixture.store(), &[]);
    assert!(report.damaged_manifests.len() == 1 && report.is_sound(), "{report:?}");
    fixture.store().collect(&GcOptions::default()).unwrap();

    let (twin, _) = twin(&fixture);
    let (digest, disk) = &fixture.disks[2];
    fixture.objects.flip(&manifests(digest)[0], 90, 1);
    assert!(!heal(&fixture.store(), &[]).is_sound(), "nobody knows it");
    let second = twin.store();
    let second = SecondStore::new(&second);
    let report = heal(&fixture.store(), &[&second]);
    assert!(report.is_sound(), "{report:?}");
    assert!(read(&other, digest).unwrap() == disk.0);
    assert!(manifests(digest).iter().any(|name| name.contains(SECOND)), "its owner has it again");
    fixture.store().collect(&GcOptions::default()).unwrap();
}

/// Says it knows, and does not.
struct Liar;

impl FrameHealer for Liar {
    fn frame(&self, wanted: &WantedFrame<'_>) -> Option<Vec<u8>> {
        Some(vec![9; usize::from(wanted.blocks) * BLOCK_LEN])
    }

    fn disk(&self, _digest: &Digest) -> Option<Box<dyn bulbil_store::DiskSource + '_>> {
        let disk = MemoryDisk(vec![9; 1 << 20]);
        assert_eq!(disk.size_bytes(), 1 << 20);
        Some(Box::new(disk))
    }
}

#[test]
fn what_a_healer_gives_is_verified() {
    let fixture = Fixture::new(8);
    for name in fixture.packs() {
        fixture.objects.flip(&name, 200, 1);
    }
    let report = heal(&fixture.store(), &[&Liar]);
    assert!(report.damaged_packs.iter().all(|damage| !damage.healed), "{report:?}");
    for (digest, disk) in &fixture.disks {
        assert!(read(&fixture.store(), digest).map_or(true, |bytes| bytes == disk.0));
    }
}
