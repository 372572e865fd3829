//! The record of a volume: what it is, and which layers hold its writes.
//!
//! `volume.json` in the volume's directory, replaced as a whole:
//!
//! ```text
//! { "format_version": 2, "id": "vol-…", "size_bytes": …, "base": "sha256:…" or null, "layers": [3, 2, 0],
//!   "linked": ["map", "data.0", …] }
//! ```
//! Layers are named by numbers, the newest first; only that one is written to. Layer 0 lies in the
//! volume's own directory, layer n in `layer.n`. Version 1 knew layer 0 only and did not say so. `linked` is
//! there in a clone that was not opened yet: without all of these files it was never completed.

use bulbil_store::Digest;
use bulbil_types::{MAX_DISK_BYTES, VolumeId};

use crate::clone::check_complete;
use crate::error::{VolumeError, VolumeErrorKind};
use crate::storage::StorageDirectory;

pub(crate) const RECORD_NAME: &str = "volume.json";
const FORMAT_VERSION: u32 = 2;

/// Layers that are not written to any more; the next one makes room by merging those that no clone shares.
pub(crate) const MAX_FROZEN_LAYERS: usize = 8;

/// Layers of a volume: above eight that clones share come what failed snapshots have merged and left,
/// what a clone that was cut off has frozen, and the one that is written to.
const MAX_LAYERS: usize = 2 * MAX_FROZEN_LAYERS;

/// The highest number of a layer: far from the end of the numbers.
pub(crate) const MAX_LAYER_NUMBER: u64 = 1 << 62;

/// What a volume is, as its directory says.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeRecord {
    /// Version of the overlay's format.
    pub format_version: u32,
    /// The volume's id.
    pub id: VolumeId,
    /// Its size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Content of the image below; `None` for a disk of zeroes.
    pub base: Option<Digest>,
    /// Numbers of the layers that hold its writes, the newest first.
    #[serde(default = "only_layer")]
    pub layers: Vec<u64>,
    /// Files that a clone shares, until it is opened first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub linked: Vec<String>,
}

fn only_layer() -> Vec<u64> {
    vec![0]
}

impl VolumeRecord {
    /// The record of a volume without writes.
    pub(crate) fn new(id: &VolumeId, size_bytes: u64, base: Option<Digest>) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            id: id.clone(),
            size_bytes,
            base,
            layers: only_layer(),
            linked: Vec::new(),
        }
    }

    /// Reads a record of any version.
    pub(crate) fn parse(bytes: &[u8], name: &str) -> Result<Self, VolumeError> {
        // The file is made first and filled then, so this volume was never there.
        if bytes.is_empty() {
            let text = format!("volume {name} was never completed");
            return Err(VolumeError::new(VolumeErrorKind::NotFound, text));
        }
        let mut record: Self = serde_json::from_slice(bytes).map_err(|e| {
            VolumeError::with_source(VolumeErrorKind::Corrupt, format!("the record of volume {name} cannot be read"), e)
        })?;
        let version = record.format_version;
        let in_order = record.layers.is_sorted_by(|newer, older| newer > older);
        let layers = record.layers.len();
        if !(1..=FORMAT_VERSION).contains(&version) || record.size_bytes > MAX_DISK_BYTES {
            let text = format!("volume {name} was written by another version (format {version})");
            return Err(VolumeError::new(VolumeErrorKind::Corrupt, text));
        }
        let numbers_left = record.layers.first().is_some_and(|newest| *newest <= MAX_LAYER_NUMBER);
        if layers > MAX_LAYERS || !in_order || !numbers_left {
            let text = format!("the record of volume {name} lists its layers wrongly");
            return Err(VolumeError::new(VolumeErrorKind::Corrupt, text));
        }
        record.format_version = FORMAT_VERSION;
        Ok(record)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record is plain data")
    }

    /// Reads the record in a volume's directory; a clone's only when that is complete.
    pub(crate) fn read(directory: &dyn StorageDirectory) -> Result<Self, VolumeError> {
        let bytes = directory.read(RECORD_NAME).map_err(|e| VolumeError::io("cannot read a volume's record", e))?;
        match bytes {
            Some(bytes) => {
                let record = Self::parse(&bytes, "in this directory")?;
                check_complete(directory, &record).map(|()| record)
            }
            None => Err(VolumeError::new(VolumeErrorKind::NotFound, "there is no volume in this directory")),
        }
    }
}

/// Checks a size that is asked for; `smallest` is that of what is below or there already.
pub(crate) fn check_size(size_bytes: u64, smallest: u64) -> Result<(), VolumeError> {
    if size_bytes < smallest || size_bytes > MAX_DISK_BYTES || !size_bytes.is_multiple_of(512) {
        let text = format!(
            "a volume of {size_bytes} bytes is not possible: it must be a multiple of 512 from {smallest} to {MAX_DISK_BYTES}"
        );
        return Err(VolumeError::new(VolumeErrorKind::BadSize, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: &str = r#"{"format_version":1,"id":"vol-0123456789abcdef0","size_bytes":1048576,"base":null}"#;
    const VERSION_2: &str =
        r#"{"format_version":2,"id":"vol-0123456789abcdef0","size_bytes":1048576,"base":null,"layers":[3,1,0]}"#;

    #[test]
    fn records_of_every_version_are_read() {
        let first = VolumeRecord::parse(VERSION_1.as_bytes(), "v").unwrap();
        assert_eq!((first.size_bytes, first.layers), (1 << 20, vec![0]));
        let second = VolumeRecord::parse(VERSION_2.as_bytes(), "v").unwrap();
        assert_eq!(second.layers, [3, 1, 0]);
        assert_eq!(String::from_utf8(second.encode()).unwrap(), VERSION_2);
    }

    #[test]
    fn records_that_no_version_writes_are_refused() {
        let kind = |text: &str| VolumeRecord::parse(text.as_bytes(), "v").unwrap_err().kind();
        for bad in
            ["[]", "[1,1]", "[0,1]", "[16,15,14,13,12,11,10,9,8,7,6,5,4,3,2,1,0]", "[9223372036854775808]", "[-1]"]
        {
            assert_eq!(kind(&VERSION_2.replace("[3,1,0]", bad)), VolumeErrorKind::Corrupt, "{bad}");
        }
        assert_eq!(kind(&VERSION_2.replace("n\":2", "n\":3")), VolumeErrorKind::Corrupt);
        assert_eq!(kind(""), VolumeErrorKind::NotFound);
    }
}
