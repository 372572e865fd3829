//! The vhost-user-blk server against a driver in shared memory.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

#[path = "support/guest.rs"]
mod guest;
mod support;

use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulbil_export::vhost_user::{Options, ServeError, VhostUserHandle, VhostUserServer};
use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, StatusExtent};
use guest::{
    DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DISCARD, Desc, F_EVENT_IDX, F_FLUSH, FLUSH, GET_ID, Guest, MEMORY_AT, READ,
    WRITE, WRITE_ZEROES,
};
use support::{MemoryDisk, pattern, wait_until};
use vhost::VhostBackend as _;
use vm_memory::{Bytes as _, GuestAddress};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Guest memory for data, behind the rings.
const DATA: u64 = MEMORY_AT + 0x10_0000;
const MIB: u64 = 1 << 20;

struct Served {
    handle: VhostUserHandle,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

fn serve(device: Arc<dyn BlockDevice>) -> Served {
    serve_with(device, Options { serial: "vol0123456789abcdef0".into(), ..Options::default() })
}

fn serve_with(device: Arc<dyn BlockDevice>, options: Options) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vu.sock");
    let handle = VhostUserServer::bind(&socket, device, options).unwrap().spawn().unwrap();
    Served { handle, socket, _dir: dir }
}

#[test]
fn every_kind_of_request_does_what_it_says() {
    let disk = Arc::new(MemoryDisk::new(4 * MIB).patterned());
    let served = serve(Arc::clone(&disk) as _);
    for without in [0, F_EVENT_IDX] {
        let mut guest = Guest::new(1, without);
        let mut machine = guest.connect(&served.socket);
        assert_eq!(machine.capacity_bytes(), 4 * MIB);
        assert_eq!(guest.request(READ, 3, (DATA, 1024)), (OK, 1025));
        assert_eq!(guest.read_memory(DATA, 1024), disk.bytes()[1536..2560]);
        // Longer than what is copied at once.
        assert_eq!(guest.request(READ, 0, (DATA, 3 << 20)), (OK, (3 << 20) + 1));
        assert_eq!(guest.read_memory(DATA, 3 << 20), disk.bytes()[..3 << 20]);
        let written = pattern(7, 2 << 20);
        guest.write_memory(DATA, &written);
        assert_eq!(guest.request(WRITE, 16, (DATA, 2 << 20)), (OK, 1));
        assert_eq!(disk.bytes()[8192..8192 + (2 << 20)], written);
        assert!(!disk.is_clean());
        assert_eq!(guest.request(FLUSH, 0, (0, 0)), (OK, 1));
        assert!(disk.is_clean() && disk.durable_bytes() == disk.bytes());
        assert_eq!(guest.request(GET_ID, 0, (DATA, 20)), (OK, 21));
        assert_eq!(guest.read_memory(DATA, 20), *b"vol0123456789abcdef0");
        let range = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        guest.write_memory(DATA, &[range(8, 16, 0), range(64, 8, 0)].concat());
        assert_eq!(guest.request(DISCARD, 0, (DATA, 32)), (OK, 1));
        assert!(disk.bytes()[4096..12288].iter().chain(&disk.bytes()[32768..36864]).all(|byte| *byte == 0));
        for (flags, sector) in [(0, 200), (1, 240)] {
            guest.write_memory(DATA, &range(sector, 3, flags));
            assert_eq!(guest.request(WRITE_ZEROES, 0, (DATA, 16)), (OK, 1));
            let start = sector as usize * 512;
            assert!(disk.bytes()[start..start + 1536].iter().all(|byte| *byte == 0));
            assert_ne!(disk.bytes()[start + 1536], 0);
        }
        assert_eq!(guest.request(99, 0, (DATA, 512)).0, UNSUPPORTED);
        machine.stop_queue(0);
    }
    let stats = served.handle.stats();
    assert_eq!((stats.connections, stats.reads, stats.flushes, stats.failures), (2, 4, 2, 2), "{stats:?}");
}

