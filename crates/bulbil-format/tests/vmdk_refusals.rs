//! VMDK images that are damaged, or that ask for what is not theirs.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{
    Disk, ExtentDirectory, Format, FormatError, Identity, NoObserver, OpenOptions, Target, convert, open_disk,
};
use support::{Rng, content, open_bytes, read_all};

const SEED: u64 = 0x5eed_0511;

/// An image of ours of 1 MiB, with content in every grain.
fn image(target: &Target) -> Vec<u8> {
    let mut disk = content(&mut Rng(SEED), 1 << 20);
    for grain in disk.chunks_mut(64 << 10) {
        grain[1000] = 1;
    }
    let source = open_bytes(&disk, Some(Format::Raw)).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let identity = Identity { uuid: [1; 16], created_unix_s: 0 };
    convert(&*source, &file, target, &identity, &NoObserver).unwrap();
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    bytes
}

fn poked(bytes: &[u8], at: usize, poke: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + poke.len()].copy_from_slice(poke);
    bytes
}

fn with_descriptor(image: &[u8], text: &str) -> Vec<u8> {
    let image = poked(image, 512, &[0; 512 * 20]);
    poked(&image, 512, text.as_bytes())
}

#[track_caller]
fn check_refused(bytes: &[u8], message: &str) {
    let began = Instant::now();
    let error = open_bytes(bytes, None).map(|_| ()).expect_err(message);
    assert!(began.elapsed() < Duration::from_secs(1), "{message} took {:?}", began.elapsed());
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
    assert!(message.starts_with(error.code()), "{}: {message}", error.code());
}

const DIRECTORY: usize = 26 * 512;
const TABLE: usize = 27 * 512;
const FIRST_GRAIN: usize = 128 * 512;

