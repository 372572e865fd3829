//! What a collection does: a pure decision.
//!
//! A pack may be deleted when nothing refers to it, an earlier list named it already, the grace time
//! has passed, and every live lease has read a list that names it. Why this suffices is told in
//! docs/design/gc.md.

use std::collections::{HashMap, HashSet};

use super::list::Condemned;
use crate::pack::PackId;

/// A lease as the decision sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseView {
    /// The newest list that its holder had read when it began; 0 when it may not have read one yet.
    pub(crate) generation: u64,
}

/// What is known when the decision is made.
#[derive(Debug)]
pub(crate) struct Situation<'a> {
    /// Every pack object with its size.
    pub(crate) packs: &'a [(PackId, u64)],
    /// Packs that some manifest refers to.
    pub(crate) live: &'a HashSet<PackId>,
    /// The newest list, by pack; empty when there is none.
    pub(crate) previous: &'a HashMap<PackId, Condemned>,
    /// The generation that is being made: one more than that of the newest list.
    pub(crate) generation: u64,
    /// Leases that have not ended.
    pub(crate) leases: &'a [LeaseView],
    /// The time of day.
    pub(crate) now_ms: u64,
    /// How long a pack stays after it was condemned.
    pub(crate) grace_ms: u64,
    /// When given, no other packs are deleted.
    pub(crate) only: Option<&'a HashSet<PackId>>,
}

/// Why a pack that nothing refers to goes or stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is deleted.
    Delete,
    /// It was condemned only now.
    New,
    /// Its grace time lasts until this time of day.
    Grace { until_ms: u64 },
    /// A lease, by its position, may refer to it.
    Leased { lease: usize },
    /// Others are asked for.
    NotAsked,
    /// It was to go, and then a manifest named it that nobody was told of: it stays while that is there.
    Named,
}

/// A pack in the next list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decided {
    pub(crate) condemned: Condemned,
    pub(crate) len_bytes: u64,
    pub(crate) verdict: Verdict,
}

/// Decides for every pack that nothing refers to.
pub(crate) fn plan(situation: &Situation<'_>) -> Vec<Decided> {
    let mut decided: Vec<_> = situation.packs.iter().filter_map(|pack| decide(situation, *pack)).collect();
    decided.sort_unstable_by_key(|d| d.condemned.id);
    decided
}

fn decide(situation: &Situation<'_>, (id, len_bytes): (PackId, u64)) -> Option<Decided> {
    let previous = situation.previous.get(&id);
    if situation.live.contains(&id) {
        // Never back to the living: whoever decided to delete it may still do so.
        let doomed = previous.filter(|condemned| condemned.doomed)?;
        return Some(Decided { condemned: *doomed, len_bytes, verdict: Verdict::Named });
    }
    let fresh = Condemned { id, generation: situation.generation, since_ms: situation.now_ms, doomed: false };
    let mut condemned = previous.copied().unwrap_or(fresh);
    let verdict = if previous.is_some() { verdict(situation, &condemned) } else { Verdict::New };
    condemned.doomed |= verdict == Verdict::Delete;
    Some(Decided { condemned, len_bytes, verdict })
}

