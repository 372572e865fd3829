//! One connection of QEMU: frames in, flows, frames out, all in one task.
//!
//! Every round of [`Driver::poll`] reads a batch of frames, collects what became ready, lets every flow
//! concerned move its bytes, and writes all the frames made meanwhile in one call. Work per round grows with
//! what happened, not with the number of flows.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep_until};

use crate::codec::arp::ArpRequest;
use crate::codec::dhcp::{self, Verdict};
use crate::codec::dns::{self, Query, Rcode};
use crate::codec::ethernet::{self, BROADCAST_MAC, Ethernet, GATEWAY_MAC, Mac};
use crate::codec::icmp::{self, Unreachable};
use crate::codec::ipv4::{self, Ipv4};
use crate::codec::tcp::Segment;
use crate::codec::udp::{self, Udp};
use crate::limits::{
    CONNECT_TIMEOUT, KEEPALIVE, LOCAL_STREAM_BYTES, MAX_DNS_FLOWS, MAX_DNS_QUERIES, MAX_METADATA_FLOWS,
    MAX_TCP_CONNECTING, MAX_TCP_FLOWS, MAX_UDP_FLOWS,
};
use crate::link::{Link, LinkError};
use crate::metadata::{HopLimit, MetadataStream};
use crate::policy::Route;
use crate::queue::{FrameReader, max_datagram};
use crate::ready::{FlowWaker, ReadyQueue};
use crate::resolver::Plan;
use crate::stack::Stack;
use crate::tcp::{BufferBudget, FlowKey, FlowKind, HostStream, OpenFlow, Progress, Stage, TcpFlow, Tuple};
use crate::timers::{Deadline, Timers};
use crate::udp::{Pumped, UdpFlow};

/// Rounds before other tasks of the runtime have their turn.
const ROUNDS_PER_POLL: usize = 16;
/// Largest buffers of flows to a service in this process: their messages are small.
const LOCAL_BUFFER_BYTES: usize = 32 << 10;
/// Largest datagram of a host socket.
const SCRATCH_BYTES: usize = 65_536;
/// Timer entries beyond which those of flows long gone are thrown out.
const MAX_TIMER_ENTRIES: usize = 8192;
/// First of the ports that forwarded connections come from.
const FIRST_FORWARD_PORT: u16 = 32_768;
/// Ports tried for one forwarded connection.
const PORT_TRIES: usize = 2048;

/// What a task of the link ended with.
#[derive(Debug)]
enum Outcome {
    Connected { tuple: Tuple, result: io::Result<TcpStream> },
    DnsAnswer { client_port: u16, answer: Vec<u8> },
    Nothing,
}

/// How many flows of each limited kind there are.
#[derive(Debug, Default)]
struct Counts {
    connecting: usize,
    metadata: usize,
    dns_tcp: usize,
    dns_udp: usize,
}

/// The state of one connection of QEMU.
pub(crate) struct Driver<'a> {
    link: &'a mut Link,
    stream: UnixStream,
    reader: FrameReader,
    stack: Stack,
    tcp: HashMap<Tuple, TcpFlow>,
    udp: HashMap<Tuple, UdpFlow>,
    timers: Timers<FlowKey>,
    ready: Arc<ReadyQueue<FlowKey>>,
    woken: Vec<FlowKey>,
    /// Flows to look at, each once.
    listed: VecDeque<FlowKey>,
    tasks: JoinSet<Outcome>,
    budget: BufferBudget,
    counts: Counts,
    next_forward_port: u16,
    scratch: Vec<u8>,
    sleep: Pin<Box<Sleep>>,
    now: Instant,
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.link.counters.connected.store(false, Ordering::Release);
        self.link.counters.guest_seen.store(false, Ordering::Release);
        self.link.counters.tcp_open.set(0);
        self.link.counters.udp_open.set(0);
        for (_, flow) in self.tcp.drain() {
            if let Stage::Open(open) = flow.stage {
                open.finish(false);
            }
        }
        // Connections that were accepted for this guest have nowhere to go now.
        while self.link.inbound.try_recv().is_ok() {
            self.link.counters.forward_failed.one();
        }
    }
}

