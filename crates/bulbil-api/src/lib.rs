//! The REST API of the Bulbil daemon: server and client.
//!
//! HTTP/1.1 over the unix socket in the data directory; whoever may open the socket may do
//! everything. Bodies are JSON. What takes long (imports, exports, copies, `warm`, `gc`, `scrub`, `launch`, `start`) answers with a
//! stream of [`Event`]s, one JSON document per line; the last one is `done` or `error`. Dropping the
//! connection cancels an import, export, copy, warm or scrub, and only ends the watching of a launch.
//!
//! | method and path | does |
//! |---|---|
//! | `GET /v1/health` | tells version and process id |
//! | `GET /v1/images`, `POST /v1/images` | lists; imports (stream) |
//! | `GET`, `DELETE /v1/images/{image}` | shows; removes |
//! | `POST /v1/images/{image}/export` | writes a disk image file (stream) |
//! | `POST /v1/images/{image}/copy` | copies into another store (stream) |
//! | `POST /v1/images/{image}/warm` | fills the cache with it (stream) |
//! | `POST /v1/image-copies` | copies from another store (stream) |
//! | `POST /v1/offered-images` | lists what another store offers by name |
//! | `GET /v1/instances`, `POST /v1/instances?wait=` | lists; launches (stream) |
//! | `POST /v1/launch-checks` | checks of a launch what does not depend on the image |
//! | `GET`, `DELETE /v1/instances/{instance}?force=` | shows; removes |
//! | `POST /v1/instances/{instance}/start?wait=` | starts (stream) |
//! | `POST /v1/instances/{instance}/stop?grace_s=&force=` | stops and waits until it is |
//! | `GET`, `POST /v1/volumes` | lists; creates |
//! | `GET`, `DELETE /v1/volumes/{volume}` | shows; removes |
//! | `POST /v1/volumes/{volume}/resize` | makes it larger, and a running instance sees it |
//! | `POST /v1/volumes/{volume}/snapshot`, `/clone` | takes its content of this moment, running or not |
//! | `GET /v1/snapshots` | lists |
//! | `GET`, `DELETE /v1/snapshots/{snapshot}` | shows; removes |
//! | `GET /v1/store` | what the store takes |
//! | `GET /v1/store` | what the store holds and what each image costs |
//! | `GET /v1/store/keys` | lists the keys that open the store |
//! | `POST /v1/store/keys/rotate` | replaces the key of this host |
//! | `POST /v1/store/data-keys` | adds a data key |
//! | `POST /v1/store/gc` | frees what nothing uses (stream) |
//! | `POST /v1/store/scrub` | reads everything again, names and heals damage (stream) |
//! | `POST /v1/shutdown` | ends the daemon; instances go on |
//!
//! Errors are `{"error": {"code", "message", "causes"}}` with a matching status; `code` is an
//! [`ErrorCode`](bulbil_control::ErrorCode).

#![forbid(unsafe_code)]

mod client;
mod event;
mod server;
mod volumes;

pub use client::{Client, ClientError, EventStream};
pub use event::{Event, Health, Wait};
pub use server::serve;
