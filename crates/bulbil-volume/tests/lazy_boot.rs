//! What a boot touches is recorded, and fetched before the next boot asks for it.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod lazy_support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bulbil_store::{AttachmentKind, Manifest, StoreErrorKind};
use bulbil_testkit::{Answer, Request, Rng};
use bulbil_volume::{BlockDevice as _, Volume, boot_working_set, inherit_trace};
use lazy_support::{FRAME, Host, check_disjoint, check_read, noise, wait_until};

/// Places that a boot reads, in its order: files here and there, some of them longer.
fn boot(seed: u64, frames: u64) -> Vec<(usize, usize)> {
    let mut rng = Rng::new(seed);
    let mut reads = Vec::new();
    for _ in 0..60 {
        let at = rng.below(frames - 4) as usize * FRAME + rng.below(32) as usize * 4096;
        let len = (1 + rng.below(60) as usize) * 4096;
        reads.extend((at..at + len).step_by(64 << 10).map(|part| (part, (64 << 10).min(at + len - part))));
    }
    reads
}

fn run_boot(volume: &Volume, image: &[u8], reads: &[(usize, usize)]) {
    reads.iter().for_each(|(offset, len)| check_read(volume, image, *offset, *len));
}

fn touched_frames(reads: &[(usize, usize)]) -> usize {
    let frames = reads.iter().flat_map(|(offset, len)| offset / FRAME..=(offset + len - 1) / FRAME);
    frames.collect::<HashSet<_>>().len()
}

fn stored_bytes(requests: &[Request]) -> usize {
    requests.iter().map(|request| request.len_bytes).sum()
}

#[test]
fn the_second_cold_boot_finds_everything_fetched_by_few_large_reads() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(1, 500);
    let manifest = host.import(&image);
    let reads = boot(2, 500);
    let touched = touched_frames(&reads);
    host.objects.set_delay(Duration::from_millis(2));

    let volume = host.volume(&manifest, &host.cache());
    run_boot(&volume, &image, &reads);
    let first = volume.read_stats();
    let first_requests = host.frame_requests(&manifest, host.objects.take_requests());
    assert!(stored_bytes(&first_requests) <= touched * FRAME * 12 / 10, "{first:?}, {touched} frames");
    let working_set = || boot_working_set(&host.store, &host.cache(), manifest.clone()).unwrap();
    assert_eq!(working_set(), None);
    assert!(volume.finish_recording().unwrap());
    assert!(!volume.finish_recording().unwrap(), "once");
    let found = working_set().unwrap();
    let blocks: HashSet<_> = reads.iter().flat_map(|(offset, len)| offset / 4096..(offset + len) / 4096).collect();
    assert_eq!((found.frames as usize, found.read_bytes as usize), (touched, blocks.len() * 4096));
    let plain = touched * FRAME;
    assert!((plain..plain * 101 / 100).contains(&(found.stored_bytes as usize)), "it does not compress: {found:?}");
    host.objects.take_requests();
    drop(volume);

    host.forget_cache();
    let volume = host.volume(&manifest, &host.cache());
    wait_until("all is fetched", || volume.read_stats().prefetched_frames as usize >= touched);
    run_boot(&volume, &image, &reads);
    let second = volume.read_stats();
    assert_eq!((second.demand_frames, second.hit_frames as usize, second.wasted_frames), (0, touched, 0), "{second:?}");
    let requests = host.frame_requests(&manifest, host.objects.take_requests());
    check_disjoint(&requests);
    assert!(stored_bytes(&requests) <= touched * FRAME * 11 / 10, "{} bytes", stored_bytes(&requests));
    assert!(requests.len() * 3 <= touched * 2, "{} requests for {touched} frames", requests.len());
    assert!(!volume.finish_recording().unwrap(), "the trace was good");
}

#[test]
fn a_boot_that_runs_while_its_frames_are_fetched_reads_none_twice_and_waits_for_none_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(3, 400);
    let manifest = host.import(&image);
    let reads = boot(4, 350);
    let volume = host.volume(&manifest, &host.cache());
    run_boot(&volume, &image, &reads);
    volume.finish_recording().unwrap();
    drop(volume);
    host.objects.take_requests();
    host.forget_cache();

    host.objects.set_delay(Duration::from_millis(10));
    let cache = host.cache();
    let volumes: Vec<_> = (0..3).map(|_| host.volume(&manifest, &cache)).collect();
    std::thread::scope(|scope| {
        for volume in &volumes {
            let (image, reads) = (&image, &reads);
            scope.spawn(move || run_boot(volume, image, reads));
        }
        // Not in the trace: it must not wait until that is done.
        let started = Instant::now();
        check_read(&volumes[0], &image, 399 * FRAME, 4096);
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    });
    check_disjoint(&host.frame_requests(&manifest, host.objects.take_requests()));
    let fetched: u64 = volumes.iter().map(Volume::frames_fetched).sum();
    assert!(fetched as usize <= touched_frames(&reads) + 1);
}