#[test]
fn sparse_header_fields_and_tables_out_of_bounds_are_refused() {
    let image = image(&Target::VmdkSparse);
    open_bytes(&image, None).unwrap();
    let end = u32::try_from(image.len() / 512).unwrap();
    for (at, poke, message) in [
        (4, &0_u32.to_le_bytes()[..], "unsupported-format: VMDK sparse extent version 0"),
        (4, &4_u32.to_le_bytes(), "unsupported-format: VMDK sparse extent version 4"),
        (8, &0xb_u32.to_le_bytes(), "unsupported-feature: bit 3 (unknown)"),
        (8, &0x8000_0003_u32.to_le_bytes(), "unsupported-feature: bit 31 (unknown)"),
        (8, &0x1_0003_u32.to_le_bytes(), "corrupt: flags and compression"),
        (8, &0x2_0003_u32.to_le_bytes(), "corrupt: flags and compression"),
        (8, &0x3_0003_u32.to_le_bytes(), "corrupt: flags and compression"),
        (12, &0_u64.to_le_bytes(), "virtual-size: 0 bytes is an empty disk"),
        (12, &u64::MAX.to_le_bytes(), "virtual-size: 18446744073709551615 bytes is more than"),
        (12, &(1_u64 << 48).to_le_bytes(), "virtual-size: 144115188075855872 bytes is more than"),
        (12, &4096_u64.to_le_bytes(), "bad-descriptor: the extent has 4096 sectors, the descriptor says 2048"),
        (12, &2047_u64.to_le_bytes(), "bad-descriptor: the extent has 2047 sectors, the descriptor says 2048"),
        (20, &0_u64.to_le_bytes(), "corrupt: grain of 0 sectors"),
        (20, &4_u64.to_le_bytes(), "corrupt: grain of 4 sectors"),
        (20, &127_u64.to_le_bytes(), "corrupt: grain of 127 sectors"),
        (20, &8192_u64.to_le_bytes(), "corrupt: grain of 8192 sectors"),
        (20, &(1_u64 << 63).to_le_bytes(), "corrupt: grain of 9223372036854775808 sectors"),
        (28, &0_u64.to_le_bytes(), "bad-descriptor: there is none"),
        (28, &21_u64.to_le_bytes(), "bad-descriptor: there is a zero byte in the text"),
        (28, &u64::MAX.to_le_bytes(), "bad-descriptor: there is none"),
        (28, &(1_u64 << 60).to_le_bytes(), "truncated at byte"),
        (36, &0_u64.to_le_bytes(), "bad-descriptor: there is none"),
        (36, &2048_u64.to_le_bytes(), "bad-descriptor: there is a zero byte in the text"),
        (36, &2049_u64.to_le_bytes(), "too-large: a descriptor of 1049088 bytes"),
        (36, &u64::MAX.to_le_bytes(), "too-large: a descriptor of"),
        (44, &0_u32.to_le_bytes(), "corrupt: grain tables of 0 entries"),
        (44, &1024_u32.to_le_bytes(), "corrupt: grain tables of 1024 entries"),
        (44, &u32::MAX.to_le_bytes(), "corrupt: grain tables of 4294967295 entries"),
        (56, &0_u64.to_le_bytes(), "corrupt: grain directory at sector 0x0"),
        (56, &1_u64.to_le_bytes(), "corrupt: sector 0x1 referenced twice"),
        (56, &(1_u64 << 31).to_le_bytes(), "truncated at byte"),
        (56, &(1_u64 << 33).to_le_bytes(), "corrupt: grain directory at sector 0x200000000"),
        (56, &(u64::MAX - 1).to_le_bytes(), "corrupt: grain directory at sector"),
        (56, &u64::MAX.to_le_bytes(), "truncated at byte"),
        (73, b"\n \n\n", "corrupt: the file was changed by a transfer as text"),
        (77, &1_u16.to_le_bytes(), "corrupt: flags and compression"),
        (77, &2_u16.to_le_bytes(), "unsupported-feature: bit 16 (compression algorithm 2)"),
        (DIRECTORY, &u32::MAX.to_le_bytes(), "truncated at byte"),
        (DIRECTORY, &end.to_le_bytes(), "truncated at byte"),
        (DIRECTORY, &1_u32.to_le_bytes(), "corrupt: sector 0x1 referenced twice"),
        (DIRECTORY, &26_u32.to_le_bytes(), "corrupt: sector 0x1a referenced twice"),
        (DIRECTORY, &23_u32.to_le_bytes(), "corrupt: sector 0x1a referenced twice"),
        (TABLE, &u32::MAX.to_le_bytes(), "truncated at byte"),
        (TABLE, &end.to_le_bytes(), "truncated at byte"),
        (TABLE, &(end - 127).to_le_bytes(), "truncated at byte"),
        (TABLE, &1_u32.to_le_bytes(), "corrupt: sector 0x1 referenced twice"),
        (TABLE, &30_u32.to_le_bytes(), "corrupt: sector 0x1e referenced twice"),
        (TABLE, &129_u32.to_le_bytes(), "corrupt: sector 0x100 referenced twice"),
        (TABLE + 4, &128_u32.to_le_bytes(), "corrupt: sector 0x80 referenced twice"),
    ] {
        check_refused(&poked(&image, at, poke), message);
    }
    for len in [4, 511] {
        check_refused(&image[..len], "truncated at byte");
    }
    for len in [600, 512 * 20, 512 * 26, 512 * 28, 512 * 130, image.len() - 1] {
        check_refused(&image[..len], "truncated at byte");
    }
}

#[test]
fn streams_with_a_damaged_footer_or_marker_are_refused() {
    let image = image(&Target::VmdkStream);
    open_bytes(&image, None).unwrap();
    let footer = image.len() - 1024;
    for (at, poke, message) in [
        (footer - 504, &1_u32.to_le_bytes()[..], "truncated at byte"),
        (footer - 500, &2_u32.to_le_bytes(), "truncated at byte"),
        (footer, b"KDMW", "truncated at byte"),
        (footer + 512, &[1], "truncated at byte"),
        (footer + 4, &1_u32.to_le_bytes(), "corrupt: the footer contradicts the header"),
        (footer + 12, &4096_u64.to_le_bytes(), "corrupt: the footer contradicts the header"),
        (footer + 20, &64_u64.to_le_bytes(), "corrupt: the footer contradicts the header"),
        (footer + 28, &64_u64.to_le_bytes(), "corrupt: the footer contradicts the header"),
        (footer + 56, &u64::MAX.to_le_bytes(), "corrupt: grain directory at sector"),
        (footer + 56, &(1_u64 << 30).to_le_bytes(), "truncated at byte"),
        (footer + 73, b"    ", "corrupt: the file was changed"),
        (56, &27_u64.to_le_bytes(), "corrupt: the footer contradicts the header"),
        (FIRST_GRAIN, &128_u64.to_le_bytes(), "corrupt: grain at 0x10000 is that of disk sector 0x80"),
        (FIRST_GRAIN, &u64::MAX.to_le_bytes(), "corrupt: grain at 0x10000 is that of disk sector"),
        (FIRST_GRAIN + 8, &0_u32.to_le_bytes(), "corrupt: compressed grain at 0x10000 of 0 bytes"),
        (FIRST_GRAIN + 8, &131_073_u32.to_le_bytes(), "corrupt: compressed grain at 0x10000 of 131073 bytes"),
        (FIRST_GRAIN + 8, &u32::MAX.to_le_bytes(), "corrupt: compressed grain at 0x10000 of 4294967295 bytes"),
        (FIRST_GRAIN + 8, &131_072_u32.to_le_bytes(), "corrupt: sector"),
    ] {
        check_refused(&poked(&image, at, poke), message);
    }
    for cut in [1, 512, 1024, 1536, 2048, image.len() / 2] {
        check_refused(&image[..image.len() - cut], "truncated at byte");
    }
}

