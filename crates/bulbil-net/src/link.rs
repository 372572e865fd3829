//! The link itself: made once per NIC, run once per connection of QEMU.

use std::io;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::codec::dns::LocalZone;
use crate::config::{ConfigError, LinkConfig};
use crate::driver::Driver;
use crate::forward::{Forward, Inbound};
use crate::metadata::MetadataService;
use crate::policy::Policy;
use crate::resolver::Resolver;
use crate::stats::{Counters, LinkStats};

/// Forwarded connections that wait for the link; a further one is reset.
const INBOUND_QUEUE: usize = 64;

/// Why a link stopped, or was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The configuration cannot be served.
    #[error("link configuration")]
    Config(#[from] ConfigError),
    /// A system call failed.
    #[error("cannot {action}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The stream is not what QEMU writes: a frame is announced that is longer than any can be.
    #[error("the stream announces a frame of {len_bytes} bytes")]
    FrameTooLong {
        /// The length announced.
        len_bytes: u32,
    },
}

impl LinkError {
    pub(crate) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

/// The far end of one guest NIC; see the crate's documentation.
pub struct Link {
    pub(crate) config: Arc<LinkConfig>,
    pub(crate) service: Arc<dyn MetadataService>,
    pub(crate) policy: Policy,
    pub(crate) resolver: Resolver,
    pub(crate) zone: Arc<LocalZone>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) inbound: mpsc::Receiver<Inbound>,
    inbound_sender: mpsc::Sender<Inbound>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Link {
    /// A link for the guest described by `config`, whose metadata connections go to `service`.
    ///
    /// # Errors
    ///
    /// [`LinkError::Config`] with the first thing found wrong.
    pub fn new(config: LinkConfig, service: Arc<dyn MetadataService>) -> Result<Self, LinkError> {
        config.validate()?;
        let (inbound_sender, inbound) = mpsc::channel(INBOUND_QUEUE);
        Ok(Self {
            policy: Policy::new(&config),
            resolver: Resolver::new(&config.upstream_dns, &config.metadata_ips),
            zone: Arc::new(LocalZone::new(&config)),
            config: Arc::new(config),
            service,
            counters: Arc::default(),
            inbound,
            inbound_sender,
        })
    }

    /// A handle for forwards and counters, valid for all connections of QEMU.
    pub fn handle(&self) -> LinkHandle {
        LinkHandle { counters: Arc::clone(&self.counters), inbound: self.inbound_sender.clone() }
    }

    /// Serves the guest over `stream` until QEMU closes it.
    ///
    /// Everything the guest had open ends with the stream: host connections are reset, metadata streams
    /// fail. The link can then be run again with a new stream; leases, forwards and counters go on.
    ///
    /// Runs in one task and spawns short ones of its own; works on a current-thread runtime.
    ///
    /// # Errors
    ///
    /// [`LinkError::FrameTooLong`] when the stream is not QEMU's; [`LinkError::Io`] when it fails.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is the same as QEMU closing the stream.
    pub async fn run(&mut self, stream: UnixStream) -> Result<(), LinkError> {
        let mut driver = Driver::new(self, stream);
        std::future::poll_fn(|cx| driver.poll(cx)).await
    }

    /// Serves the guest over one connection of `listener` at a time; a new connection replaces the old.
    ///
    /// A connection that breaks is logged and the next one awaited.
    ///
    /// # Errors
    ///
    /// [`LinkError::Io`] when `listener` fails; it does not return otherwise.
    pub async fn serve(&mut self, listener: UnixListener) -> Result<std::convert::Infallible, LinkError> {
        let mut next = None;
        loop {
            let stream = match next.take() {
                Some(stream) => stream,
                None => accept(&listener).await?,
            };
            tokio::select! {
                biased;
                newer = accept(&listener) => next = Some(newer?),
                result = self.run(stream) => match result {
                    Ok(()) => tracing::debug!("qemu closed the link"),
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::warn!(error, "link broke");
                    }
                },
            }
        }
    }
}

async fn accept(listener: &UnixListener) -> Result<UnixStream, LinkError> {
    let (stream, _) = listener.accept().await.map_err(LinkError::io("accept a connection of qemu"))?;
    Ok(stream)
}

/// What others may do with a running link. Clones are handles of the same link.
#[derive(Debug, Clone)]
pub struct LinkHandle {
    counters: Arc<Counters>,
    inbound: mpsc::Sender<Inbound>,
}

impl LinkHandle {
    /// Leads every connection accepted from `listener` to `guest_port` of the guest, where it appears to come
    /// from the gateway.
    ///
    /// A connection is reset at once when QEMU is not connected or the guest has not yet used its lease,
    /// when the guest refuses it, and after 10 s when the guest does not answer. A client therefore sees a
    /// reset, not silence, until the guest's port is open.
    ///
    /// # Errors
    ///
    /// [`LinkError::Io`] when the listener cannot be used by tokio.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    #[allow(clippy::unused_async, reason = "it must be called within a runtime, which async says")]
    pub async fn forward_tcp(&self, listener: std::net::TcpListener, guest_port: u16) -> Result<Forward, LinkError> {
        Forward::start(listener, guest_port, self.inbound.clone(), Arc::clone(&self.counters))
            .map_err(LinkError::io("listen for the guest"))
    }

    /// The counters now.
    pub fn stats(&self) -> LinkStats {
        self.counters.snapshot()
    }

    /// Whether QEMU is connected and the guest has used its lease.
    pub fn is_up(&self) -> bool {
        let stats = self.stats();
        stats.connected && stats.guest_seen
    }
}
