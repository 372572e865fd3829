//! The image reader: a process for each import that parses the file in a [sandbox](crate::sandbox), so that a fault in
//! a parser is worth nothing.
//!
//! ```text
//! daemon                                                    image reader (bulbil image-reader)
//! ──────                                                    ──────
//! opens image, parents, scratch file; makes lanes
//! starts ───────── control socket = standard input ───────► dies with the thread that started it
//! Setup, and all descriptors (SCM_RIGHTS) ────────────────► applies the sandbox, then opens the image
//!                                           ◄────────────── Answer: what the disk is, or why it was refused
//! which ranges have data? ────────────────────────────────► next_extent
//!                                           ◄────────────── batches of ranges
//! read (offset, length) ── a lane for each thread ────────► read_exact_at
//!                                           ◄────────────── bytes, or why not
//! end of the control socket, or SIGKILL ──────────────────► ends
//! ```
//!
//! Where the disk is the image file byte for byte, which the reader finds out, the daemon reads it there: nothing is
//! parsed in that, and 5 to 11 % of the processor time of an import is saved.
//!
//! Neither side believes the other's lengths. What the reader says is checked as strictly as an image: a reader that
//! was taken over can give a disk any content and any error, as the image itself could, and nothing more.
//!
//! | module | what it does |
//! |---|---|
//! | `wire` | messages and their limits, without input or output |
//! | `link` | sockets: bounded waits, whole messages, descriptors |
//! | `child` | the process |
//! | `process` | starts it, keeps its last words, says how it ended |
//! | `client` | the disk, as the store wants it |
//! | `self_test` | tries what the sandbox must refuse |

mod child;
mod client;
mod link;
mod process;
mod self_test;
mod wire;

pub use child::run_image_reader;
pub(crate) use client::{ImageReader, ReaderError, ReaderJob};
pub(crate) use self_test::probe_sandbox;
pub use self_test::{Attempt, SelfTest, run_self_test};
