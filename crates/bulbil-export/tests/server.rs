//! The server's life: its socket file, its limits, shutdown and replaced devices.

#![allow(clippy::unwrap_used, reason = "in tests a failed unwrap is a failed test")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulbil_export::nbd::{Export, Limits, NbdServer, ServeError};
use support::*;

const MIB: u64 = 1 << 20;

fn export(name: &str) -> Export {
    Export { name: name.to_owned(), description: String::new(), device: Arc::new(MemoryDisk::new(MIB)) }
}

#[test]
fn the_socket_file_is_private_and_goes_with_the_server() {
    let served = Served::new(Arc::new(MemoryDisk::new(MIB)));
    let mode = std::fs::metadata(&served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    served.server.shutdown();
    assert!(!served.socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a closed listener leaves its file");
    let server = NbdServer::bind(&path).unwrap();
    assert!(matches!(NbdServer::bind(&path), Err(ServeError::InUse { .. })));
    drop(server);
    assert!(!path.exists());
    std::fs::File::create(&path).unwrap();
    assert!(matches!(NbdServer::bind(&path), Err(ServeError::NotASocket { .. })));
    assert!(path.exists());
}

#[test]
fn a_socket_file_that_is_no_longer_ours_is_left_alone() {
    let served = Served::new(Arc::new(MemoryDisk::new(MIB)));
    std::fs::remove_file(&served.socket).unwrap();
    let _other = UnixListener::bind(&served.socket).unwrap();
    served.server.shutdown();
    assert!(served.socket.exists());
}

#[test]
fn a_path_over_the_limit_is_named() {
    let path = PathBuf::from(format!("/tmp/{}", "x".repeat(103)));
    let error = NbdServer::bind(&path).unwrap_err().to_string();
    assert_eq!(error, format!("socket path `{}` has 108 bytes, the limit is 107", path.display()));
    let dir = tempfile::tempdir().unwrap();
    let longest = dir.path().join("y".repeat(107 - 1 - dir.path().as_os_str().len()));
    assert!(NbdServer::bind(longest).is_ok());
}

#[test]
fn exports_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let server = NbdServer::bind(dir.path().join("s")).unwrap().export(export("a")).unwrap();
    assert!(matches!(server.export(export("a")), Err(ServeError::DuplicateExport { .. })));
    let server = NbdServer::bind(dir.path().join("s")).unwrap();
    assert!(matches!(server.export(export(&"n".repeat(4097))), Err(ServeError::TextTooLong { what: "name", .. })));
}

#[test]
fn a_listener_of_the_caller_is_served_and_its_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = NbdServer::from_listener(listener).export(export("disk")).unwrap().spawn().unwrap();
    let mut client = RawClient::connect(&path);
    assert_eq!(client.enter().0, MIB);
    server.shutdown();
    assert!(client.is_closed());
    assert!(path.exists());
}

#[test]
fn connections_over_the_limit_are_closed() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let served = Served::with_limits(Arc::new(MemoryDisk::new(MIB)), limits);
    let mut clients = [served.client(), served.client()];
    for client in &mut clients {
        client.enter();
    }
    assert!(served.client().is_closed());
    assert_eq!(served.server.connections(), 2);
    drop(clients);
    served.wait_until_empty();
    served.client().enter();
}

#[test]
fn shutdown_answers_what_was_received() {
    let disk = Arc::new(MemoryDisk::new(MIB).patterned());
    let served = Served::new(disk.clone());
    disk.slow_from.store(0, Ordering::Relaxed);
    disk.read_gate.close();
    let mut client = served.client();
    client.enter_structured();
    client.ask(READ, 0, 0, 4096);
    disk.read_gate.wait_for(1);
    client.ask(FLUSH, 0, 0, 0);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| served.server.shutdown());
        wait_until("the socket file to go", || !served.socket.exists());
        assert!(!stopping.is_finished());
        disk.read_gate.open();
        let mut answers = [client.answer(0), client.answer(0)];
        answers.sort_by_key(|answer| answer.cookie);
        assert_eq!(answers[0].data[8..], pattern(0, 4096));
        assert_eq!(answers[1].errno, 0);
        assert!(client.is_closed());
        stopping.join().unwrap();
    });
    assert_eq!(served.server.connections(), 0);
}

#[test]
fn shutdown_does_not_wait_for_ever() {
    let disk = Arc::new(MemoryDisk::new(MIB));
    let limits = Limits { grace: Duration::from_millis(50), ..Limits::default() };
    let served = Served::with_limits(disk.clone(), limits);
    disk.flush_gate.close();
    let mut client = served.client();
    client.enter();
    client.ask(FLUSH, 0, 0, 0);
    disk.flush_gate.wait_for(1);
    let mut stuck = served.client();
    stuck.enter();
    for _ in 0..64 {
        stuck.ask(READ, 0, 0, 256 << 10);
    }
    served.server.shutdown();
    assert!(client.is_closed());
    assert_eq!(served.server.connections(), 1, "the one whose device hangs");
    disk.flush_gate.open();
    served.wait_until_empty();
}

#[test]
fn a_replaced_device_is_what_clients_find_when_they_come_back() {
    let served = Served::new(Arc::new(MemoryDisk::new(MIB)));
    let mut client = served.client();
    assert_eq!(client.enter().0, MIB);
    assert!(matches!(
        served.server.replace_device("other", Arc::new(MemoryDisk::new(MIB))),
        Err(ServeError::UnknownExport { .. })
    ));
    served.server.replace_device("disk", Arc::new(MemoryDisk::new(2 * MIB))).unwrap();
    assert!(client.is_closed());
    assert_eq!(served.client().enter().0, 2 * MIB);
}
