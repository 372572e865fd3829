//! The first inputs of every fuzz target.

use super::fuzz::SparseFile;
use super::images::*;
use super::support::{run, write_sparse};

/// Opens as the target says.
const PLAIN: u8 = 0;
const FIX: u8 = 1;
const UNDECLARED: u8 = 2;
const COPY_FOOTER: u8 = 4;
const PARENT: u8 = 8;
const GATE: u8 = 16;
const SNAPSHOT: u8 = 32;

/// An input: target, name, bytes.
pub(crate) type Seed = (&'static str, String, Vec<u8>);

pub(crate) fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target: &'static str, name: &str, options: u8, image: &[u8]| {
        seeds.push((target, format!("seed-{name}"), SparseFile::describe(options, image)));
    };
    raw(&mut add);
    qcow2(&mut add);
    vhd(&mut add);
    vhdx(&mut add);
    vmdk(&mut add);
    vdi(&mut add);
    archive(&mut add);
    detect(&mut add);
    seeds.extend(packed());
    seeds
}

type Add<'a> = &'a mut dyn FnMut(&'static str, &str, u8, &[u8]);

fn raw(add: Add<'_>) {
    add("raw", "disk", PLAIN, &small_content());
    add("raw", "undeclared", UNDECLARED, &small_content());
    add("raw", "odd-length", PLAIN, &small_content()[..40_001]);
    add("raw", "empty", PLAIN, &[]);
}

fn qcow2(add: Add<'_>) {
    for (name, options) in [
        ("v2", "-o compat=0.10,cluster_size=512"),
        ("v3", "-o cluster_size=512"),
        ("64k", ""),
        ("extended", "-o extended_l2=on,cluster_size=16k"),
        ("zlib", "-c -o cluster_size=4k"),
        ("zstd", "-c -o compression_type=zstd,cluster_size=4k"),
        ("wide-refcounts", "-o refcount_bits=64,lazy_refcounts=on,cluster_size=4k"),
    ] {
        add("qcow2", name, PLAIN, &qemu("qcow2", options));
    }
    let snapshot = with_snapshot(&qemu("qcow2", "-o cluster_size=512"));
    add("qcow2", "snapshot", SNAPSHOT, &snapshot);
    add("qcow2", "beside-snapshot", PLAIN, &snapshot);
    let name = [(8, &0x180_u64.to_be_bytes()[..]), (16, &8_u32.to_be_bytes()), (0x180, b"base.img")];
    add("qcow2", "backed", PARENT, &poked(qemu("qcow2", "-o cluster_size=512"), &name));
}

fn with_snapshot(image: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    std::fs::File::create(&path).and_then(|mut file| std::io::Write::write_all(&mut file, image)).unwrap();
    run("qemu-img", &["snapshot", "-c", "name", path.to_str().unwrap()]);
    std::fs::read(path).unwrap()
}

fn vhd(add: Add<'_>) {
    add("vhd", "dynamic", FIX, &qemu("vpc", "-o subformat=dynamic"));
    add("vhd", "fixed", FIX, &qemu("vpc", "-o subformat=fixed"));
    let small = vhd_dynamic(20 << 10, &[4, u32::MAX, 13, u32::MAX, 22]);
    add("vhd", "small", FIX | COPY_FOOTER, &small);
    add("vhd", "small-as-it-is", UNDECLARED, &small);
    add("vhd", "differencing", FIX | COPY_FOOTER | PARENT, &vhd_differencing());
}

/// The small dynamic image with the fields of a child; blocks half from the parent.
pub(crate) fn vhd_differencing() -> Vec<u8> {
    let mut image = vhd_dynamic(20 << 10, &[4, u32::MAX, 13, u32::MAX, 22]);
    image[4 * 512..4 * 512 + 512].fill(0xaa);
    let len = image.len();
    for at in [0, len - 512] {
        image[at + 60..at + 64].copy_from_slice(&VHD_DIFFERENCING.to_be_bytes());
        fix_vhd_sum(&mut image[at..at + 512], 64);
    }
    let name: Vec<u8> = "parent.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
    image[512 + 40..512 + 56].copy_from_slice(b"id of the parent");
    image[512 + 64..512 + 64 + name.len()].copy_from_slice(&name);
    fix_vhd_sum(&mut image[512..1536], 36);
    image
}

fn vhdx(add: Add<'_>) {
    let image = qemu("vhdx", "-o block_size=1M");
    add("vhdx", "dynamic", FIX, &image);
    add("vhdx", "as-it-is", UNDECLARED, &image);
    add("vhdx", "fixed", FIX, &qemu("vhdx", "-o subformat=fixed,block_size=1M"));
    add("vhdx", "empty", FIX, &qemu_of("vhdx", "-o block_size=1M", &vec![0; 1 << 20]));
    add("vhdx", "dirty", FIX, &vhdx_dirty());
    // Bit 1 of the flags of the file parameters: the image has a parent.
    let parameters = vhdx_item_at(&image, &VHDX_FILE_PARAMETERS);
    add("vhdx", "differencing", FIX | PARENT, &poked(image, &[(parameters + 4, &[2])]));
}

fn vmdk(add: Add<'_>) {
    for kind in ["monolithicSparse", "streamOptimized"] {
        add("vmdk", kind, PLAIN, &qemu("vmdk", &format!("-o subformat={kind}")));
    }
    // Every name is what comes after the first 64 KiB.
    let with_rest = |descriptor: &[u8], rest: &[u8]| {
        let mut image = descriptor.to_vec();
        image.resize(64 << 10, 0);
        [&image, rest].concat()
    };
    let flat = |kind, parent| vmdk_descriptor(kind, parent, "RW 100 FLAT \"disk-flat.vmdk\" 28\nRW 28 FLAT \"b\" 0");
    add("vmdk", "flat", GATE, &with_rest(&flat("twoGbMaxExtentFlat", "ffffffff"), &small_content()));
    add("vmdk", "child", GATE | PARENT, &with_rest(&flat("monolithicFlat", "12345678"), &small_content()));
    let sparse = qemu("vmdk", "-o subformat=monolithicSparse");
    let two = "RW 128 SPARSE \"disk-s001.vmdk\"\nRW 64 ZERO\nRW 128 SPARSE \"disk-s002.vmdk\"";
    add("vmdk", "split", GATE, &with_rest(&vmdk_descriptor("twoGbMaxExtentSparse", "ffffffff", two), &sparse));
}

fn vdi(add: Add<'_>) {
    let dynamic = qemu("vdi", "");
    add("vdi", "dynamic", PLAIN, &dynamic);
    add("vdi", "undeclared", UNDECLARED, &dynamic);
    add("vdi", "static", PLAIN, &qemu("vdi", "-o static=on"));
    let two = [small_content(), vec![0; (2 << 20) - (64 << 10)], small_content()].concat();
    add("vdi", "three-blocks", PLAIN, &qemu_of("vdi", "", &two));
}

fn archive(add: Add<'_>) {
    let vmdk = qemu("vmdk", "-o subformat=streamOptimized");
    add("archive", "ova", FIX, &ova("disk.vmdk", &vmdk));
    add("archive", "as-it-is", PLAIN, &ova("disk.vmdk", &vmdk));
    let description = ovf(&[("disk.vmdk", vmdk.len())]);
    let sum = |bytes: &[u8]| -> String {
        <sha2::Sha256 as sha2::Digest>::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let manifest = format!("SHA256(vm.ovf)= {}\nSHA256(disk.vmdk)= {}\n", sum(&description), sum(&vmdk));
    let members = [("vm.ovf", &description[..]), ("vm.mf", manifest.as_bytes()), ("disk.vmdk", &vmdk)];
    add("archive", "with-manifest", FIX, &tar(&members));
    let qcow2 = qemu("qcow2", "-o cluster_size=512");
    add("archive", "tar-of-one", FIX, &tar(&[("disk.qcow2", &qcow2)]));
    add("archive", "disk-raw", FIX, &tar(&[("disk.raw", &small_content())]));
    add("archive", "disk-raw-with-holes", FIX, &sparse_tar());
    add("archive", "two-disks", FIX, &tar(&[("a.qcow2", &qcow2), ("b.qcow2", &qcow2)]));
}

/// GNU tar's way to leave out the holes of a file.
fn sparse_tar() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    write_sparse(&dir.path().join("disk.raw"), &small_content());
    run("tar", &["-C", &path(""), "--format=gnu", "--sparse", "-cf", &path("disk.tar"), "disk.raw"]);
    std::fs::read(path("disk.tar")).unwrap()
}

fn detect(add: Add<'_>) {
    let qcow2 = qemu("qcow2", "-o cluster_size=512");
    add("detect", "raw", PLAIN, &small_content());
    add("detect", "qcow2", PLAIN, &qcow2);
    add("detect", "vdi", PLAIN, &qemu("vdi", ""));
    add("detect", "vmdk", PLAIN, &qemu("vmdk", "-o subformat=streamOptimized"));
    add("detect", "vhd-fixed", PLAIN, &qemu("vpc", "-o subformat=fixed"));
    add("detect", "vhd-dynamic", PLAIN, &vhd_dynamic(8192, &[4, u32::MAX]));
    add("detect", "descriptor", PLAIN, &vmdk_descriptor("monolithicFlat", "ffffffff", "RW 1 FLAT \"a\" 0"));
    add("detect", "ova", PLAIN, &tar(&[("disk.qcow2", &qcow2)]));
    let mut polyglot = qcow2;
    polyglot.resize(40_000, 0);
    polyglot[0x8001..0x8006].copy_from_slice(b"CD001");
    add("detect", "polyglot", PLAIN, &polyglot);
    for (name, at, magic) in [
        ("qed", 0, &b"QED\0"[..]),
        ("cowd", 0, b"COWD"),
        ("sesparse", 0, b"\xbe\xba\xfe\xca\0\0\0\0"),
        ("parallels", 0, b"WithoutFreeSpace"),
        ("luks", 0, b"LUKS\xba\xbe"),
        ("iso", 0x8001, b"CD001"),
        ("gpt", 512, b"EFI PART"),
        ("btrfs", 0x10040, b"_BHRfS_M"),
        ("ext", 0x438, b"\x53\xef"),
        ("elf", 0, b"\x7fELF"),
    ] {
        add("detect", name, PLAIN, &poked(vec![0; 70_144], &[(at, magic)]));
    }
}

fn packed() -> Vec<Seed> {
    let disk = small_content();
    let qcow2 = qemu("qcow2", "-o cluster_size=512");
    let as_it_is = |name: &str, packed: Vec<u8>| ("packed", format!("seed-{name}"), [&[0], &packed[..]].concat());
    vec![
        as_it_is("gzip", gzip(&disk)),
        as_it_is("gzip-twice", [gzip(&disk[..512]), gzip(&disk[512..2048])].concat()),
        as_it_is("gzip-qcow2", gzip(&qcow2)),
        as_it_is("gzip-of-gzip", gzip(&gzip(&disk))),
        as_it_is("xz", xz(&disk)),
        as_it_is("zstd", zstd(&disk)),
        as_it_is("zstd-twice", [zstd(&disk[..512]), zstd(&disk[512..1536])].concat()),
        as_it_is("zstd-qcow2", zstd(&qcow2)),
        ("packed", "seed-content".to_owned(), [&[1], &vhd_dynamic(4096, &[u32::MAX])[..]].concat()),
        ("packed", "seed-declared".to_owned(), [&[3], &disk[..2048]].concat()),
    ]
}
