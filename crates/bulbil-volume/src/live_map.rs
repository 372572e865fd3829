//! What a process has changed in a layer's map: outlives the process, not the host.
//!
//! ```text
//! map.live
//! 0     8     magic "BULBLIVE"
//! 8     4     format version, 1
//! 12    36    boot id of the host
//! 4096  4096  page 0 as in `map`; 00: nothing was changed
//! …
//! ```
//! A guest goes on when its disk's server is killed and started again, so every write that was answered
//! must be there then, also one that no flush has followed. Its bytes are in the host's page cache; that
//! its block is in state *data* is said here, before the answer and without a sync. A file of another
//! boot is not believed: of its bytes any may be missing.

use std::io;
use std::sync::Arc;

use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

use crate::cache_file::padded_boot_id;
use crate::map::{MapChange, MapPage};
use crate::storage::{StorageDirectory, StorageFile};

pub(crate) const LIVE_MAP_NAME: &str = "map.live";
const MAGIC: &[u8; 8] = b"BULBLIVE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 48;

/// The file of a layer that this process writes to.
#[derive(Debug, Default)]
pub(crate) struct LiveMap {
    file: Option<Arc<dyn StorageFile>>,
}

impl LiveMap {
    /// Says what has changed in a page; it outlives this process when this returns.
    pub(crate) fn write(&mut self, directory: &dyn StorageDirectory, change: &MapChange) -> io::Result<()> {
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(begin(directory)?),
        };
        file.write_at(&change.new, page_offset(change.page) + change.first_byte)
    }

    /// Says that the map on disk has it all.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        self.file.take().map_or(Ok(()), |file| void(&*file))
    }
}

/// Makes a file be believed no more.
fn void(file: &dyn StorageFile) -> io::Result<()> {
    file.write_at(&[0; HEADER_BYTES], 0)
}

fn begin(directory: &dyn StorageDirectory) -> io::Result<Arc<dyn StorageFile>> {
    let header = header(&directory.boot_id()?);
    let file = directory.create_volatile(LIVE_MAP_NAME)?;
    file.write_at(&header, 0)?;
    Ok(file)
}

/// What a process has left that was killed since the host was started.
#[derive(Debug)]
pub(crate) struct LeftBehind(Arc<dyn StorageFile>);

impl LeftBehind {
    /// Finds it, if it is there.
    pub(crate) fn find(directory: &dyn StorageDirectory) -> io::Result<Option<Self>> {
        let Some(file) = directory.open(LIVE_MAP_NAME)? else { return Ok(None) };
        let mut found = [0; HEADER_BYTES];
        file.read_at(&mut found, 0)?;
        Ok((found[..] == header(&directory.boot_id()?)).then_some(Self(file)))
    }

    /// Says that the map on disk has it all.
    pub(crate) fn end(&self) -> io::Result<()> {
        void(&*self.0)
    }

    /// The first page from `number` on in which something may be said.
    pub(crate) fn next_page(&self, number: u64) -> io::Result<Option<(u64, MapPage)>> {
        let Some(offset) = self.0.next_data(page_offset(number))? else { return Ok(None) };
        let number = number.max(offset.saturating_sub(BLOCK_BYTES) / BLOCK_BYTES);
        let mut page = [0; BLOCK_LEN];
        self.0.read_at(&mut page, page_offset(number))?;
        Ok(Some((number, page)))
    }
}

fn page_offset(number: u64) -> u64 {
    (number + 1) * BLOCK_BYTES
}

fn header(boot_id: &str) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &padded_boot_id(boot_id)].concat()
}
