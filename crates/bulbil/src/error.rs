//! Errors as people read them: what failed, the causes, the next command to type.

use std::process::ExitCode;

use bulbil_api::ClientError;
use bulbil_control::ControlError;

/// A command that did not do what was asked.
#[derive(Debug)]
pub(crate) struct CliError {
    pub(crate) message: String,
    pub(crate) causes: Vec<String>,
    pub(crate) hint: Option<String>,
    /// Where the API said so: its code, for programs.
    pub(crate) code: Option<bulbil_control::ErrorCode>,
    status: u8,
}

pub(crate) type CliResult<T> = Result<T, CliError>;

impl CliError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), causes: Vec::new(), hint: None, code: None, status: 1 }
    }

    pub(crate) fn io(message: impl Into<String>, error: &std::io::Error) -> Self {
        let broken_pipe = error.kind() == std::io::ErrorKind::BrokenPipe;
        let status = if broken_pipe { 3 } else { 1 };
        Self { causes: vec![error.to_string()], status, ..Self::new(message) }
    }

    pub(crate) fn caused_by(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert(hint.into());
        self
    }

    /// Adds a hint when the API answered with this code.
    pub(crate) fn hint_for(self, code: bulbil_control::ErrorCode, hint: impl Into<String>) -> Self {
        if self.code == Some(code) { self.hint(hint) } else { self }
    }

    /// Adds the command that makes a disk importable that was refused as it is. The words are those
    /// of the importer's refusals, each of which begins with its code.
    pub(crate) fn hint_from_causes(self, file: &std::path::Path) -> Self {
        let says = |word: &str| self.causes.iter().any(|cause| cause.contains(word));
        let verb = if says("has-backing-file") || says("external-data-file") {
            "flatten it first"
        } else if says("unsupported-format") {
            "convert it first"
        } else if says("not a disk image") {
            return self.hint("if it is a raw disk all the same, say so: --format raw");
        } else {
            return self;
        };
        let (file, flat) = (file.display(), file.with_extension("flat.qcow2"));
        self.hint(format!("{verb}: qemu-img convert -O qcow2 {file} {}", flat.display()))
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status)
    }

    /// Whoever reads our output is gone: nobody is left to tell.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        self.status == 3
    }
}

impl From<ControlError> for CliError {
    fn from(error: ControlError) -> Self {
        let code = Some(error.code());
        Self { causes: error.causes().to_vec(), code, ..Self::new(error.to_string()) }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(error) => error.into(),
            other => Self::new(other.to_string()),
        }
    }
}
