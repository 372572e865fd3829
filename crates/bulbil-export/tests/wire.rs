//! The protocol byte by byte: handshakes, requests and the errors of both, well-formed and not.

#![allow(clippy::unwrap_used, reason = "in tests a failed unwrap is a failed test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulbil_export::nbd::Limits;
use bulbil_volume::BlockErrorKind;
use proptest::prelude::*;
use support::*;

const MIB: u64 = 1 << 20;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

fn served(size_bytes: u64) -> (Arc<MemoryDisk>, Served) {
    let disk = Arc::new(MemoryDisk::new(size_bytes).patterned());
    let served = Served::new(disk.clone());
    (disk, served)
}

fn info_request(name: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
    data.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

#[test]
fn export_name_without_no_zeroes_is_padded() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.greet(1);
    client.send_option(1, b"");
    let reply: [u8; 134] = client.receive();
    assert_eq!(reply[..8], MIB.to_be_bytes());
    assert!(reply[10..].iter().all(|byte| *byte == 0));
    assert_eq!(client.errno_of(FLUSH, 0, 0, 0), 0);
}

#[test]
fn transmission_flags_tell_what_is_supported() {
    let (_disk, served) = served(MIB);
    let (size, flags) = served.client().enter();
    assert_eq!((size, flags), (MIB, 0b1101_0110_1101), "without DF, which needs structured replies");
    let read_only = Served::new(Arc::new(MemoryDisk::new(MIB).read_only()));
    assert_eq!(read_only.client().enter().1, 0b101_0000_0111);
}

#[test]
fn go_answers_what_was_asked_and_enters_transmission() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.greet(3);
    client.send_option(7, &info_request(b"", &[1, 2, 3]));
    let mut infos = Vec::new();
    loop {
        match client.option_reply(7) {
            (3, data) => infos.push(data),
            (kind, _) => break assert_eq!(kind, 1),
        }
    }
    assert_eq!(infos[0][..10], [&[0, 0][..], &MIB.to_be_bytes()].concat());
    assert_eq!(infos[1], b"\0\x01disk");
    assert_eq!(infos[2], b"\0\x02a disk in memory");
    assert_eq!(infos[3], [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(client.errno_of(READ, 0, 0, 10), 0);
}

#[test]
fn options_are_refused_one_by_one_and_the_handshake_goes_on() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.greet(3);
    for (option, data, expected) in [
        (99, &b"what is this"[..], 0x8000_0001u32),
        (5, b"", 0x8000_0002),
        (5, b"x", 0x8000_0003),
        (3, b"x", 0x8000_0003),
        (8, b"x", 0x8000_0003),
        (6, b"\0\0", 0x8000_0003),
        (6, b"\0\0\0\x04nope\0\0", 0x8000_0006),
        (7, b"\0\0\0\x04nope\0\0", 0x8000_0006),
        (7, b"\xff\xff\xff\xffnope\0\0", 0x8000_0003),
        (9, b"\0\0\0\x04disk\0\0\0\0", 0x8000_0003),
        (10, b"\0\0\0\x04disk\0\0\0\0", 0x8000_0003),
        (11, b"", 0x8000_0001),
    ] {
        client.send_option(option, data);
        assert_eq!(client.option_reply(option).0, expected, "option {option} {data:?}");
    }
    client.send_option(3, b"");
    assert_eq!(client.option_reply(3), (2, b"\0\0\0\x04diska disk in memory".to_vec()));
    assert_eq!(client.option_reply(3).0, 1);
    client.send_option(2, b"data after abort is ignored");
    assert_eq!(client.option_reply(2).0, 1);
    assert!(client.is_closed());
}

#[test]
fn metadata_contexts_are_listed_and_selected() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.greet(3);
    client.send_option(8, b"");
    assert_eq!(client.option_reply(8).0, 1);
    let mut query = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x05base:\0\0\0\x09x-other:y".to_vec();
    client.send_option(9, &query);
    assert_eq!(client.option_reply(9), (4, b"\0\0\0\0base:allocation".to_vec()));
    assert_eq!(client.option_reply(9).0, 1);
    client.send_option(10, &query);
    assert_eq!(client.option_reply(10).0, 1, "the wildcard selects nothing");
    query = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation".to_vec();
    client.send_option(10, &query);
    assert_eq!(client.option_reply(10), (4, b"\0\0\0\x01base:allocation".to_vec()));
    assert_eq!(client.option_reply(10).0, 1);
}

