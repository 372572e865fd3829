//! Records of requests in flight, in memory that outlives this process: the frontend keeps it, and hands it to the next
//! backend after a crash ("Inflight I/O tracking" in QEMU's `docs/interop/vhost-user.rst`).
//!
//! One region for each queue, each beginning at a multiple of 64 bytes:
//!
//! ```text
//! 0   u64 features (0)
//! 8   u16 version (1; 0 in new memory)
//! 10  u16 number of entries, the queue's size
//! 12  u16 head of the last batch of completed requests
//! 14  u16 used index at which all of that batch was recorded
//! 16      entries, one for each head:
//!         0 u8 in flight, 5 bytes of padding, 6 u16 next head of the batch, 8 u64 place in the order of submission
//! ```
//!
//! A request is marked before it is worked on. When it is answered, its head is written down as the last batch, then
//! the ring's used index moves, then the mark goes and the index is written down. So a process that finds the two
//! indices different knows that the last batch was answered, and one that finds a mark repeats the request: it was
//! never answered, and block requests can be repeated.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, VolatileMemory};

use super::memory::{self, MemoryError};
use super::wire::InflightArea;

const QUEUE_ALIGNMENT: u64 = 64;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const MARK_AT: usize = 0;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Memory that cannot hold the records.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflightError {
    #[error("the region is for {queues} queues of {queue_size}, which this device has not")]
    Shape { queues: u16, queue_size: u16 },
    #[error("the region is too short for its queues")]
    Short,
    #[error("the region's file may shrink")]
    NotSealed,
    #[error("the records are of another kind (version {version}, {entries} entries)")]
    Unknown { version: u16, entries: u16 },
    #[error("cannot make memory for the records")]
    Make(#[source] std::io::Error),
    #[error("cannot map the records")]
    Map(#[source] MemoryError),
}

fn queue_bytes(queue_size: u16) -> u64 {
    (HEADER_BYTES as u64 + ENTRY_BYTES as u64 * u64::from(queue_size)).next_multiple_of(QUEUE_ALIGNMENT)
}

fn check_shape(area: &InflightArea, max_queues: u16, max_queue_size: u16) -> Result<(), InflightError> {
    let fits = (1..=max_queues).contains(&area.queues) && (1..=max_queue_size).contains(&area.queue_size);
    let shape = InflightError::Shape { queues: area.queues, queue_size: area.queue_size };
    if fits { Ok(()) } else { Err(shape) }
}

/// Makes memory for the queues that `asked` names, zeroed and sealed.
pub(super) fn make(
    asked: &InflightArea,
    max_queues: u16,
    max_queue_size: u16,
) -> Result<(InflightArea, OwnedFd), InflightError> {
    check_shape(asked, max_queues, max_queue_size)?;
    let len_bytes = queue_bytes(asked.queue_size) * u64::from(asked.queues);
    let failed = |errno: rustix::io::Errno| InflightError::Make(errno.into());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("vhost-user-inflight", flags).map_err(failed)?;
    rustix::fs::ftruncate(&file, len_bytes).map_err(failed)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
    Ok((InflightArea { len_bytes, offset: 0, ..*asked }, file))
}

/// The records of all queues.
#[derive(Debug)]
pub(super) struct InflightRegion {
    map: MmapRegion<()>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Maps what a frontend has kept.
    pub(super) fn map(
        area: &InflightArea,
        file: OwnedFd,
        max_queues: u16,
        max_queue_size: u16,
    ) -> Result<Self, InflightError> {
        check_shape(area, max_queues, max_queue_size)?;
        if area.len_bytes < queue_bytes(area.queue_size) * u64::from(area.queues) {
            return Err(InflightError::Short);
        }
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(InflightError::NotSealed);
        }
        let map = memory::map(file, area.offset, area.len_bytes).map_err(InflightError::Map)?;
        Ok(Self { map, queues: area.queues, queue_size: area.queue_size })
    }

    /// The records of one queue, if there are any for it and for as many heads.
    pub(super) fn queue(self: &Arc<Self>, index: u16, ring_size: u16) -> Option<InflightQueue> {
        let fits = index < self.queues && ring_size <= self.queue_size;
        let start = usize::try_from(queue_bytes(self.queue_size)).ok()? * usize::from(index);
        fits.then(|| InflightQueue { region: Arc::clone(self), start, counter: 0 })
    }
}

/// What an earlier process has left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    /// Heads to work on again, in the order in which they were submitted.
    pub(super) resubmit: Vec<u16>,
}

/// The records of one queue.
#[derive(Debug)]
pub(super) struct InflightQueue {
    region: Arc<InflightRegion>,
    /// Bytes before this queue's region.
    start: usize,
    /// The next place in the order of submission.
    counter: u64,
}

