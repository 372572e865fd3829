//! What a file's requests mean on a block device.

use bulbil_types::BLOCK_BYTES;
use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, ExtentKind};
use fuser::Errno;
use tracing::{debug, warn};

/// Runs of data and holes asked for at a time.
const RUNS_AT_A_TIME: usize = 64;
/// Runs that are counted for the file's allocated size; what lies behind them counts as data.
const RUNS_COUNTED: usize = 4096;

// fallocate(2): the same on every architecture of Linux.
const FALLOC_FL_KEEP_SIZE: i32 = 0x01;
const FALLOC_FL_PUNCH_HOLE: i32 = 0x02;
const FALLOC_FL_ZERO_RANGE: i32 = 0x10;

/// Which change of a range `fallocate` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Clearing {
    /// Free it.
    Punch,
    /// Make it zeroes.
    Zero,
}

/// Where `lseek` is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sought {
    /// `SEEK_DATA`
    Data,
    /// `SEEK_HOLE`
    Hole,
}

impl Sought {
    /// The `whence` of a request; all others the kernel answers itself.
    pub(super) fn from_whence(whence: i32) -> Option<Self> {
        match whence {
            3 => Some(Self::Data),
            4 => Some(Self::Hole),
            _ => None,
        }
    }
}

/// The bytes of a request that lie within the file.
pub(super) fn clip(size_bytes: u64, offset: u64, len_bytes: u64) -> u64 {
    len_bytes.min(size_bytes.saturating_sub(offset))
}

/// Decides what a `fallocate` does: a change and its length within the file.
pub(super) fn clearing(size_bytes: u64, mode: i32, offset: u64, len_bytes: u64) -> Result<(Clearing, u64), Errno> {
    let end = offset.checked_add(len_bytes).ok_or(Errno::EFBIG)?;
    let change = match mode & !FALLOC_FL_KEEP_SIZE {
        FALLOC_FL_PUNCH_HOLE => Clearing::Punch,
        FALLOC_FL_ZERO_RANGE => Clearing::Zero,
        // Space cannot be promised: the overlay takes it when it is written to.
        _ => return Err(Errno::EOPNOTSUPP),
    };
    if end > size_bytes && mode & FALLOC_FL_KEEP_SIZE == 0 {
        return Err(Errno::EFBIG);
    }
    Ok((change, clip(size_bytes, offset, len_bytes)))
}

/// Makes a range within the file read as zeroes.
///
/// A hole in a file is zero to the byte, while a discard promises whole blocks only: its edges are zeroed.
pub(super) fn clear(device: &dyn BlockDevice, change: Clearing, offset: u64, len_bytes: u64) -> Result<(), BlockError> {
    let end = offset + len_bytes;
    let first_whole = offset.next_multiple_of(BLOCK_BYTES);
    let past_whole = end / BLOCK_BYTES * BLOCK_BYTES;
    if change == Clearing::Zero || first_whole >= past_whole {
        return device.write_zeroes(offset, len_bytes, false);
    }
    device.discard(first_whole, past_whole - first_whole, false)?;
    for (from, to) in [(offset, first_whole), (past_whole, end)] {
        if from < to {
            device.write_zeroes(from, to - from, false)?;
        }
    }
    Ok(())
}

/// Finds the next data or hole at or after `offset`; behind the last byte there is a hole.
pub(super) fn seek(device: &dyn BlockDevice, sought: Sought, offset: u64) -> Result<Option<u64>, BlockError> {
    let size_bytes = device.size_bytes();
    if offset >= size_bytes {
        return Ok(None);
    }
    let wanted = match sought {
        Sought::Data => ExtentKind::Data,
        Sought::Hole => ExtentKind::Hole,
    };
    let mut at = offset;
    while at < size_bytes {
        let runs = device.status(at, size_bytes - at, RUNS_AT_A_TIME)?;
        let before = at;
        for run in runs {
            if run.kind == wanted {
                return Ok(Some(at));
            }
            at += run.len_bytes;
        }
        if at == before {
            return Err(BlockError::new(BlockErrorKind::Io, "the device told no status"));
        }
    }
    Ok((sought == Sought::Hole).then_some(size_bytes))
}

/// The bytes that are allocated: those of data, counted up to a bound and never too few, since tools take a file
/// without any for empty.
pub(super) fn allocated_bytes(device: &dyn BlockDevice) -> u64 {
    let size_bytes = device.size_bytes();
    let Ok(runs) = device.status(0, size_bytes, RUNS_COUNTED) else { return size_bytes };
    let told: u64 = runs.iter().map(|run| run.len_bytes).sum();
    let data = runs.iter().filter(|run| run.kind == ExtentKind::Data);
    data.map(|run| run.len_bytes).sum::<u64>() + size_bytes.saturating_sub(told)
}

/// Tells the log everything and the kernel only the kind.
pub(super) fn errno(what: &'static str, offset: u64, len_bytes: u64, error: &BlockError) -> Errno {
    let source = std::error::Error::source(error);
    let errno = match error.kind() {
        BlockErrorKind::OutOfRange => Errno::EINVAL,
        BlockErrorKind::ReadOnly => Errno::EROFS,
        BlockErrorKind::NoSpace => Errno::ENOSPC,
        BlockErrorKind::Io | BlockErrorKind::Poisoned => Errno::EIO,
    };
    if matches!(error.kind(), BlockErrorKind::OutOfRange | BlockErrorKind::ReadOnly) {
        debug!(what, offset, len_bytes, %error, source, "request refused by the device");
    } else {
        warn!(what, offset, len_bytes, %error, source, "request failed");
    }
    errno
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clearing_stays_within_the_file_or_is_refused() {
        const PUNCH: i32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        assert_eq!(clearing(100, PUNCH, 10, 20), Ok((Clearing::Punch, 20)));
        assert_eq!(clearing(100, PUNCH, 90, 20), Ok((Clearing::Punch, 10)));
        assert_eq!(clearing(100, PUNCH, 200, 20), Ok((Clearing::Punch, 0)));
        assert_eq!(clearing(100, FALLOC_FL_ZERO_RANGE, 90, 10), Ok((Clearing::Zero, 10)));
        assert_eq!(clearing(100, FALLOC_FL_ZERO_RANGE, 90, 11), Err(Errno::EFBIG));
        assert_eq!(clearing(100, PUNCH, u64::MAX, 2), Err(Errno::EFBIG));
        for mode in [0, FALLOC_FL_KEEP_SIZE, 0x08, 0x20, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE] {
            assert_eq!(clearing(100, mode, 0, 10), Err(Errno::EOPNOTSUPP), "{mode:#x}");
        }
    }
}
