//! Requests of the transmission phase.
//!
//! ```text
//! u32 magic | u16 flags | u16 type | u64 cookie | u64 offset | u32 length | payload (writes)
//! ```
//!
//! [`RequestHeader`] is what was sent; [`Session::check`] turns it into a [`Request`] that fits
//! the export and what was negotiated, or into the [`Failure`] to answer.

use super::reply::Failure;
use super::{Errno, Fields, MAX_PAYLOAD_BYTES, REQUEST_MAGIC, command_flags, commands, transmission_flags};

/// Bytes of a request before its payload.
pub const REQUEST_HEADER_BYTES: usize = 28;

/// A client's name for a request, returned as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

/// A request as sent, unchecked but for the magic number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Request type.
    pub command: u16,
    /// Returned in every reply.
    pub cookie: Cookie,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes in the range.
    pub len_bytes: u32,
}

impl RequestHeader {
    /// Parses a request header; `None` when the magic number is wrong, after which nothing on the
    /// connection can be trusted to be a request.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: Cookie(fields.u64()?),
            offset: fields.u64()?,
            len_bytes: fields.u32()?,
        })
    }

    /// Bytes of payload that follow the header, whether or not the request is acceptable.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        if self.command == commands::WRITE { self.len_bytes } else { 0 }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read the range. Every read is answered in one content chunk, so the flag `DF` changes
    /// nothing.
    Read,
    /// Write the payload.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// End the session.
    Disconnect,
    /// Make everything answered so far durable.
    Flush,
    /// The range is no longer needed.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// The range will be read soon.
    Cache,
    /// The range becomes zeroes.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Provision the range instead of punching it.
        no_hole: bool,
    },
    /// Describe the range.
    BlockStatus {
        /// Answer with one extent.
        one_extent: bool,
    },
}

/// A request that fits the export: the range lies inside it, the flags were negotiated, a payload
/// is at most [`MAX_PAYLOAD_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Returned in every reply.
    pub cookie: Cookie,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes in the range.
    pub len_bytes: u32,
    /// What to do with it.
    pub command: Command,
}

/// What was negotiated for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Size of the export.
    pub size_bytes: u64,
    /// Changing requests are refused.
    pub read_only: bool,
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// `base:allocation` was selected.
    pub block_status: bool,
}

impl Session {
    /// The transmission flags to advertise ("Transmission flags").
    ///
    /// `SEND_FAST_ZERO` is honest because the devices served here keep zeroes in their map: an
    /// aligned zeroing moves no data. Requests that would (unaligned or `NO_HOLE`) are refused.
    #[must_use]
    pub fn transmission_flags(&self) -> u16 {
        use transmission_flags as t;
        let mut flags = t::HAS_FLAGS | t::SEND_FLUSH | t::CAN_MULTI_CONN | t::SEND_CACHE;
        flags |= if self.read_only {
            t::READ_ONLY
        } else {
            t::SEND_FUA | t::SEND_TRIM | t::SEND_WRITE_ZEROES | t::SEND_FAST_ZERO
        };
        if self.structured {
            flags |= t::SEND_DF;
        }
        flags
    }

    /// Turns a header into a request that fits this session.
    ///
    /// # Errors
    /// The failure to answer, by the rules of "Error values" and of each request type.
    pub fn check(&self, header: &RequestHeader) -> Result<Request, Failure> {
        let command = self.check_command(header)?;
        self.check_flags(header)?;
        self.check_range(header, command)?;
        Ok(Request { cookie: header.cookie, offset: header.offset, len_bytes: header.len_bytes, command })
    }

