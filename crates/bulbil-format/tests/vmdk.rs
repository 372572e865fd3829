//! VMDK images of QEMU and of ours, both ways, and the variants that others write.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_format::{
    Compression, Disk, ExtentDirectory, FileReader, Format, FormatError, Identity, NoObserver, OpenOptions, Target,
    convert, open_disk,
};
use support::{Rng, check_content, content, open_bytes, open_path, run, write_sparse};
use tempfile::TempDir;

const SEED: u64 = 0x5eed_0510;
const IDENTITY: Identity = Identity { uuid: [0x5a; 16], created_unix_s: 1_700_000_000 };

/// Opens an image whose extents may be beside it.
fn open_set(path: &Path) -> Result<Box<dyn Disk>, FormatError> {
    let gate = ExtentDirectory::open(path.parent().unwrap())?;
    let options = OpenOptions { gate: Some(Arc::new(gate)), ..OpenOptions::default() };
    open_disk(Arc::new(FileReader::open(path)?), &options)
}

/// A folder with a raw disk.
struct Fixture {
    dir: TempDir,
    disk: Vec<u8>,
}

impl Fixture {
    fn new(disk: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_sparse(&dir.path().join("disk.raw"), &disk);
        Self { dir, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Converts the disk with QEMU.
    fn by_qemu(&self, options: &str) -> PathBuf {
        let (raw, image) = (self.path("disk.raw"), self.path("disk.vmdk"));
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "vmdk", "-o", options], &paths[..]].concat());
        image
    }

    /// Converts the disk with this crate.
    fn by_us(&self, target: &Target) -> PathBuf {
        let image = self.path("ours.vmdk");
        let raw = open_path(&self.path("disk.raw"), Some(Format::Raw)).unwrap();
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
        convert(&*raw, &file, target, &IDENTITY, &NoObserver).unwrap();
        image
    }
}

/// Disks that are empty, sparse, full, tiny, and of a size that is no multiple of a grain.
fn disks() -> Vec<Vec<u8>> {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let noise = |rng: &mut Rng, len: usize| {
        std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(len).collect::<Vec<u8>>()
    };
    let mut nearly_empty = vec![0; (33 << 20) + (128 << 10)];
    nearly_empty[33 << 20] = 1;
    vec![
        vec![0; 1 << 20],
        vec![7; 512],
        nearly_empty,
        noise(&mut rng, (3 << 20) + (64 << 10) + 512),
        content(&mut rng, 8 << 20),
        content(&mut rng, (1 << 20) + 4096 * 5),
    ]
}

fn by_vmdk_core(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    vmdk::VmdkReader::open_path(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn images_of_qemu_read_the_same() {
    for disk in disks() {
        let fixture = Fixture::new(disk);
        for (options, variant) in [
            ("subformat=monolithicSparse", "monolithicSparse"),
            ("subformat=monolithicSparse,adapter_type=lsilogic,hwversion=10", "monolithicSparse"),
            ("subformat=monolithicSparse,compat6=on,zeroed_grain=on", "monolithicSparse"),
            ("subformat=streamOptimized,adapter_type=buslogic", "streamOptimized"),
        ] {
            let image = fixture.by_qemu(options);
            let disk = open_path(&image, None).unwrap();
            check_content(&*disk, &fixture.disk);
            let info = disk.info();
            assert_eq!((info.format, info.variant.as_deref()), (Format::Vmdk, Some(variant)));
            assert_eq!(info.cluster_bytes, Some(64 << 10));
            assert_eq!(info.compression, (variant == "streamOptimized").then_some(Compression::Zlib));
            assert_eq!(info.identifier.unwrap().len(), 8);
            assert!(by_vmdk_core(&image) == fixture.disk, "vmdk-core reads another disk");
        }
    }
}

#[test]
fn sets_of_extents_read_the_same_when_their_folder_is_named() {
    for disk in disks() {
        let fixture = Fixture::new(disk);
        for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
            let image = fixture.by_qemu(&format!("subformat={subformat}"));
            assert_eq!(open_path(&image, None).unwrap_err().code(), "external-extent");
            let disk = open_set(&image).unwrap();
            check_content(&*disk, &fixture.disk);
            assert_eq!(disk.info().variant.as_deref(), Some(subformat));
            std::fs::remove_file(image).unwrap();
        }
    }
}

#[test]
fn a_set_of_compressed_extents_is_refused() {
    let fixture = Fixture::new(disks().swap_remove(0));
    let image = fixture.by_qemu("subformat=twoGbMaxExtentSparse");
    let text = std::fs::read_to_string(&image).unwrap();
    let (_, name) = text.lines().find(|line| line.starts_with("RW ")).unwrap().split_once('"').unwrap();
    let extent = image.with_file_name(name.trim_end_matches('"'));
    let (raw, extent) = (image.with_file_name("disk.raw"), extent.to_str().unwrap());
    write_sparse(&raw, &fixture.disk);
    let stream =
        ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw.to_str().unwrap(), extent];
    run("qemu-img", &stream);
    let error = open_set(&image).unwrap_err().to_string();
    assert_eq!(error, "unsupported-format: VMDK of several compressed extents");
}