impl InflightQueue {
    /// Reads what an earlier process has left, with the used index of the ring, and makes the records agree with it.
    pub(super) fn recover(&mut self, ring_used: u16) -> Result<Recovered, InflightError> {
        let (version, entries) = (self.load::<u16>(VERSION_AT), self.load::<u16>(ENTRIES_AT));
        match (version, entries) {
            (0, _) => self.initialise(ring_used),
            (VERSION, entries) if entries == self.region.queue_size => {}
            _ => return Err(InflightError::Unknown { version, entries }),
        }
        self.finish_last_batch(ring_used);
        let mut marked: Vec<(u64, u16)> = (0..self.region.queue_size)
            .filter(|head| self.load::<u8>(self.entry(*head) + MARK_AT) == 1)
            .map(|head| (self.load(self.entry(head) + COUNTER_AT), head))
            .collect();
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { resubmit: marked.into_iter().map(|(_, head)| head).collect() })
    }

    fn initialise(&mut self, ring_used: u16) {
        self.store(ENTRIES_AT, self.region.queue_size);
        self.store(USED_AT, ring_used);
        self.store(VERSION_AT, VERSION);
    }

    /// The ring has moved past what is recorded: these requests were answered, only their marks are left.
    fn finish_last_batch(&mut self, ring_used: u16) {
        let batch = ring_used.wrapping_sub(self.load(USED_AT));
        let mut head: u16 = self.load(LAST_BATCH_AT);
        for _ in 0..batch.min(self.region.queue_size) {
            if head >= self.region.queue_size {
                break;
            }
            self.store(self.entry(head) + MARK_AT, 0_u8);
            head = self.load(self.entry(head) + NEXT_AT);
        }
        self.store(USED_AT, ring_used);
    }

    /// Records that the request at `head` is about to be worked on.
    pub(super) fn submitted(&mut self, head: u16) {
        let entry = self.entry(head);
        self.store(entry + COUNTER_AT, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(entry + MARK_AT, 1_u8);
    }

    /// Records that the ring's used index is about to move past `head`.
    pub(super) fn answering(&mut self, head: u16) {
        self.store(LAST_BATCH_AT, head);
    }

    /// Records that the ring's used index is now `ring_used`, past `head`.
    pub(super) fn answered(&mut self, head: u16, ring_used: u16) {
        self.store(self.entry(head) + MARK_AT, 0_u8);
        self.store(USED_AT, ring_used);
    }

    /// Records that the request at `head` is not going to be answered: its queue is broken, and what the guest puts at
    /// this head after it has reset its device is another request.
    pub(super) fn abandoned(&mut self, head: u16) {
        self.store(self.entry(head) + MARK_AT, 0_u8);
    }

    fn entry(&self, head: u16) -> usize {
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    // Release and acquire, so that no store moves before an earlier one: a kill may come between any two.
    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let slice = self.region.map.as_volatile_slice();
        slice.store(value, self.start + at, Ordering::Release).expect("heads are below the size that was mapped");
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let slice = self.region.map.as_volatile_slice();
        slice.load(self.start + at, Ordering::Acquire).expect("heads are below the size that was mapped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: InflightArea = InflightArea { len_bytes: 0, offset: 0, queues: 2, queue_size: 8 };

    /// The second queue of a region, as each of several processes maps it.
    fn processes() -> impl Fn() -> InflightQueue {
        let (area, file) = make(&ASKED, 2, 8).unwrap();
        move || {
            let region = InflightRegion::map(&area, file.try_clone().unwrap(), 2, 8).unwrap();
            Arc::new(region).queue(1, 8).unwrap()
        }
    }

    #[test]
    fn unanswered_requests_come_back_in_their_order() {
        let process = processes();
        let mut first = process();
        assert!(first.recover(5).unwrap().resubmit.is_empty());
        for head in [3, 0, 7, 2] {
            first.submitted(head);
        }
        first.answering(0);
        first.answered(0, 6);
        let mut second = process();
        assert_eq!(second.recover(6).unwrap().resubmit, [3, 7, 2]);
        second.submitted(1);
        assert_eq!(process().recover(6).unwrap().resubmit, [3, 7, 2, 1], "the order goes on");
    }

    #[test]
    fn a_kill_between_any_two_steps_of_an_answer_loses_and_repeats_nothing_answered() {
        // Before the used index moves the request is not answered; from then on it is.
        for (steps, ring_used, expected) in [(0, 0, vec![4]), (1, 0, vec![4]), (1, 1, vec![]), (2, 1, vec![])] {
            let process = processes();
            let mut first = process();
            first.recover(0).unwrap();
            first.submitted(4);
            if steps >= 1 {
                first.answering(4);
            }
            if steps >= 2 {
                first.answered(4, 1);
            }
            assert_eq!(process().recover(ring_used).unwrap().resubmit, expected, "{steps} steps, index {ring_used}");
        }
    }

    #[test]
    fn a_batch_that_another_backend_recorded_is_followed() {
        let process = processes();
        let mut queue = process();
        queue.recover(0).unwrap();
        for head in 0..4 {
            queue.submitted(head);
        }
        // 2 was answered first, then 0, as one batch.
        queue.store(queue.entry(0) + NEXT_AT, 2_u16);
        queue.store(LAST_BATCH_AT, 0_u16);
        assert_eq!(process().recover(2).unwrap().resubmit, [1, 3]);
    }

    #[test]
    fn records_with_impossible_content_do_no_harm() {
        let process = processes();
        let mut queue = process();
        queue.recover(0).unwrap();
        queue.store(LAST_BATCH_AT, u16::MAX);
        assert!(process().recover(40_000).unwrap().resubmit.is_empty());
        queue.store(ENTRIES_AT, 9_u16);
        assert!(matches!(process().recover(0), Err(InflightError::Unknown { version: 1, entries: 9 })));
    }

    #[test]
    fn regions_of_another_shape_or_that_may_shrink_are_refused() {
        let shape = |queues, queue_size| make(&InflightArea { queues, queue_size, ..ASKED }, 2, 8).is_ok();
        assert!(shape(1, 8) && !shape(3, 8) && !shape(0, 8) && !shape(1, 9) && !shape(1, 0));
        let (area, file) = make(&ASKED, 2, 8).unwrap();
        let short = InflightArea { len_bytes: 64, ..area };
        assert!(matches!(InflightRegion::map(&short, file.try_clone().unwrap(), 2, 8), Err(InflightError::Short)));
        let long = InflightArea { len_bytes: 1 << 20, ..area };
        assert!(matches!(InflightRegion::map(&long, file, 2, 8), Err(InflightError::Map(_))));
        let plain = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(matches!(InflightRegion::map(&area, plain, 2, 8), Err(InflightError::NotSealed)));
    }
}
