//! Files of formats that are not read, and files that are no disks.

use bulbil_format::Format;

use super::super::support::run;
use super::Case;
use super::images::*;

fn with_magic(at: usize, magic: &[u8]) -> Vec<u8> {
    poked(vec![0; 70_144], &[(at, magic)])
}

fn created_by_qemu(format: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]);
    std::fs::read(path).unwrap()
}

pub(crate) fn cases() -> Vec<Case> {
    let container = "another disk than the file's bytes";
    let unsupported = &["unsupported-format"];
    vec![
        Case::new("qed", 6, container, unsupported, |_| created_by_qemu("qed")),
        Case::new("qed-declared-raw", 6, container, &["format-mismatch"], |_| created_by_qemu("qed"))
            .declared(Format::Raw),
        Case::new("parallels", 6, container, unsupported, |_| created_by_qemu("parallels")),
        Case::new("bochs", 6, container, unsupported, |_| with_magic(0, b"Bochs Virtual HD Image")),
        Case::new("cloop", 6, container, unsupported, |_| with_magic(0, b"#!/bin/sh\n#V2.0 Format")),
        Case::new("dmg", 6, container, unsupported, |_| with_magic(70_144 - 512, b"koly")),
        Case::new("cowd", 6, container, unsupported, |_| with_magic(0, b"COWD")),
        Case::new("sesparse", 6, container, unsupported, |_| with_magic(0, b"\xbe\xba\xfe\xca\0\0\0\0")),
        Case::new("luks", 3, "ciphertext taken for content", &["encrypted"], |_| with_magic(0, b"LUKS\xba\xbe")),
        Case::new("iso", 6, "a boot image nobody asked for", unsupported, |_| with_magic(0x8001, b"CD001")),
        Case::new("iso-with-boot-sector", 6, "a boot image nobody asked for", unsupported, |_| {
            poked(with_magic(0x8001, b"CD001"), &[(510, &[0x55, 0xaa])])
        }),
        Case::new("zip", 6, "a disk in an archive", unsupported, |_| with_magic(0, b"PK\x03\x04")),
        Case::new("program", 6, "no disk", unsupported, |_| with_magic(0, b"\x7fELF")),
        Case::new("script", 6, "no disk", unsupported, |_| b"#!/bin/sh\nrm -rf /\n".to_vec()),
        Case::new("text", 6, "no disk", &["not-a-disk"], |_| b"root:x:0:0:root:/root:/bin/bash\n".repeat(64)),
        Case::new("noise", 6, "no disk", &["not-a-disk"], |_| vec![0xb7; 64 << 10]),
        Case::new("empty", 8, "a disk of nothing", &["virtual-size"], |_| Vec::new()),
        Case::new("empty-declared-raw", 8, "a disk of nothing", &["virtual-size"], |_| Vec::new())
            .declared(Format::Raw),
        Case::new("raw-of-half-a-sector", 8, "half of a sector", &["virtual-size"], |_| {
            small_content()[..40_001].to_vec()
        }),
    ]
}