#[test]
fn a_set_of_several_extents_is_one_disk() {
    const GIB: u64 = 1 << 30;
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    let file = File::create(&raw).unwrap();
    file.set_len(5 * GIB).unwrap();
    // QEMU ends extents at 2 GiB.
    let noise: Vec<u8> = content(&mut Rng(SEED), 1 << 20);
    for at in [0, 2 * GIB - (1 << 19), 4 * GIB - 512, 5 * GIB - (1 << 20)] {
        file.write_all_at(&noise, at).unwrap();
    }
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let options = format!("subformat={subformat}");
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-f", "raw", "-O", "vmdk", "-o", &options], &paths[..]].concat());
        let disk = open_set(&image).unwrap();
        assert_eq!(disk.size_bytes(), 5 * GIB);
        for (at, len) in [(0, 1 << 20), (2 * GIB - (1 << 20), 2 << 20), (4 * GIB - 4096, 2 << 20), (5 * GIB - 999, 999)]
        {
            let (mut found, mut expected) = (vec![0xee; len], vec![0; len]);
            disk.read_exact_at(&mut found, at).unwrap();
            FileExt::read_exact_at(&File::open(&raw).unwrap(), &mut expected, at).unwrap();
            assert!(found == expected, "{subformat}: wrong content at {at:#x}");
        }
        let data: u64 = disk.data_extents().map(|extent| extent.unwrap().len_bytes).sum();
        assert!((2 << 20..8 << 20).contains(&data), "{subformat}: {data} bytes are content");
        let mut end = 0;
        while let Some(extent) = disk.next_extent(end).unwrap() {
            end = extent.end_bytes();
        }
        assert_eq!(end, 5 * GIB);
    }
}

#[test]
fn our_images_are_read_the_same_by_others_and_by_us() {
    for disk in disks() {
        let fixture = Fixture::new(disk);
        for target in [Target::VmdkSparse, Target::VmdkStream] {
            let image = fixture.by_us(&target);
            let (raw, path) = (fixture.path("disk.raw"), image.to_str().unwrap());
            run("qemu-img", &["check", "-q", "-f", "vmdk", path]);
            // Strict: the size and, for what is allocated in the one and not in the other, the content.
            run("qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", path, raw.to_str().unwrap()]);
            let info = run("qemu-img", &["info", "--output=json", "-f", "vmdk", path]);
            assert!(info.contains(&format!("\"virtual-size\": {}", fixture.disk.len())), "{info}");
            let kind = if matches!(target, Target::VmdkSparse) { "monolithicSparse" } else { "streamOptimized" };
            assert!(info.contains(&format!("\"create-type\": \"{kind}\"")), "{info}");
            check_content(&*open_path(&image, None).unwrap(), &fixture.disk);
            assert!(by_vmdk_core(&image) == fixture.disk, "vmdk-core reads another disk");
        }
    }
}

