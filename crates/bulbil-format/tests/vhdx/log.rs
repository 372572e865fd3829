//! Logs in use are applied in memory.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::image::{BAT, HEADERS, Image, LOG, MIB, entry, image, seal};
use crate::support::{Rng, check_content, open_bytes, run, write_sparse};

pub(crate) const LOG_GUID: [u8; 16] = *b"the log in use!!";
const SECTORS: usize = 256;

/// What one descriptor writes.
pub(crate) enum Write {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
}

/// Makes an entry; `tail` and places are counted in sectors.
pub(crate) fn log_entry(sequence: u64, tail: usize, file_bytes: usize, writes: &[Write]) -> Vec<u8> {
    let mut bytes = vec![0; (64 + 32 * writes.len()).next_multiple_of(4096)];
    bytes[..4].copy_from_slice(b"loge");
    bytes[12..16].copy_from_slice(&u32::try_from(tail * 4096).unwrap().to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24..28].copy_from_slice(&u32::try_from(writes.len()).unwrap().to_le_bytes());
    bytes[32..48].copy_from_slice(&LOG_GUID);
    bytes[48..56].copy_from_slice(&(6 * MIB as u64).to_le_bytes());
    bytes[56..64].copy_from_slice(&(file_bytes as u64).to_le_bytes());
    for (index, write) in writes.iter().enumerate() {
        let at = 64 + 32 * index;
        let (kind, head, offset) = match write {
            Write::Zero(offset, len) => (b"zero", [[0; 4].to_vec(), len.to_le_bytes().to_vec()].concat(), offset),
            Write::Data(offset, data) => (b"desc", [&data[4092..], &data[..8]].concat(), offset),
        };
        let fields = [&kind[..], &head, &offset.to_le_bytes(), &sequence.to_le_bytes()].concat();
        bytes[at..at + 32].copy_from_slice(&fields);
        if let Write::Data(_, data) = write {
            let sequence = sequence.to_le_bytes();
            bytes.extend([b"data", &sequence[4..], &data[8..4092], &sequence[..4]].concat());
        }
    }
    let len = u32::try_from(bytes.len()).unwrap();
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// Puts an entry into the log at a sector; the log is a ring.
pub(crate) fn put_entry(image: &mut Image, sector: usize, entry: &[u8]) {
    for (index, bytes) in entry.chunks(4096).enumerate() {
        image.put(LOG + (sector + index) % SECTORS * 4096, bytes);
    }
}

pub(crate) fn put_log_in_use(image: &mut Image) {
    image.put_both(HEADERS, 48, &LOG_GUID);
    image.seal();
}

/// The page of the BAT with some entries changed.
pub(crate) fn bat_page(image: &Image, entries: &[(usize, u64)]) -> Vec<u8> {
    let mut page = image.bytes[BAT..BAT + 4096].to_vec();
    for (block, entry) in entries {
        page[block * 8..block * 8 + 8].copy_from_slice(&entry.to_le_bytes());
    }
    page
}

fn noise(seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten().take(4096).collect()
}

#[track_caller]
fn check_replayed(image: &Image, entries: usize) {
    let disk = open_bytes(&image.bytes, None).unwrap_or_else(|error| panic!("{error}"));
    check_content(&*disk, &image.content);
    let note = format!("not closed cleanly; {entries} entries of its log were applied in memory");
    assert_eq!(disk.info().notes, [note]);
    assert_eq!(disk.info().file_bytes, image.bytes.len() as u64);
}

/// What `qemu-img` makes of a log it applies to a copy of the file.
fn check_as_qemu(image: &Image) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (copy, raw) = (path("copy.vhdx"), path("copy.raw"));
    // QEMU has blocks end in the file.
    let mut bytes = image.bytes.clone();
    bytes.resize(bytes.len().next_multiple_of(MIB), 0);
    write_sparse(Path::new(&copy), &bytes);
    run("qemu-img", &["check", "-q", "-r", "all", "-f", "vhdx", &copy]);
    run("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", &copy, &raw]);
    assert!(std::fs::read(Path::new(&raw)).unwrap() == image.content, "QEMU reads something else");
}