#[test]
fn broken_handshakes_are_closed() {
    let (_disk, served) = served(MIB);
    let broken: [&dyn Fn(&mut RawClient); 5] = [
        &|client| client.greet(1 << 7),
        &|client| {
            client.greet(3);
            client.send(b"GET / HTTP/1.1\r\n\r\n");
        },
        &|client| {
            client.greet(3);
            client.send_option(1, b"no such export");
        },
        &|client| {
            client.greet(3);
            client.send_option(1, &[b'x'; 5000]);
        },
        &|client| {
            client.greet(3);
            client.send(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff");
            assert_eq!(client.option_reply(7).0, 0x8000_0009);
        },
    ];
    for (index, break_it) in broken.iter().enumerate() {
        let mut client = served.client();
        break_it(&mut client);
        assert!(client.is_closed(), "case {index}");
    }
    served.wait_until_empty();
}

#[test]
fn a_slow_handshake_ends_at_its_limit() {
    let limits = Limits { handshake: Duration::from_millis(200), ..Limits::default() };
    let served = Served::with_limits(Arc::new(MemoryDisk::new(MIB)), limits);
    let mut silent = served.client();
    let _greeting: [u8; 18] = silent.receive();
    assert!(silent.is_closed());
    let mut in_time = served.client();
    in_time.enter();
    served.wait_until_one_left();
    assert_eq!(in_time.errno_of(FLUSH, 0, 0, 0), 0, "the limit ends with the handshake");
}

impl Served {
    fn wait_until_one_left(&self) {
        wait_until("one connection", || self.server.connections() == 1);
    }
}

#[test]
fn endless_options_are_cut_off() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.greet(3);
    for _ in 0..1024 {
        client.send_option(99, b"");
        client.option_reply(99);
    }
    assert!(client.is_closed());
}

#[test]
fn errors_follow_the_table() {
    let (disk, served) = served(64 * MIB);
    let end = disk.bytes().len() as u64;
    for structured in [false, true] {
        let mut client = served.client();
        if structured {
            client.enter_structured()
        } else {
            {
                client.enter();
            }
        }
        for (command, flags, offset, len, errno) in [
            (READ, 0, end - 1, 2, EINVAL),
            (READ, 0, u64::MAX, 1, EINVAL),
            (READ, 0, 0, (32 << 20) + 1, EOVERFLOW),
            (READ, 1 << 1, 0, 1, EINVAL),
            (TRIM, 0, end, 1, EINVAL),
            (WRITE_ZEROES, 0, end, 1, ENOSPC),
            (WRITE_ZEROES, 1 << 4, 1, 4096, ENOTSUP),
            (WRITE_ZEROES, 1 << 4, 0, 4096, 0),
            (CACHE, 0, end, 1, EINVAL),
            (CACHE, 0, 0, 4096, 0),
            (FLUSH, 0, 1, 0, EINVAL),
            (BLOCK_STATUS, 0, 0, 4096, EINVAL),
            (8, 0, 0, 0, EINVAL),
            (0xffff, 0xffff, 0, 0, EINVAL),
            (READ, 0, 0, 0, 0),
        ] {
            let got = client.errno_of(command, flags, offset, len);
            assert_eq!(got, errno, "{structured} {command} {flags} {offset} {len}");
        }
        assert_eq!(client.write(0, end - 1, b"xx"), ENOSPC);
        assert_eq!(client.write(1 << 2, 0, b"xx"), EINVAL);
        assert_eq!(client.write(0, end - 2, b"xx"), 0, "the payload of a refused write was skipped");
        assert_eq!(client.write(0, 0, b""), 0);
    }
}

