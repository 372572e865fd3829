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
//! raw           compressed                  format-mismatch: nor is what a container may be in
//! raw           anything else               raw
//! another one   that one alone              that one
//! another one   anything else               ambiguous-format or format-mismatch
//! not raw       gzip, xz, zstd, tar         unpacked, and asked again; each kind once
//! ```
//!
//! A signature only chooses the reader; the reader's own header parser decides whether the file really is one.

use std::sync::Arc;

use crate::bytes::to_usize;
use crate::packed::Packing;
use crate::qcow2::Qcow2Map;
use crate::raw::RawDisk;
use crate::{Disk, Format, FormatError, OpenOptions, ReadAt, archive, packed, vdi, vhd, vhdx, vmdk};

/// Enough of the beginning to see the signature that lies deepest, that of btrfs at 0x10040.
const HEAD_BYTES: u64 = 0x10200;
/// Enough of the end for the footers of VHD and DMG.
const TAIL_BYTES: u64 = 512;

/// What a signature means for a file that is said to be raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// The disk is inside: as raw it would be the wrong disk, so it is refused even when declared raw.
    Container,
    /// The same, of a format that is read.
    Readable(Format),
    /// A compressed file of any of them.
    Packed(Packing),
    /// An archive with one of them.
    Archive,
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

const fn readable(format: Format, name: &'static str, at: At, magic: &'static [u8]) -> Signature {
    Signature { name, at, magic, class: Class::Readable(format) }
}

const fn packed(packing: Packing, name: &'static str, magic: &'static [u8]) -> Signature {
    Signature { name, at: At::Start(0), magic, class: Class::Packed(packing) }
}