    fn check_command(&self, header: &RequestHeader) -> Result<Command, Failure> {
        let fua = header.has(command_flags::FUA);
        let no_hole = header.has(command_flags::NO_HOLE);
        let command = match header.command {
            commands::READ => return Ok(Command::Read),
            commands::DISC => return Ok(Command::Disconnect),
            commands::FLUSH => return Ok(Command::Flush),
            commands::CACHE => return Ok(Command::Cache),
            commands::BLOCK_STATUS if !self.block_status => {
                return Err(Failure::new(Errno::Inval, "no metadata context was selected"));
            }
            commands::BLOCK_STATUS => {
                return Ok(Command::BlockStatus { one_extent: header.has(command_flags::REQ_ONE) });
            }
            commands::WRITE => Command::Write { fua },
            commands::TRIM => Command::Trim { fua },
            commands::WRITE_ZEROES => Command::WriteZeroes { fua, no_hole },
            _ => return Err(Failure::new(Errno::Inval, "unknown request type")),
        };
        if self.read_only { Err(Failure::new(Errno::Perm, "the export is read only")) } else { Ok(command) }
    }

    fn check_flags(&self, header: &RequestHeader) -> Result<(), Failure> {
        // "The server MUST accept all commands with this bit set", when FUA was offered at all.
        let mut allowed = if self.read_only { 0 } else { command_flags::FUA };
        match header.command {
            commands::READ if self.structured => allowed |= command_flags::DF,
            commands::WRITE_ZEROES => allowed |= command_flags::NO_HOLE | command_flags::FAST_ZERO,
            commands::BLOCK_STATUS => allowed |= command_flags::REQ_ONE,
            _ => {}
        }
        if header.command != commands::DISC && header.flags & !allowed != 0 {
            return Err(Failure::new(Errno::Inval, "a command flag was not negotiated for this request"));
        }
        if header.has(command_flags::FAST_ZERO) && !is_fast_zero(header) {
            return Err(Failure::new(Errno::NotSup, "zeroing this range is not faster than writing it"));
        }
        Ok(())
    }