#[test]
fn a_boot_that_the_trace_missed_adds_to_it_and_a_similar_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(5, 100);
    let manifest = host.import(&image);
    let cache = host.cache();
    let record = |frames: std::ops::Range<usize>| {
        let volume = host.volume(&manifest, &cache);
        frames.for_each(|frame| check_read(&volume, &image, frame * FRAME, 4096));
        volume.finish_recording().unwrap()
    };
    let trace = || host.store.attachment(&manifest.digest(), AttachmentKind::BootTrace).unwrap();
    assert!(record(0..40));
    let first = trace();
    assert!(!record(2..43), "three of 41 are within a tenth");
    assert!(!record(10..20), "nothing new");
    assert_eq!(trace(), first);
    assert!(record(20..60));
    assert_ne!(trace(), first);
    assert!(!record(0..60));
}

#[test]
fn a_volume_closed_before_its_boot_is_over_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(6, 10);
    let manifest = host.import(&image);
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 0, FRAME);
    drop(volume);
    let error = host.store.attachment(&manifest.digest(), AttachmentKind::BootTrace).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NotFound);
}

#[test]
fn a_volume_that_nobody_boots_from_fetches_nothing_ahead_and_records_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(10, 30);
    let manifest = host.import(&image);
    let trace = |host: &Host| host.store.attachment(&manifest.digest(), AttachmentKind::BootTrace);
    let volume = host.quiet_volume(&manifest, &host.cache());
    check_read(&volume, &image, 7 * FRAME, 4096);
    assert!(!volume.finish_recording().unwrap());
    assert_eq!(trace(&host).unwrap_err().kind(), StoreErrorKind::NotFound);

    let volume = host.volume(&manifest, &host.cache());
    run_boot(&volume, &image, &(0..20).map(|frame| (frame * FRAME, FRAME)).collect::<Vec<_>>());
    volume.finish_recording().unwrap();
    trace(&host).unwrap();
    drop(volume);
    host.forget_cache();
    host.objects.take_requests();
    let volume = host.quiet_volume(&manifest, &host.cache());
    check_read(&volume, &image, 25 * FRAME, 4096);
    check_read(&volume, &image, 27 * FRAME, 4096);
    let requests = host.objects.take_requests();
    assert!(!requests.iter().any(|request| request.name.contains("boot-trace")), "{requests:?}");
    assert_eq!(volume.read_stats().prefetched_frames, 0);
}

#[test]
fn a_recording_ends_by_itself_with_256_mib() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    // The same few frames all over the disk: small in the store, large for the trace.
    let part = noise(7, 8);
    let image = part.repeat(280);
    let manifest = host.import(&image);
    let volume = host.volume(&manifest, &host.cache());
    for at in (0..image.len()).step_by(4 << 20) {
        check_read(&volume, &image, at, 4 << 20);
    }
    let trace = || host.store.attachment(&manifest.digest(), AttachmentKind::BootTrace);
    wait_until("the trace is kept", || trace().is_ok());
    assert!(!volume.finish_recording().unwrap());
}

#[test]
fn a_snapshot_inherits_the_trace_unless_it_has_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(8, 30);
    let parent = host.import(&image);
    let mut changed = image.clone();
    changed[3 * FRAME..4 * FRAME].copy_from_slice(&noise(80, 1));
    let child = host.import(&changed);
    assert!(!inherit_trace(&host.store, &parent.digest(), &child.digest()).unwrap(), "there is none");
    let boot: Vec<_> = (0..20).map(|frame| (frame * FRAME, FRAME)).collect();
    let volume = host.volume(&parent, &host.cache());
    run_boot(&volume, &image, &boot);
    volume.finish_recording().unwrap();
    drop(volume);
    assert!(inherit_trace(&host.store, &parent.digest(), &child.digest()).unwrap());
    assert!(!inherit_trace(&host.store, &parent.digest(), &child.digest()).unwrap(), "it has one now");
    host.forget_cache();
    let volume = host.volume(&child, &host.cache());
    wait_until("all is fetched", || volume.read_stats().prefetched_frames >= 20);
    run_boot(&volume, &changed, &boot);
    assert_eq!(volume.read_stats().demand_frames, 0);
}

#[test]
fn a_damaged_trace_and_a_store_that_fails_only_make_a_boot_slower() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(9, 64);
    let manifest: Manifest = host.import(&image);
    host.store.put_attachment(&manifest.digest(), AttachmentKind::BootTrace, b"BULBTRAC rubbish").unwrap();
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 0, 40 * FRAME);
    assert!(volume.finish_recording().unwrap(), "a trace that is no use is replaced");
    drop(volume);

    host.forget_cache();
    let packs = host.pack_bytes(&manifest);
    host.objects.take_requests();
    host.objects.set_script(move |request| match request.reads_frames(packs[&request.name]) {
        true => Answer::Fails(StoreErrorKind::Timeout),
        false => Answer::Bytes,
    });
    let volume = host.volume(&manifest, &host.cache());
    assert!(volume.read_at(&mut vec![0; 4096], 0).is_err());
    host.objects.set_script(|_| Answer::Bytes);
    check_read(&volume, &image, 0, image.len());
}
