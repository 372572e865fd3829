//! A Network Block Device server: synchronous, threaded, on a unix socket.
//!
//! It follows the protocol as written in
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>; section names in these
//! modules' comments are that document's.
//!
//! ```text
//!            accept thread ──► one receiving thread per connection
//!                                  │ handshake: bytes ─► wire::option ─► Negotiation ─► Session
//!                                  │ requests:  bytes ─► wire::request ─► checked Request
//!                                  ▼
//!                    fast? ── yes ─► executed here, replies collected in one batch ─┐
//!                      │                                                            ├─► socket
//!                      └─ no ──► worker pool (shared by the server) ────────────────┘
//! ```
//!
//! * A request is *fast* when the device says that it can be answered from memory
//!   ([`BlockDevice::is_fast`](bulbil_volume::BlockDevice::is_fast)) and it is small.
//!   Everything that may wait for a disk or the network (cold reads, flushes, forced unit access,
//!   discards) runs on a worker, so a fast request never stands behind a slow one.
//! * Replies go out in any order. A flush is handed to the device after it was received, and a
//!   write is answered after the device has returned, so by the device's contract a flush on any
//!   connection covers every write answered before on every connection (`CAN_MULTI_CONN`).
//! * A connection may hold [`Limits::in_flight_bytes`] in workers; then its thread stops reading
//!   requests until some are answered. A client that does not read its replies occupies its own
//!   threads only, never a worker for longer than a moment.
//!
//! Deliberately absent: TLS (the socket file's permissions are the access control), extended
//! headers, and TCP.

mod buffers;
mod connection;
mod error;
mod execute;
mod handshake;
mod negotiation;
mod receiver;
mod server;
pub(crate) mod socket;
mod stats;
pub mod wire;
mod workers;

pub use error::ServeError;
pub use negotiation::{AdvertisedExport, Negotiation, Outcome};
pub use server::{Export, Limits, NbdServer, ServerHandle};
pub use stats::Stats;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex` also after a panic elsewhere: every section guarded in this module leaves its
/// data valid at each step, and one failed connection must not end the others.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
