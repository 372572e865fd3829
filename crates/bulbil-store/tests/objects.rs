//! Objects in a directory and behind a real S3 server: the same contract, and what networks do.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic and makes small numbers")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_store::{DirObjects, Objects, RemoteObjects, RemoteOptions, StoreErrorKind, StoreLocation, open_objects};
use bulbil_testkit::{Fault, HttpFaultProxy, HttpFaultRates, ProxyOptions, Rng, S3Server, objects_conformance};

fn remote(location: &StoreLocation, options: &RemoteOptions) -> RemoteObjects {
    let StoreLocation::S3(location) = location else { panic!("{location} is not in S3") };
    RemoteObjects::open(location, options).unwrap()
}

/// A server, a proxy before it, and objects through the proxy.
struct Way {
    objects: RemoteObjects,
    proxy: HttpFaultProxy,
    server: S3Server,
}

fn way(options: &RemoteOptions, proxy: ProxyOptions) -> Way {
    let server = S3Server::start();
    let proxy = HttpFaultProxy::start(server.address(), proxy);
    let objects = remote(&S3Server::location_at(&proxy.endpoint(), "p"), options);
    Way { objects, proxy, server }
}

/// Short limits, so that a test of them is short.
fn hasty() -> RemoteOptions {
    RemoteOptions {
        attempt_timeout: Duration::from_millis(300),
        deadline: Duration::from_millis(800),
        hedge_after: None,
        ..S3Server::options()
    }
}

#[test]
fn objects_in_a_directory_keep_the_contract() {
    let directory = tempfile::tempdir().unwrap();
    objects_conformance(&DirObjects::open(directory.path()).unwrap());
}

#[test]
fn objects_behind_an_s3_server_keep_the_contract() {
    // Small pages, so that every list takes several.
    let server = S3Server::start_with_pages_of(4);
    let objects = remote(&server.location("a/prefix"), &S3Server::options());
    objects.check_conditional_put().unwrap();
    objects_conformance(&objects);
    objects_conformance(&remote(&server.location(""), &S3Server::options()));
    assert!(objects.list("list-not").unwrap().len() == 1, "stores under prefixes are apart");
}

#[test]
fn objects_behind_a_bad_network_keep_the_contract() {
    let faults = HttpFaultRates::all(7, 15).and(Fault::Silent, 5);
    let options = RemoteOptions { attempt_timeout: Duration::from_millis(500), ..S3Server::options() };
    let Way { objects, proxy, server: _server } = way(&options, ProxyOptions { faults, ..ProxyOptions::default() });
    objects_conformance(&objects);
    assert!(proxy.faults() > 20, "{} faults", proxy.faults());
    assert!(objects.stats().retries > 10, "{:?}", objects.stats());
}

#[test]
fn each_fault_alone_is_survived_by_each_operation() {
    let options =
        RemoteOptions { attempt_timeout: Duration::from_millis(250), hedge_after: None, ..S3Server::options() };
    let Way { objects, proxy, server } = way(&options, ProxyOptions::default());
    let direct = remote(&server.location("p"), &options);
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::CutBefore,
        Fault::CutAfter,
        Fault::Truncate,
        Fault::Duplicate,
        Fault::Silent,
        Fault::Slow(Duration::from_millis(50)),
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        let bytes = Rng::new(number as u64).bytes(200_000);
        let name = format!("f/{number}");
        proxy.inject("PUT", fault, 2);
        assert!(objects.put_if_absent(&name, &bytes).unwrap(), "{fault:?}: an answer that is lost is not a refusal");
        proxy.inject("PUT", fault, 1);
        assert!(!objects.put_if_absent(&name, b"other").unwrap(), "{fault:?}");
        proxy.inject("GET", fault, 2);
        assert!(objects.get(&name, 1 << 20).unwrap() == bytes, "{fault:?}");
        proxy.inject("GET", fault, 2);
        assert!(objects.get_range(&name, 100, 100_000).unwrap() == bytes[100..100_100], "{fault:?}");
        proxy.inject("GET", fault, 2);
        assert_eq!(objects.list("f").unwrap(), [(name.clone(), 200_000)], "{fault:?}");
        proxy.inject("PUT", fault, 2);
        objects.put(&name, b"new").unwrap();
        assert_eq!(direct.get(&name, 9).unwrap(), b"new", "{fault:?}");
        proxy.inject("DELETE", fault, 2);
        objects.delete(&name).unwrap();
        assert_eq!(direct.list("f").unwrap(), [], "{fault:?}");
    }
}

