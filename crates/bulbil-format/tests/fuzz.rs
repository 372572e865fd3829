//! Random damage never makes a reader panic, allocate without bound or leave the disk.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{Format, OpenOptions, open_disk};
use support::{Rng, content, open_bytes, peak_resident_kib, run, write_sparse};

const SEED: u64 = 0x5eed_0003;
const MUTATIONS_EACH: u64 = 1500;
/// The state that is read of images that have any but the current one.
const SNAPSHOT: &str = "kept";
/// The largest images here have less than 1 MiB; what a reader takes follows the file, not what its header says.
const MAX_RESIDENT_KIB: u64 = 100 << 10;

fn images() -> Vec<(String, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    write_sparse(&raw, &content(&mut Rng(SEED), 256 << 10));
    let options = [
        "-o compat=0.10",
        "-o cluster_size=512",
        "-o extended_l2=on,cluster_size=16k",
        "-c",
        "-c -o compat=0.10,cluster_size=4k",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=4k",
        "-c -o extended_l2=on,cluster_size=16k,compression_type=zstd",
    ];
    let make = |options: &str| {
        let args: Vec<_> = options.split(' ').collect();
        run(
            "qemu-img",
            &[&["convert", "-O", "qcow2"], &args[..], &[raw.to_str().unwrap(), image.to_str().unwrap()]].concat(),
        );
        (options.to_owned(), std::fs::read(&image).unwrap())
    };
    let mut images: Vec<_> = options.into_iter().map(make).collect();
    for options in ["-o compat=0.10", "-o cluster_size=4k"] {
        make(options);
        for name in [SNAPSHOT, "other"] {
            let path = image.to_str().unwrap();
            run("qemu-img", &["snapshot", "-c", name, path]);
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 10k 50k", path]);
        }
        images.push((format!("{options}, with snapshots"), std::fs::read(&image).unwrap()));
    }
    run("qemu-img", &["create", "-f", "qcow2", "-b", raw.to_str().unwrap(), "-F", "raw", image.to_str().unwrap()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 10k 50k", "-c", "write -z 128k 64k", image.to_str().unwrap()]);
    images.push(("with a backing file".to_owned(), std::fs::read(&image).unwrap()));
    images
}

/// Where damage does something: the header, the L1 table, the L2 tables.
fn metadata(image: &[u8]) -> Vec<usize> {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let l1 = usize::try_from(word(40)).unwrap();
    let tables = (0..2).map(|n| usize::try_from(word(l1 + 8 * n)).unwrap()).filter(|table| *table != 0);
    let mut places: Vec<usize> = (0..128).chain(l1..l1 + 64).collect();
    for table in tables {
        places.extend(table..(table + 512).min(image.len()));
    }
    let snapshots = usize::try_from(word(64)).unwrap();
    if snapshots != 0 {
        let l1 = usize::try_from(word(snapshots)).unwrap();
        let l2 = usize::try_from(word(l1)).unwrap();
        places.extend((snapshots..snapshots + 160).chain(l1..l1 + 64).chain(l2..l2 + 512));
    }
    places
}

fn damage(rng: &mut Rng, image: &mut Vec<u8>, places: &[usize]) {
    for _ in 0..=rng.below(4) {
        let at = if rng.below(4) == 0 { rng.index(image.len()) } else { places[rng.index(places.len())] };
        let value = match rng.below(4) {
            0 => 0,
            1 => 0xff,
            2 => image[at] ^ 1 << rng.below(8),
            _ => rng.next().to_le_bytes()[0],
        };
        image[at] = value;
    }
    if rng.below(20) == 0 {
        image.truncate(rng.index(image.len()));
    }
}

/// Looks at all that can be looked at; returns whether the image opened.
fn exercise(rng: &mut Rng, image: &[u8]) -> bool {
    let format = [None, Some(Format::Qcow2)][rng.index(2)];
    let snapshot =
        (image.get(64..72).is_some_and(|table| table != [0; 8]) && rng.below(2) == 0).then(|| SNAPSHOT.to_owned());
    let parent = image.get(8..16).filter(|name_offset| *name_offset != [0; 8] && rng.below(8) != 0);
    let parent = parent.map(|_| Arc::from(open_bytes(&[7; 200 << 10], Some(Format::Raw)).unwrap()));
    let options = OpenOptions { format, snapshot, parent, ..OpenOptions::default() };
    let Ok(disk) = open_disk(Arc::new(image.to_vec()), &options) else { return false };
    let size = disk.size_bytes();
    let mut end = 0;
    for extent in disk.data_extents().take(1000) {
        let Ok(extent) = extent else { break };
        assert!(extent.offset_bytes >= end && extent.len_bytes > 0);
        end = extent.end_bytes();
        assert!(end <= size);
    }
    for _ in 0..4 {
        let offset = rng.below(size);
        let len = (1 + rng.below(200_000)).min(size - offset);
        let mut buf = vec![0; usize::try_from(len).unwrap()];
        // Content may be damaged without a sign of it; what must not happen is a panic or a read past the end.
        drop(disk.read_exact_at(&mut buf, offset));
    }
    let mut buf = [0; 512];
    drop(disk.read_exact_at(&mut buf, size - 512));
    assert_eq!(disk.read_exact_at(&mut buf, size - 511).unwrap_err().code(), "out-of-range");
    true
}

#[test]
fn damaged_images_are_refused_or_read_within_bounds() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let (mut opened, mut slowest) = (0, Duration::ZERO);
    for (options, image) in images() {
        let places = metadata(&image);
        for number in 0..MUTATIONS_EACH {
            let mut damaged = image.clone();
            damage(&mut rng, &mut damaged, &places);
            let start = Instant::now();
            if exercise(&mut rng, &damaged) {
                opened += 1;
            }
            slowest = slowest.max(start.elapsed());
            assert!(start.elapsed() < Duration::from_secs(10), "{options}, mutation {number} takes too long");
        }
    }
    println!("{opened} opened, the slowest took {slowest:?}, {} KiB at most", peak_resident_kib());
    assert!(opened > 100, "the damage is too heavy to test anything");
    assert!(peak_resident_kib() < MAX_RESIDENT_KIB, "{} KiB", peak_resident_kib());
}