#[test]
fn requests_that_cannot_be_are_answered_with_an_error_and_change_nothing() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let before = disk.bytes();
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let _machine = guest.connect(&served.socket);
    let mut refused = |kind, sector, data| {
        assert_eq!(guest.request(kind, sector, data), (IO_ERROR, 1), "{kind} {sector} {data:?}");
    };
    refused(READ, 2048, (DATA, 512));
    refused(READ, 2047, (DATA, 1024));
    refused(READ, u64::MAX, (DATA, 512));
    refused(READ, u64::MAX / 512, (DATA, 4096));
    refused(READ, 0, (DATA, 511));
    refused(READ, 0, (0, 512));
    refused(READ, 0, (u64::MAX - 100, 512));
    refused(READ, 0, (DATA, !511));
    refused(WRITE, 0, (MEMORY_AT - 512, 1024));
    refused(WRITE, 2048, (DATA, 512));
    refused(WRITE, 0, (DATA, 100));
    refused(DISCARD, 0, (DATA, 15));
    refused(DISCARD, 0, (DATA, 16 * 33));
    refused(WRITE_ZEROES, 0, (DATA, 0));
    for (sector, sectors) in [(2048_u64, 1_u32), (0, 1 << 23), (u64::MAX, 1), (1 << 60, 8)] {
        guest.write_memory(DATA, &[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat());
        assert_eq!(guest.request(DISCARD, 0, (DATA, 16)).0, IO_ERROR);
        assert_eq!(guest.request(WRITE_ZEROES, 0, (DATA, 16)).0, IO_ERROR);
    }
    guest.write_memory(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(guest.request(DISCARD, 0, (DATA, 16)).0, UNSUPPORTED, "a discard has no flag");
    assert!(disk.bytes() == before);
    assert_eq!(guest.request(READ, 0, (DATA, 512)), (OK, 513), "the queue is served still");
}

#[test]
fn failures_of_the_device_and_panics_in_it_are_io_errors() {
    let disk = Arc::new(MemoryDisk::new(MIB));
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let _machine = guest.connect(&served.socket);
    *disk.fault.lock().unwrap() = Some(BlockErrorKind::NoSpace);
    assert_eq!(guest.request(WRITE, 0, (DATA, 4096)).0, IO_ERROR);
    assert_eq!(guest.request(FLUSH, 0, (0, 0)).0, IO_ERROR);
    *disk.fault.lock().unwrap() = None;
    disk.panic_on_read.store(1, Ordering::Relaxed);
    assert_eq!(guest.request(READ, 0, (DATA, 4096)).0, IO_ERROR);
    disk.slow_from.store(0, Ordering::Relaxed);
    assert_eq!(guest.request(READ, 0, (DATA, 4096)).0, IO_ERROR, "in a worker");
    disk.panic_on_read.store(0, Ordering::Relaxed);
    assert_eq!(guest.request(READ, 0, (DATA, 4096)).0, OK);
}

#[test]
fn a_slow_request_does_not_hold_back_fast_ones_or_other_queues() {
    let disk = Arc::new(MemoryDisk::new(4 * MIB).patterned());
    disk.slow_from.store(2 * MIB, Ordering::Relaxed);
    disk.read_gate.close();
    let served = serve_with(Arc::clone(&disk) as _, Options { queues: 2, ..Options::default() });
    let mut guest = Guest::new(2, 0);
    let mut machine = guest.connect(&served.socket);
    assert_eq!(machine.config()[34..36], [2, 0]);
    guest.submit(0, 0, READ, 4096, (DATA, 4096));
    disk.read_gate.wait_for(1);
    guest.submit(0, 3, READ, 0, (DATA + 4096, 4096));
    assert_eq!(guest.wait(0).0, 3, "answered out of order");
    guest.submit(1, 0, READ, 8, (DATA + 8192, 4096));
    assert_eq!(guest.wait(1).0, 0);
    disk.read_gate.open();
    assert_eq!(guest.wait(0).0, 0);
    assert_eq!(guest.read_memory(DATA, 12288)[..4096], disk.bytes()[2 << 20..(2 << 20) + 4096]);
}

#[test]
fn a_guest_that_never_flushes_gets_durable_writes() {
    let disk = Arc::new(MemoryDisk::new(4 * MIB));
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, F_FLUSH);
    let _machine = guest.connect(&served.socket);
    guest.write_memory(DATA, &[7; 4096]);
    assert_eq!(guest.request(WRITE, 8, (DATA, 4096)).0, OK);
    assert_eq!(disk.durable_bytes()[4096..8192], [7; 4096]);
    assert_eq!(guest.request(WRITE, 0, (DATA, 3 << 20)).0, OK);
    assert!(disk.durable_bytes() == disk.bytes());
    guest.write_memory(DATA, &[8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.request(WRITE_ZEROES, 0, (DATA, 16)).0, OK);
    assert!(disk.durable_bytes()[4096..8192].iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_device_says_so_and_stays_as_it_is() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned().read_only());
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let machine = guest.connect(&served.socket);
    assert_eq!(machine.offered & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(guest.request(READ, 0, (DATA, 512)).0, OK);
    assert_eq!(guest.request(WRITE, 0, (DATA, 4096)).0, IO_ERROR);
}

#[test]
fn indirect_chains_and_requests_cut_in_odd_places_are_understood() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let _machine = guest.connect(&served.socket);
    let table = MEMORY_AT + 0x8_0000;
    // The header in two pieces; data and status in one, and an empty descriptor in between.
    guest.write_memory(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let pieces = [(DATA, 5, 0), (DATA + 5, 11, 0), (DATA, 0, DESC_WRITE), (DATA + 4096, 513, DESC_WRITE)];
    for (index, (address, len, flags)) in pieces.into_iter().enumerate() {
        let next = if index == 3 { 0 } else { DESC_NEXT };
        guest.set_desc(table, index as u16, Desc { address, len, flags: flags | next, next: index as u16 + 1 });
    }
    let first = guest.queues[0].table;
    guest.set_desc(first, 9, Desc { address: table, len: 64, flags: DESC_INDIRECT, next: 0 });
    guest.offer(0, 9);
    guest.kick(0);
    assert_eq!(guest.wait(0), (9, 513));
    assert_eq!(guest.read_memory(DATA + 4096, 513), [&disk.bytes()[1024..1536], &[OK]].concat());
}

#[test]
fn a_broken_chain_stops_its_queue_until_the_guest_sets_it_up_again() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let mut machine = guest.connect(&served.socket);
    let table = guest.queues[0].table;
    let memory_end = MEMORY_AT + guest::MEMORY_BYTES;
    let one = |address, len, flags, next| vec![Desc { address, len, flags, next }];
    let header = Desc { address: DATA, len: 16, flags: DESC_NEXT, next: 1 };
    let broken = [
        ("a loop", vec![header, Desc { address: DATA, len: 16, flags: DESC_NEXT, next: 0 }]),
        ("a next outside the table", one(DATA, 16, DESC_NEXT, 128)),
        ("no status", one(DATA, 16, 0, 0)),
        (
            "a short header",
            vec![Desc { len: 15, ..header }, Desc { address: DATA, len: 1, flags: DESC_WRITE, next: 0 }],
        ),
        ("a header that only the device may write", one(DATA, 16, DESC_WRITE, 0)),
        ("reading behind writing", vec![Desc { flags: DESC_NEXT | DESC_WRITE, ..header }, Desc { flags: 0, ..header }]),
        ("a header outside memory", vec![Desc { address: 16, ..header }, Desc { flags: DESC_WRITE, ..header }]),
        ("an odd indirect table", one(DATA, 17, DESC_INDIRECT, 0)),
        ("an empty indirect table", one(DATA, 0, DESC_INDIRECT, 0)),
        ("a long indirect table", one(DATA, 1025 * 16, DESC_INDIRECT, 0)),
        ("an indirect table with a next", one(DATA, 32, DESC_INDIRECT | DESC_NEXT, 1)),
        ("an indirect table outside memory", one(memory_end - 8, 32, DESC_INDIRECT, 0)),
        ("a chain over 4 GiB", vec![Desc { len: u32::MAX, ..header }, Desc { len: u32::MAX, flags: 0, ..header }]),
        ("a nested indirect table", one(DATA + 4096, 16, DESC_INDIRECT, 0)),
    ];
    guest.set_desc(DATA + 4096, 0, Desc { address: DATA, len: 32, flags: DESC_INDIRECT, next: 0 });
    for (what, descriptors) in broken {
        for (index, desc) in descriptors.iter().enumerate() {
            guest.set_desc(table, index as u16, *desc);
        }
        guest.offer(0, 0);
        guest.kick(0);
        wait_until(what, || guest.queues[0].has_error());
        assert_eq!(guest.next_answer(0), None, "{what}");
        restart_queue(&mut guest, &mut machine);
        assert_eq!(guest.request(READ, 0, (DATA, 512)).0, OK, "after {what}");
    }
    guest.set_available_index(0, 5000);
    guest.kick(0);
    wait_until("an index that runs ahead", || guest.queues[0].has_error());
    restart_queue(&mut guest, &mut machine);
    guest.offer(0, 128);
    guest.kick(0);
    wait_until("a head outside the table", || guest.queues[0].has_error());
}

/// What a driver does that resets its device.
fn restart_queue(guest: &mut Guest, machine: &mut guest::Machine) {
    machine.stop_queue(0);
    guest.reset_queue(0);
    machine.start_queue(guest, 0, 0);
}

#[test]
fn a_head_in_flight_is_not_taken_again() {
    let disk = Arc::new(MemoryDisk::new(4 * MIB));
    disk.slow_from.store(0, Ordering::Relaxed);
    disk.read_gate.close();
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let _machine = guest.connect(&served.socket);
    guest.submit(0, 0, READ, 0, (DATA, 512));
    disk.read_gate.wait_for(1);
    guest.offer(0, 0);
    guest.kick(0);
    wait_until("the queue to be stopped", || guest.queues[0].has_error());
    disk.read_gate.open();
    assert_eq!(guest.wait(0).0, 0, "what was taken before is answered");
}

/// A disk whose size is changed by the test.
struct Elastic(MemoryDisk, AtomicU64);

impl BlockDevice for Elastic {
    fn size_bytes(&self) -> u64 {
        self.1.load(Ordering::SeqCst)
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.0.read_at(buf, offset)
    }
    fn is_fast(&self, _offset: u64, _len_bytes: u64) -> bool {
        true
    }
    fn write_at(&self, buf: &[u8], offset: u64, fua: bool) -> Result<(), BlockError> {
        self.0.write_at(buf, offset, fua)
    }
    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.0.write_zeroes(offset, len_bytes, fua)
    }
    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.0.discard(offset, len_bytes, fua)
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.0.flush()
    }
    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        self.0.status(offset, len_bytes, max_extents)
    }
}

