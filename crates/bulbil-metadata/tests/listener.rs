//! The listener, spoken to byte by byte.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulbil_metadata::{HopLimitHook, InstanceView, Limits, MetadataService, ServiceOptions, serve_connection};
use bulbil_types::{InstanceId, Personality};
use bytes::Bytes;
use common::{EC2, EC2_TOKEN, Random, full_view};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const TOKEN_REQUEST: &str =
    "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";

fn destination() -> SocketAddr {
    SocketAddr::new(EC2, 80)
}

fn service(limits: Limits) -> Arc<MetadataService> {
    service_of(full_view(Personality::Ec2), limits)
}

fn service_of(view: InstanceView, limits: Limits) -> Arc<MetadataService> {
    Arc::new(MetadataService::with_options(view, ServiceOptions { limits, ..ServiceOptions::default() }))
}

fn connect(service: &Arc<MetadataService>) -> DuplexStream {
    connect_with(service, None)
}

fn connect_with(service: &Arc<MetadataService>, hook: Option<HopLimitHook>) -> DuplexStream {
    let (client, server) = tokio::io::duplex(64 << 10);
    drop(tokio::spawn(serve_connection(server, destination(), Arc::clone(service), hook)));
    client
}

/// Sends one request on a connection of its own and reads until the server closes.
async fn once(service: &Arc<MetadataService>, request: &str) -> String {
    let mut client = connect(service);
    // The server may refuse, answer and close before everything is written.
    client.write_all(request.as_bytes()).await.ok();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.ok();
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
}

fn get_and_close(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
}

/// Reads one answer, leaving the connection open.
async fn read_answer(client: &mut DuplexStream) -> (u16, Vec<u8>) {
    read_answer_after(Vec::new(), client).await
}

/// Reads the rest of an answer of which `head` was read already.
async fn read_answer_after(mut head: Vec<u8>, client: &mut DuplexStream) -> (u16, Vec<u8>) {
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.expect("the server answers"));
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let status = head[9..12].parse().unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    client.read_exact(&mut body).await.unwrap();
    (status, body)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Like `run`, but time passes only when everything waits for it.
fn run_paused<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(future)
}

#[test]
fn a_connection_is_kept_for_several_requests() {
    run(async {
        let service = service(Limits::default());
        let mut client = connect(&service);
        client.write_all(TOKEN_REQUEST.as_bytes()).await.unwrap();
        let (status, token) = read_answer(&mut client).await;
        assert_eq!(status, 200);
        let token = String::from_utf8(token).unwrap();
        let request = format!("GET /latest/meta-data/mac HTTP/1.1\r\nHost: x\r\n{EC2_TOKEN}: {token}\r\n\r\n");
        for _ in 0..3 {
            client.write_all(request.as_bytes()).await.unwrap();
            assert_eq!(read_answer(&mut client).await, (200, b"52:54:00:ab:cd:01".to_vec()));
        }
        assert_eq!(service.counters().answered, 4);
    });
}

