//! Shows a block device as a file in a mounted directory, with the kernel's FUSE.
//!
//! The directory holds one regular file, [`DISK_FILE_NAME`], with the device's size and content: what takes a path
//! takes a volume (loop devices, file system tools, other machine monitors).
//!
//! ```text
//!  read, write, fsync … ─► kernel, page cache ─► /dev/fuse ─► one of a few receiving threads
//!                                                                │
//!                                    fast? ── yes ─► executed and answered here
//!                                      └─ no ──► worker pool, answered from there
//! ```
//!
//! * A request is *fast* when the device says that it can be answered from memory
//!   ([`BlockDevice::is_fast`](bulbil_volume::BlockDevice::is_fast)). Cold reads, syncs and discards run on workers, so
//!   a fast request never stands behind a slow one.
//! * **Durability is that of a file: durable after fsync.** The kernel's writeback cache is off, so a `write` that
//!   returned has been taken by the device, and `fsync`, `fdatasync`, `msync` and the flush of a loop device end in the
//!   device's own flush. Closing the file and `sync` alone promise nothing. The device is flushed once more when the
//!   directory is unmounted.
//! * The page cache is on, which `mmap` and loop devices need, and survives closing the file: nobody else can change a
//!   device that is mounted. Opened with `O_DIRECT`, the file is read past the cache.
//! * The file keeps its size: what would change it is refused. Nothing else can be made beside it.
//!
//! `docs/design/fuse.md` tells why.

mod error;
mod execute;
mod filesystem;
mod mount;
mod pool;

pub use error::FuseError;
pub use mount::{FuseMount, FuseOptions};

/// The name of the one file.
pub const DISK_FILE_NAME: &str = "disk.raw";
