//! The server: routes, and nothing that decides.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bulbil_control::{
    AddedDataKey, Control, ControlError, CopyFromRequest, CopyToRequest, ErrorCode, ExportRequest, GcRequest,
    ImageRecord, ImportRequest, InstanceState, InstanceView, LaunchRequest, OfferedImages, OtherStore,
    RotateKeyRequest, ScrubRequest, StoreKeySlot, StoreStats,
};
use futures_util::stream;
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc};

use crate::event::{ErrorBody, Event, Health, Wait};
use crate::volumes;

/// User data as a JSON array of numbers takes four bytes for each; the largest is 1 MiB.
const MAX_BODY_BYTES: usize = 8 << 20;

/// Events that wait for a slow client.
const EVENTS_AHEAD: usize = 64;

/// How long a guest may take to power off when the client does not say.
const DEFAULT_GRACE: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) control: Arc<Control>,
    shutdown: Arc<Notify>,
}

/// Serves the API until a client asks to shut down or `stop` is notified.
///
/// # Errors
/// When the socket fails.
pub async fn serve(listener: UnixListener, control: Arc<Control>, stop: Arc<Notify>) -> std::io::Result<()> {
    let api = Api { control, shutdown: Arc::clone(&stop) };
    let router = Router::new()
        .route("/v1/health", get(health))
        .route("/v1/images", get(list_images).post(import_image))
        .route("/v1/images/{image}", get(show_image).delete(remove_image))
        .route("/v1/images/{image}/export", post(export_image))
        .route("/v1/images/{image}/copy", post(copy_image_to))
        .route("/v1/images/{image}/warm", post(warm_image))
        .route("/v1/image-copies", post(copy_image_from))
        .route("/v1/offered-images", post(offered_images))
        .route("/v1/instances", get(list_instances).post(launch))
        .route("/v1/launch-checks", post(check_launch))
        .route("/v1/instances/{instance}", get(show_instance).delete(remove_instance))
        .route("/v1/instances/{instance}/start", post(start_instance))
        .route("/v1/instances/{instance}/stop", post(stop_instance))
        .route("/v1/store", get(store_stats))
        .route("/v1/store/gc", post(collect_garbage))
        .route("/v1/store/keys", get(store_keys))
        .route("/v1/store/keys/rotate", post(rotate_store_key))
        .route("/v1/store/data-keys", post(add_data_key))
        .route("/v1/store/scrub", post(scrub))
        .route("/v1/shutdown", post(shutdown))
        .merge(volumes::routes())
        .fallback(|| async { Failure(ControlError::new(ErrorCode::NotFound, "there is no such path in the API")) })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(api);
    axum::serve(listener, router).with_graceful_shutdown(async move { stop.notified().await }).await
}

/// An error on its way out.
pub(crate) struct Failure(ControlError);

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.code() {
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::InUse | ErrorCode::OtherStore => StatusCode::CONFLICT,
            ErrorCode::Invalid => StatusCode::BAD_REQUEST,
            ErrorCode::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            ErrorCode::MissingProgram | ErrorCode::StoreKey => StatusCode::FAILED_DEPENDENCY,
            ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
            ErrorCode::Cancelled | ErrorCode::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::error!(error = %self.0, causes = ?self.0.causes(), "request failed");
        }
        (status, Json(ErrorBody { error: self.0 })).into_response()
    }
}

/// Does work that must not stop halfway when the client goes away.
pub(crate) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ControlError>> + Send + 'static,
) -> Result<T, ControlError> {
    let broken = |e| ControlError::with_source(ErrorCode::Failed, "the request broke off", &e);
    tokio::spawn(work).await.map_err(broken)?
}

pub(crate) type Answer<T> = Result<Json<T>, Failure>;

async fn health() -> Json<Health> {
    Json(Health { version: env!("CARGO_PKG_VERSION").to_owned(), pid: std::process::id() })
}

async fn list_images(State(api): State<Api>) -> Answer<Vec<ImageRecord>> {
    Ok(Json(api.control.images().await?))
}

async fn show_image(State(api): State<Api>, Path(image): Path<String>) -> Answer<ImageRecord> {
    Ok(Json(api.control.image(&image).await?))
}