/// Life of the driver.
impl<'a> Driver<'a> {
    pub(crate) fn new(link: &'a mut Link, stream: UnixStream) -> Self {
        let now = Instant::now();
        let stack = Stack::new(&link.config, Arc::clone(&link.counters));
        let mut tasks = JoinSet::new();
        let resolver = link.resolver.clone();
        tasks.spawn(async move {
            resolver.probe().await;
            Outcome::Nothing
        });
        link.counters.connected.store(true, Ordering::Release);
        Self {
            link,
            stream,
            reader: FrameReader::new(),
            stack,
            tcp: HashMap::new(),
            udp: HashMap::new(),
            timers: Timers::new(),
            ready: ReadyQueue::new(),
            woken: Vec::new(),
            listed: VecDeque::new(),
            tasks,
            budget: BufferBudget::default(),
            counts: Counts::default(),
            next_forward_port: FIRST_FORWARD_PORT,
            scratch: vec![0; SCRATCH_BYTES],
            sleep: Box::pin(sleep_until(now.into())),
            now,
        }
    }

    /// Does what can be done now; ready when QEMU closed the stream or it broke.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        self.ready.set_task(cx.waker());
        for _ in 0..ROUNDS_PER_POLL {
            self.now = Instant::now();
            let Some(read) = self.read_frames(cx)? else { return Poll::Ready(Ok(())) };
            let mut worked = read;
            worked |= self.take_outcomes(cx);
            worked |= self.take_inbound(cx);
            worked |= self.take_woken();
            worked |= self.take_timers();
            worked |= self.pump_flows();
            let Some(wrote) = self.write_frames(cx)? else { return Poll::Ready(Ok(())) };
            if !(worked || wrote) && self.arm_timer(cx).is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads and handles one batch. `None` when QEMU closed the stream; `false` when nothing was there, or
    /// so much waits to be written that nothing may be added.
    fn read_frames(&mut self, cx: &mut Context<'_>) -> Result<Option<bool>, LinkError> {
        while !self.stack.out.is_full() {
            match self.stream.try_read(self.reader.room()) {
                Ok(0) => return Ok(None),
                Ok(count) => return self.handle_batch(count).map(|()| Some(true)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.stream.poll_read_ready(cx) {
                    Poll::Pending => return Ok(Some(false)),
                    Poll::Ready(result) => result.map_err(LinkError::io("wait for qemu"))?,
                },
                Err(error) => return closed_or(error, "read from qemu").map(|()| None),
            }
        }
        Ok(Some(false))
    }

    fn handle_batch(&mut self, count: usize) -> Result<(), LinkError> {
        let mut reader = std::mem::replace(&mut self.reader, FrameReader::empty());
        let result = reader.each_frame(count, |frame| self.handle_frame(frame));
        self.reader = reader;
        result.map_err(|too_long| LinkError::FrameTooLong { len_bytes: too_long.0 })
    }

    /// Writes what waits. `None` when QEMU closed the stream.
    fn write_frames(&mut self, cx: &mut Context<'_>) -> Result<Option<bool>, LinkError> {
        let mut wrote = false;
        while !self.stack.out.unsent().is_empty() {
            match self.stream.try_write(self.stack.out.unsent()) {
                Ok(count) => {
                    self.stack.out.consume(count);
                    wrote = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.stream.poll_write_ready(cx) {
                    Poll::Pending => break,
                    Poll::Ready(result) => result.map_err(LinkError::io("wait for qemu"))?,
                },
                Err(error) => return closed_or(error, "write to qemu").map(|()| None),
            }
        }
        Ok(Some(wrote))
    }

    fn take_outcomes(&mut self, cx: &mut Context<'_>) -> bool {
        let mut worked = false;
        while let Poll::Ready(Some(joined)) = self.tasks.poll_join_next(cx) {
            worked = true;
            match joined {
                Ok(Outcome::Connected { tuple, result }) => self.host_connected(tuple, result),
                Ok(Outcome::DnsAnswer { client_port, answer }) => {
                    self.counts.dns_udp -= 1;
                    self.send_dns(client_port, &answer);
                }
                Ok(Outcome::Nothing) => {}
                Err(error) => tracing::error!(%error, "task of the link ended badly"),
            }
        }
        worked
    }

    fn take_inbound(&mut self, cx: &mut Context<'_>) -> bool {
        let mut worked = false;
        while let Poll::Ready(Some(inbound)) = self.link.inbound.poll_recv(cx) {
            worked = true;
            self.open_forward(inbound.stream, inbound.guest_port);
        }
        worked
    }

    fn take_woken(&mut self) -> bool {
        let mut woken = std::mem::take(&mut self.woken);
        self.ready.take(&mut woken);
        for key in &woken {
            self.list(*key);
        }
        self.woken = woken;
        !self.woken.is_empty()
    }

    fn take_timers(&mut self) -> bool {
        if self.timers.len() > MAX_TIMER_ENTRIES {
            let (tcp, udp) = (&self.tcp, &self.udp);
            self.timers.retain(|key| match key {
                FlowKey::Tcp(tuple) => tcp.contains_key(tuple),
                FlowKey::Udp(tuple) => udp.contains_key(tuple),
            });
        }
        let mut worked = false;
        while let Some(key) = self.timers.pop_due(self.now) {
            worked = true;
            self.timer_came_up(key);
        }
        worked
    }

    fn timer_came_up(&mut self, key: FlowKey) {
        let (now, timers) = (self.now, &mut self.timers);
        match key {
            FlowKey::Tcp(tuple) => {
                let Some(flow) = self.tcp.get_mut(&tuple) else { return };
                if flow.deadline.came_up(now, key, timers) {
                    self.list(key);
                }
            }
            FlowKey::Udp(tuple) => {
                let Some(flow) = self.udp.get_mut(&tuple) else { return };
                let idle_at = flow.idle_at(tuple);
                if idle_at <= now {
                    self.close_udp(tuple);
                } else if flow.deadline.came_up(now, key, timers) {
                    flow.deadline.set(Some(idle_at), key, timers);
                }
            }
        }
    }

    fn arm_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(next) = self.timers.next() else { return Poll::Pending };
        if self.sleep.deadline() != next.into() {
            self.sleep.as_mut().reset(next.into());
        }
        self.sleep.as_mut().poll(cx)
    }
}

/// A closed stream is an end like any other; the rest is an error.
fn closed_or(error: io::Error, action: &'static str) -> Result<(), LinkError> {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(LinkError::Io { action, source: error }),
    }
}

/// Layer 2 and 3.
impl Driver<'_> {
    fn handle_frame(&mut self, bytes: &[u8]) {
        self.link.counters.frames_in.one();
        self.link.counters.bytes_in.add(bytes.len());
        let Some(frame) = Ethernet::parse(bytes) else { return self.link.counters.malformed.one() };
        if frame.source != self.link.config.guest_mac {
            return self.link.counters.spoofed.one();
        }
        let to_link = frame.destination == GATEWAY_MAC || frame.destination == BROADCAST_MAC;
        match frame.ethertype {
            ethernet::TYPE_ARP if to_link => self.handle_arp(&frame),
            ethernet::TYPE_IPV4 if to_link => self.handle_ipv4(frame.payload),
            _ => self.link.counters.ignored.one(),
        }
    }

