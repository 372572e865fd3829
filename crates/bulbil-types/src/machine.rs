//! Words that describe a machine: architecture, boot mode, personality.

use std::fmt;
use std::str::FromStr;

/// The word is not one of the known ones.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} `{word}`: use {known}")]
pub struct ParseWordError {
    what: &'static str,
    word: String,
    known: String,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            /// Every value, in the order help texts list them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word users type and read.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = ParseWordError;

            fn from_str(word: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|value| value.as_str() == word).ok_or_else(|| ParseWordError {
                    what: $what,
                    word: word.to_owned(),
                    known: Self::ALL.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", "),
                })
            }
        }
    };
}

words!(
    /// Which cloud an instance looks like to its guest.
    Personality, "personality", {
        /// AWS EC2: metadata at 169.254.169.254, IMDSv1 and v2.
        Ec2 = "ec2",
        /// Alibaba Cloud ECS: metadata at 100.100.100.200.
        Alibaba = "alibaba",
        /// A seed disk labelled `cidata`; no cloud is imitated.
        NoCloud = "nocloud",
    }
);

words!(
    /// The processor architecture of an image.
    Architecture, "architecture", {
        /// AMD64, Intel 64.
        X86_64 = "x86_64",
    }
);

words!(
    /// How the firmware starts an image.
    BootMode, "boot mode", {
        /// SeaBIOS: the disk has boot code in its first sector.
        Bios = "bios",
        /// OVMF: the disk has an EFI system partition.
        Uefi = "uefi",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_parse_back_and_unknown_ones_name_the_choices() {
        for personality in Personality::ALL {
            assert_eq!(personality.to_string().parse::<Personality>().unwrap(), *personality);
        }
        let message = "azur".parse::<Personality>().unwrap_err().to_string();
        assert_eq!(message, "unknown personality `azur`: use `ec2`, `alibaba`, `nocloud`");
    }
}