const SIGNATURES: &[Signature] = &[
    readable(Format::Qcow2, "qcow2", At::Start(0), b"QFI\xfb"),
    container("QED", At::Start(0), b"QED\0"),
    readable(Format::Vhd, "VHD", At::Start(0), b"conectix"),
    readable(Format::Vhd, "VHD", At::End(512), b"conectix"),
    // Virtual PC before 2004 wrote footers of 511 bytes.
    readable(Format::Vhd, "VHD", At::End(511), b"conectix"),
    readable(Format::Vhdx, "VHDX", At::Start(0), b"vhdxfile"),
    readable(Format::Vmdk, "VMDK", At::Start(0), b"KDMV"),
    container("VMDK (COWD)", At::Start(0), b"COWD"),
    container("VMDK (seSparse)", At::Start(0), b"\xbe\xba\xfe\xca\0\0\0\0"),
    readable(Format::Vmdk, "VMDK (descriptor)", At::Start(0), b"# Disk DescriptorFile"),
    readable(Format::Vdi, "VDI", At::Start(0x40), b"\x7f\x10\xda\xbe"),
    container("Parallels", At::Start(0), b"WithoutFreeSpace"),
    container("Parallels", At::Start(0), b"WithouFreSpacExt"),
    container("Bochs", At::Start(0), b"Bochs Virtual HD Image"),
    container("cloop", At::Start(0), b"#!/bin/sh\n#V2.0 Format"),
    container("DMG", At::End(512), b"koly"),
    Signature { name: "LUKS", at: At::Start(0), magic: b"LUKS\xba\xbe", class: Class::Encrypted },
    content("ISO 9660", 0x8001, b"CD001"),
    packed(Packing::Gzip, "gzip file", b"\x1f\x8b\x08"),
    packed(Packing::Xz, "xz file", b"\xfd7zXZ\0"),
    packed(Packing::Zstd, "Zstandard file", b"\x28\xb5\x2f\xfd"),
    content("bzip2 archive", 0, b"BZh"),
    content("lz4 archive", 0, b"\x04\x22\x4d\x18"),
    content("zip archive", 0, b"PK\x03\x04"),
    content("7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    Signature { name: "tar or OVA archive", at: At::Start(257), magic: b"ustar", class: Class::Archive },
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
/// With [`OpenOptions::format`] the caller says what the file is; without, the file must say so itself. A file that
/// says nothing is raw only if it has a partition table, a boot sector or a known file system. The format is never
/// guessed: a disk that a guest has written must be opened as declared [`Format::Raw`] or not through here at all.
///
/// Everything that needs no look at the content is checked before this returns: sizes, tables, the place of every
/// cluster. No other file is ever opened but through [`OpenOptions::gate`]. A compressed file is unpacked into
/// [`OpenOptions::scratch`] first. Memory follows the file: a few MiB for most, and on the worst input below about
/// 700 MiB while opening and 100 MiB, plus a buffer for each thread, afterwards.
///
/// # Errors
/// [`FormatError`], by condition.
pub fn open_disk(file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let file_bytes = file.len_bytes();
    let disk = open_layers(file, options)?;
    // Once for all formats; here the map of every one of them is known.
    let info = disk.info();
    if let Some(data_bytes) = info.data_bytes {
        // The files beside a descriptor count as well; without a gate there are none.
        let file_bytes = if options.gate.is_some() { file_bytes.max(info.file_bytes) } else { file_bytes };
        check_expansion("a disk", data_bytes, file_bytes)?;
    }
    Ok(disk)
}

fn open_layers(mut file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    let (mut unpacked, mut in_archive) = (false, false);
    loop {
        if file.len_bytes() == 0 {
            return Err(FormatError::VirtualSize { size_bytes: 0, reason: "is an empty file" });
        }
        let probe = Probe::read(&*file)?;
        file = match choose(&probe, options.format)? {
            Choice::Disk(format) => return open_as(format, file, options),
            Choice::Packed(_, name) if unpacked => {
                return Err(FormatError::UnsupportedFormat { name: format!("{name} in a compressed file") });
            }
            Choice::Archive if in_archive => {
                return Err(FormatError::BadArchive { reason: "it is in another archive".to_owned() });
            }
            Choice::Packed(packing, name) => {
                unpacked = true;
                let scratch = options.scratch.as_deref().ok_or(FormatError::NoScratch { what: name })?;
                packed::unpack(&*file, packing, scratch)?
            }
            Choice::Archive => {
                in_archive = true;
                archive::disk_in(file)?
            }
        }
    }
}

fn open_as(format: Format, file: Arc<dyn ReadAt>, options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    if let (Some(name), true) = (&options.snapshot, format != Format::Qcow2) {
        return Err(FormatError::NoSuchSnapshot { name: name.clone(), available: "none".to_owned() });
    }
    if options.parent.is_some() && matches!(format, Format::Raw | Format::Vdi) {
        return Err(FormatError::ParentMismatch { reason: format!("a {format} image has no parent") });
    }
    match format {
        Format::Raw => Ok(Box::new(RawDisk::open(file, options.format.is_some())?)),
        Format::Qcow2 => Ok(Box::new(Qcow2Map::open(file, options)?)),
        Format::Vhd => vhd::open(file, options),
        Format::Vhdx => vhdx::open(file, options),
        Format::Vmdk => vmdk::open(file, options),
        Format::Vdi => vdi::open(file, options),
    }
}

/// A file may expand to this many times its length: what deflate does with zeros.
const MAX_EXPANSION: u64 = 1032;
/// Any file may expand to this much.
const FREE_EXPANSION_BYTES: u64 = 2 << 30;

/// Refuses more data than a file of this length can hold for honest reasons, so that the work for a file is bounded by
/// its length.
pub(crate) fn check_expansion(what: &'static str, data_bytes: u64, file_bytes: u64) -> Result<(), FormatError> {
    let limit_bytes = file_bytes.saturating_mul(MAX_EXPANSION).max(FREE_EXPANSION_BYTES);
    if data_bytes <= limit_bytes {
        return Ok(());
    }
    Err(FormatError::TooMuchData { what, data_bytes, file_bytes, limit_bytes })
}

/// What to do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Disk(Format),
    /// With the name to tell people.
    Packed(Packing, &'static str),
    Archive,
}

fn choose(probe: &Probe, declared: Option<Format>) -> Result<Choice, FormatError> {
    let found = probe.signatures();
    match (declared, found.as_slice()) {
        (_, [Signature { class: Class::Packed(packing), name, .. }]) if declared != Some(Format::Raw) => {
            Ok(Choice::Packed(*packing, name))
        }
        (_, [Signature { class: Class::Archive, .. }]) if declared != Some(Format::Raw) => Ok(Choice::Archive),
        (None, found) => choose_undeclared(probe, found).map(Choice::Disk),
        (Some(Format::Raw), found) => match found.iter().find(|signature| !signature.may_be_raw()) {
            Some(signature) => Err(FormatError::FormatMismatch { declared: Format::Raw, found: signature.name }),
            None => Ok(Choice::Disk(Format::Raw)),
        },
        (Some(declared), [only]) if only.class == Class::Readable(declared) => Ok(Choice::Disk(declared)),
        (Some(declared), [first, second, ..]) if found.iter().any(|s| s.class == Class::Readable(declared)) => {
            Err(FormatError::AmbiguousFormat { first: first.name, second: second.name })
        }
        (Some(declared), [found, ..]) => Err(FormatError::FormatMismatch { declared, found: found.name }),
        (Some(declared), []) => Err(FormatError::FormatMismatch { declared, found: "no header of it" }),
    }
}

fn choose_undeclared(probe: &Probe, found: &[Signature]) -> Result<Format, FormatError> {
    match found {
        [] => probe.check_plausible_raw().map(|()| Format::Raw),
        [Signature { class: Class::Readable(format), .. }] => Ok(*format),
        [Signature { class: Class::Encrypted, .. }] => Err(FormatError::Encrypted { what: "a LUKS container" }),
        [only] => Err(FormatError::UnsupportedFormat { name: only.name.to_owned() }),
        [first, second, ..] => Err(FormatError::AmbiguousFormat { first: first.name, second: second.name }),
    }
}

impl Signature {
    /// Whether the operator may say that a file with it is a raw disk.
    fn may_be_raw(&self) -> bool {
        matches!(self.class, Class::Content | Class::Encrypted | Class::Archive)
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
