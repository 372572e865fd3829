//! Counters of one link.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A snapshot of a link's counters. All but `connected`, `guest_seen` and the `_open` ones only grow.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct LinkStats {
            /// Whether QEMU is on the other end now.
            pub connected: bool,
            /// Whether the guest has used its lease since QEMU connected.
            pub guest_seen: bool,
            $($(#[$doc])* pub $name: u64,)+
        }

        /// The live counters behind [`LinkStats`].
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            pub(crate) connected: AtomicBool,
            pub(crate) guest_seen: AtomicBool,
            $(pub(crate) $name: Counter,)+
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> LinkStats {
                LinkStats {
                    connected: self.connected.load(Ordering::Relaxed),
                    guest_seen: self.guest_seen.load(Ordering::Relaxed),
                    $($name: self.$name.0.load(Ordering::Relaxed),)+
                }
            }
        }
    };
}

counters! {
    /// Frames from the guest.
    frames_in,
    /// Bytes of those frames.
    bytes_in,
    /// Frames to the guest.
    frames_out,
    /// Bytes of those frames.
    bytes_out,
    /// Frames dropped because they could not be read.
    malformed,
    /// Frames dropped because their source MAC, ARP or IP address is not the guest's.
    spoofed,
    /// IPv6 and other frames that the link does not serve.
    ignored,
    /// IPv4 fragments dropped.
    fragments,
    /// Connections and datagrams refused by the deny list.
    denied,
    /// Connections, datagrams and questions refused because a table was full.
    over_limit,
    /// Leases acknowledged.
    dhcp_acks,
    /// Wrong addresses refused by DHCP.
    dhcp_naks,
    /// DNS questions.
    dns_queries,
    /// DNS questions answered SERVFAIL because no resolver answered.
    dns_failures,
    /// TCP connections made by the guest to its metadata services.
    metadata_connections,
    /// TCP connections of the guest that the host made.
    tcp_connected,
    /// TCP connections of the guest that the host could not make.
    tcp_failed,
    /// Connections forwarded into the guest.
    forwarded,
    /// Connections into the guest that it refused or that found no guest.
    forward_failed,
    /// TCP flows now.
    tcp_open,
    /// UDP flows now.
    udp_open,
}

/// One number, added to by the link and read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn one(&self) {
        self.add(1);
    }

    pub(crate) fn set(&self, value: usize) {
        self.0.store(u64::try_from(value).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
