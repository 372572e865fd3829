//! Caps on everything a guest can make the host keep, and the time-outs.
//!
//! Together they keep a link below 20 MiB: 10 MiB of TCP buffers shared by all flows plus 8 KiB for each
//! flow past the budget, 256 KiB of frames each way, and small records for the rest.

use std::time::Duration;

/// Most TCP flows of one link, in all stages and both directions; a further SYN gets RST.
pub const MAX_TCP_FLOWS: usize = 1024;

/// Most host connections being made at one time; a further SYN is dropped, and repeated by the guest.
pub const MAX_TCP_CONNECTING: usize = 256;

/// Most TCP connections of one guest to its metadata services.
pub const MAX_METADATA_FLOWS: usize = 128;

/// Most TCP connections of one guest to the name server.
pub const MAX_DNS_FLOWS: usize = 16;

/// Most UDP flows; a further one replaces the one idle for longest.
pub const MAX_UDP_FLOWS: usize = 256;

/// Most DNS questions being relayed at one time; a further one is answered SERVFAIL.
pub const MAX_DNS_QUERIES: usize = 64;

/// Bytes shared by the buffers of all TCP flows before new flows get the smallest ones.
pub const TCP_BUFFER_BUDGET_BYTES: usize = 10 << 20;

/// Largest TCP buffer, per direction: enough for the bandwidth-delay product of a local link.
pub const MAX_TCP_BUFFER_BYTES: usize = 256 << 10;

/// Smallest TCP buffer, per direction: two full segments and a bit.
pub const MIN_TCP_BUFFER_BYTES: usize = 4 << 10;

/// Bytes of the in-memory stream to a metadata or name service, per direction.
pub const LOCAL_STREAM_BYTES: usize = 16 << 10;

/// Largest frame QEMU may send: a 64 KiB packet and its headers (QEMU's own buffer is 68 KiB).
pub const MAX_FRAME_BYTES: usize = 69_632;

/// Bytes read from QEMU at one time.
pub const READ_BATCH_BYTES: usize = 256 << 10;

/// Bytes waiting for QEMU beyond which no further frame is made from flows, and no frame is read.
pub const OUTPUT_HIGH_WATER_BYTES: usize = 256 << 10;

/// Time for the host to connect, or for the guest to answer a forwarded connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Silence after which the peer of a TCP flow is asked whether it is still there.
pub const KEEPALIVE: Duration = Duration::from_secs(60);

/// Silence of the guest, in spite of keep-alives, after which a flow is dropped. Long, since a paused
/// guest should find its connections again.
pub const GUEST_SILENCE: Duration = Duration::from_secs(3600);

/// Idle time after which a UDP flow is closed.
pub const UDP_IDLE: Duration = Duration::from_secs(60);

/// Idle time after which a UDP flow to port 53 is closed.
pub const UDP_DNS_IDLE: Duration = Duration::from_secs(10);

/// Time for the host's resolvers to answer, all together.
pub const DNS_TIMEOUT: Duration = Duration::from_secs(2);

/// Time between two attempts to find out whether a silent resolver is back.
pub const DNS_PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// DHCP lease time.
pub const LEASE: Duration = Duration::from_secs(86_400);

/// Age at which the list of the host's own addresses is read again.
pub const HOST_ADDRESSES_MAX_AGE: Duration = Duration::from_secs(10);
