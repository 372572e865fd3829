//! Scrub: everything that is stored is read again; damage is named by the images and volumes it hits, and healed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulbil_store::{Digest, FrameHealer, ScrubObserver, ScrubOptions, SecondStore, Store};
use bulbil_volume::CacheHealer;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::image_copy::{OtherStore, open_other};
use crate::store_ops;
use crate::volume_ops::volume_error;

/// What to read again, and where to heal from beside the base cache.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ScrubRequest {
    /// Of all packs this share, `(index from 0, count)`.
    pub share: Option<(u32, u32)>,
    /// A store that may have the same contents.
    pub heal_from: Option<OtherStore>,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubProgress {
    /// Bytes of packs read.
    pub done_bytes: u64,
    /// Bytes of packs to read.
    pub total_bytes: u64,
}

/// What a scrub found and healed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Packs read.
    pub packs: u64,
    /// Bytes of these.
    pub pack_bytes: u64,
    /// Manifests read.
    pub manifests: u64,
    /// Everything that is or was damaged.
    pub damage: Vec<Damage>,
    /// Damage that remains.
    pub damaged: u64,
    /// Damage that was put right.
    pub healed: u64,
}

/// Something damaged, and whom it hits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// What it is.
    pub kind: DamageKind,
    /// The object in the store; of a pack its id.
    pub object: String,
    /// What is wrong.
    pub reason: String,
    /// Of a pack: frames that cannot be read; none when it is the pack as a whole.
    pub frames: Vec<u32>,
    /// Contents concerned.
    pub digests: Vec<Digest>,
    /// Images of this host that have such a content, as NAME:VERSION.
    pub images: Vec<String>,
    /// Volumes of this host that lie over such a content, with their instance.
    pub volumes: Vec<DamagedVolume>,
    /// Whether it is right again.
    pub healed: bool,
}

/// The kinds of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DamageKind {
    /// Blocks of disks.
    Pack,
    /// The block map of a disk.
    Manifest,
    /// Anything else.
    Other,
}

/// A volume that damage hits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DamagedVolume {
    /// The volume.
    pub id: String,
    /// The name of the instance that has it.
    pub instance: Option<String>,
}

struct Observer(mpsc::Sender<ScrubProgress>);

impl ScrubObserver for Observer {
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        // A listener that is behind misses a step; the next one says more.
        let _told = self.0.try_send(ScrubProgress { done_bytes, total_bytes }).is_ok();
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

/// Who has a content on this host.
#[derive(Default)]
struct Users {
    images: BTreeMap<Digest, BTreeSet<String>>,
    volumes: BTreeMap<Digest, BTreeSet<DamagedVolume>>,
}

impl Control {
    /// Reads the store again, heals what can be healed, and says what is damaged. Runs beside everything else.
    ///
    /// The scrub stops when the receiver of `progress` is dropped.
    ///
    /// # Errors
    /// `NotFound` or `StoreKey` for the store to heal from; `Cancelled`; `Timeout` or `Failed` of the storage as a
    /// whole. Damage is no error.
    pub async fn scrub(
        &self,
        request: ScrubRequest,
        progress: mpsc::Sender<ScrubProgress>,
    ) -> Result<ScrubReport, ControlError> {
        if request.share.is_some_and(|(index, count)| index >= count) {
            return Err(ControlError::new(ErrorCode::Invalid, "there is no such share"));
        }
        let (store, data, opening) = (Arc::clone(&self.store), self.data.clone(), self.opening());
        let scrubbed = tokio::task::spawn_blocking(move || {
            let second = request.heal_from.as_ref().map(|other| open_other(other, &opening)).transpose()?;
            let cache = store_ops::open_cache(&data)?;
            let from_cache = CacheHealer::new(&cache, &store);
            scrub_with(&store, request.share, &from_cache, second.as_ref(), &Observer(progress))
        });
        let broken = |e| ControlError::with_source(ErrorCode::Failed, "the scrub broke off", &e);
        let found = scrubbed.await.map_err(broken)??;
        let users = self.users_of_contents().await?;
        let report = ScrubReport::new(&found, &users);
        for damage in &report.damage {
            let Damage { object, reason, images, healed, .. } = damage;
            tracing::error!(object, reason, ?images, healed, "the store is damaged");
        }
        Ok(report)
    }

