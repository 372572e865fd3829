//! What a collection did or would do, for people and programs.

use std::collections::HashSet;

use serde::Serialize;

use super::plan::{Decided, Verdict};
use crate::lease::FoundLease;
use crate::pack::PackId;
use crate::published::OwnerId;
use crate::repack::RepackReport;

/// What a collection did; of a dry run, what it would do.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Whether another collection was at work at the same time and was quicker: then this one deleted nothing.
    pub overtaken: bool,
    /// The number of this collection's list.
    pub generation: u64,
    /// Every pack that no manifest refers to.
    pub packs: Vec<PackReport>,
    /// Leases that were found.
    pub leases: Vec<LeaseReport>,
    /// Packs deleted.
    pub deleted_packs: u64,
    /// Bytes of the packs deleted.
    pub freed_bytes: u64,
    /// Manifests in whose place a newer edition counts.
    pub superseded_manifests: u64,
    /// Those of them that were deleted.
    pub deleted_manifests: u64,
    /// Attachments deleted, of contents that have no manifest.
    pub deleted_attachments: u64,
    /// What was rewritten before; `None` when that was not asked for.
    pub repack: Option<RepackReport>,
}

impl GcReport {
    /// Whether another cycle, at once, would delete more.
    pub(super) fn goes_on(&self, only: Option<&HashSet<PackId>>) -> bool {
        let wanted = |pack: &PackReport| only.is_none_or(|only| only.contains(&pack.id));
        let condemned = self.packs.iter().filter(|p| p.fate == PackFate::Condemned && wanted(p));
        // One whose lease is live would not go in the next cycle either.
        let blocked = self.leases.iter().any(|lease| !lease.expired && lease.generation < self.generation);
        self.overtaken || self.superseded_manifests > self.deleted_manifests || (condemned.count() > 0 && !blocked)
    }
}

/// A pack that no manifest refers to.
#[derive(Debug, Clone, Serialize)]
pub struct PackReport {
    /// The pack.
    pub id: PackId,
    /// Size of the object in bytes.
    pub len_bytes: u64,
    /// When it was first found unused: milliseconds since 1970, UTC.
    pub condemned_ms: u64,
    /// What becomes of it.
    #[serde(flatten)]
    pub fate: PackFate,
}

/// Why a pack that no manifest refers to goes or stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "fate", rename_all = "snake_case")]
pub enum PackFate {
    /// It is deleted.
    Deleted,
    /// It was found unused for the first time; the next collection after the grace time deletes it.
    Condemned,
    /// It stays for the grace time.
    Grace {
        /// Milliseconds since 1970, UTC.
        until_ms: u64,
    },
    /// Somebody at work may refer to it.
    Leased {
        /// The lease.
        lease: String,
        /// What its holder does.
        purpose: String,
    },
    /// This collection was made for other packs.
    NotAsked,
    /// It was to be deleted when a manifest appeared that names it; it stays while that is there.
    Named,
}

impl PackReport {
    pub(super) fn new(decided: &Decided, leases: &[FoundLease]) -> Self {
        let fate = match decided.verdict {
            Verdict::Delete => PackFate::Deleted,
            Verdict::New => PackFate::Condemned,
            Verdict::Grace { until_ms } => PackFate::Grace { until_ms },
            Verdict::Leased { lease } => {
                let lease = &leases[lease];
                let purpose = lease.document.as_ref().map(|d| d.purpose.clone()).unwrap_or_default();
                PackFate::Leased { lease: lease.id.clone(), purpose }
            }
            Verdict::NotAsked => PackFate::NotAsked,
            Verdict::Named => PackFate::Named,
        };
        let condemned = decided.condemned;
        Self { id: condemned.id, len_bytes: decided.len_bytes, condemned_ms: condemned.since_ms, fate }
    }
}

/// A lease that a collection found.
#[derive(Debug, Clone, Serialize)]
pub struct LeaseReport {
    /// The lease.
    pub id: String,
    /// Who holds it; `None` when it cannot be read.
    pub owner: Option<OwnerId>,
    /// What its holder does.
    pub purpose: String,
    /// The list of condemned packs that its holder had read when it began; it protects what was condemned later.
    pub generation: u64,
    /// When it began: milliseconds since 1970, UTC.
    pub started_ms: u64,
    /// Until when it lasts unless it is renewed: milliseconds since 1970, UTC.
    pub expires_ms: u64,
    /// Whether it has expired, or its holder is known to have ended; then it protects nothing.
    pub expired: bool,
}

impl LeaseReport {
    pub(super) fn new(found: &FoundLease) -> Self {
        let document = found.document.as_ref();
        Self {
            id: found.id.clone(),
            owner: document.map(|d| d.owner),
            purpose: document.map(|d| d.purpose.clone()).unwrap_or_default(),
            generation: document.map_or(0, |d| d.generation),
            started_ms: document.map_or(0, |d| d.started_ms),
            expires_ms: document.map_or(0, |d| d.expires_ms),
            expired: found.expired,
        }
    }
}
