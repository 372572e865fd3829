//! What is to be known about a service beside its location.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Limits of requests, and the environment that credentials come from.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// Variables by name: `AWS_…` and `HOME` are read, see `docs/design/object-stores.md`.
    pub environment: BTreeMap<String, String>,
    /// Requests at one time; more wait.
    pub in_flight: usize,
    /// How long one attempt may take, beside the time for its bytes.
    pub attempt_timeout: Duration,
    /// How long an operation may take with all its attempts, beside twice the time for its bytes.
    pub deadline: Duration,
    /// The slowest rate that counts as going on, in bytes each second: it gives the time for bytes.
    pub min_bytes_per_s: u64,
    /// How long an operation that lists may take, whatever the number of its pages.
    pub list_deadline: Duration,
    /// The least time after which a second request is started for a range that does not come;
    /// `None`: never.
    pub hedge_after: Option<Duration>,
}

impl RemoteOptions {
    /// The usual limits with these variables.
    pub fn with_environment(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let wanted = |name: &str| name.starts_with("AWS_") || name == "HOME";
        Self {
            environment: variables.into_iter().filter(|(name, _)| wanted(name)).collect(),
            in_flight: 64,
            attempt_timeout: Duration::from_secs(10),
            deadline: Duration::from_secs(30),
            // A pack of 16 MiB has a minute: an uplink of 2 Mbit/s is enough.
            min_bytes_per_s: 256 << 10,
            list_deadline: Duration::from_secs(300),
            hedge_after: Some(Duration::from_millis(50)),
        }
    }

    /// The usual limits with the variables of this process.
    #[must_use]
    pub fn from_process_environment() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::with_environment(std::env::vars_os().filter_map(text))
    }

    /// The time that bytes may take on their way.
    pub(super) fn transfer(&self, len_bytes: u64) -> Duration {
        Duration::from_millis(len_bytes.saturating_mul(1000) / self.min_bytes_per_s.max(1))
    }
}

impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteOptions")
            .field("environment", &self.environment.keys().collect::<Vec<_>>())
            .field("in_flight", &self.in_flight)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("deadline", &self.deadline)
            .field("min_bytes_per_s", &self.min_bytes_per_s)
            .field("list_deadline", &self.list_deadline)
            .field("hedge_after", &self.hedge_after)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_names_of_variables_and_no_value() {
        let variables = [("AWS_SECRET_ACCESS_KEY", "hunter2"), ("PATH", "/bin")];
        let options = RemoteOptions::with_environment(variables.map(|(k, v)| (k.to_owned(), v.to_owned())));
        let shown = format!("{options:?}");
        assert!(shown.contains("AWS_SECRET_ACCESS_KEY") && !shown.contains("hunter2") && !shown.contains("PATH"));
    }
}
