//! One connection of a frontend: what it sets up, and the queues that run by it.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tracing::{debug, info};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::config::{self, F_EVENT_IDX, F_FLUSH};
use super::execute::Disk;
use super::inflight::{self, InflightError, InflightRegion};
use super::lock;
use super::memory::{self, Memory, MemoryError};
use super::queue::{QueueParts, RunningQueue};
use super::ring::{MAX_RING_SIZE, Ring};
use super::server::Backend;
use super::wire::{
    self, F_PROTOCOL_FEATURES, HEADER_BYTES, Header, MAX_FDS, Region, Request, RingAddresses, WireError, protocol,
};

/// Protocol features that are offered.
const PROTOCOL_FEATURES: u64 =
    protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ | protocol::CONFIG | protocol::INFLIGHT_SHMFD;

/// Why a connection ended before the frontend closed it.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("the socket failed")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A request that cannot be carried out. The frontend is told if it asked to be; otherwise the connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("feature bits that were not offered: {0:#x}")]
    Features(u64),
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queue {0} runs, it cannot be changed")]
    Running(usize),
    #[error("queue {queue} cannot be {what}")]
    BadQueue { queue: usize, what: &'static str },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("cannot start the thread of a queue")]
    Thread(#[source] io::Error),
}

/// What goes back to the frontend.
enum Answer {
    /// An acknowledgement, if it was asked for.
    Done,
    Reply(Vec<u8>),
    ReplyWithFd(Vec<u8>, OwnedFd),
}

/// A queue as it is being set up, and running.
#[derive(Default)]
struct QueueState {
    size: u16,
    base: u16,
    /// Guest addresses of descriptor table, available ring and used ring.
    addresses: Option<[u64; 3]>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    is_enabled: bool,
    running: Option<RunningQueue>,
}

pub(super) struct Session {
    backend: Arc<Backend>,
    stream: Arc<UnixStream>,
    features: u64,
    protocol_features: u64,
    table: Vec<Region>,
    memory: Option<Arc<Memory>>,
    inflight: Option<Arc<InflightRegion>>,
    queues: Vec<QueueState>,
}

impl Session {
    pub(super) fn new(backend: Arc<Backend>, stream: Arc<UnixStream>) -> Self {
        let queues = (0..backend.options.queues).map(|_| QueueState::default()).collect();
        let (features, protocol_features, table, memory, inflight) = (0, 0, Vec::new(), None, None);
        Self { backend, stream, features, protocol_features, table, memory, inflight, queues }
    }

    /// Serves until the frontend closes the connection, or it is shut down.
    pub(super) fn serve(mut self) -> Result<(), SessionError> {
        let served = self.serve_requests();
        *lock(&self.backend.channel) = None;
        // Every request that was taken is answered before another connection can begin: its resubmission must not meet
        // the original.
        self.stop_queues();
        served
    }

    fn serve_requests(&mut self) -> Result<(), SessionError> {
        while let Some((header, payload, fds)) = receive(&self.stream).map_err(SessionError::Socket)? {
            let request = Request::parse(header.request, &payload, fds.len())?;
            debug!(?request, "request of the frontend");
            let handled = self.handle(request, fds);
            self.answer(&header, handled)?;
        }
        Ok(())
    }

    fn answer(&self, header: &Header, handled: Result<Answer, Refusal>) -> Result<(), SessionError> {
        let wants_ack = header.needs_reply && self.protocol_features & protocol::REPLY_ACK != 0;
        let acknowledge = |failed: u64| self.send(&wire::reply(header.request, &failed.to_le_bytes()), None);
        match handled {
            Ok(Answer::Reply(payload)) => self.send(&wire::reply(header.request, &payload), None),
            Ok(Answer::ReplyWithFd(payload, fd)) => self.send(&wire::reply(header.request, &payload), Some(fd.as_fd())),
            Ok(Answer::Done) if wants_ack => acknowledge(0),
            Ok(Answer::Done) => Ok(()),
            Err(refusal) if wants_ack => {
                info!(%refusal, "request of the frontend refused");
                acknowledge(1)
            }
            Err(refusal) => return Err(refusal.into()),
        }
        .map_err(SessionError::Socket)
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let mut fds = VecDeque::from(fds);
        let reply = |payload: &[u8]| Ok(Answer::Reply(payload.to_vec()));
        match request {
            Request::GetFeatures => return reply(&self.offered_features().to_le_bytes()),
            Request::GetProtocolFeatures => return reply(&PROTOCOL_FEATURES.to_le_bytes()),
            Request::GetQueueCount => return reply(&u64::from(self.backend.options.queues).to_le_bytes()),
            Request::GetConfig { offset, len } => return reply(&self.config(offset, len)),
            Request::GetRingBase { index } => {
                let base = self.stop_queue(index)?;
                return reply(&wire::ring_state_payload(index, base));
            }
            Request::GetInflight(asked) => {
                let (area, file) = inflight::make(&asked, self.backend.options.queues, MAX_RING_SIZE)?;
                return Ok(Answer::ReplyWithFd(wire::inflight_payload(&area).to_vec(), file));
            }
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => {
                check_offered(features, PROTOCOL_FEATURES)?;
                self.protocol_features = features;
            }
            // A guest that resets its device reaches this as stopped queues. The cache mode cannot be switched.
            Request::SetOwner | Request::SetConfig => {}
            Request::ResetOwner => self.stop_queues(),
            Request::SetMemoryTable(table) => self.set_memory(table, fds.into())?,
            Request::SetRingSize { index, size } => self.set_ring_size(index, size)?,
            Request::SetRingBase { index, base } => {
                let base = u16::try_from(base).map_err(|_| bad_queue(index, "started there"))?;
                self.stopped_queue(index)?.base = base;
            }
            Request::SetRingAddresses(addresses) => self.set_ring_addresses(&addresses)?,
            Request::SetRingKick { index, .. } => self.start_queue(index, fds.pop_front())?,
            Request::SetRingCall { index, .. } => self.set_ring_call(index, fds.pop_front())?,
            Request::SetRingError { index, .. } => self.queue(index)?.error = fds.pop_front(),
            Request::EnableRing { index, enable } => {
                let queue = self.queue(index)?;
                queue.is_enabled = enable;
                if let Some(running) = &queue.running {
                    running.shared().update(|ring| ring.enable(enable));
                }
            }
            Request::SetBackendChannel => *lock(&self.backend.channel) = fds.pop_front(),
            Request::SetInflight(area) => {
                if let Some(queue) = self.queues.iter().position(|queue| queue.running.is_some()) {
                    return Err(Refusal::Running(queue));
                }
                let file = fds.pop_front().ok_or(InflightError::Short)?;
                let region = InflightRegion::map(&area, file, self.backend.options.queues, MAX_RING_SIZE)?;
                self.inflight = Some(Arc::new(region));
            }
        }
        Ok(Answer::Done)
    }

    fn offered_features(&self) -> u64 {
        config::features(self.backend.device.is_read_only(), self.backend.options.queues)
    }

    fn config(&self, offset: u32, len: u32) -> Vec<u8> {
        let space = config::space(self.backend.device.size_bytes(), self.backend.options.queues, offset, len);
        wire::config_payload(offset, &space)
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        check_offered(features, self.offered_features())?;
        self.features = features;
        Ok(())
    }

    fn set_memory(&mut self, table: Vec<Region>, files: Vec<OwnedFd>) -> Result<(), Refusal> {
        let memory = Arc::new(memory::map_table(&table, files)?);
        for running in self.queues.iter().filter_map(|queue| queue.running.as_ref()) {
            running.shared().update(|ring| ring.memory = Arc::clone(&memory));
        }
        (self.table, self.memory) = (table, Some(memory));
        Ok(())
    }

    fn queue(&mut self, index: u32) -> Result<&mut QueueState, Refusal> {
        self.queues.get_mut(index as usize).ok_or(Refusal::NoQueue(index))
    }

    fn stopped_queue(&mut self, index: u32) -> Result<&mut QueueState, Refusal> {
        let queue = self.queue(index)?;
        if queue.running.is_some() { Err(Refusal::Running(index as usize)) } else { Ok(queue) }
    }

    fn set_ring_size(&mut self, index: u32, size: u32) -> Result<(), Refusal> {
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_RING_SIZE);
        self.stopped_queue(index)?.size = size.ok_or_else(|| bad_queue(index, "of that size"))?;
        Ok(())
    }

    fn set_ring_addresses(&mut self, told: &RingAddresses) -> Result<(), Refusal> {
        let find = |address| memory::to_guest_address(&self.table, address);
        let found = (find(told.descriptors), find(told.available), find(told.used));
        let (Some(descriptors), Some(available), Some(used)) = found else {
            return Err(bad_queue(told.index, "outside the guest's memory"));
        };
        let addresses = Some([descriptors, available, used]);
        let queue = self.queue(told.index)?;
        // Told again while it runs, only to switch a log of writes, which is not offered.
        if queue.running.is_some() && queue.addresses != addresses {
            return Err(Refusal::Running(told.index as usize));
        }
        queue.addresses = addresses;
        Ok(())
    }

    fn set_ring_call(&mut self, index: u32, call: Option<OwnedFd>) -> Result<(), Refusal> {
        let queue = self.queue(index)?;
        match &queue.running {
            Some(running) => running.shared().update(|ring| ring.set_call(call)),
            None => queue.call = call,
        }
        Ok(())
    }

    fn start_queue(&mut self, index: u32, kick: Option<OwnedFd>) -> Result<(), Refusal> {
        self.stopped_queue(index)?;
        // Without one the ring would have to be polled for ever.
        let kick = kick.ok_or_else(|| bad_queue(index, "served without kicks"))?;
        let ring = self.make_ring(index)?;
        let parts = QueueParts {
            kick,
            disk: self.disk(),
            workers: Arc::clone(&self.backend.workers),
            counters: Arc::clone(&self.backend.counters),
            max_polling: self.backend.options.max_polling,
        };
        let running = RunningQueue::start(index as usize, ring, parts).map_err(Refusal::Thread)?;
        self.queue(index)?.running = Some(running);
        Ok(())
    }

    fn disk(&self) -> Disk {
        let device = Arc::clone(&self.backend.device);
        Disk { device, id: self.backend.id, write_through: self.features & F_FLUSH == 0 }
    }

    fn make_ring(&mut self, index: u32) -> Result<Ring, Refusal> {
        let has_event_idx = self.features & F_EVENT_IDX != 0;
        // Without this feature there is no request to enable a queue.
        let is_always_enabled = self.features & F_PROTOCOL_FEATURES == 0;
        let memory = self.memory.clone().ok_or_else(|| bad_queue(index, "served without memory"))?;
        let region = self.inflight.clone();
        let counters = Arc::clone(&self.backend.counters);
        let state = self.queue(index)?;
        let mut queue = ready_queue(state, has_event_idx, &memory).ok_or_else(|| bad_queue(index, "placed there"))?;
        let used = queue.used_idx(&*memory, std::sync::atomic::Ordering::Acquire);
        let used = used.map_err(|_| bad_queue(index, "placed there"))?.0;
        queue.set_next_used(used);
        queue.set_next_avail(state.base);
        let number = u16::try_from(index).map_err(|_| Refusal::NoQueue(index))?;
        let mut records = region.and_then(|region| region.queue(number, state.size));
        let mut resubmit = Vec::new();
        if let Some(records) = &mut records {
            resubmit = records.recover(used)?.resubmit;
            let taken = u16::try_from(resubmit.len()).expect("no more than a ring has heads");
            // What the frontend says is the used index where a backend has crashed; the records know better.
            queue.set_next_avail(used.wrapping_add(taken));
            counters.resubmitted.fetch_add(taken.into(), std::sync::atomic::Ordering::Relaxed);
            if taken > 0 {
                info!(queue = number, requests = taken, "going on with requests that were left unanswered");
            }
        }
        let mut ring = Ring::new(memory, queue, records, resubmit, is_always_enabled || state.is_enabled);
        ring.set_error(state.error.take());
        ring.set_call(state.call.take());
        Ok(ring)
    }

    fn stop_queue(&mut self, index: u32) -> Result<u16, Refusal> {
        let queue = self.queue(index)?;
        if let Some(mut running) = queue.running.take() {
            queue.base = running.stop();
        }
        Ok(queue.base)
    }

    fn stop_queues(&mut self) {
        for queue in &mut self.queues {
            queue.running = None;
        }
    }

    fn send(&self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        send(&self.stream, message, fd)
    }
}

