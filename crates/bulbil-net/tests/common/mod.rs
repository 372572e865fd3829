//! A guest made of smoltcp on the other end of a link's stream, and small services for it to talk to.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulbil_net::{Link, LinkConfig, LinkError, LinkHandle, MetadataService, MetadataStream};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, IpCidr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::task::JoinHandle;

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];

/// Longest any condition may take; generous, since tests share a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Answers each connection with a line that names the instance and the destination, after a request line.
pub(crate) struct Stub {
    pub(crate) name: &'static str,
    pub(crate) ttl: Option<u8>,
}

impl MetadataService for Stub {
    fn connect(&self, destination: SocketAddr, mut stream: MetadataStream) {
        let (name, ttl) = (self.name, self.ttl);
        tokio::spawn(async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\n") {
                let mut byte = [0];
                if stream.read_exact(&mut byte).await.is_err() {
                    return;
                }
                request.push(byte[0]);
            }
            if let Some(ttl) = ttl {
                stream.hop_limit().set(ttl);
            }
            let answer = format!("{name} {destination} {}", String::from_utf8_lossy(&request));
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
    }
}

/// A link running on a socket pair.
pub(crate) struct Running {
    pub(crate) handle: LinkHandle,
    pub(crate) task: JoinHandle<Result<(), LinkError>>,
}

pub(crate) fn config() -> LinkConfig {
    LinkConfig::new(MAC, "web")
}

/// Starts a link and gives its guest's end of the wire.
pub(crate) fn start(config: LinkConfig) -> (Running, Guest) {
    start_with(config, Stub { name: "i-one", ttl: None })
}

pub(crate) fn start_with(config: LinkConfig, stub: Stub) -> (Running, Guest) {
    let mac = config.guest_mac;
    let (near, far) = UnixStream::pair().unwrap();
    let mut link = Link::new(config, Arc::new(stub)).unwrap();
    let handle = link.handle();
    let task = tokio::spawn(async move { link.run(near).await });
    (Running { handle, task }, Guest::new(mac, far))
}

/// Frames waiting in the guest's NIC.
#[derive(Default)]
pub(crate) struct Nic {
    pub(crate) rx: VecDeque<Vec<u8>>,
    pub(crate) tx: Vec<u8>,
}

pub(crate) struct Rx(Vec<u8>);
pub(crate) struct Tx<'a>(&'a mut Vec<u8>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        push_frame(self.0, &frame);
        result
    }
}

fn push_frame(tx: &mut Vec<u8>, frame: &[u8]) {
    tx.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
    tx.extend(frame);
}

impl Device for Nic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Rx(frame), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Tx<'_>> {
        (self.tx.len() < 256 << 10).then_some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// A guest: NIC, stack and sockets.
pub(crate) struct Guest {
    stream: UnixStream,
    input: Vec<u8>,
    pub(crate) nic: Nic,
    pub(crate) interface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    /// Copies of the frames received while [`Guest::record`] is set.
    pub(crate) seen: Vec<Vec<u8>>,
    pub(crate) record: bool,
    next_port: u16,
}

impl Guest {
    pub(crate) fn new(mac: [u8; 6], stream: UnixStream) -> Self {
        let mut nic = Nic::default();
        let mut settings = Config::new(EthernetAddress(mac).into());
        settings.random_seed = 42;
        let interface = Interface::new(settings, &mut nic, StackInstant::now());
        Self {
            stream,
            input: Vec::new(),
            nic,
            interface,
            sockets: SocketSet::new(Vec::new()),
            seen: Vec::new(),
            record: false,
            next_port: 40_000,
        }
    }

    /// Takes the address without asking DHCP.
    pub(crate) fn configure(&mut self) {
        self.interface.update_ip_addrs(|list| {
            list.clear();
            list.push(IpCidr::new(GUEST.into(), 24)).unwrap();
        });
        self.interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
    }

