//! Volumes and snapshots: routes and calls.

use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use bulbil_control::{SnapshotRecord, VolumeRequest, VolumeView};
use bulbil_types::Name;
use http::Method;
use serde::{Deserialize, Serialize};

use crate::client::{Client, ClientError, escape};
use crate::server::{Answer, Api, to_its_end};

/// The body of a resize.
#[derive(Debug, Serialize, Deserialize)]
struct Resize {
    size_bytes: u64,
}

/// The body of a snapshot or a clone.
#[derive(Debug, Serialize, Deserialize)]
struct Named {
    name: Option<Name>,
}

pub(crate) fn routes() -> Router<Api> {
    Router::new()
        .route("/v1/volumes", get(list).post(create))
        .route("/v1/volumes/{volume}", get(show).delete(remove))
        .route("/v1/volumes/{volume}/resize", post(resize))
        .route("/v1/volumes/{volume}/snapshot", post(snapshot))
        .route("/v1/volumes/{volume}/clone", post(clone))
        .route("/v1/snapshots", get(list_snapshots))
        .route("/v1/snapshots/{snapshot}", get(show_snapshot).delete(remove_snapshot))
}

async fn list(State(api): State<Api>) -> Answer<Vec<VolumeView>> {
    Ok(Json(api.control.volumes().await?))
}

async fn create(State(api): State<Api>, Json(request): Json<VolumeRequest>) -> Answer<VolumeView> {
    Ok(Json(to_its_end(async move { api.control.create_volume(request).await }).await?))
}

async fn show(State(api): State<Api>, Path(volume): Path<String>) -> Answer<VolumeView> {
    Ok(Json(api.control.volume(&volume).await?))
}

async fn remove(State(api): State<Api>, Path(volume): Path<String>) -> Answer<VolumeView> {
    Ok(Json(to_its_end(async move { api.control.remove_volume(&volume).await }).await?))
}

async fn resize(State(api): State<Api>, Path(volume): Path<String>, Json(body): Json<Resize>) -> Answer<VolumeView> {
    Ok(Json(to_its_end(async move { api.control.resize_volume(&volume, body.size_bytes).await }).await?))
}

async fn snapshot(
    State(api): State<Api>,
    Path(volume): Path<String>,
    Json(body): Json<Named>,
) -> Answer<SnapshotRecord> {
    Ok(Json(to_its_end(async move { api.control.snapshot_volume(&volume, body.name).await }).await?))
}

async fn clone(State(api): State<Api>, Path(volume): Path<String>, Json(body): Json<Named>) -> Answer<VolumeView> {
    Ok(Json(to_its_end(async move { api.control.clone_volume(&volume, body.name).await }).await?))
}

async fn list_snapshots(State(api): State<Api>) -> Answer<Vec<SnapshotRecord>> {
    Ok(Json(api.control.snapshots().await?))
}

async fn show_snapshot(State(api): State<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotRecord> {
    Ok(Json(api.control.snapshot(&snapshot).await?))
}

async fn remove_snapshot(State(api): State<Api>, Path(snapshot): Path<String>) -> Answer<SnapshotRecord> {
    Ok(Json(to_its_end(async move { api.control.remove_snapshot(&snapshot).await }).await?))
}

impl Client {
    /// Lists all volumes.
    ///
    /// # Errors
    /// As every call.
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, ClientError> {
        self.call(Method::GET, "/v1/volumes").await
    }

    /// Shows a volume.
    ///
    /// # Errors
    /// As every call.
    pub async fn volume(&self, volume: &str) -> Result<VolumeView, ClientError> {
        self.call(Method::GET, &format!("/v1/volumes/{}", escape(volume))).await
    }

    /// Creates a volume.
    ///
    /// # Errors
    /// As every call.
    pub async fn create_volume(&self, request: &VolumeRequest) -> Result<VolumeView, ClientError> {
        self.ask("/v1/volumes", request).await
    }

    /// Makes a volume larger.
    ///
    /// # Errors
    /// As every call.
    pub async fn resize_volume(&self, volume: &str, size_bytes: u64) -> Result<VolumeView, ClientError> {
        self.ask(&format!("/v1/volumes/{}/resize", escape(volume)), &Resize { size_bytes }).await
    }

    /// Takes a snapshot of a volume and waits until it is there.
    ///
    /// # Errors
    /// As every call.
    pub async fn snapshot_volume(&self, volume: &str, name: Option<Name>) -> Result<SnapshotRecord, ClientError> {
        self.ask(&format!("/v1/volumes/{}/snapshot", escape(volume)), &Named { name }).await
    }

    /// Makes a volume that begins as another one is now.
    ///
    /// # Errors
    /// As every call.
    pub async fn clone_volume(&self, volume: &str, name: Option<Name>) -> Result<VolumeView, ClientError> {
        self.ask(&format!("/v1/volumes/{}/clone", escape(volume)), &Named { name }).await
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_volume(&self, volume: &str) -> Result<VolumeView, ClientError> {
        self.call(Method::DELETE, &format!("/v1/volumes/{}", escape(volume))).await
    }

    /// Lists all snapshots.
    ///
    /// # Errors
    /// As every call.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ClientError> {
        self.call(Method::GET, "/v1/snapshots").await
    }

    /// Shows a snapshot.
    ///
    /// # Errors
    /// As every call.
    pub async fn snapshot(&self, snapshot: &str) -> Result<SnapshotRecord, ClientError> {
        self.call(Method::GET, &format!("/v1/snapshots/{}", escape(snapshot))).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// As every call.
    pub async fn remove_snapshot(&self, snapshot: &str) -> Result<SnapshotRecord, ClientError> {
        self.call(Method::DELETE, &format!("/v1/snapshots/{}", escape(snapshot))).await
    }
}
