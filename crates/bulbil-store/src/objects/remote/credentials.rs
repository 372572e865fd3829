//! Who asks, and where: from the environment and the files that AWS's own tools read.
//!
//! In this order, the first that is there:
//!
//! 1. `anonymous=true` in the location: requests are not signed.
//! 2. `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`.
//! 3. A web identity: `AWS_WEB_IDENTITY_TOKEN_FILE` and `AWS_ROLE_ARN`.
//! 4. The profile `AWS_PROFILE` (or `default`) in `~/.aws/credentials` and `~/.aws/config`.
//! 5. The container (`AWS_CONTAINER_CREDENTIALS_…`), then the machine's metadata service, unless
//!    `AWS_EC2_METADATA_DISABLED=true`.
//!
//! Pure: the environment and the files are given. What is found is not shown by `Debug`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::super::location::{CREDENTIALS_COME_FROM, S3Location, check_endpoint};
use crate::error::{StoreError, StoreErrorKind};

/// Variables of process environments, by name.
pub(super) type Environment = BTreeMap<String, String>;

/// Reads a small text file; `None` when it is not there.
pub(super) type ReadFile<'a> = &'a dyn Fn(&Path) -> std::io::Result<Option<String>>;

/// How requests are signed.
#[derive(PartialEq, Eq)]
pub(super) enum Credentials {
    Anonymous,
    Static {
        key_id: String,
        secret: String,
        token: Option<String>,
    },
    /// By what object_store finds with these settings; each is named as it names them.
    Provider(Vec<(&'static str, String)>),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Static { .. } => "Static(…)",
            Self::Provider(_) => "Provider(…)",
        })
    }
}

/// Everything about a service that the location leaves open.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) credentials: Credentials,
    pub(super) region: String,
    /// With the bucket in the host's name when `virtual_hosted`.
    pub(super) endpoint: String,
    pub(super) virtual_hosted: bool,
}

/// Variables that are handed on to object_store's own providers.
const PROVIDER_VARIABLES: [&str; 7] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];

fn denied(message: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, message)
}

/// Decides how the service of a location is reached.
pub(super) fn resolve(
    location: &S3Location,
    environment: &Environment,
    read: ReadFile<'_>,
) -> Result<Service, StoreError> {
    let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty()).cloned();
    let profile = Profile::read(environment, read)?;
    let from_profile = |key: &str| profile.values.get(key).filter(|value| !value.is_empty()).cloned();
    let region = location.region.clone();
    let region = region.or_else(|| variable("AWS_REGION")).or_else(|| variable("AWS_DEFAULT_REGION"));
    let region = region.or_else(|| from_profile("region")).unwrap_or_else(|| "us-east-1".to_owned());
    let configured = || {
        if variable("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return None;
        }
        variable("AWS_ENDPOINT_URL_S3")
            .or_else(|| variable("AWS_ENDPOINT_URL"))
            .or_else(|| from_profile("endpoint_url"))
    };
    let (endpoint, virtual_hosted) = endpoint(location, location.endpoint.clone().or_else(configured), &region)?;
    let credentials = if location.anonymous { Credentials::Anonymous } else { credentials(environment, &profile)? };
    Ok(Service { credentials, region, endpoint, virtual_hosted })
}

fn endpoint(location: &S3Location, given: Option<String>, region: &str) -> Result<(String, bool), StoreError> {
    let bucket = &location.bucket;
    // A certificate for `*.HOST` is not one for a bucket with a dot in its name.
    let virtual_hosted = location.virtual_hosted.unwrap_or(given.is_none() && !bucket.contains('.'));
    let base = given.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
    let mut url = check_endpoint(&base, location.allow_http, virtual_hosted)
        .map_err(|message| StoreError::new(StoreErrorKind::Io, message))?;
    if virtual_hosted {
        let host = format!("{bucket}.{}", url.host_str().unwrap_or_default());
        url.set_host(Some(&host)).map_err(|e| {
            StoreError::with_source(StoreErrorKind::Io, format!("cannot make a host's name of bucket `{bucket}`"), e)
        })?;
    }
    Ok((url.as_str().trim_end_matches('/').to_owned(), virtual_hosted))
}

