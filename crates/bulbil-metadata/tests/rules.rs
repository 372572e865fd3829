//! The rules of HTTP and of tokens, one table each.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::time::Duration;

use bulbil_metadata::{HopLimit, InstanceView, MAX_TOKEN_TTL_S, TokenMode};
use bulbil_types::Personality;
use common::{ALIBABA_TOKEN, ALIBABA_TTL, EC2_TOKEN, EC2_TTL, Guest, Random, T0, full_view, text};
use http::Method;

const ID: &str = "/latest/meta-data/instance-id";
const TOKEN: &str = "/latest/api/token";

fn guest(personality: Personality, token_mode: TokenMode) -> Guest {
    Guest::new(InstanceView { token_mode, ..full_view(personality) })
}

#[test]
fn methods() {
    let put = Method::PUT;
    for personality in [Personality::Ec2, Personality::Alibaba] {
        let guest = guest(personality, TokenMode::Optional);
        for path in ["/", ID, "/latest/user-data", "/nothing"] {
            for method in [Method::POST, Method::DELETE, Method::PATCH, Method::OPTIONS, Method::TRACE, put.clone()] {
                let response = guest.ask(&method, path, &[]);
                assert_eq!(response.status, 405, "{method} {path}");
                assert_eq!(response.headers["allow"], "GET, HEAD", "{method} {path}");
            }
        }
        for method in [Method::GET, Method::HEAD, Method::POST, Method::DELETE] {
            let response = guest.ask(&method, TOKEN, &[(EC2_TTL, "60"), (ALIBABA_TTL, "60")]);
            assert_eq!(response.status, 405, "{method}");
            assert_eq!(response.headers["allow"], "PUT", "{method}");
        }
        assert_eq!(guest.ask(&Method::HEAD, ID, &[]).body, guest.get(ID).body);
        assert_eq!(guest.status(&Method::from_bytes(b"BREW").unwrap(), ID, &[]), 405);
    }
    assert_eq!(guest(Personality::NoCloud, TokenMode::Optional).status(&put, TOKEN, &[(EC2_TTL, "60")]), 405);
}

#[test]
fn a_token_is_given_for_1_to_21600_seconds_only() {
    for (personality, header, other) in
        [(Personality::Ec2, EC2_TTL, ALIBABA_TTL), (Personality::Alibaba, ALIBABA_TTL, EC2_TTL)]
    {
        let guest = guest(personality, TokenMode::Optional);
        for ttl in ["1", "60", "21600"] {
            let response = guest.ask(&Method::PUT, TOKEN, &[(header, ttl)]);
            assert_eq!(response.status, 200, "{ttl}");
            assert_eq!(response.headers[header], ttl);
            assert_eq!(response.content_type, "text/plain");
            assert!(response.body.len() >= 32 && response.body.is_ascii());
        }
        for ttl in ["", "0", "-1", "21601", "1.5", "6o", "60s", "+60", "4294967297", "60, 60"] {
            assert_eq!(guest.status(&Method::PUT, TOKEN, &[(header, ttl)]), 400, "{ttl}");
        }
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[]), 400);
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[(other, "60")]), 400);
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[(header, "60"), (header, "60")]), 400);
        assert_eq!(guest.status(&Method::PUT, "/latest/api/token/", &[(header, "60")]), 200);
    }
}

#[test]
fn a_put_is_refused_when_it_was_forwarded_or_names_a_date() {
    for (personality, header) in [(Personality::Ec2, EC2_TTL), (Personality::Alibaba, ALIBABA_TTL)] {
        let guest = guest(personality, TokenMode::Optional);
        let forwarded = ("x-forwarded-for", "10.0.0.1");
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[(header, "60"), forwarded]), 403);
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[forwarded]), 403, "even when the TTL is missing too");
        assert_eq!(guest.status(&Method::PUT, TOKEN, &[(header, "60"), ("x-forwarded-for", "")]), 403);
        assert_eq!(guest.status(&Method::PUT, "/2021-03-23/api/token", &[(header, "60")]), 403);
        assert_eq!(guest.status(&Method::PUT, "/2016-01-01/api/token", &[(header, "60")]), 403);
        assert_eq!(guest.status(&Method::GET, ID, &[forwarded]), 200, "only the PUT is refused");
    }
}

