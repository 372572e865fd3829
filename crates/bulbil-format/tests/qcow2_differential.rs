//! Whatever `qemu-img` writes as qcow2 is read as `qemu-img` reads it: content and extents.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulbil_format::{Compression, ExtentKind, Format};
use support::{Rng, check_content, content, open_path, qemu_data_extents, run, try_run, write_sparse};

const SEED: u64 = 0x5eed_0001;

struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes raw content and converts it; returns the content and the path of the qcow2 image.
    fn convert(&self, rng: &mut Rng, size_bytes: usize, args: &[&str]) -> (Vec<u8>, PathBuf) {
        let (raw, image) = (self.path("disk.raw"), self.path("disk.qcow2"));
        let bytes = content(rng, size_bytes);
        write_sparse(&raw, &bytes);
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "qcow2"], args, &paths].concat());
        (bytes, image)
    }

    /// What `qemu-img` reads from an image.
    fn flatten(&self, image: &Path) -> Vec<u8> {
        let raw = self.path("flat.raw");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
        std::fs::read(raw).unwrap()
    }
}

fn check_image(image: &Path, expected: &[u8]) {
    let disk = open_path(image, None).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(disk.format(), Format::Qcow2);
    let data = check_content(&*disk, expected);
    assert_eq!(data, qemu_data_extents(image), "extents");
    let data_bytes: u64 = data.iter().map(|(_, len)| len).sum();
    assert_eq!(disk.info().data_bytes, Some(data_bytes));
    assert!(open_path(image, Some(Format::Qcow2)).is_ok());
}

fn check_converted(name: &str, size_bytes: usize, args: &[&str]) {
    println!("{name}: seed {SEED:#x}");
    let images = Images::new();
    let (expected, image) = images.convert(&mut Rng(SEED ^ size_bytes as u64), size_bytes, args);
    check_image(&image, &expected);
}

#[test]
fn version_2_is_read() {
    check_converted("v2", (9 << 20) + 3 * 512, &["-o", "compat=0.10"]);
    check_converted("v2 zlib", (9 << 20) + 512, &["-c", "-o", "compat=0.10"]);
}

#[test]
fn every_cluster_size_is_read() {
    for bits in 9..=21 {
        let size = (1 << 20) + 13 * 512 + (2 << bits);
        check_converted("v3", size, &["-o", &format!("cluster_size={}", 1 << bits)]);
    }
}

#[test]
fn zlib_clusters_are_read() {
    for (cluster, size) in [("512", 1 << 20), ("4k", 3 << 20), ("64k", (7 << 20) + 5120), ("2M", (11 << 20) + 512)] {
        check_converted("zlib", size, &["-c", "-o", &format!("cluster_size={cluster},compression_type=zlib")]);
    }
}

#[test]
fn zstd_clusters_are_read() {
    for (cluster, size) in [("512", 1 << 20), ("4k", 3 << 20), ("64k", (17 << 20) + 5120), ("2M", (41 << 20) + 512)] {
        check_converted("zstd", size, &["-c", "-o", &format!("cluster_size={cluster},compression_type=zstd")]);
    }
}

#[test]
fn odd_options_are_read() {
    for options in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=metadata,compat=0.10",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
    ] {
        println!("{options}");
        check_converted(options, (5 << 20) + 1536, &["-o", options]);
    }
}

#[test]
fn extended_l2_is_read() {
    for options in ["extended_l2=on,cluster_size=16k", "extended_l2=on", "extended_l2=on,cluster_size=2M"] {
        check_converted(options, (9 << 20) + 1536, &["-o", options]);
        check_converted(options, (9 << 20) + 1536, &["-c", "-o", &format!("{options},compression_type=zstd")]);
    }
}