#[test]
fn our_images_depend_on_the_content_alone() {
    let fixture = Fixture::new(content(&mut Rng(SEED), 6 << 20));
    for target in [Target::VmdkSparse, Target::VmdkStream] {
        let from_holes = std::fs::read(fixture.by_us(&target)).unwrap();
        File::create(fixture.path("disk.raw")).unwrap().write_all_at(&fixture.disk, 0).unwrap();
        let from_zeros = std::fs::read(fixture.by_us(&target)).unwrap();
        assert!(from_holes == from_zeros);
        assert_eq!(from_holes.len() % 512, 0);
        write_sparse(&fixture.path("disk.raw"), &fixture.disk);
    }
}

#[test]
fn a_large_empty_disk_is_a_small_file() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    File::create(&raw).unwrap().set_len(2 << 40).unwrap();
    let source = open_path(&raw, Some(Format::Raw)).unwrap();
    for (target, limit) in [(Target::VmdkSparse, 1 << 20), (Target::VmdkStream, 1 << 20)] {
        let image = dir.path().join("large.vmdk");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
        convert(&*source, &file, &target, &IDENTITY, &NoObserver).unwrap();
        let stored = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert!(stored < limit, "{target:?} takes {stored} bytes");
        let disk = open_path(&image, None).unwrap();
        assert_eq!((disk.size_bytes(), disk.data_extents().count()), (2 << 40, 0));
        run("qemu-img", &["info", "-f", "vmdk", image.to_str().unwrap()]);
    }
}

/// Puts a descriptor of one extent into an image of ours.
fn with_descriptor(image: &[u8], text: &str) -> Vec<u8> {
    let mut image = image.to_vec();
    image[512..512 * 21].fill(0);
    image[512..512 + text.len()].copy_from_slice(text.as_bytes());
    image
}

#[test]
fn descriptors_of_other_programs_are_understood() {
    let fixture = Fixture::new(content(&mut Rng(SEED), 1 << 20));
    let [sparse, stream] =
        [Target::VmdkSparse, Target::VmdkStream].map(|target| std::fs::read(fixture.by_us(&target)).unwrap());
    let head = "version=1\nCID=1\nparentCID=ffffffff\n";
    let single = |create_type: &str, extent: &str| format!("{head}createType=\"{create_type}\"\n{extent}\n");
    let workstation = "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID=2ad83a5e\r\nparentCID=FFFFFFFF\r\n\
         isNativeSnapshot=\"no\"\r\ncreateType=\"monolithicSparse\"\r\n\r\n# Extent description\r\n\
         RW 2048 SPARSE \"Windows 7.vmdk\"\r\n\r\n# The Disk Data Base \r\n#DDB\r\n\r\n\
         ddb.uuid = \"60 00 C2 9f 48 66 ae a5-2f 18 d3 03 0b a9 14 ff\"\r\nddb.encoding = \"windows-1252\"\r\n";
    let virtual_box = "# Disk DescriptorFile\nversion=1\nCID=8d61e6f1\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         # Extent description\nRDONLY 2048 SPARSE \"disk1.vmdk\"\n\n# The disk Data Base \n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.adapterType=\"ide\"\nddb.uuid.image=\"a1b2\"\n\
         ddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\nddb.comment=\"\"\nddb.geometry.biosHeads=\"16\"\n";
    let esx = format!("# anything\n\n  version = 3 \nchangeTrackPath=\"d-ctk.vmdk\"\n{}", &head[10..]);
    for (image, text) in [
        (&sparse, workstation.to_owned()),
        (&stream, virtual_box.to_owned()),
        (&stream, single("streamOptimized", "RDONLY 2048 SPARSE \"call-me-stream.vmdk\"")),
        (&stream, single("streamoptimized", "rw\t2048 sparse \"generated stream.vmdk\"").replace('\t', " ")),
        (&sparse, format!("{esx}createType=\"monolithicSparse\"\nRW 2048 SPARSE \"Grün.vmdk\"\n")),
        (&sparse, single("monolithicSparse", "RW 2048 SPARSE \"x.vmdk\"") + "ddb.same = \"1\"\nddb.same = \"2\"\n"),
    ] {
        let disk = open_bytes(&with_descriptor(image, &text), None).unwrap_or_else(|error| panic!("{error}\n{text}"));
        check_content(&*disk, &fixture.disk);
    }
    // A name in the encoding of the machine that wrote it.
    let mut foreign = with_descriptor(&sparse, workstation);
    let at = foreign.windows(7).position(|window| window == b"Windows").unwrap();
    foreign[at] = 0xdc;
    check_content(&*open_bytes(&foreign, None).unwrap(), &fixture.disk);
}

