//! A store: its settings, its frames, its manifests.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::frame;
use crate::index::{BlockIndex, IndexedPack};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest, PackRef};
use crate::objects::{DirObjects, Objects};
use crate::pack::{self, Footer, PackId};

const SETTINGS_NAME: &str = "bulbil-store.json";
const FORMAT_VERSION: u32 = 1;

/// Footers kept in memory: each is 6 KiB of frame records for a usual pack, and 64 KiB of block hashes.
const FOOTERS_KEPT: usize = 256;

/// Settings of a store, written once when it is made.
#[derive(serde::Serialize, serde::Deserialize)]
struct Settings {
    format_version: u32,
    /// Keys the hashes of blocks, so that nobody outside can prepare two blocks with one hash.
    block_hash_key: String,
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
    /// Opens the store in a directory, or makes one in a directory that is missing or empty.
    ///
    /// # Errors
    /// `UnsupportedVersion` for a store of a newer format, `Corrupt` when its settings cannot be
    /// read, `Io` or `NoSpace`.
    pub fn open_or_create(directory: &Path) -> Result<Self, StoreError> {
        let objects = DirObjects::open(directory)?;
        let settings = match objects.get(SETTINGS_NAME, 4096) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => create_settings(&objects)?,
            other => parse_settings(&other?)?,
        };
        Ok(Self {
            objects: Arc::new(objects),
            index_directory: directory.join("index"),
            block_hash_key: parse_key(&settings.block_hash_key)?,
            footers: Mutex::default(),
        })
    }

    /// Reads the manifest of a disk's content.
    ///
    /// # Errors
    /// `NotFound` when the store does not hold it; `Corrupt`.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        let bytes = self.objects.get(&manifest_name(digest), MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&bytes)?;
        if manifest.digest() != *digest {
            return Err(StoreError::corrupt(format!("the manifest stored for {digest} is of {}", manifest.digest())));
        }
        Ok(manifest)
    }

    /// Lists the contents the store holds, in no order.
    ///
    /// # Errors
    /// `Io`.
    pub fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let names = self.objects.list("manifests")?;
        Ok(names.iter().filter_map(|(name, _)| name.rsplit('/').next()).filter_map(parse_manifest_name).collect())
    }

    /// Reads and verifies one frame; returns its plain bytes, whole blocks.
    ///
    /// # Errors
    /// `Corrupt` with the pack's and the frame's name when stored bytes do not verify; `NotFound`
    /// or `Io` when they cannot be read.
    pub fn read_frame(&self, pack: &PackRef, frame: u32) -> Result<Vec<u8>, StoreError> {
        let footer = self.footer(pack.id, pack.len_bytes)?;
        if footer.digest != pack.footer_digest {
            return Err(StoreError::corrupt(format!("pack {}: not the pack that the manifest names", pack.id)));
        }
        let record = footer.frames.get(frame as usize);
        let record = record.ok_or_else(|| StoreError::corrupt(format!("pack {}: no frame {frame}", pack.id)))?;
        let stored = self.objects.get_range(&pack.id.object_name(), record.offset, record.stored_bytes as usize)?;
        frame::decode(&stored, record.codec, record.blocks, &record.hash).map_err(|error| {
            StoreError::with_source(error.kind(), format!("pack {}, frame {frame} is damaged", pack.id), error)
        })
    }

    /// Removes the manifest of a content, so that [`sweep`](Self::sweep) may free its blocks.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<(), StoreError> {
        self.objects.delete(&manifest_name(digest))
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
        for digest in self.digests()? {
            live.extend(self.manifest(&digest)?.packs().iter().map(|pack| pack.id));
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

    /// Puts a manifest; `false` when the store has one for this content already.
    pub(crate) fn publish(&self, manifest: &Manifest) -> Result<bool, StoreError> {
        self.objects.put_if_absent(&manifest_name(&manifest.digest()), &manifest.encode()?)
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

fn manifest_name(digest: &Digest) -> String {
    format!("manifests/{}.manifest", digest.to_hex())
}

fn parse_manifest_name(name: &str) -> Option<Digest> {
    format!("sha256:{}", name.strip_suffix(".manifest")?).parse().ok()
}

fn create_settings(objects: &DirObjects) -> Result<Settings, StoreError> {
    let mut key = [0; 32];
    getrandom::fill(&mut key)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
    let block_hash_key = Digest::from_bytes(key).to_hex();
    let settings = Settings { format_version: FORMAT_VERSION, block_hash_key };
    let text = serde_json::to_vec_pretty(&settings).expect("settings are plain data");
    if objects.put_if_absent(SETTINGS_NAME, &text)? {
        return Ok(settings);
    }
    parse_settings(&objects.get(SETTINGS_NAME, 4096)?)
}

fn parse_settings(bytes: &[u8]) -> Result<Settings, StoreError> {
    let settings: Settings = serde_json::from_slice(bytes).map_err(|e| {
        StoreError::with_source(StoreErrorKind::Corrupt, format!("`{SETTINGS_NAME}` cannot be read"), e)
    })?;
    if settings.format_version != FORMAT_VERSION {
        let text = format!("store format version {} is not known; use a newer bulbil", settings.format_version);
        return Err(StoreError::new(StoreErrorKind::UnsupportedVersion, text));
    }
    Ok(settings)
}

fn parse_key(hex: &str) -> Result<[u8; 32], StoreError> {
    let digest: Result<Digest, _> = format!("sha256:{hex}").parse();
    digest.map(|d| *d.as_bytes()).map_err(|_| StoreError::corrupt("the store's block hash key is not 64 digits"))
}
