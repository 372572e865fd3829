//! How large the base cache of a data directory may become.
//!
//! ```text
//! cache.json   { "format_version": 1, "max_bytes": null or a number }
//! ```
//! In a file, not in the daemon's memory: shims fill the cache as well, and outlive the daemon. A process reads it when
//! it opens the cache, so a change counts for instances that are started from then on, and for the daemon at once where
//! it opens the cache for one piece of work.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

use bulbil_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::data_dir::{DataDir, read_small_file, replace_file};
use crate::error::{ControlError, ErrorCode};

const FORMAT_VERSION: u32 = 1;

/// The least bound: a few packs that are being read at the same time.
const MIN_BYTES: u64 = 64 << 20;

/// The most bytes that the base cache takes; `None` for no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheSize(pub Option<u64>);

impl fmt::Display for CacheSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => ByteSize(bytes).fmt(f),
            None => f.pad("unlimited"),
        }
    }
}

impl FromStr for CacheSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let ByteSize(bytes) = text.parse().map_err(|e| format!("{e}, or `unlimited`"))?;
        match bytes {
            MIN_BYTES.. => Ok(Self(Some(bytes))),
            _ => Err(format!("a cache of {text} is too small: use at least {}, or `unlimited`", ByteSize(MIN_BYTES))),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format_version: u32,
    max_bytes: Option<u64>,
}

impl CacheSize {
    /// Reads what was set for a data directory; without a bound when nothing was.
    ///
    /// # Errors
    /// `Failed` when `cache.json` cannot be read or understood.
    pub fn read(data_root: &Path) -> Result<Self, ControlError> {
        let path = data_root.join("cache.json");
        let bytes = match read_small_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(|e| ControlError::io(format!("cannot read `{}`", path.display()), &e))?,
        };
        let cannot = |e: &(dyn std::error::Error + 'static)| {
            ControlError::with_source(ErrorCode::Failed, format!("cannot understand `{}`", path.display()), e)
        };
        let document: Document = serde_json::from_slice(&bytes).map_err(|e| cannot(&e))?;
        if document.format_version != FORMAT_VERSION {
            let text = format!("format version {} is not known; use a newer bulbil", document.format_version);
            return Err(cannot(&io::Error::other(text)));
        }
        Ok(Self(document.max_bytes))
    }

    /// Sets it for a data directory. Durable when this returns.
    ///
    /// # Errors
    /// `NoSpace` or `Failed`.
    pub fn set(self, data: &DataDir) -> Result<(), ControlError> {
        if Self::read(data.root()).is_ok_and(|kept| kept == self) {
            return Ok(());
        }
        let path = data.root().join("cache.json");
        let document = Document { format_version: FORMAT_VERSION, max_bytes: self.0 };
        let bytes = serde_json::to_vec_pretty(&document).expect("a setting is plain data");
        replace_file(&path, &bytes).map_err(|e| ControlError::io(format!("cannot write `{}`", path.display()), &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_kept_until_another_is_set() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let data = DataDir::open(&dir.path().join("d")).unwrap();
        assert_eq!(CacheSize::read(data.root()).unwrap(), CacheSize(None));
        for text in ["10GiB", "64MiB", "unlimited"] {
            let size: CacheSize = text.parse().unwrap();
            size.set(&data).unwrap();
            assert_eq!(CacheSize::read(data.root()).unwrap(), size, "{text}");
        }
        for text in ["", "0", "1MiB", "-1", "none", "10x"] {
            assert!(text.parse::<CacheSize>().unwrap_err().contains("`unlimited`"), "{text}");
        }
        replace_file(&data.root().join("cache.json"), b"{}").unwrap();
        assert_eq!(CacheSize::read(data.root()).unwrap_err().code(), ErrorCode::Failed);
        CacheSize(Some(1 << 30)).set(&data).unwrap();
    }
}
