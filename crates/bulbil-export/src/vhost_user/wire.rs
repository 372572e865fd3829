//! The messages of the control socket, as a pure codec.
//!
//! ```text
//! 0   u32  request
//! 4   u32  flags: bits 0-1 version (1), bit 2 reply, bit 3 a reply is wanted
//! 8   u32  bytes of payload
//! 12       payload; file descriptors come beside the first byte
//! ```
//!
//! Numbers have the host's byte order (the peer shares memory with this process); only little-endian hosts are served.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 12;
/// The largest payload accepted. The longest one used is a memory table of eight regions, 264 bytes, or a
/// configuration space of 256 bytes and its header.
pub(super) const MAX_PAYLOAD_BYTES: usize = 4096;
/// The most file descriptors in one message: one for each memory region.
pub(super) const MAX_FDS: usize = 8;
/// The most memory regions (`VHOST_MEMORY_BASELINE_NREGIONS`).
pub(super) const MAX_REGIONS: usize = 8;
/// Bytes of a device's configuration space that can be asked for (`VHOST_USER_MAX_CONFIG_SIZE`).
const MAX_CONFIG_BYTES: u32 = 256;

const FLAG_VERSION: u32 = 0x1;
const FLAG_VERSION_MASK: u32 = 0x3;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// The message to a frontend that says the configuration space has changed, with its header.
pub(super) const CONFIG_CHANGE: [u8; HEADER_BYTES] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the device's feature bits.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Bits of `VHOST_USER_SET_PROTOCOL_FEATURES`.
pub(super) mod protocol {
    pub(in crate::vhost_user) const MQ: u64 = 1 << 0;
    pub(in crate::vhost_user) const REPLY_ACK: u64 = 1 << 3;
    pub(in crate::vhost_user) const BACKEND_REQ: u64 = 1 << 5;
    pub(in crate::vhost_user) const CONFIG: u64 = 1 << 9;
    pub(in crate::vhost_user) const INFLIGHT_SHMFD: u64 = 1 << 12;
}

/// The first twelve bytes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request: u32,
    pub(super) needs_reply: bool,
    pub(super) payload_bytes: usize,
}

/// A message that breaks the protocol, or that this server has not offered to understand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum WireError {
    #[error("a header of another version, a reply, or a payload that is too long")]
    BadHeader,
    #[error("request {0} is not offered")]
    NotOffered(u32),
    #[error("request {0} has a payload of the wrong length or content")]
    BadPayload(u32),
    #[error("request {0} has the wrong number of file descriptors")]
    BadFds(u32),
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let (request, flags, payload_bytes) = (fields.u32(), fields.u32(), fields.u32() as usize);
        if flags & FLAG_VERSION_MASK != FLAG_VERSION || flags & FLAG_REPLY != 0 || payload_bytes > MAX_PAYLOAD_BYTES {
            return Err(WireError::BadHeader);
        }
        Ok(Self { request, needs_reply: flags & FLAG_NEED_REPLY != 0, payload_bytes })
    }
}

/// A region of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// Where the guest sees it.
    pub(super) guest_address: u64,
    pub(super) len_bytes: u64,
    /// Where the frontend sees it; ring addresses are told this way.
    pub(super) user_address: u64,
    /// Where it begins in its file.
    pub(super) file_offset: u64,
}

/// A ring's addresses, as the frontend sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) index: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
}

/// Where the records of requests in flight are in their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InflightArea {
    pub(super) len_bytes: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

/// A request of the frontend. Those with `has_fd` take one file descriptor if it is set, none otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemoryTable(Vec<Region>),
    SetRingSize { index: u32, size: u32 },
    SetRingAddresses(RingAddresses),
    SetRingBase { index: u32, base: u32 },
    GetRingBase { index: u32 },
    SetRingKick { index: u32, has_fd: bool },
    SetRingCall { index: u32, has_fd: bool },
    SetRingError { index: u32, has_fd: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueCount,
    EnableRing { index: u32, enable: bool },
    SetBackendChannel,
    GetConfig { offset: u32, len: u32 },
    SetConfig,
    GetInflight(InflightArea),
    SetInflight(InflightArea),
}

