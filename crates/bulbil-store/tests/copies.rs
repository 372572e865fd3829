//! What copies between stores rest on: imports that leave what they stored, and images by name.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

use std::ops::Range;

use bulbil_store::{
    Digest, DiskSource, ImportObserver, ImportOptions, OwnerId, SourceError, Store, StoreErrorKind, StoreKey,
    StoreOptions, StoredImage,
};
use bulbil_types::{Architecture, BootMode};

/// A disk of incompressible bytes that may end too early.
struct Disk {
    bytes: Vec<u8>,
    fail_at: Option<u64>,
}

impl Disk {
    fn new(seed: u64, len: usize) -> Self {
        let mut bytes = vec![0; len];
        let mut state = seed;
        for byte in bytes.iter_mut() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        Self { bytes, fail_at: None }
    }
}

impl DiskSource for Disk {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        Ok((offset < self.size_bytes()).then(|| offset..self.size_bytes()))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        if self.fail_at.is_some_and(|at| offset + buf.len() as u64 > at) {
            return Err("the connection broke".into());
        }
        buf.copy_from_slice(&self.bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
}

struct Nobody;

impl ImportObserver for Nobody {
    fn progress(&self, _: u64, _: u64, _: u64) {}
}

#[test]
fn a_failed_import_that_keeps_what_it_stored_is_continued_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    let keep = ImportOptions { keep_on_failure: true, ..ImportOptions::default() };
    let mut disk = Disk::new(0x5eed_0101, 48 << 20);
    disk.fail_at = Some(40 << 20);
    let error = store.import_with_options(&disk, &Nobody, &ImportOptions::default()).unwrap_err();
    assert_eq!((error.kind(), store.usage().unwrap().packs), (StoreErrorKind::Source, 0));
    let error = store.import_with_options(&disk, &Nobody, &keep).unwrap_err();
    let left = store.usage().unwrap();
    assert_eq!((error.kind(), left.manifests), (StoreErrorKind::Source, 0));
    assert!(left.pack_bytes >= 16 << 20, "a pack is complete before the disk fails: {left:?}");
    disk.fail_at = None;
    let report = store.import_with_options(&disk, &Nobody, &keep).unwrap();
    assert!(report.new_bytes + left.pack_bytes <= 49 << 20, "{report:?} after {left:?}");
    assert_eq!(store.manifest(&report.digest).unwrap().data_bytes(), 48 << 20);
}

#[test]
fn a_disk_that_is_not_the_expected_content_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    let disk = Disk::new(0x5eed_0102, 1 << 20);
    let other = Digest::from_bytes([7; 32]);
    let expect = |digest| ImportOptions { expected_digest: Some(digest), ..ImportOptions::default() };
    let error = store.import_with_options(&disk, &Nobody, &expect(other)).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Source);
    assert_eq!(store.usage().unwrap(), bulbil_store::StoreUsage::default());
    let digest = store.import(&disk, &Nobody).unwrap().digest;
    assert!(store.import_with_options(&disk, &Nobody, &expect(digest)).unwrap().existed);
}

fn image(digest: Digest, name: &str, version: &str) -> StoredImage {
    StoredImage {
        name: name.parse().unwrap(),
        version: version.parse().unwrap(),
        digest,
        size_bytes: 1 << 20,
        data_bytes: 1 << 20,
        architecture: Architecture::X86_64,
        boot_mode: BootMode::Uefi,
        source_format: "raw".to_owned(),
        created_at: 1_790_000_000,
    }
}

#[test]
fn images_of_an_encrypted_store_are_found_by_who_has_the_key_only() {
    let dir = tempfile::tempdir().unwrap();
    let open = |key: [u8; 32]| {
        let objects = std::sync::Arc::new(bulbil_store::DirObjects::open(dir.path()).unwrap());
        let options = StoreOptions::new(&dir.path().join("index"), OwnerId::default());
        Store::open(objects, options.with_key(StoreKey::from_bytes(key)).encrypt_new())
    };
    let store = open([1; 32]).unwrap();
    let digest = store.import(&Disk::new(0x5eed_0104, 1 << 20), &Nobody).unwrap().digest;
    let web = image(digest, "very-secret-name", "7.1-beta");
    assert!(store.put_image(&web).unwrap() && store.put_image(&web).unwrap());
    assert!(!store.put_image(&StoredImage { boot_mode: BootMode::Bios, ..web.clone() }).unwrap());
    let again = open([1; 32]).unwrap();
    assert_eq!(
        (again.images().unwrap().images, again.image(&web.name, &web.version).unwrap()),
        (vec![web.clone()], web)
    );
    open([2; 32]).unwrap_err();
    let records: Vec<_> = std::fs::read_dir(dir.path().join("images")).unwrap().flatten().collect();
    assert_eq!(records.len(), 1);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (name, stored) = (records[0].file_name(), std::fs::read(records[0].path()).unwrap());
    for hidden in ["very-secret", "7.1-beta", &digest.to_hex()] {
        assert!(!text(&stored).contains(hidden) && !name.to_str().unwrap().contains(hidden), "{hidden}");
    }
}

#[test]
fn images_are_found_by_name_and_a_name_is_taken_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path()).unwrap();
    let digest = store.import(&Disk::new(0x5eed_0103, 1 << 20), &Nobody).unwrap().digest;
    let nowhere = image(Digest::from_bytes([1; 32]), "nowhere", "1");
    assert_eq!(store.put_image(&nowhere).unwrap_err().kind(), StoreErrorKind::NotFound, "its content comes first");
    let (first, second) = (image(digest, "web", "1"), image(digest, "web", "2"));
    assert!(store.put_image(&second).unwrap() && store.put_image(&first).unwrap());
    assert!(store.put_image(&first).unwrap(), "the same again is fine");
    let other = StoredImage { boot_mode: BootMode::Bios, ..first.clone() };
    assert!(!store.put_image(&other).unwrap());
    assert_eq!(store.images().unwrap().images, [first.clone(), second.clone()]);
    assert_eq!(store.image(&first.name, &first.version).unwrap(), first);
    std::fs::copy(dir.path().join("images/web/2.json"), dir.path().join("images/web/3.json")).unwrap();
    let moved = store.images().unwrap();
    assert_eq!(moved.unreadable, ["images/web/3.json"], "a record under another name is not believed");
    std::fs::remove_file(dir.path().join("images/web/3.json")).unwrap();
    std::fs::File::create(dir.path().join("images/web/1.json")).unwrap();
    let listed = store.images().unwrap();
    assert_eq!((listed.images, listed.unreadable), (vec![second], vec!["images/web/1.json".to_owned()]));
    assert_eq!(store.image(&first.name, &first.version).unwrap_err().kind(), StoreErrorKind::Corrupt);
    store.remove_image(&first.name, &first.version).unwrap();
    assert_eq!(store.image(&first.name, &first.version).unwrap_err().kind(), StoreErrorKind::NotFound);
}
