//! The way of every request: counts it, and keeps what the service answered to it.
//!
//! object_store tells errors as texts; what to do about one depends on the status and on the code in its
//! body, so both are noted here, for the attempt that runs in this task ([`watched`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    ReqwestConnector,
};

/// An answer that tells of an error is short; what is longer is not one of S3's.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// How often what has happened since the objects were opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) hedges: AtomicU64,
    pub(super) hedges_won: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// How the last request of an attempt went, if it went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// The service answered with this status, and S3's code and message where it gave them.
    Status { status: u16, code: String, message: String },
    /// No answer came.
    Broken { timeout: bool, text: String },
    /// Whoever gives out credentials refused or did not answer.
    NoCredentials { text: String, is_refused: bool },
}

type Note = Arc<Mutex<Option<Seen>>>;

tokio::task_local! {
    static NOTE: Note;
}

/// Runs an attempt; tells beside its outcome how its last request went wrong.
pub(super) async fn watched<T>(attempt: impl Future<Output = T>) -> (T, Option<Seen>) {
    let note = Note::default();
    let outcome = NOTE.scope(Arc::clone(&note), attempt).await;
    let seen = note.lock().expect("no panic while held").take();
    (outcome, seen)
}

fn note(seen: Option<Seen>) {
    // Outside an attempt nobody asks.
    let _ = NOTE.try_with(|note| *note.lock().expect("no panic while held") = seen);
}

/// Makes the clients of object_store: one for the service, others for credentials.
#[derive(Debug)]
pub(super) struct WatchedConnector {
    pub(super) counters: Arc<Counters>,
    /// Host and port of the service: what goes elsewhere is about credentials.
    pub(super) authority: String,
}

impl HttpConnector for WatchedConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        let (counters, authority) = (Arc::clone(&self.counters), self.authority.clone());
        Ok(HttpClient::new(WatchedService { client, counters, authority }))
    }
}

#[derive(Debug)]
struct WatchedService {
    client: HttpClient,
    counters: Arc<Counters>,
    authority: String,
}

#[async_trait::async_trait]
impl HttpService for WatchedService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let ours = request.uri().authority().is_some_and(|authority| authority.as_str() == self.authority);
        if !ours {
            return self.ask_for_credentials(request).await;
        }
        count(&self.counters.requests, 1);
        count(&self.counters.sent_bytes, request.body().content_length() as u64);
        note(None);
        let response = match self.client.execute(request).await {
            Ok(response) => response,
            Err(error) => {
                note(Some(broken(&error)));
                return Err(error);
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let text = error_text(body).await;
        note(Some(Seen::Status {
            status: parts.status.as_u16(),
            code: element(&text, "Code"),
            message: element(&text, "Message"),
        }));
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(text)))
    }
}

impl WatchedService {
    async fn ask_for_credentials(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let host = request.uri().host().unwrap_or_default().to_owned();
        let answer = self.client.execute(request).await;
        let (status, what) = match &answer {
            Ok(response) if response.status().is_success() => return answer,
            Ok(response) => (response.status().as_u16(), format!("HTTP {}", response.status().as_u16())),
            Err(error) => (0, chain(error)),
        };
        let is_refused = matches!(status, 400 | 401 | 403 | 404);
        note(Some(Seen::NoCredentials { text: format!("{host} gave no credentials: {what}"), is_refused }));
        answer
    }
}

/// What the service says of an error. One that cannot be read is an error without words.
async fn error_text(body: HttpResponseBody) -> String {
    match body.bytes().await {
        Ok(bytes) if bytes.len() <= MAX_ERROR_BYTES => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    }
}

/// The text of the first element of this name. Only the code and the message are ever taken: other
/// parts of an answer may repeat what was sent, a session token among it.
fn element(xml: &str, name: &str) -> String {
    let text = xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once("</"));
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(200).collect();
    text.map(|(text, _)| clean(text)).unwrap_or_default()
}

pub(super) fn broken(error: &HttpError) -> Seen {
    Seen::Broken { timeout: error.kind() == HttpErrorKind::Timeout, text: chain(error) }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many layers repeat what the one below says.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_answer_only_code_and_message_are_kept() {
        let xml = "<?xml?><Error><Code>SignatureDoesNotMatch</Code><Message>It\ndoes not</Message>\
                   <CanonicalRequest>x-amz-security-token:hunter2</CanonicalRequest></Error>";
        assert_eq!(element(xml, "Code"), "SignatureDoesNotMatch");
        assert_eq!(element(xml, "Message"), "Itdoes not");
        assert_eq!(element("<Code>open", "Code"), "");
    }
}
