//! An overlay's files, encrypted on the way to the host.
//!
//! ```text
//! overlay ─ data.N ─► EncryptedFile: AES-256-XTS for each 4 KiB block ─► the host's file, same offsets
//!         └ map ────────────────────────────────────────────────────────► as it is
//!
//! file `cipher`, made before anything else:
//! 0       8      magic "BULBOCPH"
//! 8       4      format version, 1
//! 12      4      0
//! 16      32     salt, random: the overlay's key is derived from it and the store's host key
//! 48      32     check value of that key
//! ```
//! The salt moves with the files, so a directory may be renamed. Each file of an overlay has a key of
//! its own, from its path in the overlay, so the same block number in two files does not meet the same
//! key. A clone shares layers and salt with its parent; the layers of its own have other numbers, so no
//! two files ever share a key.
//!
//! # What stays true of a crash
//! The host writes a 4 KiB page whole or not at all, and a block is one page: every write that reaches
//! the host is of whole encrypted blocks, so that after a crash each decrypts to its old or its new
//! content. A smaller write reads, changes and writes its block with that block locked.
//!
//! # Holes
//! A block of which all encrypted bytes are zero is a hole, and reads as zeroes. That no content
//! encrypts to this is as sure as that no key is guessed: one content in 2^32768 does.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bulbil_store::{BlockCipher, OverlayKey, Store};
use bulbil_types::{BLOCK_BYTES, BLOCK_LEN};

use crate::error::{VolumeError, VolumeErrorKind};
use crate::storage::{StorageDirectory, StorageFile};

const MARKER_NAME: &str = "cipher";
const MAGIC: &[u8; 8] = b"BULBOCPH";
const VERSION: u32 = 1;
const MARKER_LEN: usize = 80;

/// Blocks encrypted at a time: what a large write needs of memory beside its own.
const BLOCKS_AT_A_TIME: usize = 256;

/// Locks of blocks: block `n` has lock `n % LOCKS`.
const LOCKS: u64 = 64;

/// Opens an overlay's directory as the store wants it: encrypted when the store is, or as it is.
///
/// An empty directory becomes an encrypted one by a file that is durable when this returns.
///
/// # Errors
/// `Corrupt` when the directory was written encrypted and the store is not, or the other way round, or
/// with the key of another store; `Io`, `NoSpace`.
pub fn open_for_store(
    directory: Arc<dyn StorageDirectory>,
    store: &Store,
) -> Result<Arc<dyn StorageDirectory>, VolumeError> {
    let fail = |e| VolumeError::io("cannot open the overlay's key", e);
    let marker = read_marker(&*directory).map_err(fail)?;
    if !store.is_encrypted() {
        return match marker {
            Marker::None => Ok(directory),
            _ => Err(refused("the overlay is encrypted, and the store is not")),
        };
    }
    let key = match marker {
        Marker::Known { salt, check } => {
            let key = overlay_key(store, &salt);
            if key.check_value() != check {
                return Err(refused("the overlay was encrypted with the key of another store"));
            }
            key
        }
        Marker::None | Marker::Damaged if !is_written(&*directory).map_err(fail)? => {
            make_marker(&*directory, store).map_err(fail)?
        }
        Marker::None => return Err(refused("the overlay was written without encryption, and the store is encrypted")),
        Marker::Damaged => return Err(refused("the overlay's file `cipher` is damaged")),
    };
    Ok(Arc::new(EncryptedDirectory { inner: directory, key: Arc::new(key), path: String::new() }))
}

/// Whether a layer may hold content: without a map no block of its data files counts.
fn is_written(directory: &dyn StorageDirectory) -> io::Result<bool> {
    Ok(directory.open("map")?.is_some() || directory.list()?.iter().any(|name| name.starts_with("layer.")))
}

fn refused(message: &str) -> VolumeError {
    VolumeError::new(VolumeErrorKind::Corrupt, message)
}

fn overlay_key(store: &Store, salt: &[u8; 32]) -> OverlayKey {
    store.overlay_key(salt).expect("the store is encrypted")
}

enum Marker {
    None,
    /// Its writing was cut off, or it was damaged later.
    Damaged,
    Known {
        salt: [u8; 32],
        check: [u8; 32],
    },
}

fn read_marker(directory: &dyn StorageDirectory) -> io::Result<Marker> {
    let Some(file) = directory.open(MARKER_NAME)? else { return Ok(Marker::None) };
    let mut bytes = [0; MARKER_LEN];
    file.read_at(&mut bytes, 0)?;
    if bytes[..16] != marker_head() {
        return Ok(Marker::Damaged);
    }
    // Whoever wrote it may have been killed before the sync, and what is written from here on is read with it only.
    file.sync_data()?;
    let part = |at: usize| bytes[at..at + 32].try_into().expect("32 bytes");
    Ok(Marker::Known { salt: part(16), check: part(48) })
}