#[test]
fn device_errors_are_mapped_without_their_details() {
    let (disk, served) = served(MIB);
    let mut client = served.client();
    client.enter_structured();
    for (kind, on_write, on_read) in [
        (BlockErrorKind::OutOfRange, ENOSPC, EINVAL),
        (BlockErrorKind::ReadOnly, EPERM, EPERM),
        (BlockErrorKind::NoSpace, ENOSPC, ENOSPC),
        (BlockErrorKind::Io, EIO, EIO),
        (BlockErrorKind::Poisoned, EIO, EIO),
    ] {
        *disk.fault.lock().unwrap() = Some(kind);
        assert_eq!(client.write(0, 0, &[1; 512]), on_write);
        assert_eq!(client.write(FUA, 0, &[1; 512]), on_write);
        assert_eq!(client.errno_of(WRITE_ZEROES, 0, 0, 4096), on_write);
        client.ask(READ, 0, 0, 512);
        let answer = client.answer(0);
        assert_eq!(answer.errno, on_read);
        assert!(!answer.message.is_empty() && !answer.message.contains("secret"), "{}", answer.message);
    }
    *disk.fault.lock().unwrap() = None;
    assert_eq!(client.errno_of(FLUSH, 0, 0, 0), 0);
    assert_eq!(served.server.stats().failures, 20);
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let served = Served::new(Arc::new(MemoryDisk::new(MIB).patterned().read_only()));
    let mut client = served.client();
    client.enter();
    assert_eq!(client.write(0, 0, b"x"), EPERM);
    assert_eq!(client.write(FUA, 0, b"x"), EPERM);
    assert_eq!(client.errno_of(TRIM, 0, 0, 1), EPERM);
    assert_eq!(client.errno_of(WRITE_ZEROES, 0, 0, 1), EPERM);
    assert_eq!(client.errno_of(READ, 0, 0, 512), 0);
    assert_eq!(client.errno_of(FLUSH, 0, 0, 0), 0);
}

#[test]
fn oversized_writes_are_skipped_up_to_a_point() {
    let (_disk, served) = served(80 * MIB);
    let mut client = served.client();
    client.enter();
    assert_eq!(client.write(0, 0, &vec![1; (32 << 20) + 1]), EINVAL);
    assert_eq!(client.write(0, 0, &vec![1; 32 << 20]), 0);
    client.ask(WRITE, 0, 0, (64 << 20) + 1);
    assert!(client.is_closed());
}

#[test]
fn a_request_without_its_magic_number_closes_after_earlier_replies() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.enter();
    let mut bytes = client.request(READ, 0, 0, 16);
    bytes.extend_from_slice(&[0; 28]);
    client.send(&bytes);
    assert_eq!(client.answer(16).data, pattern(0, 16));
    assert!(client.is_closed());
}

#[test]
fn requests_split_and_joined_anywhere_are_understood() {
    let (_disk, served) = served(MIB);
    let mut client = served.client();
    client.enter();
    let mut bytes = Vec::new();
    for index in 0..200u64 {
        bytes.extend(client.request(WRITE, 0, index * 4096, 4096));
        bytes.extend(vec![u8::try_from(index).unwrap(); 4096]);
        bytes.extend(client.request(READ, 0, index * 4096 + 1, 7));
    }
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        use std::io::Write;
        let mut rest = &bytes[..];
        for size in [1, 27, 28, 29, 4095, 4125, 3, 65_537, 9].into_iter().cycle() {
            let (head, tail) = rest.split_at(size.min(rest.len()));
            sender.write_all(head).unwrap();
            rest = tail;
            if rest.is_empty() {
                return;
            }
        }
    });
    for index in 0..200u64 {
        assert_eq!(client.answer(0).cookie, 2 * index + 1);
        assert_eq!(client.answer(7).data, vec![u8::try_from(index).unwrap(); 7], "reads see earlier inline writes");
    }
    sending.join().unwrap();
}

#[test]
fn structured_reads_carry_their_offset_and_large_ones_are_whole() {
    let (disk, served) = served(40 * MIB);
    let mut client = served.client();
    client.enter_structured();
    for (offset, len) in [(3u64, 5u32), (1, 300_000), (4096, 32 << 20)] {
        client.ask(READ, 1 << 2, offset, len);
        let answer = client.answer(0);
        assert_eq!(answer.chunk, Some(1));
        assert_eq!(answer.data[..8], offset.to_be_bytes());
        let start = usize::try_from(offset).unwrap();
        assert!(answer.data[8..] == disk.bytes()[start..start + len as usize]);
    }
    client.ask(READ, 0, 0, 0);
    assert_eq!(client.answer(0).chunk, Some(0));
}