#[test]
fn a_new_size_is_told_to_the_frontend_and_holds_at_once() {
    let disk = Arc::new(Elastic(MemoryDisk::new(4 * MIB), AtomicU64::new(MIB)));
    let served = serve(Arc::clone(&disk) as _);
    assert!(!served.handle.notify_resize(), "nobody is connected");
    let mut guest = Guest::new(1, 0);
    let mut machine = guest.connect(&served.socket);
    assert_eq!(guest.request(READ, 2048, (DATA, 512)).0, IO_ERROR);
    disk.1.store(2 * MIB, Ordering::SeqCst);
    assert!(served.handle.notify_resize());
    let mut message = [0; 12];
    machine.channel.set_read_timeout(Some(support::PATIENCE)).unwrap();
    machine.channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "CONFIG_CHANGE_MSG, version 1, no payload");
    assert_eq!(machine.capacity_bytes(), 2 * MIB);
    assert_eq!(guest.request(READ, 2048, (DATA, 512)).0, OK);
}

#[test]
fn frontends_come_and_go_and_the_queue_goes_on_where_it_was() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    for round in 0..300_u64 {
        let machine = guest.connect(&served.socket);
        assert_eq!(guest.request(READ, round, (DATA, 512)).0, OK, "round {round}");
        if round % 2 == 0 {
            assert_eq!(machine.stop_queue(0), guest.used_index(0));
        }
        drop(machine);
        // Offered while nobody serves.
        guest.submit(0, 3, READ, 0, (DATA, 512));
        let _machine = guest.connect(&served.socket);
        assert_eq!(guest.wait(0).0, 3, "round {round}");
    }
    let stats = served.handle.stats();
    assert_eq!((stats.connections, stats.reads), (600, 600));
}

