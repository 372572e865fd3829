//! A store: its settings, its frames, its manifests.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::clock::{Clock, SystemClock};
use crate::digest::Digest;
use crate::encryption::{KeyProvider, Keyring, Secret};
use crate::error::{StoreError, StoreErrorKind};
use crate::index::{BlockIndex, IndexedPack};
use crate::manifest::{Manifest, PackRef};
use crate::objects::{DirObjects, Objects};
use crate::pack::{self, Footer, PackId};
use crate::publish::Stored;
use crate::published::{self, ContentName, OwnerId, Published};
use crate::settings::Settings;

/// Footers kept in memory: each is 6 KiB of frame records for a usual pack, and 64 KiB of block hashes.
const FOOTERS_KEPT: usize = 256;

/// A manifest that is replaced while it is looked for is looked for again, so often.
const READ_ATTEMPTS: u32 = 100;

/// What is to be known beside where the objects are.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// A directory of this host for what can be made again: the deduplication index, locks.
    pub state_directory: PathBuf,
    /// Under which id manifests are published and given up.
    pub owner: OwnerId,
    /// What gives the key of an encrypted store.
    pub key: Option<Arc<dyn KeyProvider>>,
    /// Whether a store that does not exist yet is made an encrypted one.
    pub encrypt_new: bool,
}

impl StoreOptions {
    /// Options of a store that is not encrypted.
    #[must_use]
    pub fn new(state_directory: &Path, owner: OwnerId) -> Self {
        Self { state_directory: state_directory.to_owned(), owner, ..Self::default() }
    }

    /// The same for an encrypted store, whose key this gives.
    #[must_use]
    pub fn with_key(self, provider: impl KeyProvider + 'static) -> Self {
        Self { key: Some(Arc::new(provider)), ..self }
    }

    /// The same, and a store that does not exist yet is made an encrypted one.
    #[must_use]
    pub fn encrypt_new(self) -> Self {
        Self { encrypt_new: true, ..self }
    }
}

/// Bytes a store takes, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreUsage {
    /// Pack objects.
    pub packs: u64,
    /// Bytes of all packs.
    pub pack_bytes: u64,
    /// Manifest objects.
    pub manifests: u64,
    /// Bytes of all manifests.
    pub manifest_bytes: u64,
}

/// An open image store.
///
/// Reading needs no lock and may happen in many processes at once. Imports of one host exclude each
/// other, also between processes; [collections](Store::collect) run beside them.
#[derive(Debug)]
pub struct Store {
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) index_directory: PathBuf,
    pub(crate) owner: OwnerId,
    pub(crate) block_hash_key: Secret,
    /// `None` when the store is not encrypted.
    pub(crate) keyring: Option<Arc<Keyring>>,
    pub(crate) clock: Arc<dyn Clock>,
    footers: Mutex<FooterCache>,
    /// Contents by their names, which tell nothing in an encrypted store.
    pub(crate) contents: Mutex<HashMap<ContentName, Digest>>,
}

#[derive(Debug, Default)]
struct FooterCache {
    by_id: HashMap<PackId, (u64, Arc<Footer>)>,
    clock: u64,
}

impl FooterCache {
    fn get(&mut self, id: PackId) -> Option<Arc<Footer>> {
        self.clock += 1;
        let clock = self.clock;
        self.by_id.get_mut(&id).map(|(used, footer)| {
            *used = clock;
            Arc::clone(footer)
        })
    }

    fn put(&mut self, id: PackId, footer: Arc<Footer>) {
        if self.by_id.len() >= FOOTERS_KEPT
            && let Some(oldest) = self.by_id.iter().min_by_key(|(_, (used, _))| *used).map(|(id, _)| *id)
        {
            self.by_id.remove(&oldest);
        }
        self.by_id.insert(id, (self.clock, footer));
    }
}

