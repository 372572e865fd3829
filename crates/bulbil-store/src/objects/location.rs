//! Where a store lies: a directory, or a bucket of an S3 service.
//!
//! ```text
//! /srv/store                        a directory
//! file:///srv/store                 the same
//! s3://BUCKET[/PREFIX][?PARAMETER=VALUE&…]
//!
//! endpoint=https://HOST[:PORT][/…]  the service; without it, AWS or what AWS_ENDPOINT_URL_S3 says
//! region=NAME                       without it, what AWS_REGION or the profile says, or us-east-1
//! virtual_hosted=true|false         the bucket is part of the host's name (AWS) or of the path (the rest)
//! allow_http=true                   the endpoint may be plain HTTP; on a loopback address it always may
//! anonymous=true                    requests are not signed: a public bucket, read only
//! ```
//! Credentials are no part of it: locations are shown, logged and stored.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use url::{Host, Url};

const PARAMETERS: &str = "endpoint, region, virtual_hosted, allow_http, anonymous";

/// A prefix longer than this leaves too little of S3's 1024 bytes for the names below it.
const MAX_PREFIX_BYTES: usize = 512;

/// Where the objects of a store lie. Shown in the form it is parsed from; never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreLocation {
    /// A directory of this host.
    Directory(PathBuf),
    /// Below a prefix of a bucket.
    S3(S3Location),
}

/// A bucket, and a prefix in it, of a service that speaks S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Location {
    pub(crate) bucket: String,
    /// Components separated by `/`, none at either end; may be empty.
    pub(crate) prefix: String,
    pub(crate) endpoint: Option<String>,
    pub(crate) region: Option<String>,
    pub(crate) virtual_hosted: Option<bool>,
    pub(crate) allow_http: bool,
    pub(crate) anonymous: bool,
}

/// A text that is no location of a store. Says why, and repeats no value that might be a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseLocationError(String);

fn refuse<T>(message: impl Into<String>) -> Result<T, ParseLocationError> {
    Err(ParseLocationError(message.into()))
}

impl StoreLocation {
    /// Whether each request to it crosses a network.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::S3(_))
    }
}

impl From<&Path> for StoreLocation {
    fn from(path: &Path) -> Self {
        Self::Directory(path.to_owned())
    }
}

impl FromStr for StoreLocation {
    type Err = ParseLocationError;

    fn from_str(text: &str) -> Result<Self, ParseLocationError> {
        if text.is_empty() {
            return refuse("the location of a store is empty");
        }
        if text.starts_with("s3:") && !text.starts_with("s3://") {
            return refuse("a location in S3 begins with `s3://`");
        }
        let Some((scheme, _)) = text.split_once("://") else {
            return Ok(Self::Directory(text.into()));
        };
        match scheme {
            "s3" => parse_s3(text).map(Self::S3),
            "file" => parse_file(text).map(Self::Directory),
            "http" | "https" => refuse(format!("`{scheme}://` is no store; an S3 service is `s3://BUCKET?endpoint=…`")),
            "gs" | "gcs" | "az" | "azure" | "abfs" | "abfss" => {
                refuse(format!("`{scheme}://` is not supported; stores lie in a directory or behind `s3://`"))
            }
            _ => refuse(format!("`{scheme}://` is not known; known: `s3://`, `file://`, or a path")),
        }
    }
}

impl fmt::Display for StoreLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::S3(location) => location.fmt(f),
        }
    }
}

impl fmt::Display for S3Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let flag = |set: bool| set.then(|| "true".to_owned());
        let parameters = [
            ("endpoint", self.endpoint.clone()),
            ("region", self.region.clone()),
            ("virtual_hosted", self.virtual_hosted.map(|set| set.to_string())),
            ("allow_http", flag(self.allow_http)),
            ("anonymous", flag(self.anonymous)),
        ];
        let set = parameters.into_iter().filter_map(|(name, value)| value.map(|value| (name, value)));
        for (separator, (name, value)) in std::iter::once('?').chain(std::iter::repeat('&')).zip(set) {
            write!(f, "{separator}{name}={value}")?;
        }
        Ok(())
    }
}

fn parse_file(text: &str) -> Result<PathBuf, ParseLocationError> {
    let url = Url::parse(text).ok().filter(|url| url.query().is_none() && url.fragment().is_none());
    let local = url.filter(|url| url.host_str().is_none_or(str::is_empty) && text.starts_with("file:///"));
    match local.and_then(|url| url.to_file_path().ok()) {
        Some(path) => Ok(path),
        None => refuse("a `file://` location is `file:///` and an absolute path on this host"),
    }
}

