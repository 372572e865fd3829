//! What a store is: its format and its keys, in one object.
//!
//! ```text
//! bulbil-store.json   { "format_version": 1, "block_hash_key": 64 hexadecimal digits, "key_check": 16 digits }
//!                     { "format_version": 2, "store_id": 32 hexadecimal digits }      an encrypted store
//! ```
//! `key_check` is the beginning of BLAKE3 of the key's digits: with a key that is wrong by one digit nothing
//! that is stored would be recognised. Older stores have none.
//!
//! Written once when the store is made. The keys of an encrypted store are in `keys/`, see `encryption`.

use std::sync::Arc;

use crate::digest::Digest;
use crate::encryption::{Keyring, Secret, StoreId, fill_random};
use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;
use crate::store::StoreOptions;

pub(crate) const NAME: &str = "bulbil-store.json";
const MAX_BYTES: u64 = 64 << 10;
const PLAIN: u32 = 1;
const ENCRYPTED: u32 = 2;

/// Settings of a store that is not encrypted.
#[derive(serde::Serialize, serde::Deserialize)]
struct PlainDocument {
    format_version: u32,
    /// Keys the hashes of blocks, so that nobody outside can prepare two blocks with one hash.
    block_hash_key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_check: Option<String>,
}

/// Settings of an encrypted store.
#[derive(serde::Serialize, serde::Deserialize)]
struct EncryptedDocument {
    format_version: u32,
    /// Under which id its keys are found.
    store_id: StoreId,
}

enum Document {
    Plain(PlainDocument),
    Encrypted(EncryptedDocument),
}

/// The settings of an open store.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) block_hash_key: Secret,
    /// `None` when the store is not encrypted.
    pub(crate) keyring: Option<Arc<Keyring>>,
}

impl Settings {
    /// Reads the settings, or writes new ones where there are none.
    pub(crate) fn open_or_create(objects: &Arc<dyn Objects>, options: &StoreOptions) -> Result<Self, StoreError> {
        let document = match objects.get(NAME, MAX_BYTES) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => create(&**objects, options)?,
            other => parse(&other?)?,
        };
        match (document, &options.key) {
            (Document::Plain(document), None) => Ok(Self { block_hash_key: document.key()?, keyring: None }),
            (Document::Encrypted(document), Some(provider)) => {
                let keyring = Keyring::open(Arc::clone(objects), document.store_id, &**provider)?;
                Ok(Self { block_hash_key: keyring.block_hash().clone(), keyring: Some(Arc::new(keyring)) })
            }
            // Whoever gives a key believes that the store is encrypted.
            (Document::Plain(_), Some(_)) => {
                Err(key_error("the store is not encrypted, but a key was given; leave the key away"))
            }
            (Document::Encrypted(_), None) => {
                Err(key_error("the store is encrypted; give its key with --store-key file:PATH or BULBIL_STORE_KEY"))
            }
        }
    }
}

fn key_error(message: &str) -> StoreError {
    StoreError::new(StoreErrorKind::Key, message)
}

fn create(objects: &dyn Objects, options: &StoreOptions) -> Result<Document, StoreError> {
    match (&options.key, options.encrypt_new) {
        (None, false) => create_plain(objects),
        (Some(provider), true) => {
            let store_id = Keyring::create(objects, &**provider)?;
            let document = EncryptedDocument { format_version: ENCRYPTED, store_id };
            if objects.put_if_absent(NAME, &document.encode())? {
                return Ok(Document::Encrypted(document));
            }
            let found = parse(&objects.get(NAME, MAX_BYTES)?)?;
            if is_another_store(objects, &found, store_id) {
                Keyring::forget(objects, store_id);
            }
            Ok(found)
        }
        (None, true) => Err(key_error("a new encrypted store needs a key; give one with --store-key file:PATH")),
        (Some(_), false) => {
            Err(key_error("there is no store here yet, and a new one would not be encrypted, but a key was given"))
        }
    }
}

/// Whether the settings that were found are those of another store, whose keys are there.
///
/// Beyond doubt: when an answer was lost or a read damaged, they may be those that this process has just put.
fn is_another_store(objects: &dyn Objects, found: &Document, store_id: StoreId) -> bool {
    match found {
        Document::Plain(_) => true,
        Document::Encrypted(found) => found.store_id != store_id && Keyring::is_there(objects, found.store_id),
    }
}

fn create_plain(objects: &dyn Objects) -> Result<Document, StoreError> {
    let mut key = [0; 32];
    fill_random(&mut key)?;
    let block_hash_key = Digest::from_bytes(key).to_hex();
    let key_check = Some(key_check(&block_hash_key));
    let document = PlainDocument { format_version: PLAIN, block_hash_key, key_check };
    let text = serde_json::to_vec_pretty(&document).expect("settings are plain data");
    if objects.put_if_absent(NAME, &text)? {
        return Ok(Document::Plain(document));
    }
    parse(&objects.get(NAME, MAX_BYTES)?)
}

fn parse(bytes: &[u8]) -> Result<Document, StoreError> {
    #[derive(serde::Deserialize)]
    struct Version {
        format_version: u32,
    }
    let fail = |e| StoreError::with_source(StoreErrorKind::Corrupt, format!("`{NAME}` cannot be read"), e);
    let Version { format_version } = serde_json::from_slice(bytes).map_err(fail)?;
    match format_version {
        PLAIN => Ok(Document::Plain(serde_json::from_slice(bytes).map_err(fail)?)),
        ENCRYPTED => Ok(Document::Encrypted(serde_json::from_slice(bytes).map_err(fail)?)),
        version => {
            let text = format!("store format version {version} is not known; use a newer bulbil");
            Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text))
        }
    }
}

impl EncryptedDocument {
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("settings are plain data")
    }
}

/// Checks that the settings in the store are still those of this encrypted store.
///
/// # Errors
/// `Corrupt` when they are not; `Io`, `Timeout`.
pub(crate) fn check_encrypted(objects: &dyn Objects, store_id: StoreId) -> Result<(), StoreError> {
    let expected = EncryptedDocument { format_version: ENCRYPTED, store_id }.encode();
    match objects.get(NAME, MAX_BYTES) {
        Ok(found) if found == expected => Ok(()),
        Ok(_) => Err(StoreError::corrupt("the settings are not those with which the store was opened")),
        Err(e) if e.kind() == StoreErrorKind::NotFound => Err(StoreError::corrupt("the settings have gone")),
        Err(e) => Err(e),
    }
}

fn key_check(digits: &str) -> String {
    blake3::hash(digits.as_bytes()).to_hex()[..16].to_owned()
}

impl PlainDocument {
    fn key(&self) -> Result<Secret, StoreError> {
        if self.key_check.as_ref().is_some_and(|check| *check != key_check(&self.block_hash_key)) {
            return Err(StoreError::corrupt("the store's block hash key does not match its check"));
        }
        let digest: Result<Digest, _> = format!("sha256:{}", self.block_hash_key).parse();
        let key = digest.map_err(|_| StoreError::corrupt("the store's block hash key is not 64 digits"))?;
        Ok(Secret::new(*key.as_bytes()))
    }
}
