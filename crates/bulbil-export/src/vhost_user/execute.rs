//! Carries out requests on the device.

use std::sync::Arc;

use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind};
use tracing::{debug, warn};

use super::config::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES};
use super::memory::{Cursor, Memory};
use super::request::{Command, Request, Status};

/// Bytes of the name a guest reads with `GET_ID`.
pub(super) const ID_BYTES: usize = 20;
/// Bytes copied at a time. Requests are as long as the guest likes; what they make this process hold is not.
const PIECE_BYTES: u32 = 1 << 20;
/// The longest read or write that is carried out on the queue's own thread.
const INLINE_MAX_BYTES: u32 = 256 << 10;
/// A write of whole blocks of this size needs nothing of what was there before.
const BLOCK_BYTES: u64 = 4096;
const RANGE_BYTES: u32 = 16;
const FLAG_UNMAP: u32 = 1;

/// The device as one queue sees it.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) id: [u8; ID_BYTES],
    /// The guest has not taken `FLUSH`, so it will never flush: every change is durable before it is answered.
    pub(super) write_through: bool,
}

/// Why a request was not carried out.
#[derive(Debug)]
enum Failure {
    /// The request is nothing this device could do; the guest's fault.
    Refused(&'static str),
    Unsupported,
    Device(BlockError),
}

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        Self::Device(error)
    }
}

impl From<super::memory::BadAddress> for Failure {
    fn from(_: super::memory::BadAddress) -> Self {
        Self::Refused("data outside the guest's memory")
    }
}

impl Disk {
    /// Whether a request is quick enough for the queue's own thread.
    pub(super) fn is_inline(&self, request: &Request) -> bool {
        let is_short = request.data_bytes <= INLINE_MAX_BYTES;
        let Some((offset, len)) = request.range() else { return true };
        match request.command {
            Command::Read => is_short && self.device.is_fast(offset, len),
            Command::Write if self.write_through => false,
            Command::Write => {
                let is_whole = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
                is_short && (is_whole || self.device.is_fast(offset, len))
            }
            Command::Flush | Command::Discard | Command::WriteZeroes => false,
            Command::GetId | Command::Unknown(_) => true,
        }
    }

    /// Carries out a request; `bounce` is kept between requests.
    pub(super) fn run(&self, memory: &Memory, request: &Request, bounce: &mut Vec<u8>) -> Status {
        match self.try_run(memory, request, bounce) {
            Ok(()) => Status::Ok,
            Err(failure) => report(request, &failure),
        }
    }

    fn try_run(&self, memory: &Memory, request: &Request, bounce: &mut Vec<u8>) -> Result<(), Failure> {
        if matches!(request.command, Command::Unknown(_)) {
            return Err(Failure::Unsupported);
        }
        if request.wrong_direction {
            return Err(Failure::Refused("data in the wrong direction"));
        }
        match request.command {
            Command::Read => self.read(memory, request, bounce),
            Command::Write => self.write(memory, request, bounce),
            Command::Flush => Ok(self.device.flush()?),
            Command::GetId => {
                let len = ID_BYTES.min(request.data_bytes as usize);
                Ok(Cursor::new(&request.data).write(memory, &self.id[..len])?)
            }
            Command::Discard => self.discard(memory, request),
            Command::WriteZeroes => self.write_zeroes(memory, request, bounce),
            Command::Unknown(_) => Err(Failure::Unsupported),
        }
    }

    fn checked_range(&self, request: &Request) -> Result<(u64, u64), Failure> {
        let (offset, len) = request.range().ok_or(Failure::Refused("not whole sectors, or a range that wraps"))?;
        self.check_end(offset, len)?;
        Ok((offset, len))
    }

