//! What a file is: told from signatures, never from its name, and never guessed.
//!
//! ```text
//! declared      signatures found            answer
//! ------------  --------------------------  ------------------------------------------------
//! nothing       none                        raw, if the file has a partition table, boot
//!                                           sector or file system; otherwise refused
//! nothing       one                         that format's reader, or refused by name
//! nothing       two or more                 ambiguous-format
//! raw           a container (qcow2, ...)    format-mismatch: a container is never taken as raw
//! raw           anything else               raw
//! qcow2         qcow2 alone                 qcow2
//! qcow2         anything else               ambiguous-format or format-mismatch
//! ```
//!
//! A signature only chooses the reader; the reader's own header parser decides whether the file really is one.

use std::sync::Arc;

use crate::bytes::to_usize;
use crate::qcow2::Qcow2Disk;
use crate::raw::RawDisk;
use crate::{Disk, Format, FormatError, ReadAt};

/// Enough of the beginning to see the signature that lies deepest, that of btrfs at 0x10040.
const HEAD_BYTES: u64 = 0x10200;
/// Enough of the end for the footers of VHD and DMG.
const TAIL_BYTES: u64 = 512;

/// What a signature means for a file that is said to be raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// The disk is inside: as raw it would be the wrong disk, so it is refused even when declared raw.
    Container,
    /// Encrypted as a whole; a guest might still want it as it is.
    Encrypted,
    /// Something else that may lie on a raw disk as it is, if the operator says so.
    Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Start(usize),
    /// Counted back from the end of the file.
    End(usize),
}

#[derive(Debug, Clone, Copy)]
struct Signature {
    name: &'static str,
    at: At,
    magic: &'static [u8],
    class: Class,
}

const fn container(name: &'static str, at: At, magic: &'static [u8]) -> Signature {
    Signature { name, at, magic, class: Class::Container }
}

const fn content(name: &'static str, at: usize, magic: &'static [u8]) -> Signature {
    Signature { name, at: At::Start(at), magic, class: Class::Content }
}

const QCOW: &str = "qcow2";