/// An image whose log makes block 2 present, puts content into it, and takes some from block 3.
fn dirty(first_sector: usize) -> Image {
    let mut image = image();
    image.bytes.resize(8 * MIB, 0);
    let bat = bat_page(&image, &[(2, entry(7))]);
    let place = |sector: usize| (first_sector + sector) % SECTORS;
    let writes = [
        vec![Write::Zero(4 * MIB as u64, 8192), Write::Data(BAT as u64, bat)],
        vec![Write::Data(7 * MIB as u64 + 4096, noise(1)), Write::Data(4 * MIB as u64 + 4096, noise(2))],
        vec![Write::Zero(7 * MIB as u64, 4096), Write::Data(7 * MIB as u64 + 8192, noise(3))],
    ];
    let mut sector = 0;
    for (sequence, writes) in (40..).zip(&writes) {
        let bytes = log_entry(sequence, place(0), 8 * MIB, writes);
        put_entry(&mut image, place(sector), &bytes);
        sector += bytes.len() / 4096;
    }
    image.content[3 * MIB..3 * MIB + 4096].fill(0);
    image.content[3 * MIB + 4096..3 * MIB + 8192].copy_from_slice(&noise(2));
    image.content[2 * MIB + 4096..2 * MIB + 8192].copy_from_slice(&noise(1));
    image.content[2 * MIB + 8192..2 * MIB + 12288].copy_from_slice(&noise(3));
    put_log_in_use(&mut image);
    image
}

#[test]
fn all_entries_of_the_active_sequence_are_applied() {
    let image = dirty(0);
    check_replayed(&image, 3);
    check_as_qemu(&image);
}

#[test]
fn a_sequence_may_begin_anywhere_and_pass_the_end_of_the_log() {
    // From the last sector on the end is between entries, within descriptors and their data, and between data sectors.
    for first in [3, 250, 251, 252, 253, 254, 255] {
        check_replayed(&dirty(first), 3);
    }
}

#[test]
fn entries_before_the_tail_have_reached_the_file_and_are_not_applied_again() {
    let mut image = dirty(10);
    let late = [Write::Data(7 * MIB as u64 + 12288, noise(4))];
    image.content[2 * MIB + 12288..2 * MIB + 16384].copy_from_slice(&noise(4));
    // Entry 42 is at sector 15, 43 behind it; 40 and 41 are in the file already, and in one place more than that.
    let bat = bat_page(&image, &[(2, entry(7))]);
    image.put(BAT, &bat);
    image.put(4 * MIB, &[0; 4096]);
    image.put(4 * MIB + 4096, &noise(5));
    image.put(7 * MIB + 4096, &noise(1));
    image.content[3 * MIB + 4096..3 * MIB + 8192].copy_from_slice(&noise(5));
    put_entry(&mut image, 17, &log_entry(43, 15, 8 * MIB, &late));
    check_replayed(&image, 2);
}

#[test]
fn what_follows_a_damaged_entry_is_not_applied() {
    let mut image = dirty(0);
    let clean = image.clone();
    // Entry 41 has its descriptors at sector 2 and its data at 3 and 4.
    for at in [2 * 4096 + 4, 2 * 4096 + 64, 2 * 4096 + 90, 3 * 4096 + 1, 3 * 4096 + 100, 4 * 4096 + 4092] {
        image.bytes.clone_from(&clean.bytes);
        image.bytes[LOG + at] ^= 0x10;
        let mut expected = image.clone();
        expected.content[2 * MIB..3 * MIB].fill(0);
        expected.content[3 * MIB + 4096..3 * MIB + 8192].fill(0);
        check_replayed(&expected, 1);
    }
}