async fn remove_image(State(api): State<Api>, Path(image): Path<String>) -> Answer<ImageRecord> {
    Ok(Json(to_its_end(async move { api.control.remove_image(&image).await }).await?))
}

async fn import_image(State(api): State<Api>, Json(request): Json<ImportRequest>) -> Response {
    stream_work(Event::Progress, move |progress| async move {
        let (image, existed) = api.control.import_image(request, progress).await?;
        Ok(Event::Image { image: Box::new(image), existed })
    })
}

async fn export_image(
    State(api): State<Api>,
    Path(image): Path<String>,
    Json(request): Json<ExportRequest>,
) -> Response {
    stream_work(Event::ExportProgress, move |progress| async move {
        let file = api.control.export_image(&image, request, progress).await?;
        Ok(Event::File { file: Box::new(file) })
    })
}

async fn copy_image_to(
    State(api): State<Api>,
    Path(image): Path<String>,
    Json(request): Json<CopyToRequest>,
) -> Response {
    stream_work(Event::Progress, move |progress| async move {
        let copied = api.control.copy_image_to(&image, request, progress).await?;
        Ok(Event::Copied { copied: Box::new(copied) })
    })
}

async fn copy_image_from(State(api): State<Api>, Json(request): Json<CopyFromRequest>) -> Response {
    stream_work(Event::Progress, move |progress| async move {
        let (image, existed) = api.control.copy_image_from(request, progress).await?;
        Ok(Event::Image { image: Box::new(image), existed })
    })
}

async fn offered_images(State(api): State<Api>, Json(store): Json<OtherStore>) -> Answer<OfferedImages> {
    Ok(Json(api.control.offered_images(store).await?))
}

/// Tells the steps of long work and what came of it. When the client is gone, nobody receives the steps any more, and
/// that ends the work.
fn stream_work<Step: Send + 'static, Work: Future<Output = Result<Event, ControlError>> + Send + 'static>(
    event_of: fn(Step) -> Event,
    work: impl FnOnce(mpsc::Sender<Step>) -> Work + Send + 'static,
) -> Response {
    let (events, stream) = mpsc::channel(EVENTS_AHEAD);
    tokio::spawn(async move {
        let (progress_sender, mut progress) = mpsc::channel(EVENTS_AHEAD);
        let listening = events.clone();
        let forward = tokio::spawn(async move {
            // Work that makes no step must hear of it, too.
            while let Some(step) = tokio::select! {
                step = progress.recv() => step,
                () = listening.closed() => None,
            } {
                if listening.send(event_of(step)).await.is_err() {
                    return;
                }
            }
        });
        let done = work(progress_sender).await;
        drop(forward.await);
        let last = match done {
            Ok(event) => vec![event, Event::Done],
            Err(error) => vec![Event::Error { error }],
        };
        for event in last {
            drop(events.send(event).await);
        }
    });
    stream_response(stream)
}

#[derive(Deserialize)]
struct WaitQuery {
    #[serde(default)]
    wait: Wait,
}

async fn launch(
    State(api): State<Api>,
    Query(query): Query<WaitQuery>,
    Json(request): Json<LaunchRequest>,
) -> Result<Response, Failure> {
    let dry_run = request.dry_run;
    let control = Arc::clone(&api.control);
    let instances = to_its_end(async move { control.launch(request).await }).await?;
    let wait = if dry_run { Wait::None } else { query.wait };
    Ok(follow(api.control, instances, wait))
}

async fn check_launch(State(api): State<Api>, Json(request): Json<LaunchRequest>) -> Answer<()> {
    Ok(Json(api.control.check_launch(&request).await?))
}

