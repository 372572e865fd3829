//! The words every part of Bulbil shares: ids, names, sizes, block ranges.
//!
//! Parsing and display only; nothing here touches a file, a socket or a clock.

#![forbid(unsafe_code)]

mod ids;
mod machine;
mod names;
mod size;

pub use ids::{ImageId, InstanceId, ParseIdError, SnapshotId, VolumeId};
pub use machine::{Architecture, BootMode, ParseWordError, Personality};
pub use names::{ImageRef, Name, ParseNameError};
pub use size::{ByteSize, ParseSizeError};

/// Bytes in a block: the unit of deduplication, of an overlay's map and of crash atomicity.
pub const BLOCK_BYTES: u64 = 4096;

/// Bytes in a full frame of plain data: the unit that is stored, fetched and verified.
pub const FRAME_BYTES: u64 = 128 * 1024;

/// Blocks in a full frame.
pub const BLOCKS_PER_FRAME: u64 = FRAME_BYTES / BLOCK_BYTES;

/// [`BLOCK_BYTES`] as the length of a buffer.
pub const BLOCK_LEN: usize = 4096;

/// [`FRAME_BYTES`] as the length of a buffer.
pub const FRAME_LEN: usize = 128 * 1024;

/// The largest disk Bulbil handles: 64 TiB, the limit of the largest cloud volumes.
pub const MAX_DISK_BYTES: u64 = 64 << 40;
