//! The QMP client against a peer that behaves as each test needs.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use bulbil_vm::{Qmp, QmpError, QmpEventKind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn answer(&mut self, request: &Value, field: &str, value: Value) {
        self.say(&json!({ field: value, "id": request["id"] }).to_string()).await;
    }
}

/// A client in command mode and its peer.
async fn pair() -> (Qmp, tokio::sync::broadcast::Receiver<bulbil_vm::QmpEvent>, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(BufReader::new(theirs));
    let serve = async {
        peer.say(GREETING).await;
        let request = peer.hear().await;
        assert_eq!(request["execute"], "qmp_capabilities");
        peer.answer(&request, "return", json!({})).await;
    };
    let (client, ()) = tokio::join!(Qmp::over(ours), serve);
    let (qmp, events) = client.unwrap();
    (qmp, events, peer)
}

#[tokio::test]
async fn answers_go_to_who_asked_whatever_their_order() {
    let (qmp, _events, mut peer) = pair().await;
    let serve = async {
        let (first, second) = (peer.hear().await, peer.hear().await);
        peer.answer(&second, "return", json!(second["execute"])).await;
        peer.answer(&first, "return", json!(first["execute"])).await;
    };
    let (a, b, ()) = tokio::join!(qmp.execute("a", Value::Null), qmp.execute("b", json!({"x": 1})), serve);
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn refusals_have_class_and_text() {
    let (qmp, _events, mut peer) = pair().await;
    let serve = async {
        let request = peer.hear().await;
        peer.answer(&request, "error", json!({"class": "CommandNotFound", "desc": "no such command"})).await;
    };
    let (result, ()) = tokio::join!(qmp.execute("fly", Value::Null), serve);
    let error = result.unwrap_err();
    assert!(matches!(&error, QmpError::Refused { class, .. } if class == "CommandNotFound"), "{error:?}");
    assert_eq!(error.to_string(), "QEMU refused `fly`: no such command (CommandNotFound)");
}

#[tokio::test]
async fn events_come_between_answers() {
    let (qmp, mut events, mut peer) = pair().await;
    let serve = async {
        let request = peer.hear().await;
        peer.say(r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}, "timestamp": {}}"#)
            .await;
        peer.say(r#"{"event": "BLOCK_IO_ERROR", "data": {"node-name": "disk0", "operation": "write", "action": "report", "reason": "Input/output error"}}"#).await;
        peer.say(r#"{"event": "NEWS"}"#).await;
        peer.answer(&request, "return", json!({"running": true, "status": "running"})).await;
    };
    let (status, ()) = tokio::join!(qmp.query_status(), serve);
    assert_eq!(status.unwrap().status, "running");
    let shutdown = QmpEventKind::Shutdown { guest: true, reason: "guest-shutdown".into() };
    assert_eq!(events.recv().await.unwrap().kind, shutdown);
    let error = QmpEventKind::BlockIoError {
        node: "disk0".into(),
        operation: "write".into(),
        action: "report".into(),
        reason: "Input/output error".into(),
    };
    assert_eq!(events.recv().await.unwrap().kind, error);
    let news = events.recv().await.unwrap();
    assert_eq!((news.name.as_str(), news.kind), ("NEWS", QmpEventKind::Other));
}

#[tokio::test]
async fn silence_is_a_timeout_and_the_late_answer_disturbs_nobody() {
    let (qmp, _events, mut peer) = pair().await;
    let error = qmp.execute_within("sleep", Value::Null, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error:?}");
    let serve = async {
        let (late, next) = (peer.hear().await, peer.hear().await);
        peer.answer(&late, "return", json!("late")).await;
        peer.answer(&next, "return", json!("next")).await;
    };
    let (next, ()) = tokio::join!(qmp.execute("next", Value::Null), serve);
    assert_eq!(next.unwrap(), json!("next"));
}

#[tokio::test]
async fn a_lost_connection_fails_open_and_later_requests() {
    let (qmp, _events, peer) = pair().await;
    assert!(qmp.is_connected());
    let lose = async move {
        let mut peer = peer;
        peer.hear().await;
    };
    let (open, ()) = tokio::join!(qmp.execute("a", Value::Null), lose);
    assert!(matches!(open.unwrap_err(), QmpError::Disconnected { .. }));
    qmp.closed().await;
    assert!(!qmp.is_connected());
    assert!(matches!(qmp.stop().await.unwrap_err(), QmpError::Disconnected { .. }));
    qmp.quit().await.unwrap();
}

#[tokio::test]
async fn nonsense_ends_the_connection() {
    let (qmp, _events, mut peer) = pair().await;
    peer.say("this is not json").await;
    qmp.closed().await;
}

#[tokio::test]
async fn dropping_the_client_closes_the_connection() {
    let (qmp, events, mut peer) = pair().await;
    drop((qmp, events));
    let mut line = String::new();
    assert_eq!(peer.0.read_line(&mut line).await.unwrap(), 0);
}

#[tokio::test]
async fn connecting_waits_for_the_socket_and_no_longer_than_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let error = Qmp::connect(&path, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error:?}");
    let late = path.clone();
    let server = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let listener = UnixListener::bind(late).unwrap();
        let mut peer = Peer(BufReader::new(listener.accept().await.unwrap().0));
        peer.say(GREETING).await;
        let request = peer.hear().await;
        peer.answer(&request, "return", json!({})).await;
        peer
    });
    Qmp::connect(&path, Duration::from_secs(20)).await.unwrap();
    server.await.unwrap();
}

#[tokio::test]
async fn a_listener_that_never_greets_is_a_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let error = Qmp::connect(&path, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error:?}");
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
    assert!(matches!(Qmp::over(ours).await.unwrap_err(), QmpError::Protocol(_)));
}