impl Request {
    /// Reads a message's payload; `fds` file descriptors came with it.
    pub(super) fn parse(code: u32, payload: &[u8], fds: usize) -> Result<Self, WireError> {
        let bad = Err(WireError::BadPayload(code));
        let length =
            |expected: usize| if payload.len() == expected { Ok(()) } else { Err(WireError::BadPayload(code)) };
        let mut fields = Fields(payload);
        let request = match code {
            1 | 3 | 4 | 15 | 17 | 21 => {
                length(0)?;
                match code {
                    1 => Self::GetFeatures,
                    3 => Self::SetOwner,
                    4 => Self::ResetOwner,
                    15 => Self::GetProtocolFeatures,
                    17 => Self::GetQueueCount,
                    _ => Self::SetBackendChannel,
                }
            }
            2 | 16 => {
                length(8)?;
                if code == 2 { Self::SetFeatures(fields.u64()) } else { Self::SetProtocolFeatures(fields.u64()) }
            }
            5 => Self::SetMemoryTable(parse_regions(payload).ok_or(WireError::BadPayload(code))?),
            8 | 10 | 11 | 18 => {
                length(8)?;
                let (index, number) = (fields.u32(), fields.u32());
                match (code, number) {
                    (8, size) => Self::SetRingSize { index, size },
                    (10, base) => Self::SetRingBase { index, base },
                    (11, _) => Self::GetRingBase { index },
                    (_, 0 | 1) => Self::EnableRing { index, enable: number == 1 },
                    _ => return bad,
                }
            }
            9 => {
                length(40)?;
                let (index, _flags) = (fields.u32(), fields.u32());
                let (descriptors, used, available) = (fields.u64(), fields.u64(), fields.u64());
                Self::SetRingAddresses(RingAddresses { index, descriptors, used, available })
            }
            12..=14 => {
                length(8)?;
                let value = fields.u64();
                // Bits 0-7 are the queue, bit 8 says that there is no file descriptor.
                let (index, has_fd) = ((value & 0xff) as u32, value & 0x100 == 0);
                match code {
                    12 => Self::SetRingKick { index, has_fd },
                    13 => Self::SetRingCall { index, has_fd },
                    _ => Self::SetRingError { index, has_fd },
                }
            }
            24 | 25 => {
                if payload.len() < 12 {
                    return bad;
                }
                let (offset, len) = (fields.u32(), fields.u32());
                if len > MAX_CONFIG_BYTES || offset > MAX_CONFIG_BYTES || payload.len() != 12 + len as usize {
                    return bad;
                }
                if code == 24 { Self::GetConfig { offset, len } } else { Self::SetConfig }
            }
            31 | 32 => {
                // 20 bytes of fields; C pads them to 24.
                if payload.len() != 20 && payload.len() != 24 {
                    return bad;
                }
                let (len_bytes, offset) = (fields.u64(), fields.u64());
                let area = InflightArea { len_bytes, offset, queues: fields.u16(), queue_size: fields.u16() };
                if code == 31 { Self::GetInflight(area) } else { Self::SetInflight(area) }
            }
            other => return Err(WireError::NotOffered(other)),
        };
        if fds == request.fds() { Ok(request) } else { Err(WireError::BadFds(code)) }
    }

    /// How many file descriptors belong to the request.
    fn fds(&self) -> usize {
        match self {
            Self::SetMemoryTable(regions) => regions.len(),
            Self::SetRingKick { has_fd, .. } | Self::SetRingCall { has_fd, .. } | Self::SetRingError { has_fd, .. } => {
                usize::from(*has_fd)
            }
            Self::SetBackendChannel | Self::SetInflight(_) => 1,
            _ => 0,
        }
    }
}

fn parse_regions(payload: &[u8]) -> Option<Vec<Region>> {
    let (head, table) = payload.split_at_checked(8)?;
    let count = Fields(head).u32() as usize;
    if count == 0 || count > MAX_REGIONS || table.len() != count * 32 {
        return None;
    }
    let mut fields = Fields(table);
    let regions = (0..count).map(|_| {
        let (guest_address, len_bytes) = (fields.u64(), fields.u64());
        let (user_address, file_offset) = (fields.u64(), fields.u64());
        let fits = |start: u64| start.checked_add(len_bytes).is_some();
        let region = Region { guest_address, len_bytes, user_address, file_offset };
        (len_bytes > 0 && fits(guest_address) && fits(user_address) && fits(file_offset)).then_some(region)
    });
    regions.collect()
}

