//! OVA and other archives with one disk.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{Format, Identity, NoObserver, OpenOptions, ReadAt, Target, convert, open_disk};
use sha2::Digest;
use support::{Rng, check_content, content, open_bytes, read_all, run, write_sparse};

const SEED: u64 = 0x5eed_0701;

fn converted(disk: &[u8], target: &Target) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let identity = Identity { uuid: [3; 16], created_unix_s: 1_700_000_000 };
    let source = open_bytes(disk, Some(Format::Raw)).unwrap();
    convert(&*source, file.as_file(), target, &identity, &NoObserver).unwrap();
    std::fs::read(file.path()).unwrap()
}

fn ova(disk: &[u8], name: &str) -> Vec<u8> {
    converted(disk, &Target::Ova { name: name.to_owned() })
}

/// Makes an archive with `tar`.
fn tar(options: &[&str], members: &[(&str, &[u8])]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in members {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_sparse(&path, bytes);
    }
    let archive = tempfile::NamedTempFile::new().unwrap();
    let names: Vec<&str> = members.iter().map(|(name, _)| *name).collect();
    let start = ["-C", dir.path().to_str().unwrap(), "-cf", archive.path().to_str().unwrap()];
    run("tar", &[&start, options, &names].concat());
    std::fs::read(archive.path()).unwrap()
}

fn ovf(files: &str, disks: &str) -> Vec<u8> {
    let text = format!(
        "<?xml version=\"1.0\"?>\n<Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References>{files}</References>\
         <DiskSection><Info/>{disks}</DiskSection><VirtualSystem ovf:id=\"vm\"/></Envelope>"
    );
    text.into_bytes()
}

const FILE: &str = "<File ovf:href=\"d.vmdk\" ovf:id=\"f1\"/>";
const DISK: &str = "<Disk ovf:diskId=\"d1\" ovf:fileRef=\"f1\" ovf:capacity=\"1\"/>";

#[track_caller]
fn check_refused(archive: &[u8], message: &str) {
    let began = Instant::now();
    let error = open_bytes(archive, None).map(|_| ()).expect_err(message);
    assert!(began.elapsed() < Duration::from_secs(1), "{message}");
    assert!(error.to_string().starts_with(message), "expected: {message}\n   found: {error}");
    assert!(message.starts_with(error.code()), "{}: {message}", error.code());
}