#[test]
fn older_sequences_and_those_of_other_logs_do_not_count() {
    let mut image = dirty(0);
    put_entry(&mut image, 100, &log_entry(30, 100, 8 * MIB, &[Write::Zero(BAT as u64, 4096)]));
    // Of higher number, but its tail is not in it.
    put_entry(&mut image, 110, &log_entry(90, 100, 8 * MIB, &[Write::Zero(BAT as u64, 4096)]));
    let mut other = log_entry(91, 120, 8 * MIB, &[Write::Zero(BAT as u64, 4096)]);
    other[32] ^= 1;
    seal(&mut other);
    put_entry(&mut image, 120, &other);
    check_replayed(&image, 3);
    put_entry(&mut image, 140, &log_entry(92, 140, 8 * MIB, &[]));
    let bat = image.bytes[BAT..BAT + 4096].to_vec();
    assert_eq!(bat[16..24], [0; 8], "block 2 is not present without the log");
    let old = crate::image::image();
    image.content.clone_from(&old.content);
    check_replayed(&image, 1);
}

/// An image whose log is one entry of `zeros` zero descriptors, nine data descriptors over them, and one more.
fn many(zeros: usize) -> Image {
    let mut image = image();
    image.bytes.resize(7 * MIB, 0);
    let block = 4 * MIB as u64;
    let mut writes: Vec<_> = (0..zeros as u64).map(|n| Write::Zero(block + n * 4096, 4096)).collect();
    writes.extend((0..9).map(|n| Write::Data(block + n * 8192, noise(n))));
    writes.push(Write::Zero(block + 4 * 8192, 4096));
    put_entry(&mut image, 200, &log_entry(1, 200, 7 * MIB, &writes));
    image.content[3 * MIB..3 * MIB + zeros * 4096].fill(0);
    for n in (0..9).filter(|n| *n != 4) {
        let at = 3 * MIB + n * 8192;
        image.content[at..at + 4096].copy_from_slice(&noise(n as u64));
    }
    put_log_in_use(&mut image);
    image
}

#[test]
fn an_entry_of_many_descriptors_is_applied_in_order() {
    // One sector of descriptors, full; one more; just two; a third. QEMU 7.2 reads no more than one.
    check_as_qemu(&many(116));
    for zeros in [116, 117, 244, 245] {
        check_replayed(&many(zeros), 1);
    }
}

#[test]
fn a_log_may_make_the_file_longer() {
    let mut image = image();
    let bat = bat_page(&image, &[(2, entry(7))]);
    let writes = [Write::Data(BAT as u64, bat), Write::Data(7 * MIB as u64 + 4096, noise(1))];
    put_entry(&mut image, 0, &log_entry(1, 0, 8 * MIB, &writes));
    put_log_in_use(&mut image);
    image.content[2 * MIB + 4096..2 * MIB + 8192].copy_from_slice(&noise(1));
    check_replayed(&image, 1);
}

#[track_caller]
fn check_refused(image: &Image, message: &str) {
    let start = Instant::now();
    let error = open_bytes(&image.bytes, None).map(|_| ()).expect_err(message).to_string();
    assert!(error.starts_with(message), "expected: {message}\n   found: {error}");
    assert!(start.elapsed() < Duration::from_secs(1), "{message}: {:?}", start.elapsed());
}

const NO_SEQUENCE: &str =
    "corrupt: the log is in use, but has no valid sequence of entries; try `qemu-img check -r all`";

