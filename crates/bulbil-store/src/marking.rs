//! Which packs are in use: what the manifests of all owners refer to.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::{StoreError, StoreErrorKind};
use crate::manifest::Manifest;
use crate::pack::PackId;
use crate::publish::Stored;
use crate::published::{ContentName, OwnerId, Published};
use crate::store::Store;

/// So often the manifests are listed again because one had gone meanwhile.
const ATTEMPTS: u32 = 1000;

/// What the manifests say.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// The manifest that counts for each content and owner.
    pub(crate) current: Vec<Published>,
    /// Names of manifests in whose place a newer edition of the same content and owner counts.
    pub(crate) superseded: Vec<String>,
    /// Packs that a current manifest refers to.
    pub(crate) live: HashSet<PackId>,
    /// Contents that have a manifest.
    pub(crate) contents: HashSet<ContentName>,
    /// Manifests that cannot be read, with the reason.
    pub(crate) damaged: Vec<(Published, StoreError)>,
}

impl Marks {
    /// Refuses to go on when a manifest cannot be read.
    pub(crate) fn all_readable(mut self) -> Result<Self, StoreError> {
        match self.damaged.pop() {
            None => Ok(self),
            Some((_, error)) => {
                let text = "a manifest cannot be read, so nobody knows which packs it needs; nothing was deleted";
                Err(StoreError::with_source(StoreErrorKind::Corrupt, text, error))
            }
        }
    }
}

/// What is known of an object under the name of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Manifest,
    /// One that was not visited, or is damaged, because a newer one counted.
    Behind,
    Void,
    Damaged,
}

impl Store {
    /// Reads every manifest of every owner; `visit` gets each that counts, one at a time.
    ///
    /// A manifest that is replaced or removed meanwhile is no error: the list is read again until
    /// everything in it was there. `visit` may get an edition that was replaced a moment later.
    ///
    /// # Errors
    /// `Io`, `Timeout`, `UnsupportedVersion`. Damaged manifests are listed in the result.
    pub(crate) fn mark(&self, visit: &mut dyn FnMut(&Published, &Manifest)) -> Result<Marks, StoreError> {
        let mut known = HashMap::new();
        let mut live = HashSet::new();
        for _ in 0..ATTEMPTS {
            let mut marks = Marks::default();
            let mut groups: BTreeMap<(ContentName, Option<OwnerId>), Vec<Published>> = BTreeMap::new();
            for published in self.all_published()? {
                groups.entry((published.content, published.owner)).or_default().push(published);
            }
            let mut complete = true;
            for mut group in groups.into_values() {
                group.sort_unstable_by_key(|p| std::cmp::Reverse(p.edition));
                complete &= self.mark_group(group, &mut marks, &mut known, &mut live, visit)?;
            }
            if complete {
                marks.live = live;
                supersede_old_names(&mut marks);
                marks.contents = marks.current.iter().map(|p| p.content).collect();
                return Ok(marks);
            }
        }
        Err(StoreError::new(StoreErrorKind::Timeout, "the manifests change faster than they can be read"))
    }

    /// Takes in the editions of one content and owner, the newest first; `false` when one had gone.
    fn mark_group(
        &self,
        group: Vec<Published>,
        marks: &mut Marks,
        known: &mut HashMap<String, Known>,
        live: &mut HashSet<PackId>,
        visit: &mut dyn FnMut(&Published, &Manifest),
    ) -> Result<bool, StoreError> {
        let mut counts = false;
        for published in group {
            let name = published.object_name();
            let what = match known.get(&name) {
                Some(what) if *what != Known::Damaged && (counts || *what != Known::Behind) => *what,
                _ => match self.stored_manifest(&published)? {
                    Stored::Gone => return Ok(false),
                    Stored::Void => Known::Void,
                    Stored::Manifest(_) if counts => Known::Behind,
                    Stored::Manifest(manifest) => {
                        live.extend(manifest.packs().iter().map(|pack| pack.id));
                        visit(&published, &manifest);
                        Known::Manifest
                    }
                    // Behind a newer edition nobody needs it.
                    Stored::Damaged(_) if counts => Known::Behind,
                    Stored::Damaged(error) => {
                        marks.damaged.push((published.clone(), error));
                        Known::Damaged
                    }
                },
            };
            let is_manifest = matches!(what, Known::Manifest | Known::Behind);
            if counts && is_manifest {
                marks.superseded.push(name.clone());
            } else if is_manifest {
                counts = true;
                marks.current.push(published);
            }
            known.insert(name, what);
        }
        Ok(true)
    }
}

/// A manifest of no known owner counts for nothing beside one that was made in its place.
fn supersede_old_names(marks: &mut Marks) {
    let owned: HashSet<_> = marks.current.iter().filter(|p| p.owner.is_some()).map(|p| p.content).collect();
    let is_old = |published: &Published| published.owner.is_none() && owned.contains(&published.content);
    let old: Vec<_> = marks.current.extract_if(.., |published| is_old(published)).collect();
    let damaged: Vec<_> = marks.damaged.extract_if(.., |(published, _)| is_old(published)).collect();
    let old = old.iter().chain(damaged.iter().map(|(published, _)| published));
    marks.superseded.extend(old.map(Published::object_name));
}
