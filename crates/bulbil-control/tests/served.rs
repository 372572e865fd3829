//! What an instance is given is what the file held: every format is imported, and a volume over it
//! is served and compared by QEMU. Needs `qemu-img`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::io::Write as _;
use std::path::PathBuf;

use bulbil_control::ImageRecord;
use support::Host;
use support::disks::{self, assert_served_is, run, write_sparse};

const SEED: u64 = 0x5eed_0011;

/// No multiple of a block, a frame or a cluster.
const DISK_BYTES: usize = (20 << 20) + 3 * 512;

/// How each qcow2 image is made of the raw one.
const QCOW2: &[(&str, &[&str])] = &[
    ("v2", &["-o", "compat=0.10"]),
    ("v2-zlib", &["-c", "-o", "compat=0.10"]),
    ("v3", &["-o", "compat=1.1"]),
    ("zlib", &["-c", "-o", "compression_type=zlib"]),
    ("zstd", &["-c", "-o", "compression_type=zstd"]),
    ("clusters-of-2m", &["-o", "cluster_size=2M"]),
    ("clusters-of-2m-zstd", &["-c", "-o", "cluster_size=2M,compression_type=zstd"]),
    ("clusters-of-512", &["-o", "cluster_size=512"]),
    ("extended-l2", &["-o", "extended_l2=on"]),
    ("extended-l2-zstd", &["-c", "-o", "extended_l2=on,compression_type=zstd"]),
];

/// How each image of another format is made of the raw one: its name, QEMU's and ours for the format, and options.
const OTHERS: &[(&str, &str, &str, &[&str])] = &[
    ("vhd-fixed", "vpc", "vhd", &["-o", "subformat=fixed,force_size=on"]),
    ("vhd-dynamic", "vpc", "vhd", &["-o", "subformat=dynamic,force_size=on"]),
    ("vhdx-dynamic", "vhdx", "vhdx", &["-o", "subformat=dynamic"]),
    ("vhdx-fixed", "vhdx", "vhdx", &["-o", "subformat=fixed"]),
    ("vhdx-1m", "vhdx", "vhdx", &["-o", "block_size=1M"]),
    ("vmdk-sparse", "vmdk", "vmdk", &["-o", "subformat=monolithicSparse"]),
    ("vmdk-stream", "vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
    ("vmdk-compat6", "vmdk", "vmdk", &["-o", "compat6=on,adapter_type=lsilogic"]),
    ("vdi", "vdi", "vdi", &[]),
    ("vdi-static", "vdi", "vdi", &["-o", "static=on"]),
];

/// Programs that compress whole files, and the files they are given.
const PACKED: &[(&str, &str)] = &[("raw", "gzip"), ("raw", "xz"), ("v3", "gzip"), ("vmdk-sparse", "xz")];

struct Sources {
    dir: tempfile::TempDir,
}

impl Sources {
    /// Makes one disk in every format.
    fn new() -> (Self, Vec<(String, PathBuf, &'static str)>) {
        let sources = Self { dir: tempfile::tempdir().unwrap() };
        let raw = sources.path("raw");
        write_sparse(&raw, &disks::content(SEED, DISK_BYTES));
        let mut all = vec![("raw".to_owned(), raw, "raw")];
        for (name, args) in QCOW2 {
            all.push(((*name).to_owned(), sources.convert(name, args), "qcow2"));
        }
        all.push(("snapshots".to_owned(), sources.with_snapshots(), "qcow2"));
        for (name, qemu_format, format, args) in OTHERS {
            all.push(((*name).to_owned(), sources.convert_to(qemu_format, name, args), *format));
        }
        (sources, all)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn convert(&self, name: &str, args: &[&str]) -> PathBuf {
        self.convert_to("qcow2", name, args)
    }

    fn convert_to(&self, qemu_format: &str, name: &str, args: &[&str]) -> PathBuf {
        let (raw, image) = (self.path("raw"), self.path(name));
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", qemu_format], args, &paths].concat());
        image
    }

    /// Compresses one of the images as a whole.
    fn pack(&self, name: &str, program: &str) -> PathBuf {
        let packed = self.path(&format!("{name}.{program}"));
        let output = disks::try_run(program, &["--stdout", self.path(name).to_str().unwrap()]);
        assert!(output.status.success(), "{program} {name}");
        std::fs::File::create(&packed).and_then(|mut file| file.write_all(&output.stdout)).unwrap();
        packed
    }

    /// An image whose snapshots hold other content than its current state.
    fn with_snapshots(&self) -> PathBuf {
        let image = self.convert("snapshots", &[]);
        let (raw, path) = (self.path("raw"), image.to_str().unwrap());
        for (name, command) in [("one", "write -P 0xaa 1M 3M"), ("two", "write -z -u 5M 4M")] {
            run("qemu-io", &["-f", "qcow2", "-c", command, path]);
            run("qemu-img", &["snapshot", "-c", name, path]);
        }
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path]);
        image
    }
}

fn check_record(record: &ImageRecord, name: &str, format: &str) {
    assert_eq!((record.name.as_str(), record.source_format.as_str()), (name, format));
    assert_eq!(record.size_bytes, DISK_BYTES as u64);
}

#[test]
fn a_served_image_is_identical_to_its_source_in_every_format() {
    let (_sources, all) = Sources::new();
    for (name, path, format) in all {
        println!("{name}");
        let host = Host::new();
        let record = host.import(&path, &name);
        check_record(&record, &name, format);
        assert!(record.stored_bytes > 0, "{name}");
        host.serve(&record.digest, |socket| assert_served_is(&path, format, socket));
    }
}

#[test]
fn one_disk_in_another_format_is_one_content_and_adds_nothing() {
    let (sources, mut all) = Sources::new();
    // The first is not the plain one, so that what is stored came through a decoder.
    all.rotate_left(5);
    let host = Host::new();
    let mut first: Option<ImageRecord> = None;
    for (name, path, format) in &all {
        println!("{name}");
        let before = first.as_ref().map(|_| host.usage());
        let record = host.import(path, name);
        check_record(&record, name, format);
        let first = first.get_or_insert_with(|| record.clone());
        assert_eq!(record.digest, first.digest, "{name} and {}", first.name);
        assert_eq!((record.data_bytes, record.boot_mode), (first.data_bytes, first.boot_mode), "{name}");
        if let Some(before) = before {
            assert_eq!(record.stored_bytes, 0, "{name}");
            assert_eq!(host.usage(), before, "{name}");
        }
    }
    assert_eq!(host.images().len(), all.len());
    let digest = first.unwrap().digest;
    for (name, program) in PACKED {
        println!("{name}, {program}");
        let record = host.import(&sources.pack(name, program), &format!("{name}-{program}"));
        assert_eq!((record.digest, record.stored_bytes), (digest, 0), "{name}, {program}");
    }
    host.serve(&digest, |socket| {
        for (_, path, format) in &all {
            assert_served_is(path, format, socket);
        }
    });
}

#[test]
fn a_difference_of_one_bit_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    let mut bytes = disks::content(SEED, 2 << 20);
    write_sparse(&one, &bytes);
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    write_sparse(&other, &bytes);
    let host = Host::new();
    let (one, other_image) = (host.import(&one, "one"), host.import(&other, "other"));
    assert_ne!(one.digest, other_image.digest);
    host.serve(&one.digest, |socket| {
        let url = format!("nbd+unix:///?socket={}", socket.display());
        let compared =
            disks::try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", other.to_str().unwrap(), &url]);
        assert_eq!(compared.status.code(), Some(1), "{compared:?}");
    });
}
