//! Scrub: reads everything that is stored again, says what is damaged and whom it concerns, and heals it.
//!
//! A damaged pack is quarantined: imports match nothing against it any more. Readers go on as before: a
//! frame that does not verify is an error, the others are read. Healing moves the blocks in use into new
//! packs, as a repack does, with the damaged ones from elsewhere.

mod check;
mod heal;
pub(crate) mod quarantine;
mod second_store;

use std::collections::{HashMap, HashSet};

use serde::Serialize;

pub use heal::{BlockUse, FrameHealer, WantedFrame};
pub use second_store::SecondStore;

use self::check::Finding;
use crate::attachment::AttachmentKind;
use crate::digest::Digest;
use crate::encryption::KEYS_DIRECTORY;
use crate::error::{StoreError, StoreErrorKind};
use crate::manifest::{Manifest, PackRef};
use crate::marking::Marks;
use crate::pack::PackId;
use crate::publish::Stored;
use crate::published::{OwnerId, Published};
use crate::store::Store;

/// How a scrub is to go about it.
#[derive(Default)]
pub struct ScrubOptions<'a> {
    /// Reads only packs of one share, `(index, count)` with `index < count`: the packs of all shares are all packs.
    pub share: Option<(u32, u32)>,
    /// Whether what is damaged is put right where that is possible.
    pub heal: bool,
    /// Where the content of damaged frames may be found, in the order in which they are asked.
    pub healers: &'a [&'a dyn FrameHealer],
}

impl std::fmt::Debug for ScrubOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let healers = self.healers.len();
        f.debug_struct("ScrubOptions").field("share", &self.share).field("healers", &healers).finish_non_exhaustive()
    }
}

/// Hears how a scrub goes on.
pub trait ScrubObserver {
    /// `done_bytes` of the `total_bytes` of packs were read.
    fn progress(&self, done_bytes: u64, total_bytes: u64);

    /// Whether the scrub should stop now.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Listens to nothing.
impl ScrubObserver for () {
    fn progress(&self, _done_bytes: u64, _total_bytes: u64) {}
}

/// What a scrub found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ScrubReport {
    /// Packs read.
    pub packs: u64,
    /// Bytes of those packs.
    pub pack_bytes: u64,
    /// Manifests read.
    pub manifests: u64,
    /// Attachments read.
    pub attachments: u64,
    /// Packs that are damaged or missing.
    pub damaged_packs: Vec<PackDamage>,
    /// Manifests that cannot be read.
    pub damaged_manifests: Vec<ManifestDamage>,
    /// Other objects that cannot be read.
    pub damaged_objects: Vec<ObjectDamage>,
}

impl ScrubReport {
    /// Whether nothing is damaged, or everything that was is healed.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.damaged_packs.iter().all(|damage| damage.healed)
            && self.damaged_manifests.iter().all(|damage| damage.healed)
            && self.damaged_objects.iter().all(|damage| damage.healed)
    }
}

/// A damaged pack.
#[derive(Debug, Clone, Serialize)]
pub struct PackDamage {
    /// The pack.
    pub id: PackId,
    /// What is wrong.
    pub reason: String,
    /// Frames that cannot be read; empty when it is the pack as a whole or nothing that is needed to read.
    pub frames: Vec<u32>,
    /// Contents that refer to blocks concerned.
    pub contents: Vec<ContentHit>,
    /// Whether all blocks in use are elsewhere now.
    pub healed: bool,
}

/// A content that damage concerns.
#[derive(Debug, Clone, Serialize)]
pub struct ContentHit {
    /// The content.
    pub digest: Digest,
    /// Who has it; `None` in stores made before owners were told apart.
    pub owner: Option<OwnerId>,
    /// Its blocks of 4 KiB that are concerned.
    pub blocks: u64,
}

/// A manifest that cannot be read.
#[derive(Debug, Clone, Serialize)]
pub struct ManifestDamage {
    /// The content; `None` in an encrypted store where nothing else tells what it is.
    pub digest: Option<Digest>,
    /// Who has it; `None` in stores made before owners were told apart.
    pub owner: Option<OwnerId>,
    /// The object.
    pub object: String,
    /// What is wrong.
    pub reason: String,
    /// Whether another manifest is in its place now.
    pub healed: bool,
}

/// An object that cannot be read and is neither pack nor manifest.
#[derive(Debug, Clone, Serialize)]
pub struct ObjectDamage {
    /// The object.
    pub object: String,
    /// What is wrong.
    pub reason: String,
    /// The content it belongs to.
    pub content: Option<Digest>,
    /// Whether it was deleted, because it can be made again.
    pub healed: bool,
}

