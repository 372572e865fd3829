//! Images with a backing file: read with the parent that the caller names, written as what differs from it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_format::{
    BackingFile, Compression, Disk, DiskContent, FileReader, Format, FormatError, Identity, NoObserver, OpenOptions,
    Qcow2Options, Target, convert, open_disk,
};
use support::{Rng, check_content, content, run, write_sparse};

const SEED: u64 = 0x5eed_0005;
const IDENTITY: Identity = Identity { uuid: [7; 16], created_unix_s: 1_700_000_000 };

fn open(path: &Path, format: Format, parent: Option<Arc<dyn Disk>>) -> Result<Arc<dyn Disk>, FormatError> {
    let options = OpenOptions { format: Some(format), parent, ..OpenOptions::default() };
    open_disk(Arc::new(FileReader::open(path)?), &options).map(Arc::from)
}

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

    fn raw(&self, name: &str, bytes: &[u8]) -> Arc<dyn Disk> {
        write_sparse(&self.path(name), bytes);
        open(&self.path(name), Format::Raw, None).unwrap()
    }

    /// What `qemu-img` reads from an image and all below it.
    fn flatten(&self, image: &str) -> Vec<u8> {
        let raw = self.text("flat.raw");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &self.text(image), &raw]);
        std::fs::read(raw).unwrap()
    }
}

fn scribble(rng: &mut Rng, image: &str, size_bytes: u64) {
    for _ in 0..12 {
        let len = (1 + rng.below(200)) * 512;
        let offset = rng.below((size_bytes - len) / 512) * 512;
        let command = match rng.below(4) {
            0 => format!("discard {offset} {len}"),
            1 => format!("write -z -u {offset} {len}"),
            _ => format!("write -P {} {offset} {len}", 1 + rng.below(255)),
        };
        run("qemu-io", &["-f", "qcow2", "-d", "unmap", "-c", &command, image]);
    }
}

#[test]
fn chains_are_read_through_the_parents_that_are_named() {
    // The size of each disk in MiB, from the lowest on.
    for (seed, (options, sizes)) in (SEED..).zip([
        ("compat=1.1", [4, 4, 4]),
        ("compat=0.10", [4, 4, 4]),
        ("cluster_size=512", [2, 3, 4]),
        ("cluster_size=2M", [3, 2, 5]),
        ("extended_l2=on", [4, 4, 4]),
        ("extended_l2=on,cluster_size=16k", [4, 2, 3]),
    ]) {
        println!("{options} {sizes:?}: seed {seed:#x}");
        let files = Files::new();
        let mut rng = Rng(seed);
        let mut disk = files.raw("base", &content(&mut rng, sizes[0] << 20));
        for (index, (below, name)) in [("base", "middle"), ("middle", "top")].into_iter().enumerate() {
            let size = sizes[index + 1] << 20;
            let format = if below == "base" { "raw" } else { "qcow2" };
            let (below, image) = (files.text(below), files.text(name));
            let args = ["create", "-f", "qcow2", "-o", options, "-b", &below, "-F", format, &image, &size.to_string()];
            run("qemu-img", &args);
            scribble(&mut rng, &image, size as u64);
            disk = open(Path::new(&image), Format::Qcow2, Some(disk)).unwrap();
        }
        assert_eq!(disk.info().data_bytes, None);
        assert!(disk.info().notes[0].starts_with("has only what differs from its backing file, \""));
        check_content(&*disk, &files.flatten("top"));
    }
}

#[test]
fn a_parent_is_refused_where_none_is_wanted_and_its_name_is_never_opened() {
    let files = Files::new();
    let base = files.raw("base", &content(&mut Rng(SEED), 1 << 20));
    let (below, image) = (files.text("base"), files.path("top"));
    run("qemu-img", &["create", "-f", "qcow2", image.to_str().unwrap(), "1M"]);
    let error = open(&image, Format::Qcow2, Some(base.clone())).unwrap_err();
    assert_eq!(error.to_string(), "parent-mismatch: the qcow2 image has no backing file");

    run("qemu-img", &["create", "-f", "qcow2", "-b", &below, "-F", "raw", image.to_str().unwrap()]);
    assert_eq!(open(&image, Format::Qcow2, None).unwrap_err().code(), "has-backing-file");
    std::fs::rename(&below, files.path("elsewhere")).unwrap();
    assert!(open(&image, Format::Qcow2, Some(base.clone())).is_ok());

    let bytes = std::fs::read(&image).unwrap();
    for (at, poke) in
        [(8, &[0; 8][..]), (8, &65530_u64.to_be_bytes()), (8, &[0xff; 8]), (16, &[0; 4]), (16, &[0xff; 4])]
    {
        let mut bytes = bytes.clone();
        bytes[at..at + poke.len()].copy_from_slice(poke);
        let options = OpenOptions { parent: Some(base.clone()), ..OpenOptions::default() };
        let error = open_disk(Arc::new(bytes), &options).unwrap_err().to_string();
        assert!(error.starts_with("corrupt: backing file name of "), "{error}");
    }
}

