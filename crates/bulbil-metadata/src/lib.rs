//! Instance metadata as each cloud serves it.
//!
//! A stock guest image finds out who it is by asking an address only its host can answer. This
//! crate is that answer, in three layers:
//!
//! ```text
//!  InstanceView ──Site::new──► Site (one tree of values, listings generated from it)
//!                               │
//!  Request ───────respond───────┴─► Response            pure: no clock, socket or file
//!                  ▲
//!  MetadataService │ view, tokens, throttle, event sink  one per instance
//!                  ▲
//!  serve_connection  HTTP/1.1 on any byte stream         limits, idle time, hop limit
//! ```
//!
//! Identity is the service a connection is handed to: no header and no source address takes part.
//! Which tree answers is decided by the destination address and the instance's personality:
//!
//! | personality | address | tree |
//! |---|---|---|
//! | `ec2` | 169.254.169.254, fd00:ec2::254 | [`/`, dated versions, `/latest`](Site) |
//! | `alibaba` | 100.100.100.200 | `/2016-01-01`, `/latest` |
//! | `nocloud` | 169.254.169.254 | `/nocloud/` |
//!
//! Every other combination answers 404 at once. It would be possible to answer all trees to every
//! guest, but it is not harmless: software that probes for a cloud (SDK credential chains,
//! Cloudbase-Init, cloud-init's OpenStack source, which asks for the EC2 tree as well) would find
//! two clouds and believe the wrong one, and a token policy of one dialect could be walked around
//! through another. A quick 404 is what all of them take for "not this cloud".
//!
//! Disks and firmware tables are the other half of first boot: [`nocloud_seed`] gives the files of
//! a seed disk and [`smbios`] the strings from which a guest recognises its cloud.

#![forbid(unsafe_code)]

mod alibaba;
mod ec2;
mod file;
mod identity;
mod listener;
mod nocloud;
mod respond;
mod service;
mod site;
mod time;
mod token;
mod tree;
mod user_data;
mod view;

pub use file::{InstanceFileError, parse_instance_file};
pub use identity::{NOCLOUD_HTTP_SERIAL, SmbiosTable, smbios, system_uuid};
pub use listener::{HopLimitHook, serve_connection};
pub use nocloud::nocloud_seed;
pub use respond::{Request, Response, respond};
pub use service::{Clock, Counters, Limits, MetadataService, RequestEvent, RequestSink, ServiceOptions};
pub use site::Site;
pub use token::{MAX_TOKEN_TTL_S, TokenStore};
pub use tree::{Dir, Leaf, Listed, Node};
pub use user_data::{UserDataError, check_user_data, user_data_limit_bytes};
pub use view::{
    HopLimit, HopLimitError, InstanceView, Ipv4Cidr, ParseCidrError, PublicKey, TokenMode, is_tag_key_shown,
};