fn check_offered(features: u64, offered: u64) -> Result<(), Refusal> {
    let others = features & !offered;
    if others == 0 { Ok(()) } else { Err(Refusal::Features(others)) }
}

fn bad_queue(index: u32, what: &'static str) -> Refusal {
    Refusal::BadQueue { queue: index as usize, what }
}

/// The queue that was described, if it lies in the guest's memory.
fn ready_queue(state: &QueueState, has_event_idx: bool, memory: &Memory) -> Option<Queue> {
    let [descriptors, available, used] = state.addresses?;
    let mut queue = Queue::new(MAX_RING_SIZE).ok()?;
    queue.try_set_size(state.size).ok()?;
    queue.try_set_desc_table_address(GuestAddress(descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(available)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(used)).ok()?;
    queue.set_event_idx(has_event_idx);
    queue.set_ready(true);
    // Address 0 means "not set" to the crate.
    (available != 0 && queue.is_valid(memory)).then_some(queue)
}

type Message = (Header, Vec<u8>, Vec<OwnedFd>);

/// Receives a message; `None` when the connection was closed between two.
fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; HEADER_BYTES];
    let mut fds = Vec::new();
    if !fill(stream, &mut header, &mut fds)? {
        return Ok(None);
    }
    let header = Header::parse(&header).map_err(io::Error::other)?;
    let mut payload = vec![0; header.payload_bytes];
    if !fill(stream, &mut payload, &mut fds)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((header, payload, fds)))
}

/// Fills `buf`; false at the end of the stream before the first byte.
fn fill(stream: &UnixStream, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buf.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buf[filled..])];
        let received = match rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?.bytes,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        // Beyond what one message can carry nothing is kept open.
        fds.truncate(MAX_FDS + 1);
        match received {
            0 if filled == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(true)
}

/// Sends a message, with a file descriptor beside its first byte.
fn send(stream: &UnixStream, mut message: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    while !message.is_empty() {
        let fds: Vec<_> = fd.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let slices = [io::IoSlice::new(message)];
        match rustix::net::sendmsg(stream, &slices, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => {
                message = &message[other?..];
                fd = None;
            }
        }
    }
    Ok(())
}