const SIGNATURES: &[Signature] = &[
    container(QCOW, At::Start(0), b"QFI\xfb"),
    container("QED", At::Start(0), b"QED\0"),
    container("VHD", At::Start(0), b"conectix"),
    container("VHD", At::End(512), b"conectix"),
    // Virtual PC before 2004 wrote footers of 511 bytes.
    container("VHD", At::End(511), b"conectix"),
    container("VHDX", At::Start(0), b"vhdxfile"),
    container("VMDK", At::Start(0), b"KDMV"),
    container("VMDK (COWD)", At::Start(0), b"COWD"),
    container("VMDK (seSparse)", At::Start(0), b"\xbe\xba\xfe\xca\0\0\0\0"),
    container("VMDK (descriptor)", At::Start(0), b"# Disk DescriptorFile"),
    container("VDI", At::Start(0x40), b"\x7f\x10\xda\xbe"),
    container("Parallels", At::Start(0), b"WithoutFreeSpace"),
    container("Parallels", At::Start(0), b"WithouFreSpacExt"),
    container("Bochs", At::Start(0), b"Bochs Virtual HD Image"),
    container("cloop", At::Start(0), b"#!/bin/sh\n#V2.0 Format"),
    container("DMG", At::End(512), b"koly"),
    Signature { name: "LUKS", at: At::Start(0), magic: b"LUKS\xba\xbe", class: Class::Encrypted },
    content("ISO 9660", 0x8001, b"CD001"),
    content("gzip archive", 0, b"\x1f\x8b\x08"),
    content("xz archive", 0, b"\xfd7zXZ\0"),
    content("Zstandard archive", 0, b"\x28\xb5\x2f\xfd"),
    content("bzip2 archive", 0, b"BZh"),
    content("lz4 archive", 0, b"\x04\x22\x4d\x18"),
    content("zip archive", 0, b"PK\x03\x04"),
    content("7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    content("tar or OVA archive", 257, b"ustar"),
    content("ELF program", 0, b"\x7fELF"),
    content("script", 0, b"#!"),
];

/// What shows that a file is the bytes of a disk.
const RAW_EVIDENCE: &[(usize, &[u8])] = &[
    (510, b"\x55\xaa"),           // MBR, FAT, NTFS, exFAT
    (512, b"EFI PART"),           // GPT
    (4096, b"EFI PART"),          // GPT with sectors of 4 KiB
    (0x438, b"\x53\xef"),         // ext2, ext3, ext4
    (0, b"XFSB"),                 // XFS
    (0x10040, b"_BHRfS_M"),       // btrfs
    (0x400, b"\x10\x20\xf5\xf2"), // F2FS
    (0x400, b"\xe2\xe1\xf5\xe0"), // EROFS
    (0, b"hsqs"),                 // squashfs
    (512, b"LABELONE"),           // LVM2 physical volume
    (4086, b"SWAPSPACE2"),        // swap
];

/// Opens a disk image.
///
/// With `declared` the caller says what the file is; without, the file must say so itself. A file that says nothing is
/// raw only if it has a partition table, a boot sector or a known file system. The format is never guessed: a disk that
/// a guest has written must be opened as declared [`Format::Raw`] or not through here at all.
///
/// Everything that needs no look at the content is checked before this returns: sizes, tables, the place of every
/// cluster. No other file is ever opened. Memory follows the file: a few MiB for most, and on the worst input below
/// about 700 MiB while opening and 100 MiB, plus a buffer for each thread, afterwards.
///
/// # Errors
/// [`FormatError`], by condition.
pub fn open_disk(file: Arc<dyn ReadAt>, declared: Option<Format>) -> Result<Box<dyn Disk>, FormatError> {
    if file.len_bytes() == 0 {
        return Err(FormatError::VirtualSize { size_bytes: 0, reason: "is an empty file" });
    }
    let probe = Probe::read(&*file)?;
    match choose(&probe, declared)? {
        Format::Raw => Ok(Box::new(RawDisk::open(file, declared.is_some())?)),
        Format::Qcow2 => Ok(Box::new(Qcow2Disk::open(file)?)),
    }
}

fn choose(probe: &Probe, declared: Option<Format>) -> Result<Format, FormatError> {
    let found = probe.signatures();
    match declared {
        None => choose_undeclared(probe, &found),
        Some(Format::Raw) => match found.iter().find(|signature| signature.class == Class::Container) {
            Some(signature) => Err(FormatError::FormatMismatch { declared: Format::Raw, found: signature.name }),
            None => Ok(Format::Raw),
        },
        Some(Format::Qcow2) => {
            let names: Vec<_> = found.iter().map(|signature| signature.name).collect();
            match names.as_slice() {
                [QCOW] => Ok(Format::Qcow2),
                [first, second, ..] if names.contains(&QCOW) => Err(FormatError::AmbiguousFormat { first, second }),
                [found, ..] => Err(FormatError::FormatMismatch { declared: Format::Qcow2, found }),
                [] => Err(FormatError::FormatMismatch { declared: Format::Qcow2, found: "no qcow2 header" }),
            }
        }
    }
}

fn choose_undeclared(probe: &Probe, found: &[Signature]) -> Result<Format, FormatError> {
    match found {
        [] => probe.check_plausible_raw().map(|()| Format::Raw),
        [Signature { name: QCOW, .. }] => Ok(Format::Qcow2),
        [Signature { class: Class::Encrypted, .. }] => Err(FormatError::Encrypted { what: "a LUKS container" }),
        [only] => Err(FormatError::UnsupportedFormat { name: only.name.to_owned() }),
        [first, second, ..] => Err(FormatError::AmbiguousFormat { first: first.name, second: second.name }),
    }
}

/// The two ends of a file.
struct Probe {
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl Probe {
    fn read(file: &dyn ReadAt) -> Result<Self, FormatError> {
        let len_bytes = file.len_bytes();
        let read = |offset_bytes: u64, end_bytes: u64| {
            let mut bytes = vec![0; to_usize(end_bytes.saturating_sub(offset_bytes))];
            file.read_exact_at(&mut bytes, offset_bytes).map_err(FormatError::read(offset_bytes))?;
            Ok::<_, FormatError>(bytes)
        };
        let head = read(0, len_bytes.min(HEAD_BYTES))?;
        let tail = read(len_bytes.saturating_sub(TAIL_BYTES), len_bytes)?;
        Ok(Self { head, tail })
    }

    /// The signatures present, each name once.
    fn signatures(&self) -> Vec<Signature> {
        let mut found: Vec<Signature> = Vec::new();
        for signature in SIGNATURES.iter().filter(|signature| self.matches(signature)) {
            // A cloop image also begins like a script: the more exact signature, listed first, stands.
            let known = found.iter().any(|other| {
                other.name == signature.name || (other.at == signature.at && other.magic.starts_with(signature.magic))
            });
            if !known {
                found.push(*signature);
            }
        }
        found
    }

    fn matches(&self, signature: &Signature) -> bool {
        let bytes = match signature.at {
            At::Start(offset) => self.head.get(offset..),
            At::End(back) => self.tail.len().checked_sub(back).and_then(|offset| self.tail.get(offset..)),
        };
        bytes.is_some_and(|bytes| bytes.starts_with(signature.magic))
    }

    fn check_plausible_raw(&self) -> Result<(), FormatError> {
        let has = |(offset, magic): &(usize, &[u8])| self.head.get(*offset..).is_some_and(|b| b.starts_with(magic));
        if RAW_EVIDENCE.iter().any(has) {
            return Ok(());
        }
        let reason = if self.is_text() {
            "it is a text file"
        } else {
            "it has no partition table, boot sector or known file system; declare it raw if it is a disk nevertheless"
        };
        Err(FormatError::NotADisk { reason })
    }

    fn is_text(&self) -> bool {
        let start = self.head.get(..self.head.len().min(512)).unwrap_or_default();
        let text = match std::str::from_utf8(start) {
            Ok(text) => text,
            // The cut may have gone through a character.
            Err(error) if error.error_len().is_none() => {
                std::str::from_utf8(start.get(..error.valid_up_to()).unwrap_or_default()).unwrap_or_default()
            }
            Err(_) => return false,
        };
        !text.is_empty() && text.chars().all(|c| !c.is_control() || c.is_whitespace())
    }
}
