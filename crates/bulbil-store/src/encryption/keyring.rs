//! The keys of an open encrypted store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::document::{self, Document, Hex, MAX_DATA_KEYS, MAX_SLOTS, Purpose, Slot, SlotId, StoreId, StoredKey};
use super::key_source::KeyProvider;
use super::secret::Secret;
use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;

/// One of the keys that open an encrypted store, as far as everybody may know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// Names the slot: 16 hexadecimal digits.
    pub id: String,
    /// What kind of source gave its key: `file`, `command`.
    pub provider: String,
    /// Whether this store was opened with it.
    pub in_use: bool,
}

/// The keys of an open encrypted store.
///
/// The master key stays what it is, so that a process that has the store open can read keys that
/// were added since, and does not notice that a slot was replaced.
#[derive(Debug)]
pub(crate) struct Keyring {
    objects: Arc<dyn Objects>,
    store_id: StoreId,
    master: Secret,
    opened_with: Mutex<SlotId>,
    block_hash: Secret,
    names: Secret,
    host: Secret,
    data: RwLock<BTreeMap<u16, Secret>>,
}

fn key_error(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Key, message)
}

impl Keyring {
    /// Makes the keys of a new store, and returns the id under which they are found.
    ///
    /// The store comes to be when its settings name this id; until then [`forget`](Self::forget)
    /// takes the keys back.
    pub(crate) fn create(objects: &dyn Objects, provider: &dyn KeyProvider) -> Result<StoreId, StoreError> {
        let (store_id, master) = (StoreId::random()?, Secret::random()?);
        let slot = Slot::new(store_id, Hex::random()?, provider, &master)?;
        let key = |purpose, number| StoredKey::new(store_id, purpose, number, &master, &Secret::random()?);
        let keys =
            vec![key(Purpose::BlockHash, 0)?, key(Purpose::Names, 0)?, key(Purpose::Host, 0)?, key(Purpose::Data, 1)?];
        document::put(objects, 1, &Document::new(store_id, vec![slot], keys))?;
        Ok(store_id)
    }

    /// Whether the keys of a store are there and whole.
    pub(crate) fn is_there(objects: &dyn Objects, store_id: StoreId) -> bool {
        document::newest(objects, store_id).is_ok()
    }

    pub(crate) fn forget(objects: &dyn Objects, store_id: StoreId) {
        if let Err(error) = document::forget(objects, store_id) {
            tracing::warn!(%error, "cannot delete the keys of a store that another process has made first");
        }
    }

    /// Opens the keys of a store.
    ///
    /// # Errors
    /// `Key` when no slot opens with the provider's key.
    pub(crate) fn open(
        objects: Arc<dyn Objects>,
        store_id: StoreId,
        provider: &dyn KeyProvider,
    ) -> Result<Self, StoreError> {
        let (_, document) = document::newest(&*objects, store_id)?;
        let key = provider.key()?;
        let opened = document.slots.iter().find_map(|slot| Some((slot.id, slot.open(store_id, &key)?)));
        let Some((slot, master)) = opened else {
            let slots: Vec<_> = document.slots.iter().map(|slot| format!("{} ({})", slot.id, slot.provider)).collect();
            let what = if slots.len() == 1 { "key slot" } else { "key slots" };
            let text = format!("the key is not that of the store: it does not open {what} {}", slots.join(", "));
            return Err(key_error(text));
        };
        let keys =
            document.keys.iter().map(|stored| Ok((stored.purpose, stored.number, stored.open(store_id, &master)?)));
        let keys = keys.collect::<Result<Vec<_>, StoreError>>()?;
        let single = |purpose| {
            let found = keys.iter().find(|(other, _, _)| *other == purpose).map(|(_, _, key)| key.clone());
            found.ok_or_else(|| StoreError::corrupt(format!("the store has no {purpose:?} key")))
        };
        let keyring = Self {
            objects,
            store_id,
            opened_with: Mutex::new(slot),
            block_hash: single(Purpose::BlockHash)?,
            names: single(Purpose::Names)?,
            host: single(Purpose::Host)?,
            data: RwLock::default(),
            master,
        };
        single(Purpose::Data)?;
        keyring.take_data_keys(&document)?;
        Ok(keyring)
    }

    fn take_data_keys(&self, document: &Document) -> Result<(), StoreError> {
        for stored in document.keys.iter().filter(|stored| stored.purpose == Purpose::Data) {
            let known = self.data.read().unwrap_or_else(PoisonError::into_inner).contains_key(&stored.number);
            if !known {
                let key = stored.open(self.store_id, &self.master)?;
                self.data.write().unwrap_or_else(PoisonError::into_inner).insert(stored.number, key);
            }
        }
        Ok(())
    }

    pub(crate) fn store_id(&self) -> StoreId {
        self.store_id
    }

    pub(crate) fn block_hash(&self) -> &Secret {
        &self.block_hash
    }

    pub(crate) fn names(&self) -> &Secret {
        &self.names
    }