#[test]
fn requests_of_the_frontend_that_make_no_sense_are_refused() {
    let served = serve(Arc::new(MemoryDisk::new(MIB)));
    let mut guest = Guest::new(1, 0);
    let machine = guest.connect(&served.socket);
    assert!(machine.frontend.set_vring_num(0, 128).is_err(), "it runs");
    assert!(machine.frontend.set_features(1 << 34).is_err(), "packed rings are not offered");
    machine.stop_queue(0);
    assert!(machine.frontend.set_vring_num(0, 100).is_err(), "no power of two");
    assert!(machine.frontend.set_vring_num(0, 2048).is_err());
    drop(machine);
    // Whatever comes instead of a message ends that connection only.
    for bytes in [&[0xff; 12][..], &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0, 0], &[6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]] {
        let mut stream = std::os::unix::net::UnixStream::connect(&served.socket).unwrap();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "closed");
    }
    let _machine = guest.connect(&served.socket);
    assert_eq!(guest.request(READ, 0, (DATA, 512)).0, OK);
}

#[test]
fn a_shutdown_answers_what_was_taken_and_leaves_nothing_behind() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    disk.slow_from.store(0, Ordering::Relaxed);
    disk.read_gate.close();
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let _machine = guest.connect(&served.socket);
    guest.submit(0, 0, READ, 0, (DATA, 512));
    disk.read_gate.wait_for(1);
    let handle = Arc::new(served.handle);
    let stopping = Arc::clone(&handle);
    let thread = std::thread::spawn(move || stopping.shutdown());
    disk.read_gate.open();
    thread.join().unwrap();
    assert_eq!(guest.next_answer(0), Some((0, 513)));
    assert!(!handle.is_connected() && !served.socket.exists());
    // And again, and with a device that does not finish.
    handle.shutdown();
    let options = Options { grace: Duration::from_millis(50), ..Options::default() };
    let stuck = serve_with(Arc::clone(&disk) as _, options);
    disk.read_gate.close();
    let _machine = guest.connect(&stuck.socket);
    guest.submit(0, 3, READ, 0, (DATA, 512));
    disk.read_gate.wait_for(1);
    stuck.handle.shutdown();
    disk.read_gate.open();
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_stale_one_is_replaced() {
    let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(MIB));
    let served = serve(Arc::clone(&disk));
    let second = VhostUserServer::bind(&served.socket, Arc::clone(&disk), Options::default());
    assert!(matches!(second, Err(ServeError::InUse { .. })));
    let stale = served.socket.with_extension("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let server = VhostUserServer::bind(&stale, disk, Options::default()).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&stale.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(server);
    assert!(!stale.exists());
}

