//! Small images of every format, made by `qemu-img` or by hand, and the tools to damage them.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::sync::Mutex;

use super::support::{Rng, run, write_sparse};

/// Little content and much room: a boot signature, some noise, text that compresses.
pub(crate) fn small_content() -> Vec<u8> {
    let mut rng = Rng(0x5eed_0010);
    let mut bytes = vec![0; 64 << 10];
    for at in [0, 4096, 40_000, (64 << 10) - 512] {
        bytes[at..at + 64].copy_from_slice(&std::array::from_fn::<u8, 64, _>(|_| rng.next().to_le_bytes()[0]));
    }
    let text = b"a line that compresses well\n".iter().copied().cycle();
    bytes.splice(8192..9000, text.take(808));
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// Converts small content with `qemu-img`.
pub(crate) fn qemu(format: &str, options: &str) -> Vec<u8> {
    qemu_of(format, options, &small_content())
}

/// Converts content with `qemu-img`; with a `-c` before the options, compressed. What was made once is not made again.
pub(crate) fn qemu_of(format: &str, options: &str, content: &[u8]) -> Vec<u8> {
    static MADE: Mutex<BTreeMap<(String, u64), Vec<u8>>> = Mutex::new(BTreeMap::new());
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    let key = (format!("{format} {options}"), hasher.finish());
    MADE.lock().unwrap().entry(key).or_insert_with(|| convert(format, options, content)).clone()
}

fn convert(format: &str, options: &str, content: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.img"));
    write_sparse(&raw, content);
    let options: Vec<_> = options.split_whitespace().collect();
    let files = [raw.to_str().unwrap(), image.to_str().unwrap()];
    run("qemu-img", &[&["convert", "-f", "raw", "-O", format], &options[..], &files].concat());
    std::fs::read(image).unwrap()
}

/// Returns the bytes with some of them replaced.
pub(crate) fn poked(mut bytes: Vec<u8>, pokes: &[(usize, &[u8])]) -> Vec<u8> {
    for (at, poke) in pokes {
        bytes[*at..at + poke.len()].copy_from_slice(poke);
    }
    bytes
}

pub(crate) fn be_u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(crate) fn le_u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(crate) fn le_u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Marks a qcow2 entry whose cluster nobody else uses.
pub(crate) const COPIED: u64 = 1 << 63;

/// A version 3 header of qcow2 with clusters of 64 KiB in a file of six: the refcount table in the second, the L1 table
/// in the third.
pub(crate) fn qcow2_header(size_bytes: u64, l1_entries: u32) -> Vec<u8> {
    let mut bytes = vec![0; 6 << 16];
    for (at, word) in [(0, 0x5146_49fb_0000_0003), (24, size_bytes), (40, 2 << 16), (48, 1 << 16)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(word));
    }
    for (at, word) in [(20, 16), (36, l1_entries), (56, 1), (96, 4), (100, 104)] {
        bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    bytes
}

/// Fills a range with one big-endian word.
pub(crate) fn fill_be(bytes: &mut [u8], range: std::ops::Range<usize>, word: u64) {
    for slot in bytes[range].chunks_exact_mut(8) {
        slot.copy_from_slice(&word.to_be_bytes());
    }
}

/// Where the first L2 table of a qcow2 image is.
pub(crate) fn qcow2_l2_at(bytes: &[u8]) -> usize {
    let l1 = usize::try_from(be_u64_at(bytes, 40)).unwrap();
    usize::try_from(be_u64_at(bytes, l1) & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// The disk types of a VHD footer.
pub(crate) const VHD_FIXED: u32 = 2;
pub(crate) const VHD_DYNAMIC: u32 = 3;
pub(crate) const VHD_DIFFERENCING: u32 = 4;

/// A footer of VHD.
pub(crate) fn vhd_footer(kind: u32, size_bytes: u64) -> Vec<u8> {
    let mut footer = vec![0; 512];
    let data_offset = if kind == VHD_FIXED { u64::MAX } else { 512 };
    footer[..8].copy_from_slice(b"conectix");
    for (at, word) in [(8, 2), (12, 0x0001_0000), (24, 0x2a00_0000), (60, kind)] {
        footer[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    footer[28..32].copy_from_slice(b"test");
    footer[36..40].copy_from_slice(b"Wi2k");
    for (at, word) in [(16, data_offset), (40, size_bytes), (48, size_bytes)] {
        footer[at..at + 8].copy_from_slice(&u64::to_be_bytes(word));
    }
    footer[56..60].copy_from_slice(&[0, 2, 2, 32]);
    footer[68..84].copy_from_slice(b"sixteen bytes id");
    fix_vhd_sum(&mut footer, 64);
    footer
}

/// The header of a dynamic VHD with its table at 1536.
pub(crate) fn vhd_header(entries: u32, block_bytes: u32) -> Vec<u8> {
    let mut header = vec![0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[8..16].fill(0xff);
    header[16..24].copy_from_slice(&1536_u64.to_be_bytes());
    for (at, word) in [(24, 0x0001_0000), (28, entries), (32, block_bytes)] {
        header[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    fix_vhd_sum(&mut header, 36);
    header
}

/// Recomputes the checksum of a footer (at 64) or of a header (at 36).
pub(crate) fn fix_vhd_sum(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A dynamic VHD of blocks of 4 KiB, of which the table names the sectors; those of the first MiB are there and have content.
pub(crate) fn vhd_dynamic(size_bytes: u64, table: &[u32]) -> Vec<u8> {
    let footer = vhd_footer(VHD_DYNAMIC, size_bytes);
    let header = vhd_header(u32::try_from(table.len()).unwrap(), 4096);
    let mut image = [footer.clone(), header].concat();
    image.extend(table.iter().flat_map(|sector| sector.to_be_bytes()));
    image.resize(image.len().next_multiple_of(512), 0xff);
    for sector in table.iter().map(|sector| *sector as usize).filter(|sector| *sector < 2048) {
        // The map of sectors, then 4 KiB that begin with something.
        image.resize(image.len().max((sector + 9) * 512), 0);
        image[sector * 512..sector * 512 + 512].fill(0xff);
        image[(sector + 1) * 512..(sector + 1) * 512 + 64].fill(0xee);
    }
    image.extend(footer);
    image
}

/// Recomputes the checksums of both headers and both region tables of a VHDX file.
pub(crate) fn fix_vhdx_sums(bytes: &mut [u8]) {
    for (at, len) in [(64 << 10, 4 << 10), (128 << 10, 4 << 10), (192 << 10, 64 << 10), (256 << 10, 64 << 10)] {
        let part: &mut [u8] = &mut bytes[at..at + len];
        part[4..8].fill(0);
        let sum = crc32c::crc32c(part).to_le_bytes();
        part[4..8].copy_from_slice(&sum);
    }
}

/// Replaces bytes of a VHDX file and makes its checksums right again.
pub(crate) fn poked_vhdx(bytes: Vec<u8>, pokes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = poked(bytes, pokes);
    fix_vhdx_sums(&mut bytes);
    bytes
}

/// CAA16737-FA36-4D43-B3B6-33F0AA44E76B
pub(crate) const VHDX_FILE_PARAMETERS: [u8; 16] =
    [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b];
/// 2FA54224-CD1B-4876-B211-5DBED83BF4B8
pub(crate) const VHDX_DISK_SIZE: [u8; 16] =
    [0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8];

/// Where the metadata item of a kind is; its entry in the table of 64 KiB says so.
pub(crate) fn vhdx_item_at(image: &[u8], kind: &[u8]) -> usize {
    let metadata = find(image, b"metadata");
    let entry = metadata + find(&image[metadata..metadata + (64 << 10)], kind);
    metadata + le_u32_at(image, entry + 16) as usize
}

/// An image that was not closed: its log would write some text to the last sector but one.
pub(crate) fn vhdx_dirty() -> Vec<u8> {
    let image = qemu("vhdx", "-o block_size=1M");
    let file_bytes = image.len() as u64;
    with_log_entry(image, file_bytes)
}

/// Adds a log in use: one entry, after which the file has a length.
pub(crate) fn with_log_entry(mut image: Vec<u8>, file_bytes: u64) -> Vec<u8> {
    let log_guid = *b"id of the log...";
    let log_at = usize::try_from(le_u64_at(&image, (64 << 10) + 72)).unwrap();
    let len = image.len() as u64;
    for header in [64 << 10, 128 << 10] {
        image[header + 48..header + 64].copy_from_slice(&log_guid);
    }
    let mut entry = vec![0; 8192];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&8192_u32.to_le_bytes());
    entry[16..24].copy_from_slice(&1_u64.to_le_bytes());
    entry[24..28].copy_from_slice(&1_u32.to_le_bytes());
    entry[32..48].copy_from_slice(&log_guid);
    entry[48..56].copy_from_slice(&len.to_le_bytes());
    entry[56..64].copy_from_slice(&file_bytes.to_le_bytes());
    // The descriptor: last 4 bytes, first 8 bytes, where in the file, sequence number.
    entry[64..68].copy_from_slice(b"desc");
    entry[68..72].copy_from_slice(b"tail");
    entry[72..80].copy_from_slice(b"the head");
    entry[80..88].copy_from_slice(&(len.max(file_bytes) - 4096).to_le_bytes());
    entry[88..96].copy_from_slice(&1_u64.to_le_bytes());
    // The data: the rest of the sector.
    entry[4096..4100].copy_from_slice(b"data");
    entry[4104..4104 + 20].copy_from_slice(b"written from the log");
    entry[8188..].copy_from_slice(&1_u32.to_le_bytes());
    let sum = crc32c::crc32c(&entry).to_le_bytes();
    entry[4..8].copy_from_slice(&sum);
    // All of the log is that entry.
    image[log_at..log_at + (1 << 20)].fill(0);
    image[log_at..log_at + entry.len()].copy_from_slice(&entry);
    fix_vhdx_sums(&mut image);
    image
}

/// Where the first bytes that look so are.
pub(crate) fn find(bytes: &[u8], wanted: &[u8]) -> usize {
    bytes.windows(wanted.len()).position(|window| window == wanted).expect("the image has these bytes")
}

/// A descriptor of VMDK.
pub(crate) fn vmdk_descriptor(create_type: &str, parent_cid: &str, extents: &str) -> Vec<u8> {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent_cid}\ncreateType=\"{create_type}\"\n\n\
         # Extent description\n{extents}\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
         ddb.geometry.cylinders = \"1\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"ide\"\n"
    );
    text.into_bytes()
}

/// A tar archive.
pub(crate) fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in members {
        archive.extend(tar_header(name, content.len() as u64, b'0'));
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// The header of a member of a tar archive.
pub(crate) fn tar_header(name: &str, len_bytes: u64, kind: u8) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{len_bytes:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    fix_tar_sum(&mut header);
    header
}

/// Recomputes the checksum of a header of a tar archive.
pub(crate) fn fix_tar_sum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// The description in an OVA of disks in files of these names and lengths.
pub(crate) fn ovf(files: &[(&str, usize)]) -> Vec<u8> {
    let each = |make: &dyn Fn(usize, &str, usize) -> String| -> String {
        files.iter().enumerate().map(|(index, (name, len))| make(index, name, *len)).collect()
    };
    let references =
        each(&|index, name, len| format!("<File ovf:id=\"file{index}\" ovf:href=\"{name}\" ovf:size=\"{len}\"/>"));
    let disks = each(&|index, _, _| {
        let format = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
        format!(
            "<Disk ovf:diskId=\"disk{index}\" ovf:fileRef=\"file{index}\" ovf:capacity=\"65536\" ovf:format=\"{format}\"/>"
        )
    });
    let namespace = "http://schemas.dmtf.org/ovf/envelope/1";
    let text = format!(
        "<?xml version=\"1.0\"?>\n<Envelope xmlns=\"{namespace}\" xmlns:ovf=\"{namespace}\">\
         <References>{references}</References><DiskSection><Info>disks</Info>{disks}</DiskSection>\
         <VirtualSystem ovf:id=\"vm\"><Info>a machine</Info></VirtualSystem></Envelope>\n"
    );
    text.into_bytes()
}

/// An OVA of one disk image.
pub(crate) fn ova(name: &str, image: &[u8]) -> Vec<u8> {
    tar(&[("vm.ovf", &ovf(&[(name, image.len())])), (name, image)])
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Packs with the program of `.xz` files.
pub(crate) fn xz(bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    write_sparse(&path, bytes);
    run("xz", &["-6", path.to_str().unwrap()]);
    std::fs::read(dir.path().join("disk.xz")).unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}
