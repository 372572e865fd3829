//! Manifests come and go: put under a lease, found by content, given up by their owner.

use std::collections::HashSet;

use crate::digest::Digest;
use crate::error::{StoreError, StoreErrorKind};
use crate::lease::{Void, WriteLease};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::pack::PackId;
use crate::published::{OwnerId, Published};
use crate::store::Store;

/// An edition follows the one before it by a random step of at most so many: numbers last for a million.
const EDITION_STEPS: u32 = 4096;

/// What lies under the name of a manifest.
#[derive(Debug)]
pub(crate) enum Stored {
    Manifest(Manifest),
    /// The name was voided: nothing was published under it and nothing will be.
    Void,
    /// It is not there any more.
    Gone,
    /// It cannot be read.
    Damaged(StoreError),
}

impl Store {
    /// Reads what lies under the name of a manifest.
    ///
    /// # Errors
    /// `Io`, `Timeout`, `UnsupportedVersion`: what would be different at another time or with another program.
    pub(crate) fn stored_manifest(&self, published: &Published) -> Result<Stored, StoreError> {
        let name = published.object_name();
        let parsed = self.objects.get(&name, MAX_MANIFEST_BYTES).and_then(|bytes| {
            if Void::is(&bytes) {
                return Ok(Stored::Void);
            }
            let manifest = self.parse_manifest(published.content, &name, bytes)?;
            Ok(Stored::Manifest(manifest))
        });
        match parsed {
            Err(e) if e.kind() == StoreErrorKind::NotFound => Ok(Stored::Gone),
            Err(e) if e.kind() == StoreErrorKind::Corrupt => {
                let text = format!("object `{}` is damaged", published.object_name());
                Ok(Stored::Damaged(StoreError::with_source(StoreErrorKind::Corrupt, text, e)))
            }
            other => other,
        }
    }

