//! Options of the handshake: requests parsed into checked types, replies encoded.
//!
//! ```text
//! option   u64 IHAVEOPT | u32 option | u32 length | data        ("Newstyle negotiation")
//! reply    u64 magic | u32 option | u32 type | u32 length | data ("Fixed newstyle negotiation")
//! ```

use super::{Fields, MAX_STRING_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC};

/// Bytes of an option before its data.
pub const OPTION_HEADER_BYTES: usize = 16;
/// The most data an option may carry: an export name and a page of metadata queries.
pub const MAX_OPTION_BYTES: u32 = 64 << 10;
/// The most metadata queries one option may carry.
pub const MAX_META_QUERIES: u32 = 64;

/// Option numbers ("Option types").
pub mod options {
    /// `NBD_OPT_EXPORT_NAME`.
    pub const EXPORT_NAME: u32 = 1;
    /// `NBD_OPT_ABORT`.
    pub const ABORT: u32 = 2;
    /// `NBD_OPT_LIST`.
    pub const LIST: u32 = 3;
    /// `NBD_OPT_STARTTLS`.
    pub const STARTTLS: u32 = 5;
    /// `NBD_OPT_INFO`.
    pub const INFO: u32 = 6;
    /// `NBD_OPT_GO`.
    pub const GO: u32 = 7;
    /// `NBD_OPT_STRUCTURED_REPLY`.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// `NBD_OPT_LIST_META_CONTEXT`.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// `NBD_OPT_SET_META_CONTEXT`.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Information types ("`NBD_REP_INFO`").
pub mod info {
    /// `NBD_INFO_EXPORT`.
    pub const EXPORT: u16 = 0;
    /// `NBD_INFO_NAME`.
    pub const NAME: u16 = 1;
    /// `NBD_INFO_DESCRIPTION`.
    pub const DESCRIPTION: u16 = 2;
    /// `NBD_INFO_BLOCK_SIZE`.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The front of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option's number.
    pub option: u32,
    /// Bytes of data that follow; not yet held against any limit.
    pub len_bytes: u32,
}

impl OptionHeader {
    /// Parses the front of an option; `None` when the magic number is wrong.
    #[must_use]
    pub fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return None;
        }
        Some(Self { option: fields.u32()?, len_bytes: fields.u32()? })
    }
}

/// The information a client asked for; unknown types are ignored as the protocol demands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WantedInfo {
    /// `NBD_INFO_NAME`.
    pub name: bool,
    /// `NBD_INFO_DESCRIPTION`.
    pub description: bool,
    /// `NBD_INFO_BLOCK_SIZE`.
    pub block_size: bool,
}

/// Which metadata contexts a client's queries match.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetaQueries {
    /// No query was sent.
    pub none: bool,
    /// One is exactly `base:allocation`.
    pub allocation: bool,
    /// One is the wildcard `base:`.
    pub base_wildcard: bool,
}