    /// Answers for the link's own addresses only: a guest that probes or announces an address of its own
    /// must never see a conflict.
    fn handle_arp(&mut self, frame: &Ethernet<'_>) {
        let Some(request) = ArpRequest::parse(frame.payload) else { return };
        let config = &self.link.config;
        let own_ip = request.sender_ip == config.guest_ip || request.sender_ip.is_unspecified();
        if request.sender_mac != config.guest_mac || !own_ip {
            return self.link.counters.spoofed.one();
        }
        if config.is_own_address(request.target_ip) {
            let header = ethernet::header(config.guest_mac, ethernet::TYPE_ARP);
            self.stack.out.push_frame(&header, &request.reply());
        }
    }

    fn handle_ipv4(&mut self, bytes: &[u8]) {
        let Some(packet) = Ipv4::parse(bytes) else { return self.link.counters.malformed.one() };
        let lease = packet.source == self.link.config.guest_ip;
        if !lease && !packet.source.is_unspecified() {
            return self.link.counters.spoofed.one();
        }
        if packet.is_fragment {
            return self.link.counters.fragments.one();
        }
        if self.handle_dhcp(&packet) {
            return;
        }
        if !lease {
            return self.link.counters.spoofed.one();
        }
        self.link.counters.guest_seen.store(true, Ordering::Release);
        let to = packet.destination;
        if to.is_broadcast() || to.is_multicast() || to.is_unspecified() || to == self.link.config.network().broadcast()
        {
            return self.link.counters.ignored.one();
        }
        match packet.protocol {
            ipv4::PROTOCOL_TCP => self.handle_tcp(&packet),
            ipv4::PROTOCOL_UDP => self.handle_udp(&packet),
            ipv4::PROTOCOL_ICMP => self.handle_icmp(&packet),
            _ => self.link.counters.ignored.one(),
        }
    }

