//! Serves one instance's metadata on a local port, as if the guest had called another address.
//!
//! ```text
//! cargo run -p bulbil-metadata --example serve -- 127.0.0.1:8169 169.254.169.254 instance.json
//! ```
//!
//! With it a client (cloud-init's own code, an SDK, curl) can be pointed at a tree without a
//! virtual machine. Each request is printed with its answer's status.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "an example talks to a terminal")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bulbil_metadata::{Limits, MetadataService, ServiceOptions, parse_instance_file, serve_connection};
use tokio::net::TcpListener;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("missing argument: {what}"));
    let listen: SocketAddr = next("the address to listen on")?.parse()?;
    let destination: IpAddr = next("the address the guest calls")?.parse()?;
    let view = parse_instance_file(&std::fs::read_to_string(next("the instance file")?)?)?;
    let limits = match next("requests per second").ok() {
        Some(rate) => {
            Limits { burst_requests: rate.parse()?, refill_requests_per_s: rate.parse()?, ..Limits::default() }
        }
        None => Limits::default(),
    };
    let quiet = limits != Limits::default();
    let options = ServiceOptions {
        limits,
        on_request: Some(Box::new(move |event| {
            if !quiet {
                println!("{} {} {}", event.method, event.path, event.status.as_u16());
            }
        })),
        ..ServiceOptions::default()
    };
    let service = Arc::new(MetadataService::with_options(view, options));
    let listener = TcpListener::bind(listen).await?;
    println!("serving on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve_connection(stream, SocketAddr::new(destination, 80), Arc::clone(&service), None));
    }
}