#[test]
fn a_compressed_grain_is_exactly_one_grain() {
    let image = image(&Target::VmdkStream);
    let deflated = |len: usize| {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![7; len]).unwrap();
        encoder.finish().unwrap()
    };
    let with_first = |data: &[u8]| {
        let image = poked(&image, FIRST_GRAIN + 8, &u32::try_from(data.len()).unwrap().to_le_bytes());
        poked(&image, FIRST_GRAIN + 12, data)
    };
    let read = |image: &[u8]| {
        let disk = open_bytes(image, None).unwrap();
        let whole = disk.read_exact_at(&mut vec![0; 64 << 10], 0).map_err(|error| error.to_string());
        let part = disk.read_exact_at(&mut [0; 512], 512).map_err(|error| error.to_string());
        assert_eq!(whole, part);
        whole
    };
    let failed = |reason: &str| Err(format!("corrupt: compressed grain at 0x10000: {reason}"));
    assert_eq!(read(&with_first(&deflated(64 << 10))), Ok(()));
    assert_eq!(read(&with_first(&deflated((64 << 10) + 1))), failed("it is longer than a grain"));
    assert_eq!(read(&with_first(&deflated(16 << 20)[..400])), failed("it is longer than a grain"));
    assert_eq!(read(&with_first(&deflated((64 << 10) - 1))), failed("it has 65535 bytes instead of 65536"));
    assert_eq!(read(&with_first(&deflated(0))), failed("it has 0 bytes instead of 65536"));
    assert_eq!(read(&with_first(&[0xee; 64])), failed("it does not decode"));
    let mut wrong_sum = deflated(64 << 10);
    *wrong_sum.last_mut().unwrap() ^= 1;
    assert_eq!(read(&with_first(&wrong_sum)), failed("it does not decode"));
    let whole = deflated(64 << 10);
    assert!(read(&with_first(&whole[..whole.len() - 1])).unwrap_err().starts_with("corrupt: compressed grain"));
}

