//! A store: its settings, its frames, its manifests.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::index::{BlockIndex, IndexedPack};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, PackRef};
use crate::objects::{DirObjects, Objects};
use crate::pack::{self, Footer, PackId};
use crate::published::{self, OwnerId, Published};
use crate::settings::Settings;

/// Footers kept in memory: each is 6 KiB of frame records for a usual pack, and 64 KiB of block hashes.
const FOOTERS_KEPT: usize = 256;

/// What is to be known beside where the objects are.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// A directory of this host for what can be made again: the deduplication index, locks.
    pub state_directory: PathBuf,
    /// Under which id manifests are published and given up.
    pub owner: OwnerId,
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
/// Reading needs no lock and may happen in many processes at once. Imports and
/// [`sweep`](Store::sweep) exclude each other, also between processes.
#[derive(Debug)]
pub struct Store {
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) index_directory: PathBuf,
    pub(crate) owner: OwnerId,
    pub(crate) block_hash_key: [u8; 32],
    footers: Mutex<FooterCache>,
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
        let options = StoreOptions { state_directory: directory.join("index"), owner: OwnerId::default() };
        Self::open(Arc::new(objects), options)
    }

    /// Opens the store in these objects, or makes one where there is none.
    ///
    /// # Errors
    /// `UnsupportedVersion` for a store of a newer format, `Corrupt` when its settings cannot be
    /// read, `Io`, `Timeout` or `NoSpace`.
    pub fn open(objects: Arc<dyn Objects>, options: StoreOptions) -> Result<Self, StoreError> {
        let settings = Settings::open_or_create(&*objects)?;
        Ok(Self {
            objects,
            index_directory: options.state_directory,
            owner: options.owner,
            block_hash_key: settings.block_hash_key,
            footers: Mutex::default(),
        })
    }

    /// Reads the manifest of a disk's content: the newest of this owner, or else anybody's.
    ///
    /// # Errors
    /// `NotFound` when the store does not hold it; `Corrupt`.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        let published = self.published(digest)?;
        let best = published.iter().max_by_key(|p| (p.owner == Some(self.owner), p.owner.is_some(), p.edition));
        let best = best.ok_or_else(|| {
            StoreError::new(StoreErrorKind::NotFound, format!("the store has no manifest of {digest}"))
        })?;
        self.read_manifest(best)
    }

    /// Reads one manifest.
    pub(crate) fn read_manifest(&self, published: &Published) -> Result<Manifest, StoreError> {
        let bytes = self.objects.get(&published.object_name(), MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&bytes)?;
        let digest = published.digest;
        if manifest.digest() != digest {
            return Err(StoreError::corrupt(format!("the manifest stored for {digest} is of {}", manifest.digest())));
        }
        Ok(manifest)
    }

    /// Lists the manifests of a content, of all owners, in no order.
    fn published(&self, digest: &Digest) -> Result<Vec<Published>, StoreError> {
        let mut found: Vec<_> = self.objects.list(&published::directory(digest))?;
        let own = |(name, _): &(String, u64)| Published::parse(name).is_some_and(|p| p.owner == Some(self.owner));
        if !found.iter().any(own) {
            // Perhaps one of a store made before owners were told apart.
            let old = Published { digest: *digest, owner: None, edition: 0 };
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

    /// Lists the contents that this owner has published, or that no owner is known of, in no order.
    ///
    /// # Errors
    /// `Io`.
    pub fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let mine = |p: &Published| p.owner.is_none_or(|owner| owner == self.owner);
        let found: HashSet<_> = self.all_published()?.into_iter().filter(mine).map(|p| p.digest).collect();
        Ok(found.into_iter().collect())
    }

    /// Reads and verifies one frame; returns its plain bytes, whole blocks.
    ///
    /// # Errors
    /// `Corrupt` with the pack's and the frame's name when stored bytes do not verify; `NotFound`
    /// or `Io` when they cannot be read.
    pub fn read_frame(&self, pack: &PackRef, frame: u32) -> Result<Vec<u8>, StoreError> {
        let footer = self.verified_footer(pack)?;
        let record = footer.frames.get(frame as usize);
        let record = record.ok_or_else(|| StoreError::corrupt(format!("pack {}: no frame {frame}", pack.id)))?;
        let stored = self.objects.get_range(&pack.id.object_name(), record.offset, record.stored_bytes as usize)?;
        self.decode_stored(pack.id, &footer, frame, &stored)
    }

    /// The cipher of a pack's frames in caches of this host; `None` when the store is not encrypted.
    #[must_use]
    pub fn cache_cipher(&self, _pack: PackId) -> Option<crate::BlockCipher> {
        None
    }

    /// Gives a content up: deletes this owner's manifests of it, so that [`sweep`](Self::sweep) may free
    /// its blocks when no other owner has one.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<(), StoreError> {
        for published in self.published(digest)? {
            if published.owner.is_none_or(|owner| owner == self.owner) {
                self.objects.delete(&published.object_name())?;
            }
        }
        Ok(())
    }

    /// Deletes every pack that no manifest refers to and returns the bytes freed.
    ///
    /// Volumes read through manifests, so a manifest must stay while a volume uses it.
    ///
    /// # Errors
    /// `Corrupt` when a manifest cannot be read, and then nothing is deleted; `Io`. A running import
    /// is waited for.
    pub fn sweep(&self) -> Result<u64, StoreError> {
        let lock = self.lock_for_changes()?;
        let mut live = HashSet::new();
        for published in self.all_published()? {
            live.extend(self.read_manifest(&published)?.packs().iter().map(|pack| pack.id));
        }
        let mut freed_bytes = 0;
        let mut index = BlockIndex::open(&self.index_directory)?;
        for (name, len_bytes) in self.objects.list("packs")? {
            if PackId::from_object_name(&name).is_some_and(|id| !live.contains(&id)) {
                // Unclean before the first deletion: entries of deleted packs must not survive a crash.
                index.begin_changes()?;
                self.objects.delete(&name)?;
                freed_bytes += len_bytes;
            }
        }
        drop(lock);
        Ok(freed_bytes)
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
        for (_, len_bytes) in self.objects.list("manifests")? {
            usage.manifests += 1;
            usage.manifest_bytes += len_bytes;
        }
        Ok(usage)
    }

    /// Puts a manifest of this owner; `false` when it has one for this content already.
    pub(crate) fn publish(&self, manifest: &Manifest) -> Result<bool, StoreError> {
        let digest = manifest.digest();
        if self.published(&digest)?.iter().any(|p| p.owner.is_none_or(|owner| owner == self.owner)) {
            return Ok(false);
        }
        let published = Published { digest, owner: Some(self.owner), edition: 0 };
        self.objects.put_if_absent(&published.object_name(), &manifest.encode()?)
    }

    pub(crate) fn footer(&self, id: PackId, pack_bytes: u64) -> Result<Arc<Footer>, StoreError> {
        if let Some(footer) = self.footers.lock().expect("no panic while held").get(id) {
            return Ok(footer);
        }
        let name = id.object_name();
        let tail = |len: u64| {
            let len_usize = usize::try_from(len).map_err(|_| StoreError::corrupt("footer does not fit in memory"))?;
            self.objects.get_range(&name, pack_bytes - len, len_usize)
        };
        if pack_bytes > pack::MAX_PACK_BYTES {
            return Err(StoreError::corrupt(format!("pack {id} has {pack_bytes} bytes")));
        }
        let mut bytes = tail(pack::tail_guess_bytes(pack_bytes))?;
        let span = pack::footer_span(&bytes, pack_bytes)?;
        if span > bytes.len() as u64 {
            bytes = tail(span)?;
        }
        let footer = Arc::new(pack::parse_footer(id, &bytes, pack_bytes)?);
        self.footers.lock().expect("no panic while held").put(id, Arc::clone(&footer));
        Ok(footer)
    }

    /// Takes the lock that imports and sweeps hold.
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

    /// Opens the index and brings it up to date with the packs that are there.
    ///
    /// The caller holds the lock.
    pub(crate) fn open_index(&self) -> Result<BlockIndex, StoreError> {
        let stored: HashMap<PackId, u64> = self
            .objects
            .list("packs")?
            .into_iter()
            .filter_map(|(name, len_bytes)| Some((PackId::from_object_name(&name)?, len_bytes)))
            .collect();
        let mut index = BlockIndex::open(&self.index_directory)?;
        if index.packs().iter().any(|pack| !stored.contains_key(&pack.id)) {
            index.clear()?;
        }
        let numbered = index.numbers();
        let missing: Vec<_> = stored.into_iter().filter(|(id, _)| !numbered.contains_key(id)).collect();
        if !missing.is_empty() {
            index.begin_changes()?;
        }
        for (id, len_bytes) in missing {
            match self.footer(id, len_bytes) {
                Ok(footer) => index_pack(&mut index, IndexedPack { id, len_bytes }, &footer)?,
                // Not usable for matching; reading it will report the damage to whom it concerns.
                Err(error) => tracing::warn!(pack = %id, %error, "a pack's footer cannot be read"),
            }
        }
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
