//! When a second request is worth it: the answer is later than 95 % of recent ones were.
//!
//! Requests are told apart by how much they ask for, since large ones take longer by nature. A budget
//! keeps the extra requests below 5 %: when all answers are late, the service is overloaded, and more
//! requests would not help it.
//!
//! Lock-free: many threads read at once.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Durations remembered for each size class.
const REMEMBERED: usize = 256;

/// Too few to say what is usual.
const LEAST_SAMPLES: u64 = 32;

/// Sorting is not for every request.
const SAMPLES_BETWEEN_UPDATES: u64 = 16;

/// Hedges are paid in parts: each request earns one, a hedge costs twenty.
const PRICE: i64 = 20;

/// At most ten hedges may be saved up.
const MOST_SAVED: i64 = 10 * PRICE;

/// Until it is known what is usual.
const UNKNOWN_US: u64 = 500_000;

/// Up to 64 KiB, up to 512 KiB, and more.
const CLASS_LIMITS: [usize; 2] = [64 << 10, 512 << 10];

/// Recent durations of one class of sizes.
#[derive(Debug)]
struct Class {
    durations_us: [AtomicU32; REMEMBERED],
    count: AtomicU64,
    p95_us: AtomicU64,
}

impl Default for Class {
    fn default() -> Self {
        Self {
            durations_us: [const { AtomicU32::new(0) }; REMEMBERED],
            count: AtomicU64::new(0),
            p95_us: AtomicU64::new(UNKNOWN_US),
        }
    }
}

/// Decides when a read gets a second request.
#[derive(Debug)]
pub(super) struct Hedging {
    classes: [Class; CLASS_LIMITS.len() + 1],
    saved: AtomicI64,
}

impl Default for Hedging {
    fn default() -> Self {
        Self { classes: Default::default(), saved: AtomicI64::new(PRICE) }
    }
}

impl Hedging {
    fn class(&self, len_bytes: usize) -> &Class {
        &self.classes[CLASS_LIMITS.iter().filter(|limit| len_bytes > **limit).count()]
    }

    /// Takes note of a read that succeeded.
    pub(super) fn record(&self, len_bytes: usize, took: Duration) {
        let class = self.class(len_bytes);
        let index = class.count.fetch_add(1, Ordering::Relaxed);
        let slot = usize::try_from(index % REMEMBERED as u64).expect("below 256");
        class.durations_us[slot].store(u32::try_from(took.as_micros()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let count = index + 1;
        if count >= LEAST_SAMPLES && count.is_multiple_of(SAMPLES_BETWEEN_UPDATES) {
            let known = usize::try_from(count).unwrap_or(REMEMBERED).min(REMEMBERED);
            let mut durations: Vec<_> =
                class.durations_us[..known].iter().map(|slot| slot.load(Ordering::Relaxed)).collect();
            let (_, p95, _) = durations.select_nth_unstable(known * 95 / 100);
            class.p95_us.store(u64::from(*p95), Ordering::Relaxed);
        }
    }

    /// After which time a read of this length is late.
    pub(super) fn late_after(&self, len_bytes: usize, at_least: Duration) -> Duration {
        Duration::from_micros(self.class(len_bytes).p95_us.load(Ordering::Relaxed)).max(at_least)
    }

    /// Counts a read, which earns a part of a hedge.
    pub(super) fn earn(&self) {
        let add = |saved: i64| (saved < MOST_SAVED).then_some(saved + 1);
        let _ = self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Pays for a hedge; `false` when the budget is used up.
    pub(super) fn spend(&self) -> bool {
        let take = |saved: i64| (saved >= PRICE).then_some(saved - PRICE);
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: Duration = Duration::from_millis(50);

    #[test]
    fn late_is_what_is_later_than_nearly_all() {
        let hedging = Hedging::default();
        assert_eq!(hedging.late_after(1000, LEAST), Duration::from_millis(500), "nothing is known yet");
        for i in 0..256 {
            hedging.record(1000, Duration::from_millis(if i % 32 == 0 { 900 } else { 80 }));
        }
        assert_eq!(hedging.late_after(1000, LEAST), Duration::from_millis(80));
        assert_eq!(hedging.late_after(128 << 10, LEAST), Duration::from_millis(500), "another class of sizes");
        for _ in 0..256 {
            hedging.record(1000, Duration::from_millis(2));
        }
        assert_eq!(hedging.late_after(1000, LEAST), LEAST);
    }

    #[test]
    fn hedges_stay_below_a_twentieth_of_the_reads() {
        let hedging = Hedging::default();
        let hedged = (0..10_000).filter(|_| {
            hedging.earn();
            hedging.spend()
        });
        assert_eq!(hedged.count(), 501, "one is given, and 5 % earned");
    }
}