#[test]
fn descriptors_that_are_not_understood_are_refused() {
    let image = image(&Target::VmdkSparse);
    let good = "version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 2048 SPARSE \"x.vmdk\"\n";
    open_bytes(&with_descriptor(&image, good), None).unwrap();
    let extent = "RW 2048 SPARSE \"x.vmdk\"";
    for (from, to, message) in [
        (good, "", "bad-descriptor: it is empty"),
        (good, "\n", "bad-descriptor: there is no version"),
        ("version=1", "version=4", "bad-descriptor: version \"4\""),
        ("version=1\n", "", "bad-descriptor: there is no version"),
        ("CID=1\np", "p", "bad-descriptor: there is no cid"),
        ("CID=1", "CID=xyz", "bad-descriptor: content identifier \"xyz\""),
        ("CID=1", "CID=123456789", "bad-descriptor: content identifier \"123456789\""),
        ("CID=1", "CID=+1", "bad-descriptor: content identifier \"+1\""),
        ("CID=1", "CID=1\nCID=2", "bad-descriptor: line 3: said twice: \"CID=2\""),
        ("parentCID=ffffffff\n", "", "bad-descriptor: there is no parentcid"),
        ("=ffffffff", "=fffffffe", "differencing: vmdk with the parent \"\""),
        ("=ffffffff", "=0\nparentFileNameHint=\"/etc/passwd\"", "differencing: vmdk with the parent \"/etc/passwd\""),
        ("=ffffffff", "=ffffffff\nparentFileNameHint=\"p.vmdk\"", "differencing: vmdk with the parent \"p.vmdk\""),
        ("createType=\"monolithicSparse\"\n", "", "bad-descriptor: there is no createtype"),
        ("\"monolithicSparse\"", "\"monolithicSparse", "bad-descriptor: line 4: the quotes do not match"),
        ("monolithicSparse", "vmfsSparse", "unsupported-format: VMDK of type \"vmfsSparse\""),
        ("monolithicSparse", "fullDevice", "unsupported-format: VMDK of type \"fullDevice\""),
        ("monolithicSparse", "custom\u{202e}", "unsupported-format: VMDK of type \"custom\\u{202e}\""),
        ("monolithicSparse", "twoGbMaxExtentSparse", "external-extent: the content is in \"x.vmdk\""),
        ("monolithicSparse", "monolithicFlat", "bad-descriptor: monolithicFlat disk with the extent \"x.vmdk\""),
        (extent, "", "bad-descriptor: there is no extent"),
        (extent, "RW 2048 SPARSE", "bad-descriptor: extent"),
        (extent, "RW 2048 SPARSE \"x.vmdk", "bad-descriptor: extent"),
        (extent, "RW 2048 SPARSE x.vmdk", "bad-descriptor: extent"),
        (extent, "RW 2048 SPARSE \"x.vmdk\" \"y.vmdk\"", "bad-descriptor: extent"),
        (extent, "RW 2048 SPARSE \"x.vmdk\" 5", "bad-descriptor: extent"),
        (extent, "RW -1 SPARSE \"x.vmdk\"", "bad-descriptor: extent"),
        (extent, "RW 0 SPARSE \"x.vmdk\"", "bad-descriptor: extent"),
        (extent, "RW 18446744073709551616 SPARSE \"x.vmdk\"", "bad-descriptor: extent"),
        (extent, "RW 18446744073709551615 SPARSE \"x.vmdk\"", "virtual-size: 18446744073709551615 bytes"),
        (extent, "NOACCESS 2048 SPARSE \"x.vmdk\"", "bad-descriptor: extent"),
        (extent, "RW 2048 ZERO", "bad-descriptor: monolithicSparse disk with the extent \"\""),
        (extent, "RW 2048 FLAT \"x.vmdk\" 0", "bad-descriptor: monolithicSparse disk with the extent \"x.vmdk\""),
        (extent, "RW 2048 VMFSRDM \"x.vmdk\"", "unsupported-format: VMDK with an extent of type \"VMFSRDM\""),
        (extent, "RW 1 SPARSE \"x.vmdk\"\nRW 2047 SPARSE \"y.vmdk\"", "bad-descriptor: 2 extents in one file"),
        (extent, "RW 2048 SPARSE \"/etc/passwd\"", "external-extent: the content is in \"/etc/passwd\""),
        (extent, "RW 2048 SPARSE \"..\"", "external-extent: the content is in \"..\""),
        (extent, "RW 2048 SPARSE \"json:{}\"", "external-extent: the content is in \"json:{}\""),
        (extent, "RW 2048 SPARSE \"C:\\x.vmdk\"", "external-extent: the content is in \"C:\\\\x.vmdk\""),
        ("CID=1", "CID=1\nhello", "bad-descriptor: line 3: not understood: \"hello\""),
        ("CID=1", "CID=1\nbacking=\"/etc/passwd\"", "bad-descriptor: line 3: unknown key: \"backing=\\\"/etc/passwd"),
        ("CID=1", "CID=1\nkeySafe = \"vmware:key/list\"", "encrypted: the content, by VMware"),
        ("CID=1", "CID=1\nddb.iofilters = \"vmwarevmcrypt\"", "encrypted: the content, by VMware"),
        ("CID=1", "CID=1\u{7}", "bad-descriptor: there is the control character '\\u{7}' in the text"),
        ("CID=1", "CID=1\0", "bad-descriptor: there is a zero byte in the text"),
    ] {
        assert!(good.contains(from));
        check_refused(&with_descriptor(&image, &good.replacen(from, to, 1)), message);
    }
    let not_utf8 = poked(&with_descriptor(&image, good), 512 + good.find("x.vmdk").unwrap(), &[0xff]);
    check_refused(&not_utf8, "bad-descriptor: it is not text in UTF-8");
    let many = format!("# Disk DescriptorFile\n{}", "RW 1 ZERO\n".repeat(4097));
    check_refused(many.as_bytes(), "bad-descriptor: line 4098: too many extents");
    check_refused(format!("# Disk DescriptorFile\n{}", "#\n".repeat(1 << 19)).as_bytes(), "too-large: a descriptor of");
    check_refused(
        b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 1 SPARSE \"x\"\n",
        "external-extent: the content is in \"x\"; import that file itself",
    );
}

