//! Garbage collection: packs that no manifest refers to go, in two cycles at least.
//!
//! One cycle: leases that expired are ended, packs are listed, all manifests are read, the next list of
//! condemned packs is put, and only then what an earlier list had condemned is deleted. The decision is
//! in `plan`, the argument for it in docs/design/gc.md.
//!
//! Any number of collections may run on any number of hosts, beside imports, and be killed anywhere.

pub(crate) mod list;
mod plan;
mod report;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

pub use report::{GcReport, LeaseReport, PackFate, PackReport};

use self::list::CondemnedList;
use self::plan::{Decided, LeaseView, Situation, Verdict};
use crate::attachment::AttachmentKind;
use crate::error::StoreError;
use crate::lease::{self, FoundLease};
use crate::pack::PackId;
use crate::published::ContentName;
use crate::scrub::quarantine;
use crate::store::Store;

/// How a collection is to go about it.
#[derive(Debug, Clone)]
pub struct GcOptions {
    /// How long a pack stays after it was condemned, for readers that still have an old manifest.
    pub grace: Duration,
    /// Changes nothing, only says what would be done.
    pub dry_run: bool,
    /// Packs of which less than this share is in use, in percent, are rewritten first; 0 rewrites none.
    pub repack_below_percent: u8,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self { grace: Duration::from_secs(3600), dry_run: false, repack_below_percent: 50 }
    }
}

/// Cycles that free everything at once where no lease protects: one to find that manifests are superseded
/// and to condemn, one to delete, and some for others that collect at the same time.
const SWEEP_CYCLES: u32 = 6;

impl Store {
    /// Runs one cycle of garbage collection, after a repack if one is asked for.
    ///
    /// What is found unused for the first time goes in a later cycle. No import is waited for.
    ///
    /// # Errors
    /// `Corrupt` when a manifest cannot be read, and then nothing was deleted; `Io`, `Timeout`, `NoSpace`.
    pub fn collect(&self, options: &GcOptions) -> Result<GcReport, StoreError> {
        let repack = match options.repack_below_percent {
            0 => None,
            percent => Some(self.repack(percent, options.dry_run)?),
        };
        let report = self.cycle(options, None)?;
        Ok(GcReport { repack, ..report })
    }

    /// Deletes every pack that no manifest refers to and no lease protects, and returns the bytes freed.
    ///
    /// Volumes read through manifests, so a manifest must stay while a volume uses it.
    ///
    /// # Errors
    /// As [`collect`](Self::collect).
    pub fn sweep(&self) -> Result<u64, StoreError> {
        self.cycles(None)
    }

    /// Frees the packs that a failed import has put, as far as nothing else refers to them.
    pub(crate) fn free_leftover(&self, packs: Vec<PackId>) {
        if packs.is_empty() {
            return;
        }
        if let Err(error) = self.cycles(Some(&packs.into_iter().collect())) {
            tracing::warn!(%error, "cannot free the packs of a failed import; a later collection does");
        }
    }

    fn cycles(&self, only: Option<&HashSet<PackId>>) -> Result<u64, StoreError> {
        let options = GcOptions { grace: Duration::ZERO, dry_run: false, repack_below_percent: 0 };
        let mut freed_bytes = 0;
        for _ in 0..SWEEP_CYCLES {
            let report = self.cycle(&options, only)?;
            freed_bytes += report.freed_bytes;
            if !report.goes_on(only) {
                break;
            }
        }
        Ok(freed_bytes)
    }