#[test]
fn the_size_is_that_of_the_descriptor_where_the_header_rounds_it_up() {
    let fixture = Fixture::new(content(&mut Rng(SEED), (1 << 20) + 1536));
    for target in [Target::VmdkSparse, Target::VmdkStream] {
        let mut image = std::fs::read(fixture.by_us(&target)).unwrap();
        let whole = 17 * 128_u64;
        image[12..20].copy_from_slice(&whole.to_le_bytes());
        let footer = image.len() - 1024;
        if matches!(target, Target::VmdkStream) {
            image[footer + 12..footer + 20].copy_from_slice(&whole.to_le_bytes());
        }
        check_content(&*open_bytes(&image, None).unwrap(), &fixture.disk);
    }
}

#[test]
fn streams_may_have_their_directory_in_front_and_no_footer() {
    let fixture = Fixture::new(content(&mut Rng(SEED), 3 << 20));
    let mut image = std::fs::read(fixture.by_us(&Target::VmdkStream)).unwrap();
    let footer = image.len() - 1024;
    let directory: [u8; 8] = image[footer + 56..footer + 64].try_into().unwrap();
    assert_eq!(image[56..64], [0xff; 8]);
    image[56..64].copy_from_slice(&directory);
    check_content(&*open_bytes(&image, None).unwrap(), &fixture.disk);
    image.truncate(footer - 512);
    check_content(&*open_bytes(&image, None).unwrap(), &fixture.disk);
    // The same without the flag of a second directory in a sparse image, and with none of it.
    let mut sparse = std::fs::read(fixture.by_us(&Target::VmdkSparse)).unwrap();
    let at = usize::try_from(u64::from_le_bytes(sparse[48..56].try_into().unwrap())).unwrap() * 512;
    sparse[8] &= !2;
    sparse[48..56].fill(0);
    sparse[at..at + 512].fill(0xee);
    check_content(&*open_bytes(&sparse, None).unwrap(), &fixture.disk);
}

#[test]
fn the_parts_of_our_streams_are_where_readers_of_streams_expect_them() {
    let mut disk = content(&mut Rng(SEED), 33 << 20);
    disk[(33 << 20) - 1] = 1;
    let fixture = Fixture::new(disk);
    let image = std::fs::read(fixture.by_us(&Target::VmdkStream)).unwrap();
    let u64_at = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
    assert_eq!((u32_at(4), u32_at(8), u64_at(64)), (3, 0x30001, 128));
    let (mut at, mut kinds, mut last_sector) = (128 * 512, Vec::new(), None);
    while at < image.len() {
        let (value, size, kind) = (u64_at(at), u32_at(at + 8), u32_at(at + 12));
        if size > 0 {
            assert!(last_sector.is_none_or(|last| value > last), "grains in the order of the disk");
            last_sector = Some(value);
            at += (12 + usize::try_from(size).unwrap()).next_multiple_of(512);
        } else {
            kinds.push((kind, value));
            at += 512 + usize::try_from(value).unwrap() * 512;
        }
    }
    assert_eq!(kinds, [(1, 4), (1, 4), (2, 1), (3, 1), (0, 0)]);
}

#[test]
fn small_reads_of_a_large_empty_disk_do_not_look_for_its_next_table() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("wide.vmdk"));
    File::create(&raw).unwrap().set_len(8 << 40).unwrap();
    let source = open_path(&raw, Some(Format::Raw)).unwrap();
    let file = File::create(&image).unwrap();
    convert(&*source, &file, &Target::VmdkSparse, &IDENTITY, &NoObserver).unwrap();
    let disk = open_path(&image, None).unwrap();
    let start = std::time::Instant::now();
    let mut sector = [0xee; 512];
    for _ in 0..200_000 {
        disk.read_exact_at(&mut sector, 0).unwrap();
    }
    assert_eq!(sector, [0; 512]);
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}
