//! Hostile archives and compressed files.

use std::time::Duration;

use bulbil_format::Format;

use super::Case;
use super::images::*;

fn vmdk() -> Vec<u8> {
    qemu("vmdk", "-o subformat=streamOptimized")
}

/// An OVA whose description says that the disk has this name.
fn ova_with_href(href: &str) -> Vec<u8> {
    let image = vmdk();
    tar(&[("vm.ovf", &ovf(&[(href, image.len())])), ("disk.vmdk", &image)])
}

fn ova_with_description(description: &str) -> Vec<u8> {
    tar(&[("vm.ovf", description.as_bytes()), ("disk.vmdk", &vmdk())])
}

/// A manifest that says something else of the disk.
fn ova_with_manifest(digest: &str) -> Vec<u8> {
    let image = vmdk();
    let manifest = format!("SHA256(disk.vmdk)= {digest}\n");
    tar(&[("vm.ovf", &ovf(&[("disk.vmdk", image.len())])), ("vm.mf", manifest.as_bytes()), ("disk.vmdk", &image)])
}

/// A member of this length and kind of which nothing follows.
fn tar_of(name: &str, len_bytes: u64, kind: u8) -> Vec<u8> {
    [tar_header(name, len_bytes, kind), vec![0; 1024]].concat()
}

/// A member whose map of holes has this many blocks of 21 ranges, all of them empty.
fn tar_with_holes(blocks: usize) -> Vec<u8> {
    let mut header = tar_header("disk.raw", 0, b'S');
    header[482] = 1;
    header[483..495].copy_from_slice(b"00000001000\0");
    fix_tar_sum(&mut header);
    let mut map = vec![0; 512];
    for pair in map[..504].chunks_exact_mut(12) {
        pair.copy_from_slice(b"00000000000\0");
    }
    map[504] = 1;
    let mut member = [header, map.repeat(blocks)].concat();
    let last = member.len() - 8;
    member[last] = 0;
    member
}

