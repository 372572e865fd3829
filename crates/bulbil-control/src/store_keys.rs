//! Keys of an encrypted store: which there are, another in place of this host's, a new data key.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::store_binding::StoreBinding;
use crate::store_ops::{self, KeySource};

/// A key that opens the store, as far as everybody may know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreKeySlot {
    /// Names it: 16 hexadecimal digits.
    pub id: String,
    /// What kind of source gave it: `file`, `command`.
    pub provider: String,
    /// Whether the daemon has opened the store with it.
    pub in_use: bool,
}

/// What this host should open its store with from now on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RotateKeyRequest {
    /// Where the new key is found.
    #[serde(with = "store_ops::as_text")]
    pub new_key: KeySource,
}

/// A data key that was added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedDataKey {
    /// Its number; what is stored from now on is encrypted with it.
    pub data_key: u16,
}

impl Control {
    /// Lists the keys that open the store; none when it is not encrypted.
    ///
    /// # Errors
    /// `Timeout` or `Failed` when the store cannot be read.
    pub async fn store_keys(&self) -> Result<Vec<StoreKeySlot>, ControlError> {
        let store = Arc::clone(&self.store);
        let listed = tokio::task::spawn_blocking(move || store.key_slots()).await.map_err(broken)?;
        let slots = listed.map_err(|e| ControlError::store("cannot read the keys of the store", &e))?;
        let told =
            |slot: bulbil_store::KeySlot| StoreKeySlot { id: slot.id, provider: slot.provider, in_use: slot.in_use };
        Ok(slots.into_iter().map(told).collect())
    }

    /// Replaces the key that this host opens its store with; no stored data is written again. When this returns the old
    /// key opens the store no more, and `store.json` names the new one.
    ///
    /// # Errors
    /// `StoreKey` when the store is not encrypted or the new key is not to be had; `Timeout`, `NoSpace`, `Failed`.
    pub async fn rotate_store_key(&self, request: RotateKeyRequest) -> Result<Vec<StoreKeySlot>, ControlError> {
        let (store, data) = (Arc::clone(&self.store), self.data.clone());
        let rotated = tokio::task::spawn_blocking(move || {
            let what = "cannot replace the key of the store";
            let kept = StoreBinding::read(data.root())?;
            let kept = kept.ok_or_else(|| ControlError::new(ErrorCode::Failed, format!("{what}: it is not bound")))?;
            // In a slot of its own as well until the file is written: whenever this is cut off, the key that the file
            // names opens the store.
            let failed = |e: bulbil_store::StoreError| ControlError::store(what, &e);
            let extra = store.add_key(&request.new_key).map_err(failed)?;
            StoreBinding { key: Some(request.new_key.clone()), ..kept }.save(&data)?;
            store.rotate_key(&request.new_key).map_err(failed)?;
            store.remove_key(&extra).map_err(failed)?;
            Ok::<_, ControlError>(())
        });
        rotated.await.map_err(broken)??;
        tracing::info!("the key of the store was replaced");
        self.store_keys().await
    }

    /// Adds a data key, with which all is encrypted that is stored from now on. Durable when this returns.
    ///
    /// # Errors
    /// `StoreKey` when the store is not encrypted; `Timeout`, `NoSpace`, `Failed`.
    pub async fn add_data_key(&self) -> Result<AddedDataKey, ControlError> {
        let store = Arc::clone(&self.store);
        let added = tokio::task::spawn_blocking(move || store.add_data_key()).await.map_err(broken)?;
        let data_key = added.map_err(|e| ControlError::store("cannot add a data key", &e))?;
        tracing::info!(data_key, "a data key was added");
        Ok(AddedDataKey { data_key })
    }
}

/// Writes a new random key to a file that must not exist, readable by its owner only. Durable when this returns.
///
/// # Errors
/// `InUse` when there is such a file; `NoSpace`, `Failed`.
pub fn write_new_key_file(path: &Path) -> Result<(), ControlError> {
    let what = || format!("cannot write a key to `{}`", path.display());
    if path.symlink_metadata().is_ok() {
        let text = format!("{}: it exists already, and a key is never overwritten", what());
        return Err(ControlError::new(ErrorCode::InUse, text));
    }
    bulbil_store::write_new_key_file(path).map_err(|e| ControlError::store(what(), &e))
}

fn broken(error: tokio::task::JoinError) -> ControlError {
    ControlError::with_source(ErrorCode::Failed, "the change of keys broke off", &error)
}
