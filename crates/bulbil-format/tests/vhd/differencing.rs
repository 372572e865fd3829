//! Differencing disks, with the parent that the operator names.

use std::sync::Arc;

use bulbil_format::{Disk, FormatError, OpenOptions, open_disk};

use super::image::{Block, DIFFERENCING, DYNAMIC, FIXED, PARENT_ID, fixed, footer, poke_footer, poke_header, sparse};
use super::support::{Rng, check_content, content, open_bytes};
use super::{MIB, SEED};

const BLOCK: usize = 64 << 10;

fn parent(disk: &[u8]) -> Vec<u8> {
    let mut image = fixed(disk, b"win ");
    poke_footer(&mut image, disk.len(), 68, &PARENT_ID);
    image
}

fn open_child(child: &[u8], parent: Box<dyn Disk>) -> Result<Box<dyn Disk>, FormatError> {
    let options = OpenOptions { parent: Some(Arc::from(parent)), ..OpenOptions::default() };
    open_disk(Arc::new(child.to_vec()), &options)
}

/// Makes a child with some blocks of which some sectors are its own; puts them over `disk`.
fn child(rng: &mut Rng, disk: &mut [u8]) -> Vec<u8> {
    let mut blocks = Vec::new();
    for index in (0..disk.len().div_ceil(BLOCK)).filter(|index| index % 4 != 2) {
        let own = content(rng, BLOCK);
        let mut bitmap = vec![0; 512];
        for sector in 0..BLOCK / 512 {
            let here = match index % 4 {
                0 => true,
                1 => rng.below(8) != 0,
                _ => rng.below(8) == 0,
            };
            if here {
                bitmap[sector / 8] |= 1 << (7 - sector % 8);
                let at = index * BLOCK + sector * 512;
                if let Some(place) = disk.get_mut(at..at + 512) {
                    place.copy_from_slice(&own[sector * 512..(sector + 1) * 512]);
                }
            }
        }
        blocks.push(Block { index, bitmap, content: own });
    }
    sparse(DIFFERENCING, disk.len() as u64, BLOCK, &blocks)
}

#[test]
fn sectors_come_from_the_child_or_from_the_parent() {
    println!("seed {SEED:#x}");
    let mut rng = Rng(SEED);
    let mut disk = content(&mut rng, MIB + 512);
    let base = open_bytes(&parent(&disk), None).unwrap();
    let image = child(&mut rng, &mut disk);
    let opened = open_child(&image, base).unwrap();
    check_content(&*opened, &disk);
    let info = opened.info();
    assert_eq!((info.variant.as_deref(), info.data_bytes), (Some("differencing"), None));
    // A grandchild, of which this one is the parent.
    let image = child(&mut rng, &mut disk);
    let mut above = image;
    poke_header(&mut above, 40, b"an identifier...");
    check_content(&*open_child(&above, opened).unwrap(), &disk);
}

#[test]
fn zeros_of_the_parent_stay_holes() {
    let mut disk = vec![0; MIB];
    let mut below = sparse(DYNAMIC, disk.len() as u64, BLOCK, &[]);
    for at in [0, below.len() - 512] {
        poke_footer(&mut below, at, 68, &PARENT_ID);
    }
    let mut bitmap = vec![0; 512];
    bitmap[1] = 0x0f;
    disk[BLOCK + 12 * 512..BLOCK + 16 * 512].fill(7);
    let block = Block { index: 1, bitmap, content: vec![7; BLOCK] };
    let image = sparse(DIFFERENCING, disk.len() as u64, BLOCK, &[block]);
    let extents = check_content(&*open_child(&image, open_bytes(&below, None).unwrap()).unwrap(), &disk);
    assert_eq!(extents, [(BLOCK as u64 + 12 * 512, 4 * 512)]);
}

#[test]
fn without_its_parent_a_differencing_disk_is_refused() {
    let image = sparse(DIFFERENCING, MIB as u64, BLOCK, &[]);
    let error = open_bytes(&image, None).unwrap_err();
    assert_eq!(error.code(), "differencing");
    let expected = r#"differencing: vhd with the parent "C:\\disks\\Größe\u{1b}[31m.vhd"; name the parent explicitly"#;
    assert_eq!(error.to_string(), expected);
}

#[test]
fn what_is_not_the_parent_is_refused() {
    let disk = content(&mut Rng(SEED), MIB);
    let image = sparse(DIFFERENCING, MIB as u64, BLOCK, &[]);
    let check = |parent: &[u8], image: &[u8], message: &str| {
        let error = open_child(image, open_bytes(parent, None).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with(message), "expected: {message}\n   found: {error}");
    };
    let wants = "parent-mismatch: the image wants the parent with the identifier";
    let other = r#"616e2069-6465-6e74-6966-6965722e2e2e"#;
    check(
        &fixed(&disk, b"win "),
        &image,
        &format!(r#"{wants} "74686520-7061-7265-6e74-27732069642e", this one has "{other}""#),
    );
    check(&disk, &image, &format!(r#"{wants} "74686520-7061-7265-6e74-27732069642e", this one has none"#));
    check(&parent(&disk[..MIB / 2]), &image, "parent-mismatch: the image has 1048576 bytes, the parent 524288");
    check(&parent(&disk), &sparse(DYNAMIC, MIB as u64, BLOCK, &[]), "parent-mismatch: a dynamic VHD has no parent");
    let alone = [&disk[..], &footer(FIXED, MIB as u64, b"win ")].concat();
    check(&parent(&disk), &alone, "parent-mismatch: a fixed VHD has no parent");
}

#[test]
fn small_reads_of_a_large_block_do_not_look_at_all_of_its_map() {
    const LARGE: usize = 64 << 20;
    let below = open_bytes(&parent(&vec![0; LARGE]), None).unwrap();
    let block = Block { index: 0, bitmap: vec![0xff; LARGE / 512 / 8], content: vec![7; LARGE] };
    let opened = open_child(&sparse(DIFFERENCING, LARGE as u64, LARGE, &[block]), below).unwrap();
    let start = std::time::Instant::now();
    let mut piece = [0; 700];
    for _ in 0..50_000 {
        opened.read_exact_at(&mut piece, 100).unwrap();
    }
    assert_eq!(piece, [7; 700]);
    assert!(start.elapsed().as_secs() < 2, "{:?}", start.elapsed());
}