impl Store {
    /// Opens the store in a directory, or makes one in a directory that is missing or empty; the only
    /// owner has the id 0.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_or_create(directory: &Path) -> Result<Self, StoreError> {
        let objects = DirObjects::open(directory)?;
        Self::open(Arc::new(objects), StoreOptions::new(&directory.join("index"), OwnerId::default()))
    }

    /// Opens the store in these objects, or makes one where there is none.
    ///
    /// # Errors
    /// `UnsupportedVersion` for a store of a newer format, `Corrupt` when its settings cannot be
    /// read, `Key` when the key is missing, wrong, or given for a store that is not encrypted, `Io`,
    /// `Timeout` or `NoSpace`.
    pub fn open(objects: Arc<dyn Objects>, options: StoreOptions) -> Result<Self, StoreError> {
        let settings = Settings::open_or_create(&objects, &options)?;
        Ok(Self {
            objects,
            index_directory: options.state_directory,
            owner: options.owner,
            block_hash_key: settings.block_hash_key,
            keyring: settings.keyring,
            clock: Arc::new(SystemClock),
            footers: Mutex::default(),
            contents: Mutex::default(),
        })
    }

    /// Takes the time of day from another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Reads the manifest of a disk's content: the newest of this owner, or else anybody's.
    ///
    /// # Errors
    /// `NotFound` when the store does not hold it; `Corrupt`.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        for _ in 0..READ_ATTEMPTS {
            let mut published = self.published(digest)?;
            published.sort_unstable_by_key(|p| (p.owner == Some(self.owner), p.owner.is_some(), p.edition));
            let (mut damaged, mut replaced) = (None, false);
            for published in published.iter().rev() {
                match self.stored_manifest(published)? {
                    Stored::Manifest(manifest) => return Ok(manifest),
                    Stored::Void => {}
                    Stored::Gone => replaced = true,
                    Stored::Damaged(error) => damaged = damaged.or(Some(error)),
                }
            }
            match damaged {
                Some(error) => return Err(error),
                // One that had gone when it was to be read has perhaps made room for a newer one.
                None if replaced => {}
                None => break,
            }
        }
        Err(StoreError::new(StoreErrorKind::NotFound, format!("the store has no manifest of {digest}")))
    }

    /// Lists the manifests of a content, of all owners, in no order.
    pub(crate) fn published(&self, digest: &Digest) -> Result<Vec<Published>, StoreError> {
        self.published_as(self.content_name(digest))
    }

    /// Lists the manifests of the content of this name, of all owners, in no order.
    pub(crate) fn published_as(&self, content: ContentName) -> Result<Vec<Published>, StoreError> {
        let mut found: Vec<_> = self.objects.list(&published::directory(content))?;
        let own = |(name, _): &(String, u64)| Published::parse(name).is_some_and(|p| p.owner == Some(self.owner));
        if !found.iter().any(own) {
            // Perhaps one of a store made before owners were told apart.
            let old = Published { content, owner: None, edition: 0 };
            match self.objects.get_range(&old.object_name(), 0, 1) {
                Err(e) if matches!(e.kind(), StoreErrorKind::NotFound | StoreErrorKind::Corrupt) => {}
                other => found.push((old.object_name(), other?.len() as u64)),
            }
        }
        Ok(found.iter().filter_map(|(name, _)| Published::parse(name)).collect())
    }

    /// Lists every manifest of every owner, in no order.
    pub(crate) fn all_published(&self) -> Result<Vec<Published>, StoreError> {
        Ok(self.objects.list("manifests")?.iter().filter_map(|(name, _)| Published::parse(name)).collect())
    }

    /// Reads and verifies one frame; returns its plain bytes, whole blocks.
    ///
    /// # Errors
    /// `Corrupt` with the pack's and the frame's name when stored bytes do not verify; `NotFound`
    /// or `Io` when they cannot be read.
    pub fn read_frame(&self, pack: &PackRef, frame: u32) -> Result<Vec<u8>, StoreError> {
        let run = self.read_run(pack, frame..frame.saturating_add(1))?;
        self.decode_frame(&run, frame)
    }

    /// Adds up what the store takes.
    ///
    /// # Errors
    /// `Io`.
    pub fn usage(&self) -> Result<StoreUsage, StoreError> {
        let mut usage = StoreUsage::default();
        for (_, len_bytes) in self.objects.list("packs")? {
            usage.packs += 1;
            usage.pack_bytes += len_bytes;
        }
        for (name, len_bytes) in self.objects.list("manifests")? {
            if !self.is_void(&name, len_bytes)? {
                usage.manifests += 1;
                usage.manifest_bytes += len_bytes;
            }
        }
        Ok(usage)
    }

    pub(crate) fn footer(&self, id: PackId, pack_bytes: u64) -> Result<Arc<Footer>, StoreError> {
        if let Some(footer) = self.footers.lock().expect("no panic while held").get(id) {
            return Ok(footer);
        }
        let name = id.object_name();
        // Bytes between two distances from the end.
        let part = |from: u64, to: u64| {
            let len = usize::try_from(from - to).map_err(|_| StoreError::corrupt("footer does not fit in memory"))?;
            self.objects.get_range(&name, pack_bytes - from, len)
        };
        if pack_bytes > pack::MAX_PACK_BYTES {
            return Err(StoreError::corrupt(format!("pack {id} has {pack_bytes} bytes")));
        }
        let guess = pack::tail_guess_bytes(pack_bytes);
        let mut bytes = part(guess, 0)?;
        let span = pack::footer_span(&bytes, pack_bytes)?;
        if span > guess {
            // What is before the bytes that are here.
            bytes = [part(span, guess)?, bytes].concat();
        }
        let footer = Arc::new(pack::parse_footer(id, &bytes, pack_bytes, self.pack_keys())?);
        self.footers.lock().expect("no panic while held").put(id, Arc::clone(&footer));
        Ok(footer)
    }

    /// Takes the lock on the index, which imports of this host hold.
    pub(crate) fn lock_for_changes(&self) -> Result<File, StoreError> {
        let path = self.index_directory.join("lock");
        let lock = || {
            std::fs::create_dir_all(&self.index_directory)?;
            File::options().create(true).truncate(false).write(true).open(&path)
        };
        let file = lock().map_err(|e| StoreError::io(format!("cannot open `{}`", path.display()), e))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| StoreError::io(format!("cannot lock `{}`", path.display()), e.into()))?;
        Ok(file)
    }

    /// Opens the index and brings it up to date with the packs that are there; those in `unusable` are
    /// passed over.
    ///
    /// The caller holds the lock.
    pub(crate) fn open_index(&self, unusable: &HashSet<PackId>) -> Result<BlockIndex, StoreError> {
        let stored: HashMap<PackId, u64> = self.list_packs()?.into_iter().collect();
        let mut index = BlockIndex::open(&self.index_directory)?;
        let gone = index.packs().iter().filter(|pack| !stored.contains_key(&pack.id)).count();
        // Entries of packs that are gone are passed over; when they are the most, they go.
        if gone > index.packs().len() / 2 {
            index.clear()?;
        }
        let numbered = index.numbers();
        let missing = |id: &PackId| !numbered.contains_key(id) && !unusable.contains(id);
        let missing: Vec<_> = stored.iter().filter(|(id, _)| missing(id)).collect();
        if !missing.is_empty() {
            // What the index lists is referred to, and may have been put by a process that was killed in it.
            let names: Vec<_> = missing.iter().map(|(id, _)| id.object_name()).collect();
            self.objects.make_durable(&names)?;
            index.begin_changes()?;
        }
        for (id, len_bytes) in missing {
            match self.footer(*id, *len_bytes) {
                Ok(footer) => index_pack(&mut index, IndexedPack { id: *id, len_bytes: *len_bytes }, &footer)?,
                // Not usable for matching; reading it will report the damage to whom it concerns.
                Err(error) => tracing::warn!(pack = %id, %error, "a pack's footer cannot be read"),
            }
        }
        let skipped = index.packs().iter().zip(0..);
        let skipped = skipped.filter(|(pack, _)| !stored.contains_key(&pack.id) || unusable.contains(&pack.id));
        let skipped = skipped.map(|(_, number)| number).collect();
        index.skip_packs(skipped);
        Ok(index)
    }
}

fn index_pack(index: &mut BlockIndex, pack: IndexedPack, footer: &Footer) -> Result<(), StoreError> {
    let number = index.add_pack(pack)?;
    for (hash, block) in footer.blocks.iter().zip(0..) {
        index.insert(hash, crate::matching::Location { pack: number, block })?;
    }
    Ok(())
}
