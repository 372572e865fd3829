//! A guest's driver for virtio-blk and its machine's end of the control socket, by the crate `vhost`.

#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const MEMORY_BYTES: u64 = 16 << 20;
/// Where the guest's memory begins: not at zero, so that addresses must be translated.
pub(crate) const MEMORY_AT: u64 = 0x10_0000;
pub(crate) const RING_SIZE: u16 = 128;

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const DESC_NEXT: u16 = 1;
pub(crate) const DESC_WRITE: u16 = 2;
pub(crate) const DESC_INDIRECT: u16 = 4;

const PATIENCE: Duration = Duration::from_secs(30);

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// One queue as its driver sees it. Ring and memory stay when the backend goes.
pub(crate) struct DriverQueue {
    /// Guest address of the descriptor table; the rings are behind it.
    pub(crate) table: u64,
    next_avail: u16,
    next_used: u16,
    kick: EventFd,
    call: EventFd,
    pub(crate) error: EventFd,
}

/// A machine with memory that is shared with backends.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap<()>,
    file: File,
    user_address: u64,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) inflight: Option<(VhostUserInflight, File)>,
    features: u64,
}

impl Guest {
    /// A guest with so many queues that takes every feature except those of `without`.
    pub(crate) fn new(queues: u16, without: u64) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY_BYTES).unwrap();
        let file = File::from(file);
        let mapped = FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(mapped, MEMORY_BYTES as usize).unwrap();
        let user_address = map.as_ptr() as u64;
        let region = GuestRegionMmap::new(map, GuestAddress(MEMORY_AT)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = |index: u16| DriverQueue {
            table: MEMORY_AT + u64::from(index) * 0x4000,
            next_avail: 0,
            next_used: 0,
            kick: event(),
            call: event(),
            error: event(),
        };
        let queues = (0..queues).map(queue).collect();
        Self { memory, file, user_address, queues, inflight: None, features: !without }
    }

    /// Connects to a backend and starts all queues, with the records of an earlier one if there are any.
    pub(crate) fn connect(&mut self, socket: &Path) -> Machine {
        let stream = connect(socket);
        let control = stream.try_clone().unwrap();
        let mut frontend = Frontend::from_stream(stream, self.queues.len() as u64);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        frontend.set_features(offered & self.features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::BACKEND_REQ));
        frontend.set_protocol_features(protocol).unwrap();
        // From here on every request is acknowledged.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (channel, theirs) = UnixStream::pair().unwrap();
        frontend.set_backend_request_fd(&theirs).unwrap();
        if self.inflight.is_none() {
            let asked = VhostUserInflight::new(0, 0, self.queues.len() as u16, RING_SIZE);
            self.inflight = Some(frontend.get_inflight_fd(&asked).unwrap());
        }
        let (area, file) = self.inflight.as_ref().unwrap();
        frontend.set_inflight_fd(area, file.as_raw_fd()).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: MEMORY_AT,
            memory_size: MEMORY_BYTES,
            userspace_addr: self.user_address,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let mut machine = Machine { frontend, channel, control, offered };
        for index in 0..self.queues.len() {
            let used = self.used_index(index);
            machine.start_queue(self, index, used);
        }
        machine
    }

    fn user(&self, address: u64) -> u64 {
        address - MEMORY_AT + self.user_address
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        let used = self.queues[queue].used_ring();
        self.memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap()
    }

    /// Empties a queue, as a driver that resets its device does.
    pub(crate) fn reset_queue(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        (queue.next_avail, queue.next_used) = (0, 0);
        self.memory.write_slice(&[0; 0x4000], GuestAddress(queue.table)).unwrap();
    }

    pub(crate) fn set_desc(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Makes a chain available without a kick.
    pub(crate) fn offer(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let slot = queue.available_ring() + 4 + u64::from(queue.next_avail % RING_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        queue.next_avail = queue.next_avail.wrapping_add(1);
        self.memory.store(queue.next_avail, GuestAddress(queue.available_ring() + 2), Ordering::Release).unwrap();
    }

    /// Makes the available ring's index whatever a hostile driver wants.
    pub(crate) fn set_available_index(&self, index: usize, value: u16) {
        let at = self.queues[index].available_ring() + 2;
        self.memory.store(value, GuestAddress(at), Ordering::Release).unwrap();
    }

    pub(crate) fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    /// Offers a request of a header, data and a status, with the first descriptor at `head`, which has room for three.
    pub(crate) fn submit(&mut self, index: usize, head: u16, kind: u32, sector: u64, data: (u64, u32)) {
        let table = self.queues[index].table;
        let header = self.header_address(index, head);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(header)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(header + 16)).unwrap();
        let takes = matches!(kind, WRITE | DISCARD | WRITE_ZEROES);
        let data_flags = DESC_NEXT | if takes { 0 } else { DESC_WRITE };
        let status = Desc { address: header + 16, len: 1, flags: DESC_WRITE, next: 0 };
        self.set_desc(table, head, Desc { address: header, len: 16, flags: DESC_NEXT, next: head + 1 });
        if data.1 == 0 {
            self.set_desc(table, head + 1, status);
        } else {
            let data = Desc { address: data.0, len: data.1, flags: data_flags, next: head + 2 };
            self.set_desc(table, head + 1, data);
            self.set_desc(table, head + 2, status);
        }
        self.offer(index, head);
        self.kick(index);
    }

    /// Header and status of the request at `head`.
    fn header_address(&self, index: usize, head: u16) -> u64 {
        self.queues[index].table + 0x2000 + u64::from(head) * 32
    }

    pub(crate) fn status(&self, index: usize, head: u16) -> u8 {
        self.memory.read_obj(GuestAddress(self.header_address(index, head) + 16)).unwrap()
    }

    /// The next answer: head and bytes written.
    pub(crate) fn next_answer(&mut self, index: usize) -> Option<(u16, u32)> {
        if self.used_index(index) == self.queues[index].next_used {
            return None;
        }
        let queue = &mut self.queues[index];
        let at = queue.used_ring() + 4 + u64::from(queue.next_used % RING_SIZE) * 8;
        queue.next_used = queue.next_used.wrapping_add(1);
        // With EVENT_IDX: call for the next one.
        let event = queue.available_ring() + 4 + u64::from(RING_SIZE) * 2;
        self.memory.store(queue.next_used, GuestAddress(event), Ordering::SeqCst).unwrap();
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Waits for the next answer the way a driver does: by the call.
    pub(crate) fn wait(&mut self, index: usize) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = self.next_answer(index) {
                return answer;
            }
            assert!(Instant::now() < deadline, "no answer on queue {index}");
            wait_for_event(&self.queues[index].call, Duration::from_secs(1));
        }
    }

    /// One request from end to end; its status and how much was written.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, data: (u64, u32)) -> (u8, u32) {
        self.submit(0, 0, kind, sector, data);
        let (head, written) = self.wait(0);
        assert_eq!(head, 0);
        (self.status(0, 0), written)
    }

    pub(crate) fn write_memory(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read_memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

impl DriverQueue {
    fn available_ring(&self) -> u64 {
        self.table + u64::from(RING_SIZE) * 16
    }

    fn used_ring(&self) -> u64 {
        self.table + 0x1000
    }

    /// Whether the backend has said that the queue is broken.
    pub(crate) fn has_error(&self) -> bool {
        self.error.read().is_ok()
    }
}

/// Waits until an event is there, and takes it.
pub(crate) fn wait_for_event(event: &EventFd, limit: Duration) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    let ready = epoll.wait(i32::try_from(limit.as_millis()).unwrap(), &mut [EpollEvent::default()]).unwrap();
    ready > 0 && event.read().is_ok()
}

fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "cannot connect to {}: {error}", socket.display()),
        }
        std::thread::yield_now();
    }
}

/// A connection to a backend.
pub(crate) struct Machine {
    pub(crate) frontend: Frontend,
    /// Messages of the backend.
    pub(crate) channel: UnixStream,
    pub(crate) control: UnixStream,
    pub(crate) offered: u64,
}

impl Machine {
    pub(crate) fn start_queue(&mut self, guest: &Guest, index: usize, base: u16) {
        let queue = &guest.queues[index];
        self.frontend.set_vring_num(index, RING_SIZE).unwrap();
        let addresses = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: guest.user(queue.table),
            used_ring_addr: guest.user(queue.used_ring()),
            avail_ring_addr: guest.user(queue.available_ring()),
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &addresses).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_err(index, &queue.error).unwrap();
        self.frontend.set_vring_call(index, &queue.call).unwrap();
        self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// Stops a queue and returns where it would go on.
    pub(crate) fn stop_queue(&self, index: usize) -> u16 {
        self.frontend.get_vring_base(index).unwrap() as u16
    }

    /// The device's configuration space.
    pub(crate) fn config(&mut self) -> Vec<u8> {
        self.frontend.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1
    }

    pub(crate) fn capacity_bytes(&mut self) -> u64 {
        u64::from_le_bytes(self.config()[..8].try_into().unwrap()) * 512
    }
}