impl Store {
    /// Reads everything that is stored again and says what is damaged; may run beside anything else.
    ///
    /// # Errors
    /// `Cancelled`; `Io`, `Timeout` of the storage as a whole. Damage is no error.
    pub fn scrub(&self, options: &ScrubOptions<'_>, observer: &dyn ScrubObserver) -> Result<ScrubReport, StoreError> {
        let mut report = ScrubReport::default();
        let findings = self.check_packs(options.share, observer, &mut report)?;
        let (settings, findings) = settings_or_packs(findings);
        report.damaged_objects.extend(settings);
        let marks = self.check_manifests(&findings, &mut report)?;
        self.check_attachments(options.heal, &mut report)?;
        self.check_small_objects(&mut report)?;
        for damage in report.damaged_packs.iter().filter(|damage| findings.contains_key(&damage.id)) {
            quarantine::put(&*self.objects, damage.id, &damage.frames, self.clock.now_ms())?;
        }
        if options.heal {
            self.heal_manifests(options.healers, &marks, &mut report)?;
            self.heal_packs(options.healers, &findings, &mut report)?;
        }
        Ok(report)
    }

    fn check_packs(
        &self,
        share: Option<(u32, u32)>,
        observer: &dyn ScrubObserver,
        report: &mut ScrubReport,
    ) -> Result<Vec<Finding>, StoreError> {
        let mut packs = self.list_packs()?;
        packs.retain(|(id, _)| share.is_none_or(|share| is_in_share(*id, share)));
        packs.sort_unstable();
        let total_bytes = packs.iter().map(|(_, len)| len).sum();
        let mut findings = Vec::new();
        for (id, len_bytes) in packs {
            if observer.is_cancelled() {
                return Err(StoreError::new(StoreErrorKind::Cancelled, "the scrub was cancelled"));
            }
            if let Some(finding) = self.check_pack(id, len_bytes)? {
                report.packs += 1;
                if finding.is_damaged() || !finding.other_hashes.is_empty() || finding.sound_frames > 0 {
                    findings.push(finding);
                }
            }
            report.pack_bytes += len_bytes;
            observer.progress(report.pack_bytes, total_bytes);
        }
        Ok(findings)
    }

    /// Reads all manifests; names those that damaged packs concern, and packs that are missing.
    fn check_manifests(
        &self,
        findings: &HashMap<PackId, Finding>,
        report: &mut ScrubReport,
    ) -> Result<Marks, StoreError> {
        let stored: HashMap<_, _> = self.list_packs()?.into_iter().collect();
        let mut damages: HashMap<PackId, PackDamage> =
            findings.values().filter(|f| f.is_damaged()).map(|f| (f.id, damage_of(f))).collect();
        let mut missing: Vec<(Published, Digest, PackRef, u64)> = Vec::new();
        let mut manifests = 0;
        let marks = self.mark(&mut |published, manifest| {
            manifests += 1;
            for (pack, number) in manifest.packs().iter().zip(0..) {
                let finding = findings.get(&pack.id);
                let swapped = finding.and_then(|f| f.footer.as_ref()).is_some_and(|f| f.digest != pack.footer_digest);
                if swapped && !damages.contains_key(&pack.id) {
                    let reason = "not the pack that manifests name".to_owned();
                    let damage = PackDamage { reason, ..new_damage(pack.id) };
                    damages.insert(pack.id, damage);
                }
                if let Some(damage) = damages.get_mut(&pack.id) {
                    let frames = (!damage.frames.is_empty()).then_some(&damage.frames);
                    let blocks = blocks_hit(manifest, number, frames);
                    if blocks > 0 {
                        let hit = ContentHit { digest: manifest.digest(), owner: published.owner, blocks };
                        damage.contents.push(hit);
                    }
                } else if stored.get(&pack.id) != Some(&pack.len_bytes) {
                    missing.push((published.clone(), manifest.digest(), *pack, blocks_hit(manifest, number, None)));
                }
            }
        })?;
        // A pack that was put after the list was read is not missing, nor is one whose manifest has gone.
        for (published, digest, pack, blocks) in missing {
            let Some(reason) = self.is_missing(&published, &pack)? else { continue };
            let damage = damages.entry(pack.id).or_insert_with(|| PackDamage { reason, ..new_damage(pack.id) });
            damage.contents.push(ContentHit { digest, owner: published.owner, blocks });
        }
        report.manifests = manifests + marks.damaged.len() as u64;
        report.damaged_manifests =
            marks.damaged.iter().map(|(published, error)| self.manifest_damage(published, error)).collect();
        report.damaged_packs = damages.into_values().collect();
        report.damaged_packs.sort_by_key(|damage| damage.id);
        Ok(marks)
    }

    fn is_missing(&self, published: &Published, pack: &PackRef) -> Result<Option<String>, StoreError> {
        match self.footer(pack.id, pack.len_bytes) {
            Ok(footer) if footer.digest == pack.footer_digest => Ok(None),
            Err(e) if e.kind() == StoreErrorKind::Timeout => Err(e),
            other => {
                let still = matches!(self.stored_manifest(published)?, Stored::Manifest(_));
                let reason = other.map_or_else(|e| e.to_string(), |_| "not the pack that manifests name".to_owned());
                Ok(still.then_some(reason))
            }
        }
    }