#[test]
fn optional_tokens() {
    for (personality, header) in [(Personality::Ec2, EC2_TOKEN), (Personality::Alibaba, ALIBABA_TOKEN)] {
        let guest = guest(personality, TokenMode::Optional);
        let token = guest.token();
        assert_eq!(guest.status(&Method::GET, ID, &[]), 200);
        assert_eq!(guest.status(&Method::GET, ID, &[(header, &token)]), 200);
        for wrong in ["", "wrong", &token[1..], &"0".repeat(96)] {
            assert_eq!(guest.status(&Method::GET, ID, &[(header, wrong)]), 401, "{wrong}");
        }
        assert_eq!(guest.status(&Method::GET, ID, &[(header, &token), (header, &token)]), 401);
    }
}

#[test]
fn required_tokens() {
    for (personality, header, missing) in
        [(Personality::Ec2, EC2_TOKEN, 401), (Personality::Alibaba, ALIBABA_TOKEN, 403)]
    {
        let guest = guest(personality, TokenMode::Required);
        let token = guest.token();
        for path in ["/", "/latest", "/latest/", ID, "/latest/user-data", "/latest/dynamic/", "/nothing"] {
            let found = if path == "/nothing" { 404 } else { 200 };
            for method in [Method::GET, Method::HEAD] {
                assert_eq!(guest.status(&method, path, &[]), missing, "{method} {path}");
                assert_eq!(guest.status(&method, path, &[(header, "wrong")]), 401, "{method} {path}");
                assert_eq!(guest.status(&method, path, &[(header, &token)]), found, "{method} {path}");
            }
        }
    }
    let nocloud = guest(Personality::NoCloud, TokenMode::Required);
    assert_eq!(nocloud.status(&Method::GET, "/nocloud/meta-data", &[]), 403);
}

#[test]
fn a_token_ends_on_time() {
    for (personality, header, ttl_header) in
        [(Personality::Ec2, EC2_TOKEN, EC2_TTL), (Personality::Alibaba, ALIBABA_TOKEN, ALIBABA_TTL)]
    {
        let mut guest = guest(personality, TokenMode::Required);
        let token = text(&guest.ask(&Method::PUT, TOKEN, &[(ttl_header, &MAX_TOKEN_TTL_S.to_string())]));
        for (after_s, status) in [(0, 200), (21_599, 200), (21_600, 401), (100_000, 401)] {
            guest.now = T0 + Duration::from_secs(after_s);
            assert_eq!(guest.status(&Method::GET, ID, &[(header, &token)]), status, "{after_s}");
        }
    }
}

#[test]
fn a_token_is_worth_nothing_on_another_instance() {
    let (a, b) = (guest(Personality::Ec2, TokenMode::Optional), guest(Personality::Ec2, TokenMode::Optional));
    let token = a.token();
    assert_eq!(a.status(&Method::GET, ID, &[(EC2_TOKEN, &token)]), 200);
    assert_eq!(b.status(&Method::GET, ID, &[(EC2_TOKEN, &token)]), 401);
}

#[test]
fn a_disabled_endpoint_refuses_everything() {
    for personality in Personality::ALL {
        let mut view = full_view(*personality);
        view.endpoint_enabled = false;
        let guest = Guest::new(view);
        for path in ["/", ID, TOKEN, "/nothing", "/nocloud/meta-data"] {
            for method in [Method::GET, Method::PUT, Method::POST] {
                let headers = [(EC2_TTL, "60"), (ALIBABA_TTL, "60")];
                assert_eq!(guest.status(&method, path, &headers), 403, "{method} {path}");
            }
        }
    }
}

#[test]
fn only_the_answer_with_a_token_has_a_hop_limit() {
    let mut view = full_view(Personality::Ec2);
    assert_eq!(view.hop_limit.get(), 2);
    view.hop_limit = HopLimit::new(1).unwrap();
    let guest = Guest::new(view);
    assert_eq!(guest.ask(&Method::PUT, TOKEN, &[(EC2_TTL, "60")]).hop_limit, Some(1));
    assert_eq!(guest.ask(&Method::PUT, TOKEN, &[]).hop_limit, None);
    assert_eq!(guest.get(ID).hop_limit, None);
}

