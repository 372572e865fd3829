//! The keys of an encrypted store as they are stored: one JSON object for each generation.
//!
//! ```text
//! keys/<store id, 32 digits>/<generation, 8 digits>.json
//! ```
//! A change of the keys puts the next generation, which must not exist yet, and then deletes the
//! earlier ones; the highest counts. So of two changes at the same time one is first, a change that
//! is cut off has happened or not, and at no moment is there no generation.

use serde::{Deserialize, Serialize};

use super::key_source::{KeyProvider, StoreKey};
use super::secret::{Secret, TAG_BYTES, fill_random, unwrap, wrap};
use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;

const FORMAT_VERSION: u32 = 1;
const MAX_DOCUMENT_BYTES: u64 = 1 << 20;

/// Slots are tried one after another, and each has a provider that somebody has to look after.
pub(super) const MAX_SLOTS: usize = 16;

/// Data keys of a store; one each week for 78 years.
pub(super) const MAX_DATA_KEYS: u16 = 4096;

const SLOT_CONTEXT: &str = "bulbil 2026-11 store master key under the key of a slot";
const KEY_CONTEXT: &str = "bulbil 2026-11 store key under the master key";

/// Times to look again when generations come and go meanwhile.
const ATTEMPTS: usize = 16;

/// A number of bytes, as hexadecimal digits in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hex<const N: usize>(pub(crate) [u8; N]);

impl<const N: usize> Hex<N> {
    pub(crate) fn random() -> Result<Self, StoreError> {
        let mut bytes = [0; N];
        fill_random(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl<const N: usize> std::fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let fail = || serde::de::Error::custom(format!("expected {} hexadecimal digits", 2 * N));
        if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(fail());
        }
        let mut bytes = [0; N];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| fail())?;
        }
        Ok(Self(bytes))
    }
}

pub(crate) type StoreId = Hex<16>;
pub(super) type SlotId = Hex<8>;
type Wrapped = Hex<{ 32 + TAG_BYTES }>;

/// The master key under one key from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) id: SlotId,
    /// What kind of source gave the key.
    pub(super) provider: String,
    salt: Hex<32>,
    master_key: Wrapped,
}

impl Slot {
    pub(super) fn new(
        store: StoreId,
        id: SlotId,
        provider: &dyn KeyProvider,
        master: &Secret,
    ) -> Result<Self, StoreError> {
        let key = provider.key()?;
        let salt = Hex::random()?;
        let wrapped = wrap(key.secret(), SLOT_CONTEXT, &salt.0, &slot_bound(store, id), master);
        Ok(Self { id, provider: provider.kind().to_owned(), salt, master_key: Hex(wrapped) })
    }

    pub(super) fn open(&self, store: StoreId, key: &StoreKey) -> Option<Secret> {
        unwrap(key.secret(), SLOT_CONTEXT, &self.salt.0, &slot_bound(store, self.id), &self.master_key.0).ok()
    }
}

/// What a key under the master key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Purpose {
    BlockHash,
    Names,
    Host,
    Data,
}

/// A key under the master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredKey {
    pub(super) purpose: Purpose,
    /// 0, or for data keys 1, 2, …
    pub(super) number: u16,
    salt: Hex<32>,
    key: Wrapped,
}

impl StoredKey {
    pub(super) fn new(
        store: StoreId,
        purpose: Purpose,
        number: u16,
        master: &Secret,
        key: &Secret,
    ) -> Result<Self, StoreError> {
        let salt = Hex::random()?;
        let wrapped = wrap(master, KEY_CONTEXT, &salt.0, &key_bound(store, purpose, number), key);
        Ok(Self { purpose, number, salt, key: Hex(wrapped) })
    }

    pub(super) fn open(&self, store: StoreId, master: &Secret) -> Result<Secret, StoreError> {
        let bound = key_bound(store, self.purpose, self.number);
        unwrap(master, KEY_CONTEXT, &self.salt.0, &bound, &self.key.0).map_err(|_| {
            StoreError::corrupt(format!("the store's {:?} key {} does not verify", self.purpose, self.number))
        })
    }
}

fn slot_bound(store: StoreId, slot: SlotId) -> Vec<u8> {
    [&store.0[..], &slot.0].concat()
}

fn key_bound(store: StoreId, purpose: Purpose, number: u16) -> Vec<u8> {
    let purpose: u8 = match purpose {
        Purpose::Data => 0,
        Purpose::BlockHash => 1,
        Purpose::Names => 2,
        Purpose::Host => 3,
    };
    [&store.0[..], &[purpose], &number.to_le_bytes()].concat()
}

/// All keys of a store, as one generation of them is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Document {
    format_version: u32,
    pub(super) store_id: StoreId,
    pub(super) slots: Vec<Slot>,
    pub(super) keys: Vec<StoredKey>,
}