fn marker_head() -> [u8; 16] {
    let mut head = [0; 16];
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head
}

fn make_marker(directory: &dyn StorageDirectory, store: &Store) -> io::Result<OverlayKey> {
    let mut salt = [0; 32];
    getrandom::fill(&mut salt).map_err(io::Error::other)?;
    let key = overlay_key(store, &salt);
    let file = directory.create(MARKER_NAME)?;
    file.write_at(&[&marker_head()[..], &salt, &key.check_value()].concat(), 0)?;
    file.sync_data()?;
    Ok(key)
}

/// The directory of an overlay whose data files are encrypted.
#[derive(Debug)]
struct EncryptedDirectory {
    inner: Arc<dyn StorageDirectory>,
    key: Arc<OverlayKey>,
    /// Where it lies in the overlay: empty, or a name and `/`.
    path: String,
}

impl EncryptedDirectory {
    fn wrap(&self, name: &str, file: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        if !is_data(name) {
            return file;
        }
        Arc::new(EncryptedFile::new(file, self.key.file_cipher(&format!("{}{name}", self.path))))
    }
}

/// Whether a file holds content of the disk; others say only which blocks there are.
fn is_data(name: &str) -> bool {
    name.starts_with("data.")
}

impl StorageDirectory for EncryptedDirectory {
    fn open(&self, name: &str) -> io::Result<Option<Arc<dyn StorageFile>>> {
        Ok(self.inner.open(name)?.map(|file| self.wrap(name, file)))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.wrap(name, self.inner.create(name)?))
    }

    fn create_all(&self, names: &[String]) -> io::Result<()> {
        self.inner.create_all(names)
    }

    fn create_volatile(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        Ok(self.wrap(name, self.inner.create_volatile(name)?))
    }

    fn boot_id(&self) -> io::Result<String> {
        self.inner.boot_id()
    }

    fn subdirectory(&self, name: &str) -> Arc<dyn StorageDirectory> {
        let path = format!("{}{name}/", self.path);
        Arc::new(Self { inner: self.inner.subdirectory(name), key: Arc::clone(&self.key), path })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn links(&self, name: &str) -> io::Result<Option<u64>> {
        self.inner.links(name)
    }

    fn link_sibling(&self, sibling: &str, files: &[String], name: &str, bytes: &[u8]) -> io::Result<()> {
        self.inner.link_sibling(sibling, files, name, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    /// Small files hold no content of the disk.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.inner.read(name)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.inner.replace(name, bytes)
    }
}

/// A file of which the host sees encrypted blocks.
struct EncryptedFile {
    inner: Arc<dyn StorageFile>,
    cipher: BlockCipher,
    /// Held shared by reads, alone by writes and holes: a smaller write must not put back what another
    /// request has just replaced, and nothing may decrypt a block that is half written.
    locks: Vec<RwLock<()>>,
}

impl std::fmt::Debug for EncryptedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncryptedFile").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// A part of a request: whole blocks of the file, and which of their bytes are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    first_block: u64,
    blocks: usize,
    /// Where the request's bytes begin in the blocks.
    within: usize,
    len: usize,
}

/// Cuts a request at block borders into pieces of bounded size: in order, without gaps.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = usize::try_from(at % BLOCK_BYTES).expect("below 4096");
        let taken = (BLOCKS_AT_A_TIME * BLOCK_LEN - within).min(len - done);
        done += taken;
        let blocks = (within + taken).div_ceil(BLOCK_LEN);
        Some(Piece { first_block: at / BLOCK_BYTES, blocks, within, len: taken })
    })
}

impl Piece {
    fn offset(&self) -> u64 {
        self.first_block * BLOCK_BYTES
    }

    fn is_whole(&self) -> bool {
        self.within == 0 && self.len == self.blocks * BLOCK_LEN
    }

    /// The locks of its blocks, in ascending order, so that two requests never wait for each other.
    fn locks(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, blocks) = (self.first_block % LOCKS, self.blocks as u64);
        let taken = move |lock: &u64| (lock + LOCKS - first) % LOCKS < blocks;
        (0..LOCKS).filter(taken).map(|lock| usize::try_from(lock).expect("below 64"))
    }
}

impl EncryptedFile {
    fn new(inner: Arc<dyn StorageFile>, cipher: BlockCipher) -> Self {
        Self { inner, cipher, locks: (0..LOCKS).map(|_| RwLock::new(())).collect() }
    }

