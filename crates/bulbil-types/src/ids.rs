//! Typed ids in the shape cloud users know: a prefix and 17 hexadecimal digits.

use std::fmt;
use std::str::FromStr;

/// The text is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id of the form `{prefix}-` and 17 hexadecimal digits")]
pub struct ParseIdError {
    text: String,
    prefix: &'static str,
}

fn random_hex17() -> String {
    let mut bytes = [0_u8; 9];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    hex.chars().take(17).collect()
}

fn check(text: &str, prefix: &'static str) -> Result<(), ParseIdError> {
    let digits = text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    let valid =
        digits.is_some_and(|d| d.len() == 17 && d.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    if valid { Ok(()) } else { Err(ParseIdError { text: text.to_owned(), prefix }) }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind starts with, without the dash.
            pub const PREFIX: &'static str = $prefix;

            /// Makes a new random id (68 bits of the operating system's randomness).
            ///
            /// # Panics
            /// If the operating system has no randomness to give.
            #[must_use]
            pub fn random() -> Self {
                Self(format!("{}-{}", $prefix, random_hex17()))
            }

            /// The id as text, for example in a path or a table.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                check(text, $prefix)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                check(&text, $prefix)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

id!(
    /// Identifies an image, for example `ami-0123456789abcdef0`.
    ImageId,
    "ami"
);
id!(
    /// Identifies an instance, for example `i-0123456789abcdef0`.
    InstanceId,
    "i"
);
id!(
    /// Identifies a volume, for example `vol-0123456789abcdef0`.
    VolumeId,
    "vol"
);
id!(
    /// Identifies a snapshot of a volume, for example `snap-0123456789abcdef0`.
    SnapshotId,
    "snap"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_parses_back_to_itself() {
        let id = InstanceId::random();
        assert_eq!(id.to_string().parse::<InstanceId>().unwrap(), id);
        assert_ne!(InstanceId::random(), id);
    }

    #[test]
    fn ids_of_another_kind_or_shape_are_refused() {
        for text in ["ami-0123456789abcdef0", "i-0123", "i-0123456789ABCDEF0", "i_0123456789abcdef0", "i-", ""] {
            assert!(text.parse::<InstanceId>().is_err(), "{text}");
        }
    }
}