    /// Whether the packet was for the DHCP server, by broadcast or by its address.
    fn handle_dhcp(&mut self, packet: &Ipv4<'_>) -> bool {
        let config = &self.link.config;
        let to_server = packet.destination.is_broadcast() || packet.destination == config.gateway_ip;
        if packet.protocol != ipv4::PROTOCOL_UDP || !to_server {
            return false;
        }
        let Some(datagram) = Udp::parse(packet.payload) else { return false };
        if datagram.destination_port != dhcp::SERVER_PORT || datagram.source_port != dhcp::CLIENT_PORT {
            return false;
        }
        let message = dhcp::Message::parse(datagram.payload);
        match message.and_then(|message| dhcp::Server { config }.answer(&message)) {
            Some(reply) => self.send_dhcp(&reply),
            None => tracing::debug!("dhcp message needs no answer"),
        }
        true
    }

    fn send_dhcp(&mut self, reply: &dhcp::Reply) {
        let counters = &self.link.counters;
        match reply.verdict {
            Verdict::Offer => {}
            Verdict::Ack => {
                counters.dhcp_acks.one();
                counters.guest_seen.store(true, Ordering::Release);
            }
            Verdict::Nak => counters.dhcp_naks.one(),
        }
        let source = SocketAddrV4::new(self.link.config.gateway_ip, dhcp::SERVER_PORT);
        self.send_datagram(reply.mac, source, reply.destination, &reply.payload);
    }

    /// Sends a datagram, which must fit the largest packet.
    fn send_datagram(&mut self, mac: Mac, source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) {
        if mac == self.link.config.guest_mac {
            self.stack.out.push_ip(udp::OVERHEAD_BYTES + payload.len(), |out| {
                udp::write_packet(out, source, destination, payload);
            });
        } else {
            let mut packet = vec![0; udp::OVERHEAD_BYTES + payload.len()];
            udp::write_packet(&mut packet, source, destination, payload);
            self.stack.out.push_frame(&ethernet::header(mac, ethernet::TYPE_IPV4), &packet);
        }
    }

    fn handle_icmp(&mut self, packet: &Ipv4<'_>) {
        let own = self.link.config.is_own_address(packet.destination);
        if own && icmp::is_echo_request(packet.payload) {
            let reply = icmp::echo_reply(packet.destination, packet.source, packet.payload);
            self.send_packet(&reply);
        }
    }

    fn send_unreachable(&mut self, reason: Unreachable, original: &[u8]) {
        let config = &self.link.config;
        let packet = icmp::unreachable(config.gateway_ip, config.guest_ip, reason, original);
        self.send_packet(&packet);
    }

    fn send_packet(&mut self, packet: &[u8]) {
        self.stack.out.push_ip(packet.len(), |out| out.copy_from_slice(packet));
    }
}