async fn start_instance(
    State(api): State<Api>,
    Path(instance): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Result<Response, Failure> {
    let control = Arc::clone(&api.control);
    let instance = to_its_end(async move { control.start(&instance).await }).await?;
    Ok(follow(api.control, vec![instance], query.wait))
}

/// Tells every change of the instances until they are as far as is waited for.
fn follow(control: Arc<Control>, instances: Vec<InstanceView>, wait: Wait) -> Response {
    let (events, stream) = mpsc::channel(EVENTS_AHEAD);
    tokio::spawn(async move {
        let following = instances.into_iter().map(|instance| follow_one(&control, instance, wait, &events));
        futures_util::future::join_all(following).await;
        drop(events.send(Event::Done).await);
    });
    stream_response(stream)
}

async fn follow_one(control: &Control, mut instance: InstanceView, wait: Wait, events: &mpsc::Sender<Event>) {
    let mut changes = control.watch(&instance.record.id);
    loop {
        if let Some(changes) = &mut changes {
            let run = changes.borrow_and_update().clone();
            instance = instance.with_run(run);
        }
        let told = events.send(Event::Instance { instance: Box::new(instance.clone()) }).await;
        if told.is_err() || is_far_enough(&instance, wait) {
            return;
        }
        let Some(changes) = &mut changes else { return };
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn is_far_enough(instance: &InstanceView, wait: Wait) -> bool {
    let stopped = instance.run.state == InstanceState::Stopped;
    stopped
        || match wait {
            Wait::None => true,
            Wait::Running => instance.run.state == InstanceState::Running,
            Wait::Ready => instance.run.boot.is_some(),
        }
}

fn stream_response(events: mpsc::Receiver<Event>) -> Response {
    let lines = stream::unfold(events, |mut events| async move {
        let event = events.recv().await?;
        let mut line = serde_json::to_vec(&event).expect("events are plain data");
        line.push(b'\n');
        Some((Ok::<_, Infallible>(line), events))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

async fn list_instances(State(api): State<Api>) -> Answer<Vec<InstanceView>> {
    Ok(Json(api.control.instances().await?))
}

async fn show_instance(State(api): State<Api>, Path(instance): Path<String>) -> Answer<InstanceView> {
    Ok(Json(api.control.instance(&instance).await?))
}

#[derive(Deserialize)]
struct StopQuery {
    #[serde(default)]
    force: bool,
    grace_s: Option<u64>,
}

async fn stop_instance(
    State(api): State<Api>,
    Path(instance): Path<String>,
    Query(query): Query<StopQuery>,
) -> Answer<InstanceView> {
    let grace = query.grace_s.map_or(DEFAULT_GRACE, Duration::from_secs);
    Ok(Json(to_its_end(async move { api.control.stop(&instance, grace, query.force).await }).await?))
}

#[derive(Deserialize)]
struct ForceQuery {
    #[serde(default)]
    force: bool,
}

async fn remove_instance(
    State(api): State<Api>,
    Path(instance): Path<String>,
    Query(query): Query<ForceQuery>,
) -> Answer<InstanceView> {
    Ok(Json(to_its_end(async move { api.control.remove_instance(&instance, query.force).await }).await?))
}

async fn store_stats(State(api): State<Api>) -> Answer<StoreStats> {
    Ok(Json(api.control.store_stats().await?))
}

async fn store_keys(State(api): State<Api>) -> Answer<Vec<StoreKeySlot>> {
    Ok(Json(api.control.store_keys().await?))
}

async fn rotate_store_key(State(api): State<Api>, Json(request): Json<RotateKeyRequest>) -> Answer<Vec<StoreKeySlot>> {
    Ok(Json(to_its_end(async move { api.control.rotate_store_key(request).await }).await?))
}

async fn add_data_key(State(api): State<Api>) -> Answer<AddedDataKey> {
    Ok(Json(to_its_end(async move { api.control.add_data_key().await }).await?))
}

async fn collect_garbage(State(api): State<Api>, Json(request): Json<GcRequest>) -> Response {
    stream_work(
        |()| Event::Done,
        move |_steps| async move {
            let report = api.control.collect_garbage(request).await?;
            Ok(Event::Collected { report: Box::new(report) })
        },
    )
}

async fn scrub(State(api): State<Api>, Json(request): Json<ScrubRequest>) -> Response {
    stream_work(Event::ScrubProgress, move |progress| async move {
        let report = api.control.scrub(request, progress).await?;
        Ok(Event::Scrubbed { report: Box::new(report) })
    })
}

async fn warm_image(State(api): State<Api>, Path(image): Path<String>) -> Response {
    stream_work(Event::ExportProgress, move |progress| async move {
        let warmed = api.control.warm_image(&image, progress).await?;
        Ok(Event::Warmed { warmed: Box::new(warmed) })
    })
}

async fn shutdown(State(api): State<Api>) -> Json<Health> {
    api.shutdown.notify_one();
    health().await
}
