//! Stores in a directory of a machine that kills processes and loses power, on a real mount. Needs `/dev/fuse` and
//! root; skips with a reason without them, unless `CI` is set: then it fails.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic and makes small numbers")]

use std::path::Path;
use std::sync::Arc;

use bulbil_store::{DirObjects, OwnerId, Store, StoreError, StoreOptions};
use bulbil_testkit::{MemoryDisk, PowerLossMachine, PowerLossMount, StoredContent, tagged};

/// The store is made in directories that are not there yet.
fn open(mount: &PowerLossMount, state: &Path) -> Result<Store, StoreError> {
    let objects = DirObjects::open(&mount.path().join("srv/stores/one"))?;
    Store::open(Arc::new(objects), StoreOptions::new(state, OwnerId::default()))
}

fn mounts(machine: &PowerLossMachine, directory: &Path) -> [PowerLossMount; 3] {
    ["killed", "other", "observer"].map(|name| {
        let path = directory.join(name);
        std::fs::create_dir(&path).unwrap();
        machine.mount(&path, name == "observer")
    })
}

#[test]
fn what_a_process_relies_on_that_another_left_when_it_was_killed_outlives_a_loss_of_power() {
    if !PowerLossMachine::is_possible() {
        return;
    }
    let disk = MemoryDisk((1..40).flat_map(|block| tagged(block, 8)).collect());
    let related = MemoryDisk((1..42).flat_map(|block| tagged(block, 8)).collect());
    let mut killed_in_time = 0;
    for operations in (1..).step_by(5) {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let machine = PowerLossMachine::new(operations);
        let [killed, other, observer] = mounts(&machine, directory.path());
        killed.set_fuse(operations);
        let import = |mount, state, disk: &MemoryDisk| {
            open(mount, &directory.path().join(state)).and_then(|store| store.import(disk, disk))
        };
        let done = import(&killed, "a", &disk);
        // The same disk, or one that shares its blocks.
        let disk = if operations % 2 == 0 { &disk } else { &related };
        let report = import(&other, "b", disk).unwrap();
        machine.lose_power();
        let store = open(&observer, &directory.path().join("c")).unwrap();
        let read = StoredContent::read(&store, &report.digest);
        assert!(read.unwrap_or_else(|e| panic!("killed at {operations}: {e}")) == disk.0, "killed at {operations}");
        if done.is_ok() && !killed.is_dead() {
            break;
        }
        killed_in_time += 1;
    }
    assert!(killed_in_time > 20, "killed {killed_in_time} times");
}
