//! One file of the base cache: the frames of one pack. The layout is in [`cache`](crate::cache).

use std::fs::{File, FileTimes, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::SystemTime;

use bulbil_store::{BlockCipher, PackId};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN, BLOCKS_PER_FRAME, FRAME_BYTES};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const MAGIC: &[u8; 8] = b"BULBBASE";
const VERSION: u32 = 2;
/// Blocks are encrypted with the cipher that the store gives for this pack.
const FLAG_ENCRYPTED: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 52;
const MARKS_OFFSET: u64 = 4096;
const FRAMES_OFFSET: u64 = 8192;
pub(crate) const MAX_FRAMES: usize = 2048;

/// What this process knows of a frame; that another process has written it is noticed on a miss.
const ABSENT: u8 = 0;
const IN_FILE: u8 = 1;
/// Verified and in memory, about to be written.
const IN_MEMORY: u8 = 2;

/// An open file with the frames of one pack. Its name may be gone already.
#[derive(Debug)]
pub(crate) struct CacheFile {
    file: File,
    cipher: Option<BlockCipher>,
    states: Vec<AtomicU8>,
    /// Set by every read, cleared when the use was recorded.
    used: AtomicBool,
    write_failure_reported: AtomicBool,
}

impl CacheFile {
    /// Opens the pack's file, or makes one.
    pub(crate) fn open(directory: &Path, pack: PackId, boot_id: &str, cipher: Option<BlockCipher>) -> io::Result<Self> {
        let path = directory.join(format!("{pack}.frames"));
        let header = header(boot_id, cipher.is_some());
        let file = match open_current(&path, &header)? {
            Some(file) => file,
            None => create(directory, &path, &header)?,
        };
        let mut marks = vec![0; MAX_FRAMES];
        file.read_exact_at(&mut marks, MARKS_OFFSET)?;
        Ok(Self {
            file,
            cipher,
            states: marks.iter().map(|mark| AtomicU8::new(if *mark == 1 { IN_FILE } else { ABSENT })).collect(),
            used: AtomicBool::new(true),
            write_failure_reported: AtomicBool::new(false),
        })
    }

    fn state(&self, frame: u32) -> u8 {
        self.states.get(frame as usize).map_or(ABSENT, |state| state.load(Ordering::Acquire))
    }

    fn set_state(&self, frame: u32, value: u8) {
        if let Some(state) = self.states.get(frame as usize) {
            state.store(value, Ordering::Release);
        }
    }

    /// Whether a frame can be read from the file, by what this process knows.
    pub(crate) fn has(&self, frame: u32) -> bool {
        self.state(frame) == IN_FILE
    }

    /// Whether a frame is in the file or in memory, by what this process knows.
    pub(crate) fn is_near(&self, frame: u32) -> bool {
        self.state(frame) != ABSENT
    }

    /// Notes that a frame waits in memory to be written.
    pub(crate) fn set_in_memory(&self, frame: u32) {
        self.set_state(frame, IN_MEMORY);
    }

    /// Fills `buf` from `offset` in a frame that is here.
    pub(crate) fn read(&self, frame: u32, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        let at = frame_offset(frame) + offset;
        let Some(cipher) = &self.cipher else { return self.file.read_exact_at(buf, at) };
        let first_block = u64::from(frame) * BLOCKS_PER_FRAME + offset / BLOCK_BYTES;
        let within = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
        if within == 0 && buf.len().is_multiple_of(BLOCK_LEN) {
            self.file.read_exact_at(buf, at)?;
            cipher.decrypt(first_block, buf);
            return Ok(());
        }
        // Blocks are encrypted whole: a part of one needs all of it.
        let mut blocks = vec![0; (within + buf.len()).next_multiple_of(BLOCK_LEN)];
        self.file.read_exact_at(&mut blocks, at - within as u64)?;
        cipher.decrypt(first_block, &mut blocks);
        buf.copy_from_slice(&blocks[within..within + buf.len()]);
        Ok(())
    }