fn verdict(situation: &Situation<'_>, condemned: &Condemned) -> Verdict {
    if let Some(lease) = situation.leases.iter().position(|lease| lease.generation < condemned.generation) {
        return Verdict::Leased { lease };
    }
    if condemned.doomed {
        // Decided before, by a collection that was cut short.
        return Verdict::Delete;
    }
    if situation.only.is_some_and(|only| !only.contains(&condemned.id)) {
        return Verdict::NotAsked;
    }
    let until_ms = condemned.since_ms.saturating_add(situation.grace_ms);
    // A time in the future is of another clock: it is not waited for longer than the grace time.
    let waits =
        situation.now_ms < until_ms && condemned.since_ms <= situation.now_ms.saturating_add(situation.grace_ms);
    if waits { Verdict::Grace { until_ms } } else { Verdict::Delete }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACK: PackId = PackId([1; 16]);

    struct Case {
        previous: Option<Condemned>,
        leases: Vec<u64>,
        live: bool,
        now_ms: u64,
        only: Option<PackId>,
    }

    fn condemned(generation: u64, since_ms: u64) -> Condemned {
        Condemned { id: PACK, generation, since_ms, doomed: false }
    }

    fn case(previous: Option<Condemned>, leases: &[u64]) -> Case {
        Case { previous, leases: leases.to_vec(), live: false, now_ms: 10_000, only: None }
    }

    fn check(case: &Case, expected: Option<Verdict>) -> Option<Decided> {
        let leases: Vec<_> = case.leases.iter().map(|generation| LeaseView { generation: *generation }).collect();
        let decided = plan(&Situation {
            packs: &[(PACK, 77)],
            live: &case.live.then_some(PACK).into_iter().collect(),
            previous: &case.previous.map(|c| (PACK, c)).into_iter().collect(),
            generation: 6,
            leases: &leases,
            now_ms: case.now_ms,
            grace_ms: 1000,
            only: case.only.map(|id| [id].into()).as_ref(),
        });
        assert_eq!(decided.first().map(|d| d.verdict), expected);
        decided.first().copied()
    }

    #[test]
    fn a_pack_is_condemned_first_and_deleted_later() {
        let first = check(&case(None, &[]), Some(Verdict::New)).unwrap().condemned;
        assert_eq!(first, Condemned { id: PACK, generation: 6, since_ms: 10_000, doomed: false });
        let second = check(&case(Some(condemned(5, 9000)), &[]), Some(Verdict::Delete)).unwrap().condemned;
        assert_eq!((second.generation, second.since_ms, second.doomed), (5, 9000, true), "it stays in the list");
    }

    #[test]
    fn a_pack_that_is_named_again_is_not_condemned_any_more() {
        check(&Case { live: true, ..case(Some(condemned(5, 0)), &[]) }, None);
        check(&Case { live: true, ..case(None, &[]) }, None);
    }

    #[test]
    fn the_grace_time_is_waited_for() {
        check(&case(Some(condemned(5, 9001)), &[]), Some(Verdict::Grace { until_ms: 10_001 }));
        check(&case(Some(condemned(5, 9000)), &[]), Some(Verdict::Delete));
    }

    #[test]
    fn a_clock_that_is_ahead_delays_nothing_for_ever() {
        check(&case(Some(condemned(5, u64::MAX)), &[]), Some(Verdict::Delete));
        check(&case(Some(condemned(5, 10_500)), &[]), Some(Verdict::Grace { until_ms: 11_500 }));
    }

    #[test]
    fn a_lease_that_has_not_read_the_list_protects() {
        check(&case(Some(condemned(5, 0)), &[5, 6]), Some(Verdict::Delete));
        check(&case(Some(condemned(5, 0)), &[5, 4]), Some(Verdict::Leased { lease: 1 }));
        check(&case(Some(condemned(1, 0)), &[0]), Some(Verdict::Leased { lease: 0 }));
    }

    #[test]
    fn what_was_doomed_is_deleted_by_the_next_collection_and_never_lives_again() {
        let doomed = Condemned { doomed: true, ..condemned(5, 10_000) };
        check(&case(Some(doomed), &[]), Some(Verdict::Delete));
        check(&case(Some(doomed), &[4]), Some(Verdict::Leased { lease: 0 }));
        let named = check(&Case { live: true, ..case(Some(doomed), &[]) }, Some(Verdict::Named));
        assert!(named.unwrap().condemned.doomed);
    }

    #[test]
    fn packs_that_are_not_asked_for_stay() {
        let other = PackId([2; 16]);
        check(&Case { only: Some(other), ..case(Some(condemned(5, 0)), &[]) }, Some(Verdict::NotAsked));
        check(&Case { only: Some(PACK), ..case(Some(condemned(5, 0)), &[]) }, Some(Verdict::Delete));
    }
}