#[test]
fn bytes_that_change_on_the_way_to_the_service_are_sent_again() {
    let Way { objects, proxy, server } = way(&S3Server::options(), ProxyOptions::default());
    let bytes = Rng::new(3).bytes(100_000);
    proxy.inject("PUT", Fault::Corrupt(54_321), 2);
    assert!(objects.put_if_absent("x", &bytes).unwrap());
    assert!(std::fs::read(server.objects().join("p/x")).unwrap() == bytes);
    assert_eq!(objects.stats().retries, 2);
}

#[test]
fn an_object_that_is_read_back_damaged_is_not_taken_for_anothers() {
    let Way { objects, proxy, server: _server } = way(&S3Server::options(), ProxyOptions::default());
    let bytes = Rng::new(4).bytes(1000);
    assert!(objects.put_if_absent("x", &bytes).unwrap());
    for at in [3, 700] {
        proxy.inject("GET", Fault::Corrupt(at), 1);
        assert!(objects.put_if_absent("x", &bytes).unwrap(), "it is there with these bytes");
    }
    let other = Rng::new(5).bytes(1000);
    proxy.inject("GET", Fault::Corrupt(3), 1);
    assert!(!objects.put_if_absent("x", &other).unwrap());
    proxy.inject("GET", Fault::Truncate, 1);
    assert!(!objects.put_if_absent("x", &other).unwrap());
}

#[test]
fn a_service_that_does_not_answer_is_a_timeout_within_the_deadline() {
    let Way { objects, proxy, server: _server } = way(&hasty(), ProxyOptions::default());
    objects.put("x", b"0123456789").unwrap();
    let check = |fault: Fault, operation: &dyn Fn() -> bulbil_store::StoreError| {
        proxy.inject("", fault, 1000);
        let started = Instant::now();
        let error = operation();
        let took = started.elapsed();
        assert_eq!(error.kind(), StoreErrorKind::Timeout, "{fault:?}: {error}");
        assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(5), "{fault:?}: {took:?}");
    };
    check(Fault::Silent, &|| objects.get_range("x", 1, 2).unwrap_err());
    check(Fault::Silent, &|| objects.get("x", 10).unwrap_err());
    check(Fault::Silent, &|| objects.put_if_absent("y", b"y").unwrap_err());
    check(Fault::Silent, &|| objects.put("y", b"y").unwrap_err());
    check(Fault::Silent, &|| objects.list("d").unwrap_err());
    check(Fault::Silent, &|| objects.delete("x").unwrap_err());
    check(Fault::Status(503), &|| objects.get_range("x", 1, 2).unwrap_err());
    check(Fault::CutBefore, &|| objects.put_if_absent("y", b"y").unwrap_err());
}

#[test]
fn a_host_that_is_not_there_is_a_timeout_that_says_so() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for scheme in ["http", "https"] {
        let objects = remote(&S3Server::location_at(&format!("{scheme}://{closed}"), "p"), &hasty());
        let error = objects.get("x", 1).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Timeout);
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("refused"), "{cause}");
    }
}

#[test]
fn wrong_credentials_and_missing_buckets_are_told_apart_from_missing_objects() {
    let server = S3Server::start();
    let mut options = S3Server::options();
    options.environment.insert("AWS_SECRET_ACCESS_KEY".into(), "wrong-hunter2".into());
    let objects = remote(&server.location("p"), &options);
    for error in [
        objects.get("x", 1).unwrap_err(),
        objects.put_if_absent("x", b"x").unwrap_err(),
        objects.list("x").unwrap_err(),
        objects.delete("x").unwrap_err(),
    ] {
        assert_eq!(error.kind(), StoreErrorKind::Denied);
        let text = format!("{error:?} {objects:?} {options:?}");
        assert!(text.contains("AWS_SECRET_ACCESS_KEY") && !text.contains("hunter2"), "{text}");
    }
    assert_eq!(objects.stats().retries, 0, "a refusal is not asked for again");

    let elsewhere: StoreLocation =
        server.location("p").to_string().replace("bulbil-test", "no-bucket").parse().unwrap();
    let objects = remote(&elsewhere, &S3Server::options());
    assert_eq!(objects.get("x", 1).unwrap_err().kind(), StoreErrorKind::Io, "nothing is known about the object");
    assert_eq!(objects.list("x").unwrap_err().kind(), StoreErrorKind::Io, "a missing bucket is not empty");
    assert_eq!(objects.put_if_absent("x", b"x").unwrap_err().kind(), StoreErrorKind::Io);
}

#[test]
fn requests_without_a_signature_are_anonymous() {
    let server = S3Server::start();
    let location: StoreLocation = format!("{}&anonymous=true", server.location("p")).parse().unwrap();
    let objects = open_objects(&location, &RemoteOptions::with_environment([])).unwrap();
    assert_eq!(objects.get("x", 1).unwrap_err().kind(), StoreErrorKind::Denied, "this server wants signatures");
}

