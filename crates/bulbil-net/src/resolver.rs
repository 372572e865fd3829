//! DNS questions relayed to the host's resolvers.
//!
//! ```text
//!            all resolvers silent for 2 s            one answers
//!   Alive --------------------------------> Silent -------------> Alive
//!     relays, waits up to 2 s                answers SERVFAIL at once; every 3 s one question is
//!                                            still relayed behind the guest's back, to find out
//! ```
//!
//! A guest without a resolver would otherwise lose seconds per name: cloud-init alone asks for three.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::codec::dns::{self, LocalZone, Query, Rcode};
use crate::codec::resolv::is_relay_target;
use crate::limits::{DNS_PROBE_INTERVAL, DNS_TIMEOUT};

/// Largest answer over UDP that is taken from a resolver.
const MAX_UDP_ANSWER_BYTES: usize = 4096;
/// Time for the guest's next question on one TCP connection.
const TCP_IDLE: std::time::Duration = std::time::Duration::from_secs(10);

/// The host's resolvers, and whether they answer.
#[derive(Debug, Clone)]
pub(crate) struct Resolver {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstreams: Vec<SocketAddr>,
    silent: AtomicBool,
    probed_at: Mutex<Option<Instant>>,
}

/// What to do with a question that the local zone does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Relay it and wait.
    Relay,
    /// Answer SERVFAIL at once.
    Fail,
    /// Answer SERVFAIL at once, and relay it all the same to find out whether a resolver is back.
    FailAndProbe,
}

impl Resolver {
    /// Leaves out the addresses that must never be relayed to.
    pub(crate) fn new(upstreams: &[SocketAddr], metadata_ips: &[IpAddr]) -> Self {
        let usable = |to: &&SocketAddr| is_relay_target(&to.ip()) && !metadata_ips.contains(&to.ip());
        let upstreams = upstreams.iter().filter(usable).copied().collect();
        let shared = Shared { upstreams, silent: AtomicBool::new(false), probed_at: Mutex::new(None) };
        Self { shared: Arc::new(shared) }
    }

    pub(crate) fn plan(&self, now: Instant) -> Plan {
        if self.shared.upstreams.is_empty() {
            return Plan::Fail;
        }
        if !self.shared.silent.load(Ordering::Relaxed) {
            return Plan::Relay;
        }
        let mut probed_at = self.shared.probed_at.lock().unwrap_or_else(PoisonError::into_inner);
        if probed_at.is_some_and(|at| now.saturating_duration_since(at) < DNS_PROBE_INTERVAL) {
            return Plan::Fail;
        }
        *probed_at = Some(now);
        Plan::FailAndProbe
    }

    /// Finds out whether any resolver is there before the guest asks.
    pub(crate) async fn probe(&self) {
        if !self.shared.upstreams.is_empty() {
            let id = self.shared.upstreams.iter().map(SocketAddr::port).fold(0x6275, u16::wrapping_add);
            let _answer = self.relay(&dns::root_query(id)).await;
        }
    }

    /// The first useful answer of a resolver, else the last of any kind; `None` when all are silent.
    pub(crate) async fn relay(&self, query: &[u8]) -> Option<Vec<u8>> {
        let count = u32::try_from(self.shared.upstreams.len()).ok()?;
        let share = DNS_TIMEOUT.checked_div(count)?;
        let mut answer = None;
        for &upstream in &self.shared.upstreams {
            match timeout(share, ask_udp(upstream, query)).await {
                Ok(Ok(bytes)) => {
                    let useful = dns::is_useful(&bytes);
                    answer = Some(bytes);
                    if useful {
                        break;
                    }
                }
                Ok(Err(error)) => tracing::debug!(%error, %upstream, "resolver failed"),
                Err(_) => tracing::debug!(%upstream, "resolver did not answer in time"),
            }
        }
        self.note(answer.is_some());
        answer
    }

    fn note(&self, answered: bool) {
        let was_silent = self.shared.silent.swap(!answered, Ordering::Relaxed);
        if answered {
            return;
        }
        *self.shared.probed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        if !was_silent {
            tracing::info!("no resolver of the host answers");
        }
    }

    async fn relay_tcp(&self, query: &[u8]) -> io::Result<Vec<u8>> {
        if self.plan(Instant::now()) == Plan::Fail {
            return Err(io::ErrorKind::NotConnected.into());
        }
        for &upstream in &self.shared.upstreams {
            match timeout(DNS_TIMEOUT, ask_tcp(upstream, query)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => tracing::debug!(%error, %upstream, "resolver failed"),
                Err(_) => tracing::debug!(%upstream, "resolver did not answer in time"),
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Answers the questions of one TCP connection, one after the other, until the guest ends it.
    pub(crate) async fn serve_tcp(self, zone: Arc<LocalZone>, mut stream: DuplexStream) {
        while let Ok(Ok(bytes)) = timeout(TCP_IDLE, read_message(&mut stream)).await {
            let Some(query) = Query::parse(&bytes) else { return };
            let answer = match zone.answer(&query) {
                Some(answer) => answer,
                None => self.relay_tcp(&bytes).await.unwrap_or_else(|_| query.respond(Rcode::ServFail, &[])),
            };
            if write_message(&mut stream, &answer).await.is_err() {
                return;
            }
        }
    }
}

async fn ask_udp(upstream: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(query).await?;
    let mut answer = vec![0; MAX_UDP_ANSWER_BYTES];
    loop {
        let len = socket.recv(&mut answer).await?;
        if dns::is_answer_to(query, &answer[..len]) {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    if dns::is_answer_to(query, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    let mut bytes = vec![0; usize::from(len)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

async fn write_message(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    let len = u16::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_usable_resolver_the_answer_is_immediate() {
        let link_local = ["169.254.169.253:53".parse().unwrap(), "[fd00:ec2::254]:53".parse().unwrap()];
        assert_eq!(Resolver::new(&[], &[]).plan(Instant::now()), Plan::Fail);
        assert_eq!(Resolver::new(&link_local, &[]).plan(Instant::now()), Plan::Fail);
    }

    #[test]
    fn silent_resolver_is_tried_again_now_and_then() {
        let resolver = Resolver::new(&["192.0.2.1:53".parse().unwrap()], &[]);
        assert_eq!(resolver.plan(Instant::now()), Plan::Relay);
        resolver.note(false);
        let now = Instant::now();
        assert_eq!(resolver.plan(now), Plan::Fail);
        assert_eq!(resolver.plan(now + DNS_PROBE_INTERVAL), Plan::FailAndProbe);
        assert_eq!(resolver.plan(now + DNS_PROBE_INTERVAL), Plan::Fail);
        resolver.note(true);
        assert_eq!(resolver.plan(now), Plan::Relay);
    }
}