    pub(crate) fn host(&self) -> &Secret {
        &self.host
    }

    /// The key for what is new, and its number.
    pub(crate) fn newest_data_key(&self) -> (u16, Secret) {
        let data = self.data.read().unwrap_or_else(PoisonError::into_inner);
        let (number, key) = data.last_key_value().expect("one was found when the keys were opened");
        (*number, key.clone())
    }

    /// A data key by its number; one that another process has added is looked for.
    ///
    /// # Errors
    /// `Corrupt` when there is none of this number: what names it is damaged; `Io`, `Timeout`.
    pub(crate) fn data_key(&self, number: u16) -> Result<Secret, StoreError> {
        let find = || self.data.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
        if let Some(key) = find() {
            return Ok(key);
        }
        self.refresh()?;
        find().ok_or_else(|| StoreError::corrupt(format!("the store has no data key {number}")))
    }

    /// Takes in what other processes have added.
    pub(crate) fn refresh(&self) -> Result<(), StoreError> {
        self.take_data_keys(&document::newest(&*self.objects, self.store_id)?.1)
    }

    pub(crate) fn slots(&self) -> Result<Vec<KeySlot>, StoreError> {
        let (_, document) = document::newest(&*self.objects, self.store_id)?;
        let in_use = self.opened_with();
        let slots = document.slots.into_iter();
        let slots = slots.map(|s| KeySlot { id: s.id.to_string(), provider: s.provider, in_use: s.id == in_use });
        Ok(slots.collect())
    }

    fn opened_with(&self) -> SlotId {
        *self.opened_with.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_slot(&self, provider: &dyn KeyProvider) -> Result<Slot, StoreError> {
        Slot::new(self.store_id, Hex::random()?, provider, &self.master)
    }

    pub(crate) fn add_slot(&self, provider: &dyn KeyProvider) -> Result<String, StoreError> {
        let slot = self.new_slot(provider)?;
        let has_slot = |document: &Document| document.slot(slot.id).is_some();
        document::change(&*self.objects, self.store_id, has_slot, |document| {
            if document.slots.len() >= MAX_SLOTS {
                return Err(key_error(format!("the store has {MAX_SLOTS} key slots already; remove one first")));
            }
            document.slots.push(slot.clone());
            Ok(())
        })?;
        Ok(slot.id.to_string())
    }

    /// Puts a slot in the place of the one that this store was opened with.
    pub(crate) fn rotate(&self, provider: &dyn KeyProvider) -> Result<(), StoreError> {
        let old = self.opened_with();
        let slot = self.new_slot(provider)?;
        let has_slot = |document: &Document| document.slot(slot.id).is_some();
        document::change(&*self.objects, self.store_id, has_slot, |document| {
            let place = document.slots.iter_mut().find(|slot| slot.id == old);
            let place = place.ok_or_else(|| {
                key_error(format!("another process has removed key slot {old}, which was to be replaced"))
            })?;
            *place = slot.clone();
            Ok(())
        })?;
        *self.opened_with.lock().unwrap_or_else(PoisonError::into_inner) = slot.id;
        Ok(())
    }

    pub(crate) fn remove_slot(&self, id: &str) -> Result<(), StoreError> {
        let is_it = |slot: &Slot| slot.id.to_string() == id;
        let is_gone = |document: &Document| !document.slots.iter().any(is_it);
        if is_gone(&document::newest(&*self.objects, self.store_id)?.1) {
            return Err(StoreError::new(StoreErrorKind::NotFound, format!("the store has no key slot `{id}`")));
        }
        document::change(&*self.objects, self.store_id, is_gone, |document| {
            if document.slots.len() == 1 {
                return Err(key_error("the last key slot is not removed: nobody could open the store".to_owned()));
            }
            document.slots.retain(|slot| !is_it(slot));
            Ok(())
        })?;
        Ok(())
    }

    /// Adds a data key for all that is stored from now on, and returns its number.
    pub(crate) fn add_data_key(&self) -> Result<u16, StoreError> {
        let key = Secret::random()?;
        let added = Mutex::new(None::<StoredKey>);
        let is_added = |document: &Document| {
            let added = added.lock().unwrap_or_else(PoisonError::into_inner);
            added.as_ref().is_some_and(|added| document.keys.contains(added))
        };
        let document = document::change(&*self.objects, self.store_id, is_added, |document| {
            let numbers = document.keys.iter().filter(|key| key.purpose == Purpose::Data).map(|key| key.number);
            let number = numbers.max().unwrap_or(0) + 1;
            if number > MAX_DATA_KEYS {
                return Err(key_error(format!("the store has {MAX_DATA_KEYS} data keys, which is the limit")));
            }
            let stored = StoredKey::new(self.store_id, Purpose::Data, number, &self.master, &key)?;
            document.keys.push(stored.clone());
            *added.lock().unwrap_or_else(PoisonError::into_inner) = Some(stored);
            Ok(())
        })?;
        self.take_data_keys(&document)?;
        let added = added.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(added.expect("the change was made").number)
    }
}