#[test]
fn late_answers_are_asked_for_twice_within_the_budget() {
    let options = RemoteOptions { hedge_after: Some(Duration::from_millis(100)), ..S3Server::options() };
    let Way { objects, proxy, server: _server } = way(&options, ProxyOptions::default());
    objects.put("x", &[7; 1000]).unwrap();
    for _ in 0..200 {
        objects.get_range("x", 0, 1000).unwrap();
    }
    let before = objects.stats();
    assert!(before.hedges <= 2, "hardly anything was late: {before:?}");
    // Without a second request each of these would wait until its attempt times out.
    for _ in 0..5 {
        proxy.inject("GET", Fault::Silent, 1);
        assert_eq!(objects.get_range("x", 0, 1000).unwrap(), [7; 1000]);
    }
    let stats = objects.stats();
    assert!(stats.hedges_won >= before.hedges_won + 5 && stats.retries == 0, "{before:?}, then {stats:?}");
    // When everything is late, more requests do not help.
    proxy.set(ProxyOptions { latency: Duration::from_millis(120), ..ProxyOptions::default() });
    for _ in 0..20 {
        objects.get_range("x", 0, 1000).unwrap();
    }
    let reads = 200 + 5 + 20;
    assert!(objects.stats().hedges <= 1 + reads / 20, "{:?}", objects.stats());
}

#[test]
fn many_threads_share_connections_and_wait_for_nobody() {
    let latency = Duration::from_millis(20);
    let Way { objects, proxy, server: _server } = way(
        &RemoteOptions { hedge_after: None, ..S3Server::options() },
        ProxyOptions { latency, ..ProxyOptions::default() },
    );
    objects.put("x", &[7; 128 << 10]).unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                for _ in 0..10 {
                    objects.get_range("x", 0, 128 << 10).unwrap();
                }
            });
        }
    });
    // One after the other these would take 6.4 s of latency alone.
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert_eq!(proxy.passed_with("GET").requests, 320);
    assert_eq!(proxy.passed_with("GET").response_bytes, 320 * (128 << 10));
    assert_eq!(objects.stats().received_bytes, 320 * (128 << 10));
}

#[test]
fn requests_beyond_the_limit_wait() {
    let latency = Duration::from_millis(40);
    let options = RemoteOptions { in_flight: 2, hedge_after: None, ..S3Server::options() };
    let Way { objects, .. } = &way(&options, ProxyOptions { latency, ..ProxyOptions::default() });
    objects.put("x", b"x").unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| objects.get_range("x", 0, 1).unwrap());
        }
    });
    assert!(started.elapsed() >= 4 * latency, "two at a time: {:?}", started.elapsed());
}

#[test]
fn calls_and_drops_on_threads_of_another_runtime_are_fine() {
    let server = S3Server::start();
    let objects: Arc<dyn Objects> = open_objects(&server.location("p"), &S3Server::options()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let blocking = Arc::clone(&objects);
        tokio::task::spawn_blocking(move || blocking.put("x", b"x").unwrap()).await.unwrap();
        // Wrong of the caller, since it blocks the thread, but no panic.
        assert_eq!(objects.get("x", 1).unwrap(), b"x");
        drop(objects);
    });
}

#[test]
fn credentials_of_a_profile_are_used() {
    let server = S3Server::start();
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join(".aws")).unwrap();
    let text = format!(
        "[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n\
         [test]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        S3Server::KEY_ID,
        S3Server::SECRET
    );
    std::fs::File::create(home.path().join(".aws/credentials"))
        .and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes()))
        .unwrap();
    let variables = |profile: &str| {
        let home = home.path().to_str().unwrap().to_owned();
        RemoteOptions::with_environment([("HOME".to_owned(), home), ("AWS_PROFILE".to_owned(), profile.to_owned())])
    };
    remote(&server.location("p"), &variables("test")).put("x", b"x").unwrap();
    let error = remote(&server.location("p"), &variables("default")).get("x", 1).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Denied);
}

#[test]
fn a_container_that_gives_no_credentials_is_no_missing_object() {
    let server = S3Server::start();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let token = tempfile::NamedTempFile::new().unwrap();
    let variables = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{closed}/credentials")),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token.path().to_str().unwrap().to_owned()),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value)).into();
    let error = remote(&server.location("p"), &RemoteOptions { environment, ..hasty() }).get("x", 1).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Denied, "{error:?}");
    assert!(format!("{error:?}").contains("AWS_SECRET_ACCESS_KEY"), "{error:?}");
}