/// Random writes, zero writes and discards of any alignment, by QEMU.
fn scribble(rng: &mut Rng, image: &Path, size_bytes: u64, count: usize) {
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned(), "-d".to_owned(), "unmap".to_owned()];
    for _ in 0..count {
        let offset = rng.below(size_bytes / 512) * 512;
        let len = (1 + rng.below(200)) * 512;
        let len = len.min(size_bytes - offset);
        let command = match rng.below(6) {
            0 => format!("discard {offset} {len}"),
            1 => format!("write -z {offset} {len}"),
            2 => format!("write -z -u {offset} {len}"),
            _ => format!("write -P {} {offset} {len}", 1 + rng.below(255)),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(image.to_str().unwrap().to_owned());
    run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn images_written_to_by_a_guest_are_read() {
    for (seed, options) in (SEED..).zip([
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "preallocation=metadata",
    ]) {
        println!("{options}: seed {seed:#x}");
        let images = Images::new();
        let image = images.path("disk.qcow2");
        run("qemu-img", &["create", "-f", "qcow2", "-o", options, image.to_str().unwrap(), "5000704"]);
        scribble(&mut Rng(seed), &image, 5_000_704, 60);
        check_image(&image, &images.flatten(&image));
    }
}

#[test]
fn the_current_state_of_an_image_with_snapshots_is_read() {
    for (seed, options) in (SEED..).zip(["compat=0.10", "compat=1.1", "cluster_size=4k", "extended_l2=on"]) {
        println!("{options}: seed {seed:#x}");
        let images = Images::new();
        let mut rng = Rng(seed);
        let (before, image) = images.convert(&mut rng, 4 << 20, &["-o", options]);
        for name in ["one", "two"] {
            run("qemu-img", &["snapshot", "-c", name, image.to_str().unwrap()]);
            scribble(&mut rng, &image, 4 << 20, 20);
        }
        let after = images.flatten(&image);
        assert!(before != after);
        check_image(&image, &after);
        let info = open_path(&image, None).unwrap().info();
        assert_eq!(info.snapshots.len(), 2);
    }
}

#[test]
fn a_compressed_image_that_was_written_to_is_read() {
    for (seed, kind) in (SEED..).zip(["zlib", "zstd"]) {
        println!("{kind}: seed {seed:#x}");
        let images = Images::new();
        let mut rng = Rng(seed);
        let (_, image) = images.convert(&mut rng, 6 << 20, &["-c", "-o", &format!("compression_type={kind}")]);
        scribble(&mut rng, &image, 6 << 20, 20);
        check_image(&image, &images.flatten(&image));
    }
}

#[test]
fn an_image_that_was_not_closed_is_read() {
    let images = Images::new();
    let image = images.path("disk.qcow2");
    let path = image.to_str().unwrap();
    run("qemu-img", &["create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M"]);
    let output = try_run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "flush", "-c", "abort", path]);
    assert!(!output.status.success());
    let disk = open_path(&image, None).unwrap();
    assert!(disk.info().notes.iter().any(|note| note.contains("not closed cleanly")));
    let mut expected = vec![0; 4 << 20];
    expected[1 << 20..(1 << 20) + (100 << 10)].fill(7);
    check_content(&*disk, &expected);
}

#[test]
fn details_are_told() {
    let images = Images::new();
    let options = "cluster_size=2M,compression_type=zstd";
    let (expected, image) = images.convert(&mut Rng(SEED), 8 << 20, &["-c", "-o", options]);
    let info = open_path(&image, None).unwrap().info();
    assert_eq!((info.format, info.size_bytes), (Format::Qcow2, expected.len() as u64));
    assert_eq!(info.file_bytes, std::fs::metadata(&image).unwrap().len());
    assert_eq!(info.variant.as_deref(), Some("version 3"));
    assert_eq!((info.cluster_bytes, info.compression), (Some(2 << 20), Some(Compression::Zstd)));
    assert!(info.compressed_clusters > 0 && info.notes.is_empty() && info.snapshots.is_empty());
}

#[test]
fn an_empty_disk_of_16_tib_costs_nothing() {
    let images = Images::new();
    let image = images.path("disk.qcow2");
    run("qemu-img", &["create", "-f", "qcow2", image.to_str().unwrap(), "16T"]);
    let start = Instant::now();
    let disk = open_path(&image, None).unwrap();
    let extent = disk.next_extent(0).unwrap().unwrap();
    assert_eq!((extent.offset_bytes, extent.len_bytes, extent.kind), (0, 16 << 40, ExtentKind::Zero));
    assert_eq!(disk.data_extents().count(), 0);
    // Milliseconds; the rest is for a busy machine.
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());

    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 1 15T 1k", "-c", "write -P 2 17592186043904 512", image.to_str().unwrap()],
    );
    let start = Instant::now();
    let disk = open_path(&image, None).unwrap();
    let extents: Vec<_> =
        disk.data_extents().map(|extent| extent.unwrap()).map(|e| (e.offset_bytes, e.len_bytes)).collect();
    assert_eq!(extents, [(15 << 40, 65536), ((16 << 40) - 65536, 65536)]);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn many_threads_read_halves_of_large_compressed_clusters() {
    println!("seed {SEED:#x}");
    let images = Images::new();
    let options = "cluster_size=2M,compression_type=zstd";
    let (expected, image) = images.convert(&mut Rng(SEED), 24 << 20, &["-c", "-o", options]);
    let disk = open_path(&image, None).unwrap();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut piece = vec![0; 1 << 20];
                loop {
                    let start = next.fetch_add(1 << 20, std::sync::atomic::Ordering::Relaxed);
                    let Some(expected) = expected.get(start..start + (1 << 20)) else { break };
                    disk.read_exact_at(&mut piece, start as u64).unwrap();
                    assert!(piece == expected);
                }
            });
        }
    });
}