fn parse_s3(text: &str) -> Result<S3Location, ParseLocationError> {
    let Ok(url) = Url::parse(text) else {
        return refuse("not a valid URL; a location in S3 is `s3://BUCKET[/PREFIX][?PARAMETERS]`");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return refuse(format!("credentials must not be in the location: {CREDENTIALS_COME_FROM}"));
    }
    if url.port().is_some() || url.fragment().is_some() {
        return refuse("after `s3://` comes the name of a bucket; the service is named by `?endpoint=…`");
    }
    let mut location = S3Location {
        bucket: parse_bucket(url.host_str().unwrap_or_default())?,
        prefix: parse_prefix(url.path())?,
        endpoint: None,
        region: None,
        virtual_hosted: None,
        allow_http: false,
        anonymous: false,
    };
    let mut seen = Vec::new();
    for (name, value) in url.query_pairs() {
        if seen.contains(&name) {
            return refuse(format!("the parameter `{name}` is given twice"));
        }
        set_parameter(&mut location, &name, &value)?;
        seen.push(name);
    }
    if let Some(endpoint) = &location.endpoint {
        check_endpoint(endpoint, location.allow_http, location.virtual_hosted == Some(true))
            .map_err(ParseLocationError)?;
    }
    Ok(location)
}

/// Names what users may set; the same words wherever credentials are missing or wrong.
pub(crate) const CREDENTIALS_COME_FROM: &str = "they are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, \
                                                or from the profile AWS_PROFILE in ~/.aws/credentials";

fn set_parameter(location: &mut S3Location, name: &str, value: &str) -> Result<(), ParseLocationError> {
    match name {
        "endpoint" => location.endpoint = Some(value.trim_end_matches('/').to_owned()),
        "region" => location.region = Some(parse_region(value)?),
        "virtual_hosted" => location.virtual_hosted = Some(parse_flag(name, value)?),
        "allow_http" => location.allow_http = parse_flag(name, value)?,
        "anonymous" => location.anonymous = parse_flag(name, value)?,
        _ => {
            let lower = name.to_ascii_lowercase();
            let secret = ["key", "secret", "token", "password", "credential"].iter().any(|word| lower.contains(word));
            if secret {
                return refuse(format!("`{name}` must not be in the location: {CREDENTIALS_COME_FROM}"));
            }
            return refuse(format!("the parameter `{name}` is not known; known: {PARAMETERS}"));
        }
    }
    Ok(())
}

fn parse_flag(name: &str, value: &str) -> Result<bool, ParseLocationError> {
    match value {
        "" | "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => refuse(format!("`{name}` is `true` or `false`")),
    }
}

fn parse_region(value: &str) -> Result<String, ParseLocationError> {
    let sound = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if value.is_empty() || value.len() > 64 || !value.bytes().all(sound) {
        return refuse("a region is letters, digits and `-`, as in `eu-central-1`");
    }
    Ok(value.to_owned())
}

/// Buckets as S3 names them now; the service may know further rules.
fn parse_bucket(bucket: &str) -> Result<String, ParseLocationError> {
    let sound = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    let at_ends = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = bucket.as_bytes();
    if !(3..=63).contains(&bytes.len())
        || !bytes.iter().all(|b| sound(*b))
        || !at_ends(bytes.first())
        || !at_ends(bytes.last())
    {
        return refuse("a bucket's name is 3 to 63 lower-case letters, digits, `-` and `.`, as in `s3://my-bucket`");
    }
    Ok(bucket.to_owned())
}

fn parse_prefix(path: &str) -> Result<String, ParseLocationError> {
    let prefix = path.trim_matches('/');
    let sound = |part: &str| {
        !matches!(part, "" | "." | "..") && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+=@".contains(&b))
    };
    if prefix.len() > MAX_PREFIX_BYTES || !(prefix.is_empty() || prefix.split('/').all(sound)) {
        return refuse(format!(
            "a prefix is at most {MAX_PREFIX_BYTES} letters, digits and `._-+=@`, in parts separated by one `/`"
        ));
    }
    Ok(prefix.to_owned())
}