    fn cycle(&self, options: &GcOptions, only: Option<&HashSet<PackId>>) -> Result<GcReport, StoreError> {
        let mut report = GcReport { dry_run: options.dry_run, ..GcReport::default() };
        // Everything in the order that docs/design/gc.md rests on.
        let attachments = self.objects.list("attachments")?;
        let newest = list::read_newest(&*self.objects)?;
        let leases = lease::survey(&*self.objects, &*self.clock, !options.dry_run)?;
        report.leases = leases.iter().map(LeaseReport::new).collect();
        let live_leases: Vec<_> = leases.into_iter().filter(|lease| !lease.expired).collect();
        let packs = self.list_packs()?;
        let marks = self.mark(&mut |_, _| {})?.all_readable()?;

        let was_readable = newest.list.is_ok();
        let previous = newest.list.unwrap_or_else(|error| {
            // All that is unused is condemned anew: this costs time only.
            tracing::warn!(%error, "the list of condemned packs is damaged; a new one is begun");
            None
        });
        let was_empty =
            was_readable && previous.as_ref().is_none_or(|list| list.packs.is_empty() && list.superseded.is_empty());
        let superseded_before: HashSet<String> =
            previous.iter().flat_map(|list| list.superseded.iter().cloned()).collect();
        let situation = Situation {
            packs: &packs,
            live: &marks.live,
            previous: &previous.map(|list| list.by_id()).unwrap_or_default(),
            generation: newest.generation + 1,
            leases: &live_leases.iter().map(view).collect::<Vec<_>>(),
            now_ms: self.clock.now_ms(),
            grace_ms: u64::try_from(options.grace.as_millis()).unwrap_or(u64::MAX),
            only,
        };
        let decided = plan::plan(&situation);
        report.generation = situation.generation;
        report.packs = decided.iter().map(|decided| PackReport::new(decided, &live_leases)).collect();
        report.superseded_manifests = marks.superseded.len() as u64;
        let nothing_to_say = decided.is_empty() && marks.superseded.is_empty() && was_empty;
        if options.dry_run {
            return Ok(report);
        }
        if !nothing_to_say {
            if !self.put_list(situation.generation, &decided, marks.superseded.clone())? {
                report.overtaken = true;
                return Ok(report);
            }
            self.delete_packs(&decided, &mut report)?;
            let superseded: Vec<_> = marks.superseded.iter().filter(|name| superseded_before.contains(*name)).collect();
            // The editions above them lie beside them.
            self.objects.make_durable(&superseded.iter().map(|name| (*name).clone()).collect::<Vec<_>>())?;
            for name in superseded {
                self.objects.delete(name)?;
                report.deleted_manifests += 1;
            }
            self.objects.delete(&list::object_name(newest.generation))?;
        }
        for name in newest.older {
            self.objects.delete(&name)?;
        }
        if live_leases.is_empty() {
            report.deleted_attachments = self.delete_orphans(&attachments, &marks.contents)?;
        }
        self.forget_quarantine(&packs)?;
        Ok(report)
    }

    /// Puts the next list; `false` when another collection was quicker.
    fn put_list(&self, generation: u64, decided: &[Decided], superseded: Vec<String>) -> Result<bool, StoreError> {
        let condemned = decided.iter().map(|decided| decided.condemned).collect();
        let list = CondemnedList::new(generation, condemned, superseded)?;
        if !self.objects.put_if_absent(&list::object_name(generation), &crate::sealed::encode(&list))? {
            return Ok(false);
        }
        // The name may have been free because others are many generations ahead and have deleted it.
        Ok(list::read_newest(&*self.objects)?.generation == generation)
    }

    fn delete_packs(&self, decided: &[Decided], report: &mut GcReport) -> Result<(), StoreError> {
        for decided in decided.iter().filter(|decided| decided.verdict == Verdict::Delete) {
            self.objects.delete(&decided.condemned.id.object_name())?;
            report.deleted_packs += 1;
            report.freed_bytes += decided.len_bytes;
        }
        Ok(())
    }

    /// Deletes attachments of contents that have no manifest.
    ///
    /// They were listed before the leases: who had put one has published its manifest by now, or has a lease.
    fn delete_orphans(&self, listed: &[(String, u64)], contents: &HashSet<ContentName>) -> Result<u64, StoreError> {
        let mut deleted = 0;
        for (name, _) in listed {
            if AttachmentKind::content_of(name).is_some_and(|content| !contents.contains(&content)) {
                self.objects.delete(name)?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    /// Removes the notes on damaged packs that are gone.
    fn forget_quarantine(&self, packs: &[(PackId, u64)]) -> Result<(), StoreError> {
        let noted = quarantine::packs(&*self.objects)?;
        if noted.is_empty() {
            return Ok(());
        }
        let stored: HashMap<_, _> = packs.iter().copied().collect();
        for id in noted.iter().filter(|id| !stored.contains_key(id)) {
            self.objects.delete(&quarantine::object_name(*id))?;
        }
        Ok(())
    }
}

fn view(lease: &FoundLease) -> LeaseView {
    LeaseView { generation: lease.document.as_ref().map_or(0, |document| document.generation) }
}