#[test]
fn no_header_changes_who_is_asking() {
    for personality in Personality::ALL {
        let guest = guest(*personality, TokenMode::Optional);
        let path = if *personality == Personality::NoCloud { "/nocloud/meta-data" } else { ID };
        let plain = guest.get(path);
        for (name, value) in [
            ("x-forwarded-for", "10.0.0.99"),
            ("forwarded", "for=10.0.0.99;host=other"),
            ("x-real-ip", "10.0.0.99"),
            ("x-client-ip", "10.0.0.99"),
            ("via", "1.1 proxy"),
            ("host", "instance-data"),
            ("x-instance-id", "i-00000000000000000"),
            ("x-instance-id-signature", "0"),
            ("x-tenant-id", "other"),
            ("metadata-flavor", "Google"),
            ("metadata", "true"),
            ("authorization", "Bearer Oracle"),
            ("x-http-method-override", "PUT"),
            ("range", "bytes=0-1"),
        ] {
            let spoofed = guest.ask(&Method::GET, path, &[(name, value)]);
            assert_eq!(spoofed.status, plain.status, "{name}");
            assert_eq!(spoofed.body, plain.body, "{name}");
        }
    }
}

#[test]
fn refusals_are_small_pages_and_ec2_names_its_server() {
    let response = guest(Personality::Ec2, TokenMode::Optional).get("/latest/meta-data/nothing");
    assert_eq!(response.status, 404);
    assert_eq!(response.content_type, "text/html");
    assert_eq!(response.headers["server"], "EC2ws");
    assert!(text(&response).contains("<h1>404 - Not Found</h1>"));
    assert!(response.body.len() < 600);
    assert!(!guest(Personality::Alibaba, TokenMode::Optional).get("/").headers.contains_key("server"));
}

#[test]
fn a_final_slash_and_a_query_never_matter_and_case_does() {
    let guest = guest(Personality::Ec2, TokenMode::Optional);
    for (path, status) in [
        ("/latest", 200),
        ("/latest/", 200),
        ("/latest/meta-data", 200),
        ("/latest/meta-data/instance-id/", 200),
        ("/latest/user-data/", 200),
        ("/latest/meta-data/instance-id?x=1", 200),
        ("//latest/meta-data/", 200),
        ("/latest/meta-data/Instance-Id", 404),
        ("/LATEST/meta-data/", 404),
        ("/latest/meta-data/instance-id/x", 404),
        ("/latest/meta-data/../user-data", 404),
        ("/latest/meta-data/..%2fuser-data", 404),
        ("/etc/passwd", 404),
        ("/latest/%", 400),
        ("/latest/%00", 404),
    ] {
        assert_eq!(guest.status(&Method::GET, path, &[]), status, "{path}");
    }
}

#[test]
fn no_path_makes_it_panic() {
    let pieces = [
        "/",
        "//",
        "%",
        "%2",
        "%2f",
        "%ff",
        "%00",
        "..",
        ".",
        "latest",
        "meta-data",
        "api",
        "token",
        "2016-01-01",
        "all",
        "public-keys",
        "0",
        "=",
        "?",
        "#",
        "é",
        "\u{1F600}",
        "\0",
        "\n",
        "*",
        "http://x/",
        "nocloud",
        "\\",
        " ",
    ];
    let mut random = Random::seeded();
    let guests: Vec<Guest> =
        Personality::ALL.iter().map(|personality| guest(*personality, TokenMode::Optional)).collect();
    for _ in 0..50_000 {
        let count = random.below(24);
        let path: String = (0..count).map(|_| pieces[random.below(pieces.len())]).collect();
        for guest in &guests {
            for method in [Method::GET, Method::PUT] {
                let status = guest.status(&method, &path, &[]);
                assert!([200, 400, 403, 404, 405].contains(&status), "{method} {path:?} {status}");
            }
        }
    }
}
