//! What a killed daemon leaves in the store is not visible, and does not stay for ever.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use bulbil_store::StoreUsage;
use bulbil_testkit::MemoryDisk;
use support::{Host, disks};

const SEED: u64 = 0x5eed_0012;

/// A host whose store holds a content that no image names, as when a daemon was killed after the
/// content was complete and before the catalog had it.
fn host_with_nameless_content() -> (Host, bulbil_store::Digest) {
    let mut host = Host::new();
    let disk = MemoryDisk(disks::content(SEED, 3 << 20));
    let digest = host.store().import(&disk, &disk).unwrap().digest;
    host.open();
    (host, digest)
}

fn import_and_remove_another(host: &Host) {
    let path = host.path("other.raw");
    disks::write_sparse(&path, &disks::content(SEED + 1, 2 << 20));
    host.import(&path, "other");
    host.remove_image("other");
}

#[test]
fn content_that_no_image_names_is_freed_by_the_next_removal() {
    let (host, _) = host_with_nameless_content();
    assert!(host.images().is_empty());
    import_and_remove_another(&host);
    assert_eq!(host.usage(), StoreUsage::default());
}

#[test]
fn packs_without_a_manifest_are_freed_by_the_next_removal() {
    let (host, digest) = host_with_nameless_content();
    host.store().remove_manifest(&digest).unwrap();
    assert!(host.usage().packs > 0);
    import_and_remove_another(&host);
    assert_eq!(host.usage(), StoreUsage::default());
}

#[test]
fn content_that_no_image_names_is_not_stored_again_when_it_is_imported() {
    let (host, digest) = host_with_nameless_content();
    let before = host.usage();
    let path = host.path("disk.raw");
    disks::write_sparse(&path, &disks::content(SEED, 3 << 20));
    assert_eq!(host.import(&path, "disk").digest, digest);
    assert_eq!(host.usage(), before);
    host.serve(&digest, |socket| disks::assert_served_is(&path, "raw", socket));
}
