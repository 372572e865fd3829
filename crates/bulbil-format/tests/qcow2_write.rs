//! Written qcow2 images hold what they should, for QEMU, for another reader and for this crate.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use bulbil_format::{
    BackingFile, Compression, ConvertError, DiskContent, Extent, ExtentKind, Format, FormatError, Identity, NoObserver,
    Qcow2Options, Target, convert,
};
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, qcow2::Qcow2};
use support::{Rng, check_content, content, open_path, run, write_sparse};

const SEED: u64 = 0x5eed_0006;
const IDENTITY: Identity = Identity { uuid: [7; 16], created_unix_s: 1_700_000_000 };
const CODECS: [Option<Compression>; 3] = [None, Some(Compression::Zlib), Some(Compression::Zstd)];

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Writes a disk to `disk.raw` and `disk.qcow2`; returns the length of the latter.
    fn write(&self, disk: &[u8], cluster_bytes: u64, compression: Option<Compression>) -> u64 {
        write_sparse(&self.path("disk.raw"), disk);
        let source = open_path(&self.path("disk.raw"), Some(Format::Raw)).unwrap();
        let file = File::create(self.path("disk.qcow2")).unwrap();
        let options = Qcow2Options { cluster_bytes, compression, backing: None };
        convert(&*source, &file, &Target::Qcow2(options), &IDENTITY, &NoObserver).unwrap();
        file.metadata().unwrap().len()
    }

    /// Has the image read by everybody. `qemu-img check` fails for errors and for leaked clusters alike.
    fn check(&self, disk: &[u8], compression: Option<Compression>) {
        let (raw, image) = (self.text("disk.raw"), self.text("disk.qcow2"));
        run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
        run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, &image]);
        let written = open_path(&self.path("disk.qcow2"), None).unwrap();
        check_content(&*written, disk);
        assert!(compression.is_none() || written.info().compression == compression);
        if compression != Some(Compression::Zstd) {
            self.check_with_imago(disk);
        }
    }

    fn check_with_imago(&self, disk: &[u8]) {
        let image = Qcow2::<imago::file::File>::builder_path(self.path("disk.qcow2"));
        let image = FormatAccess::new(image.open(PermissiveImplicitOpenGate::default()).unwrap());
        assert_eq!(image.size(), disk.len() as u64);
        let mut bytes = vec![0xee; disk.len()];
        image.read(bytes.as_mut_slice(), 0).unwrap();
        assert!(bytes == disk, "another reader finds other content");
    }
}

#[test]
fn every_cluster_size_is_written_in_every_way() {
    println!("seed {SEED:#x}");
    let files = Files::new();
    for bits in 9..=21 {
        for compression in CODECS {
            println!("clusters of 2^{bits}, {compression:?}");
            let disk = content(&mut Rng(SEED ^ bits), (1 << 20) + 13 * 512 + (2 << bits.min(20)));
            files.write(&disk, 1 << bits, compression);
            files.check(&disk, compression);
        }
    }
}

#[test]
fn empty_dense_small_and_odd_disks_are_written() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let files = Files::new();
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(1 << 20).collect();
    let mut end = vec![0; (3 << 20) + 512];
    *end.last_mut().unwrap() = 1;
    for disk in [vec![0; 512], vec![7; 512], vec![0; 3 << 20], vec![7; (3 << 20) + 512], noise, end] {
        for compression in CODECS {
            for cluster_bytes in [512, 64 << 10] {
                files.write(&disk, cluster_bytes, compression);
                files.check(&disk, compression);
            }
        }
    }
}

#[test]
fn zeros_take_no_room_and_noise_is_stored_as_it_is() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let files = Files::new();
    for compression in CODECS {
        let empty = files.write(&vec![0; 64 << 20], 64 << 10, compression);
        assert_eq!(empty, 4 << 16, "header, L1 table, refcounts, their table");
        let noise: Vec<u8> = std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(4 << 20).collect();
        let len_bytes = files.write(&noise, 64 << 10, compression);
        assert_eq!(len_bytes, empty + (4 << 20) + (1 << 16), "and an L2 table");
        assert_eq!(open_path(&files.path("disk.qcow2"), None).unwrap().info().compressed_clusters, 0);
    }
}

#[test]
fn compressed_images_are_about_as_large_as_those_of_qemu() {
    println!("seed {SEED:#x}");
    let files = Files::new();
    // Text of many lines, as the content of files is.
    let mut rng = Rng(SEED);
    let lines = std::iter::repeat_with(|| format!("{:x} {} of {}\n", rng.next() >> 40, rng.below(999), rng.below(9)));
    let mut disk = lines.take(500_000).collect::<String>().into_bytes();
    disk.truncate(disk.len() / 512 * 512);
    for compression in [Compression::Zlib, Compression::Zstd] {
        let len_bytes = files.write(&disk, 64 << 10, Some(compression));
        let kind = format!("compression_type={compression}");
        let theirs = files.text("theirs.qcow2");
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", &kind, &files.text("disk.raw"), &theirs]);
        let theirs = std::fs::metadata(theirs).unwrap().len();
        println!("{compression}: {len_bytes} bytes, by qemu-img {theirs}");
        // QEMU ends the file within its last cluster. With zstd we take a quicker level.
        let percent = if compression == Compression::Zstd { 103 } else { 100 };
        let most = theirs.next_multiple_of(64 << 10) * percent / 100;
        assert!(len_bytes <= most, "{len_bytes} bytes, by qemu-img {theirs}");
    }
}

#[test]
fn a_cluster_that_compresses_to_nearly_nothing_leaves_the_image_readable() {
    // A thousand clusters share each host cluster.
    let files = Files::new();
    let disk = vec![7; 16 << 20];
    for cluster_bytes in [64 << 10, 2 << 20] {
        for compression in [Compression::Zlib, Compression::Zstd] {
            files.write(&disk, cluster_bytes, Some(compression));
            files.check(&disk, Some(compression));
        }
    }
}

