//! The base cache between processes: each frame once for a host, a bound, and kills at any point.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test may panic and makes small numbers")]

mod lazy_support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::Digest;
use bulbil_testkit::{Request, Rng, ScriptedObjects};
use bulbil_volume::{BaseCache, CacheOptions};
use lazy_support::{FRAME, Host, check_disjoint, check_read, noise, open_manifest, wait_until};

const IMAGE_SEED: u64 = 11;
const IMAGE_FRAMES: usize = 300;

/// What a child process reads: set in the environment of this test binary when it is started as one.
const CHILD: &str = "BULBIL_LAZY_CHILD";

struct ChildArgs<'a> {
    directory: &'a Path,
    digest: Digest,
    seed: u64,
    max_bytes: u64,
    /// How many random reads to make, and then all of the image; for ever when 0.
    reads: u64,
}

fn start(args: &ChildArgs<'_>) -> Child {
    let value = format!(
        "{} {} {} {} {}",
        args.directory.display(),
        args.digest.to_hex(),
        args.seed,
        args.max_bytes,
        args.reads
    );
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--include-ignored", "--nocapture"])
        .env(CHILD, value)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "the other tests start it as a process of its own"]
fn child_process() {
    let Ok(value) = std::env::var(CHILD) else { return };
    let words: Vec<&str> = value.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let (directory, digest) = (Path::new(words[0]), format!("sha256:{}", words[1]).parse::<Digest>().unwrap());
    let (seed, max_bytes, reads) = (number(2), number(3), number(4));
    let objects = ScriptedObjects::logging_to(&directory.join("store"), true, &directory.join("requests"));
    objects.set_delay(Duration::from_millis(if reads == 0 { 0 } else { 2 }));
    let host = Host::with_objects(directory, objects);
    let manifest = open_manifest(&host, &digest);
    let options = match max_bytes {
        0 => CacheOptions::default(),
        bytes => CacheOptions::bounded(bytes).check_every(Duration::from_millis(50)),
    };
    let cache = Arc::new(BaseCache::open_with(&directory.join("cache"), options).unwrap());
    let volume = host.volume(&manifest, &cache);
    let image = noise(IMAGE_SEED, IMAGE_FRAMES);
    let mut rng = Rng::new(seed);
    let mut done = 0;
    while reads == 0 || done < reads {
        let at = rng.below((image.len() - 3 * FRAME) as u64) as usize;
        check_read(&volume, &image, at, 1 + rng.below(2 * FRAME as u64) as usize);
        done += 1;
    }
    check_read(&volume, &image, 0, image.len());
}

fn logged(directory: &Path) -> Vec<Request> {
    let text = std::fs::read_to_string(directory.join("requests")).unwrap();
    let parse = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        Request { name: words[0].to_owned(), offset: words[1].parse().unwrap(), len_bytes: words[2].parse().unwrap() }
    };
    text.lines().map(parse).collect()
}

#[test]
fn processes_of_a_host_fetch_each_frame_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let manifest = host.import(&noise(IMAGE_SEED, IMAGE_FRAMES));
    let args = |seed| ChildArgs { directory: dir.path(), digest: manifest.digest(), seed, max_bytes: 0, reads: 60 };
    // Two with the same order of reads, two with others.
    let children: Vec<_> = [1, 1, 2, 3].map(|seed| start(&args(seed))).into();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let requests = host.frame_requests(&manifest, logged(dir.path()));
    check_disjoint(&requests);
    let bytes: usize = requests.iter().map(|request| request.len_bytes).sum();
    assert!(bytes >= IMAGE_FRAMES * FRAME, "all of the image was fetched");
}

#[test]
fn a_process_that_dies_while_it_fetches_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(IMAGE_SEED, IMAGE_FRAMES);
    let manifest = host.import(&image);
    let cache = host.cache();
    let volume = host.volume(&manifest, &cache);
    for seed in 0..8 {
        let args = ChildArgs { directory: dir.path(), digest: manifest.digest(), seed, max_bytes: 0, reads: 1_000_000 };
        let mut child = start(&args);
        let before = logged_bytes(dir.path());
        wait_until("it fetches", || logged_bytes(dir.path()) > before || host_is_warm(&volume, &image));
        child.kill().unwrap();
        child.wait().unwrap();
        check_read(&volume, &image, seed as usize * 30 * FRAME, 30 * FRAME);
    }
    check_read(&volume, &image, 0, image.len());
}

fn logged_bytes(directory: &Path) -> u64 {
    std::fs::metadata(directory.join("requests")).map_or(0, |metadata| metadata.len())
}

fn host_is_warm(volume: &bulbil_volume::Volume, image: &[u8]) -> bool {
    bulbil_volume::BlockDevice::is_fast(volume, 0, image.len() as u64)
}