    async fn users_of_contents(&self) -> Result<Users, ControlError> {
        let mut users = Users::default();
        for image in self.catalog.images().await? {
            users.images.entry(image.digest).or_default().insert(format!("{}:{}", image.name, image.version));
        }
        let instances = self.catalog.instances().await?;
        let bases = self.volumes.bases().map_err(|e| volume_error("cannot see what the volumes refer to", &e))?;
        for (id, digests) in bases {
            let owner = instances.iter().find(|(record, _)| record.volume_id == id);
            let volume =
                DamagedVolume { id: id.to_string(), instance: owner.map(|(record, _)| record.name.to_string()) };
            for digest in digests {
                users.volumes.entry(digest).or_default().insert(volume.clone());
            }
        }
        Ok(users)
    }
}

fn scrub_with(
    store: &Store,
    share: Option<(u32, u32)>,
    from_cache: &CacheHealer<'_>,
    second: Option<&Store>,
    observer: &Observer,
) -> Result<bulbil_store::ScrubReport, ControlError> {
    let second = second.map(SecondStore::new);
    let healers: Vec<&dyn FrameHealer> =
        std::iter::once(from_cache as &dyn FrameHealer).chain(second.as_ref().map(|second| second as _)).collect();
    let options = ScrubOptions { share, heal: true, healers: &healers };
    store.scrub(&options, observer).map_err(|e| ControlError::store("cannot read the store again", &e))
}

impl ScrubReport {
    fn new(found: &bulbil_store::ScrubReport, users: &Users) -> Self {
        let packs = found.damaged_packs.iter().map(|pack| {
            let digests = pack.contents.iter().map(|hit| hit.digest).collect();
            let damage = Damage::new(DamageKind::Pack, pack.id.to_string(), &pack.reason, digests, pack.healed, users);
            Damage { frames: pack.frames.clone(), ..damage }
        });
        let manifests = found.damaged_manifests.iter().map(|manifest| {
            let digests = manifest.digest.into_iter().collect();
            Damage::new(
                DamageKind::Manifest,
                manifest.object.clone(),
                &manifest.reason,
                digests,
                manifest.healed,
                users,
            )
        });
        let others = found.damaged_objects.iter().map(|other| {
            let digests = other.content.into_iter().collect();
            Damage::new(DamageKind::Other, other.object.clone(), &other.reason, digests, other.healed, users)
        });
        let damage: Vec<_> = packs.chain(manifests).chain(others).collect();
        let healed = damage.iter().filter(|damage| damage.healed).count() as u64;
        Self {
            packs: found.packs,
            pack_bytes: found.pack_bytes,
            manifests: found.manifests,
            damaged: damage.len() as u64 - healed,
            healed,
            damage,
        }
    }
}

impl Damage {
    fn new(
        kind: DamageKind,
        object: String,
        reason: &str,
        digests: BTreeSet<Digest>,
        healed: bool,
        users: &Users,
    ) -> Self {
        let of = |digest: &Digest| users.images.get(digest).into_iter().flatten().cloned().collect::<Vec<_>>();
        let images: BTreeSet<String> = digests.iter().flat_map(of).collect();
        let volumes = |digest: &Digest| users.volumes.get(digest).into_iter().flatten().cloned().collect::<Vec<_>>();
        let volumes: BTreeSet<DamagedVolume> = digests.iter().flat_map(volumes).collect();
        Self {
            kind,
            object,
            reason: reason.to_owned(),
            frames: Vec::new(),
            digests: digests.into_iter().collect(),
            images: images.into_iter().collect(),
            volumes: volumes.into_iter().collect(),
            healed,
        }
    }
}
