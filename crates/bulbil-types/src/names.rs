//! Names users give to images and instances.

use std::fmt;
use std::str::FromStr;

use crate::ImageId;

/// The text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseNameError {
    /// A character, the first character or the length is not allowed.
    #[error("`{0}` is not a name: use 1 to 63 letters, digits, `-`, `_` or `.`, beginning with a letter or a digit")]
    Shape(String),
    /// It would read as an id.
    #[error("`{0}` looks like an id: names may not begin with `ami-`, `i-`, `vol-` or `snap-` and hexadecimal digits")]
    LooksLikeId(String),
}

/// A name of 1 to 63 characters: letters, digits, `-`, `_`, `.`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Makes a host name (RFC 1123 label) of this name: lower case, `-` for every other character.
    #[must_use]
    pub fn to_hostname(&self) -> String {
        let label: String =
            self.0.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
        label.trim_matches('-').to_owned()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = !text.is_empty()
            && text.len() <= 63
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if !shape {
            return Err(ParseNameError::Shape(text.to_owned()));
        }
        let id_like = ["ami-", "i-", "vol-", "snap-"].iter().any(|prefix| {
            text.strip_prefix(prefix).is_some_and(|rest| rest.len() >= 8 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
        });
        if id_like { Err(ParseNameError::LooksLikeId(text.to_owned())) } else { Ok(Self(text.to_owned())) }
    }
}

impl TryFrom<String> for Name {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// What a user types for an image: an id, or a name with an optional version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// `ami-…`
    Id(ImageId),
    /// `name` or `name:version`; without a version the newest is meant.
    Named {
        /// The family.
        name: Name,
        /// The version, if one was given.
        version: Option<Name>,
    },
}

impl FromStr for ImageRef {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        match text.split_once(':') {
            Some((name, version)) => Ok(Self::Named { name: name.parse()?, version: Some(version.parse()?) }),
            None => Ok(Self::Named { name: text.parse()?, version: None }),
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Named { name, version: None } => name.fmt(f),
            Self::Named { name, version: Some(version) } => write!(f, "{name}:{version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for text in ["web", "web-1", "Debian_12.6", "9front", "i-robot"] {
            assert!(text.parse::<Name>().is_ok(), "{text}");
        }
        for text in ["", "-web", "a b", "../etc", "a/b", "i-0123456789abcdef0", "naïve", &"x".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn image_references_are_told_apart() {
        let id = ImageId::random();
        assert_eq!(id.to_string().parse::<ImageRef>().unwrap(), ImageRef::Id(id));
        assert_eq!("debian:12.6".parse::<ImageRef>().unwrap().to_string(), "debian:12.6");
        assert!("debian:".parse::<ImageRef>().is_err());
    }

    #[test]
    fn a_host_name_is_made_of_any_name() {
        assert_eq!("Web_1.a-".parse::<Name>().unwrap().to_hostname(), "web-1-a");
    }
}