#[test]
fn a_bounded_cache_stays_bounded_under_readers_and_kills_and_never_gives_wrong_bytes() {
    let rounds = std::env::var("BULBIL_CAMPAIGN").ok().and_then(|n| n.parse().ok()).unwrap_or(6_u64);
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(IMAGE_SEED, IMAGE_FRAMES);
    // Several packs: the unit of eviction.
    let manifest = host.import(&image);
    assert!(manifest.packs().len() >= 2);
    let max_bytes = 24 << 20;
    let options = CacheOptions::bounded(max_bytes).check_every(Duration::from_millis(50));
    let cache = Arc::new(BaseCache::open_with(&dir.path().join("cache"), options).unwrap());
    let volume = host.volume(&manifest, &cache);
    let mut rng = Rng::new(5);
    for seed in 0..rounds {
        let args = |seed| ChildArgs { directory: dir.path(), digest: manifest.digest(), seed, max_bytes, reads: 0 };
        let mut children = [start(&args(seed * 2)), start(&args(seed * 2 + 1))];
        let before = logged_bytes(dir.path());
        for _ in 0..40 {
            let at = rng.below((image.len() - 3 * FRAME) as u64) as usize;
            check_read(&volume, &image, at, 1 + rng.below(2 * FRAME as u64) as usize);
        }
        wait_until("they fetch", || logged_bytes(dir.path()) > before + 4000);
        for child in &mut children {
            assert!(child.try_wait().unwrap().is_none(), "a reader has ended: wrong bytes or an error");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // Each process may pass the bound by what it writes between two looks.
        let used = cache.used_bytes().unwrap();
        assert!(used <= max_bytes + 3 * (2 << 20), "{used} bytes in round {seed}");
    }
    check_read(&volume, &image, 0, image.len());
    wait_until("the cache is within its bound", || cache.used_bytes().unwrap() <= max_bytes + (2 << 20));
    wait_until("nothing without a name is held open", || held_open_without_a_name(dir.path()) == 0);
}

/// Files of the cache that this process has open and that have lost their names.
fn held_open_without_a_name(directory: &Path) -> usize {
    let prefix = format!("{}/cache/", directory.display());
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let of_cache = |link: &std::path::PathBuf| {
        std::fs::read_link(link).is_ok_and(|target| target.display().to_string().starts_with(&prefix))
    };
    // The link shows the name that a file was made under; only the count of its names tells.
    links.filter(of_cache).filter(|link| std::fs::metadata(link).is_ok_and(|file| file.nlink() == 0)).count()
}

#[test]
fn what_was_used_last_stays_in_a_bounded_cache() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(13, 300);
    let manifest = host.import(&image);
    let options = CacheOptions::bounded(26 << 20).check_every(Duration::from_millis(20));
    let cache = Arc::new(BaseCache::open_with(&dir.path().join("cache"), options).unwrap());
    let volume = host.volume(&manifest, &cache);
    // Packs in order: the first one is the oldest when the third one comes.
    check_read(&volume, &image, 0, image.len());
    wait_until("something was evicted", || !bulbil_volume::BlockDevice::is_fast(&volume, 0, FRAME as u64));
    assert!(bulbil_volume::BlockDevice::is_fast(&volume, 299 * FRAME as u64, FRAME as u64));
    check_read(&volume, &image, 0, image.len());
}

#[test]
fn files_of_an_earlier_boot_are_not_believed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), false);
    let image = noise(14, 10);
    let manifest = host.import(&image);
    let cache = host.cache();
    check_read(&host.volume(&manifest, &cache), &image, 0, image.len());
    drop(cache);
    let frames = |dir: &Path| -> Vec<_> {
        let entries = std::fs::read_dir(dir.join("cache")).unwrap().flatten().map(|entry| entry.path());
        entries.filter(|path| path.extension().is_some_and(|e| e == "frames")).collect()
    };
    let path = frames(dir.path()).pop().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    bytes[8192..].fill(0xbb);
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::File::create(path).and_then(|mut file| std::io::Write::write_all(&mut file, bytes)).unwrap();
    };
    write(&path, &bytes);
    // Of a pack that nobody reads: it would stay for ever.
    let other = path.with_file_name("00000000000000000000000000000000.frames");
    write(&other, &bytes);
    write(&dir.path().join("cache/boot-id"), b"another boot");
    let volume = host.volume(&manifest, &host.cache());
    check_read(&volume, &image, 0, image.len());
    assert_eq!(volume.frames_fetched(), 10);
    wait_until("the stale file is gone", || !other.exists());
}

#[test]
fn a_cache_that_cannot_be_written_makes_reads_slower_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut host = Host::open(dir.path(), true);
    let image = noise(15, 40);
    let manifest = host.import(&image);
    let cache = host.cache();
    let volume = host.volume(&manifest, &cache);
    // Names that cannot be made: directories where files should be.
    for pack in manifest.packs() {
        let path = dir.path().join(format!("cache/{}.frames", pack.id));
        std::fs::create_dir_all(path.join("in-the-way")).unwrap();
    }
    check_read(&volume, &image, 0, image.len());
    host.objects.take_requests();
    for at in (0..FRAME).step_by(4096) {
        check_read(&volume, &image, at, 4096);
    }
    let requests = host.objects.take_requests();
    assert!(requests.len() <= 2, "the last frames stay in memory: {requests:?}");
}
