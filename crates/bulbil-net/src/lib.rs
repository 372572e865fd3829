//! An instance's Ethernet: ARP, DHCP, DNS, NAT, port forwards.
//!
//! A [`Link`] is the far end of one guest NIC. QEMU hands over every frame the guest sends on a unix
//! stream (`-netdev stream`), and the link is everything the guest can see on that wire: the gateway, the
//! name server, the metadata services and, through a NAT, the rest of the network. No privilege is needed.
//!
//! ```text
//!            unix stream: 4-byte big-endian length, then the frame
//!   QEMU  <=====================================================>  Link::run
//!                                                                    |
//!    layer 2   source MAC checked; ARP answered for gateway, DNS and metadata addresses only
//!    layer 3   source address checked; DHCP, DNS, ICMP echo answered here
//!    TCP       metadata address, port 80 -> MetadataService, by an in-memory stream
//!              gateway address, opened port -> 127.0.0.1 of the host
//!              denied destination -> RST
//!              anything else -> the host connects first, then the guest's SYN is answered
//!    UDP       one connected host socket per (guest port, destination), closed when idle
//!    inward    LinkHandle::forward_tcp: host listener -> connection into the guest from the gateway
//! ```
//!
//! # Invariants
//!
//! * **The link is the identity.** A metadata connection is handed to the [`MetadataService`] that was given
//!   to this link; no address or header takes part in the choice.
//! * **Nothing spoofed is answered.** A frame whose source MAC is not the guest's, or a packet whose source
//!   is not the lease (except DHCP from 0.0.0.0), is counted and dropped.
//! * **Cloud credentials stay out of reach.** Link-local, metadata, loopback and the host's own addresses
//!   are denied before a socket is made, and once more by comparing the connected socket's two ends.
//! * **A guest cannot grow the host.** Every table has a cap and TCP buffers come out of one budget
//!   (see [`limits`]).
//!
//! # What is deliberately absent
//!
//! IPv6 frames are counted and ignored: no router is advertised, so a guest keeps its link-local address and
//! goes on with IPv4. IPv4 fragments are dropped in both directions. ICMP is answered for the link's own
//! addresses and not forwarded.
//!
//! # How TCP scales
//!
//! smoltcp looks at every socket for every packet. Here each flow has a socket set of its own, found by a
//! hash of (guest port, remote address, remote port); all share one interface. A packet, a timer or a ready
//! host socket therefore costs the same with one flow as with a thousand.

#![forbid(unsafe_code)]

mod codec;
mod config;
mod driver;
mod forward;
mod host_addresses;
pub mod limits;
mod link;
mod metadata;
mod policy;
mod queue;
mod ready;
mod resolver;
mod stack;
mod stats;
mod tcp;
mod timers;
mod udp;

pub use codec::resolv::parse_resolv_conf;
pub use config::{ConfigError, Ipv4Net, LinkConfig, ParseNetError};
pub use forward::Forward;
pub use link::{Link, LinkError, LinkHandle};
pub use metadata::{HopLimit, MetadataService, MetadataStream};
pub use stats::LinkStats;

#[cfg(test)]
mod fuzz_codecs;