    /// Writes a frame and then its mark; returns whether it is in the file now.
    pub(crate) fn write(&self, frame: u32, plain: &[u8]) -> bool {
        let written = match &self.cipher {
            None => self.file.write_all_at(plain, frame_offset(frame)),
            Some(cipher) => {
                let mut blocks = plain.to_vec();
                cipher.encrypt(u64::from(frame) * BLOCKS_PER_FRAME, &mut blocks);
                self.file.write_all_at(&blocks, frame_offset(frame))
            }
        };
        match written.and_then(|()| self.file.write_all_at(&[1], MARKS_OFFSET + u64::from(frame))) {
            Ok(()) => {
                self.set_state(frame, IN_FILE);
                true
            }
            Err(error) => {
                self.set_state(frame, ABSENT);
                if !self.write_failure_reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "cannot write the base cache; frames are read from the store each time");
                }
                false
            }
        }
    }

    /// Looks which frames other processes have written meanwhile.
    pub(crate) fn refresh(&self, frames: Range<u32>) {
        let mut marks = vec![0; frames.len()];
        if self.file.read_exact_at(&mut marks, MARKS_OFFSET + u64::from(frames.start)).is_ok() {
            for (frame, _) in frames.zip(&marks).filter(|(frame, mark)| **mark == 1 && self.state(*frame) == ABSENT) {
                self.set_state(frame, IN_FILE);
            }
        }
    }

    /// Takes the right to fetch these frames from other processes; `false` when one of them has it for
    /// one of the frames. It ends with [`unlock`](Self::unlock) or with the process.
    ///
    /// Where the file system has no such locks, a frame may be fetched by more than one process.
    pub(crate) fn try_lock(&self, frames: Range<u32>) -> bool {
        let lock = region(libc::F_WRLCK, frames);
        !matches!(fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)), Err(nix::Error::EAGAIN | nix::Error::EACCES))
    }

    pub(crate) fn unlock(&self, frames: Range<u32>) {
        let lock = region(libc::F_UNLCK, frames);
        if let Err(error) = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
            tracing::debug!(%error, "cannot unlock a frame of the base cache");
        }
    }

    /// Whether the file was used since this was last asked.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Records the use where the process that evicts sees it.
    pub(crate) fn record_use(&self) {
        if let Err(error) = self.file.set_times(FileTimes::new().set_modified(SystemTime::now())) {
            tracing::debug!(%error, "cannot record the use of a file of the base cache");
        }
    }

    /// Whether the file has lost its name: its space returns when the last process closes it.
    pub(crate) fn is_unlinked(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }
}

/// The bytes that stand for the frames are those of their marks.
fn region(kind: libc::c_int, frames: Range<u32>) -> libc::flock {
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).expect("a constant of the kernel's interface");
    libc::flock {
        l_type: narrow(kind),
        l_whence: narrow(libc::SEEK_SET),
        l_start: libc::off_t::try_from(MARKS_OFFSET).expect("small") + libc::off_t::from(frames.start),
        l_len: libc::off_t::from(frames.end.saturating_sub(frames.start)),
        l_pid: 0,
    }
}

fn open_current(path: &Path, header: &[u8]) -> io::Result<Option<File>> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut found = vec![0; header.len()];
    let current = file.read_exact_at(&mut found, 0).is_ok() && found == header;
    if !current && let Err(error) = std::fs::remove_file(path)
        // Another process has thrown it away at the same time.
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    Ok(current.then_some(file))
}

/// Makes the file complete under another name first; of two processes the first one's counts.
fn create(directory: &Path, path: &Path, header: &[u8]) -> io::Result<File> {
    let temporary = directory.join(format!(
        "{}.{}.{:?}.new",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id(),
        std::thread::current().id(),
    ));
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&temporary)?;
    if let Err(error) = file.write_all_at(header, 0).and_then(|()| file.set_len(FRAMES_OFFSET)) {
        drop(std::fs::remove_file(&temporary));
        return Err(error);
    }
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    match linked {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            open_current(path, header)?.ok_or_else(|| io::Error::from(io::ErrorKind::AlreadyExists))
        }
        other => other.map(|()| file),
    }
}

pub(crate) fn header(boot_id: &str, encrypted: bool) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&padded_boot_id(boot_id));
    header.extend_from_slice(&(if encrypted { FLAG_ENCRYPTED } else { 0 }).to_le_bytes());
    debug_assert_eq!(header.len(), HEADER_BYTES);
    header
}

/// 36 characters; a host that gives others gets them cut or padded, and compares them all the same.
pub(crate) fn padded_boot_id(boot_id: &str) -> [u8; 36] {
    let mut id = [0; 36];
    let len = boot_id.len().min(id.len());
    id[..len].copy_from_slice(&boot_id.as_bytes()[..len]);
    id
}

fn frame_offset(frame: u32) -> u64 {
    FRAMES_OFFSET + u64::from(frame) * FRAME_BYTES
}