#[test]
fn random_descriptors_never_end_the_server() {
    let cases = std::env::var("BULBIL_HOSTILE_CASES").map_or(100_000, |text| text.parse().unwrap());
    let seed = std::env::var("BULBIL_SEED").map_or(0x5eed_0001, |text| text.parse().unwrap());
    println!("BULBIL_SEED={seed}");
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let served = serve(Arc::clone(&disk) as _);
    let mut guest = Guest::new(1, 0);
    let mut machine = guest.connect(&served.socket);
    let mut random = Random { state: seed, hits_rings: false };
    let mut done = 0;
    while done < cases {
        // In some rounds data goes over the rings themselves; then nothing is certain but the first request.
        random.hits_rings = random.one_in(8);
        // First of all: a queue that has just been started looks at its ring without a kick.
        let before = total(&served);
        for head in 0..16 {
            random.chain(&mut guest, head * 8);
            guest.offer(0, head * 8);
        }
        done += 16;
        guest.kick(0);
        let needed = if random.hits_rings { 1 } else { 16 };
        wait_until("requests to be taken or a stop", || {
            total(&served) >= before + needed || guest.queues[0].has_error()
        });
        machine.stop_queue(0);
        guest.reset_queue(0);
        machine.start_queue(&guest, 0, 0);
    }
    machine.stop_queue(0);
    drop(machine);
    guest.inflight = None;
    guest.reset_queue(0);
    let _machine = guest.connect(&served.socket);
    assert_eq!(guest.request(READ, 0, (DATA, 512)).0, OK);
    let stats = served.handle.stats();
    println!("{stats:?}");
    assert!(stats.reads > 0 && stats.writes > 0 && stats.failures > 0);
}

