//! Carries out checked requests on a device.

use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, StatusExtent};
use tracing::{debug, warn};

use super::buffers::BufferPool;
use super::wire::reply::Failure;
use super::wire::request::{Command, Request};
use super::wire::{Errno, PREFERRED_BLOCK_BYTES};

/// Largest read answered on the receiving thread. Copying this much takes about as long as waking
/// a worker several times over; a larger one would hold back requests behind it noticeably.
const INLINE_READ_MAX_BYTES: u32 = 256 << 10;
/// Largest write carried out on the receiving thread, straight from its receive buffer.
const INLINE_WRITE_MAX_BYTES: u32 = 256 << 10;
/// Longest range whose status is looked up on the receiving thread.
const INLINE_STATUS_MAX_BYTES: u32 = 64 << 20;
/// The most extents in one status reply; a client asks again from where they end. The protocol's
/// bound is 2^20, which would be 8 MiB per request.
const MAX_STATUS_EXTENTS: usize = 8 << 10;
/// How much is read ahead or zeroed at a time.
const STEP_BYTES: u32 = 1 << 20;
/// The most that one cache request reads; the rest of a longer one is left to later reads.
const MAX_CACHE_BYTES: u32 = 32 << 20;

/// Whether `request` is quick enough for the receiving thread.
pub(super) fn is_inline(device: &dyn BlockDevice, request: &Request) -> bool {
    let is_fast = || device.is_fast(request.offset, u64::from(request.len_bytes));
    match request.command {
        Command::Read => request.len_bytes <= INLINE_READ_MAX_BYTES && is_fast(),
        // A write of part of a block first needs the rest of it.
        Command::Write { fua: false } => {
            request.len_bytes <= INLINE_WRITE_MAX_BYTES && (is_block_aligned(request) || is_fast())
        }
        Command::BlockStatus { .. } => request.len_bytes <= INLINE_STATUS_MAX_BYTES,
        Command::Cache => is_fast(),
        _ => false,
    }
}

fn is_block_aligned(request: &Request) -> bool {
    request.offset.is_multiple_of(u64::from(PREFERRED_BLOCK_BYTES))
        && request.len_bytes.is_multiple_of(PREFERRED_BLOCK_BYTES)
}

/// Reads the request's range into `buf`, which has its length.
pub(super) fn read(device: &dyn BlockDevice, request: &Request, buf: &mut [u8]) -> Result<(), Failure> {
    device.read_at(buf, request.offset).map_err(|error| failure(request, &error))
}

/// Looks up the status of the request's range.
pub(super) fn status(
    device: &dyn BlockDevice,
    request: &Request,
    one_extent: bool,
) -> Result<Vec<StatusExtent>, Failure> {
    let max_extents = if one_extent { 1 } else { MAX_STATUS_EXTENTS };
    let mut extents = device
        .status(request.offset, u64::from(request.len_bytes), max_extents)
        .map_err(|error| failure(request, &error))?;
    extents.truncate(max_extents);
    Ok(extents)
}

/// Carries out a request that is answered without data. `payload` is a write's data.
pub(super) fn run(
    device: &dyn BlockDevice,
    request: &Request,
    payload: &[u8],
    buffers: &BufferPool,
) -> Result<(), Failure> {
    let (offset, len_bytes) = (request.offset, u64::from(request.len_bytes));
    let done = match request.command {
        Command::Write { fua } => device.write_at(payload, offset, fua),
        Command::Flush => device.flush(),
        Command::Trim { fua } => device.discard(offset, len_bytes, fua),
        Command::WriteZeroes { fua, no_hole: false } => device.write_zeroes(offset, len_bytes, fua),
        Command::WriteZeroes { fua, no_hole: true } => provision_zeroes(device, request, fua, buffers),
        Command::Cache => read_ahead(device, request, buffers),
        Command::Read | Command::BlockStatus { .. } | Command::Disconnect => Ok(()),
    };
    done.map_err(|error| failure(request, &error))
}

/// Writes real zeroes, so that later writes to the range cannot fail for want of space.
fn provision_zeroes(
    device: &dyn BlockDevice,
    request: &Request,
    fua: bool,
    buffers: &BufferPool,
) -> Result<(), BlockError> {
    let mut zeroes = buffers.take(request.len_bytes.min(STEP_BYTES) as usize);
    zeroes.fill(0);
    let done = steps(request.offset, request.len_bytes)
        .try_for_each(|(offset, len)| device.write_at(&zeroes[..len as usize], offset, false));
    buffers.give(zeroes);
    done?;
    // One flush instead of one forced unit access per step.
    if fua { device.flush() } else { Ok(()) }
}

fn read_ahead(device: &dyn BlockDevice, request: &Request, buffers: &BufferPool) -> Result<(), BlockError> {
    let len_bytes = request.len_bytes.min(MAX_CACHE_BYTES);
    let mut scratch = buffers.take(len_bytes.min(STEP_BYTES) as usize);
    let done = steps(request.offset, len_bytes)
        .filter(|(offset, len)| !device.is_fast(*offset, u64::from(*len)))
        .try_for_each(|(offset, len)| device.read_at(&mut scratch[..len as usize], offset));
    buffers.give(scratch);
    done
}

/// Cuts a range into pieces of at most [`STEP_BYTES`].
fn steps(offset: u64, len_bytes: u32) -> impl Iterator<Item = (u64, u32)> {
    (0..len_bytes)
        .step_by(STEP_BYTES as usize)
        .map(move |done| (offset + u64::from(done), STEP_BYTES.min(len_bytes - done)))
}

/// Tells the log everything and the client only the kind: a device's message may name host paths.
fn failure(request: &Request, error: &BlockError) -> Failure {
    let (command, offset, len_bytes) = (request.command, request.offset, request.len_bytes);
    let is_write = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
    let failure = match error.kind() {
        BlockErrorKind::OutOfRange if is_write => Failure::new(Errno::NoSpc, "the range ends past the export"),
        BlockErrorKind::OutOfRange => Failure::new(Errno::Inval, "the range ends past the export"),
        BlockErrorKind::ReadOnly => Failure::new(Errno::Perm, "the export is read only"),
        BlockErrorKind::NoSpace => Failure::new(Errno::NoSpc, "the host has no space left"),
        BlockErrorKind::Io => Failure::new(Errno::Io, "the device failed"),
        BlockErrorKind::Poisoned => Failure::new(Errno::Io, "the device stopped after an earlier failure"),
    };
    let source = std::error::Error::source(error);
    if matches!(error.kind(), BlockErrorKind::OutOfRange | BlockErrorKind::ReadOnly) {
        debug!(?command, offset, len_bytes, %error, source, "request refused by the device");
    } else {
        warn!(?command, offset, len_bytes, %error, source, "request failed");
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_the_range_once() {
        let pieces: Vec<_> = steps(5, 2 * STEP_BYTES + 3).collect();
        let step = u64::from(STEP_BYTES);
        assert_eq!(pieces, [(5, STEP_BYTES), (5 + step, STEP_BYTES), (5 + 2 * step, 3)]);
        assert_eq!(steps(5, 0).count(), 0);
    }
}