#[test]
fn forced_unit_access_is_durable_before_the_reply_and_plain_writes_after_a_flush() {
    let (disk, served) = served(MIB);
    let mut client = served.client();
    client.enter();
    assert_eq!(client.write(FUA, 0, &[0xaa; 4096]), 0);
    assert_eq!(disk.durable_bytes()[..4096], [0xaa; 4096]);
    assert_eq!(client.errno_of(WRITE_ZEROES, FUA, 4096, 4096), 0);
    assert_eq!(client.errno_of(TRIM, FUA, 8192, 4096), 0);
    assert_eq!(client.errno_of(WRITE_ZEROES, FUA | 2, 12_288, 4096), 0);
    assert!(disk.durable_bytes()[4096..16_384].iter().all(|byte| *byte == 0));
    assert_eq!(client.write(0, 0, &[0xbb; 4096]), 0);
    assert_eq!(disk.durable_bytes()[0], 0xaa);
    assert_eq!(client.errno_of(FLUSH, 0, 0, 0), 0);
    assert_eq!(disk.durable_bytes()[..4096], [0xbb; 4096]);
    assert!(disk.is_clean());
}

#[test]
fn a_flush_covers_writes_answered_on_other_connections() {
    let (disk, served) = served(MIB);
    let (mut first, mut second) = (served.client(), served.client());
    first.enter();
    second.enter();
    for round in 1..=50u8 {
        assert_eq!(first.write(0, 0, &[round; 8192]), 0);
        assert_eq!(first.errno_of(WRITE_ZEROES, 0, 8192, 4096), 0);
        assert_eq!(second.errno_of(FLUSH, 0, 0, 0), 0);
        assert_eq!(disk.durable_bytes()[..8192], [round; 8192]);
    }
}

#[test]
fn fast_requests_pass_slow_ones() {
    let (disk, served) = served(MIB);
    disk.slow_from.store(MIB / 2, Ordering::Relaxed);
    disk.read_gate.close();
    disk.flush_gate.close();
    let mut client = served.client();
    client.enter();
    let slow = client.ask(READ, 0, MIB / 2, 4096);
    let flush = client.ask(FLUSH, 0, 0, 0);
    disk.read_gate.wait_for(1);
    disk.flush_gate.wait_for(1);
    assert_eq!(client.errno_of(READ, 0, 0, 4096), 0);
    assert_eq!(client.write(0, 0, &[1; 4096]), 0);
    disk.flush_gate.open();
    assert_eq!(client.answer(0).cookie, flush);
    assert_eq!(disk.durable_bytes()[..8], pattern(0, 8), "the write came after the flush");
    disk.read_gate.open();
    let answer = client.answer(4096);
    assert_eq!((answer.cookie, answer.data), (slow, pattern(usize::try_from(MIB / 2).unwrap(), 4096)));
    let stats = served.server.stats();
    let counted = [stats.connections, stats.reads, stats.writes, stats.flushes, stats.slow_requests];
    assert_eq!(counted, [1, 2, 1, 1, 2]);
    assert_eq!((stats.read_bytes, stats.written_bytes), (8192, 4096));
}