fn total(served: &Served) -> u64 {
    let stats = served.handle.stats();
    stats.reads + stats.writes + stats.flushes + stats.discards + stats.write_zeroes + stats.other_requests
}

/// splitmix64.
struct Random {
    state: u64,
    hits_rings: bool,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn address(&mut self) -> u64 {
        match self.below(12) {
            0 => self.next(),
            1 => u64::MAX - self.below(64),
            2 => MEMORY_AT + guest::MEMORY_BYTES - self.below(600),
            3 if self.hits_rings => MEMORY_AT + self.below(0x4000),
            _ => DATA + self.below(1 << 19),
        }
    }

    fn len(&mut self) -> u32 {
        match self.below(10) {
            0 => self.next() as u32,
            1 => 0,
            2 => 1 << self.below(32),
            3 => 16,
            _ => self.below(9) as u32 * 512,
        }
    }

    /// Up to eight descriptors that are nearly a request, or not at all.
    fn chain(&mut self, guest: &mut Guest, head: u16) {
        let table = guest.queues[0].table;
        let count = 2 + self.below(5) as u16;
        for index in 0..count {
            let is_last = index + 1 == count;
            let writable = if is_last || self.one_in(2) { DESC_WRITE } else { 0 };
            let mut desc = Desc { address: self.address(), len: self.len(), flags: writable, next: head + index + 1 };
            if !is_last {
                desc.flags |= DESC_NEXT;
            }
            if index == 0 {
                let kind = [READ, WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77][self.below(7) as usize];
                let sector = if self.one_in(4) { self.next() } else { self.below(2100) };
                let header = DATA + (1 << 20) + u64::from(head) * 16;
                guest.write_memory(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
                desc = Desc { address: header, len: 16, flags: DESC_NEXT, ..desc };
            } else if is_last {
                (desc.address, desc.len) = (DATA + (2 << 20) + u64::from(head), 1);
            }
            if self.one_in(24) {
                desc.flags = self.next() as u16 & 0xf;
            }
            if self.one_in(40) {
                desc.next = self.next() as u16;
            }
            if self.one_in(40) {
                (desc.address, desc.len) = (self.address(), self.len());
            }
            guest.set_desc(table, head + index, desc);
        }
        if self.one_in(50) {
            guest.memory.write_obj(self.next() as u32, GuestAddress(DATA)).unwrap();
        }
    }
}
