//! Random damage never makes the reader panic, allocate without bound or leave the disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_format::{OpenOptions, ReadAt, open_disk};

use crate::image::{BAT, FILE_PARAMETERS, HEADERS, Image, LOG, METADATA, MIB, REGION_TABLES, entry, image, seal, sums};
use crate::log::{Write, bat_page, log_entry, put_entry, put_log_in_use};
use crate::support::{Rng, peak_resident_kib};

const SEED: u64 = 0x5eed_0d03;
const MUTATIONS_EACH: u64 = 4000;
/// The images have 8 MiB, the log 1 MiB; other tests may run in the same process.
const MAX_RESIDENT_KIB: u64 = 400 << 10;

/// An image with some of its bytes changed.
struct Damaged {
    image: Arc<Vec<u8>>,
    len: usize,
    changes: BTreeMap<usize, u8>,
}

impl Damaged {
    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.changes.extend((at..).zip(bytes.iter().copied()));
    }

    fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = self.image[at..at + len].to_vec();
        self.changes.range(at..at + len).for_each(|(place, byte)| bytes[place - at] = *byte);
        bytes
    }
}

impl ReadAt for Damaged {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let at = usize::try_from(offset_bytes).unwrap();
        if at.checked_add(buf.len()).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.copy_from_slice(&self.get(at, buf.len()));
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.len as u64
    }
}

/// An image with entries of every kind in its log.
fn dirty() -> Image {
    let mut image = image();
    image.bytes.resize(8 * MIB, 0);
    let bat = bat_page(&image, &[(2, entry(7))]);
    let first = [Write::Zero(4 * MIB as u64, 8192), Write::Data(BAT as u64, bat)];
    let second = [Write::Data(7 * MIB as u64, vec![9; 4096])];
    put_entry(&mut image, 0, &log_entry(1, 0, 8 * MIB, &first));
    put_entry(&mut image, 2, &log_entry(2, 0, 8 * MIB, &second));
    put_log_in_use(&mut image);
    image
}

/// Where damage does something.
fn places(dirty: bool) -> Vec<usize> {
    let mut places: Vec<usize> = (0..16).collect();
    HEADERS.into_iter().for_each(|at| places.extend(at..at + 80));
    REGION_TABLES.into_iter().for_each(|at| places.extend(at..at + 112));
    places.extend(METADATA..METADATA + 224);
    (0..5).for_each(|item| places.extend((0..8).map(|byte| FILE_PARAMETERS + 0x1000 * item + byte)));
    (0..6).for_each(|_| places.extend(BAT..BAT + 48));
    if dirty {
        (0..4).for_each(|sector| places.extend((0..128).map(|byte| LOG + 4096 * sector + byte)));
    }
    places
}

fn damage(rng: &mut Rng, file: &mut Damaged, places: &[usize]) {
    for _ in 0..=rng.below(3) {
        let at = if rng.below(10) == 0 { rng.index(file.image.len()) } else { places[rng.index(places.len())] };
        let value = match rng.below(4) {
            0 => 0,
            1 => 0xff,
            2 => file.image[at] ^ 1 << rng.below(8),
            _ => rng.next().to_le_bytes()[0],
        };
        file.set(at, &[value]);
    }
    if rng.below(30) == 0 {
        file.len = rng.index(file.image.len());
    }
    if rng.below(2) == 0 {
        make_sums_right(file);
    }
}

fn make_sums_right(file: &mut Damaged) {
    let mut entries = Vec::new();
    for sector in 0..4 {
        let at = LOG + 4096 * sector;
        let len = u32::from_le_bytes(file.get(at + 8, 4).try_into().unwrap());
        if file.get(at, 4) == b"loge" && (4096..=16384).contains(&len) {
            entries.push((at, usize::try_from(len).unwrap()));
        }
    }
    for (at, len) in sums().chain(entries) {
        let mut bytes = file.get(at, len);
        seal(&mut bytes);
        file.set(at + 4, &bytes[4..8]);
    }
}

/// Looks at all that can be looked at; returns whether the image opened.
fn exercise(rng: &mut Rng, file: Damaged) -> bool {
    let Ok(disk) = open_disk(Arc::new(file), &OpenOptions::declared(bulbil_format::Format::Vhdx)) else { return false };
    let size = disk.size_bytes();
    let mut end = 0;
    for extent in disk.data_extents().take(1000) {
        let extent = extent.unwrap();
        assert!(extent.offset_bytes >= end && extent.len_bytes > 0);
        end = extent.end_bytes();
        assert!(end <= size);
        let mut last = [0; 512];
        disk.read_exact_at(&mut last, end - 512).unwrap();
    }
    for _ in 0..4 {
        let offset = rng.below(size);
        let mut buf = vec![0; usize::try_from((1 + rng.below(200_000)).min(size - offset)).unwrap()];
        // All that is needed was checked at open, and nothing is compressed.
        disk.read_exact_at(&mut buf, offset).unwrap();
    }
    let mut buf = [0; 512];
    assert_eq!(disk.read_exact_at(&mut buf, size - 511).unwrap_err().code(), "out-of-range");
    drop(disk.info());
    true
}

#[test]
fn damaged_images_are_refused_or_read_within_bounds() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    for (name, image, is_dirty) in [("clean", image(), false), ("dirty", dirty(), true)] {
        let (bytes, places) = (Arc::new(image.bytes), places(is_dirty));
        let (mut opened, mut slowest) = (0, Duration::ZERO);
        for number in 0..MUTATIONS_EACH {
            let mut file = Damaged { image: bytes.clone(), len: bytes.len(), changes: BTreeMap::new() };
            damage(&mut rng, &mut file, &places);
            let start = Instant::now();
            opened += u64::from(exercise(&mut rng, file));
            slowest = slowest.max(start.elapsed());
            assert!(start.elapsed() < Duration::from_secs(2), "{name}, mutation {number} takes too long");
        }
        println!("{name}: {opened} of {MUTATIONS_EACH} opened, the slowest took {slowest:?}");
        assert!((MUTATIONS_EACH / 10..MUTATIONS_EACH * 9 / 10).contains(&opened), "{opened} opened");
    }
    println!("{} KiB at most", peak_resident_kib());
    assert!(peak_resident_kib() < MAX_RESIDENT_KIB, "{} KiB", peak_resident_kib());
}
