//! Stores behind an S3 server: imports, and what a bad network does to them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic and makes small numbers")]

use std::path::Path;
use std::time::Duration;

use bulbil_store::{
    Digest, ImportReport, OwnerId, RemoteOptions, Store, StoreError, StoreErrorKind, StoreLocation, StoreOptions,
    open_objects,
};
use bulbil_testkit::{Fault, HttpFaultProxy, HttpFaultRates, MemoryDisk, ProxyOptions, Rng, S3Server};
use bulbil_types::BLOCK_LEN;

/// Rounds of the campaign, more where this variable says so.
const ROUNDS_VARIABLE: &str = "BULBIL_S3_FAULT_ROUNDS";

/// Data that compresses a little, with holes.
fn disk(seed: u64, len: usize) -> MemoryDisk {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(300_000).step_by(2) {
        let noise = rng.bytes(piece.len() / 2);
        piece[..noise.len()].copy_from_slice(&noise);
    }
    MemoryDisk(bytes)
}

fn open(location: &StoreLocation, state: &Path, options: &RemoteOptions) -> Result<Store, StoreError> {
    let options_of_store =
        StoreOptions { state_directory: state.to_owned(), owner: OwnerId::default(), ..StoreOptions::default() };
    Store::open(open_objects(location, options)?, options_of_store)
}

fn import(store: &Store, disk: &MemoryDisk) -> Result<ImportReport, StoreError> {
    store.import(disk, disk)
}

/// Reads the whole disk back through its manifest.
fn read_back(store: &Store, digest: &Digest) -> Result<Vec<u8>, StoreError> {
    let manifest = store.manifest(digest)?;
    let mut bytes = vec![0; manifest.size_bytes() as usize];
    for extent in manifest.extents() {
        for i in 0..extent.blocks {
            let at = extent.block_in_pack + i;
            let frame = store.read_frame(&manifest.packs()[extent.pack as usize], at / 32)?;
            let start = (extent.first_block + u64::from(i)) as usize * BLOCK_LEN;
            let end = (start + BLOCK_LEN).min(bytes.len());
            let from = (at % 32) as usize * BLOCK_LEN;
            bytes[start..end].copy_from_slice(&frame[from..from + end - start]);
        }
    }
    Ok(bytes)
}

#[test]
fn an_import_into_a_bucket_reads_back_and_is_shared() {
    let server = S3Server::start();
    let state = tempfile::tempdir().unwrap();
    let store = open(&server.location("images"), &state.path().join("a"), &S3Server::options()).unwrap();
    let disk = disk(1, 6 << 20);
    let report = import(&store, &disk).unwrap();
    assert!(!report.existed);
    // Another host has no index and no cache: everything comes from the bucket.
    let other = open(&server.location("images"), &state.path().join("b"), &S3Server::options()).unwrap();
    assert!(read_back(&other, &report.digest).unwrap() == disk.0);
    assert!(import(&other, &disk).unwrap().existed);
    assert_eq!(other.usage().unwrap(), store.usage().unwrap());
    other.remove_manifest(&report.digest).unwrap();
    assert!(other.sweep().unwrap() > 0);
    assert_eq!(store.usage().unwrap().packs, 0);
}

/// Whatever the network does: right or an honest error, the store opens, and the same again succeeds.
fn check_round(seed: u64) {
    let server = S3Server::start();
    let state = tempfile::tempdir().unwrap();
    let faults = HttpFaultRates::all(seed, 60).and(Fault::Silent, 10).and(Fault::Corrupt(0), 30);
    let proxy = HttpFaultProxy::start(server.address(), ProxyOptions { faults, ..ProxyOptions::default() });
    // Few attempts, so that operations fail at times.
    let options = RemoteOptions {
        attempt_timeout: Duration::from_millis(200),
        deadline: Duration::from_millis(300),
        ..S3Server::options()
    };
    let bad = S3Server::location_at(&proxy.endpoint(), "p");
    let disks: Vec<_> = (0..3).map(|i| disk(seed * 10 + i, 2 << 20)).collect();
    let mut reports = Vec::new();
    for disk in &disks {
        let attempt = open(&bad, &state.path().join("index"), &options).and_then(|store| {
            let report = import(&store, disk)?;
            Ok((report, read_back(&store, &report.digest)))
        });
        match attempt {
            Ok((report, read)) => {
                reports.push((report.digest, &disk.0));
                // Bytes that change on the way are an error and never data.
                assert!(read.is_err() || read.is_ok_and(|bytes| bytes == disk.0), "seed {seed}: wrong bytes");
            }
            Err(error) => {
                let honest = [StoreErrorKind::Timeout, StoreErrorKind::Io, StoreErrorKind::Corrupt];
                assert!(honest.contains(&error.kind()), "seed {seed}: {error:?}");
            }
        }
    }
    let store = open(&server.location("p"), &state.path().join("index"), &S3Server::options());
    let store = store.unwrap_or_else(|error| panic!("seed {seed}: the store does not open: {error:?}"));
    for (digest, bytes) in reports {
        assert!(read_back(&store, &digest).unwrap() == *bytes, "seed {seed}: an import that was done is not there");
    }
    for disk in &disks {
        let digest = import(&store, disk).unwrap_or_else(|error| panic!("seed {seed}: again: {error:?}")).digest;
        assert!(read_back(&store, &digest).unwrap() == disk.0, "seed {seed}");
    }
    store.sweep().unwrap();
    for digest in store.digests().unwrap() {
        read_back(&store, &digest).unwrap();
    }
}

#[test]
fn imports_over_a_bad_network_are_right_or_fail_and_succeed_again() {
    let rounds = std::env::var(ROUNDS_VARIABLE).map_or(2, |rounds| rounds.parse().expect("a number of rounds"));
    (1..=rounds).for_each(check_round);
}

#[test]
fn a_read_whose_bytes_changed_on_the_way_is_an_error_that_does_not_stay() {
    let server = S3Server::start();
    let proxy = HttpFaultProxy::start(server.address(), ProxyOptions::default());
    let state = tempfile::tempdir().unwrap();
    let location = S3Server::location_at(&proxy.endpoint(), "p");
    let store = open(&location, state.path(), &S3Server::options()).unwrap();
    let disk = disk(5, 1 << 20);
    let digest = import(&store, &disk).unwrap().digest;
    let manifest = store.manifest(&digest).unwrap();
    store.read_frame(&manifest.packs()[0], 0).unwrap();
    proxy.inject("GET", Fault::Corrupt(1000), 1);
    assert_eq!(store.read_frame(&manifest.packs()[0], 0).unwrap_err().kind(), StoreErrorKind::Corrupt);
    assert!(read_back(&store, &digest).unwrap() == disk.0);
}
