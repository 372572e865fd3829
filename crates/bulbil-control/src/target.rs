//! What image file to write, in words: the same for `disk convert` and for the export of an image.
//!
//! | format | subformat | compression | cluster size | backing file |
//! |---|---|---|---|---|
//! | raw, vhdx, vdi, ova | | | | |
//! | qcow2 | | none, zlib, zstd | 512 B to 2 MiB | yes |
//! | vhd | dynamic, fixed | | | |
//! | vmdk | monolithicSparse, streamOptimized | | | |
//!
//! The first of each list is what is written when nothing is said.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use bulbil_format::{BackingFile, Compression, Identity, Qcow2Options, Target};
use bulbil_types::ByteSize;
use serde::{Deserialize, Serialize};

/// The cluster sizes of qcow2.
const CLUSTER_BYTES: std::ops::RangeInclusive<u64> = 512..=2 << 20;

/// The words do not make an image file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TargetError(String);

/// Defines an enum of words that users type, with what parses and shows them.
macro_rules! words {
    (
        $(#[$doc:meta])* $name:ident, $what:literal, $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+;
        $($alias:literal => $meant:literal)?
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            /// All of them, in the order help texts list them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word users type and read.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = TargetError;

            fn from_str(word: &str) -> Result<Self, TargetError> {
                let wanted = match word {
                    $($alias => $meant,)?
                    other => other,
                };
                let found = Self::ALL.iter().copied().find(|known| known.as_str().eq_ignore_ascii_case(wanted));
                found.ok_or_else(|| TargetError(format!("unknown {} `{word}`: use {}", $what, list(Self::ALL))))
            }
        }
    };
}

words!(
    /// A format of image files that can be written.
    TargetFormat, "image format",
    /// The bytes of the disk, with holes for zeros.
    Raw = "raw",
    /// qcow2 version 3.
    Qcow2 = "qcow2",
    /// Microsoft's VHD.
    Vhd = "vhd",
    /// Microsoft's VHDX, dynamic.
    Vhdx = "vhdx",
    /// VMware's VMDK.
    Vmdk = "vmdk",
    /// VirtualBox's VDI, dynamic.
    Vdi = "vdi",
    /// An archive of a description and a streamOptimized VMDK.
    Ova = "ova";
    // What QEMU calls it.
    "vpc" => "vhd"
);

words!(
    /// A variant of a format.
    Subformat, "subformat",
    /// A VHD of blocks, of which those with content are stored.
    Dynamic = "dynamic",
    /// A VHD with every byte in its place, as Azure wants it.
    Fixed = "fixed",
    /// A VMDK with uncompressed grains.
    MonolithicSparse = "monolithicSparse",
    /// A VMDK with compressed grains in the order of the disk.
    StreamOptimized = "streamOptimized";
);

words!(
    /// What the clusters of a qcow2 image are compressed with.
    TargetCompression, "compression",
    /// Nothing.
    None = "none",
    /// Deflate, which every reader of qcow2 knows.
    Zlib = "zlib",
    /// Zstandard, for QEMU 5.1 and newer.
    Zstd = "zstd";
);

/// Lists words for people: `raw, qcow2 or vhd`.
fn list<T: fmt::Display>(words: &[T]) -> String {
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => "none".to_owned(),
    }
}

impl TargetFormat {
    /// Tells the format that a file of this name should have; nothing for a name that does not say.
    ///
    /// Only for files that are written: what an existing file is, its name does not say.
    #[must_use]
    pub fn of_new_file(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "img" => Some(Self::Raw),
            other => Self::ALL.iter().copied().find(|format| format.as_str() == other),
        }
    }

    fn subformats(self) -> &'static [Subformat] {
        match self {
            Self::Vhd => &[Subformat::Dynamic, Subformat::Fixed],
            Self::Vmdk => &[Subformat::MonolithicSparse, Subformat::StreamOptimized],
            Self::Raw | Self::Qcow2 | Self::Vhdx | Self::Vdi | Self::Ova => &[],
        }
    }
}

/// An image file to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetOptions {
    /// The format.
    pub format: TargetFormat,
    /// The variant of the format; by default the first of the table above.
    pub subformat: Option<Subformat>,
    /// What clusters are compressed with; by default nothing.
    pub compression: Option<TargetCompression>,
    /// The size of a cluster in bytes; by default 64 KiB.
    pub cluster_bytes: Option<u64>,
}

impl TargetOptions {
    /// A file of a format, of which nothing else is said.
    #[must_use]
    pub fn new(format: TargetFormat) -> Self {
        Self { format, subformat: None, compression: None, cluster_bytes: None }
    }

    /// Checks that the options fit the format; `backing` says whether there is to be a backing file.
    ///
    /// # Errors
    /// A sentence that names what fits.
    pub fn check(&self, backing: bool) -> Result<(), TargetError> {
        self.check_subformat()?;
        let format = self.format;
        if let (Some(compression), false) = (self.compression, format == TargetFormat::Qcow2) {
            let instead = match format {
                TargetFormat::Vmdk => "; the subformat streamOptimized is compressed",
                TargetFormat::Ova => "; an ova is compressed by itself",
                _ => "",
            };
            let text = format!("compression `{compression}` does not fit {format}: only qcow2 takes it{instead}");
            return Err(TargetError(text));
        }
        if format != TargetFormat::Qcow2 && self.cluster_bytes.is_some() {
            return Err(TargetError(format!("a cluster size does not fit {format}: only qcow2 takes one")));
        }
        if format != TargetFormat::Qcow2 && backing {
            return Err(TargetError(format!("a backing file does not fit {format}: only qcow2 takes one")));
        }
        match self.cluster_bytes {
            Some(bytes) if !bytes.is_power_of_two() || !CLUSTER_BYTES.contains(&bytes) => {
                let size = ByteSize(bytes);
                Err(TargetError(format!("a cluster size of {size}: it must be a power of two from 512 B to 2 MiB")))
            }
            _ => Ok(()),
        }
    }