    fn manifest_damage(&self, published: &Published, error: &StoreError) -> ManifestDamage {
        let (owner, object) = (published.owner, published.object_name());
        let digest = self.known_digest(published.content);
        ManifestDamage { digest, owner, object, reason: error.to_string(), healed: false }
    }

    fn check_attachments(&self, heal: bool, report: &mut ScrubReport) -> Result<(), StoreError> {
        for (object, _) in self.objects.list("attachments")? {
            let Some((_, content)) = AttachmentKind::parse(&object) else { continue };
            match self.read_attachment(&object) {
                Err(e) if e.kind() == StoreErrorKind::Corrupt => {
                    if heal {
                        self.objects.delete(&object)?;
                    }
                    let (reason, content) = (e.to_string(), self.known_digest(content));
                    report.damaged_objects.push(ObjectDamage { object, reason, content, healed: heal });
                }
                Err(e) if e.kind() == StoreErrorKind::NotFound => {}
                other => {
                    other?;
                    report.attachments += 1;
                }
            }
        }
        Ok(())
    }

    /// Checks the sealed objects, which tell of work and not of content.
    fn check_small_objects(&self, report: &mut ScrubReport) -> Result<(), StoreError> {
        for object in self.images()?.unreadable {
            let reason = "the record of an image cannot be read".to_owned();
            report.damaged_objects.push(ObjectDamage { object, reason, content: None, healed: false });
        }
        if let Some(keyring) = &self.keyring
            && let Err(e) = crate::settings::check_encrypted(&*self.objects, keyring.store_id())
        {
            if e.kind() != StoreErrorKind::Corrupt {
                return Err(e);
            }
            let (object, reason) = (crate::settings::NAME.to_owned(), e.to_string());
            report.damaged_objects.push(ObjectDamage { object, reason, content: None, healed: false });
        }
        for directory in ["gc", "leases", "ends", quarantine::DIRECTORY, KEYS_DIRECTORY] {
            for (object, _) in self.objects.list(directory)? {
                self.check_sealed(object, report)?;
            }
        }
        for (object, len_bytes) in self.objects.list("manifests")? {
            if self.is_void(&object, len_bytes)? {
                self.check_sealed(object, report)?;
            }
        }
        Ok(())
    }

    fn check_sealed(&self, object: String, report: &mut ScrubReport) -> Result<(), StoreError> {
        match crate::sealed::get::<serde_json::Value>(&*self.objects, &object) {
            Err(e) if e.kind() == StoreErrorKind::Corrupt => {
                let reason = e.to_string();
                report.damaged_objects.push(ObjectDamage { object, reason, content: None, healed: false });
            }
            Err(e) if e.kind() == StoreErrorKind::NotFound => {}
            other => drop(other?),
        }
        Ok(())
    }
}

/// Packs fall into shares by the first half of their random ids.
fn is_in_share(id: PackId, (index, count): (u32, u32)) -> bool {
    let number = u32::from_be_bytes(*id.0.first_chunk().expect("4 of 16 bytes"));
    (u64::from(number) * u64::from(count.max(1))) >> 32 == u64::from(index)
}

/// Tells other block hashes in single packs from another key for all of them.
fn settings_or_packs(mut findings: Vec<Finding>) -> (Option<ObjectDamage>, HashMap<PackId, Finding>) {
    let sound: u64 = findings.iter().map(|finding| finding.sound_frames).sum();
    let other = findings.iter().any(|finding| !finding.other_hashes.is_empty());
    let settings = (other && sound == 0).then(|| ObjectDamage {
        object: crate::settings::NAME.to_owned(),
        reason: "no block has the hash that the store's key gives it".to_owned(),
        content: None,
        healed: false,
    });
    for finding in findings.iter_mut().filter(|f| settings.is_none() && !f.other_hashes.is_empty()) {
        finding.reason.get_or_insert("blocks have other hashes than the footer says".to_owned());
    }
    (settings, findings.into_iter().map(|finding| (finding.id, finding)).collect())
}

fn new_damage(id: PackId) -> PackDamage {
    PackDamage { id, reason: String::new(), frames: Vec::new(), contents: Vec::new(), healed: false }
}

fn damage_of(finding: &Finding) -> PackDamage {
    let reason = finding.reason.clone().unwrap_or_else(|| "frames are damaged".to_owned());
    // When the pack as a whole is in doubt, so is everything in it.
    let frames = if finding.reason.is_none() { finding.frames.clone() } else { Vec::new() };
    PackDamage { reason, frames, ..new_damage(finding.id) }
}

/// Blocks of a disk that lie in these frames of a pack, or anywhere in it.
fn blocks_hit(manifest: &Manifest, pack: u32, frames: Option<&Vec<u32>>) -> u64 {
    let frames: Option<HashSet<u32>> = frames.map(|frames| frames.iter().copied().collect());
    let extents = manifest.extents().iter().filter(|extent| extent.pack == pack);
    let hit = |block: &u32| frames.as_ref().is_none_or(|frames| frames.contains(&(block / 32)));
    extents.map(|e| (e.block_in_pack..e.block_in_pack + e.blocks).filter(hit).count() as u64).sum()
}
