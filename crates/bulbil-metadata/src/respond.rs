//! The decision: a request and a site give a response. No clock, no socket, no file.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use bulbil_types::Personality;
use bytes::Bytes;
use http::header::{ALLOW, HeaderName, HeaderValue, RETRY_AFTER, SERVER};
use http::{HeaderMap, Method, StatusCode};

use crate::site::Site;
use crate::token::{MAX_TOKEN_TTL_S, TokenStore, hex_value};
use crate::tree::Found;
use crate::view::TokenMode;

/// The deepest path that is looked at; the deepest that exists has nine segments.
const MAX_SEGMENTS: usize = 16;

/// A request as it came in. `Debug` shows no header, since one may be a token.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// The address the guest called.
    pub destination: IpAddr,
    /// The method.
    pub method: &'a Method,
    /// The path as it was sent, still percent-encoded; a query is ignored.
    pub path: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("destination", &self.destination)
            .field("method", &self.method)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// What is to be sent. `Debug` shows the size of the body only.
#[derive(Clone)]
pub struct Response {
    /// The status.
    pub status: StatusCode,
    /// The media type of the body.
    pub content_type: &'static str,
    /// Further headers.
    pub headers: HeaderMap,
    /// The body. For `HEAD` too: its length is told, the bytes are not to be sent.
    pub body: Bytes,
    /// The IP time-to-live this answer has to leave with, if it matters.
    pub hop_limit: Option<u8>,
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("content_type", &self.content_type)
            .field("body_len_bytes", &self.body.len())
            .field("hop_limit", &self.hop_limit)
            .finish_non_exhaustive()
    }
}

impl Response {
    fn ok(content_type: &'static str, body: Bytes) -> Self {
        Self { status: StatusCode::OK, content_type, headers: HeaderMap::new(), body, hop_limit: None }
    }

    /// A refusal with the small XHTML page AWS sends (amazon-ec2-metadata-mock, `404_response.golden`).
    pub(crate) fn refusal(status: StatusCode) -> Self {
        let title = format!("{} - {}", status.as_u16(), status.canonical_reason().unwrap_or("Error"));
        let page = format!(
            "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
             <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\
             \t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
             <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
             <head>\n  <title>{title}</title>\n </head>\n \
             <body>\n  <h1>{title}</h1>\n </body>\n</html>\n"
        );
        let headers = HeaderMap::new();
        Self { status, content_type: "text/html", headers, body: Bytes::from(page), hop_limit: None }
    }

    /// 503 with `Retry-After: 1`, which cloud-init honours since 25.1 (`url_helper.py`).
    pub(crate) fn throttled() -> Self {
        Self::refusal(StatusCode::SERVICE_UNAVAILABLE).with(RETRY_AFTER, HeaderValue::from_static("1"))
    }

    fn not_allowed(allow: &'static str) -> Self {
        Self::refusal(StatusCode::METHOD_NOT_ALLOWED).with(ALLOW, HeaderValue::from_static(allow))
    }

    fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

/// What differs between the clouds that have tokens.
struct TokenDialect {
    header: &'static str,
    ttl_header: HeaderName,
    /// The refusal of a request that should have brought a token: AWS 401, Alibaba 403.
    missing: StatusCode,
}

fn token_dialect(personality: Personality) -> Option<TokenDialect> {
    match personality {
        Personality::Ec2 => Some(TokenDialect {
            header: "x-aws-ec2-metadata-token",
            ttl_header: HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds"),
            missing: StatusCode::UNAUTHORIZED,
        }),
        Personality::Alibaba => Some(TokenDialect {
            header: "x-aliyun-ecs-metadata-token",
            ttl_header: HeaderName::from_static("x-aliyun-ecs-metadata-token-ttl-seconds"),
            missing: StatusCode::FORBIDDEN,
        }),
        Personality::NoCloud => None,
    }
}

/// Answers one request.
///
/// `now` is the time since an origin that stays the same for the life of `tokens`. The rules, in
/// the order in which they apply, with their sources (AWS: "How Instance Metadata Service Version
/// 2 works", "Retrieve instance metadata", "Configure the instance metadata options"; Alibaba:
/// "View instance metadata"):
///
/// 1. An address that is not the personality's: 404.
/// 2. The endpoint is disabled: 403.
/// 3. A path that cannot be decoded: 400.
/// 4. `PUT` with `X-Forwarded-For`: 403, even when something else is wrong too.
/// 5. `PUT /latest/api/token`: a TTL of 1 to 21600 seconds gives a token as plain text, a missing
///    or other one 400; any other method there 405. On a dated version `PUT` is 403.
/// 6. Any other method than `GET` and `HEAD`: 405.
/// 7. A wrong or expired token: 401, even where tokens are optional.
/// 8. No token where one is required: 401 (`ec2`), 403 (`alibaba`, `nocloud`).
/// 9. A directory or value of the tree, a final slash or not: 200. Anything else: 404.
///
/// Headers other than the three named take no part in any of it.
#[must_use]
pub fn respond(request: &Request<'_>, site: &Site, tokens: &TokenStore, now: Duration) -> Response {
    let response = decide(request, site, tokens, now);
    match site.view().personality {
        // Some detectors recognise AWS by this name.
        Personality::Ec2 => response.with(SERVER, HeaderValue::from_static("EC2ws")),
        Personality::Alibaba | Personality::NoCloud => response,
    }
}

fn decide(request: &Request<'_>, site: &Site, tokens: &TokenStore, now: Duration) -> Response {
    if !site.addresses().contains(&request.destination) {
        return Response::refusal(StatusCode::NOT_FOUND);
    }
    if !site.view().endpoint_enabled {
        return Response::refusal(StatusCode::FORBIDDEN);
    }
    let Some(segments) = segments(request.path) else { return Response::refusal(StatusCode::BAD_REQUEST) };
    if request.method == Method::PUT {
        return put(request, &segments, site, tokens, now);
    }
    if is_token_path(&segments) && token_dialect(site.view().personality).is_some() {
        return Response::not_allowed("PUT");
    }
    if request.method != Method::GET && request.method != Method::HEAD {
        return Response::not_allowed("GET, HEAD");
    }
    match refusal_by_token(request.headers, site, tokens, now) {
        Some(status) => Response::refusal(status),
        None => get(&segments, site),
    }
}

fn get(segments: &[Cow<'_, str>], site: &Site) -> Response {
    match site.root().find(segments.iter().map(AsRef::as_ref)) {
        Some(Found::Dir(dir)) => Response::ok("text/plain", dir.listing()),
        Some(Found::Leaf(leaf)) => Response::ok(leaf.content_type, leaf.body.clone()),
        None => Response::refusal(StatusCode::NOT_FOUND),
    }
}

fn put(request: &Request<'_>, segments: &[Cow<'_, str>], site: &Site, tokens: &TokenStore, now: Duration) -> Response {
    let Some(dialect) = token_dialect(site.view().personality) else { return Response::not_allowed("GET, HEAD") };
    if request.headers.contains_key("x-forwarded-for") {
        return Response::refusal(StatusCode::FORBIDDEN);
    }
    if is_token_path(segments) {
        return issue_token(request.headers, dialect, site, tokens, now);
    }
    if is_dated_token_path(segments) {
        return Response::refusal(StatusCode::FORBIDDEN);
    }
    Response::not_allowed("GET, HEAD")
}

fn issue_token(
    headers: &HeaderMap,
    dialect: TokenDialect,
    site: &Site,
    tokens: &TokenStore,
    now: Duration,
) -> Response {
    let Some(ttl_s) = single(headers, dialect.ttl_header.as_str()).flatten().and_then(parse_ttl) else {
        return Response::refusal(StatusCode::BAD_REQUEST);
    };
    let token = tokens.issue(Duration::from_secs(ttl_s.into()), now);
    let mut response = Response::ok("text/plain", Bytes::from(token)).with(dialect.ttl_header, ttl_s.into());
    response.hop_limit = Some(site.view().hop_limit.get());
    response
}

/// Digits only: no sign, no fraction, no blank inside.
fn parse_ttl(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|ttl_s| digits && (1..=MAX_TOKEN_TTL_S).contains(ttl_s))
}

