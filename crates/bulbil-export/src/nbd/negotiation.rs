//! The handshake's decisions: options in, replies and an outcome out. No I/O.

use super::wire::option::{
    ALLOCATION_CONTEXT, BadOption, ClientOption, MetaQueries, ReplyType, WantedInfo, info, options, push_reply,
};
use super::wire::reply::ALLOCATION_CONTEXT_ID;
use super::wire::request::Session;
use super::wire::{
    MAX_PAYLOAD_BYTES, NBD_MAGIC, OPTION_MAGIC, PREFERRED_BLOCK_BYTES, handshake_flags::FIXED_NEWSTYLE,
    handshake_flags::NO_ZEROES,
};

/// Zeroes after the answer to `NBD_OPT_EXPORT_NAME` unless the client asked for none.
const EXPORT_NAME_PADDING: [u8; 124] = [0; 124];

/// What a client may learn about an export before it chooses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdvertisedExport {
    /// The name clients choose; the empty name is the default export.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Changing requests are refused.
    pub read_only: bool,
}

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Send the replies and read the next option.
    Continue,
    /// Send the replies and enter transmission with the export at this index.
    Transmit {
        /// Index into the exports given to [`Negotiation::new`].
        export: usize,
        /// What was agreed.
        session: Session,
    },
    /// Send the replies and close.
    Close,
}

/// The state of one handshake ("Handshake").
///
/// ```text
/// greeting ─► client flags ─► option ─► option … ─► EXPORT_NAME or GO ─► transmission
///                                          └─ ABORT, refused EXPORT_NAME ─► closed
/// ```
#[derive(Debug)]
pub struct Negotiation {
    exports: Vec<AdvertisedExport>,
    no_zeroes: bool,
    structured: bool,
    /// The export that `base:allocation` was selected for by the latest `SET_META_CONTEXT`.
    meta_context: Option<usize>,
}

impl Negotiation {
    /// Starts a handshake about `exports`. When none has the empty name, the first is the default.
    #[must_use]
    pub fn new(exports: Vec<AdvertisedExport>) -> Self {
        Self { exports, no_zeroes: false, structured: false, meta_context: None }
    }