#[test]
fn head_tells_the_length_and_sends_no_body() {
    run(async {
        let request = "HEAD /latest/meta-data/mac HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let answer = once(&service(Limits::default()), request).await.to_lowercase();
        assert!(answer.starts_with("http/1.1 200 ok\r\n"), "{answer}");
        assert!(answer.contains("\r\ncontent-length: 17\r\n"), "{answer}");
        assert!(answer.contains("\r\nserver: ec2ws\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    });
}

#[test]
fn binary_user_data_is_not_touched_on_the_way() {
    run(async {
        let data: Vec<u8> = (0..=255).cycle().take(16 << 10).collect();
        let view = InstanceView { user_data: Some(Bytes::from(data.clone())), ..full_view(Personality::Ec2) };
        let mut client = connect(&service_of(view, Limits::default()));
        client.write_all(get("/latest/user-data").as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut client).await, (200, data));
    });
}

#[test]
fn what_is_not_a_request_is_refused_and_the_connection_closed() {
    run_paused(async {
        let service = service(Limits::default());
        let long = "a".repeat(20 << 10);
        let many = "x: y\r\n".repeat(200);
        let body = "b".repeat(2000);
        for (what, request, status) in [
            ("garbage", "hello\r\n\r\n".to_owned(), "400"),
            ("binary", "\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), "400"),
            ("a TLS hello", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\r\n\r\n".to_owned(), "400"),
            ("no version", "GET /\r\n\r\n".to_owned(), "400"),
            ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), ""),
            ("an absolute URL", get_and_close("http://169.254.169.254/latest/meta-data/mac"), "400"),
            ("another host's URL", get_and_close("http://example.com/"), "400"),
            ("CONNECT", "CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
            ("a header without colon", "GET / HTTP/1.1\r\nHost\r\n\r\n".to_owned(), "400"),
            ("a blank before the colon", "GET / HTTP/1.1\r\nHost : x\r\n\r\n".to_owned(), "400"),
            ("a long path", get_and_close(&format!("/{long}")), "431"),
            ("a long header", format!("GET / HTTP/1.1\r\nHost: x\r\nCookie: {long}\r\n\r\n"), "431"),
            ("many headers", format!("GET / HTTP/1.1\r\nHost: x\r\n{many}\r\n"), "431"),
            ("a large body", format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n{body}"), "413"),
            (
                "a large chunked body",
                format!("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n{body}\r\n0\r\n\r\n"),
                "413",
            ),
            ("two lengths", "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab".to_owned(), "400"),
            ("a bad length", "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_owned(), "400"),
        ] {
            let answer = once(&service, &request).await;
            let found = answer.lines().next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
            assert_eq!(found, status, "{what}: {answer}");
            assert!(!answer.contains("52:54:00"), "{what}: {answer}");
        }
        let answer = once(&service, &get_and_close("/latest/meta-data/mac")).await;
        assert!(answer.ends_with("52:54:00:ab:cd:01"), "{answer}");
    });
}

#[test]
fn no_bytes_make_it_panic() {
    run_paused(async {
        let service = service(Limits { burst_requests: u32::MAX, ..Limits::default() });
        let mut random = Random::seeded();
        for _ in 0..3000 {
            let mut bytes = format!("{TOKEN_REQUEST}{}", get("/latest/meta-data/%6dac?x")).into_bytes();
            for _ in 0..=random.below(8) {
                let position = random.below(bytes.len());
                bytes[position] = u8::try_from(random.below(256)).unwrap();
            }
            bytes.truncate(random.below(4 * bytes.len()).max(1));
            let (mut client, server) = tokio::io::duplex(64 << 10);
            let served = tokio::spawn(serve_connection(server, destination(), Arc::clone(&service), None));
            client.write_all(&bytes).await.unwrap();
            client.shutdown().await.unwrap();
            client.read_to_end(&mut Vec::new()).await.ok();
            served.await.unwrap();
        }
        assert!(service.counters().answered > 100, "some requests stay whole");
    });
}

#[test]
fn a_small_body_is_read_over() {
    run(async {
        let mut client = connect(&service(Limits::default()));
        let put = TOKEN_REQUEST.replace("Host: x", "Host: x\r\nContent-Length: 5");
        client.write_all(format!("{put}hello{}", get("/latest/meta-data/mac")).as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut client).await.0, 200);
        assert_eq!(read_answer(&mut client).await, (200, b"52:54:00:ab:cd:01".to_vec()));
    });
}

#[test]
fn a_silent_connection_is_closed_after_the_idle_time() {
    run_paused(async {
        let service = service(Limits::default());
        for sent in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: x\r\n", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"]
        {
            let begun = tokio::time::Instant::now();
            once(&service, sent).await;
            let lasted = begun.elapsed();
            assert!((4..=6).contains(&lasted.as_secs()), "{sent:?} {lasted:?}");
        }
        let begun = tokio::time::Instant::now();
        once(&service, &get("/latest/meta-data/mac")).await;
        assert!((4..=6).contains(&begun.elapsed().as_secs()), "after an answer");
    });
}

#[test]
fn a_head_that_comes_byte_by_byte_is_given_up() {
    run_paused(async {
        let mut client = connect(&service(Limits::default()));
        let begun = tokio::time::Instant::now();
        for byte in get("/").bytes() {
            if client.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_guest_that_does_not_read_its_answers_is_cut_off() {
    run_paused(async {
        let data = vec![b'x'; 16 << 10];
        let view = InstanceView { user_data: Some(Bytes::from(data)), ..full_view(Personality::Ec2) };
        let service = service_of(view, Limits { max_connections: 1, ..Limits::default() });
        let (mut client, server) = tokio::io::duplex(1024);
        let served = tokio::spawn(serve_connection(server, destination(), Arc::clone(&service), None));
        client.write_all(get("/latest/user-data").as_bytes()).await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), served).await.expect("it is cut off").unwrap();
        let answer = once(&service, &get_and_close("/latest/meta-data/mac")).await;
        assert!(answer.contains("200 OK"), "its place is free again");
    });
}

#[test]
fn too_many_connections_are_closed_and_counted() {
    run(async {
        let service = service(Limits { max_connections: 2, ..Limits::default() });
        let (mut first, _second) = (connect(&service), connect(&service));
        first.write_all(get("/").as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut first).await.0, 200);
        assert_eq!(once(&service, &get("/")).await, "");
        assert_eq!(service.counters().refused_connections, 1);
        drop(first);
        while !once(&service, &get_and_close("/")).await.contains("200 OK") {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_flood_is_throttled_and_does_not_touch_another_instance() {
    run(async {
        let limits = Limits { burst_requests: 200, refill_requests_per_s: 50, ..Limits::default() };
        let (a, b) = (service(limits), service(limits));
        let mut client = connect(&a);
        let mut statuses = Vec::new();
        for _ in 0..1000 {
            client.write_all(get("/latest/meta-data/mac").as_bytes()).await.unwrap();
            statuses.push(read_answer(&mut client).await.0);
        }
        assert!(statuses.iter().take(200).all(|status| *status == 200));
        let throttled = statuses.iter().filter(|status| **status == 503).count();
        assert!(throttled > 100, "{throttled}");
        assert_eq!(a.counters().throttled, u64::try_from(throttled).unwrap());
        let begun = Instant::now();
        let answer = once(&b, &get_and_close("/latest/meta-data/mac")).await;
        assert!(answer.contains("200 OK") && begun.elapsed() < Duration::from_millis(100));
        assert_eq!(b.counters().throttled, 0);
    });
}

#[test]
fn a_throttled_answer_says_when_to_come_back() {
    run(async {
        let service = service(Limits { burst_requests: 0, refill_requests_per_s: 0, ..Limits::default() });
        let answer = once(&service, &get_and_close("/")).await.to_lowercase();
        assert!(answer.starts_with("http/1.1 503 ") && answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
    });
}

#[test]
fn the_default_limits_let_several_whole_crawls_pass() {
    let limits = Limits::default();
    assert!(limits.burst_requests >= 200 && limits.refill_requests_per_s >= 50);
}

#[test]
fn the_hop_limit_is_set_before_the_answer_and_never_rises_again() {
    run(async {
        let service = service(Limits::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let hook: HopLimitHook = {
            let seen = Arc::clone(&seen);
            Arc::new(move |hop_limit| seen.lock().unwrap().push(hop_limit))
        };
        let mut client = connect_with(&service, Some(hook));
        for (request, expected) in [(get("/"), None), (TOKEN_REQUEST.to_owned(), Some(2)), (get("/"), Some(2))] {
            client.write_all(request.as_bytes()).await.unwrap();
            let first = client.read_u8().await.unwrap();
            assert_eq!(seen.lock().unwrap().last(), Some(&expected), "set by the time the first byte is there");
            assert_eq!(read_answer_after(vec![first], &mut client).await.0, 200);
        }
        assert_eq!(*seen.lock().unwrap(), [None, Some(2), Some(2)]);
    });
}

#[test]
fn a_client_that_closes_its_side_after_asking_gets_its_answer() {
    run(async {
        let mut client = connect(&service(Limits::default()));
        client.write_all(get("/latest/meta-data/mac").as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("52:54:00:ab:cd:01"), "{answer}");
    });
}

#[test]
fn requests_are_told_without_values() {
    run(async {
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&events);
        let options = ServiceOptions {
            on_request: Some(Box::new(move |event| {
                let line = format!("{} {} {} {}", event.destination, event.method, event.path, event.status.as_u16());
                sink.lock().unwrap().push(line);
            })),
            ..ServiceOptions::default()
        };
        let service = Arc::new(MetadataService::with_options(full_view(Personality::Ec2), options));
        once(&service, &get_and_close("/latest/user-data?secret=1")).await;
        once(&service, &TOKEN_REQUEST.replace("Host: x", "Connection: close")).await;
        once(&service, &get_and_close("/nothing")).await;
        let expected = ["GET /latest/user-data 200", "PUT /latest/api/token 200", "GET /nothing 404"];
        assert_eq!(*events.lock().unwrap(), expected.map(|line| format!("169.254.169.254:80 {line}")));
    });
}

#[test]
fn a_changed_view_is_served_at_once_and_tokens_stay_valid() {
    run(async {
        let service = service(Limits::default());
        let mut client = connect(&service);
        client.write_all(TOKEN_REQUEST.as_bytes()).await.unwrap();
        let token = String::from_utf8(read_answer(&mut client).await.1).unwrap();
        let mut view = full_view(Personality::Ec2);
        view.tags = vec![("Name".to_owned(), "renamed".to_owned())];
        service.update(view);
        let request =
            format!("GET /latest/meta-data/tags/instance/Name HTTP/1.1\r\nHost: x\r\n{EC2_TOKEN}: {token}\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(read_answer(&mut client).await, (200, b"renamed".to_vec()));
    });
}

#[test]
fn the_service_decides_who_is_asking() {
    run(async {
        let other: InstanceId = "i-0aaaaaaaaaaaaaaaa".parse().unwrap();
        let a = service(Limits::default());
        let b = service_of(InstanceView { instance_id: other, ..full_view(Personality::Ec2) }, Limits::default());
        let request = get_and_close("/latest/meta-data/instance-id").replace(
            "Host: 169.254.169.254",
            "Host: x\r\nX-Forwarded-For: 10.0.0.99\r\nX-Instance-ID: i-0aaaaaaaaaaaaaaaa",
        );
        assert!(once(&a, &request).await.ends_with("\r\n\r\ni-0123456789abcdef0"));
        assert!(once(&b, &request).await.ends_with("\r\n\r\ni-0aaaaaaaaaaaaaaaa"));
    });
}

/// The target of a whole crawl (53 requests, one connection each) is 50 ms; the best of several
/// runs counts, since other tests run beside this one.
#[test]
fn a_whole_crawl_takes_less_than_50_ms() {
    run(async {
        let mut best = Duration::MAX;
        for _ in 0..10 {
            let service = service(Limits::default());
            let begun = Instant::now();
            for _ in 0..53 {
                let answer = once(&service, &get_and_close("/latest/meta-data/placement/region")).await;
                assert!(answer.ends_with("local-1"));
            }
            best = best.min(begun.elapsed());
        }
        assert!(best < Duration::from_millis(50), "{best:?}");
    });
}