    fn check_subformat(&self) -> Result<(), TargetError> {
        let Some(subformat) = self.subformat else { return Ok(()) };
        let fitting = self.format.subformats();
        if fitting.contains(&subformat) {
            return Ok(());
        }
        let takes = if fitting.is_empty() { "which has none".to_owned() } else { format!("use {}", list(fitting)) };
        let separator = if fitting.is_empty() { "," } else { ":" };
        Err(TargetError(format!("subformat `{subformat}` does not fit {}{separator} {takes}", self.format)))
    }

    /// Says the same to the writer; `name` is that of the virtual machine in an OVA.
    pub(crate) fn target(&self, name: &str, backing: Option<BackingFile>) -> Result<Target, TargetError> {
        self.check(backing.is_some())?;
        Ok(match (self.format, self.subformat) {
            (TargetFormat::Raw, _) => Target::Raw,
            (TargetFormat::Qcow2, _) => Target::Qcow2(self.qcow2_options(backing)),
            (TargetFormat::Vhd, Some(Subformat::Fixed)) => Target::VhdFixed,
            (TargetFormat::Vhd, _) => Target::VhdDynamic,
            (TargetFormat::Vhdx, _) => Target::Vhdx,
            (TargetFormat::Vmdk, Some(Subformat::StreamOptimized)) => Target::VmdkStream,
            (TargetFormat::Vmdk, _) => Target::VmdkSparse,
            (TargetFormat::Vdi, _) => Target::Vdi,
            (TargetFormat::Ova, _) => Target::Ova { name: name.to_owned() },
        })
    }

    fn qcow2_options(&self, backing: Option<BackingFile>) -> Qcow2Options {
        let defaults = Qcow2Options::default();
        let compression = match self.compression {
            None | Some(TargetCompression::None) => None,
            Some(TargetCompression::Zlib) => Some(Compression::Zlib),
            Some(TargetCompression::Zstd) => Some(Compression::Zstd),
        };
        let cluster_bytes = self.cluster_bytes.unwrap_or(defaults.cluster_bytes);
        Qcow2Options { cluster_bytes, compression, backing }
    }
}

/// Random bytes and the time of day: what tells a new image from others of the same content.
pub(crate) fn new_identity() -> Identity {
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).expect("the operating system gives random bytes");
    Identity { uuid, created_unix_s: u64::try_from(crate::control::now()).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_parse_back_and_unknown_ones_name_the_choices() {
        for format in TargetFormat::ALL {
            assert_eq!(format.to_string().parse::<TargetFormat>().unwrap(), *format);
        }
        assert_eq!("vpc".parse::<TargetFormat>().unwrap(), TargetFormat::Vhd);
        assert_eq!("streamoptimized".parse::<Subformat>().unwrap(), Subformat::StreamOptimized);
        let message = "qed".parse::<TargetFormat>().unwrap_err().to_string();
        assert_eq!(message, "unknown image format `qed`: use raw, qcow2, vhd, vhdx, vmdk, vdi or ova");
    }

    #[test]
    fn the_name_of_a_new_file_says_its_format() {
        let of = |name: &str| TargetFormat::of_new_file(Path::new(name));
        assert_eq!(of("a/b.IMG"), Some(TargetFormat::Raw));
        assert_eq!(of("b.tar.vhdx"), Some(TargetFormat::Vhdx));
        assert_eq!([of("b"), of("b.qcow"), of(".raw")], [None, None, None]);
    }

    #[test]
    fn options_that_do_not_fit_are_refused_with_those_that_do() {
        let refusal = |format, change: fn(&mut TargetOptions), backing| {
            let mut options = TargetOptions::new(format);
            change(&mut options);
            options.check(backing).unwrap_err().to_string()
        };
        assert_eq!(
            refusal(TargetFormat::Vhd, |o| o.subformat = Some(Subformat::StreamOptimized), false),
            "subformat `streamOptimized` does not fit vhd: use dynamic or fixed"
        );
        assert_eq!(
            refusal(TargetFormat::Vdi, |o| o.subformat = Some(Subformat::Fixed), false),
            "subformat `fixed` does not fit vdi, which has none"
        );
        assert_eq!(
            refusal(TargetFormat::Vmdk, |o| o.compression = Some(TargetCompression::Zstd), false),
            "compression `zstd` does not fit vmdk: only qcow2 takes it; the subformat streamOptimized is compressed"
        );
        assert_eq!(
            refusal(TargetFormat::Raw, |o| o.cluster_bytes = Some(4096), false),
            "a cluster size does not fit raw: only qcow2 takes one"
        );
        assert_eq!(refusal(TargetFormat::Vhdx, |_| {}, true), "a backing file does not fit vhdx: only qcow2 takes one");
        for bytes in [0, 256, 96 << 10, 4 << 20] {
            let options = TargetOptions { cluster_bytes: Some(bytes), ..TargetOptions::new(TargetFormat::Qcow2) };
            assert!(options.check(true).unwrap_err().to_string().contains("power of two from 512 B to 2 MiB"));
        }
    }
}