#[test]
fn our_ova_reads_back_and_unpacks_with_tar() {
    for (size, name, base) in
        [(8 << 20, "web server <1> & co", "web-server--1----co"), (4096 * 33 + 512, "../..", "disk")]
    {
        let disk = content(&mut Rng(SEED), size);
        let archive = ova(&disk, name);
        check_content(&*open_bytes(&archive, None).unwrap(), &disk);
        check_content(&*open_bytes(&archive, Some(Format::Vmdk)).unwrap(), &disk);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.ova");
        File::create(&path).unwrap().write_all(&archive).unwrap();
        let (dir_name, file_name) = (dir.path().to_str().unwrap(), path.to_str().unwrap());
        let names = run("tar", &["-tf", file_name]);
        assert_eq!(names, format!("{base}.ovf\n{base}.mf\n{base}-disk1.vmdk\n"));
        run("tar", &["-C", dir_name, "-xf", file_name]);
        let raw = dir.path().join("disk.raw");
        write_sparse(&raw, &disk);
        let image = dir.path().join(format!("{base}-disk1.vmdk"));
        run("qemu-img", &["compare", "-f", "vmdk", "-F", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
        let manifest = std::fs::read_to_string(dir.path().join(format!("{base}.mf"))).unwrap();
        for file in [format!("{base}.ovf"), format!("{base}-disk1.vmdk")] {
            let digest = run("sha256sum", &[dir.path().join(&file).to_str().unwrap()]);
            let line = format!("SHA256({file})= {}", digest.split(' ').next().unwrap());
            assert!(manifest.lines().any(|found| found == line), "{manifest}");
        }
        let text = std::fs::read_to_string(dir.path().join(format!("{base}.ovf"))).unwrap();
        assert!(text.contains(&format!("ovf:size=\"{}\"", image.metadata().unwrap().len())), "{text}");
        assert!(roxmltree::Document::parse(&text).is_ok());
        assert_eq!(archive.len() % 512, 0);
    }
}

#[test]
fn archives_of_others_are_read_in_every_format_of_tar() {
    let disk = content(&mut Rng(SEED), 2 << 20);
    let (stream, sparse) = (converted(&disk, &Target::VmdkStream), converted(&disk, &Target::VmdkSparse));
    let long = format!("{}.vmdk", "long-name-".repeat(15));
    for format in ["--format=ustar", "--format=gnu", "--format=oldgnu", "--format=pax"] {
        for image in [&stream, &sparse, &disk] {
            let members: [(&str, &[u8]); 3] =
                [("a.ovf", &ovf(FILE, DISK)), ("notes/x.txt", b"hello"), ("d.vmdk", image)];
            check_content(&*open_bytes(&tar(&[format], &members), None).unwrap(), &disk);
        }
        if format != "--format=ustar" {
            let file = FILE.replace("d.vmdk", &long);
            let members: [(&str, &[u8]); 2] = [(&long, &stream), ("a.OVF", &ovf(&file, DISK))];
            check_content(&*open_bytes(&tar(&[format], &members), None).unwrap(), &disk);
        }
    }
    // A space in the name, and the namespace without a prefix, as some write it.
    let description = ovf("<File href=\"my%20d.vmdk\" id=\"f1\" size=\"5\"/>", "<Disk diskId=\"d\" fileRef=\"f1\"/>");
    let archive = tar(&["--format=ustar"], &[("a.ovf", &description), ("my d.vmdk", &stream)]);
    check_content(&*open_bytes(&archive, None).unwrap(), &disk);
    // Without the blocks of zeros at the end.
    let members_end = 1024 + description.len().next_multiple_of(512) + stream.len();
    let cut = archive[..members_end].to_vec();
    check_content(&*open_bytes(&cut, None).unwrap(), &disk);
}

#[test]
fn a_raw_disk_alone_is_read_with_its_holes() {
    let mut disk = content(&mut Rng(SEED), 1 << 20);
    disk.resize(64 << 20, 0);
    for at in (2..60).step_by(2) {
        disk[at << 20] = 1;
    }
    for options in [&["--format=ustar"][..], &["--format=oldgnu", "-S"], &["--format=gnu", "-S"]] {
        let archive = tar(options, &[("disk.raw", &disk)]);
        assert_eq!(archive.len() < 4 << 20, options.len() == 2);
        let opened = open_bytes(&archive, None).unwrap();
        assert_eq!(opened.format(), Format::Raw);
        check_content(&*opened, &disk);
    }
    check_refused(
        &tar(&["--format=pax", "-S"], &[("disk.raw", &disk)]),
        "bad-archive: a file with holes in the format",
    );
    let small = &disk[..1 << 20];
    check_content(&*open_bytes(&tar(&["--format=gnu"], &[("./disk.raw", small)]), None).unwrap(), small);
    check_refused(&tar(&[], &[("disk.img", small)]), "bad-archive: it has neither");
    check_refused(&tar(&[], &[("disk.raw", small), ("disk2.raw", small)]), "bad-archive: it has neither");
    check_refused(&tar(&[], &[("sub/disk.raw", small)]), "bad-archive: it has neither");
}

#[test]
fn what_does_not_say_which_one_disk_it_has_is_refused() {
    let stream = converted(&content(&mut Rng(SEED), 1 << 20), &Target::VmdkStream);
    let two_files = "<File ovf:href=\"d.vmdk\" ovf:id=\"f1\"/><File ovf:href=\"e.vmdk\" ovf:id=\"f1\"/>";
    let two_disks = format!("{DISK}<Disk ovf:diskId=\"second\u{202e}\" ovf:capacity=\"5\"/>");
    let file = |attribute: &str| FILE.replace("/>", &format!(" {attribute}/>"));
    let named = |name: &str| FILE.replace("d.vmdk", name);
    for (description, message) in [
        (ovf(FILE, ""), "bad-archive: the OVF has no disk"),
        (ovf(FILE, &two_disks), "bad-archive: the OVF has 2 disks: [\"d1\", \"second\\u{202e}\"]"),
        (ovf(FILE, "<Disk ovf:diskId=\"d\" ovf:capacity=\"5\"/>"), "bad-archive: the disk of the OVF is empty"),
        (ovf(FILE, "<Disk ovf:fileRef=\"f1\" ovf:parentRef=\"d0\"/>"), "bad-archive: the disk of the OVF has a parent"),
        (ovf("", DISK), "bad-archive: the OVF does not say which file \"f1\" is"),
        (ovf(two_files, DISK), "bad-archive: the OVF does not say which file \"f1\" is"),
        (ovf("<File ovf:id=\"f1\"/>", DISK), "bad-archive: a file of the OVF has no name"),
        (ovf(&file("ovf:chunkSize=\"7\""), DISK), "bad-archive: \"d.vmdk\" is in pieces"),
        (ovf(&file("ovf:compression=\"bzip2\""), DISK), "bad-archive: \"d.vmdk\" is compressed by \"bzip2\""),
        (ovf(&file("ovf:size=\"99999999\""), DISK), "truncated at byte"),
        (ovf(&named("e.vmdk"), DISK), "bad-archive: it does not have the disk \"e.vmdk\""),
        (ovf(&named("/etc/passwd"), DISK), "external-extent: the content is in \"/etc/passwd\""),
        (ovf(&named("%2e%2e/canary"), DISK), "external-extent: the content is in \"../canary\""),
        (ovf(&named("http://x/y.vmdk"), DISK), "external-extent: the content is in \"http://x/y.vmdk\""),
        (b"<Other/>".to_vec(), "bad-archive: the OVF has no Envelope"),
        (b"<Open> does not match <<Close>>".to_vec(), "bad-archive: the OVF: "),
        (b"\xff\xfe".to_vec(), "bad-archive: the OVF is not text in UTF-8"),
        (b"".to_vec(), "bad-archive: the OVF: "),
        (b"<!DOCTYPE a [<!ENTITY b SYSTEM \"file:///etc/passwd\">]><a>&b;</a>".to_vec(), "bad-archive: the OVF: "),
        ("<a>".repeat(60_000).into_bytes(), "bad-archive: the OVF: "),
        ([b"<Envelope>".to_vec(), b"<a/>".repeat(60_000), b"</Envelope>".to_vec()].concat(), "bad-archive: the OVF: "),
        (vec![b' '; (1 << 20) + 1], "too-large: \"a.ovf\" in the archive"),
    ] {
        check_refused(&tar(&[], &[("a.ovf", &description), ("d.vmdk", &stream)]), message);
    }
    let good = ovf(FILE, DISK);
    check_refused(&tar(&[], &[("d.vmdk", &stream)]), "bad-archive: it has neither");
    check_refused(&tar(&[], &[("a.ovf", &good), ("b.ovf", &good), ("d.vmdk", &stream)]), "bad-archive: it has both");
    let twice = tar(&[], &[("a.ovf", &good), ("d.vmdk", &stream), ("d.vmdk", &stream)]);
    check_refused(&twice, "bad-archive: ");
    let nested = tar(&[], &[("a.ovf", &good), ("d.vmdk", &twice)]);
    check_refused(&nested, "bad-archive: it is in another archive");
    // Declared raw, an archive is taken as it is; any other format must be in it.
    assert_eq!(
        open_bytes(&tar(&[], &[("a.ovf", &good), ("d.vmdk", &stream)]), Some(Format::Qcow2)).unwrap_err().code(),
        "format-mismatch"
    );
}

#[test]
fn digests_of_the_manifest_are_verified() {
    let disk = content(&mut Rng(SEED), 1 << 20);
    let (stream, description) = (converted(&disk, &Target::VmdkStream), ovf(FILE, DISK));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (sha1, sha256) = (hex(&sha1::Sha1::digest(&stream)), hex(&sha2::Sha256::digest(&description)));
    let sha512 = hex(&sha2::Sha512::digest(&stream)).to_uppercase();
    for (manifest, expected) in [
        (format!("SHA1 (d.vmdk) = {sha1}\r\nSHA256(a.ovf)= {sha256}\r\n"), Ok(())),
        (format!("SHA512(d.vmdk)= {sha512}\n\nSHA256(other.nvram)= 00\n"), Ok(())),
        (format!("SHA1(d.vmdk)= {}\n", sha1.replace(&sha1[..1], "x")), Err("checksum")),
        (format!("SHA256(d.vmdk)= {sha256}\n"), Err("checksum")),
        (format!("SHA256(a.ovf)= {}\n", &sha256[1..]), Err("checksum")),
        (format!("SHA256(a.ovf)= {sha256}\n").repeat(2), Err("bad-archive")),
        (format!("MD5(a.ovf)= {sha256}\n"), Err("bad-archive")),
        ("hello\n".to_owned(), Err("bad-archive")),
    ] {
        let archive =
            tar(&[], &[("a.ovf", &description), ("a.mf", manifest.as_bytes()), ("d.vmdk", &stream), ("a.cert", b"x")]);
        let found = open_bytes(&archive, None).map(|_| ()).map_err(|error| error.code());
        assert_eq!(found, expected, "{manifest}");
    }
    let mut ours = ova(&disk, "vm");
    let at = ours.len() / 2;
    ours[at] ^= 1;
    check_refused(&ours, "checksum: that of \"vm-disk1.vmdk\" in the manifest is wrong");
}

/// Makes the checksum of a header right again.
fn resealed(mut archive: Vec<u8>, header: usize) -> Vec<u8> {
    archive[header + 148..header + 156].fill(b' ');
    let sum: u32 = archive[header..header + 512].iter().map(|byte| u32::from(*byte)).sum();
    archive[header + 148..header + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive
}

fn poked(archive: &[u8], at: usize, poke: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    archive[at..at + poke.len()].copy_from_slice(poke);
    archive
}

#[test]
fn damaged_headers_of_the_archive_are_refused() {
    let stream = converted(&content(&mut Rng(SEED), 1 << 20), &Target::VmdkStream);
    let archive = tar(&["--format=ustar"], &[("a.ovf", &ovf(FILE, DISK)), ("d.vmdk", &stream)]);
    open_bytes(&archive, None).unwrap();
    let second = 1024;
    assert_eq!(&archive[second..second + 6], b"d.vmdk");
    check_refused(&poked(&archive, second, b"e"), "checksum: that of the header of the archive at 0x400 is wrong");
    for (at, poke, message) in [
        (156, &b"1"[..], "bad-archive: \"d.vmdk\" is not a file, but a link or device of type '1'"),
        (156, b"2", "bad-archive: \"d.vmdk\" is not a file"),
        (156, b"3", "bad-archive: \"d.vmdk\" is not a file"),
        (156, b"Z", "bad-archive: \"d.vmdk\" is not a file"),
        (156, b"S", "bad-archive: the map of holes of \"d.vmdk\" makes no sense"),
        (156, b"x", "too-large: a name of"),
        (156, b"L", "too-large: a name of"),
        (124, b"77777777777\0", "truncated at byte"),
        (124, b"99999999999\0", "bad-archive: the header at 0x400 has no size"),
        (124, b"            ", "bad-archive: the header at 0x400 has no size"),
        (124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", "truncated at byte"),
        (124, b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", "truncated at byte"),
        (124, b"\x80\0\0\x01\0\0\0\0\0\0\0\0", "bad-archive: the header at 0x400 has no size"),
        (124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "bad-archive: the header at 0x400 has no size"),
    ] {
        check_refused(&resealed(poked(&archive, second + at, poke), second), message);
    }
    for len in [600, second + 100, second + 512 + 5, archive.len() / 2] {
        check_refused(&archive[..len], "truncated at byte");
    }
    check_refused(&archive[..second], "bad-archive: it does not have the disk");
    let empty = resealed(poked(&archive[..512], 124, b"00000000000\0"), 0);
    check_refused(&empty.repeat(2000), "too-large: the number of members of the archive");
    let large = resealed(poked(&archive, second + 124, format!("{:012o}", stream.len()).as_bytes()), second);
    open_bytes(&large, None).unwrap();
    let mut binary = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    binary[4..].copy_from_slice(&(stream.len() as u64).to_be_bytes());
    open_bytes(&resealed(poked(&archive, second + 124, &binary), second), None).unwrap();
}

#[test]
fn damage_never_panics_nor_hangs() {
    println!("seed {SEED:#x}");
    let mut disk = content(&mut Rng(SEED), 1 << 20);
    disk.resize(4 << 20, 0);
    let archives = [ova(&disk, "vm"), tar(&["--format=oldgnu", "-S"], &[("disk.raw", &disk)])];
    let mut rng = Rng(SEED);
    let mut opened = 0;
    for archive in &archives {
        for _ in 0..600 {
            let mut damaged = archive.clone();
            let header = if rng.below(2) == 0 { 0 } else { 512 * rng.index(12) };
            for _ in 0..=rng.index(3) {
                damaged[header + rng.index(512)] =
                    [0, b'0', b'7', 0x80, 0xff, rng.next().to_le_bytes()[0]][rng.index(6)];
            }
            if rng.below(4) != 0 {
                damaged = resealed(damaged, 0);
            }
            if rng.below(8) == 0 {
                damaged.truncate(rng.index(damaged.len()));
            }
            let began = Instant::now();
            if let Ok(disk) = open_bytes(&damaged, None) {
                opened += 1;
                if disk.size_bytes() <= 64 << 20 {
                    drop(read_all(&*disk, 100_000));
                }
            }
            assert!(began.elapsed() < Duration::from_secs(5));
        }
    }
    assert!(opened > 50, "{opened} of 1200 opened");
}

/// A file of which one byte in the middle is far away.
struct Large {
    head: Vec<u8>,
    len_bytes: u64,
}

impl ReadAt for Large {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        buf.fill(0);
        let start = usize::try_from(offset_bytes).unwrap().min(self.head.len());
        (&self.head[start..]).read(buf).map(|_| ())
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

#[test]
fn members_of_more_than_8_gib_are_read() {
    let small = tar(&["--format=gnu"], &[("disk.raw", &content(&mut Rng(SEED), 4096))]);
    let len_bytes = 20_u64 << 30;
    let mut binary = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    binary[4..].copy_from_slice(&len_bytes.to_be_bytes());
    let head = resealed(poked(&small, 124, &binary), 0);
    let file = Large { head, len_bytes: len_bytes + 2048 };
    let disk = open_disk(Arc::new(file), &OpenOptions::default()).unwrap();
    assert_eq!(disk.size_bytes(), len_bytes);
    let mut end = [0xee; 512];
    disk.read_exact_at(&mut end, len_bytes - 512).unwrap();
    assert_eq!(end, [0; 512]);
}

#[test]
fn what_is_said_of_a_folder_is_not_for_the_file_after_it() {
    let disk = content(&mut Rng(SEED), 1 << 20);
    let archive = tar(&["--format=ustar"], &[("disk.raw", &disk)]);
    let header = |kind: &[u8], size: &[u8]| resealed(poked(&poked(&archive[..512], 156, kind), 124, size), 0);
    let mut record = b"18 path=some/name\n12 size=512\n".to_vec();
    record.resize(512, 0);
    let pax = [header(b"x", b"00000000036\0"), record].concat();
    let long = [header(b"L", b"00000000004\0"), [b"name".to_vec(), vec![0; 508]].concat()].concat();
    for before in [pax, long] {
        let with_folder = [before, header(b"5", b"00000000000\0"), archive.clone()].concat();
        check_content(&*open_bytes(&with_folder, None).unwrap(), &disk);
    }
}

#[test]
fn a_disk_that_is_a_hole_is_not_digested() {
    let manifest = format!("SHA256(d.vmdk)= {}\n", "0".repeat(64));
    let members: [(&str, &[u8]); 3] =
        [("a.ovf", &ovf(FILE, DISK)), ("a.mf", manifest.as_bytes()), ("d.vmdk", &[1; 512])];
    let archive = tar(&["--format=gnu"], &members);
    let at = archive.chunks(512).position(|block| block.starts_with(b"d.vmdk\0")).unwrap() * 512;
    let mut size = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    size[4..].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&resealed(poked(&archive, at + 124, &size), at)[..at + 1024]).unwrap();
    file.set_len(2 << 40).unwrap();
    let start = Instant::now();
    let file = bulbil_format::FileReader::new(file).unwrap();
    let error = open_disk(Arc::new(file), &OpenOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("too-much-data: a disk to digest of 1099511627776 bytes"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(1));
}