/// A well-formed option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientOption<'a> {
    /// Enter transmission with this export; there is no error reply.
    ExportName(&'a [u8]),
    /// End the session.
    Abort,
    /// List the exports.
    List,
    /// Upgrade to TLS.
    StartTls,
    /// Describe an export.
    Info(&'a [u8], WantedInfo),
    /// Describe an export and enter transmission.
    Go(&'a [u8], WantedInfo),
    /// Use structured replies.
    StructuredReply,
    /// List metadata contexts of an export.
    ListMetaContext(&'a [u8], MetaQueries),
    /// Select metadata contexts of an export.
    SetMetaContext(&'a [u8], MetaQueries),
    /// Not known here.
    Unknown,
}

/// Why an option's data was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadOption {
    /// The data does not have the option's form.
    Invalid,
    /// The data has the right form and too many parts.
    TooBig,
}

impl<'a> ClientOption<'a> {
    /// Parses the data of option number `option`.
    ///
    /// # Errors
    /// [`BadOption::Invalid`] when lengths do not add up, a name is longer than the protocol
    /// allows, or data follows an option that has none; [`BadOption::TooBig`] past
    /// [`MAX_META_QUERIES`].
    pub fn parse(option: u32, data: &'a [u8]) -> Result<Self, BadOption> {
        match option {
            options::EXPORT_NAME => checked_name(Some(data)).map(Self::ExportName),
            // Data after an abort is ignored: "a server SHOULD ignore any data".
            options::ABORT => Ok(Self::Abort),
            options::LIST => without_data(data, Self::List),
            options::STARTTLS => without_data(data, Self::StartTls),
            options::INFO => parse_info(data).map(|(name, wanted)| Self::Info(name, wanted)),
            options::GO => parse_info(data).map(|(name, wanted)| Self::Go(name, wanted)),
            options::STRUCTURED_REPLY => without_data(data, Self::StructuredReply),
            options::LIST_META_CONTEXT => parse_meta(data).map(|(name, q)| Self::ListMetaContext(name, q)),
            options::SET_META_CONTEXT => parse_meta(data).map(|(name, q)| Self::SetMetaContext(name, q)),
            _ => Ok(Self::Unknown),
        }
    }
}

fn without_data<'a>(data: &[u8], option: ClientOption<'a>) -> Result<ClientOption<'a>, BadOption> {
    if data.is_empty() { Ok(option) } else { Err(BadOption::Invalid) }
}

fn checked_name(name: Option<&[u8]>) -> Result<&[u8], BadOption> {
    name.filter(|name| name.len() <= MAX_STRING_BYTES).ok_or(BadOption::Invalid)
}

fn parse_info(data: &[u8]) -> Result<(&[u8], WantedInfo), BadOption> {
    let mut fields = Fields(data);
    let name = checked_name(fields.string())?;
    let count = fields.u16().ok_or(BadOption::Invalid)?;
    let mut wanted = WantedInfo::default();
    for _ in 0..count {
        match fields.u16().ok_or(BadOption::Invalid)? {
            info::NAME => wanted.name = true,
            info::DESCRIPTION => wanted.description = true,
            info::BLOCK_SIZE => wanted.block_size = true,
            _ => {}
        }
    }
    if fields.is_empty() { Ok((name, wanted)) } else { Err(BadOption::Invalid) }
}

fn parse_meta(data: &[u8]) -> Result<(&[u8], MetaQueries), BadOption> {
    let mut fields = Fields(data);
    let name = checked_name(fields.string())?;
    let count = fields.u32().ok_or(BadOption::Invalid)?;
    if count > MAX_META_QUERIES {
        return Err(BadOption::TooBig);
    }
    let mut queries = MetaQueries { none: count == 0, ..MetaQueries::default() };
    for _ in 0..count {
        match checked_name(fields.string())? {
            b"base:" => queries.base_wildcard = true,
            ALLOCATION_CONTEXT => queries.allocation = true,
            // Unknown namespaces and leaf names "MUST be ignored".
            _ => {}
        }
    }
    if fields.is_empty() { Ok((name, queries)) } else { Err(BadOption::Invalid) }
}

/// The one metadata context that is served.
pub const ALLOCATION_CONTEXT: &[u8] = b"base:allocation";

/// Option reply types ("Option reply types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ReplyType {
    /// `NBD_REP_ACK`.
    Ack = 1,
    /// `NBD_REP_SERVER`.
    Server = 2,
    /// `NBD_REP_INFO`.
    Info = 3,
    /// `NBD_REP_META_CONTEXT`.
    MetaContext = 4,
    /// `NBD_REP_ERR_UNSUP`.
    ErrUnsup = 0x8000_0001,
    /// `NBD_REP_ERR_POLICY`.
    ErrPolicy = 0x8000_0002,
    /// `NBD_REP_ERR_INVALID`.
    ErrInvalid = 0x8000_0003,
    /// `NBD_REP_ERR_UNKNOWN`.
    ErrUnknown = 0x8000_0006,
    /// `NBD_REP_ERR_TOO_BIG`.
    ErrTooBig = 0x8000_0009,
}

/// Appends one reply to `option` with `parts` as its data.
///
/// # Panics
/// When the parts together are longer than 4 GiB, which no caller can build.
pub fn push_reply(out: &mut Vec<u8>, option: u32, reply: ReplyType, parts: &[&[u8]]) {
    let len_bytes: usize = parts.iter().map(|part| part.len()).sum();
    let len_bytes = u32::try_from(len_bytes).expect("a reply is a few strings of bounded length");
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(reply as u32).to_be_bytes());
    out.extend_from_slice(&len_bytes.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&u16::try_from(wanted.len()).unwrap().to_be_bytes());
        data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        data
    }

    #[test]
    fn info_names_what_is_wanted_and_ignores_unknown_types() {
        let data = info_data(b"disk", &[3, 99, 1]);
        let wanted = WantedInfo { name: true, description: false, block_size: true };
        assert_eq!(ClientOption::parse(options::GO, &data), Ok(ClientOption::Go(b"disk", wanted)));
    }

    #[test]
    fn truncated_or_padded_info_is_invalid() {
        let mut data = info_data(b"disk", &[3]);
        for len in 0..data.len() {
            assert_eq!(ClientOption::parse(options::INFO, &data[..len]), Err(BadOption::Invalid), "{len}");
        }
        data.push(0);
        assert_eq!(ClientOption::parse(options::INFO, &data), Err(BadOption::Invalid));
    }

    #[test]
    fn too_many_queries_are_too_big_before_they_are_read() {
        let data = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(ClientOption::parse(options::SET_META_CONTEXT, &data), Err(BadOption::TooBig));
    }

    #[test]
    fn a_name_over_the_limit_is_invalid() {
        let name = vec![b'x'; MAX_STRING_BYTES + 1];
        assert_eq!(ClientOption::parse(options::EXPORT_NAME, &name), Err(BadOption::Invalid));
        assert!(ClientOption::parse(options::EXPORT_NAME, &name[1..]).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_option_data_is_parsed_or_refused(option: u32, low in 0u32..12, data: Vec<u8>) {
            for option in [option, low] {
                let _parsed = ClientOption::parse(option, &data);
            }
        }
    }
}