    fn check_range(&self, header: &RequestHeader, command: Command) -> Result<(), Failure> {
        let end = header.offset.checked_add(u64::from(header.len_bytes));
        let inside = end.is_some_and(|end| end <= self.size_bytes);
        match command {
            Command::Disconnect => Ok(()),
            Command::Flush if header.offset != 0 || header.len_bytes != 0 => {
                Err(Failure::new(Errno::Inval, "a flush has no range"))
            }
            Command::Write { .. } | Command::WriteZeroes { .. } if !inside => {
                Err(Failure::new(Errno::NoSpc, "the range ends past the export"))
            }
            _ if !inside => Err(Failure::new(Errno::Inval, "the range ends past the export")),
            Command::Write { .. } if header.len_bytes > MAX_PAYLOAD_BYTES => {
                Err(Failure::new(Errno::Inval, "the payload is larger than was advertised"))
            }
            Command::Read if header.len_bytes > MAX_PAYLOAD_BYTES => {
                Err(Failure::new(Errno::Overflow, "the read is larger than was advertised"))
            }
            Command::BlockStatus { .. } if header.len_bytes == 0 => {
                Err(Failure::new(Errno::Inval, "an empty range has no status"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether zeroing is done in the device's map alone: whole blocks, holes allowed.
fn is_fast_zero(header: &RequestHeader) -> bool {
    let unit = u64::from(super::PREFERRED_BLOCK_BYTES);
    !header.has(command_flags::NO_HOLE)
        && header.offset.is_multiple_of(unit)
        && u64::from(header.len_bytes).is_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SESSION: Session = Session { size_bytes: 1 << 30, read_only: false, structured: true, block_status: true };

    fn header(command: u16, flags: u16, offset: u64, len_bytes: u32) -> RequestHeader {
        RequestHeader { flags, command, cookie: Cookie(7), offset, len_bytes }
    }

    fn check_errno(session: Session, header: RequestHeader, expected: Result<(), Errno>) {
        let got = session.check(&header).map(|_request| ()).map_err(|failure| failure.errno);
        assert_eq!(got, expected, "{header:?}");
    }

    #[test]
    fn ranges_past_the_end_follow_the_error_table() {
        let end = SESSION.size_bytes;
        for (command, errno) in [
            (commands::READ, Errno::Inval),
            (commands::WRITE, Errno::NoSpc),
            (commands::WRITE_ZEROES, Errno::NoSpc),
            (commands::TRIM, Errno::Inval),
            (commands::CACHE, Errno::Inval),
            (commands::BLOCK_STATUS, Errno::Inval),
        ] {
            check_errno(SESSION, header(command, 0, end - 1, 1), Ok(()));
            check_errno(SESSION, header(command, 0, end - 1, 2), Err(errno));
            check_errno(SESSION, header(command, 0, u64::MAX, u32::MAX), Err(errno));
        }
    }

    #[test]
    fn flags_are_accepted_only_where_they_belong() {
        use command_flags::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        check_errno(SESSION, header(commands::READ, FUA | DF, 0, 1), Ok(()));
        check_errno(SESSION, header(commands::WRITE, DF, 0, 1), Err(Errno::Inval));
        check_errno(SESSION, header(commands::READ, NO_HOLE, 0, 1), Err(Errno::Inval));
        check_errno(SESSION, header(commands::BLOCK_STATUS, REQ_ONE, 0, 1), Ok(()));
        check_errno(SESSION, header(commands::FLUSH, FUA, 0, 0), Ok(()));
        check_errno(SESSION, header(commands::WRITE_ZEROES, NO_HOLE, 1, 1), Ok(()));
        check_errno(SESSION, header(commands::WRITE_ZEROES, FAST_ZERO, 0, 4096), Ok(()));
        check_errno(SESSION, header(commands::WRITE_ZEROES, FAST_ZERO, 1, 4096), Err(Errno::NotSup));
        check_errno(SESSION, header(commands::WRITE_ZEROES, FAST_ZERO | NO_HOLE, 0, 4096), Err(Errno::NotSup));
        check_errno(SESSION, header(commands::TRIM, 1 << 9, 0, 1), Err(Errno::Inval));
        let simple = Session { structured: false, ..SESSION };
        check_errno(simple, header(commands::READ, DF, 0, 1), Err(Errno::Inval));
    }

    #[test]
    fn a_read_only_export_refuses_changes() {
        let session = Session { read_only: true, ..SESSION };
        for command in [commands::WRITE, commands::TRIM, commands::WRITE_ZEROES] {
            check_errno(session, header(command, command_flags::FUA, 0, 1), Err(Errno::Perm));
        }
        check_errno(session, header(commands::FLUSH, 0, 0, 0), Ok(()));
    }

    #[test]
    fn oversized_requests_are_refused() {
        check_errno(SESSION, header(commands::READ, 0, 0, MAX_PAYLOAD_BYTES), Ok(()));
        check_errno(SESSION, header(commands::READ, 0, 0, MAX_PAYLOAD_BYTES + 1), Err(Errno::Overflow));
        check_errno(SESSION, header(commands::WRITE, 0, 0, MAX_PAYLOAD_BYTES + 1), Err(Errno::Inval));
        check_errno(SESSION, header(commands::TRIM, 0, 0, 1 << 30), Ok(()));
        check_errno(SESSION, header(8, 0, 0, 0), Err(Errno::Inval));
        check_errno(SESSION, header(commands::FLUSH, 0, 0, 1), Err(Errno::Inval));
    }

    proptest! {
        #[test]
        fn any_header_is_a_request_inside_the_export_or_a_failure(
            bytes: [u8; REQUEST_HEADER_BYTES], magic: bool, low: bool, size_bytes: u64,
            read_only: bool, structured: bool, block_status: bool,
        ) {
            let mut bytes = bytes;
            if magic {
                bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            }
            if low {
                bytes[4..7].copy_from_slice(&[0; 3]);
                bytes[7] %= 9;
            }
            let session = Session { size_bytes, read_only, structured, block_status };
            let Some(header) = RequestHeader::parse(&bytes) else { return Ok(()) };
            if let Ok(request) = session.check(&header) && request.command != Command::Disconnect {
                prop_assert!(request.offset + u64::from(request.len_bytes) <= size_bytes);
            }
        }
    }
}
