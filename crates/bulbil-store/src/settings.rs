//! What a store is: its format and its keys, in one object.
//!
//! ```text
//! bulbil-store.json   { "format_version": 1, "block_hash_key": 64 hexadecimal digits, "key_check": 16 digits }
//! ```
//! `key_check` is the beginning of BLAKE3 of the key's digits: with a key that is wrong by one digit nothing
//! that is stored would be recognised. Older stores have none.
//!
//! Written once when the store is made.

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;

pub(crate) const NAME: &str = "bulbil-store.json";
const MAX_BYTES: u64 = 64 << 10;
const FORMAT_VERSION: u32 = 1;

/// Settings of a store.
#[derive(serde::Serialize, serde::Deserialize)]
struct Document {
    format_version: u32,
    /// Keys the hashes of blocks, so that nobody outside can prepare two blocks with one hash.
    block_hash_key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_check: Option<String>,
}

/// The settings of an open store.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) block_hash_key: [u8; 32],
}

impl Settings {
    /// Reads the settings, or writes new ones where there are none.
    pub(crate) fn open_or_create(objects: &dyn Objects) -> Result<Self, StoreError> {
        let document = match objects.get(NAME, MAX_BYTES) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => create(objects)?,
            other => parse(&other?)?,
        };
        if document.key_check.as_ref().is_some_and(|check| *check != key_check(&document.block_hash_key)) {
            return Err(StoreError::corrupt("the store's block hash key does not match its check"));
        }
        Ok(Self { block_hash_key: parse_key(&document.block_hash_key)? })
    }
}

fn create(objects: &dyn Objects) -> Result<Document, StoreError> {
    let mut key = [0; 32];
    getrandom::fill(&mut key)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
    let block_hash_key = Digest::from_bytes(key).to_hex();
    let key_check = Some(key_check(&block_hash_key));
    let document = Document { format_version: FORMAT_VERSION, block_hash_key, key_check };
    let text = serde_json::to_vec_pretty(&document).expect("settings are plain data");
    if objects.put_if_absent(NAME, &text)? {
        return Ok(document);
    }
    parse(&objects.get(NAME, MAX_BYTES)?)
}

fn parse(bytes: &[u8]) -> Result<Document, StoreError> {
    let document: Document = serde_json::from_slice(bytes)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Corrupt, format!("`{NAME}` cannot be read"), e))?;
    if document.format_version != FORMAT_VERSION {
        let text = format!("store format version {} is not known; use a newer bulbil", document.format_version);
        return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
    }
    Ok(document)
}

fn key_check(digits: &str) -> String {
    blake3::hash(digits.as_bytes()).to_hex()[..16].to_owned()
}

fn parse_key(hex: &str) -> Result<[u8; 32], StoreError> {
    let digest: Result<Digest, _> = format!("sha256:{hex}").parse();
    digest.map(|d| *d.as_bytes()).map_err(|_| StoreError::corrupt("the store's block hash key is not 64 digits"))
}
