//! Requests of the guest: from a descriptor chain to a command that is checked against nothing but itself.
//!
//! ```text
//! readable: u32 type, u32 reserved, u64 sector, then data to write
//! writable: room for data that is read, then one byte of status
//! ```
//!
//! The bytes are taken as two streams: how they are cut into descriptors means nothing (virtio 1.2, 2.7.4).

use vm_memory::GuestAddress;

use super::chain::Chain;
use super::config::SECTOR_BYTES;
use super::memory::{Cursor, Memory, Segment};

const HEADER_BYTES: u32 = 16;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown(u32),
}

impl Command {
    fn from_wire(code: u32) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            4 => Self::Flush,
            8 => Self::GetId,
            11 => Self::Discard,
            13 => Self::WriteZeroes,
            other => Self::Unknown(other),
        }
    }

    /// Whether the data flows from the guest to the device.
    pub(super) fn takes_data(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }
}

/// The status byte of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request with a place for its status. `sector` and `data` are as the guest gave them.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) sector: u64,
    /// Memory to take data from or to put it into.
    pub(super) data: Vec<Segment>,
    pub(super) data_bytes: u32,
    pub(super) status: GuestAddress,
    /// Data stands on the side of the chain where this command has none.
    pub(super) wrong_direction: bool,
}

/// A chain without a whole header or without a byte for the status. The queue it is in is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request without a header or without room for its status")]
pub(super) struct NotARequest;

impl Request {
    /// Reads the header of a chain; the chain's lists are used up.
    pub(super) fn parse(memory: &Memory, chain: &mut Chain) -> Result<Self, NotARequest> {
        let mut header = [0; HEADER_BYTES as usize];
        Cursor::new(&chain.readable).read(memory, &mut header).map_err(|_| NotARequest)?;
        let (code, sector) = parse_header(&header);
        let command = Command::from_wire(code);
        let status = cut_status(&mut chain.writable).ok_or(NotARequest)?;
        cut_front(&mut chain.readable, HEADER_BYTES);
        let (readable, writable) = (chain.readable_bytes - HEADER_BYTES, chain.writable_bytes - 1);
        let (list, data_bytes, other_bytes) = if command.takes_data() {
            (&mut chain.readable, readable, writable)
        } else {
            (&mut chain.writable, writable, readable)
        };
        let data = std::mem::take(list);
        Ok(Self { command, sector, data, data_bytes, status, wrong_direction: other_bytes != 0 })
    }

    /// The range of a read or write in bytes, if it can be one at all.
    pub(super) fn range(&self) -> Option<(u64, u64)> {
        let len = u64::from(self.data_bytes);
        let offset = self.sector.checked_mul(SECTOR_BYTES)?;
        offset.checked_add(len)?;
        len.is_multiple_of(SECTOR_BYTES).then_some((offset, len))
    }

    /// Bytes of the guest's memory that an answer with `status` has written.
    pub(super) fn written_bytes(&self, status: Status) -> u32 {
        let is_data = status == Status::Ok && !self.command.takes_data();
        if is_data { self.data_bytes.saturating_add(1) } else { 1 }
    }
}

fn parse_header(header: &[u8; HEADER_BYTES as usize]) -> (u32, u64) {
    let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector))
}

/// Takes the last byte away from a list of segments.
fn cut_status(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    while segments.pop_if(|last| last.len_bytes == 0).is_some() {}
    let last = segments.last_mut()?;
    last.len_bytes -= 1;
    Some(GuestAddress(last.address.0.checked_add(u64::from(last.len_bytes))?))
}

/// Takes the first bytes away; there are as many.
fn cut_front(segments: &mut [Segment], mut count: u32) {
    for segment in segments {
        let cut = count.min(segment.len_bytes);
        // The header was read from here, so the address does not wrap.
        segment.address = GuestAddress(segment.address.0.saturating_add(u64::from(cut)));
        segment.len_bytes -= cut;
        count -= cut;
    }
}