/// Checks the URL of a service, wherever it was set.
pub(crate) fn check_endpoint(endpoint: &str, allow_http: bool, virtual_hosted: bool) -> Result<Url, String> {
    let wrong = || "an endpoint is `https://HOST[:PORT]`, or `http://` with `allow_http=true`".to_owned();
    let url = Url::parse(endpoint).map_err(|_| wrong())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!("credentials must not be in the endpoint: {CREDENTIALS_COME_FROM}"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong());
    }
    let host = url.host().ok_or_else(wrong)?;
    let loopback = match host {
        Host::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    };
    match url.scheme() {
        "https" => {}
        "http" if allow_http || loopback => {}
        "http" => {
            return Err("data would cross the network in the clear; add `allow_http=true` if that is meant".into());
        }
        _ => return Err(wrong()),
    }
    if virtual_hosted && !matches!(host, Host::Domain(_)) {
        return Err("`virtual_hosted` wants an endpoint with a name, not an address".into());
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<StoreLocation, String> {
        text.parse::<StoreLocation>().map_err(|e| e.to_string())
    }

    fn check_same(text: &str) {
        assert_eq!(parse(text).unwrap().to_string(), text);
    }

    #[track_caller]
    fn check_refused(text: &str, reason: &str) {
        let message = parse(text).unwrap_err();
        assert!(message.contains(reason), "`{text}` is refused with: {message}");
    }

    #[test]
    fn locations_are_shown_as_they_are_written() {
        check_same("/srv/store");
        check_same("store");
        check_same("s3://bucket");
        check_same("s3://my.bucket-1/a/b_c");
        check_same("s3://bucket/p?endpoint=http://127.0.0.1:9000&region=eu-1&virtual_hosted=false");
        check_same("s3://bucket?endpoint=http://minio:9000&allow_http=true&anonymous=true");
        assert_eq!(parse("file:///srv/a%20store").unwrap(), StoreLocation::Directory("/srv/a store".into()));
        assert_eq!(parse("s3://bucket//p/?allow_http&endpoint=https%3A%2F%2Fx%2F").unwrap().to_string(), {
            "s3://bucket/p?endpoint=https://x&allow_http=true"
        });
    }

    #[test]
    fn what_is_not_known_is_refused_with_what_is() {
        check_refused("", "empty");
        check_refused("s3:bucket", "begins with `s3://`");
        check_refused("gs://bucket", "not supported");
        check_refused("ftp://x", "known: `s3://`, `file://`, or a path");
        check_refused("https://bucket.example.com", "s3://BUCKET?endpoint=");
        check_refused("file://host/path", "absolute path on this host");
        check_refused("file://relative", "absolute path on this host");
        check_refused("s3://", "a bucket's name");
        check_refused("s3://Bucket", "lower-case");
        check_refused("s3://bucket:9000/x", "?endpoint=");
        check_refused("s3://bucket/a//b", "one `/`");
        check_refused("s3://bucket/a%2fb", "prefix");
        check_refused("s3://bucket?regoin=x", "`regoin` is not known; known: endpoint, region");
        check_refused("s3://bucket?region=a&region=b", "twice");
        check_refused("s3://bucket?region=eu central", "region");
        check_refused("s3://bucket?anonymous=yes", "`true` or `false`");
        check_refused("s3://bucket?endpoint=localhost:9000", "https://HOST");
        check_refused("s3://bucket?endpoint=http://10.0.0.1", "allow_http=true");
        check_refused("s3://bucket?endpoint=http://127.0.0.1&virtual_hosted=true", "not an address");
    }

    #[test]
    fn secrets_in_a_location_are_refused_and_not_repeated() {
        for text in [
            "s3://AKIDEXAMPLE:hunter2hunter2@bucket/x",
            "s3://bucket?access_key=hunter2hunter2",
            "s3://bucket?aws_secret_access_key=hunter2hunter2",
            "s3://bucket?session_token=hunter2hunter2",
            "s3://bucket?endpoint=https://user:hunter2hunter2@host",
        ] {
            check_refused(text, "AWS_SECRET_ACCESS_KEY");
            assert!(!parse(text).unwrap_err().contains("hunter2"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_location_that_stays_itself_or_is_refused(text in "(s3://)?[ -~]{0,60}") {
            if let Ok(location) = parse(&text) {
                prop_assert_eq!(parse(&location.to_string()), Ok(location));
            }
        }
    }
}
