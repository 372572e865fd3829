//! What a campaign did, for people.

use std::collections::BTreeMap;
use std::fmt;

/// Counts by name.
#[derive(Debug, Default, Clone)]
pub(crate) struct Figures(BTreeMap<String, u64>);

impl Figures {
    pub(crate) fn count(&mut self, name: &str, more: u64) {
        if more > 0 {
            *self.0.entry(name.to_owned()).or_default() += more;
        }
    }

    pub(crate) fn count_all(&mut self, group: &str, counts: BTreeMap<&'static str, u64>) {
        counts.into_iter().for_each(|(name, count)| self.count(&format!("{group}: {name}"), count));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        other.0.iter().for_each(|(name, count)| self.count(name, *count));
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, count)| writeln!(f, "  {count:>10} {name}"))
    }
}