    /// Gets a lease and applies it; the domain name servers and the boot file's server are in the result.
    pub(crate) async fn dhcp(&mut self) -> (IpCidr, Option<Ipv4Addr>, Vec<Ipv4Addr>) {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let (address, router, dns) = self
            .until("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
                Some(dhcpv4::Event::Configured(lease)) => {
                    Some((lease.address, lease.router, lease.dns_servers.iter().copied().collect::<Vec<_>>()))
                }
                _ => None,
            })
            .await;
        self.sockets.remove(handle);
        self.configure();
        (address.into(), router, dns)
    }

    /// Sends a frame as it is.
    pub(crate) fn inject(&mut self, frame: &[u8]) {
        push_frame(&mut self.nic.tx, frame);
    }

    fn take_input(&mut self) {
        let mut at = 0;
        while let Some(prefix) = self.input.get(at..at + 4) {
            let len = u32::from_be_bytes(prefix.try_into().unwrap()) as usize;
            let Some(frame) = self.input.get(at + 4..at + 4 + len) else { break };
            if self.record {
                self.seen.push(frame.to_vec());
            }
            self.nic.rx.push_back(frame.to_vec());
            at += 4 + len;
        }
        self.input.drain(..at);
    }

    /// One round: stack, then wire. Waits a little when nothing happened.
    async fn step(&mut self) -> io::Result<()> {
        self.interface.poll(StackInstant::now(), &mut self.nic, &mut self.sockets);
        let delay = self.interface.poll_delay(StackInstant::now(), &self.sockets);
        let delay = delay.map_or(Duration::from_millis(20), |delay| delay.into()).min(Duration::from_millis(20));
        let mut buffer = [0; 65_536];
        let (reader, writer) = self.stream.split();
        tokio::select! {
            read = async { reader.readable().await?; reader.try_read(&mut buffer) } => match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            },
            wrote = async { writer.writable().await?; writer.try_write(&self.nic.tx) }, if !self.nic.tx.is_empty() => match wrote {
                Ok(count) => { self.nic.tx.drain(..count); }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            },
            () = tokio::time::sleep(delay) => {}
        }
        self.take_input();
        Ok(())
    }

    /// Runs the guest until `condition` gives something.
    pub(crate) async fn until<T>(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.step().await.unwrap_or_else(|error| panic!("wire broke while waiting for {what}: {error}"));
            if let Some(found) = condition(self) {
                return found;
            }
            assert!(start.elapsed() < LIMIT, "no {what} in time");
        }
    }

    /// Runs the guest until `future` is done.
    pub(crate) async fn during<T>(&mut self, what: &str, future: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let mut future = std::pin::pin!(future);
        loop {
            tokio::select! {
                biased;
                result = &mut future => return result,
                step = self.step() => step.unwrap_or_else(|error| panic!("wire broke during {what}: {error}")),
            }
            assert!(start.elapsed() < LIMIT, "{what} took too long");
        }
    }

    /// Waits until everything injected so far has been handled: a question for the gateway's MAC, which the
    /// link answers in order, comes back.
    pub(crate) async fn settle(&mut self) {
        self.record = true;
        let mark = self.seen.len();
        self.inject(&arp_request(MAC, GUEST, GATEWAY));
        self.until("answer for the gateway", |guest| {
            guest.seen[mark..].iter().any(|frame| is_arp_reply(frame, GATEWAY)).then_some(())
        })
        .await;
    }

    pub(crate) fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Starts a connection.
    pub(crate) fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let port = self.port();
        socket.connect(self.interface.context(), to, port).unwrap();
        self.sockets.add(socket)
    }

    /// Connects; `false` when refused.
    pub(crate) async fn connected(&mut self, to: SocketAddr) -> (SocketHandle, bool) {
        let handle = self.connect(to);
        let open = self
            .until("an outcome of connecting", |guest| match guest.socket(handle).state() {
                tcp::State::SynSent => None,
                state => Some(state == tcp::State::Established),
            })
            .await;
        (handle, open)
    }

    /// Connects, sends `request`, and gives everything received until the other side ends.
    pub(crate) async fn exchange(&mut self, to: SocketAddr, request: &[u8]) -> Vec<u8> {
        let (handle, open) = self.connected(to).await;
        assert!(open, "{to} refused");
        self.socket(handle).send_slice(request).unwrap();
        let received = self.read_to_end(handle).await;
        self.socket(handle).close();
        received
    }

    pub(crate) async fn read_to_end(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut received = Vec::new();
        self.until("the end of the answer", |guest| {
            let socket = guest.socket(handle);
            while socket.can_recv() {
                let count = socket
                    .recv(|bytes| {
                        (bytes.len(), {
                            received.extend_from_slice(bytes);
                            bytes.len()
                        })
                    })
                    .unwrap();
                assert!(count > 0);
            }
            (!socket.may_recv()).then_some(())
        })
        .await;
        received
    }

    /// A UDP socket on a port of its own.
    pub(crate) fn udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 16 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        let port = self.port();
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    /// Sends a datagram and waits for one back.
    pub(crate) async fn udp_exchange(&mut self, handle: SocketHandle, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(payload, to).unwrap();
        self.until("a datagram", |guest| {
            let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.recv().ok().map(|(bytes, _)| bytes.to_vec())
        })
        .await
    }
}

pub(crate) fn arp_request(mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

pub(crate) fn is_arp_reply(frame: &[u8], of: Ipv4Addr) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == of.octets()
}

pub(crate) fn checksum(parts: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in parts.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A frame with an IPv4 packet.
pub(crate) fn ip_frame(mac: [u8; 6], source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&GATEWAY_MAC[..], &mac, &[8, 0], &header, payload].concat()
}

/// A SYN with the given ports.
pub(crate) fn syn(source_port: u16, destination_port: u16) -> Vec<u8> {
    let mut segment = vec![0; 20];
    segment[..2].copy_from_slice(&source_port.to_be_bytes());
    segment[2..4].copy_from_slice(&destination_port.to_be_bytes());
    segment[7] = 9;
    segment[12] = 0x50;
    segment[13] = 2;
    segment[14] = 0xff;
    segment
}

/// An echo server on the host's loopback, which sends back until the client ends.
pub(crate) async fn tcp_echo() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.into_split();
                drop(tokio::io::copy(&mut reader, &mut writer).await);
            });
        }
    });
    address
}

pub(crate) async fn udp_echo() -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
            socket.send_to(&buffer[..len], from).await.unwrap();
        }
    });
    address
}

/// Waits for a condition of the world outside the guest.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "no {what} in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bytes that differ everywhere, from a seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// FNV-1a, to compare large transfers.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// What a test's server saw.
pub(crate) type Shared<T> = Arc<Mutex<T>>;