#[test]
fn an_image_written_over_by_qemu_stays_sound() {
    let files = Files::new();
    for compression in CODECS {
        let disk = content(&mut Rng(SEED), 4 << 20);
        files.write(&disk, 64 << 10, compression);
        let image = files.text("disk.qcow2");
        for command in ["write -P 5 100k 300k", "write -z 1M 1M", "discard 3M 512k", "write -P 6 3M 1k"] {
            run("qemu-io", &["-f", "qcow2", "-c", command, &image]);
        }
        run("qemu-img", &["snapshot", "-c", "kept", &image]);
        run("qemu-img", &["resize", "-q", "-f", "qcow2", &image, "100G"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 99G 300k", &image]);
        run("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
    }
}

/// A disk of which only one sector has content.
#[derive(Debug)]
struct Sparse {
    size_bytes: u64,
    at: u64,
}

impl DiskContent for Sparse {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        for (offset, byte) in (offset_bytes..).zip(buf) {
            *byte = u8::from(offset / 512 == self.at / 512);
        }
        Ok(())
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let end = self.at + 512;
        let (end, kind) = match offset_bytes {
            _ if offset_bytes >= self.size_bytes => return Ok(None),
            _ if offset_bytes < self.at => (self.at, ExtentKind::Zero),
            _ if offset_bytes < end => (end, ExtentKind::Data),
            _ => (self.size_bytes, ExtentKind::Zero),
        };
        Ok(Some(Extent { offset_bytes, len_bytes: end - offset_bytes, kind }))
    }
}

#[test]
fn a_sparse_disk_of_64_tib_is_quick() {
    let files = Files::new();
    let source = Sparse { size_bytes: 64 << 40, at: (63 << 40) + 512 };
    for cluster_bytes in [16 << 10, 64 << 10, 2 << 20] {
        let start = std::time::Instant::now();
        let file = File::create(files.path("disk.qcow2")).unwrap();
        let options = Qcow2Options { cluster_bytes, ..Qcow2Options::default() };
        convert(&source, &file, &Target::Qcow2(options), &IDENTITY, &NoObserver).unwrap();
        assert!(start.elapsed().as_secs() < 3, "{:?}", start.elapsed());
        run("qemu-img", &["check", "-q", "-f", "qcow2", &files.text("disk.qcow2")]);
        let written = open_path(&files.path("disk.qcow2"), None).unwrap();
        let extents: Vec<_> = written.data_extents().map(|e| e.unwrap().offset_bytes).collect();
        assert_eq!(extents, [63 << 40]);
    }
}

#[track_caller]
fn check_unsupported(size_bytes: u64, options: Qcow2Options, message: &str) {
    let file = tempfile::tempfile().unwrap();
    let source = Sparse { size_bytes, at: 0 };
    let error = convert(&source, &file, &Target::Qcow2(options), &IDENTITY, &NoObserver).unwrap_err();
    assert!(matches!(error, ConvertError::Unsupported { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("unsupported-target: {message}"));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn what_qcow2_cannot_hold_is_refused_before_anything_is_written() {
    let clusters = |cluster_bytes| Qcow2Options { cluster_bytes, ..Qcow2Options::default() };
    let message = "a qcow2 disk of 70368744177664 bytes needs clusters of at least 16384 bytes";
    check_unsupported(64 << 40, clusters(8192), message);
    let message = "a qcow2 disk of 137438953472 bytes needs clusters of at least 1024 bytes";
    check_unsupported(128 << 30, clusters(512), message);
    for cluster_bytes in [0, 1, 256, 96 << 10, 4 << 20, u64::MAX] {
        let message = format!("a qcow2 cluster of {cluster_bytes} bytes: use a power of two from 512 to 2097152");
        check_unsupported(1 << 20, clusters(cluster_bytes), &message);
    }
    let backed = |name: String, cluster_bytes| {
        let content: Arc<dyn DiskContent> = Arc::new(Sparse { size_bytes: 512, at: 0 });
        let backing = Some(BackingFile { name, format: Format::Raw, content });
        Qcow2Options { cluster_bytes, backing, ..Qcow2Options::default() }
    };
    let message = "the name of a backing file has 1 to 1023 bytes";
    check_unsupported(1 << 20, backed(String::new(), 65536), message);
    check_unsupported(1 << 20, backed("x".repeat(1024), 65536), message);
    let message = "the name of the backing file does not fit in the first cluster";
    check_unsupported(1 << 20, backed("x".repeat(400), 512), message);
}

#[test]
fn the_longest_name_of_a_backing_file_is_found_by_qemu() {
    let files = Files::new();
    for format in Format::ALL {
        let content: Arc<dyn DiskContent> = Arc::new(Sparse { size_bytes: 1 << 20, at: 0 });
        let backing = Some(BackingFile { name: "n".repeat(1023), format: *format, content });
        let file = File::create(files.path("disk.qcow2")).unwrap();
        let target =
            Target::Qcow2(Qcow2Options { backing, compression: Some(Compression::Zstd), ..Default::default() });
        convert(&Sparse { size_bytes: 1 << 20, at: 0 }, &file, &target, &IDENTITY, &NoObserver).unwrap();
        let info = run("qemu-img", &["info", "-f", "qcow2", &files.text("disk.qcow2")]);
        assert!(info.contains(&format!("backing file: {}", "n".repeat(1023))), "{info}");
        let name = if *format == Format::Vhd { "vpc" } else { format.as_str() };
        assert!(info.contains(&format!("backing file format: {name}\n")), "{info}");
    }
}
