//! Reading from a store that is slow, fails, lies or changes below a volume.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod lazy_support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use bulbil_store::StoreErrorKind;
use bulbil_testkit::{Answer, Rng};
use bulbil_volume::{BlockDevice as _, BlockErrorKind, WarmEnd, WarmObserver, warm};
use lazy_support::{FRAME, Host, check_disjoint, check_read, noise, wait_until};

#[test]
fn ten_volumes_that_read_at_once_fetch_each_frame_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(1, 64);
    let manifest = host.import(&image);
    host.objects.set_delay(Duration::from_millis(3));
    let cache = host.cache();
    let volumes: Vec<_> = (0..10).map(|_| host.volume(&manifest, &cache)).collect();
    let barrier = Barrier::new(10);
    std::thread::scope(|scope| {
        for (seed, volume) in volumes.iter().enumerate() {
            let (image, barrier) = (&image, &barrier);
            scope.spawn(move || {
                let mut rng = Rng::new(seed as u64 / 2 + 1);
                barrier.wait();
                for _ in 0..40 {
                    let frame = rng.below(64) as usize;
                    check_read(volume, image, frame * FRAME + 4096, 8192);
                }
                check_read(volume, image, 0, image.len());
            });
        }
    });
    let all = host.objects.take_requests();
    let requests = host.frame_requests(&manifest, all.clone());
    check_disjoint(&requests);
    assert_eq!(all.len() - requests.len(), manifest.packs().len(), "each footer once");
    let fetched: u64 = volumes.iter().map(bulbil_volume::Volume::frames_fetched).sum();
    assert_eq!(fetched, 64);
    assert!(host.objects.most_running() <= 16 + 10, "{} requests at once", host.objects.most_running());
}

#[test]
fn a_read_of_many_frames_makes_few_requests_in_parallel() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(2, 64);
    let manifest = host.import(&image);
    host.objects.set_delay(Duration::from_millis(20));
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 0, 32 * FRAME);
    let requests = host.frame_requests(&manifest, host.objects.take_requests());
    assert_eq!(requests.len(), 4, "8 frames of 128 KiB in each: {requests:?}");
    assert!(requests.iter().all(|request| request.len_bytes <= 1 << 20));
    assert!(host.objects.most_running() >= 2);
    assert_eq!((volume.read_stats().requests, volume.read_stats().demand_frames), (4, 32));
}

#[test]
fn a_footer_that_is_longer_than_usual_is_read_without_reading_a_byte_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    // Blocks that differ and compress well: many frames in one pack.
    let image: Vec<u8> = Rng::new(11).bytes(520 * FRAME / 128).chunks(32).flat_map(|part| part.repeat(128)).collect();
    let manifest = host.import(&image);
    assert_eq!((manifest.packs().len(), image.len()), (1, 520 * FRAME));
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 100 * FRAME, FRAME);
    let requests = host.objects.take_requests();
    let of_packs: Vec<_> = requests.into_iter().filter(|request| request.name.starts_with("packs/")).collect();
    check_disjoint(&of_packs);
    assert_eq!(of_packs.len(), 3, "two for the footer, one for the frame: {of_packs:?}");
}

#[test]
fn a_sequential_reader_finds_what_was_read_ahead_and_random_reads_fetch_nothing_else() {
    for remote in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::open(dir.path(), remote);
        let image = noise(3, 128);
        let manifest = host.import(&image);
        // On a busy machine a reader that never waits overtakes the threads that read ahead.
        host.objects.set_delay(Duration::from_millis(4));
        let volume = host.volume(&manifest, &host.cache());
        for at in (0..image.len()).step_by(FRAME / 2) {
            check_read(&volume, &image, at, FRAME / 2);
        }
        let stats = volume.read_stats();
        assert_eq!(stats.demand_frames + stats.prefetched_frames, 128, "{stats:?}");
        assert!(stats.prefetched_frames > 32 && stats.wasted_frames == 0, "{stats:?}");
        check_disjoint(&host.frame_requests(&manifest, host.objects.take_requests()));

        host.forget_cache();
        let volume = host.volume(&manifest, &host.cache());
        let mut rng = Rng::new(9);
        let mut frames: Vec<usize> = (0..32).map(|i| i * 4 + rng.below(2) as usize).collect();
        (1..frames.len()).rev().for_each(|i| frames.swap(i, rng.below(i as u64 + 1) as usize));
        for frame in frames {
            check_read(&volume, &image, frame * FRAME, 4096);
        }
        let stats = volume.read_stats();
        assert!(stats.demand_frames == 32 && stats.prefetched_frames <= 6, "{stats:?}");
    }
}