    /// Lists the contents that this owner has published, or that no owner is known of, in no order.
    ///
    /// In an encrypted store every manifest is read once for it.
    ///
    /// # Errors
    /// `Io`, `Timeout`; in an encrypted store also `Corrupt`.
    pub fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let mut found = HashSet::new();
        for (name, len_bytes) in self.objects.list("manifests")? {
            let Some(published) = Published::parse(&name) else { continue };
            let mine = published.owner.is_none_or(|owner| owner == self.owner);
            if mine && !self.is_void(&name, len_bytes)? {
                found.extend(self.digest_of(&published)?);
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Whether the object of this size under the name of a manifest says that nothing was published.
    pub(crate) fn is_void(&self, name: &str, len_bytes: u64) -> Result<bool, StoreError> {
        if !(8..=Void::MAX_BYTES).contains(&len_bytes) {
            return Ok(false);
        }
        match self.objects.get_range(name, 0, 8) {
            Err(e) if e.kind() == StoreErrorKind::NotFound => Ok(true),
            other => Ok(Void::is(&other?)),
        }
    }

    /// Puts a manifest of this owner; `false` when it had one for this content that could be relied on, unless
    /// `always` asks for a new edition.
    ///
    /// Behind a network a new edition is put in any case: a removal that was given up may still be carried out, and then
    /// takes the one that is there.
    ///
    /// When it fails, the manifest may be there nevertheless; the lease sees to it that its packs are
    /// protected as long as that is not known.
    ///
    /// # Errors
    /// `Timeout` when the lease was ended meanwhile; `Io`, `NoSpace`, `Corrupt`.
    pub(crate) fn publish(
        &self,
        lease: &mut WriteLease,
        manifest: &Manifest,
        always: bool,
    ) -> Result<bool, StoreError> {
        let digest = manifest.digest();
        let mut stored = self.published(&digest)?;
        stored.retain(|p| p.owner.is_none_or(|owner| owner == self.owner));
        let mut existed = false;
        for published in &stored {
            match self.stored_manifest(published)? {
                Stored::Manifest(found) if !always && self.has_packs_of(&found)? => {
                    if !self.objects.is_remote() {
                        // Whoever put it may have been killed before that was durable.
                        self.objects.make_durable(&[published.object_name()])?;
                        return Ok(false);
                    }
                    existed = true;
                }
                Stored::Manifest(_) if always => {}
                Stored::Void | Stored::Gone => {}
                // A newer edition takes its place; collections delete what it supersedes.
                Stored::Manifest(_) | Stored::Damaged(_) => {
                    tracing::warn!(name = published.object_name(), "a manifest that is of no use is superseded");
                }
            }
        }
        let published =
            Published { content: self.content_name(&digest), owner: Some(self.owner), edition: next_edition(&stored)? };
        let name = published.object_name();
        lease.announce(vec![name.clone()])?;
        if !self.put_announced(lease, &name, &self.encode_manifest(manifest, &name)?)? {
            return match self.stored_manifest(&published)? {
                Stored::Manifest(_) => Ok(false),
                _ => Err(StoreError::new(StoreErrorKind::Timeout, "another process publishes this content; try again")),
            };
        }
        Ok(!existed)
    }

    /// Puts a manifest under an announced name; `false` when something else is there.
    ///
    /// # Errors
    /// As `Objects::put_if_absent`.
    pub(crate) fn put_announced(&self, lease: &mut WriteLease, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
        let error = match self.objects.put_if_absent(name, bytes) {
            Ok(put) => return Ok(put),
            Err(error) => error,
        };
        let nothing_there = lease.void(name).unwrap_or(true);
        if !nothing_there && self.objects.is_remote() && self.objects.get(name, MAX_MANIFEST_BYTES)? == bytes {
            // Only the answer was lost. In a directory it may be there and not durable.
            return Ok(true);
        }
        Err(error)
    }

    /// Whether every pack of a manifest is there.
    fn has_packs_of(&self, manifest: &Manifest) -> Result<bool, StoreError> {
        if manifest.packs().is_empty() {
            return Ok(true);
        }
        let stored: HashSet<_> = self.list_packs()?.into_iter().map(|(id, _)| id).collect();
        Ok(manifest.packs().iter().all(|pack| stored.contains(&pack.id)))
    }

    /// Lists every pack with the size of its object.
    pub(crate) fn list_packs(&self) -> Result<Vec<(PackId, u64)>, StoreError> {
        let listed = self.objects.list("packs")?;
        Ok(listed.iter().filter_map(|(name, len)| Some((PackId::from_object_name(name)?, *len))).collect())
    }

    /// Gives a content up: deletes this owner's manifests of it, so that a [collection](Self::collect) may
    /// free its blocks when no other owner has one.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<(), StoreError> {
        let mut mine = self.published(digest)?;
        mine.retain(|p| p.owner.is_none_or(|owner| owner == self.owner));
        // The newest last: an older one is no mark for collections, so it must never be the only one.
        mine.sort_unstable_by_key(|p| (p.owner.is_some(), p.edition));
        let newest = mine.iter().filter(|p| p.owner.is_some()).map(|p| p.edition).max();
        for published in mine {
            if matches!(self.stored_manifest(&published)?, Stored::Void | Stored::Gone) {
                continue;
            }
            let name = published.object_name();
            if self.objects.is_remote() && published.owner.is_some() && Some(published.edition) == newest {
                // A put of it that is still under way somewhere finds its name taken, and a later edition is above it.
                self.objects.put(&name, &Void::encoded("removed")?)?;
            } else {
                self.objects.delete(&name)?;
            }
        }
        Ok(())
    }
}

/// The edition of a new manifest of an owner who has these: above all of them, and random. A request that was long
/// under way, the deletion of an edition that was removed since, must not meet a name that is used again.
pub(crate) fn next_edition(stored: &[Published]) -> Result<u32, StoreError> {
    let newest = stored.iter().filter(|p| p.owner.is_some()).map(|p| p.edition).max();
    let too_many = || StoreError::corrupt("the manifests of a content have no number left");
    match newest {
        Some(edition) => edition.checked_add(1 + first_edition()? % EDITION_STEPS).ok_or_else(too_many),
        None => first_edition(),
    }
}

/// A random number in the lower half of all.
pub(crate) fn first_edition() -> Result<u32, StoreError> {
    Ok(OwnerId::random()?.low_bits() >> 1)
}