#[test]
fn too_much_in_flight_stops_reading_until_something_lands() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let limits = Limits { in_flight_bytes: 256 << 10, ..Limits::default() };
    let served = Served::with_limits(disk.clone(), limits);
    disk.slow_from.store(0, Ordering::Relaxed);
    disk.read_gate.close();
    let mut client = served.client();
    client.enter();
    for _ in 0..10 {
        client.ask(READ, 0, 0, 64 << 10);
    }
    // Four of 64 KiB fit; the fifth was received and waits.
    disk.read_gate.wait_for(4);
    wait_until("the fifth", || served.server.stats().reads == 5);
    assert_eq!(disk.reads.load(Ordering::Relaxed), 4);
    disk.read_gate.open();
    let mut cookies: Vec<u64> = (0..10).map(|_| client.answer(64 << 10).cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_client_that_reads_nothing_holds_no_worker() {
    let disk = Arc::new(MemoryDisk::new(8 * MIB).patterned());
    let limits = Limits { workers: 1, ..Limits::default() };
    let served = Served::with_limits(disk.clone(), limits);
    let mut stuck = served.client();
    stuck.enter();
    stuck.ask(READ, 0, 0, 4 << 20);
    stuck.ask(READ, 0, 0, 4 << 20);
    wait_until("both reads", || disk.reads.load(Ordering::Relaxed) == 2);
    let mut other = served.client();
    other.enter();
    assert_eq!(other.errno_of(FLUSH, 0, 0, 0), 0, "the only worker is free");
    for _ in 0..2 {
        assert!(stuck.answer(4 << 20).data == disk.bytes()[..4 << 20], "nothing was lost");
    }
    assert_eq!(stuck.errno_of(READ, 0, 0, 512), 0);
}

#[test]
fn disconnect_answers_what_is_outstanding() {
    let (disk, served) = served(MIB);
    disk.slow_from.store(0, Ordering::Relaxed);
    disk.read_gate.close();
    let mut client = served.client();
    client.enter();
    client.ask(READ, 0, 0, 4096);
    client.ask(DISC, 0, 0, 0);
    disk.read_gate.wait_for(1);
    assert_eq!(served.server.connections(), 1);
    disk.read_gate.open();
    assert_eq!(client.answer(4096).data, pattern(0, 4096));
    assert!(client.is_closed());
    served.wait_until_empty();
}

#[test]
fn a_client_that_dies_anywhere_leaves_nothing_behind() {
    let (disk, served) = served(MIB);
    disk.slow_from.store(MIB / 2, Ordering::Relaxed);
    for cut in [0, 1, 27, 28, 29, 2000, 4124] {
        let mut client = served.client();
        client.enter();
        client.ask(READ, 0, MIB / 2, 4096);
        let mut bytes = client.request(WRITE, 0, 0, 4096);
        bytes.extend_from_slice(&[9; 4096]);
        client.send(&bytes[..cut]);
        drop(client);
    }
    for cut in [0, 3, 4, 10, 20, 24] {
        let mut client = served.client();
        let _greeting: [u8; 18] = client.receive();
        client.send(&b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk"[..cut]);
        drop(client);
    }
    served.wait_until_empty();
    assert_ne!(disk.bytes()[100], 0);
    let mut client = served.client();
    client.enter();
    assert_eq!(client.errno_of(READ, 0, 0, 4096), 0);
}

#[test]
fn a_device_that_panics_ends_the_connection_and_not_the_server() {
    let (disk, served) = served(MIB);
    for slow in [false, true] {
        disk.slow_from.store(if slow { 0 } else { u64::MAX }, Ordering::Relaxed);
        let mut client = served.client();
        client.enter();
        disk.panic_on_read.store(1, Ordering::Relaxed);
        client.ask(READ, 0, 0, 4096);
        assert!(client.is_closed());
        disk.panic_on_read.store(0, Ordering::Relaxed);
        served.wait_until_empty();
    }
    let mut client = served.client();
    client.enter();
    assert_eq!(client.errno_of(READ, 0, 0, 4096), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever follows the handshake, the server answers or closes, and serves the next client.
    #[test]
    fn any_requests_are_survived(
        requests in prop::collection::vec((0u16..10, any::<u16>(), 0u64..70_000, 0u32..70_000, 0usize..40), 0..12),
        structured: bool, tail: Vec<u8>,
    ) {
        let served = Served::new(Arc::new(MemoryDisk::new(64 << 10)));
        let mut client = served.client();
        if structured { client.enter_structured() } else { { client.enter(); } }
        let mut bytes = Vec::new();
        for (command, flags, offset, len, cut) in requests {
            let request = client.request(command, flags & 0x1f, offset, len);
            bytes.extend_from_slice(&request[..28 - cut.saturating_sub(36)]);
            if command == WRITE {
                bytes.extend(vec![1; len as usize]);
            }
        }
        bytes.extend(tail);
        let mut reader = client.stream.try_clone().unwrap();
        let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        // The server may close before all is sent.
        let _sent = std::io::Write::write_all(&mut client.stream, &bytes);
        let _shut = client.stream.shutdown(std::net::Shutdown::Write);
        let _read = reading.join().unwrap();
        let mut next = served.client();
        next.enter();
        prop_assert_eq!(next.errno_of(READ, 0, 0, 512), 0);
    }
}
