//! Positioned reads: all that a format reader is given of the world.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{OFlags, SeekFrom as HoleSeek};
use rustix::io::Errno;

use crate::FormatError;
use crate::bytes::{to_u64, to_usize};

/// Bytes of fixed length that many threads may read at once.
///
/// The length is that of the moment the value was made; an implementation need not follow a file that changes, but
/// it must then fail rather than invent content.
pub trait ReadAt: Send + Sync {
    /// Fills `buf` with the bytes from `offset_bytes` on.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] if any of them is past the end; `buf` then has no defined content.
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// Returns the length in bytes.
    fn len_bytes(&self) -> u64;

    /// Returns the first range at or after `offset_bytes` that may hold something other than zeros.
    ///
    /// The range is `start..end` in bytes, not empty, within the length, and `start >= offset_bytes`. Everything from
    /// `offset_bytes` to `start` reads as zeros; `None` means that so does everything to the end. What lies inside the
    /// range may be zeros as well.
    ///
    /// # Errors
    /// Those of the operating system.
    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        Ok((offset_bytes < self.len_bytes()).then(|| (offset_bytes, self.len_bytes())))
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let rest = self.get(to_usize(offset_bytes)..).unwrap_or_default();
        let source = rest.get(..buf.len()).ok_or(ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(source);
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        to_u64(self.len())
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset_bytes)
    }

    fn len_bytes(&self) -> u64 {
        self.as_slice().len_bytes()
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, offset_bytes)
    }

    fn len_bytes(&self) -> u64 {
        (**self).len_bytes()
    }

    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        (**self).next_data(offset_bytes)
    }
}

/// A regular file or a block device, read with `pread`.
///
/// Holes of sparse files are found with `SEEK_DATA` and `SEEK_HOLE`. That moves the offset the descriptor shares with
/// its duplicates, which nothing here reads; do not hand in a descriptor on which somebody else reads sequentially.
#[derive(Debug)]
pub struct FileReader {
    file: File,
    len_bytes: u64,
    regular: bool,
}

impl FileReader {
    /// Opens the file at `path` for reading; never waits for the other end of a FIFO.
    ///
    /// # Errors
    /// [`FormatError::Io`] if it cannot be opened, [`FormatError::NotAFile`] if it is a directory, FIFO, socket or
    /// character device.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| FormatError::Io { operation: "open", offset_bytes: 0, source })?;
        Self::new(file)
    }

    /// Takes an open file.
    ///
    /// # Errors
    /// As [`FileReader::open`].
    pub fn new(mut file: File) -> Result<Self, FormatError> {
        let io = |source| FormatError::Io { operation: "stat", offset_bytes: 0, source };
        let metadata = file.metadata().map_err(io)?;
        let file_type = metadata.file_type();
        let len_bytes = if file_type.is_file() {
            metadata.len()
        } else if file_type.is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(io)?
        } else {
            return Err(FormatError::NotAFile { kind: kind_name(file_type) });
        };
        Ok(Self { file, len_bytes, regular: file_type.is_file() })
    }

    /// Fails if the file has become shorter: its missing end must not pass for a hole.
    fn check_not_shrunk(&self) -> io::Result<()> {
        let shrunk = self.regular && self.file.metadata()?.len() < self.len_bytes;
        if shrunk { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

fn kind_name(file_type: std::fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "directory"
    } else if file_type.is_fifo() {
        "FIFO"
    } else if file_type.is_socket() {
        "socket"
    } else {
        "character device"
    }
}

impl ReadAt for FileReader {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset_bytes)
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        if offset_bytes >= self.len_bytes {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, HoleSeek::Data(offset_bytes)) {
            Ok(start) if start < self.len_bytes => start,
            Ok(_) => return Ok(None),
            Err(Errno::NXIO) => {
                self.check_not_shrunk()?;
                return Ok(None);
            }
            // A block device, or a file system that keeps no map of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some((offset_bytes, self.len_bytes))),
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(&self.file, HoleSeek::Hole(start))?.min(self.len_bytes);
        self.check_not_shrunk()?;
        Ok(Some((start, end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn holes_of_a_sparse_file_are_skipped() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.seek(SeekFrom::Start(1 << 30)).unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let reader = FileReader::new(file).unwrap();
        assert_eq!(reader.next_data(0).unwrap(), Some((1 << 30, (1 << 30) + 4096)));
        assert_eq!(reader.next_data((1 << 30) + 4096).unwrap(), None);
        assert_eq!(reader.next_data(1 << 41).unwrap(), None);
    }

    #[test]
    fn a_file_that_became_shorter_is_not_read_as_a_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let reader = FileReader::new(file.try_clone().unwrap()).unwrap();
        file.set_len(4096).unwrap();
        assert_eq!(reader.next_data(8192).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_not_a_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = FileReader::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("directory"), "{error}");
        let fifo = dir.path().join("fifo");
        let status = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(status.success());
        let error = FileReader::open(&fifo).unwrap_err();
        assert!(error.to_string().contains("FIFO"), "{error}");
        let error = FileReader::open(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("character device"), "{error}");
    }

    #[test]
    fn reading_past_the_end_of_memory_fails() {
        let bytes = vec![1_u8, 2, 3];
        let mut buf = [0; 2];
        bytes.read_exact_at(&mut buf, 1).unwrap();
        assert_eq!(buf, [2, 3]);
        assert!(bytes.read_exact_at(&mut buf, 2).is_err());
        assert!(bytes.read_exact_at(&mut buf, u64::MAX).is_err());
    }
}
