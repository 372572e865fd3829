//! The instance's Ethernet link and the metadata service at its end.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use bulbil_metadata::{
    InstanceView as MetadataView, Ipv4Cidr, MetadataService, PublicKey, ServiceOptions, serve_connection,
};
use bulbil_net::{Link, LinkConfig, LinkHandle, MetadataStream, parse_resolv_conf};

use super::GUEST_IP;
use crate::error::{ControlError, ErrorCode};
use crate::model::InstanceRecord;

/// Gives each connection of this link to the one service it belongs to: the link is the identity.
struct ThisInstance(Arc<MetadataService>);

impl bulbil_net::MetadataService for ThisInstance {
    fn connect(&self, destination: SocketAddr, stream: MetadataStream) {
        let ttl = stream.hop_limit();
        let usual = ttl.get();
        let hook = Arc::new(move |hops: Option<u8>| ttl.set(hops.unwrap_or(usual)));
        tokio::spawn(serve_connection(stream, destination, Arc::clone(&self.0), Some(hook)));
    }
}

/// What the metadata service tells of an instance.
pub(super) fn metadata_view(record: &InstanceRecord, user_data: Option<Vec<u8>>) -> Result<MetadataView, ControlError> {
    let mac = parse_mac(&record.mac)?;
    let mut view = MetadataView::new(record.id.clone(), record.image_id.clone(), mac, GUEST_IP);
    view.name = record.name.to_string();
    view.hostname.clone_from(&record.hostname);
    view.instance_type = format!("bulbil.{}c{}m", record.cpus, record.memory_bytes >> 20);
    view.launched_at = u64::try_from(record.created_at).unwrap_or_default();
    view.public_keys = record
        .public_keys
        .iter()
        .map(|login| PublicKey { name: login.name.clone(), openssh: login.key.clone() })
        .collect();
    view.user_data = user_data.map(Into::into);
    view.personality = record.personality;
    let network = LinkConfig::new(mac, record.hostname.clone());
    view.gateway = network.gateway_ip;
    view.nameservers = vec![network.dns_ip];
    view.subnet_cidr = Ipv4Cidr::containing(GUEST_IP, network.prefix_len);
    Ok(view)
}

/// Makes the link of an instance.
pub(super) fn make_link(record: &InstanceRecord, view: MetadataView) -> Result<Link, ControlError> {
    let mut config = LinkConfig::new(parse_mac(&record.mac)?, record.hostname.clone());
    let resolvers = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    config.upstream_dns = parse_resolv_conf(&resolvers);
    let on_request = Box::new(|event: &bulbil_metadata::RequestEvent<'_>| {
        tracing::debug!(method = %event.method, path = %event.path, status = %event.status, "metadata request");
    });
    let options = ServiceOptions { on_request: Some(on_request), ..ServiceOptions::default() };
    let service = Arc::new(MetadataService::with_options(view, options));
    Link::new(config, Arc::new(ThisInstance(service)))
        .map_err(|e| ControlError::with_source(ErrorCode::Failed, "cannot make the instance's network link", &e))
}

/// Opens the host's ports that lead in; returns the one that leads to SSH.
pub(super) async fn open_ports(record: &InstanceRecord, link: &LinkHandle) -> Result<u16, ControlError> {
    let failed = |what: String, e: &(dyn std::error::Error + 'static)| {
        ControlError::with_source(ErrorCode::InUse, format!("cannot publish {what}"), e)
    };
    for port in &record.publish {
        let listener = TcpListener::bind((port.address, port.host_port))
            .map_err(|e| failed(format!("port {} of {}", port.host_port, port.address), &e))?;
        link.forward_tcp(listener, port.guest_port).await.map_err(|e| failed(port.to_string(), &e))?;
    }
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| failed("a port for ssh".to_owned(), &e))?;
    let forward = link.forward_tcp(listener, 22).await.map_err(|e| failed("a port for ssh".to_owned(), &e))?;
    Ok(forward.local_addr().port())
}

fn parse_mac(text: &str) -> Result<[u8; 6], ControlError> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|pair| u8::from_str_radix(pair, 16).ok()).collect();
    let mac = bytes.and_then(|bytes| bytes.try_into().ok());
    mac.ok_or_else(|| ControlError::new(ErrorCode::Failed, format!("`{text}` is not a hardware address")))
}