#[test]
fn logs_that_cannot_be_applied_are_refused() {
    let mut none = image();
    put_log_in_use(&mut none);
    check_refused(&none, NO_SEQUENCE);
    let with = |bytes: Vec<u8>| {
        let mut image = none.clone();
        put_entry(&mut image, 0, &bytes);
        image
    };
    let edited = |at: usize, value: &[u8]| {
        let mut bytes = log_entry(5, 0, 7 * MIB, &[Write::Zero(4 << 20, 4096), Write::Data(4 << 20, noise(1))]);
        bytes[at..at + value.len()].copy_from_slice(value);
        seal(&mut bytes);
        with(bytes)
    };
    assert!(open_bytes(&edited(0, b"loge").bytes, None).is_ok());
    for (at, value) in [
        (0, &b"logf"[..]),
        (8, &[0; 4]),
        (8, &[0xff; 4]),
        (8, &4096_u32.to_le_bytes()),
        (8, &8193_u32.to_le_bytes()),
        (8, &12288_u32.to_le_bytes()),
        (12, &1_u32.to_le_bytes()),
        (12, &4096_u32.to_le_bytes()),
        (12, &0x10_0000_u32.to_le_bytes()),
        (16, &[0; 8]),
        (16, &6_u64.to_le_bytes()),
        (24, &[0xff; 4]),
        (24, &1_u32.to_le_bytes()),
        (24, &3_u32.to_le_bytes()),
        (32, b"T"),
        (64, b"Zero"),
        (72, &4097_u64.to_le_bytes()),
        (72, &(u64::MAX - 4095).to_le_bytes()),
        (80, &0x40_0200_u64.to_le_bytes()),
        (88, &6_u64.to_le_bytes()),
        (96, b"data"),
        (4096, b"desc"),
        (4100, &1_u32.to_le_bytes()),
        (8188, &6_u32.to_le_bytes()),
    ] {
        check_refused(&edited(at, value), NO_SEQUENCE);
    }
    for (at, value, message) in [
        (48, 8_u64 << 20, "truncated at byte 6292992: the file its log was written for ends at byte 8388608"),
        (56, u64::MAX, "too-large: a file of 17592186044416 MiB is over the limit of 134217728"),
        (72, 4_u64 << 20, "corrupt: the log writes up to 0x800000 in a file of 0x700000 bytes"),
        (112, 7_u64 << 20, "corrupt: the log writes up to 0x701000 in a file of 0x700000 bytes"),
        (112, u64::MAX - 4095, "corrupt: the log writes up to 0xffffffffffffffff in a file of 0x700000 bytes"),
    ] {
        check_refused(&edited(at, &value.to_le_bytes()), message);
    }
    let mut version = edited(0, b"loge");
    version.put_both(HEADERS, 64, &1_u16.to_le_bytes());
    version.seal();
    check_refused(&version, "unsupported-format: VHDX with a log of version 1");
    let mut empty = none;
    empty.put_both(HEADERS, 68, &0_u32.to_le_bytes());
    empty.seal();
    check_refused(&empty, NO_SEQUENCE);
}

#[test]
fn a_large_log_of_nothing_but_beginnings_is_searched_quickly() {
    // A sector of this is an entry of the whole log, but for what comes behind it.
    let mut hostile = log_entry(1, 0, 7 * MIB, &[]);
    hostile[8..12].copy_from_slice(&(32_u32 << 20).to_le_bytes());
    let descriptors: u32 = 512 * 1024;
    hostile[24..28].copy_from_slice(&descriptors.to_le_bytes());
    for at in (64..4096).step_by(32) {
        hostile[at..at + 4].copy_from_slice(b"zero");
        hostile[at + 24..at + 32].copy_from_slice(&1_u64.to_le_bytes());
    }
    let mut image = image();
    let log = image.bytes.len().next_multiple_of(MIB);
    image.bytes.resize(log + (32 << 20), 0);
    for at in (log..image.bytes.len()).step_by(4096) {
        image.put(at, &hostile);
    }
    image.put_both(HEADERS, 68, &(32_u32 << 20).to_le_bytes());
    image.put_both(HEADERS, 72, &(log as u64).to_le_bytes());
    put_log_in_use(&mut image);
    check_refused(&image, NO_SEQUENCE);
    // Entries of one sector, each with the number after that of the one before: one sequence, but without its tail.
    for (number, at) in (1..).zip((log..image.bytes.len()).step_by(4096)) {
        image.put(at, &log_entry(number, 100, 7 * MIB, &[]));
    }
    check_replayed(&image, 8192 - 100);
}