fn open_in(dir: &Path, descriptor: &str) -> Result<Box<dyn Disk>, FormatError> {
    let gate = ExtentDirectory::open(dir)?;
    let options = OpenOptions { gate: Some(Arc::new(gate)), ..OpenOptions::default() };
    open_disk(Arc::new(descriptor.as_bytes().to_vec()), &options)
}

fn set(create_type: &str, extents: &str) -> String {
    let head = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n";
    format!("{head}createType=\"{create_type}\"\n{extents}\n")
}

#[test]
fn no_name_leads_to_a_file_outside_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let dir = outside.path().join("folder");
    std::fs::create_dir(&dir).unwrap();
    let canary = outside.path().join("canary");
    let mut image = image(&Target::VmdkSparse);
    image.resize(4 << 20, 0xca);
    for path in [canary.clone(), dir.join("inside")] {
        File::create(path).unwrap().write_all(&image).unwrap();
    }
    std::os::unix::fs::symlink(&canary, dir.join("link")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.join("device")).unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.join("away")).unwrap();
    std::fs::create_dir(dir.join("sub")).unwrap();
    let fifo = dir.join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let absolute = canary.to_str().unwrap();
    for (create_type, kind, tail) in
        [("monolithicFlat", "FLAT", " 0"), ("vmfs", "VMFS", ""), ("twoGbMaxExtentSparse", "SPARSE", "")]
    {
        let descriptor = |name: &str| set(create_type, &format!("RW 2048 {kind} \"{name}\"{tail}"));
        // A name that is allowed, so that the others are refused for what they are.
        open_in(&dir, &descriptor("inside")).unwrap();
        for name in [
            absolute,
            "/etc/passwd",
            "/dev/zero",
            "../canary",
            "..",
            ".",
            "",
            "away/canary",
            "sub/../../canary",
            "sub",
            "link",
            "device",
            "fifo",
            "absent",
            "./inside",
            "inside/",
            "..\\canary",
            "C:\\canary",
            "\\\\host\\canary",
            "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
            "file:///etc/passwd",
            "nbd:localhost:10809",
            "nbd://x",
            "fd:0",
            "/proc/self/fd/0",
            "http://169.254.169.254/",
            "inside\u{0}",
        ] {
            let began = Instant::now();
            let text = descriptor(name);
            for (who, result) in [("folder", open_in(&dir, &text)), ("nobody", open_bytes(text.as_bytes(), None))] {
                let code = result.map(|_| ()).expect_err(name).code();
                assert!(matches!(code, "external-extent" | "bad-descriptor"), "{who} {name:?}: {code}");
            }
            assert!(began.elapsed() < Duration::from_secs(1), "{name}");
        }
        assert_eq!(open_bytes(descriptor("inside").as_bytes(), None).unwrap_err().code(), "external-extent");
    }
    // What becomes of the path later does not matter.
    let gate = Arc::new(ExtentDirectory::open(&dir).unwrap());
    std::fs::rename(&dir, outside.path().join("renamed")).unwrap();
    std::os::unix::fs::symlink(outside.path(), &dir).unwrap();
    let options = OpenOptions { gate: Some(gate), ..OpenOptions::default() };
    let open = |name: &str| {
        let text = set("monolithicFlat", &format!("RW 2048 FLAT \"{name}\" 0"));
        open_disk(Arc::new(text.into_bytes()), &options)
    };
    assert_eq!(open("canary").unwrap_err().code(), "external-extent");
    open("inside").unwrap();
}