/// Writes `disk` over `below`, and lets QEMU and this crate read it.
fn check_written(files: &Files, disk: &[u8], below: &[u8], options: &Qcow2Options) -> u64 {
    let (source, base) = (files.raw("disk", disk), files.raw("base", below));
    let content: Arc<dyn DiskContent> = base.clone();
    let backing = BackingFile { name: files.text("base"), format: Format::Raw, content };
    let target = Target::Qcow2(Qcow2Options { backing: Some(backing), ..options.clone() });
    let top = std::fs::File::create_new(files.path("top")).unwrap();
    convert(&*source, &top, &target, &IDENTITY, &NoObserver).unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", &files.text("top")]);
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &files.text("disk"), &files.text("top")]);
    assert!(files.flatten("top") == disk);
    check_content(&*open(&files.path("top"), Format::Qcow2, Some(base)).unwrap(), disk);
    let len_bytes = top.metadata().unwrap().len();
    std::fs::remove_file(files.path("top")).unwrap();
    len_bytes
}

#[test]
fn what_differs_is_written_and_nothing_else() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let below = content(&mut rng, (2 << 20) + 1536);
    let mut disk = below.clone();
    disk[200_000..210_000].fill(7);
    disk[512 << 10..1 << 20].fill(0);
    let noise = content(&mut rng, 100_000);
    disk[1_500_000..1_600_000].copy_from_slice(&noise);
    for (cluster_bytes, compression) in [
        (64 << 10, None),
        (64 << 10, Some(Compression::Zlib)),
        (512, Some(Compression::Zstd)),
        (2 << 20, Some(Compression::Zstd)),
        (4096, None),
    ] {
        let options = Qcow2Options { cluster_bytes, compression, ..Qcow2Options::default() };
        let files = Files::new();
        let len_bytes = check_written(&files, &disk, &below, &options);
        // The same again has nothing to say: header, one L1 table, one refcount block, one table of them.
        let empty = check_written(&files, &below, &below, &options);
        assert!(len_bytes > empty);
        assert!(empty <= 4 * cluster_bytes.max(8192), "{empty} bytes for no difference, clusters of {cluster_bytes}");
        // Longer and shorter than what is below.
        let zeros_behind = [&disk[..], &[0; 1 << 20]].concat();
        let longer = check_written(&files, &zeros_behind, &below, &options);
        assert!(
            longer <= len_bytes + 2 * cluster_bytes.max(8192),
            "zeros past the end of the backing file are written"
        );
        check_written(&files, &disk[..1 << 20], &below, &options);
        check_written(&files, &vec![0; below.len()], &below, &options);
        check_written(&files, &below, &vec![0; below.len()], &options);
    }
}

#[test]
fn a_sparse_disk_of_64_tib_over_another_is_quick() {
    let files = Files::new();
    for (name, at) in [("disk", 1_u64 << 45), ("base", 1 << 44)] {
        // Sparse files of this length are not possible everywhere: the disks are qcow2 themselves.
        run("qemu-img", &["create", "-f", "qcow2", &files.text(name), "64T"]);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 1 {at} 64k"), &files.text(name)]);
    }
    let source = open(&files.path("disk"), Format::Qcow2, None).unwrap();
    let content: Arc<dyn DiskContent> = open(&files.path("base"), Format::Qcow2, None).unwrap();
    let backing = BackingFile { name: files.text("base"), format: Format::Qcow2, content };
    let target = Target::Qcow2(Qcow2Options { backing: Some(backing), ..Qcow2Options::default() });
    let top = std::fs::File::create_new(files.path("top")).unwrap();
    let start = std::time::Instant::now();
    convert(&*source, &top, &target, &IDENTITY, &NoObserver).unwrap();
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    run("qemu-img", &["check", "-q", "-f", "qcow2", &files.text("top")]);
    let map = run("qemu-img", &["map", "--output=json", &files.text("top")]);
    assert_eq!(map.matches("\"data\": true").count(), 1, "{map}");
    assert!(map.contains("\"depth\": 0, \"present\": true, \"zero\": true, \"data\": false"), "{map}");
}

#[test]
fn small_reads_of_a_large_empty_parent_do_not_look_for_its_next_table() {
    let files = Files::new();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", &files.text("wide.qcow2"), "120G"]);
    let disk = open(&files.path("wide.qcow2"), Format::Qcow2, None).unwrap();
    let start = std::time::Instant::now();
    let mut sector = [0xee; 512];
    for _ in 0..10_000 {
        disk.read_exact_at(&mut sector, 0).unwrap();
    }
    assert_eq!(sector, [0; 512]);
    assert_eq!(disk.data_extents().count(), 0);
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}

#[test]
fn clusters_that_were_only_set_aside_are_not_content() {
    let files = Files::new();
    let options = ["-o", "preallocation=metadata", &files.text("wide.qcow2"), "8G"];
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"][..], &options].concat());
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 5G 64k", &files.text("wide.qcow2")]);
    let disk = open(&files.path("wide.qcow2"), Format::Qcow2, None).unwrap();
    assert_eq!(disk.info().data_bytes, Some(8 << 30));
    let extents: Vec<_> = disk.data_extents().map(Result::unwrap).collect();
    let data_bytes: u64 = extents.iter().map(|extent| extent.len_bytes).sum();
    assert!(extents.iter().any(|extent| (extent.offset_bytes..extent.end_bytes()).contains(&(5 << 30))));
    assert!(data_bytes < 256 << 20, "{data_bytes} bytes of content");
    let mut piece = vec![0; 64 << 10];
    disk.read_exact_at(&mut piece, 5 << 30).unwrap();
    assert!(piece.iter().all(|byte| *byte == 7));
}