fn credentials(environment: &Environment, profile: &Profile) -> Result<Credentials, StoreError> {
    let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty()).cloned();
    match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
        (Some(key_id), Some(secret)) => {
            return Ok(Credentials::Static { key_id, secret, token: variable("AWS_SESSION_TOKEN") });
        }
        (Some(_), None) => return Err(denied("AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not")),
        (None, Some(_)) => return Err(denied("AWS_SECRET_ACCESS_KEY is set, but AWS_ACCESS_KEY_ID is not")),
        (None, None) => {}
    }
    let provider: Vec<_> = PROVIDER_VARIABLES.into_iter().filter_map(|n| variable(n).map(|value| (n, value))).collect();
    let has = |name| provider.iter().any(|(n, _)| *n == name);
    if has("AWS_WEB_IDENTITY_TOKEN_FILE") && has("AWS_ROLE_ARN") {
        return Ok(Credentials::Provider(provider));
    }
    if let Some(found) = profile.credentials()? {
        return Ok(found);
    }
    let in_container = has("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") || has("AWS_CONTAINER_CREDENTIALS_FULL_URI");
    let no_machine = variable("AWS_EC2_METADATA_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
    if no_machine && !in_container {
        return Err(denied(format!("there are no credentials for S3; {CREDENTIALS_COME_FROM}")));
    }
    Ok(Credentials::Provider(provider))
}

/// What the shared files say about one profile.
struct Profile {
    name: String,
    /// Whether the user named it, so that it must be there.
    wanted: bool,
    found: bool,
    values: BTreeMap<String, String>,
}

impl Profile {
    fn read(environment: &Environment, read: ReadFile<'_>) -> Result<Self, StoreError> {
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        let named = variable("AWS_PROFILE").or_else(|| variable("AWS_DEFAULT_PROFILE"));
        let name = named.cloned().unwrap_or_else(|| "default".to_owned());
        let mut profile = Self { wanted: named.is_some(), name, found: false, values: BTreeMap::new() };
        let path = |variable_name: &str, default: &str| {
            let below_home = || variable("HOME").map(|home| Path::new(home).join(".aws").join(default));
            variable(variable_name).map(PathBuf::from).or_else(below_home)
        };
        // What the second file says wins: keys in `credentials` are the ones that tools write.
        for (path, is_config) in
            [(path("AWS_CONFIG_FILE", "config"), true), (path("AWS_SHARED_CREDENTIALS_FILE", "credentials"), false)]
        {
            let Some(path) = path else { continue };
            let text = read(&path)
                .map_err(|e| StoreError::io(format!("cannot read the profile file `{}`", path.display()), e))?;
            let section = section(text.as_deref().unwrap_or_default(), &profile.name, is_config);
            profile.found |= section.is_some();
            profile.values.extend(section.unwrap_or_default());
        }
        Ok(profile)
    }

    fn credentials(&self) -> Result<Option<Credentials>, StoreError> {
        let name = &self.name;
        if self.wanted && !self.found {
            return Err(denied(format!("the profile `{name}` is in neither ~/.aws/credentials nor ~/.aws/config")));
        }
        let value = |key: &str| self.values.get(key).filter(|value| !value.is_empty()).cloned();
        match (value("aws_access_key_id"), value("aws_secret_access_key")) {
            (Some(key_id), Some(secret)) => {
                Ok(Some(Credentials::Static { key_id, secret, token: value("aws_session_token") }))
            }
            (None, None) => {
                let other = ["role_arn", "sso_session", "sso_account_id", "credential_process"];
                match other.iter().find(|key| value(key).is_some()) {
                    Some(key) if self.wanted => Err(denied(format!(
                        "the profile `{name}` gets its credentials by `{key}`, which is not supported; \
                         `aws configure export-credentials --format env` gives variables that are"
                    ))),
                    _ => Ok(None),
                }
            }
            _ => {
                Err(denied(format!("the profile `{name}` has only one of aws_access_key_id and aws_secret_access_key")))
            }
        }
    }
}