    /// The server's first message.
    #[must_use]
    pub fn greeting() -> [u8; 18] {
        let mut greeting = [0; 18];
        greeting[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
        greeting[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        greeting[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        greeting
    }

    /// Takes the client's flags; false when one is unknown, and then the server "MUST drop the
    /// connection". A client without `FIXED_NEWSTYLE` is served in the same way.
    #[must_use]
    pub fn accept_client_flags(&mut self, flags: [u8; 4]) -> bool {
        let flags = u32::from_be_bytes(flags);
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) == 0
    }

    /// Answers one option, appending the replies to `out`.
    pub fn answer(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        match ClientOption::parse(option, data) {
            Ok(parsed) => self.answer_parsed(option, parsed, out),
            Err(_) if option == options::EXPORT_NAME => Outcome::Close,
            Err(bad) => {
                // A failed SET_META_CONTEXT also replaces what was selected before.
                if option == options::SET_META_CONTEXT {
                    self.meta_context = None;
                }
                refuse(out, option, bad)
            }
        }
    }

    /// Answers an option whose data was too long to read, and was skipped or will not be read.
    pub fn answer_oversized(option: u32, out: &mut Vec<u8>) {
        if option != options::EXPORT_NAME {
            push_reply(out, option, ReplyType::ErrTooBig, &[b"the option is too long"]);
        }
    }

    fn answer_parsed(&mut self, option: u32, parsed: ClientOption<'_>, out: &mut Vec<u8>) -> Outcome {
        match parsed {
            ClientOption::ExportName(name) => return self.export_name(name, out),
            ClientOption::Abort => {
                push_reply(out, option, ReplyType::Ack, &[]);
                return Outcome::Close;
            }
            ClientOption::Go(name, wanted) => return self.go(name, wanted, out),
            ClientOption::Info(name, wanted) => {
                self.describe(option, name, wanted, out);
            }
            ClientOption::List => self.list(out),
            ClientOption::StructuredReply => {
                self.structured = true;
                push_reply(out, option, ReplyType::Ack, &[]);
            }
            ClientOption::ListMetaContext(name, queries) => self.list_meta_context(name, queries, out),
            ClientOption::SetMetaContext(name, queries) => self.set_meta_context(name, queries, out),
            // NOTLS mode: the option is known and never allowed.
            ClientOption::StartTls => {
                push_reply(out, option, ReplyType::ErrPolicy, &[b"this server is on a local socket, without TLS"]);
            }
            ClientOption::Unknown => push_reply(out, option, ReplyType::ErrUnsup, &[]),
        }
        Outcome::Continue
    }

    fn find(&self, name: &[u8]) -> Option<usize> {
        let named = self.exports.iter().position(|export| export.name.as_bytes() == name);
        named.or(if name.is_empty() && !self.exports.is_empty() { Some(0) } else { None })
    }

    fn session(&self, export: usize) -> Option<Session> {
        let advertised = self.exports.get(export)?;
        Some(Session {
            size_bytes: advertised.size_bytes,
            read_only: advertised.read_only,
            structured: self.structured,
            block_status: self.meta_context == Some(export),
        })
    }

    fn export_name(&self, name: &[u8], out: &mut Vec<u8>) -> Outcome {
        let Some((export, session)) = self.choose(name) else { return Outcome::Close };
        out.extend_from_slice(&session.size_bytes.to_be_bytes());
        out.extend_from_slice(&session.transmission_flags().to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&EXPORT_NAME_PADDING);
        }
        Outcome::Transmit { export, session }
    }

    fn choose(&self, name: &[u8]) -> Option<(usize, Session)> {
        let export = self.find(name)?;
        Some((export, self.session(export)?))
    }

    fn go(&self, name: &[u8], wanted: WantedInfo, out: &mut Vec<u8>) -> Outcome {
        match self.describe(options::GO, name, wanted, out) {
            Some((export, session)) => Outcome::Transmit { export, session },
            None => Outcome::Continue,
        }
    }

    /// Answers `INFO` and `GO`, which differ only in what follows an acknowledgement.
    fn describe(&self, option: u32, name: &[u8], wanted: WantedInfo, out: &mut Vec<u8>) -> Option<(usize, Session)> {
        let Some((export, session)) = self.choose(name) else {
            push_reply(out, option, ReplyType::ErrUnknown, &[b"no export has this name"]);
            return None;
        };
        let mut push = |kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let all: Vec<&[u8]> = std::iter::once(&kind[..]).chain(parts.iter().copied()).collect();
            push_reply(out, option, ReplyType::Info, &all);
        };
        push(info::EXPORT, &[&session.size_bytes.to_be_bytes(), &session.transmission_flags().to_be_bytes()]);
        let advertised = &self.exports[export];
        if wanted.name {
            push(info::NAME, &[advertised.name.as_bytes()]);
        }
        if wanted.description && !advertised.description.is_empty() {
            push(info::DESCRIPTION, &[advertised.description.as_bytes()]);
        }
        if wanted.block_size {
            let sizes = [1, PREFERRED_BLOCK_BYTES, MAX_PAYLOAD_BYTES].map(u32::to_be_bytes);
            push(info::BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        }
        push_reply(out, option, ReplyType::Ack, &[]);
        Some((export, session))
    }

    fn list(&self, out: &mut Vec<u8>) {
        for export in &self.exports {
            let name_bytes = u32::try_from(export.name.len()).expect("names are checked when an export is added");
            let parts = [&name_bytes.to_be_bytes()[..], export.name.as_bytes(), export.description.as_bytes()];
            push_reply(out, options::LIST, ReplyType::Server, &parts);
        }
        push_reply(out, options::LIST, ReplyType::Ack, &[]);
    }

    fn list_meta_context(&self, name: &[u8], queries: MetaQueries, out: &mut Vec<u8>) {
        let option = options::LIST_META_CONTEXT;
        if self.meta_export(option, name, out).is_none() {
            return;
        }
        if queries.none || queries.allocation || queries.base_wildcard {
            push_reply(out, option, ReplyType::MetaContext, &[&0u32.to_be_bytes(), ALLOCATION_CONTEXT]);
        }
        push_reply(out, option, ReplyType::Ack, &[]);
    }

    fn set_meta_context(&mut self, name: &[u8], queries: MetaQueries, out: &mut Vec<u8>) {
        let option = options::SET_META_CONTEXT;
        self.meta_context = None;
        let Some(export) = self.meta_export(option, name, out) else { return };
        if queries.allocation {
            self.meta_context = Some(export);
            let id = ALLOCATION_CONTEXT_ID.to_be_bytes();
            push_reply(out, option, ReplyType::MetaContext, &[&id, ALLOCATION_CONTEXT]);
        }
        push_reply(out, option, ReplyType::Ack, &[]);
    }

    /// The export a metadata option is about, or an error reply.
    fn meta_export(&self, option: u32, name: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        if !self.structured {
            push_reply(out, option, ReplyType::ErrInvalid, &[b"metadata contexts need structured replies"]);
            return None;
        }
        let export = self.find(name);
        if export.is_none() {
            push_reply(out, option, ReplyType::ErrUnknown, &[b"no export has this name"]);
        }
        export
    }
}

fn refuse(out: &mut Vec<u8>, option: u32, bad: BadOption) -> Outcome {
    match bad {
        BadOption::Invalid => push_reply(out, option, ReplyType::ErrInvalid, &[b"the option is malformed"]),
        BadOption::TooBig => push_reply(out, option, ReplyType::ErrTooBig, &[b"the option has too many parts"]),
    }
    Outcome::Continue
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exports() -> Vec<AdvertisedExport> {
        ["root", "data"]
            .map(|name| AdvertisedExport {
                name: name.to_owned(),
                description: String::new(),
                size_bytes: 4096,
                read_only: name == "data",
            })
            .to_vec()
    }

    fn meta(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
        let mut data = Vec::new();
        let mut push = |bytes: &[u8]| data.extend_from_slice(bytes);
        push(&u32::try_from(name.len()).unwrap().to_be_bytes());
        push(name);
        push(&u32::try_from(queries.len()).unwrap().to_be_bytes());
        for query in queries {
            push(&u32::try_from(query.len()).unwrap().to_be_bytes());
            push(query);
        }
        data
    }

    fn export_name(negotiation: &mut Negotiation, name: &[u8]) -> Outcome {
        negotiation.answer(options::EXPORT_NAME, name, &mut Vec::new())
    }

    fn chosen_session(outcome: Outcome) -> (usize, Session) {
        match outcome {
            Outcome::Transmit { export, session } => (export, session),
            other => panic!("not in transmission: {other:?}"),
        }
    }

    #[test]
    fn the_first_export_is_the_default_and_unknown_names_close() {
        let mut negotiation = Negotiation::new(exports());
        assert_eq!(chosen_session(export_name(&mut negotiation, b"")).0, 0);
        assert_eq!(chosen_session(export_name(&mut negotiation, b"data")).0, 1);
        assert_eq!(export_name(&mut negotiation, b"nope"), Outcome::Close);
        assert_eq!(export_name(&mut Negotiation::new(Vec::new()), b""), Outcome::Close);
    }

    #[test]
    fn a_metadata_context_counts_only_for_its_own_export() {
        let mut negotiation = Negotiation::new(exports());
        let mut out = Vec::new();
        let select = meta(b"root", &[b"base:allocation", b"qemu:dirty-bitmap:x"]);
        negotiation.answer(options::SET_META_CONTEXT, &select, &mut out);
        assert!(!chosen_session(export_name(&mut negotiation, b"root")).1.block_status, "not without structured");
        negotiation.answer(options::STRUCTURED_REPLY, &[], &mut out);
        negotiation.answer(options::SET_META_CONTEXT, &select, &mut out);
        assert!(chosen_session(export_name(&mut negotiation, b"root")).1.block_status);
        assert!(chosen_session(export_name(&mut negotiation, b"")).1.block_status, "the default is the same export");
        assert!(!chosen_session(export_name(&mut negotiation, b"data")).1.block_status);
        negotiation.answer(options::SET_META_CONTEXT, b"junk", &mut out);
        assert!(!chosen_session(export_name(&mut negotiation, b"root")).1.block_status, "a failure deselects");
    }

    #[test]
    fn unknown_client_flags_are_refused() {
        let mut negotiation = Negotiation::new(exports());
        assert!(negotiation.accept_client_flags([0, 0, 0, 3]));
        assert!(!negotiation.accept_client_flags([0, 0, 0, 4]));
        assert!(!negotiation.accept_client_flags([0x80, 0, 0, 0]));
    }

    #[test]
    fn padding_follows_export_name_unless_refused() {
        let mut negotiation = Negotiation::new(exports());
        for (flags, len) in [([0, 0, 0, 1], 134), ([0, 0, 0, 3], 10)] {
            assert!(negotiation.accept_client_flags(flags));
            let mut out = Vec::new();
            negotiation.answer(options::EXPORT_NAME, b"", &mut out);
            assert_eq!(out.len(), len);
        }
    }

    proptest! {
        #[test]
        fn any_options_are_answered(options in prop::collection::vec((0u32..13, any::<Vec<u8>>()), 0..20)) {
            let mut negotiation = Negotiation::new(exports());
            let mut out = Vec::new();
            for (option, data) in options {
                let _outcome = negotiation.answer(option, &data, &mut out);
            }
        }
    }
}