/// Little-endian numbers from the front of a payload whose length was checked; zero past its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((first, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// A whole reply to `request`.
pub(super) fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("replies are shorter than a configuration space and its header");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for field in [request, FLAG_VERSION | FLAG_REPLY, len] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// The payload of a reply to `GetInflight`.
pub(super) fn inflight_payload(area: &InflightArea) -> [u8; 24] {
    let mut payload = [0; 24];
    payload[..8].copy_from_slice(&area.len_bytes.to_le_bytes());
    payload[8..16].copy_from_slice(&area.offset.to_le_bytes());
    payload[16..18].copy_from_slice(&area.queues.to_le_bytes());
    payload[18..20].copy_from_slice(&area.queue_size.to_le_bytes());
    payload
}

/// The payload of a reply to `GetConfig`; no content means that there is none.
pub(super) fn config_payload(offset: u32, content: &[u8]) -> Vec<u8> {
    let len = u32::try_from(content.len()).expect("at most 256 bytes are asked for");
    let mut payload = Vec::with_capacity(12 + content.len());
    for field in [offset, len, 0] {
        payload.extend_from_slice(&field.to_le_bytes());
    }
    payload.extend_from_slice(content);
    payload
}

/// The payload of a reply to `GetRingBase`.
pub(super) fn ring_state_payload(index: u32, base: u16) -> [u8; 8] {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&index.to_le_bytes());
    payload[4..].copy_from_slice(&u32::from(base).to_le_bytes());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(request: u32, flags: u32, len: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        for (place, field) in bytes.chunks_exact_mut(4).zip([request, flags, len]) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn headers_of_other_versions_replies_and_long_payloads_are_refused() {
        let parsed = Header::parse(&header(1, 0x9, 4096)).unwrap();
        assert_eq!(parsed, Header { request: 1, needs_reply: true, payload_bytes: 4096 });
        for (flags, len) in [(0, 0), (2, 0), (5, 0), (1, 4097), (1, u32::MAX)] {
            assert_eq!(Header::parse(&header(1, flags, len)), Err(WireError::BadHeader), "{flags} {len}");
        }
    }

    #[test]
    fn requests_take_their_own_length_and_number_of_descriptors() {
        assert_eq!(Request::parse(1, &[], 0), Ok(Request::GetFeatures));
        assert_eq!(Request::parse(1, &[0], 0), Err(WireError::BadPayload(1)));
        assert_eq!(Request::parse(1, &[], 1), Err(WireError::BadFds(1)));
        let kick = |value: u64, fds| Request::parse(12, &value.to_le_bytes(), fds);
        assert_eq!(kick(3, 1), Ok(Request::SetRingKick { index: 3, has_fd: true }));
        assert_eq!(kick(0x103, 0), Ok(Request::SetRingKick { index: 3, has_fd: false }));
        assert_eq!(kick(3, 0), Err(WireError::BadFds(12)));
        assert_eq!(Request::parse(18, &[0, 0, 0, 0, 2, 0, 0, 0], 0), Err(WireError::BadPayload(18)));
        assert_eq!(Request::parse(6, &[0; 16], 1), Err(WireError::NotOffered(6)));
    }

    #[test]
    fn memory_tables_are_bounded_and_their_regions_do_not_wrap() {
        let table = |count: u32, regions: &[[u64; 4]]| {
            let mut payload = u64::from(count).to_le_bytes().to_vec();
            regions.iter().flatten().for_each(|field| payload.extend_from_slice(&field.to_le_bytes()));
            Request::parse(5, &payload, count as usize)
        };
        assert!(
            matches!(table(1, &[[0, 4096, 0x1000, 0]]), Ok(Request::SetMemoryTable(regions)) if regions.len() == 1)
        );
        assert!(table(0, &[]).is_err() && table(9, &[[0, 1, 0, 0]; 9]).is_err() && table(2, &[[0, 1, 0, 0]]).is_err());
        for wrapping in [[u64::MAX, 2, 0, 0], [0, 2, u64::MAX, 0], [0, 2, 0, u64::MAX], [0, 0, 0, 0]] {
            assert!(table(1, &[wrapping]).is_err(), "{wrapping:?}");
        }
    }

    #[test]
    fn any_bytes_parse_or_are_refused() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..100_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let code = u32::try_from((state >> 33) % 48).unwrap();
            let payload: Vec<u8> = (0..(state >> 20) % 50).map(|i| (state >> (i % 56)).to_le_bytes()[0]).collect();
            drop(Request::parse(code, &payload, usize::try_from(state >> 60).unwrap()));
        }
    }
}