    fn check_end(&self, offset: u64, len: u64) -> Result<(), Failure> {
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.device.size_bytes());
        if is_inside { Ok(()) } else { Err(Failure::Refused("past the end")) }
    }

    fn read(&self, memory: &Memory, request: &Request, bounce: &mut Vec<u8>) -> Result<(), Failure> {
        let (offset, _) = self.checked_range(request)?;
        let mut data = Cursor::new(&request.data);
        for (done, len) in pieces(request.data_bytes.into()) {
            let piece = room(bounce, len);
            self.device.read_at(piece, offset + done)?;
            data.write(memory, piece)?;
        }
        Ok(())
    }

    fn write(&self, memory: &Memory, request: &Request, bounce: &mut Vec<u8>) -> Result<(), Failure> {
        let (offset, len_bytes) = self.checked_range(request)?;
        let mut data = Cursor::new(&request.data);
        // Several pieces are made durable together.
        let is_one = len_bytes <= PIECE_BYTES.into();
        for (done, len) in pieces(len_bytes) {
            let piece = room(bounce, len);
            data.read(memory, piece)?;
            self.device.write_at(piece, offset + done, self.write_through && is_one)?;
        }
        if self.write_through && !is_one {
            self.device.flush()?;
        }
        Ok(())
    }

    fn discard(&self, memory: &Memory, request: &Request) -> Result<(), Failure> {
        for range in self.ranges(memory, request, MAX_DISCARD_SECTORS, 0)? {
            self.device.discard(range.offset, range.len_bytes, self.write_through)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, memory: &Memory, request: &Request, bounce: &mut Vec<u8>) -> Result<(), Failure> {
        for range in self.ranges(memory, request, MAX_WRITE_ZEROES_SECTORS, FLAG_UNMAP)? {
            if range.unmap {
                self.device.write_zeroes(range.offset, range.len_bytes, self.write_through)?;
            } else {
                self.provision_zeroes(&range, bounce)?;
            }
        }
        Ok(())
    }

    /// Writes real zeroes, so that later writes to the range cannot fail for want of space.
    fn provision_zeroes(&self, range: &Range, bounce: &mut Vec<u8>) -> Result<(), Failure> {
        for (done, len) in pieces(range.len_bytes) {
            let piece = room(bounce, len);
            piece.fill(0);
            self.device.write_at(piece, range.offset + done, false)?;
        }
        if self.write_through {
            self.device.flush()?;
        }
        Ok(())
    }

    /// Reads the ranges of a discard or write-zeroes request and checks all of them before any is touched.
    fn ranges(
        &self,
        memory: &Memory,
        request: &Request,
        max_sectors: u32,
        known_flags: u32,
    ) -> Result<Vec<Range>, Failure> {
        let count = request.data_bytes / RANGE_BYTES;
        if !request.data_bytes.is_multiple_of(RANGE_BYTES) || !(1..=MAX_RANGES).contains(&count) {
            return Err(Failure::Refused("no whole ranges, or too many"));
        }
        let mut data = Cursor::new(&request.data);
        let mut ranges = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let mut bytes = [0; RANGE_BYTES as usize];
            data.read(memory, &mut bytes)?;
            let range = Range::parse(&bytes, max_sectors, known_flags)?;
            self.check_end(range.offset, range.len_bytes)?;
            ranges.push(range);
        }
        Ok(ranges)
    }
}

struct Range {
    offset: u64,
    len_bytes: u64,
    unmap: bool,
}

impl Range {
    /// `u64 sector, u32 sectors, u32 flags`
    fn parse(bytes: &[u8; RANGE_BYTES as usize], max_sectors: u32, known_flags: u32) -> Result<Self, Failure> {
        let [a, b, c, d, e, f, g, h, sectors @ .., i, j, k, l] = *bytes;
        let (sectors, flags) = (u32::from_le_bytes(sectors), u32::from_le_bytes([i, j, k, l]));
        if flags & !known_flags != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Failure::Refused("a range that is too long"));
        }
        let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Refused("past the end"))?;
        Ok(Self { offset, len_bytes: u64::from(sectors) * SECTOR_BYTES, unmap: flags & FLAG_UNMAP != 0 })
    }
}

/// Cuts a length into pieces: where each begins, and its length.
fn pieces(len_bytes: u64) -> impl Iterator<Item = (u64, u32)> {
    (0..len_bytes).step_by(PIECE_BYTES as usize).map(move |done| {
        let rest = u32::try_from(len_bytes - done).unwrap_or(PIECE_BYTES);
        (done, rest.min(PIECE_BYTES))
    })
}

fn room(bounce: &mut Vec<u8>, len: u32) -> &mut [u8] {
    let len = len as usize;
    if bounce.len() < len {
        bounce.resize(len, 0);
    }
    &mut bounce[..len]
}

/// Tells the log everything and the guest only that it failed: virtio-blk has no more words.
fn report(request: &Request, failure: &Failure) -> Status {
    let (command, sector, data_bytes) = (request.command, request.sector, request.data_bytes);
    match failure {
        Failure::Unsupported => {
            debug!(?command, sector, "request is not supported");
            return Status::Unsupported;
        }
        Failure::Refused(reason) => debug!(?command, sector, data_bytes, reason, "request refused"),
        Failure::Device(error) => {
            let source = std::error::Error::source(error);
            if matches!(error.kind(), BlockErrorKind::OutOfRange | BlockErrorKind::ReadOnly) {
                debug!(?command, sector, data_bytes, %error, source, "request refused by the device");
            } else {
                warn!(?command, sector, data_bytes, %error, source, "request failed");
            }
        }
    }
    Status::IoError
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_length_once() {
        let piece = u64::from(PIECE_BYTES);
        let cut: Vec<_> = pieces(2 * piece + 3).collect();
        assert_eq!(cut, [(0, PIECE_BYTES), (piece, PIECE_BYTES), (2 * piece, 3)]);
        assert_eq!(pieces(0).count(), 0);
        assert_eq!(pieces(u64::from(u32::MAX)).map(|(_, len)| u64::from(len)).sum::<u64>(), u64::from(u32::MAX));
    }
}
