//! Images by name: what makes a content in a store an image that others can find.
//!
//! ```text
//! images/<name>/<version>.json
//! { "format_version": 1,
//!   "image": { "name", "version", "digest", "size_bytes", "data_bytes", "architecture", "boot_mode", "source_format",
//!              "created_at" },
//!   "blake3": 64 hexadecimal digits, the BLAKE3 of "image" written without white space }
//! ```
//! In an encrypted store the name is `images/` and 64 hexadecimal digits that tell nothing, and the object is encrypted,
//! see `encryption`. A record is put after the manifest of its content, never over another, and is read only when it is byte for byte
//! what this module writes: so a damaged one is noticed wherever the damage is.

use bulbil_types::{Architecture, BootMode, Name};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::encryption::EncryptedKind;
use crate::error::{StoreError, StoreErrorKind};
use crate::store::Store;

const FORMAT_VERSION: u32 = 1;

/// Bytes of a record: names of 63 bytes and numbers need less than one KiB.
const MAX_BYTES: u64 = 64 << 10;

/// Records that are listed: each is a request where the store is behind a network.
const MAX_RECORDS: usize = 100_000;

/// An image that a store offers by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredImage {
    /// Its name.
    pub name: Name,
    /// Its version; name and version together are unique in a store.
    pub version: Name,
    /// Identity of the disk's content.
    pub digest: Digest,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes of the disk that are not zero.
    pub data_bytes: u64,
    /// Its processor architecture.
    pub architecture: Architecture,
    /// How firmware starts it.
    pub boot_mode: BootMode,
    /// The format of the file it once came from.
    pub source_format: String,
    /// When it was imported first, in seconds since 1970.
    pub created_at: i64,
}

/// The images that a store offers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredImages {
    /// By name and version.
    pub images: Vec<StoredImage>,
    /// Names of the objects that are damaged, or of a newer version.
    pub unreadable: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format_version: u32,
    image: StoredImage,
    blake3: String,
}

impl Store {
    /// Offers a content of this store by name. Durable when this returns. Returns `false`, having changed nothing,
    /// when the name and version are taken by another record.
    ///
    /// # Errors
    /// `NotFound` when the store has no manifest of the content; `Io`, `NoSpace`, `Timeout`.
    pub fn put_image(&self, image: &StoredImage) -> Result<bool, StoreError> {
        self.manifest(&image.digest)?;
        let object = self.image_object(&image.name, &image.version);
        let stored = self.encrypt_object(EncryptedKind::Image, &object, encode(image))?;
        // Of one record there are many encrypted forms.
        Ok(self.objects.put_if_absent(&object, &stored)? || self.read_image(&object)? == *image)
    }

    fn read_image(&self, object: &str) -> Result<StoredImage, StoreError> {
        let stored = self.objects.get(object, MAX_BYTES)?;
        let image = parse(object, &self.decrypt_object(EncryptedKind::Image, object, stored)?)?;
        let is_its_own = self.image_object(&image.name, &image.version) == object;
        is_its_own.then_some(image).ok_or_else(|| damaged(object))
    }

    fn image_object(&self, name: &Name, version: &Name) -> String {
        if self.is_encrypted() {
            // No digest of a disk, but a name that only who has the key can make.
            let hash = blake3::hash(format!("image {name}:{version}").as_bytes());
            return format!("images/{}", self.content_name(&Digest::from_bytes(*hash.as_bytes())));
        }
        format!("images/{name}/{version}.json")
    }

