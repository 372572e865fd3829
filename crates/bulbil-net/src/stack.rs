//! smoltcp's interface, shared by all TCP flows of a link; each flow brings its own socket set.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Instant;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use crate::config::LinkConfig;
use crate::queue::FrameQueue;
use crate::stats::Counters;

/// Packets one flow sends before another has its turn.
const PACKETS_PER_TURN: usize = 64;
/// What smoltcp's clock shows at the start: it takes zero for "long ago".
const CLOCK_START_MICROS: i64 = 1_000_000_000;

/// The IP layer and the way out.
pub(crate) struct Stack {
    interface: Interface,
    /// A set without sockets: a segment given to it is answered with RST.
    nobody: SocketSet<'static>,
    pub(crate) out: FrameQueue,
    mtu: usize,
    epoch: Instant,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("mtu", &self.mtu).finish_non_exhaustive()
    }
}

impl Stack {
    pub(crate) fn new(config: &LinkConfig, counters: Arc<Counters>) -> Self {
        let mut out = FrameQueue::new(config.guest_mac, counters);
        let mtu = usize::from(config.mtu);
        let mut settings = Config::new(HardwareAddress::Ip);
        // Sequence numbers and ports only; a hasher's keys are as random as std can be.
        settings.random_seed = RandomState::new().hash_one(config.guest_mac);
        let mut device = PacketDevice { packet: None, out: &mut out, mtu };
        let mut interface = Interface::new(settings, &mut device, StackInstant::from_micros(CLOCK_START_MICROS));
        // Any destination is "ours": whose connection it is was decided before a packet gets here.
        interface.set_any_ip(true);
        interface.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(config.gateway_ip.into(), config.prefix_len))
                .expect("a new interface has room for one address");
        });
        interface
            .routes_mut()
            .add_default_ipv4_route(config.gateway_ip)
            .expect("a new interface has room for one route");
        Self { interface, nobody: SocketSet::new(Vec::new()), out, mtu, epoch: Instant::now() }
    }

    fn clock(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        StackInstant::from_micros(CLOCK_START_MICROS + i64::try_from(micros).unwrap_or(i64::MAX / 2))
    }

    /// The context a socket connects in.
    pub(crate) fn context(&mut self) -> &mut smoltcp::iface::Context {
        self.interface.context()
    }

    /// Gives a packet of the guest to the flow that owns `sockets`.
    pub(crate) fn receive(&mut self, packet: &[u8], sockets: &mut SocketSet<'static>, now: Instant) {
        let clock = self.clock(now);
        let mut device = PacketDevice { packet: Some(packet), out: &mut self.out, mtu: self.mtu };
        self.interface.poll_ingress_single(clock, &mut device, sockets);
    }

    /// Answers a segment that belongs to no flow: with RST, unless it is one itself.
    pub(crate) fn refuse(&mut self, packet: &[u8], now: Instant) {
        let clock = self.clock(now);
        let mut device = PacketDevice { packet: Some(packet), out: &mut self.out, mtu: self.mtu };
        self.interface.poll_ingress_single(clock, &mut device, &mut self.nobody);
    }

    /// Sends what the flow's sockets have to send, one turn's worth at most. `true` when more is left.
    pub(crate) fn send(&mut self, sockets: &mut SocketSet<'static>, now: Instant) -> bool {
        let clock = self.clock(now);
        for _ in 0..PACKETS_PER_TURN {
            if self.out.is_full() {
                return true;
            }
            let mut device = PacketDevice { packet: None, out: &mut self.out, mtu: self.mtu };
            if self.interface.poll_egress(clock, &mut device, sockets) == PollResult::None {
                return false;
            }
        }
        true
    }

    /// When the flow's sockets next have something to do by themselves.
    pub(crate) fn next_deadline(&mut self, sockets: &SocketSet<'static>, now: Instant) -> Option<Instant> {
        let clock = self.clock(now);
        let at = self.interface.poll_at(clock, sockets)?;
        // Never at once: what could be sent has been, so "now" would only spin.
        let wait =
            std::time::Duration::from_micros(at.micros().saturating_sub(clock.micros()).max(1000).unsigned_abs());
        Some(now + wait)
    }
}

/// A device that holds at most one packet of the guest.
struct PacketDevice<'a> {
    packet: Option<&'a [u8]>,
    out: &'a mut FrameQueue,
    mtu: usize,
}

struct Received<'a>(&'a [u8]);
struct Sending<'a>(&'a mut FrameQueue);

impl Device for PacketDevice<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sending<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: StackInstant) -> Option<(Received<'_>, Sending<'_>)> {
        let packet = self.packet.take()?;
        Some((Received(packet), Sending(self.out)))
    }

    fn transmit(&mut self, _now: StackInstant) -> Option<Sending<'_>> {
        (!self.out.is_full()).then_some(Sending(self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // What the guest sends crossed a unix socket, and its IP header has been checked already.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.push_ip(len, f)
    }
}
