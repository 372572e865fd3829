//! Positioned writes: all that a format writer is given of the world.

use std::fs::File;
use std::io;
use std::sync::Arc;

/// A new, empty file that many threads may write at once.
///
/// It grows as it is written; what was never written reads as zeros. Nothing is durable until whoever made the file
/// has synced it.
pub trait WriteAt: Send + Sync {
    /// Writes all of `buf` at `offset_bytes`. Ranges written at the same time do not overlap.
    ///
    /// # Errors
    /// Those of the operating system; the file then has no defined content.
    fn write_all_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()>;

    /// Sets the length; a file that becomes longer reads as zeros there.
    ///
    /// # Errors
    /// Those of the operating system.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;

    /// Reads back what was written, for checksums over a whole file.
    ///
    /// # Errors
    /// Those of the operating system.
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()>;
}

impl WriteAt for File {
    fn write_all_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, buf, offset_bytes)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        Self::set_len(self, len_bytes)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset_bytes)
    }
}

impl<T: WriteAt + ?Sized> WriteAt for Arc<T> {
    fn write_all_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        (**self).write_all_at(buf, offset_bytes)
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        (**self).set_len(len_bytes)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset_bytes)
    }
}