    fn lock_shared(&self, piece: &Piece) -> Vec<RwLockReadGuard<'_, ()>> {
        piece.locks().map(|lock| self.locks[lock].read().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    fn lock_alone(&self, piece: &Piece) -> Vec<RwLockWriteGuard<'_, ()>> {
        piece.locks().map(|lock| self.locks[lock].write().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Reads and decrypts whole blocks; the caller holds their locks.
    fn read_blocks(&self, first_block: u64, blocks: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(blocks, first_block * BLOCK_BYTES)?;
        for (block, number) in blocks.chunks_exact_mut(BLOCK_LEN).zip(first_block..) {
            if !is_zero(block) {
                self.cipher.decrypt(number, block);
            }
        }
        Ok(())
    }

    fn read_piece(&self, piece: &Piece, buf: &mut [u8]) -> io::Result<()> {
        let _shared = self.lock_shared(piece);
        if piece.is_whole() {
            return self.read_blocks(piece.first_block, buf);
        }
        let mut blocks = vec![0; piece.blocks * BLOCK_LEN];
        self.read_blocks(piece.first_block, &mut blocks)?;
        buf.copy_from_slice(&blocks[piece.within..piece.within + piece.len]);
        Ok(())
    }

    /// Writes whole blocks, of which only the first and the last may have to be read first.
    fn write_piece(&self, piece: &Piece, buf: &[u8]) -> io::Result<()> {
        let _alone = self.lock_alone(piece);
        let mut blocks = vec![0; piece.blocks * BLOCK_LEN];
        let last = piece.blocks - 1;
        let end = piece.within + piece.len;
        if piece.within > 0 || end < BLOCK_LEN {
            self.read_blocks(piece.first_block, &mut blocks[..BLOCK_LEN])?;
        }
        if last > 0 && end < blocks.len() {
            self.read_blocks(piece.first_block + last as u64, &mut blocks[last * BLOCK_LEN..])?;
        }
        blocks[piece.within..end].copy_from_slice(buf);
        self.cipher.encrypt(piece.first_block, &mut blocks);
        self.inner.write_at(&blocks, piece.offset())
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.chunks(512).all(|stretch| stretch.iter().fold(0, |seen, byte| seen | byte) == 0)
}

impl StorageFile for EncryptedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        for piece in pieces(offset, rest.len()) {
            let (part, after) = rest.split_at_mut(piece.len);
            self.read_piece(&piece, part)?;
            rest = after;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        for piece in pieces(offset, rest.len()) {
            let (part, after) = rest.split_at(piece.len);
            self.write_piece(&piece, part)?;
            rest = after;
        }
        Ok(())
    }

    /// Punches whole blocks only, which is all that an overlay asks for.
    fn punch_hole(&self, offset: u64, len_bytes: u64) -> io::Result<()> {
        if !offset.is_multiple_of(BLOCK_BYTES) || !len_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let blocks = usize::try_from((len_bytes / BLOCK_BYTES).min(LOCKS)).expect("at most 64");
        let _alone = self.lock_alone(&Piece { first_block: offset / BLOCK_BYTES, blocks, within: 0, len: 0 });
        self.inner.punch_hole(offset, len_bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.inner.next_data(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_request_without_gaps() {
        for (offset, len) in
            [(0, 0), (0, 4096), (512, 512), (4095, 2), (100, 3 << 20), (1 << 40, 1 << 20), (1, 1 << 20)]
        {
            let (mut at, mut left) = (offset, len);
            for piece in pieces(offset, len) {
                assert_eq!(piece.offset() + piece.within as u64, at);
                assert!(piece.len > 0 && piece.blocks <= BLOCKS_AT_A_TIME && piece.within < BLOCK_LEN);
                assert!(piece.within + piece.len > (piece.blocks - 1) * BLOCK_LEN, "no block for nothing");
                at += piece.len as u64;
                left -= piece.len;
            }
            assert_eq!(left, 0);
        }
    }

    #[test]
    fn locks_are_those_of_the_blocks_in_ascending_order() {
        let locks = |first_block, blocks| Piece { first_block, blocks, within: 0, len: 0 }.locks().collect::<Vec<_>>();
        assert_eq!(locks(5, 1), [5]);
        assert_eq!(locks(64 + 62, 4), [0, 1, 62, 63]);
        assert_eq!(locks(3, 64), (0..64).collect::<Vec<_>>());
        assert_eq!(locks(3, 256), (0..64).collect::<Vec<_>>());
    }
}
