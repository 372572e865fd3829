//! The client: what the command line uses to reach the daemon.

use std::path::{Path, PathBuf};

use bulbil_control::{
    AddedDataKey, ControlError, CopyFromRequest, CopyToRequest, ErrorCode, ExportRequest, GcRequest, ImageRecord,
    ImportRequest, InstanceView, LaunchRequest, OfferedImages, OtherStore, RotateKeyRequest, ScrubRequest,
    StoreKeySlot, StoreStats,
};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::event::{ErrorBody, Event, Health, Wait};

/// The largest answer that is not a stream.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// The longest line of a stream.
const MAX_EVENT_BYTES: usize = 4 << 20;

/// A request that did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the daemon's socket.
    #[error("no daemon answers at `{}`", .0.display())]
    NoDaemon(PathBuf),
    /// The daemon answered with an error.
    #[error("{0}")]
    Refused(ControlError),
    /// The connection broke, or what came over it made no sense.
    #[error("the connection to the daemon failed: {0}")]
    Connection(String),
}

impl ClientError {
    fn connection(error: impl std::fmt::Display) -> Self {
        Self::Connection(error.to_string())
    }
}

/// A client of the daemon behind one socket.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// Events of something that takes long.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    buffer: BytesMut,
}

impl EventStream {
    /// The next event; `None` after the last.
    ///
    /// # Errors
    /// `Refused` for an event that says so; `Connection`.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return match serde_json::from_slice(&line).map_err(ClientError::connection)? {
                    Event::Error { error } => Err(ClientError::Refused(error)),
                    Event::Done => Ok(None),
                    event => Ok(Some(event)),
                };
            }
            if self.buffer.len() > MAX_EVENT_BYTES {
                return Err(ClientError::Connection("an event is too long".to_owned()));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.map_err(ClientError::connection)?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None => return Err(ClientError::Connection("the daemon ended before it was done".to_owned())),
            }
        }
    }
}

