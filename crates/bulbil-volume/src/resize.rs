//! Making a volume larger, also while it is open.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use crate::device::BlockDevice as _;
use crate::error::VolumeError;
use crate::overlay::lock;
use crate::record::{VolumeRecord, check_size};
use crate::volume::Volume;

type Listener = Box<dyn Fn(u64) + Send + Sync>;

/// Who wants to hear of a new size.
#[derive(Default)]
pub(crate) struct Listeners(Mutex<Vec<Listener>>);

impl Listeners {
    pub(crate) fn add(&self, listener: Listener) {
        lock(&self.0).push(listener);
    }

    fn tell(&self, size_bytes: u64) {
        lock(&self.0).iter().for_each(|listener| listener(size_bytes));
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} listeners", lock(&self.0).len())
    }
}

impl Volume {
    /// Makes the volume larger, by zeroes at its end, and tells those who listen. The size it has is fine.
    ///
    /// Durable when this returns. When it fails for lack of space nothing has changed; after `Io` a
    /// later start may find the new size.
    ///
    /// # Errors
    /// `BadSize` when it is smaller, over the limit or not a multiple of 512 bytes; `NoSpace`, `Io`.
    pub fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        let mut record = lock(&self.record);
        check_size(size_bytes, record.size_bytes)?;
        if size_bytes == record.size_bytes {
            return Ok(());
        }
        let failed = |e| VolumeError::block("cannot make the volume larger", e);
        self.settle(&self.stack()).map_err(failed)?;
        let next = VolumeRecord { size_bytes, ..record.clone() };
        self.write_record(&next).map_err(failed)?;
        *record = next;
        {
            // A request for the last block must not see two sizes.
            let _alone = self.merging.write().unwrap_or_else(PoisonError::into_inner);
            self.size_bytes.store(size_bytes, Ordering::Release);
        }
        drop(record);
        self.listeners.tell(self.size_bytes());
        Ok(())
    }
}