/// Flows in general.
impl Driver<'_> {
    /// Puts a flow on the list of those to look at, unless it is there.
    fn list(&mut self, key: FlowKey) {
        let listed = match key {
            FlowKey::Tcp(tuple) => self.tcp.get_mut(&tuple).map(|flow| &mut flow.listed),
            FlowKey::Udp(tuple) => self.udp.get_mut(&tuple).map(|flow| &mut flow.listed),
        };
        if let Some(listed) = listed
            && !std::mem::replace(listed, true)
        {
            self.listed.push_back(key);
        }
    }

    /// Gives each listed flow one turn, as long as there is room for what they send.
    fn pump_flows(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..self.listed.len() {
            if self.stack.out.is_full() {
                break;
            }
            let Some(key) = self.listed.pop_front() else { break };
            worked = true;
            match key {
                FlowKey::Tcp(tuple) => self.pump_tcp(tuple),
                FlowKey::Udp(tuple) => self.pump_udp(tuple),
            }
        }
        worked
    }

    fn spawn(&mut self, task: impl Future<Output = Outcome> + Send + 'static) {
        self.tasks.spawn(task);
    }
}

/// TCP.
impl Driver<'_> {
    fn handle_tcp(&mut self, packet: &Ipv4<'_>) {
        let Some(segment) = Segment::parse(packet.payload) else { return self.link.counters.malformed.one() };
        let tuple = Tuple {
            guest_port: segment.source_port,
            remote_ip: packet.destination,
            remote_port: segment.destination_port,
        };
        let Some(flow) = self.tcp.get_mut(&tuple) else {
            return if segment.is_opening() {
                self.open_tcp(tuple, packet.packet);
            } else {
                self.stack.refuse(packet.packet, self.now);
            };
        };
        match &mut flow.stage {
            Stage::Open(open) => {
                open.receive(packet.packet, &mut self.stack, self.now);
                self.list(FlowKey::Tcp(tuple));
            }
            Stage::Connecting { .. } if segment.is_reset() => self.close_tcp(tuple, true),
            // A repeated SYN, or the port used anew: the last one counts.
            Stage::Connecting { syn } if segment.is_opening() => {
                syn.clear();
                syn.extend_from_slice(packet.packet);
            }
            Stage::Connecting { .. } => {}
        }
    }

    fn open_tcp(&mut self, tuple: Tuple, syn: &[u8]) {
        if self.tcp.len() >= MAX_TCP_FLOWS {
            return self.refuse_over_limit(syn);
        }
        match self.link.policy.route_tcp(tuple.remote(), self.now) {
            Route::Metadata => self.open_metadata(tuple, syn),
            Route::Dns => self.open_dns(tuple, syn),
            Route::Host { to, own_host } => self.connect_host(tuple, syn, to, own_host),
            Route::Denied => {
                self.link.counters.denied.one();
                tracing::debug!(destination = %tuple.remote(), "connection denied");
                self.stack.refuse(syn, self.now);
            }
        }
    }

    fn refuse_over_limit(&mut self, packet: &[u8]) {
        self.link.counters.over_limit.one();
        self.stack.refuse(packet, self.now);
    }

    fn open_metadata(&mut self, tuple: Tuple, syn: &[u8]) {
        if self.counts.metadata >= MAX_METADATA_FLOWS {
            return self.refuse_over_limit(syn);
        }
        let hop_limit = HopLimit::new(self.link.config.metadata_ttl);
        let (near, far) = tokio::io::duplex(LOCAL_STREAM_BYTES);
        let stream = MetadataStream::new(far, hop_limit.clone());
        if self.accept_tcp(tuple, FlowKind::Metadata, HostStream::Local(near, Some(hop_limit)), syn) {
            self.counts.metadata += 1;
            self.link.counters.metadata_connections.one();
            self.link.service.connect(tuple.remote().into(), stream);
        }
    }

    fn open_dns(&mut self, tuple: Tuple, syn: &[u8]) {
        if self.counts.dns_tcp >= MAX_DNS_FLOWS {
            return self.refuse_over_limit(syn);
        }
        let (near, far) = tokio::io::duplex(LOCAL_STREAM_BYTES);
        if self.accept_tcp(tuple, FlowKind::Dns, HostStream::Local(near, None), syn) {
            self.counts.dns_tcp += 1;
            let (resolver, zone) = (self.link.resolver.clone(), Arc::clone(&self.link.zone));
            self.spawn(async move {
                resolver.serve_tcp(zone, far).await;
                Outcome::Nothing
            });
        }
    }

    fn connect_host(&mut self, tuple: Tuple, syn: &[u8], to: SocketAddrV4, own_host: bool) {
        if self.counts.connecting >= MAX_TCP_CONNECTING {
            // Not refused: the guest sends its SYN again in a second.
            return self.link.counters.over_limit.one();
        }
        self.counts.connecting += 1;
        self.insert_tcp(tuple, FlowKind::Nat, Stage::Connecting { syn: syn.to_vec() });
        self.spawn(async move { Outcome::Connected { tuple, result: connect(to, own_host).await } });
    }

    fn host_connected(&mut self, tuple: Tuple, result: io::Result<TcpStream>) {
        self.counts.connecting -= 1;
        let Some(TcpFlow { stage: Stage::Connecting { syn }, .. }) = self.tcp.get_mut(&tuple) else {
            return;
        };
        let syn = std::mem::take(syn);
        self.close_tcp(tuple, true);
        match result {
            Ok(stream) => {
                self.link.counters.tcp_connected.one();
                self.accept_tcp(tuple, FlowKind::Nat, HostStream::Tcp(stream), &syn);
            }
            Err(error) => self.host_refused(tuple, &error, &syn),
        }
    }

    /// Tells the guest what the host was told.
    fn host_refused(&mut self, tuple: Tuple, error: &io::Error, syn: &[u8]) {
        self.link.counters.tcp_failed.one();
        tracing::debug!(%error, destination = %tuple.remote(), "host could not connect");
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                self.send_unreachable(Unreachable::Host, syn);
            }
            _ => self.stack.refuse(syn, self.now),
        }
    }

    /// Opens a flow for a held SYN and gives it to it.
    fn accept_tcp(&mut self, tuple: Tuple, kind: FlowKind, host: HostStream, syn: &[u8]) -> bool {
        let max_bytes = if kind == FlowKind::Nat { usize::MAX } else { LOCAL_BUFFER_BYTES };
        let buffer_bytes = self.budget.take(max_bytes);
        let Some(mut open) = OpenFlow::accept(tuple.remote(), host, buffer_bytes) else {
            self.budget.put_back(buffer_bytes);
            return false;
        };
        open.receive(syn, &mut self.stack, self.now);
        self.insert_tcp(tuple, kind, Stage::Open(Box::new(open)));
        true
    }

    fn open_forward(&mut self, stream: TcpStream, guest_port: u16) {
        let config = Arc::clone(&self.link.config);
        let seen = self.link.counters.guest_seen.load(Ordering::Acquire);
        let Some(port) = self.free_forward_port(config.gateway_ip, guest_port).filter(|_| seen) else {
            return self.link.counters.forward_failed.one();
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot turn off delays of a forwarded connection");
        }
        let buffer_bytes = self.budget.take(usize::MAX);
        let local = SocketAddrV4::new(config.gateway_ip, port);
        let remote = SocketAddrV4::new(config.guest_ip, guest_port);
        let host = HostStream::Tcp(stream);
        let Some(open) = OpenFlow::connect(&mut self.stack, local, remote, host, buffer_bytes) else {
            self.budget.put_back(buffer_bytes);
            return self.link.counters.forward_failed.one();
        };
        let tuple = Tuple { guest_port, remote_ip: config.gateway_ip, remote_port: port };
        self.insert_tcp(tuple, FlowKind::Forward, Stage::Open(Box::new(open)));
    }

    /// A port of the gateway that no flow with the guest's port uses.
    fn free_forward_port(&mut self, gateway_ip: Ipv4Addr, guest_port: u16) -> Option<u16> {
        if self.tcp.len() >= MAX_TCP_FLOWS {
            return None;
        }
        (0..PORT_TRIES).find_map(|_| {
            let port = self.next_forward_port;
            self.next_forward_port = port.checked_add(1).unwrap_or(FIRST_FORWARD_PORT);
            let tuple = Tuple { guest_port, remote_ip: gateway_ip, remote_port: port };
            (!self.tcp.contains_key(&tuple)).then_some(port)
        })
    }

    fn insert_tcp(&mut self, tuple: Tuple, kind: FlowKind, stage: Stage) {
        let key = FlowKey::Tcp(tuple);
        let waker = FlowWaker::new(key, &self.ready);
        let flow = TcpFlow { kind, waker, deadline: Deadline::default(), listed: false, stage };
        self.tcp.insert(tuple, flow);
        self.link.counters.tcp_open.set(self.tcp.len());
        self.list(key);
    }

    fn pump_tcp(&mut self, tuple: Tuple) {
        let Some(flow) = self.tcp.get_mut(&tuple) else { return };
        flow.listed = false;
        let Stage::Open(open) = &mut flow.stage else { return };
        flow.waker.rearm();
        let mut cx = Context::from_waker(flow.waker.waker());
        match open.pump(&mut cx, &mut self.stack, self.now) {
            Progress::Live { again, deadline } => {
                let key = FlowKey::Tcp(tuple);
                flow.deadline.set(deadline, key, &mut self.timers);
                if again {
                    self.list(key);
                }
            }
            Progress::Done { orderly } => self.close_tcp(tuple, orderly),
        }
    }

    fn close_tcp(&mut self, tuple: Tuple, orderly: bool) {
        let Some(flow) = self.tcp.remove(&tuple) else { return };
        self.link.counters.tcp_open.set(self.tcp.len());
        let Stage::Open(open) = flow.stage else { return };
        self.budget.put_back(open.buffer_bytes());
        match flow.kind {
            FlowKind::Nat => {}
            FlowKind::Metadata => self.counts.metadata -= 1,
            FlowKind::Dns => self.counts.dns_tcp -= 1,
            FlowKind::Forward if open.is_established() => self.link.counters.forwarded.one(),
            FlowKind::Forward => self.link.counters.forward_failed.one(),
        }
        open.finish(orderly);
    }
}

