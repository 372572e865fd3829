//! What a store does with its keys.

use super::encrypted::{EncryptedKind, PackKeys};
use super::key_source::KeyProvider;
use super::keyring::{KeySlot, Keyring};
use crate::cipher::{BlockCipher, OverlayKey};
use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::manifest::Manifest;
use crate::pack::{PackBuilder, PackId};
use crate::publish::Stored;
use crate::published::{ContentName, Published};
use crate::store::Store;

impl Store {
    /// Whether the store is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.keyring.is_some()
    }

    fn keys(&self) -> Result<&Keyring, StoreError> {
        self.keyring
            .as_deref()
            .ok_or_else(|| StoreError::new(StoreErrorKind::Key, "the store is not encrypted; it has no keys to change"))
    }

    /// Replaces the key that this store was opened with by another one; no stored data is written again.
    ///
    /// When this returns, the new key opens the store and the old one does not any more. Whoever has the
    /// store open goes on. After an error, or when it was cut off, exactly one of the two opens it, so
    /// keep both until this has returned.
    ///
    /// # Errors
    /// `Key` when the new key is not to be had, when another process has replaced the same key, or the
    /// store is not encrypted; `Io`, `NoSpace`, `Timeout`.
    pub fn rotate_key(&self, new: &dyn KeyProvider) -> Result<(), StoreError> {
        self.keys()?.rotate(new)
    }

    /// Adds a further key that opens the store, and returns its slot. Durable when this returns.
    ///
    /// # Errors
    /// `Key` when the key is not to be had, there are 16 already, or the store is not encrypted; `Io`,
    /// `NoSpace`, `Timeout`.
    pub fn add_key(&self, new: &dyn KeyProvider) -> Result<String, StoreError> {
        self.keys()?.add_slot(new)
    }

    /// Removes the key of a slot. Durable when this returns.
    ///
    /// # Errors
    /// `NotFound` when there is no such slot; `Key` for the last one; `Io`, `NoSpace`, `Timeout`.
    pub fn remove_key(&self, slot: &str) -> Result<(), StoreError> {
        self.keys()?.remove_slot(slot)
    }

    /// Lists the keys that open the store; none when it is not encrypted.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, `Timeout`.
    pub fn key_slots(&self) -> Result<Vec<KeySlot>, StoreError> {
        self.keyring.as_ref().map_or(Ok(Vec::new()), |keyring| keyring.slots())
    }

    /// Adds a data key, which encrypts all that is stored from now on, and returns its number; what is
    /// there stays readable with the key it has. Durable when this returns.
    ///
    /// # Errors
    /// `Key` when the store is not encrypted or has 4096 already; `Io`, `NoSpace`, `Timeout`.
    pub fn add_data_key(&self) -> Result<u16, StoreError> {
        self.keys()?.add_data_key()
    }

    /// The cipher of a pack's frames in caches of this host: block `32 · frame + n` is block `n` of a
    /// frame. `None` when the store is not encrypted.
    #[must_use]
    pub fn cache_cipher(&self, pack: PackId) -> Option<BlockCipher> {
        let keyring = self.keyring.as_ref()?;
        Some(BlockCipher::derive(keyring.host(), "bulbil 2026-11 base cache of a pack", &[&pack.0]))
    }

    /// The key of an overlay's files, by a salt that is kept beside them; `None` when the store is not
    /// encrypted.
    #[must_use]
    pub fn overlay_key(&self, salt: &[u8; 32]) -> Option<OverlayKey> {
        self.keyring.as_ref().map(|keyring| OverlayKey::derive(keyring.host(), salt))
    }

    /// Takes in data keys that other processes have added, so that what is stored next uses the newest.
    pub(crate) fn refresh_keys(&self) -> Result<(), StoreError> {
        self.keyring.as_ref().map_or(Ok(()), |keyring| keyring.refresh())
    }

    /// Begins a pack, which is encrypted when the store is.
    pub(crate) fn pack_builder(&self, id: PackId) -> Result<PackBuilder, StoreError> {
        Ok(match &self.keyring {
            Some(keyring) => PackBuilder::encrypted(keyring.pack_cipher(keyring.newest_data_key().0, id)?),
            None => PackBuilder::new(id),
        })
    }

    /// Under which name a content is stored: its digest, or what tells nothing of it.
    pub(crate) fn content_name(&self, digest: &Digest) -> ContentName {
        ContentName(match &self.keyring {
            Some(keyring) => *blake3::keyed_hash(keyring.names().as_bytes(), digest.as_bytes()).as_bytes(),
            None => *digest.as_bytes(),
        })
    }

    /// What gives the ciphers of packs; `None` when the store is not encrypted.
    pub(crate) fn pack_keys(&self) -> Option<&dyn PackKeys> {
        self.keyring.as_deref().map(|keyring| keyring as &dyn PackKeys)
    }

    /// Encodes a manifest as it is stored under this name.
    pub(crate) fn encode_manifest(&self, manifest: &Manifest, name: &str) -> Result<Vec<u8>, StoreError> {
        self.encrypt_object(EncryptedKind::Manifest, name, manifest.encode()?)
    }

    /// Parses what is stored as a manifest of this content under this name.
    ///
    /// # Errors
    /// `Corrupt`, also when it is of another content; `UnsupportedVersion`; `Key`.
    pub(crate) fn parse_manifest(
        &self,
        content: ContentName,
        name: &str,
        stored: Vec<u8>,
    ) -> Result<Manifest, StoreError> {
        let manifest = Manifest::parse(&self.decrypt_object(EncryptedKind::Manifest, name, stored)?)?;
        let digest = manifest.digest();
        if self.content_name(&digest) != content {
            return Err(StoreError::corrupt(format!("the manifest stored for {content} is of {digest}")));
        }
        if self.is_encrypted() {
            self.contents.lock().expect("no panic while held").insert(content, digest);
        }
        Ok(manifest)
    }

    /// The content of a manifest; an encrypted one may have to be read for it. `None` when it is none or
    /// has gone.
    ///
    /// # Errors
    /// `Corrupt` when it has to be read and cannot be; `Io`, `Timeout`, `Key`.
    pub(crate) fn digest_of(&self, published: &Published) -> Result<Option<Digest>, StoreError> {
        if let Some(digest) = self.known_digest(published.content) {
            return Ok(Some(digest));
        }
        match self.stored_manifest(published)? {
            Stored::Manifest(manifest) => Ok(Some(manifest.digest())),
            Stored::Void | Stored::Gone => Ok(None),
            Stored::Damaged(error) => Err(error),
        }
    }

    /// The digest of a content by its name: `None` in an encrypted store that has read no manifest of it.
    pub(crate) fn known_digest(&self, content: ContentName) -> Option<Digest> {
        if !self.is_encrypted() {
            return Some(Digest::from_bytes(content.0));
        }
        self.contents.lock().expect("no panic while held").get(&content).copied()
    }

    /// Makes of a plain object what is stored under this name.
    pub(crate) fn encrypt_object(
        &self,
        kind: EncryptedKind,
        name: &str,
        plain: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        match &self.keyring {
            Some(keyring) => keyring.encrypt(kind, name, &plain),
            None => Ok(plain),
        }
    }

    /// Makes the plain object of what is stored under this name.
    pub(crate) fn decrypt_object(
        &self,
        kind: EncryptedKind,
        name: &str,
        stored: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        match &self.keyring {
            Some(keyring) => keyring.decrypt(kind, name, stored),
            None => Ok(stored),
        }
    }
}
