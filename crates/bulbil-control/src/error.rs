//! Errors as a user of the API meets them: a code, what was attempted, and the causes.

use std::error::Error;
use std::fmt;

use bulbil_store::{StoreError, StoreErrorKind};

/// What kind of failure it is; programs match it, messages may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// No image or instance of that name or id.
    NotFound,
    /// A name, port or resource is taken, or in a state that does not allow it.
    InUse,
    /// The request or the file cannot be used as it is.
    Invalid,
    /// The host has no space left.
    NoSpace,
    /// A program that is needed is not installed.
    MissingProgram,
    /// It did not happen in time.
    Timeout,
    /// The data directory belongs to another store than was asked for.
    OtherStore,
    /// The store is encrypted, and its key is missing or wrong.
    StoreKey,
    /// The user asked to stop.
    Cancelled,
    /// Something failed that should not.
    Failed,
}

/// A failed use case.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ControlError {
    code: ErrorCode,
    message: String,
    causes: Vec<String>,
}

impl ControlError {
    /// An error without a cause; `message` says what was attempted on what.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), causes: Vec::new() }
    }

    /// An error with its chain of causes.
    #[must_use]
    pub fn with_source(code: ErrorCode, message: impl Into<String>, source: &(dyn Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(source), |error| (*error).source()).map(ToString::to_string);
        Self { code, message: message.into(), causes: causes.collect() }
    }

    /// The kind of failure.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// What lay beneath, nearest first.
    #[must_use]
    pub fn causes(&self) -> &[String] {
        &self.causes
    }

    /// Says which instances of the same launch run all the same.
    pub(crate) fn while_running(mut self, launched: &[crate::InstanceView]) -> Self {
        if !launched.is_empty() {
            let names: Vec<_> = launched.iter().map(|instance| instance.record.name.as_str()).collect();
            self.causes.push(format!("launched before that, and running: {}", names.join(", ")));
        }
        self
    }

    /// An error of a store.
    pub(crate) fn store(message: impl Into<String>, error: &StoreError) -> Self {
        let code = match error.kind() {
            StoreErrorKind::NoSpace => ErrorCode::NoSpace,
            StoreErrorKind::Source => ErrorCode::Invalid,
            StoreErrorKind::Cancelled => ErrorCode::Cancelled,
            StoreErrorKind::Timeout => ErrorCode::Timeout,
            StoreErrorKind::Key => ErrorCode::StoreKey,
            _ => ErrorCode::Failed,
        };
        Self::with_source(code, message, error)
    }

    pub(crate) fn io(message: impl Into<String>, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::NoSpace,
            std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            _ => ErrorCode::Failed,
        };
        Self::with_source(code, message, error)
    }
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for ControlError {}