/// Connects to `to`, not to the host itself unless that is meant.
async fn connect(to: SocketAddrV4, own_host: bool) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(to)).await??;
    // Only a connection of the host to itself has one address at both ends. This sees what the list of the
    // host's addresses did not, such as one added a second ago.
    if !own_host && stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    Ok(stream)
}

/// UDP.
impl Driver<'_> {
    fn handle_udp(&mut self, packet: &Ipv4<'_>) {
        let Some(datagram) = Udp::parse(packet.payload) else { return self.link.counters.malformed.one() };
        if datagram.destination_port == 0 {
            return self.link.counters.malformed.one();
        }
        let tuple = Tuple {
            guest_port: datagram.source_port,
            remote_ip: packet.destination,
            remote_port: datagram.destination_port,
        };
        if self.udp.contains_key(&tuple) {
            return self.send_udp(tuple, &datagram, packet.packet);
        }
        match self.link.policy.route_udp(tuple.remote(), self.now) {
            Route::Dns => self.handle_dns(datagram.source_port, datagram.payload),
            Route::Host { to, own_host } => {
                if self.open_udp(tuple, to, own_host) {
                    self.send_udp(tuple, &datagram, packet.packet);
                }
            }
            Route::Metadata | Route::Denied => {
                self.link.counters.denied.one();
                self.send_unreachable(Unreachable::Prohibited, packet.packet);
            }
        }
    }

    fn send_udp(&mut self, tuple: Tuple, datagram: &Udp<'_>, packet: &[u8]) {
        let Some(flow) = self.udp.get_mut(&tuple) else { return };
        if !flow.send(datagram.payload, self.now) {
            self.close_udp(tuple);
            self.send_unreachable(Unreachable::Port, packet);
        }
    }

    fn open_udp(&mut self, tuple: Tuple, to: SocketAddrV4, own_host: bool) -> bool {
        if self.udp.len() >= MAX_UDP_FLOWS {
            self.link.counters.over_limit.one();
            let oldest = self.udp.iter().min_by_key(|(_, flow)| flow.last_used).map(|(tuple, _)| *tuple);
            oldest.into_iter().for_each(|tuple| self.close_udp(tuple));
        }
        let key = FlowKey::Udp(tuple);
        match UdpFlow::open(to, own_host, FlowWaker::new(key, &self.ready), self.now) {
            Ok(mut flow) => {
                flow.deadline.set(Some(flow.idle_at(tuple)), key, &mut self.timers);
                self.udp.insert(tuple, flow);
                self.link.counters.udp_open.set(self.udp.len());
                self.list(key);
                true
            }
            Err(error) => {
                tracing::debug!(%error, destination = %to, "no socket for a datagram");
                false
            }
        }
    }

    fn pump_udp(&mut self, tuple: Tuple) {
        let Some(flow) = self.udp.get_mut(&tuple) else { return };
        flow.listed = false;
        let (source, config, out) = (tuple.remote(), &self.link.config, &mut self.stack.out);
        let destination = SocketAddrV4::new(config.guest_ip, tuple.guest_port);
        let (max_bytes, counters) = (max_datagram(config.mtu), &self.link.counters);
        let pumped = flow.pump(&mut self.scratch, self.now, |payload| {
            if payload.len() > max_bytes {
                return counters.fragments.one();
            }
            out.push_ip(udp::OVERHEAD_BYTES + payload.len(), |out| {
                udp::write_packet(out, source, destination, payload);
            });
        });
        match pumped {
            Pumped::Empty => {}
            Pumped::More => self.list(FlowKey::Udp(tuple)),
            Pumped::Refused => {
                let mut original = [0; udp::OVERHEAD_BYTES];
                udp::write_packet(&mut original, destination, source, &[]);
                self.close_udp(tuple);
                self.send_unreachable(Unreachable::Port, &original);
            }
        }
    }

    fn close_udp(&mut self, tuple: Tuple) {
        if self.udp.remove(&tuple).is_some() {
            self.link.counters.udp_open.set(self.udp.len());
        }
    }
}