#[test]
fn extents_that_are_too_short_or_used_twice_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| File::create(dir.path().join(name)).unwrap().write_all(bytes).unwrap();
    let sparse = image(&Target::VmdkSparse);
    write("flat", &vec![5; 1 << 20]);
    write("sparse", &sparse);
    write("damaged", &poked(&sparse, TABLE + 4, &128_u32.to_le_bytes()));
    for (create_type, extents, expected) in [
        ("monolithicFlat", "RW 2048 FLAT \"flat\" 0", None),
        ("twoGbMaxExtentFlat", "RW 1024 FLAT \"flat\" 1024\nRW 1024 FLAT \"flat\" 0\nRW 8 ZERO", None),
        ("twoGbMaxExtentFlat", "RW 1024 FLAT \"flat\" 0\nRW 1024 FLAT \"flat\" 1023", Some("bad-descriptor")),
        ("twoGbMaxExtentFlat", "RW 9 FLAT \"flat\" 0\nRW 9 ZERO\nRW 9 FLAT \"flat\" 0", Some("bad-descriptor")),
        ("monolithicFlat", "RW 2049 FLAT \"flat\" 0", Some("truncated")),
        ("monolithicFlat", "RW 2048 FLAT \"flat\" 1", Some("truncated")),
        ("monolithicFlat", "RW 2048 FLAT \"flat\" 18446744073709551615", Some("truncated")),
        ("twoGbMaxExtentSparse", "RW 2048 SPARSE \"sparse\"\nRW 2048 SPARSE \"sparse\"", Some("bad-descriptor")),
        ("twoGbMaxExtentSparse", "RW 4096 SPARSE \"sparse\"", Some("bad-descriptor")),
        ("twoGbMaxExtentSparse", "RW 1024 SPARSE \"sparse\"", Some("bad-descriptor")),
        ("twoGbMaxExtentSparse", "RW 2048 SPARSE \"flat\"", Some("corrupt")),
        ("twoGbMaxExtentSparse", "RW 2048 SPARSE \"damaged\"", Some("corrupt")),
        ("twoGbMaxExtentSparse", "RW 2048 SPARSE \"sparse\"\nRW 18446744073709551615 ZERO", Some("virtual-size")),
    ] {
        let found = open_in(dir.path(), &set(create_type, extents)).map_err(|error| error.code());
        assert_eq!(found.as_ref().err().copied(), expected, "{extents}");
    }
    let disk = open_in(dir.path(), &set("twoGbMaxExtentSparse", "RW 7 ZERO\nRW 2048 SPARSE \"sparse\"")).unwrap();
    let inside = read_all(&*open_bytes(&sparse, None).unwrap(), 1 << 20).unwrap();
    support::check_content(&*disk, &[vec![0; 7 * 512], inside].concat());
}

#[test]
fn a_parent_is_never_taken() {
    let parent: Arc<dyn Disk> = Arc::from(open_bytes(&[1; 1 << 20], Some(Format::Raw)).unwrap());
    let options = OpenOptions { parent: Some(parent), ..OpenOptions::default() };
    let open = |bytes: Vec<u8>| open_disk(Arc::new(bytes), &options).unwrap_err().code();
    assert_eq!(open(image(&Target::VmdkSparse)), "parent-mismatch");
    let child = set("monolithicFlat", "RW 1 FLAT \"x\" 0").replace("=ffffffff", "=12345678");
    assert_eq!(open(child.into_bytes()), "unsupported-format");
}

#[test]
fn damage_never_panics_nor_hangs() {
    println!("seed {SEED:#x}");
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("flat")).unwrap().write_all(&vec![5; 1 << 20]).unwrap();
    let text = set("twoGbMaxExtentFlat", "RW 1024 FLAT \"flat\" 1024\nRW 1024 FLAT \"flat\" 0").into_bytes();
    let mut rng = Rng(SEED);
    let mut opened = 0;
    for image in [image(&Target::VmdkSparse), image(&Target::VmdkStream), text] {
        for _ in 0..600 {
            let mut damaged = image.clone();
            for _ in 0..=rng.index(3) {
                // Most of it where the tables are.
                let range = [80, 512 * 31, image.len()][rng.index(3)].min(image.len());
                let from_end = rng.below(3) == 0;
                let at = rng.index(range);
                let at = if from_end { image.len() - 1 - at } else { at };
                damaged[at] = [0, 1, 0x7f, 0xff, rng.next().to_le_bytes()[0]][rng.index(5)];
            }
            if rng.below(8) == 0 {
                damaged.truncate(rng.index(damaged.len()));
            }
            let began = Instant::now();
            let gate = ExtentDirectory::open(dir.path()).unwrap();
            let options = OpenOptions { gate: Some(Arc::new(gate)), ..OpenOptions::default() };
            if let Ok(disk) = open_disk(Arc::new(damaged), &options) {
                opened += 1;
                if disk.size_bytes() <= 64 << 20 {
                    drop(read_all(&*disk, 100_000));
                }
                assert!(disk.data_extents().all(|extent| extent.is_ok()));
            }
            assert!(began.elapsed() < Duration::from_secs(5));
        }
    }
    assert!(opened > 100, "{opened} of 1800 opened: the damage is too great to test anything");
}
