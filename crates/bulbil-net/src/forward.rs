//! Host ports that lead into the guest.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::stats::Counters;
use crate::tcp::reset_on_close;

/// Time before the next accept when the host is out of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection on its way into the guest.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) stream: TcpStream,
    pub(crate) guest_port: u16,
}

/// A host port that leads into the guest, until [`Forward::stop`] or the end of the link.
///
/// Dropping this does not end it.
#[derive(Debug)]
pub struct Forward {
    task: JoinHandle<()>,
    local_addr: SocketAddr,
}

impl Forward {
    pub(crate) fn start(
        listener: std::net::TcpListener,
        guest_port: u16,
        inbound: mpsc::Sender<Inbound>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let local_addr = listener.local_addr()?;
        let task = tokio::spawn(accept_all(listener, guest_port, inbound, counters));
        Ok(Self { task, local_addr })
    }

    /// The address listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Closes the listener and waits until it is closed. Connections already forwarded stay.
    pub async fn stop(self) {
        self.task.abort();
        if let Err(error) = self.task.await
            && error.is_panic()
        {
            tracing::error!(%error, "forward ended badly");
        }
    }
}

async fn accept_all(listener: TcpListener, guest_port: u16, inbound: mpsc::Sender<Inbound>, counters: Arc<Counters>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = inbound.closed() => return,
        };
        match accepted {
            Ok((stream, _)) => hand_over(Inbound { stream, guest_port }, &inbound, &counters),
            Err(error) => {
                tracing::warn!(%error, guest_port, "cannot accept for the guest");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Gives a connection to the link, or resets it when there is no guest to take it.
fn hand_over(connection: Inbound, inbound: &mpsc::Sender<Inbound>, counters: &Counters) {
    // Undone by the link once the guest has answered: until then every end is a reset.
    reset_on_close(&connection.stream);
    let up = counters.connected.load(Ordering::Acquire) && counters.guest_seen.load(Ordering::Acquire);
    if !up || inbound.try_send(connection).is_err() {
        counters.forward_failed.one();
    }
}