#[test]
fn a_store_that_fails_gives_errors_and_is_asked_again_by_the_next_read() {
    for kind in [StoreErrorKind::Timeout, StoreErrorKind::Io, StoreErrorKind::NotFound] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::open(dir.path(), true);
        let image = noise(4, 16);
        let manifest = host.import(&image);
        let volume = host.volume(&manifest, &host.cache());
        check_read(&volume, &image, 0, 4096);
        host.objects.set_delay(Duration::from_millis(10));
        host.objects.set_script(move |_| Answer::Fails(kind));
        // More readers than threads, all of the same frames: none of them may be left behind.
        std::thread::scope(|scope| {
            for _ in 0..24 {
                scope.spawn(|| {
                    let mut buf = vec![0; 8 * FRAME];
                    let error = volume.read_at(&mut buf, 4 * FRAME as u64).unwrap_err();
                    assert_eq!(error.kind(), BlockErrorKind::Io);
                });
            }
        });
        assert!(host.objects.most_running() <= 16 + 24);
        check_read(&volume, &image, 4096, 4096);
        host.objects.set_script(|_| Answer::Bytes);
        check_read(&volume, &image, 0, image.len());
    }
}

#[test]
fn a_frame_damaged_on_the_way_is_read_again_and_one_that_stays_damaged_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(5, 24);
    let manifest = host.import(&image);
    let packs = host.pack_bytes(&manifest);
    let volume = host.volume(&manifest, &host.cache());
    for of_frames in [false, true] {
        let (packs, mut left) = (packs.clone(), 1);
        host.objects.set_script(move |request| {
            let flip = request.reads_frames(packs[&request.name]) == of_frames && left > 0;
            left -= i32::from(flip);
            if flip { Answer::Flipped } else { Answer::Bytes }
        });
        check_read(&volume, &image, usize::from(of_frames) * 8 * FRAME, 8 * FRAME);
    }

    host.objects.set_script(move |r| if r.reads_frames(packs[&r.name]) { Answer::Flipped } else { Answer::Bytes });
    for _ in 0..2 {
        let mut buf = vec![0; 4096];
        assert_eq!(volume.read_at(&mut buf, 20 * FRAME as u64).unwrap_err().kind(), BlockErrorKind::Io);
    }
    check_read(&volume, &image, 7 * FRAME, 4096);
    host.objects.set_script(|_| Answer::Bytes);
    check_read(&volume, &image, 0, image.len());
}

#[test]
fn of_several_frames_fetched_together_only_the_damaged_one_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(6, 8);
    let manifest = host.import(&image);
    let pack = dir.path().join("store").join(host.pack_bytes(&manifest).keys().next().unwrap());
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[32 + 3 * FRAME + 77] ^= 1;
    std::fs::File::create(&pack).and_then(|mut file| std::io::Write::write_all(&mut file, &bytes)).unwrap();
    let volume = host.volume(&manifest, &host.cache());
    assert!(volume.read_at(&mut vec![0; 8 * FRAME], 0).is_err());
    for frame in [0, 1, 2, 4, 5, 6, 7] {
        check_read(&volume, &image, frame * FRAME, FRAME);
    }
    assert!(volume.read_at(&mut vec![0; 512], 3 * FRAME as u64).is_err());
}