impl Client {
    /// A client of the daemon that listens on `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<http::Response<Incoming>, ClientError> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| match e.kind() {
            NotFound | ConnectionRefused => ClientError::NoDaemon(self.socket.clone()),
            _ => ClientError::connection(e),
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::connection)?;
        // The connection lives as long as the answer is read.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "bulbil")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(ClientError::connection)?;
        let response = sender.send_request(request).await.map_err(ClientError::connection)?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let bytes = read_body(response).await?;
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(ClientError::Refused(body.error)),
            Err(_) => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                Err(ClientError::Refused(ControlError::new(ErrorCode::Invalid, text)))
            }
        }
    }

    pub(crate) async fn call<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        let bytes = read_body(self.send(method, path, Vec::new()).await?).await?;
        serde_json::from_slice(&bytes).map_err(ClientError::connection)
    }

    /// A call with a body.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::connection)?;
        let bytes = read_body(self.send(Method::POST, path, body).await?).await?;
        serde_json::from_slice(&bytes).map_err(ClientError::connection)
    }

    async fn stream(&self, path: &str, body: &impl Serialize) -> Result<EventStream, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::connection)?;
        let response = self.send(Method::POST, path, body).await?;
        Ok(EventStream { body: response.into_body(), buffer: BytesMut::new() })
    }

    /// Asks whether the daemon is there.
    ///
    /// # Errors
    /// `NoDaemon`, `Connection`.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.call(Method::GET, "/v1/health").await
    }

    /// Ends the daemon.
    ///
    /// # Errors
    /// `NoDaemon`, `Connection`.
    pub async fn shutdown(&self) -> Result<Health, ClientError> {
        self.call(Method::POST, "/v1/shutdown").await
    }

    /// Lists all images.
    ///
    /// # Errors
    /// As every call: `NoDaemon`, `Refused`, `Connection`.
    pub async fn images(&self) -> Result<Vec<ImageRecord>, ClientError> {
        self.call(Method::GET, "/v1/images").await
    }

    /// Shows an image.
    ///
    /// # Errors
    /// As every call.
    pub async fn image(&self, image: &str) -> Result<ImageRecord, ClientError> {
        self.call(Method::GET, &format!("/v1/images/{}", escape(image))).await
    }

    /// Removes an image.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_image(&self, image: &str) -> Result<ImageRecord, ClientError> {
        self.call(Method::DELETE, &format!("/v1/images/{}", escape(image))).await
    }

    /// Imports an image; dropping the stream cancels it.
    ///
    /// # Errors
    /// As every call.
    pub async fn import(&self, request: &ImportRequest) -> Result<EventStream, ClientError> {
        self.stream("/v1/images", request).await
    }

    /// Exports an image to a file; dropping the stream cancels it.
    ///
    /// # Errors
    /// As every call.
    pub async fn export(&self, image: &str, request: &ExportRequest) -> Result<EventStream, ClientError> {
        self.stream(&format!("/v1/images/{}/export", escape(image)), request).await
    }

    /// Copies an image into another store; dropping the stream stops it.
    ///
    /// # Errors
    /// As every call.
    pub async fn copy_to(&self, image: &str, request: &CopyToRequest) -> Result<EventStream, ClientError> {
        self.stream(&format!("/v1/images/{}/copy", escape(image)), request).await
    }

    /// Copies an image from another store; dropping the stream stops it.
    ///
    /// # Errors
    /// As every call.
    pub async fn copy_from(&self, request: &CopyFromRequest) -> Result<EventStream, ClientError> {
        self.stream("/v1/image-copies", request).await
    }

    /// Lists what another store offers by name.
    ///
    /// # Errors
    /// As every call.
    pub async fn offered_images(&self, store: &OtherStore) -> Result<OfferedImages, ClientError> {
        self.ask("/v1/offered-images", store).await
    }

    /// Checks of a launch what does not depend on the image.
    ///
    /// # Errors
    /// As every call.
    pub async fn check_launch(&self, request: &LaunchRequest) -> Result<(), ClientError> {
        let body = serde_json::to_vec(request).map_err(ClientError::connection)?;
        self.send(Method::POST, "/v1/launch-checks", body).await.map(drop)
    }

    /// Launches instances and follows them.
    ///
    /// # Errors
    /// As every call.
    pub async fn launch(&self, request: &LaunchRequest, wait: Wait) -> Result<EventStream, ClientError> {
        self.stream(&format!("/v1/instances?wait={wait}"), request).await
    }

    /// Starts an instance and follows it.
    ///
    /// # Errors
    /// As every call.
    pub async fn start(&self, instance: &str, wait: Wait) -> Result<EventStream, ClientError> {
        self.stream(&format!("/v1/instances/{}/start?wait={wait}", escape(instance)), &()).await
    }

    /// Lists all instances.
    ///
    /// # Errors
    /// As every call.
    pub async fn instances(&self) -> Result<Vec<InstanceView>, ClientError> {
        self.call(Method::GET, "/v1/instances").await
    }

    /// Shows an instance.
    ///
    /// # Errors
    /// As every call.
    pub async fn instance(&self, instance: &str) -> Result<InstanceView, ClientError> {
        self.call(Method::GET, &format!("/v1/instances/{}", escape(instance))).await
    }

    /// Stops an instance and waits until it is.
    ///
    /// # Errors
    /// As every call.
    pub async fn stop(&self, instance: &str, grace_s: u64, force: bool) -> Result<InstanceView, ClientError> {
        let path = format!("/v1/instances/{}/stop?grace_s={grace_s}&force={force}", escape(instance));
        self.call(Method::POST, &path).await
    }

    /// Removes an instance.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_instance(&self, instance: &str, force: bool) -> Result<InstanceView, ClientError> {
        self.call(Method::DELETE, &format!("/v1/instances/{}?force={force}", escape(instance))).await
    }

    /// What the store holds and what each image costs.
    ///
    /// # Errors
    /// As every call.
    pub async fn store_stats(&self) -> Result<StoreStats, ClientError> {
        self.call(Method::GET, "/v1/store").await
    }

    /// Lists the keys that open the store.
    ///
    /// # Errors
    /// As every call.
    pub async fn store_keys(&self) -> Result<Vec<StoreKeySlot>, ClientError> {
        self.call(Method::GET, "/v1/store/keys").await
    }

    /// Replaces the key of the store.
    ///
    /// # Errors
    /// As every call.
    pub async fn rotate_store_key(&self, request: &RotateKeyRequest) -> Result<Vec<StoreKeySlot>, ClientError> {
        self.ask("/v1/store/keys/rotate", request).await
    }

    /// Adds a data key to the store.
    ///
    /// # Errors
    /// As every call.
    pub async fn add_data_key(&self) -> Result<AddedDataKey, ClientError> {
        self.call(Method::POST, "/v1/store/data-keys").await
    }

    /// Frees what nothing uses in the store.
    ///
    /// # Errors
    /// As every call.
    pub async fn collect_garbage(&self, request: &GcRequest) -> Result<EventStream, ClientError> {
        self.stream("/v1/store/gc", request).await
    }

    /// Reads the store again; dropping the stream stops it.
    ///
    /// # Errors
    /// As every call.
    pub async fn scrub(&self, request: &ScrubRequest) -> Result<EventStream, ClientError> {
        self.stream("/v1/store/scrub", request).await
    }

    /// Brings an image into the cache; dropping the stream stops it.
    ///
    /// # Errors
    /// As every call.
    pub async fn warm(&self, image: &str) -> Result<EventStream, ClientError> {
        self.stream(&format!("/v1/images/{}/warm", escape(image)), &()).await
    }
}

async fn read_body(response: http::Response<Incoming>) -> Result<Bytes, ClientError> {
    let limited = http_body_util::Limited::new(response.into_body(), MAX_ANSWER_BYTES);
    limited.collect().await.map(http_body_util::Collected::to_bytes).map_err(ClientError::connection)
}

/// Percent-encodes a segment of a path (RFC 3986, unreserved characters stay).
pub(crate) fn escape(segment: &str) -> String {
    let keep = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    segment.bytes().map(|b| if keep(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
