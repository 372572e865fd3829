//! A vhost-user-blk server that is killed while a guest works, and started again.
//!
//! `BULBIL_KILLS=1000 BULBIL_SEED=7 cargo test -p bulbil-export --test vhost_user_restart` is a longer run of other chances.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

#[path = "support/guest.rs"]
mod guest;

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_export::vhost_user::{Options, VhostUserServer};
use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, StatusExtent};
use guest::{FLUSH, Guest, MEMORY_AT, READ, WRITE};

const DATA: u64 = MEMORY_AT + 0x10_0000;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;
/// Requests at once, of three descriptors each.
const SLOTS: u16 = 32;
const SOCKET: &str = "BULBIL_TEST_SOCKET";
const DISK: &str = "BULBIL_TEST_DISK";

/// A file on which half of the requests are slow, so that requests overtake each other.
struct SlowFile(File);

impl SlowFile {
    fn wait(&self, offset: u64) {
        if !self.is_fast(offset, 0) {
            std::thread::sleep(Duration::from_micros(offset / 512 * 37 % 1500));
        }
    }
}

fn failed(error: std::io::Error) -> BlockError {
    BlockError::with_source(BlockErrorKind::Io, "file", error)
}

impl BlockDevice for SlowFile {
    fn size_bytes(&self) -> u64 {
        BLOCKS * BLOCK as u64
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.wait(offset);
        self.0.read_exact_at(buf, offset).map_err(failed)
    }
    fn is_fast(&self, offset: u64, _len_bytes: u64) -> bool {
        (offset / BLOCK as u64).is_multiple_of(2)
    }
    fn write_at(&self, buf: &[u8], offset: u64, _fua: bool) -> Result<(), BlockError> {
        // Half before and half after the wait, so that a kill tears it.
        let (first, second) = buf.split_at(buf.len() / 2);
        self.0.write_all_at(first, offset).map_err(failed)?;
        self.wait(offset);
        self.0.write_all_at(second, offset + first.len() as u64).map_err(failed)
    }
    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.write_at(&vec![0; len_bytes as usize], offset, fua)
    }
    fn discard(&self, _offset: u64, _len_bytes: u64, _fua: bool) -> Result<(), BlockError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), BlockError> {
        self.wait(2999 * 512);
        Ok(())
    }
    fn status(&self, _offset: u64, _len_bytes: u64, _max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        Ok(vec![])
    }
}

/// The server process of the test below: this test binary, started with other variables. Does nothing otherwise.
#[test]
fn server_process() {
    let (Some(socket), Some(disk)) = (std::env::var_os(SOCKET), std::env::var_os(DISK)) else { return };
    let disk = File::options().read(true).write(true).open(disk).unwrap();
    let options = Options { queues: 2, ..Options::default() };
    let server = VhostUserServer::bind(socket, Arc::new(SlowFile(disk)), options).unwrap().spawn().unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(server);
}

struct Server {
    child: Child,
}