/// The settings of one profile in a file of AWS's kind; `None` when it has no such section.
///
/// Indented lines belong to the setting above them (`s3 =`, then `  max_concurrent_requests = 10`)
/// and are none of ours.
fn section(text: &str, profile: &str, is_config: bool) -> Option<BTreeMap<String, String>> {
    let mut values = None;
    let mut inside = false;
    for line in text.trim_start_matches('\u{feff}').lines() {
        if line.trim().is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = line.trim().strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default().trim();
            let name = match header.split_once(char::is_whitespace) {
                Some(("profile", name)) if is_config => Some(name.trim()),
                None if !is_config || header == "default" => Some(header),
                _ => None,
            };
            inside = name.map(|name| name.trim_matches('"')) == Some(profile);
            if inside {
                values.get_or_insert_with(BTreeMap::new);
            }
            continue;
        }
        let nested = line.starts_with([' ', '\t']);
        if let (true, false, Some((key, value)), Some(values)) = (inside, nested, line.split_once('='), &mut values) {
            let value = value.split(" #").next().unwrap_or_default().split(" ;").next().unwrap_or_default();
            values.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::super::super::StoreLocation;
    use super::*;

    const CREDENTIALS: &str = "[default]\naws_access_key_id = AKDEFAULT\naws_secret_access_key=secret-default # mine\n\
        \n; other\n[work]\naws_access_key_id=AKWORK\naws_secret_access_key=secret-work\naws_session_token=token-work\n\
        [half]\naws_access_key_id=AKHALF\n";
    const CONFIG: &str = "[default]\nregion = eu-west-1\ns3 =\n  endpoint_url = http://nested\n[profile work]\n\
        region=eu-central-1\nendpoint_url = https://minio.example.com:9000\n[profile sso]\nsso_session = corp\n";

    fn check(location: &str, variables: &[(&str, &str)]) -> Result<Service, StoreError> {
        let StoreLocation::S3(location) = location.parse().unwrap() else { panic!("not in S3") };
        let home = ("HOME", "/ho/me");
        let environment = variables.iter().copied().chain([home]).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let read = |path: &Path| {
            Ok(match path.to_str().unwrap() {
                "/ho/me/.aws/credentials" => Some(CREDENTIALS.to_owned()),
                "/ho/me/.aws/config" => Some(CONFIG.to_owned()),
                _ => None,
            })
        };
        resolve(&location, &environment, &read)
    }

    fn key_id(service: Service) -> String {
        match service.credentials {
            Credentials::Static { key_id, .. } => key_id,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn variables_win_over_profiles_and_profiles_over_the_machine() {
        let keys = [("AWS_ACCESS_KEY_ID", "AKENV"), ("AWS_SECRET_ACCESS_KEY", "s")];
        assert_eq!(key_id(check("s3://bucket", &keys).unwrap()), "AKENV");
        assert_eq!(key_id(check("s3://bucket", &[]).unwrap()), "AKDEFAULT");
        assert_eq!(key_id(check("s3://bucket", &[("AWS_PROFILE", "work")]).unwrap()), "AKWORK");
        assert_eq!(key_id(check("s3://bucket?anonymous=true", &keys).unwrap()), "Anonymous");
        let role = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn")];
        assert_eq!(key_id(check("s3://bucket", &role).unwrap()), "Provider(…)");
        let nothing = [("HOME", ""), ("AWS_CONFIG_FILE", "/none"), ("AWS_SHARED_CREDENTIALS_FILE", "/none")];
        assert_eq!(key_id(check("s3://bucket", &nothing).unwrap()), "Provider(…)");
    }

    #[test]
    fn what_is_missing_is_named() {
        let refused = |variables: &[(&str, &str)]| {
            let error = check("s3://bucket", variables).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Denied);
            error.to_string()
        };
        assert!(refused(&[("AWS_ACCESS_KEY_ID", "AK")]).contains("AWS_SECRET_ACCESS_KEY is not"));
        assert!(refused(&[("AWS_PROFILE", "none")]).contains("`none`"));
        assert!(refused(&[("AWS_PROFILE", "half")]).contains("only one of"));
        assert!(refused(&[("AWS_PROFILE", "sso")]).contains("sso_session"));
        let nothing = [("AWS_SHARED_CREDENTIALS_FILE", "/none"), ("AWS_EC2_METADATA_DISABLED", "true")];
        assert!(refused(&nothing).contains("AWS_ACCESS_KEY_ID"));
    }

    #[test]
    fn region_and_endpoint_come_from_the_location_first() {
        let endpoint = |location, variables: &[_]| {
            let service = check(location, variables).unwrap();
            format!("{} {}", service.endpoint, service.region)
        };
        assert_eq!(endpoint("s3://bucket", &[]), "https://bucket.s3.eu-west-1.amazonaws.com eu-west-1");
        assert_eq!(endpoint("s3://dot.ted?region=us-west-2", &[]), "https://s3.us-west-2.amazonaws.com us-west-2");
        assert_eq!(endpoint("s3://bucket", &[("AWS_PROFILE", "work")]), "https://minio.example.com:9000 eu-central-1");
        let variables = [("AWS_ENDPOINT_URL", "http://127.0.0.1:1/"), ("AWS_REGION", "r")];
        assert_eq!(endpoint("s3://bucket", &variables), "http://127.0.0.1:1 r");
        assert_eq!(endpoint("s3://bucket?endpoint=http://localhost:2", &variables), "http://localhost:2 r");
        assert_eq!(
            endpoint("s3://bucket?endpoint=https://h:3&virtual_hosted=true", &variables),
            "https://bucket.h:3 r"
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let service = check("s3://bucket", &[("AWS_PROFILE", "work")]).unwrap();
        let shown = format!("{service:?}");
        assert!(!shown.contains("secret") && !shown.contains("token-work") && !shown.contains("AKWORK"), "{shown}");
    }
}