impl Document {
    pub(super) fn new(store_id: StoreId, slots: Vec<Slot>, keys: Vec<StoredKey>) -> Self {
        Self { format_version: FORMAT_VERSION, store_id, slots, keys }
    }

    pub(super) fn slot(&self, id: SlotId) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    pub(super) fn parse(bytes: &[u8], store_id: StoreId) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let fail = |e| StoreError::with_source(StoreErrorKind::Corrupt, "the store's keys cannot be read", e);
        let Version { format_version } = serde_json::from_slice(bytes).map_err(fail)?;
        if format_version != FORMAT_VERSION {
            let text = format!("key format version {format_version} is not known; use a newer bulbil");
            return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
        }
        let document: Self = serde_json::from_slice(bytes).map_err(fail)?;
        let counts_are_sound = (1..=MAX_SLOTS).contains(&document.slots.len())
            && document.keys.len() <= usize::from(MAX_DATA_KEYS) + 3
            && document
                .keys
                .iter()
                .all(|key| (key.purpose == Purpose::Data) == (1..=MAX_DATA_KEYS).contains(&key.number));
        if document.store_id != store_id || !counts_are_sound {
            return Err(StoreError::corrupt("the store's keys are not those of this store"));
        }
        Ok(document)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("keys are plain data")
    }
}

fn directory(store: StoreId) -> String {
    format!("keys/{store}")
}

fn object_name(store: StoreId, generation: u32) -> String {
    format!("{}/{generation:08x}.json", directory(store))
}

fn parse_generation(object_name: &str) -> Option<u32> {
    let digits = object_name.rsplit('/').next()?.strip_suffix(".json")?;
    (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok())?
}

/// Puts a generation; `false` when it is there already.
pub(super) fn put(objects: &dyn Objects, generation: u32, document: &Document) -> Result<bool, StoreError> {
    objects.put_if_absent(&object_name(document.store_id, generation), &document.encode())
}

/// Deletes the keys of a store that did not come to be.
pub(super) fn forget(objects: &dyn Objects, store: StoreId) -> Result<(), StoreError> {
    objects.delete(&object_name(store, 1))
}

/// Reads the newest generation, and deletes those that it has replaced.
pub(super) fn newest(objects: &dyn Objects, store: StoreId) -> Result<(u32, Document), StoreError> {
    for _ in 0..ATTEMPTS {
        let listed = objects.list(&directory(store))?;
        let generations: Vec<_> = listed.iter().filter_map(|(name, _)| parse_generation(name)).collect();
        let Some(&newest) = generations.iter().max() else { break };
        match objects.get(&object_name(store, newest), MAX_DOCUMENT_BYTES) {
            // Replaced since it was listed.
            Err(e) if e.kind() == StoreErrorKind::NotFound => {}
            Err(e) => return Err(e),
            Ok(bytes) => {
                let document = Document::parse(&bytes, store)?;
                delete_replaced(objects, store, &generations, newest);
                return Ok((newest, document));
            }
        }
    }
    Err(StoreError::corrupt(format!("the keys of the encrypted store {store} are gone")))
}

/// What a removed slot opened must not stay; whoever opens the store next tries again.
fn delete_replaced(objects: &dyn Objects, store: StoreId, generations: &[u32], newest: u32) {
    for &generation in generations.iter().filter(|generation| **generation < newest) {
        if let Err(error) = objects.delete(&object_name(store, generation)) {
            tracing::warn!(generation, %error, "cannot delete replaced keys of the store");
        }
    }
}

/// Changes the keys. Durable when this returns.
///
/// `edit` may be called several times, each time with what another change has left; `done` says
/// whether a document has the change.
pub(super) fn change(
    objects: &dyn Objects,
    store: StoreId,
    done: impl Fn(&Document) -> bool,
    edit: impl Fn(&mut Document) -> Result<(), StoreError>,
) -> Result<Document, StoreError> {
    for _ in 0..ATTEMPTS {
        // After a put this looks whether the put counts: a higher generation may have been there, made
        // from one that this put did not know.
        let (generation, mut document) = newest(objects, store)?;
        if done(&document) {
            return Ok(document);
        }
        edit(&mut document)?;
        let next = generation.checked_add(1).ok_or_else(|| StoreError::corrupt("too many changes of the keys"))?;
        match put(objects, next, &document) {
            // Another one was there when it was put, and was replaced before it was compared.
            Err(e) if e.kind() == StoreErrorKind::NotFound => {}
            other => drop(other?),
        }
    }
    Err(StoreError::new(StoreErrorKind::Io, "the store's keys were changed by others all the time; try again"))
}