impl Server {
    fn start(socket: &Path, disk: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "server_process", "--nocapture"]).env(SOCKET, socket).env(DISK, disk);
        Self { child: command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// What a slot of a queue is doing.
#[derive(Clone, Copy)]
enum Work {
    Read(u64),
    Write(u64, u64),
    Flush,
}

/// A guest that writes, reads and checks, and knows what must be on the disk.
struct Workload {
    guest: Guest,
    /// The number in each block; block `b` belongs to queue `b % 2`.
    content: Vec<u64>,
    busy: Vec<bool>,
    slots: Vec<[Option<Work>; SLOTS as usize]>,
    next_number: u64,
    random: u64,
    answers: usize,
}

fn block_of(block: u64, number: u64) -> Vec<u8> {
    [block.to_le_bytes(), number.to_le_bytes()].concat().into_iter().cycle().take(BLOCK).collect()
}

fn address(queue: usize, slot: usize) -> u64 {
    DATA + ((queue * usize::from(SLOTS) + slot) * 2 * BLOCK) as u64
}

impl Workload {
    fn new(seed: u64) -> Self {
        let (content, busy) = (vec![0; BLOCKS as usize], vec![false; BLOCKS as usize]);
        let slots = vec![[None; SLOTS as usize]; 2];
        Self { guest: Guest::new(2, 0), content, busy, slots, next_number: 1, random: seed, answers: 0 }
    }

    fn random(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    /// Starts a request in every free slot.
    fn submit_all(&mut self) {
        for queue in 0..2 {
            for slot in 0..usize::from(SLOTS) {
                if self.slots[queue][slot].is_none() {
                    self.submit(queue, slot);
                }
            }
        }
    }

    fn submit(&mut self, queue: usize, slot: usize) {
        let block = self.random(BLOCKS / 2) * 2 + queue as u64;
        let choice = self.random(16);
        let (work, kind, len) = match choice {
            0 => (Work::Flush, FLUSH, 0),
            _ if self.busy[block as usize] => return,
            1..=5 => (Work::Read(block), READ, BLOCK as u32),
            _ => {
                self.next_number += 1;
                let number = self.next_number;
                self.guest.write_memory(address(queue, slot), &block_of(block, number));
                (Work::Write(block, number), WRITE, BLOCK as u32)
            }
        };
        if !matches!(work, Work::Flush) {
            self.busy[block as usize] = true;
        }
        self.slots[queue][slot] = Some(work);
        let data = (address(queue, slot), len);
        self.guest.submit(queue, slot as u16 * 3, kind, block * 8, data);
    }

    /// Takes all answers there are.
    fn take_answers(&mut self) {
        for queue in 0..2 {
            while let Some((head, _)) = self.guest.next_answer(queue) {
                self.take_answer(queue, head);
            }
        }
    }

    fn take_answer(&mut self, queue: usize, head: u16) {
        let slot = usize::from(head / 3);
        let work = self.slots[queue][slot].take().expect("answered once, and only what was asked");
        assert_eq!(self.guest.status(queue, head), 0);
        self.answers += 1;
        match work {
            Work::Flush => return,
            Work::Read(block) => {
                let read = self.guest.read_memory(address(queue, slot), BLOCK);
                let expected = self.content[block as usize];
                assert!(expected == 0 || read == block_of(block, expected), "block {block}");
            }
            Work::Write(block, number) => self.content[block as usize] = number,
        }
        let (Work::Read(block) | Work::Write(block, _)) = work else { return };
        self.busy[block as usize] = false;
    }

    fn is_idle(&self) -> bool {
        self.slots.iter().flatten().all(Option::is_none)
    }

    /// How many requests the records call unanswered.
    fn marked(&self) -> usize {
        let (area, file) = self.guest.inflight.as_ref().unwrap();
        let queue_bytes = area.mmap_size / 2;
        let is_marked = |entry: &u64| {
            let mut mark = [0];
            file.read_exact_at(&mut mark, *entry).unwrap();
            mark == [1]
        };
        let entries = (0..2).flat_map(|q| (0..u64::from(guest::RING_SIZE)).map(move |i| q * queue_bytes + 16 + i * 16));
        entries.filter(is_marked).count()
    }
}

#[test]
fn a_killed_server_loses_no_request_and_answers_none_twice() {
    let variable = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (kills, seed) = (variable("BULBIL_KILLS", 40), variable("BULBIL_SEED", 1));
    println!("BULBIL_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    let (socket, disk): (PathBuf, PathBuf) = (dir.path().join("vu.sock"), dir.path().join("disk"));
    File::create(&disk).unwrap().set_len(BLOCKS * BLOCK as u64).unwrap();
    let mut load = Workload::new(seed);
    let mut resubmitted = 0;
    for _ in 0..kills {
        let server = Server::start(&socket, &disk);
        let _machine = load.guest.connect(&socket);
        let enough = load.answers + 20 + load.random(400) as usize;
        run_until(&mut load, true, |load| load.answers >= enough);
        drop(server);
        resubmitted += load.marked();
    }
    let _server = Server::start(&socket, &disk);
    let _machine = load.guest.connect(&socket);
    run_until(&mut load, false, Workload::is_idle);
    assert_eq!(load.marked(), 0);
    let file = File::open(&disk).unwrap();
    for (block, number) in load.content.iter().enumerate().filter(|(_, number)| **number > 0) {
        let mut read = vec![0; BLOCK];
        file.read_exact_at(&mut read, (block * BLOCK) as u64).unwrap();
        assert_eq!(read, block_of(block as u64, *number), "block {block}");
    }
    println!("{} answers, {kills} kills, {resubmitted} requests unanswered at a kill", load.answers);
    assert!(resubmitted > 0, "nothing was in flight at any kill");
}

fn run_until(load: &mut Workload, submit: bool, done: impl Fn(&Workload) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done(load) {
        assert!(Instant::now() < deadline, "requests were lost");
        if submit {
            load.submit_all();
        }
        load.take_answers();
        std::thread::yield_now();
    }
}
