//! Threads for requests that may wait.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::buffers::BufferPool;
use super::connection::{Charge, Connection};
use super::stats::Counters;
use super::wire::reply::{self, Failure};
use super::wire::request::{Command, Request};
use super::wire::{Errno, reply::ShortReply};
use super::{execute, lock};

/// How long a thread waits for work before it ends, and the last one frees the kept buffers.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// The worker threads of one server; they start when needed and end when idle.
pub(super) struct WorkerPool {
    max_threads: usize,
    queue: Mutex<Queue>,
    work: Condvar,
    pub(super) buffers: BufferPool,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl WorkerPool {
    pub(super) fn new(max_threads: usize) -> Self {
        Self { max_threads, queue: Mutex::default(), work: Condvar::new(), buffers: BufferPool::default() }
    }

    /// Queues a job, first in first out, starting a thread when none is free.
    ///
    /// When no thread at all can be had the job runs here, on the caller.
    pub(super) fn submit(self: &Arc<Self>, job: Job) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.jobs.len() <= queue.idle || queue.threads == self.max_threads {
            drop(queue);
            self.work.notify_one();
            return;
        }
        queue.threads += 1;
        if self.start_thread().is_ok() {
            return;
        }
        queue.threads -= 1;
        if queue.threads == 0 {
            let jobs = std::mem::take(&mut queue.jobs);
            drop(queue);
            jobs.into_iter().for_each(|job| job.run(&self.buffers));
        }
    }

    /// Lets the threads end once the queue is empty.
    pub(super) fn close(&self) {
        lock(&self.queue).closed = true;
        self.work.notify_all();
    }

    fn start_thread(self: &Arc<Self>) -> io::Result<()> {
        let pool = Arc::clone(self);
        std::thread::Builder::new().name("nbd-worker".to_owned()).spawn(move || {
            let _count = ThreadCount(&pool);
            while let Some(job) = pool.next_job() {
                job.run(&pool.buffers);
            }
        })?;
        Ok(())
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            let (woken, waited) =
                self.work.wait_timeout(queue, IDLE_LIMIT).unwrap_or_else(std::sync::PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                return None;
            }
        }
    }
}

/// Counts a thread out, also when a device panicked in it.
struct ThreadCount<'a>(&'a WorkerPool);

impl Drop for ThreadCount<'_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.threads -= 1;
        if queue.threads == 0 {
            self.0.buffers.clear();
        }
    }
}

/// A request on its way to a worker.
pub(super) struct Job {
    request: Request,
    /// A write's data, at the front of a buffer from the pool.
    payload: Option<Vec<u8>>,
    charge: Charge,
    answered: bool,
}

impl Job {
    pub(super) fn new(request: Request, payload: Option<Vec<u8>>, charge: Charge) -> Self {
        Self { request, payload, charge, answered: false }
    }

    fn run(mut self, buffers: &BufferPool) {
        let connection = Arc::clone(self.connection());
        let _span = connection.span.enter();
        let request = self.request;
        match request.command {
            Command::Read if request.len_bytes > 0 => self.run_read(buffers),
            Command::Read => self.reply(&reply::empty_read(connection.session.structured, request.cookie)),
            Command::BlockStatus { one_extent } => self.run_status(one_extent),
            _ => self.run_plain(buffers),
        }
    }

    fn connection(&self) -> &Arc<Connection> {
        self.charge.connection()
    }

    fn run_plain(&mut self, buffers: &BufferPool) {
        let payload = self.payload.take();
        let data = payload.as_deref().map_or(&[][..], |payload| &payload[..self.request.len_bytes as usize]);
        let done = execute::run(&*self.connection().device, &self.request, data, buffers);
        if let Some(payload) = payload {
            buffers.give(payload);
        }
        self.reply(&short_reply(self.connection(), &self.request, done));
    }

    fn run_read(&mut self, buffers: &BufferPool) {
        let (request, connection) = (self.request, self.connection());
        let structured = connection.session.structured;
        let header_bytes = reply::read_header_bytes(structured);
        let mut buffer = buffers.take(header_bytes + request.len_bytes as usize);
        let (header, rest) = buffer.split_at_mut(header_bytes);
        let data = &mut rest[..request.len_bytes as usize];
        match execute::read(&*connection.device, &request, data) {
            Ok(()) => {
                reply::write_read_header(structured, header, request.cookie, request.offset, request.len_bytes);
                connection.send(&buffer[..header_bytes + request.len_bytes as usize]);
                self.answered = true;
            }
            Err(failure) => self.reply(&short_reply(self.connection(), &request, Err(failure))),
        }
        buffers.give(buffer);
    }

    fn run_status(&mut self, one_extent: bool) {
        match status_reply(self.connection(), &self.request, one_extent) {
            Ok(bytes) => {
                self.connection().send(&bytes);
                self.answered = true;
            }
            Err(failure) => self.reply(&short_reply(self.connection(), &self.request, Err(failure))),
        }
    }

    fn reply(&mut self, reply: &ShortReply) {
        self.connection().send(reply.as_bytes());
        self.answered = true;
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Only a panic in the device leaves a request unanswered; the client must not wait for it.
        if !self.answered {
            self.connection().sever();
        }
    }
}

/// The reply to a request without data in its reply, counted when it failed.
pub(super) fn short_reply(connection: &Connection, request: &Request, done: Result<(), Failure>) -> ShortReply {
    match done {
        Ok(()) => reply::success(request.cookie),
        Err(failure) => {
            Counters::count(&connection.counters.failures);
            reply::failure(connection.session.structured, request.cookie, failure)
        }
    }
}

/// The whole reply to a status request.
pub(super) fn status_reply(connection: &Connection, request: &Request, one_extent: bool) -> Result<Vec<u8>, Failure> {
    let extents = execute::status(&*connection.device, request, one_extent)?;
    let mut bytes = Vec::with_capacity(24 + 8 * extents.len());
    if reply::push_block_status(&mut bytes, request.cookie, request.len_bytes, &extents) {
        Ok(bytes)
    } else {
        Err(Failure::new(Errno::Io, "the device told no status"))
    }
}
