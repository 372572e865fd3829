//! One queue's ring: which requests are taken, and answers to them.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::inflight::InflightQueue;
use super::memory::Memory;

/// The largest ring: QEMU's own bound.
pub(super) const MAX_RING_SIZE: u16 = 1024;

/// What makes a ring unusable until the guest sets it up anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingFault {
    #[error("a ring that is not in the guest's memory, or an index that runs ahead of it")]
    Ring,
    #[error("a head that is outside the ring or is in flight already")]
    Head,
}

/// A ring that is being served.
pub(super) struct Ring {
    pub(super) memory: Arc<Memory>,
    queue: Queue,
    inflight: Option<InflightQueue>,
    /// Which heads are taken and not answered.
    taken: Vec<bool>,
    /// How many of them somebody works on.
    running: u16,
    /// Heads that an earlier process has left unanswered, oldest first.
    resubmit: VecDeque<u16>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    is_enabled: bool,
    has_failed: bool,
}

impl Ring {
    /// Starts with a queue that is ready; `resubmit` comes before anything new.
    pub(super) fn new(
        memory: Arc<Memory>,
        queue: Queue,
        inflight: Option<InflightQueue>,
        resubmit: Vec<u16>,
        is_enabled: bool,
    ) -> Self {
        let taken = vec![false; usize::from(queue.size())];
        let (running, has_failed, resubmit) = (0, false, resubmit.into());
        Self { memory, queue, inflight, taken, running, resubmit, call: None, error: None, is_enabled, has_failed }
    }

    /// The address and the size of the descriptor table.
    pub(super) fn table(&self) -> (GuestAddress, u16) {
        (GuestAddress(self.queue.desc_table()), self.queue.size())
    }

    /// Sets where the guest is told about answers, and tells it once: answers may have been given before.
    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        self.call_guest();
    }

    pub(super) fn set_error(&mut self, error: Option<OwnedFd>) {
        self.error = error;
    }

    pub(super) fn enable(&mut self, enable: bool) {
        self.is_enabled = enable;
    }

    fn is_served(&self) -> bool {
        self.is_enabled && !self.has_failed
    }

    /// Takes up to `limit` requests.
    pub(super) fn take(&mut self, heads: &mut Vec<u16>, limit: usize) {
        while self.is_served() && heads.len() < limit {
            match self.take_one() {
                Ok(Some(head)) => heads.push(head),
                Ok(None) => return,
                Err(fault) => self.fail(&fault),
            }
        }
    }

    fn take_one(&mut self) -> Result<Option<u16>, RingFault> {
        let (head, is_new) = match self.resubmit.pop_front() {
            Some(head) => (head, false),
            None => match self.next_head()? {
                Some(head) => (head, true),
                None => return Ok(None),
            },
        };
        // A head that is taken twice would be answered twice, and without bound.
        let taken = self.taken.get_mut(usize::from(head)).ok_or(RingFault::Head)?;
        if std::mem::replace(taken, true) {
            return Err(RingFault::Head);
        }
        self.running += 1;
        if let Some(inflight) = self.inflight.as_mut().filter(|_| is_new) {
            inflight.submitted(head);
        }
        Ok(Some(head))
    }

    fn next_head(&mut self) -> Result<Option<u16>, RingFault> {
        let mut heads = self.queue.iter(&*self.memory).map_err(|_| RingFault::Ring)?;
        Ok(heads.next().map(|chain| chain.head_index()))
    }

    /// Answers the request at `head`, of whose memory `written_bytes` were written. The guest is not told yet.
    pub(super) fn answer(&mut self, head: u16, written_bytes: u32) {
        if let Some(inflight) = &mut self.inflight {
            inflight.answering(head);
        }
        let added = self.queue.add_used(&*self.memory, head, written_bytes);
        if let Some(inflight) = &mut self.inflight {
            inflight.answered(head, self.queue.next_used());
        }
        self.taken[usize::from(head)] = false;
        self.running -= 1;
        if added.is_err() {
            self.fail(&RingFault::Ring);
        }
    }

    /// Gives up a request that cannot be answered, and with it the ring.
    pub(super) fn abandon(&mut self, head: u16, fault: &dyn std::error::Error) {
        if let Some(inflight) = &mut self.inflight {
            inflight.abandoned(head);
        }
        self.running -= 1;
        self.fail(fault);
    }

    fn fail(&mut self, fault: &dyn std::error::Error) {
        if !std::mem::replace(&mut self.has_failed, true) {
            warn!(%fault, "the guest broke a queue, it is not served any more");
            if let Some(error) = &self.error {
                signal(error);
            }
        }
    }

    /// Tells the guest about answers, unless it does not want to know.
    pub(super) fn notify(&mut self) {
        match self.queue.needs_notification(&*self.memory) {
            Ok(true) => self.call_guest(),
            Ok(false) => {}
            Err(_) => self.fail(&RingFault::Ring),
        }
    }

    fn call_guest(&self) {
        if let Some(call) = &self.call {
            signal(call);
        }
    }

    /// Whether there is something to take.
    pub(super) fn has_work(&self) -> bool {
        let is_new = || self.queue.avail_idx(&*self.memory, Ordering::Acquire).map(|index| index.0);
        self.is_served() && (!self.resubmit.is_empty() || is_new().is_ok_and(|index| index != self.queue.next_avail()))
    }

    /// Asks the guest to kick; true if it has added something meanwhile, which then it may not have kicked for.
    pub(super) fn enable_kicks(&mut self) -> bool {
        if !self.is_served() {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more || !self.resubmit.is_empty(),
            Err(_) => {
                self.fail(&RingFault::Ring);
                false
            }
        }
    }

    /// Lets the guest know that kicks are not needed while requests are being looked for.
    pub(super) fn disable_kicks(&mut self) {
        if self.is_served() && self.queue.disable_notification(&*self.memory).is_err() {
            self.fail(&RingFault::Ring);
        }
    }

    /// Whether nobody works on a request.
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0
    }

    /// Where a later start goes on.
    pub(super) fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }
}

fn signal(event: &OwnedFd) {
    // Nothing can be done about a frontend that gave something else than an event counter, or is gone.
    let _ = rustix::io::write(event, &1_u64.to_le_bytes());
}
