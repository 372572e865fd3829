//! Encrypted packs, and whole objects that are encrypted: manifests, attachments.
//!
//! ```text
//! a encrypted object
//! 0       8      magic of the plain object
//! 8       4      format version, 2
//! 12      2      1: encrypted
//! 14      2      number of the data key, from 1
//! 16      32     salt, random
//! 48      …      the plain object, encrypted
//! end-48  16     tag of AES-256-GCM
//! end-32  32     BLAKE3 of everything before: damage is told from a newer version, and without a key
//! ```
//! The key is derived from data key and salt, and encrypts nothing else; the nonce is 0. Authenticated
//! with it are the first 48 bytes and the object's name, so that none can stand in for another.

use super::keyring::Keyring;
use super::secret::{Gcm, Secret, fill_random};
use crate::error::{StoreError, StoreErrorKind};
use crate::pack::PackId;

pub(crate) use super::secret::TAG_BYTES;

const VERSION: u32 = 2;
const ENCRYPTED: u16 = 1;
const HEADER_BYTES: usize = 48;
const HASH_BYTES: usize = 32;

const OBJECT_CONTEXT: &str = "bulbil 2026-11 encrypted object under a data key";
const PACK_CONTEXT: &str = "bulbil 2026-11 pack under a data key";

/// The nonce of a pack's footer: no pack has so many frames.
const FOOTER_NONCE: u64 = u64::MAX;

/// Which objects are encrypted as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EncryptedKind {
    Manifest,
    Attachment,
    Image,
}

impl EncryptedKind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Manifest => b"BULBMANI",
            Self::Attachment => b"BULBATTA",
            Self::Image => b"BULBIMAG",
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Attachment => "attachment",
            Self::Image => "image record",
        }
    }
}

impl Keyring {
    /// Encrypts an object that will be stored under this name.
    pub(crate) fn encrypt(&self, kind: EncryptedKind, name: &str, plain: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut salt = [0; 32];
        fill_random(&mut salt)?;
        let (number, key) = self.newest_data_key();
        Ok(encrypt_with(&key, number, &salt, kind, name, plain))
    }

    /// Decrypts the object that is stored under this name.
    ///
    /// # Errors
    /// `Corrupt` when it was changed, or is not encrypted; `Key` when its data key is not known.
    pub(crate) fn decrypt(&self, kind: EncryptedKind, name: &str, bytes: Vec<u8>) -> Result<Vec<u8>, StoreError> {
        let number = data_key_of(kind, name, &bytes)?;
        decrypt_with(&self.data_key(number)?, kind, name, bytes)
    }
}

fn encrypt_with(key: &Secret, number: u16, salt: &[u8; 32], kind: EncryptedKind, name: &str, plain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + plain.len() + TAG_BYTES + HASH_BYTES);
    bytes.extend_from_slice(kind.magic());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&ENCRYPTED.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(salt);
    let context = [&bytes[..], name.as_bytes()].concat();
    bytes.extend_from_slice(plain);
    let tag = Gcm::new(&key.derive(OBJECT_CONTEXT, &[salt])).seal(0, &context, &mut bytes[HEADER_BYTES..]);
    bytes.extend_from_slice(&tag);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    bytes
}

/// Tells the number of the data key of a encrypted object.
fn data_key_of(kind: EncryptedKind, name: &str, bytes: &[u8]) -> Result<u16, StoreError> {
    let what = kind.as_str();
    let (content, hash) = bytes.split_last_chunk::<HASH_BYTES>().unwrap_or((bytes, &[0; HASH_BYTES]));
    if content.len() < HEADER_BYTES || &bytes[..8] != kind.magic() {
        return Err(StoreError::corrupt(format!("`{name}` is not an encrypted {what}")));
    }
    if blake3::hash(content).as_bytes() != hash {
        return Err(StoreError::corrupt(format!("the {what} `{name}` does not match its hash")));
    }
    match (u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes")), u16_at(bytes, 12)) {
        (VERSION, ENCRYPTED) if content.len() >= HEADER_BYTES + TAG_BYTES => Ok(u16_at(bytes, 14)),
        (1, _) => Err(StoreError::corrupt(format!("the {what} `{name}` is not encrypted, and the store is"))),
        (version, _) => {
            let text = format!("{what} format version {version} is not known");
            Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text))
        }
    }
}