/// A frame of runs of 128 KiB of zeros, four bytes each, without its length in the header.
fn zstd_bomb(runs: u32) -> Vec<u8> {
    // Window of 128 KiB.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x38];
    for run in 1..=runs {
        let header = u32::from(run == runs) | 1 << 1 | (128 << 10) << 3;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

/// A frame that asks for a window of 2 GiB.
fn zstd_wide_window() -> Vec<u8> {
    let mut frame = zstd_bomb(4);
    frame[5] = 21 << 3;
    frame
}

/// A stream that asks for a dictionary of 4 GiB less one byte.
fn xz_wide_dictionary() -> Vec<u8> {
    let mut file = xz(&small_content());
    // The block header follows that of the stream: its length in words, flags, filter 0x21, 1, dictionary, padding, sum.
    let len = (usize::from(file[12]) + 1) * 4;
    let dictionary = 12 + find(&file[12..12 + len], &[0x21, 1]) + 2;
    file[dictionary] = 40;
    let mut crc = flate2::Crc::new();
    crc.update(&file[12..12 + len - 4]);
    file[12 + len - 4..12 + len].copy_from_slice(&crc.sum().to_le_bytes());
    file
}

fn attributes(count: u32, prefix: &str) -> String {
    (0..count).map(|n| format!(" {prefix}a{n:x}='{n}'")).collect()
}

pub(crate) fn cases() -> Vec<Case> {
    [disks(), descriptions(), members(), compressed()].into_iter().flatten().collect()
}

fn disks() -> Vec<Case> {
    let refused = &["bad-archive"];
    vec![
        Case::new("ova-two-disks", 7, "one disk checked, the other taken", refused, |_| {
            let image = vmdk();
            let description = ovf(&[("a.vmdk", image.len()), ("b.vmdk", image.len())]);
            tar(&[("vm.ovf", &description), ("a.vmdk", &image), ("b.vmdk", &image)])
        }),
        Case::new("ova-disk-twice", 7, "one disk checked, the other taken", refused, |_| {
            let image = vmdk();
            let description = ovf(&[("a.vmdk", image.len())]);
            tar(&[("vm.ovf", &description), ("a.vmdk", &image), ("a.vmdk", &image)])
        }),
        Case::new("ova-two-descriptions", 7, "one description checked, the other taken", refused, |_| {
            let image = vmdk();
            let description = ovf(&[("a.vmdk", image.len())]);
            tar(&[("vm.ovf", &description), ("other.ovf", &description), ("a.vmdk", &image)])
        }),
        Case::new("ova-in-ova", 13, "work for each layer", refused, |_| ova("inner.ova", &ova("disk.vmdk", &vmdk()))),
        Case::new("ova-disk-with-backing-file", 1, "CVE-2015-5163 one layer below", &["has-backing-file"], |canary| {
            let name = canary.to_str().unwrap().as_bytes();
            let image = qemu("qcow2", "-o cluster_size=4k");
            let len = u32::try_from(name.len()).unwrap();
            let pokes: [(usize, &[u8]); 3] = [(8, &0x800_u64.to_be_bytes()), (16, &len.to_be_bytes()), (0x800, name)];
            ova("disk.qcow2", &poked(image, &pokes))
        }),
        Case::new("ova-disk-is-descriptor", 14, "CVE-2022-47951 one layer below", &["external-extent"], |canary| {
            let extent = format!("RW 128 FLAT \"{}\" 0", canary.display());
            ova("disk.vmdk", &vmdk_descriptor("monolithicFlat", "ffffffff", &extent))
        }),
        Case::new("ova-disk-damaged", 11, "damage on the way", &["checksum"], |_| ova_with_manifest(&"0".repeat(64))),
        Case::new("ova-disk-too-short", 11, "missing content", &["truncated"], |_| {
            let image = vmdk();
            tar(&[("vm.ovf", &ovf(&[("disk.vmdk", image.len() + 1)])), ("disk.vmdk", &image)])
        }),
        Case::new("tar-of-anything", 6, "a file of somebody's choice", refused, |_| {
            tar(&[("etc/passwd", b"root::0:0::/:/bin/sh\n")])
        }),
    ]
}

fn descriptions() -> Vec<Case> {
    let name = "CVE-2026-34881: the disk is a file of the host";
    vec![
        Case::new("ova-href-dot-dot", 19, name, &["external-extent"], |_| ova_with_href("../canary")),
        Case::new("ova-href-absolute", 19, name, &["external-extent"], |canary| {
            ova_with_href(canary.to_str().unwrap())
        }),
        Case::new("ova-href-escaped", 19, name, &["external-extent"], |_| ova_with_href("%2e%2e%2fcanary")),
        Case::new("ova-href-http", 19, "CVE-2026-34881: a request from inside", &["external-extent"], |_| {
            ova_with_href("http://127.0.0.1/latest/meta-data")
        }),
        Case::new("ova-href-missing", 11, "a disk that is not there", &["bad-archive"], |_| ova_with_href("b.vmdk")),
        Case::new("ova-entities", 13, "CVE-2026-34881: a text that grows", &["bad-archive"], |_| {
            let mut text = "<!DOCTYPE a [<!ENTITY e0 \"x\">".to_owned();
            for n in 1..30 {
                text += &format!("<!ENTITY e{n} \"{}\">", format!("&e{};", n - 1).repeat(10));
            }
            ova_with_description(&(text + "]><Envelope>&e29;</Envelope>"))
        }),
        Case::new("ova-external-entity", 19, "a file of the host in the text", &["bad-archive"], |canary| {
            let text =
                format!("<!DOCTYPE a [<!ENTITY e SYSTEM \"file://{}\">]><Envelope>&e;</Envelope>", canary.display());
            ova_with_description(&text)
        }),
        Case::new("ova-deep-description", 9, "the stack of the parser", &["bad-archive"], |_| {
            ova_with_description(&"<Envelope>".repeat(60_000))
        }),
        Case::new("ova-many-attributes", 9, "work for each pair of attributes", &["bad-archive"], |_| {
            ova_with_description(&format!("<Envelope{}/>", attributes(60_000, "")))
        }),
        Case::new("ova-many-attributes-behind-a-comment", 9, "an apostrophe that hides them", &["bad-archive"], |_| {
            ova_with_description(&format!("<!-- ' --><Envelope{}/>", attributes(60_000, "")))
        }),
        Case::new("ova-elements-with-many-attributes", 9, "the most that is parsed", &["bad-archive"], |_| {
            let element = format!("<a{}/>", attributes(1000, ""));
            ova_with_description(&format!("<Envelope>{}</Envelope>", element.repeat((1 << 20) / element.len() - 1)))
        }),
        Case::new("ova-many-namespaces", 9, "work for each name and namespace", &["bad-archive"], |_| {
            let nodes: String = (0..8_000).map(|n| format!("<a{n:x}:b/>")).collect();
            ova_with_description(&format!("<Envelope{}>{nodes}</Envelope>", attributes(40_000, "xmlns:")))
        }),
        Case::new("ova-names-of-many-namespaces", 9, "the most that is parsed", &["bad-archive"], |_| {
            let nodes = "<a1ff:b/>".repeat(48_000);
            ova_with_description(&format!("<Envelope{}>{nodes}</Envelope>", attributes(512, "xmlns:")))
        }),
        Case::new("ova-nested-namespaces", 9, "the most that is parsed", &["bad-archive"], |_| {
            let open: String = (0..500).map(|n| format!("<b xmlns:a{n:x}='{n}'>")).collect();
            ova_with_description(&format!("<Envelope>{open}{}</Envelope>", "</b>".repeat(500)))
        }),
        Case::new("ova-description-of-64-MiB", 9, "memory for the text", &["too-large"], |_| {
            tar_header("vm.ovf", 64 << 20, b'0')
        })
        .file_bytes((64 << 20) + 4096),
    ]
}

fn members() -> Vec<Case> {
    vec![
        Case::new("tar-member-past-end", 11, "reads past the file", &["truncated"], |_| {
            tar_of("disk.raw", 1 << 30, b'0')
        }),
        Case::new(
            "tar-member-that-overflows",
            9,
            "an offset that wraps",
            &["corrupt", "bad-archive", "truncated"],
            |_| {
                let mut archive = tar_of("disk.raw", 0, b'0');
                // The length as a number of twelve bytes, not as digits.
                archive[124..136].fill(0xff);
                fix_tar_sum(&mut archive[..512]);
                archive
            },
        ),
        Case::new("tar-symlink", 19, "a name that leads elsewhere", &["bad-archive"], |canary| {
            let mut header = tar_header("disk.raw", 0, b'2');
            let target = canary.to_str().unwrap().as_bytes();
            header[157..157 + target.len().min(100)].copy_from_slice(&target[..target.len().min(100)]);
            fix_tar_sum(&mut header);
            [header, vec![0; 1024]].concat()
        }),
        Case::new("tar-header-checksum", 15, "damage taken for a member", &["checksum", "bad-archive"], |_| {
            poked(tar_of("disk.raw", 512, b'0'), &[(0, b"D")])
        }),
        Case::new("tar-of-many-members", 9, "work for each member", &["too-large"], |_| {
            tar_of("a", 0, b'0')[..512].repeat(2000)
        }),
        Case::new("tar-of-many-holes", 9, "CVE-2015-5162: memory for each hole", &["too-large"], |_| {
            tar_with_holes(5000).repeat(12)
        }),
        Case::new("tar-declared-qcow2-is-vdi", 7, "a reader for another format", &["format-mismatch"], |_| {
            ova("disk.vdi", &qemu("vdi", ""))
        })
        .declared(Format::Qcow2),
    ]
}

fn compressed() -> Vec<Case> {
    vec![
        Case::new("gzip-in-gzip", 13, "CVE-2013-4463: work for each layer", &["unsupported-format"], |_| {
            gzip(&gzip(&vec![0; 1 << 20]))
        }),
        Case::new("gzip-declared-raw", 7, "what is packed is not looked at", &["format-mismatch"], |_| {
            gzip(&small_content())
        })
        .declared(Format::Raw),
        Case::new("gzip-of-zeros", 13, "64 KiB are 64 MiB of nothing", &["not-a-disk"], |_| gzip(&vec![0; 64 << 20])),
        Case::new("zstd-bomb", 13, "CVE-2013-4469: 128 KiB are 4 GiB", &["too-much-data"], |_| zstd_bomb(32 << 10))
            .max_time(Duration::from_secs(10)),
        Case::new("zstd-wide-window", 13, "CVE-2015-5162: memory for the window", &["corrupt"], |_| zstd_wide_window()),
        Case::new("xz-wide-dictionary", 13, "CVE-2015-5162: memory for the dictionary", &["corrupt"], |_| {
            xz_wide_dictionary()
        }),
        Case::new("xz-of-zeros", 13, "10 KiB are 64 MiB of nothing", &["not-a-disk"], |_| xz(&vec![0; 64 << 20])),
        Case::new("gzip-cut", 11, "missing content", &["corrupt"], |_| {
            let packed = gzip(&small_content());
            packed[..packed.len() / 2].to_vec()
        }),
        Case::new("gzip-checksum", 12, "damage taken for content", &["corrupt"], |_| {
            let mut packed = gzip(&small_content());
            let at = packed.len() - 8;
            packed[at] ^= 1;
            packed
        }),
        Case::new("gzip-of-qcow2-with-backing", 1, "CVE-2015-5163 one layer below", &["has-backing-file"], |_| {
            let image = qemu("qcow2", "-o cluster_size=4k");
            gzip(&poked(image, &[(8, &0x800_u64.to_be_bytes()), (16, &6_u32.to_be_bytes()), (0x800, b"canary")]))
        }),
    ]
}