fn refusal_by_token(headers: &HeaderMap, site: &Site, tokens: &TokenStore, now: Duration) -> Option<StatusCode> {
    let required = site.view().token_mode == TokenMode::Required;
    let Some(dialect) = token_dialect(site.view().personality) else {
        return required.then_some(StatusCode::FORBIDDEN);
    };
    match single(headers, dialect.header) {
        Some(Some(token)) if tokens.is_valid(token, now) => None,
        Some(_) => Some(StatusCode::UNAUTHORIZED),
        None => required.then_some(dialect.missing),
    }
}

/// `None`: the header is missing. `Some(None)`: it is there more than once.
#[expect(clippy::option_option, reason = "missing, ambiguous and present are three answers")]
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<Option<&'a [u8]>> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.as_bytes();
    Some(values.next().is_none().then_some(value))
}

fn is_token_path(segments: &[Cow<'_, str>]) -> bool {
    segments.iter().eq(["latest", "api", "token"])
}

fn is_dated_token_path(segments: &[Cow<'_, str>]) -> bool {
    segments.len() == 3 && segments.iter().skip(1).eq(["api", "token"])
}

/// Splits a path and decodes each segment; empty segments are dropped, so that a final slash never
/// matters. `None` if it does not begin with `/`, has too many segments or is wrongly encoded.
///
/// The segments are keys of a tree in memory: `..` or a decoded `/` is a name nothing has.
fn segments(path: &str) -> Option<Vec<Cow<'_, str>>> {
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let names = path.strip_prefix('/')?.split('/').filter(|name| !name.is_empty());
    let segments = names.take(MAX_SEGMENTS + 1).map(percent_decoded).collect::<Option<Vec<_>>>()?;
    (segments.len() <= MAX_SEGMENTS).then_some(segments)
}

fn percent_decoded(segment: &str) -> Option<Cow<'_, str>> {
    if !segment.contains('%') {
        return Some(Cow::Borrowed(segment));
    }
    let mut decoded = Vec::with_capacity(segment.len());
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        let value = if byte == b'%' { (hex_digit(bytes.next()?)? << 4) | hex_digit(bytes.next()?)? } else { byte };
        decoded.push(value);
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

fn hex_digit(byte: u8) -> Option<u8> {
    hex_value(byte.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_and_decoded() {
        for (path, expected) in [
            ("/", Some(vec![])),
            ("//", Some(vec![])),
            ("/latest/", Some(vec!["latest"])),
            ("//latest//meta-data", Some(vec!["latest", "meta-data"])),
            ("/a%3Db/%41?x=/y", Some(vec!["a=b", "A"])),
            ("/a%2fb/..", Some(vec!["a/b", ".."])),
            ("/%c3%A9", Some(vec!["é"])),
            ("", None),
            ("latest", None),
            ("*", None),
            ("/%", None),
            ("/%4", None),
            ("/%4g", None),
            ("/%ff", None),
        ] {
            let found = segments(path);
            let expected: Option<Vec<Cow<'_, str>>> = expected.map(|s| s.into_iter().map(Cow::Borrowed).collect());
            assert_eq!(found, expected, "{path}");
        }
        assert!(segments(&"/a".repeat(MAX_SEGMENTS)).is_some());
        assert!(segments(&"/a".repeat(MAX_SEGMENTS + 1)).is_none());
    }

    #[test]
    fn a_ttl_is_digits_between_1_and_21600() {
        for (text, expected) in [("1", Some(1)), ("21600", Some(21_600)), ("060", Some(60))] {
            assert_eq!(parse_ttl(text.as_bytes()), expected, "{text}");
        }
        for text in ["", "0", "21601", "-1", "+1", "1.5", "1 ", "0x10", "99999999999999999999", "٣", "sixty"] {
            assert_eq!(parse_ttl(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn debug_shows_neither_token_nor_value() {
        let mut headers = HeaderMap::new();
        headers.insert("x-aws-ec2-metadata-token", HeaderValue::from_static("hunter2"));
        let destination = IpAddr::from([169, 254, 169, 254]);
        let request = Request { destination, method: &Method::GET, path: "/", headers: &headers };
        assert!(!format!("{request:?}").contains("hunter2"));
        assert!(!format!("{:?}", Response::ok("text/plain", Bytes::from_static(b"hunter2"))).contains("hunter2"));
    }
}
