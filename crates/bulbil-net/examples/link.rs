//! Serves one QEMU guest on a unix socket, with a metadata service that says little, for trying things out.
//!
//! ```text
//! cargo run --release -p bulbil-net --example link -- /tmp/n.sock [HOST_PORT:GUEST_PORT | open:PORT | user-data:FILE]...
//! qemu-system-x86_64 ... -netdev stream,id=n0,server=off,addr.type=unix,addr.path=/tmp/n.sock \
//!     -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01,romfile=
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bulbil_net::{Link, LinkConfig, MetadataService, MetadataStream, parse_resolv_conf};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// Enough of EC2's metadata for cloud-init to find an instance.
struct Metadata {
    user_data: String,
}

impl MetadataService for Metadata {
    fn connect(&self, destination: SocketAddr, stream: MetadataStream) {
        let user_data = self.user_data.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(destination, stream, &user_data).await {
                tracing::info!(%error, "metadata connection ended");
            }
        });
    }
}

async fn serve(destination: SocketAddr, stream: MetadataStream, user_data: &str) -> std::io::Result<()> {
    let hop_limit = stream.hop_limit();
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    stream.read_line(&mut request).await?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? <= 2 {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; usize::min(length, 4096)];
    stream.read_exact(&mut body).await?;
    tracing::info!(%destination, request = request.trim(), "metadata");
    let (status, body) = answer(&request, user_data);
    hop_limit.set(if request.starts_with("PUT") { 1 } else { 64 });
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn answer<'a>(request: &str, user_data: &'a str) -> (&'static str, &'a str) {
    let path = request.split_whitespace().nth(1).unwrap_or_default();
    let path = path.strip_prefix('/').unwrap_or(path);
    let rest = path.split_once('/').map_or("", |(_, rest)| rest).trim_end_matches('/');
    match rest {
        "api/token" => ("200 OK", "token"),
        "meta-data" => ("200 OK", "instance-id\nlocal-hostname"),
        "meta-data/instance-id" => ("200 OK", "i-0123456789"),
        "meta-data/local-hostname" => ("200 OK", "web"),
        "user-data" => ("200 OK", user_data),
        "dynamic/instance-identity" => ("200 OK", "document"),
        "dynamic/instance-identity/document" => ("200 OK", "{}"),
        _ => ("404 Not Found", ""),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::DEBUG).init();
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("the socket's path is missing")?;
    let mut config = LinkConfig::new(MAC, "web");
    config.upstream_dns = parse_resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    let mut forwards = Vec::new();
    let mut user_data = String::from("#!/bin/sh\nip route\n");
    for argument in arguments {
        match argument.split_once(':').ok_or("HOST_PORT:GUEST_PORT, open:PORT or user-data:FILE")? {
            ("open", port) => config.allow_host_ports.push(port.parse()?),
            ("user-data", file) => user_data = std::fs::read_to_string(file)?,
            (host, guest) => forwards.push((host.parse::<u16>()?, guest.parse::<u16>()?)),
        }
    }
    let mut link = Link::new(config, Arc::new(Metadata { user_data }))?;
    let handle = link.handle();
    for (host, guest) in forwards {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, host))?;
        let forward = handle.forward_tcp(listener, guest).await?;
        tracing::info!(address = %forward.local_addr(), guest, "forwarding");
    }
    tokio::spawn(async move {
        let mut before = handle.stats();
        loop {
            tokio::time::sleep(std::time::Duration::from_secs(5)).await;
            let now = handle.stats();
            if now != before {
                tracing::info!(stats = ?now, "counters");
            }
            before = now;
        }
    });
    let listener = UnixListener::bind(&path)?;
    match link.serve(listener).await? {}
}