/// DNS over UDP.
impl Driver<'_> {
    fn handle_dns(&mut self, client_port: u16, bytes: &[u8]) {
        let Some(query) = Query::parse(bytes) else { return self.link.counters.malformed.one() };
        self.link.counters.dns_queries.one();
        if let Some(answer) = self.link.zone.answer(&query) {
            return self.send_dns(client_port, &answer);
        }
        let plan = self.link.resolver.plan(self.now);
        if plan == Plan::Relay && self.counts.dns_udp < MAX_DNS_QUERIES {
            self.relay_dns(client_port, bytes);
            return;
        }
        self.link.counters.dns_failures.one();
        self.send_dns(client_port, &query.respond(Rcode::ServFail, &[]));
        if plan == Plan::FailAndProbe {
            let (resolver, question) = (self.link.resolver.clone(), bytes.to_vec());
            self.spawn(async move {
                let _answer = resolver.relay(&question).await;
                Outcome::Nothing
            });
        }
    }

    fn relay_dns(&mut self, client_port: u16, question: &[u8]) {
        self.counts.dns_udp += 1;
        let (resolver, question) = (self.link.resolver.clone(), question.to_vec());
        let counters = Arc::clone(&self.link.counters);
        let max_bytes = max_datagram(self.link.config.mtu);
        self.spawn(async move {
            let answer = match (resolver.relay(&question).await, Query::parse(&question)) {
                (Some(answer), Some(query)) if answer.len() > max_bytes => query.respond_truncated(),
                (Some(answer), _) => answer,
                (None, Some(query)) => {
                    counters.dns_failures.one();
                    query.respond(Rcode::ServFail, &[])
                }
                (None, None) => Vec::new(),
            };
            Outcome::DnsAnswer { client_port, answer }
        });
    }

    fn send_dns(&mut self, client_port: u16, answer: &[u8]) {
        let config = Arc::clone(&self.link.config);
        let source = SocketAddrV4::new(config.dns_ip, dns::PORT);
        let destination = SocketAddrV4::new(config.guest_ip, client_port);
        self.send_datagram(config.guest_mac, source, destination, answer);
    }
}