    /// Finds an image by name and version.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt`, `UnsupportedVersion`, `Io`, `Timeout`.
    pub fn image(&self, name: &Name, version: &Name) -> Result<StoredImage, StoreError> {
        match self.read_image(&self.image_object(name, version)) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => {
                Err(StoreError::new(StoreErrorKind::NotFound, format!("the store offers no image `{name}:{version}`")))
            }
            other => other,
        }
    }

    /// Lists every image that the store offers, by name and version.
    ///
    /// # Errors
    /// `Corrupt` for more than 100 000 records; `Io`, `Timeout`. A record that cannot be understood is no error.
    pub fn images(&self) -> Result<StoredImages, StoreError> {
        let mut objects = self.objects.list("images")?;
        if objects.len() > MAX_RECORDS {
            return Err(StoreError::corrupt(format!("the store has {} image records", objects.len())));
        }
        objects.sort_unstable();
        let mut found = StoredImages::default();
        for (object, _) in objects {
            match self.read_image(&object) {
                Ok(image) => found.images.push(image),
                // Withdrawn since it was listed.
                Err(e) if e.kind() == StoreErrorKind::NotFound => {}
                Err(e) if matches!(e.kind(), StoreErrorKind::Corrupt | StoreErrorKind::UnsupportedVersion) => {
                    found.unreadable.push(object);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }

    /// Stops offering an image by this name; its content stays. One that is not there is fine.
    ///
    /// # Errors
    /// `Io`, `Timeout`.
    pub fn remove_image(&self, name: &Name, version: &Name) -> Result<(), StoreError> {
        self.objects.delete(&self.image_object(name, version))
    }
}

fn damaged(object: &str) -> StoreError {
    StoreError::corrupt(format!("the image record `{object}` is damaged"))
}

fn encode(image: &StoredImage) -> Vec<u8> {
    let compact = serde_json::to_vec(image).expect("a record is plain data");
    let blake3 = blake3::hash(&compact).to_hex().to_string();
    let document = Document { format_version: FORMAT_VERSION, image: image.clone(), blake3 };
    let mut bytes = serde_json::to_vec_pretty(&document).expect("a record is plain data");
    bytes.push(b'\n');
    bytes
}

fn parse(object: &str, bytes: &[u8]) -> Result<StoredImage, StoreError> {
    #[derive(Deserialize)]
    struct VersionOnly {
        format_version: u32,
    }
    let version: VersionOnly = serde_json::from_slice(bytes).map_err(|_| damaged(object))?;
    if version.format_version != FORMAT_VERSION {
        let text = format!("image record format version {} is not known", version.format_version);
        return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
    }
    let document: Document = serde_json::from_slice(bytes).map_err(|_| damaged(object))?;
    let sound = encode(&document.image) == bytes;
    sound.then_some(document.image).ok_or_else(|| damaged(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> StoredImage {
        StoredImage {
            name: "debian-12".parse().unwrap(),
            version: "2.1".parse().unwrap(),
            digest: Digest::from_bytes([0xab; 32]),
            size_bytes: 3 << 30,
            data_bytes: 391 << 20,
            architecture: Architecture::X86_64,
            boot_mode: BootMode::Bios,
            source_format: "qcow2".to_owned(),
            created_at: 1_790_000_000,
        }
    }

    #[test]
    fn the_format_never_changes() {
        let expected = r#"{
  "format_version": 1,
  "image": {
    "name": "debian-12",
    "version": "2.1",
    "digest": "sha256:abababababababababababababababababababababababababababababababab",
    "size_bytes": 3221225472,
    "data_bytes": 409993216,
    "architecture": "x86_64",
    "boot_mode": "bios",
    "source_format": "qcow2",
    "created_at": 1790000000
  },
  "blake3": "HASH"
}
"#;
        let compact = serde_json::to_vec(&sample()).unwrap();
        let expected = expected.replace("HASH", &blake3::hash(&compact).to_hex());
        assert_eq!(String::from_utf8(encode(&sample())).unwrap(), expected);
        assert_eq!(parse("images/debian-12/2.1.json", expected.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn a_record_with_any_byte_changed_is_refused() {
        let bytes = encode(&sample());
        for position in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[position] ^= 1;
            assert!(parse("images/debian-12/2.1.json", &bad).is_err(), "byte {position}");
            assert!(parse("images/debian-12/2.1.json", &bytes[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn a_record_of_a_newer_version_is_named_so() {
        let newer =
            String::from_utf8(encode(&sample())).unwrap().replace("\"format_version\": 1", "\"format_version\": 2");
        let error = parse("images/debian-12/2.1.json", newer.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::UnsupportedVersion);
    }
}