#[test]
fn a_volume_goes_on_when_its_image_moves_to_other_packs() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(7, 40);
    let manifest = host.import(&image);
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 0, 2 * FRAME);

    // The same content in other packs, as a repack leaves it: the new manifest first, then the packs go.
    let other_dir = tempfile::tempdir().unwrap();
    let mut other = Host::open(other_dir.path(), true);
    let shifted = [noise(70, 3), image.clone()].concat();
    other.import(&shifted);
    let moved = other.import(&image);
    assert_eq!(moved.digest(), manifest.digest());
    assert_ne!(moved, manifest);
    let to = |name: &str| dir.path().join("store").join(name);
    for name in other.pack_bytes(&moved).keys() {
        std::fs::create_dir_all(to(name).parent().unwrap()).unwrap();
        std::fs::copy(other_dir.path().join("store").join(name), to(name)).unwrap();
    }
    let directory = format!("manifests/{}", manifest.digest().to_hex());
    let only_file =
        |directory: std::path::PathBuf| std::fs::read_dir(directory).unwrap().next().unwrap().unwrap().path();
    let (old, new) = (only_file(to(&directory)), only_file(other_dir.path().join("store").join(&directory)));
    let name = old.file_stem().unwrap().to_str().unwrap();
    let (owner, edition) = name.split_once('-').unwrap();
    let edition = u32::from_str_radix(edition, 16).unwrap() + 1;
    std::fs::copy(new, to(&format!("{directory}/{owner}-{edition:08x}.manifest"))).unwrap();
    let stop = AtomicBool::new(false);
    let reads = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (volume, image, stop, reads) = (&volume, &image, &stop, &reads);
            scope.spawn(move || {
                let mut rng = Rng::new(seed + 1);
                while !stop.load(Ordering::Relaxed) {
                    check_read(volume, image, rng.below(39) as usize * FRAME + 1000, FRAME);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        wait_until("they read", || reads.load(Ordering::Relaxed) > 10);
        std::fs::remove_file(&old).unwrap();
        for name in host.pack_bytes(&manifest).keys() {
            std::fs::remove_file(to(name)).unwrap();
        }
        let seen = reads.load(Ordering::Relaxed);
        wait_until("they read on", || reads.load(Ordering::Relaxed) > seen + 100);
        stop.store(true, Ordering::Relaxed);
    });
    check_read(&volume, &image, 0, image.len());
    assert!(volume.is_fast(0, image.len() as u64));
}

#[derive(Default)]
struct StopAfter {
    frames: Option<u64>,
    done: std::sync::Mutex<u64>,
}

impl WarmObserver for StopAfter {
    fn progress(&self, done_frames: u64, _total_frames: u64) {
        let mut done = self.done.lock().unwrap();
        *done = done_frames.max(*done);
    }

    fn is_cancelled(&self) -> bool {
        self.frames.is_some_and(|frames| *self.done.lock().unwrap() >= frames)
    }
}

#[test]
fn warming_fetches_everything_once_in_large_reads_and_can_be_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(8, 200);
    let manifest = host.import(&image);
    let cache = host.cache();
    let stopped =
        warm(&host.store, &cache, &manifest, &StopAfter { frames: Some(20), ..StopAfter::default() }).unwrap();
    assert_eq!(stopped.end, WarmEnd::Cancelled);
    assert!((20..200).contains(&stopped.fetched_frames), "{stopped:?}");
    let rest = warm(&host.store, &cache, &manifest, &StopAfter::default()).unwrap();
    assert_eq!((rest.end, rest.total_frames), (WarmEnd::Complete, 200));
    assert_eq!((rest.present_frames, rest.fetched_frames), (stopped.fetched_frames, 200 - stopped.fetched_frames));
    let requests = host.frame_requests(&manifest, host.objects.take_requests());
    check_disjoint(&requests);
    assert!(requests.len() < 200 / 7 + 10, "{} requests", requests.len());
    let volume = host.volume(&manifest, &cache);
    check_read(&volume, &image, 0, image.len());
    assert_eq!(volume.frames_fetched(), 0);
    assert!(host.objects.take_requests().is_empty());
    let again = warm(&host.store, &cache, &manifest, &StopAfter::default()).unwrap();
    assert_eq!((again.end, again.requests), (WarmEnd::Complete, 0));
}

#[test]
fn warming_stops_where_the_cache_would_evict() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(9, 100);
    let manifest = host.import(&image);
    let options = bulbil_volume::CacheOptions::bounded(50 * FRAME as u64);
    let cache = Arc::new(bulbil_volume::BaseCache::open_with(&dir.path().join("cache"), options).unwrap());
    let report = warm(&host.store, &cache, &manifest, &StopAfter::default()).unwrap();
    assert_eq!((report.end, report.fetched_frames, report.total_frames), (WarmEnd::CacheFull, 45, 100));
    assert!(cache.used_bytes().unwrap() <= 50 * FRAME as u64);
}

#[test]
fn a_store_that_fails_ends_warming() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let manifest = host.import(&noise(10, 100));
    let packs = host.pack_bytes(&manifest);
    host.objects.set_script(move |request| match request.reads_frames(packs[&request.name]) {
        true => Answer::Fails(StoreErrorKind::Timeout),
        false => Answer::Bytes,
    });
    let error = warm(&host.store, &host.cache(), &manifest, &StopAfter::default()).unwrap_err();
    assert_eq!(error.kind(), bulbil_volume::VolumeErrorKind::Io);
    assert!(host.objects.take_requests().len() <= 20);
}
