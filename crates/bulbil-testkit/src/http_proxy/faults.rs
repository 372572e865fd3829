//! What goes wrong with which request: told for the next ones, or by chance from a seed.

use std::collections::VecDeque;
use std::time::Duration;

use crate::rng::Rng;

/// What is done to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The server is not asked; the answer is this status: 500, 503.
    Status(u16),
    /// The connection is cut before the server is asked.
    CutBefore,
    /// The server is asked, and the connection cut without its answer.
    CutAfter,
    /// The server is asked, and its answer kept back for ever.
    Silent,
    /// The connection is cut in the middle of the answer's body, or of the request's when it has one.
    Truncate,
    /// The byte at this offset, modulo the length, of the request's body, or else of the answer's, changes.
    Corrupt(u64),
    /// The server is asked twice, and the second answer given.
    Duplicate,
    /// The request waits this much longer.
    Slow(Duration),
}

/// What happens by chance.
#[derive(Debug, Clone, Default)]
pub struct HttpFaultRates {
    /// Decides together with the order of requests.
    pub seed: u64,
    /// Of a thousand requests, so many have this done to them. The offset of a `Corrupt` is drawn anew.
    pub per_thousand: Vec<(Fault, u32)>,
}

impl HttpFaultRates {
    /// Everything but `Corrupt` and `Silent`, each to so many requests of a thousand.
    #[must_use]
    pub fn all(seed: u64, per_thousand: u32) -> Self {
        let faults = [
            Fault::Status(500),
            Fault::Status(503),
            Fault::CutBefore,
            Fault::CutAfter,
            Fault::Truncate,
            Fault::Duplicate,
            Fault::Slow(Duration::from_millis(20)),
        ];
        Self { seed, per_thousand: faults.map(|fault| (fault, per_thousand)).to_vec() }
    }

    /// The same and one more kind.
    #[must_use]
    pub fn and(mut self, fault: Fault, per_thousand: u32) -> Self {
        self.per_thousand.push((fault, per_thousand));
        self
    }
}

#[derive(Debug)]
pub(super) struct Plan {
    told: VecDeque<(String, Fault)>,
    rates: Vec<(Fault, u32)>,
    rng: Rng,
    done: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self::new(&HttpFaultRates::default())
    }
}

impl Plan {
    pub(super) fn new(rates: &HttpFaultRates) -> Self {
        let rng = Rng::new(rates.seed);
        Self { told: VecDeque::new(), rates: rates.per_thousand.clone(), rng, done: 0 }
    }

    pub(super) fn set_rates(&mut self, rates: &HttpFaultRates) {
        self.rates.clone_from(&rates.per_thousand);
        self.rng = Rng::new(rates.seed);
    }

    pub(super) fn inject(&mut self, method: &str, fault: Fault, requests: usize) {
        self.told.extend(std::iter::repeat_n((method.to_owned(), fault), requests));
    }

    pub(super) fn done(&self) -> u64 {
        self.done
    }

    pub(super) fn next(&mut self, method: &str) -> Option<Fault> {
        let told = self.told.iter().position(|(wanted, _)| wanted.is_empty() || wanted == method);
        let fault = match told {
            Some(index) => self.told.remove(index).map(|(_, fault)| fault),
            None => self.by_chance(),
        };
        self.done += u64::from(fault.is_some());
        fault
    }

    fn by_chance(&mut self) -> Option<Fault> {
        let mut drawn = self.rng.below(1000);
        for (fault, per_thousand) in &self.rates {
            match drawn.checked_sub(u64::from(*per_thousand)) {
                Some(rest) => drawn = rest,
                None if matches!(fault, Fault::Corrupt(_)) => return Some(Fault::Corrupt(self.rng.below(u64::MAX))),
                None => return Some(*fault),
            }
        }
        None
    }
}
