//! Encryption at rest: what is stored can be read only with the store's key.
//!
//! ```text
//! key of a provider (file, command)          KEK, 256 bits, one for each slot
//!   └─ AES-256-GCM ─ slot: master key        random, for the life of the store
//!        └─ AES-256-GCM ─┬─ data key 1 … n   packs, manifests, attachments; the newest is used for what is new
//!                        ├─ block hash key   hashes of blocks, that is deduplication
//!                        ├─ name key         names of manifests and attachments
//!                        └─ host key         base caches and overlays of hosts
//! ```
//!
//! | module | what it decides or does |
//! |---|---|
//! | `secret` | keys in memory, derivation, AES-256-GCM |
//! | `key_source` | where the key of a slot comes from |
//! | `document`, `keyring` | the stored keys: wrapped, numbered, replaced as a whole |
//! | `encrypted` | encrypted packs (frames, footers) and encrypted whole objects |
//! | `access` | what a [`Store`](crate::Store) does with all that |
//!
//! Every key encrypts under nonces that never repeat. A key derived with a random salt encrypts one
//! message, under nonce 0. A pack's key is derived from its random id, and encrypts frame `n` under
//! nonce `n` and the footer under the last one.

mod access;
mod document;
mod encrypted;
mod key_source;
mod keyring;
mod secret;

pub(crate) use document::StoreId;
pub(crate) use encrypted::{EncryptedKind, PackCipher, PackKeys, TAG_BYTES};
pub use key_source::{KeyProvider, KeySource, StoreKey, write_new_key_file};
pub use keyring::KeySlot;
pub(crate) use keyring::Keyring;
pub(crate) use secret::{Secret, fill_random};
