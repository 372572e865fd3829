//! A raw file as a device, for the examples.

#![allow(dead_code, reason = "each example uses its own part")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
use rustix::fs::{FallocateFlags, fallocate};

fn io_error(source: io::Error) -> BlockError {
    BlockError::with_source(BlockErrorKind::Io, "file I/O failed", source)
}

/// A raw file.
pub(crate) struct FileDevice {
    file: File,
    size_bytes: AtomicU64,
}

impl FileDevice {
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { file, size_bytes: AtomicU64::new(size_bytes) })
    }

    /// Makes the file and the device longer or shorter.
    pub(crate) fn resize(&self, size_bytes: u64) -> io::Result<()> {
        self.file.set_len(size_bytes)?;
        self.size_bytes.store(size_bytes, Ordering::SeqCst);
        Ok(())
    }

    fn finish(&self, fua: bool) -> Result<(), BlockError> {
        if fua { self.flush() } else { Ok(()) }
    }
}

impl BlockDevice for FileDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.file.read_exact_at(buf, offset).map_err(io_error)
    }

    fn is_fast(&self, _offset: u64, _len_bytes: u64) -> bool {
        true
    }

    fn write_at(&self, buf: &[u8], offset: u64, fua: bool) -> Result<(), BlockError> {
        self.file.write_all_at(buf, offset).map_err(io_error)?;
        self.finish(fua)
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset, len_bytes).map_err(|error| io_error(error.into()))?;
        self.finish(fua)
    }

    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.write_zeroes(offset, len_bytes, fua)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.file.sync_data().map_err(io_error)
    }

    fn status(&self, _offset: u64, len_bytes: u64, _max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        Ok(vec![StatusExtent { len_bytes, kind: ExtentKind::Data }])
    }
}