fn decrypt_with(key: &Secret, kind: EncryptedKind, name: &str, mut bytes: Vec<u8>) -> Result<Vec<u8>, StoreError> {
    bytes.truncate(bytes.len() - HASH_BYTES);
    let (header, rest) = bytes.split_at_mut(HEADER_BYTES);
    let (message, tag) = rest.split_last_chunk_mut::<TAG_BYTES>().expect("its length was checked");
    let context = [&*header, name.as_bytes()].concat();
    let opened = Gcm::new(&key.derive(OBJECT_CONTEXT, &[&header[16..]])).open(0, &context, message, tag);
    opened.map_err(|_| StoreError::corrupt(format!("the {} `{name}` is damaged", kind.as_str())))?;
    bytes.truncate(bytes.len() - TAG_BYTES);
    bytes.drain(..HEADER_BYTES);
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

/// Encrypts and decrypts the frames and the footer of one pack.
///
/// # Why no nonce repeats
/// The key comes from the pack's id, 128 random bits that are drawn for every pack that is built, also
/// when blocks are packed again, and used for no other. A builder numbers its frames by itself and
/// encrypts each once. A put that is tried again sends the bytes that are there already.
#[derive(Debug)]
pub(crate) struct PackCipher {
    pub(crate) id: PackId,
    /// Number of the data key.
    pub(crate) number: u16,
    gcm: Gcm,
}

impl PackCipher {
    pub(crate) fn new(key: &Secret, number: u16, id: PackId) -> Self {
        Self { id, number, gcm: Gcm::new(&key.derive(PACK_CONTEXT, &[&id.0])) }
    }

    fn context(&self, nonce: u64, rest: &[u8]) -> Vec<u8> {
        [&self.id.0, &nonce.to_le_bytes()[..], rest].concat()
    }

    /// Encrypts a frame that begins at `start` of `bytes`, and adds its tag.
    pub(crate) fn seal_frame(&self, frame: u64, bytes: &mut Vec<u8>, start: usize) {
        let tag = self.gcm.seal(frame, &self.context(frame, &[]), &mut bytes[start..]);
        bytes.extend_from_slice(&tag);
    }

    /// Decrypts a frame with its tag; `None` when it is damaged.
    pub(crate) fn open_frame(&self, frame: u64, stored: &[u8]) -> Option<Vec<u8>> {
        self.open(frame, &[], stored)
    }

    /// Encrypts a footer that begins at `start` of `bytes`, and adds its tag; `trailer` is authenticated.
    pub(crate) fn seal_footer(&self, trailer: &[u8], bytes: &mut Vec<u8>, start: usize) {
        let tag = self.gcm.seal(FOOTER_NONCE, &self.context(FOOTER_NONCE, trailer), &mut bytes[start..]);
        bytes.extend_from_slice(&tag);
    }

    /// Decrypts a footer with its tag; `None` when it or the trailer is damaged.
    pub(crate) fn open_footer(&self, trailer: &[u8], stored: &[u8]) -> Option<Vec<u8>> {
        self.open(FOOTER_NONCE, trailer, stored)
    }

    fn open(&self, nonce: u64, rest: &[u8], stored: &[u8]) -> Option<Vec<u8>> {
        let (message, tag) = stored.split_last_chunk::<TAG_BYTES>()?;
        let mut message = message.to_vec();
        self.gcm.open(nonce, &self.context(nonce, rest), &mut message, tag).ok()?;
        Some(message)
    }
}

/// Gives the ciphers of encrypted packs.
pub(crate) trait PackKeys {
    /// The cipher of a pack whose data key has this number.
    ///
    /// # Errors
    /// `Key` when there is no such key; `Corrupt`, `Io`, `Timeout`.
    fn pack_cipher(&self, number: u16, id: PackId) -> Result<PackCipher, StoreError>;
}

impl PackKeys for Keyring {
    fn pack_cipher(&self, number: u16, id: PackId) -> Result<PackCipher, StoreError> {
        Ok(PackCipher::new(&self.data_key(number)?, number, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: EncryptedKind = EncryptedKind::Manifest;

    fn sample() -> Vec<u8> {
        encrypt_with(&Secret::new([1; 32]), 3, &[2; 32], KIND, "manifests/a", b"what is to be hidden")
    }

    #[test]
    fn an_encrypted_object_comes_back_under_its_name_only() {
        let key = Secret::new([1; 32]);
        assert_eq!(data_key_of(KIND, "manifests/a", &sample()).unwrap(), 3);
        assert_eq!(decrypt_with(&key, KIND, "manifests/a", sample()).unwrap(), b"what is to be hidden");
        assert!(decrypt_with(&key, KIND, "manifests/b", sample()).is_err());
        assert!(decrypt_with(&Secret::new([9; 32]), KIND, "manifests/a", sample()).is_err());
        assert!(data_key_of(EncryptedKind::Attachment, "manifests/a", &sample()).is_err());
    }

    #[test]
    fn any_changed_or_missing_byte_of_an_encrypted_object_is_noticed() {
        let open = |bytes: &[u8]| match data_key_of(KIND, "manifests/a", bytes)? {
            3 => decrypt_with(&Secret::new([1; 32]), KIND, "manifests/a", bytes.to_vec()),
            number => Err(StoreError::corrupt(format!("another key, {number}"))),
        };
        let good = sample();
        assert!(open(&good).is_ok());
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x20;
            assert!(open(&bad).is_err(), "byte {position}");
            assert!(open(&good[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn the_format_of_encrypted_objects_never_changes() {
        let hash = blake3::hash(&sample()).to_hex();
        assert_eq!(
            (sample().len(), hash.as_str()),
            (116, "abd2e30389acf0eadce725be4404d48e11b22f23370b4a5b62a549b8813703c8")
        );
    }
}
