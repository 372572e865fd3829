//! A vhost-user-blk server: the disk of a virtual machine over memory that both share.
//!
//! It follows QEMU's `docs/interop/vhost-user.rst` and section 5.2 of the virtio specification.
//!
//! ```text
//!  frontend (QEMU, Cloud Hypervisor, …)                       this process
//!  control socket ── messages ─► wire ─► Session ── starts ─► one thread per queue (queue, ring)
//!  guest memory, eventfds ─────────── shared ───────────────► chain ─► Request ─► Disk ─► device
//!                                                                    └ slow ones ─► workers
//!  records of requests in flight ──── shared ───────────────► inflight
//! ```
//!
//! * A request is *fast* when the device says that it can be answered from memory
//!   ([`BlockDevice::is_fast`](bulbil_volume::BlockDevice::is_fast)) and it is short; it is carried out by the queue's
//!   thread. All others go to workers, so that a fast request never stands behind a slow one.
//! * Answers go out in any order. A guest that did not take the feature `FLUSH` gets every change made durable before
//!   it is answered; one that did flushes by itself.
//! * Nothing that a guest writes is believed: chains are walked with bounds, data is copied, and what no driver sends
//!   stops that queue until the guest resets its device.
//! * This process may be killed at any moment. The frontend keeps the records of requests in flight, connects again, and
//!   the next process repeats what was not answered.
//!
//! Only the messages are this crate's own: `vhost` 0.18 cannot send the message for a new size, and the request handler
//! of `vhost-user-backend` 0.24 refuses records in flight. Rings and memory are virtio-queue's and vm-memory's.
//!
//! Deliberately absent: packed rings, live migration (a log of written pages), and switching the write cache.

mod chain;
mod config;
mod execute;
mod inflight;
mod memory;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod stats;
mod wire;
mod workers;

pub use crate::nbd::ServeError;
pub use server::{MAX_QUEUES, Options, VhostUserHandle, VhostUserServer};
pub use stats::Stats;

use crate::nbd::lock;
