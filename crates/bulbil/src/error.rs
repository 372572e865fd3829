//! Errors as people read them: what failed, the causes, the next command to type.

use std::process::ExitCode;

use bulbil_api::ClientError;
use bulbil_control::{ControlError, ErrorCode};

/// Formats that are refused here by these names, and that QEMU reads.
const QEMU_READS: [&str; 6] = ["QED", "Parallels", "Bochs", "cloop", "DMG", "COWD"];

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

    /// A command line that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { status: 2, ..Self::new(message) }
    }

    /// A command that a signal ended, with the status a shell gives to one.
    pub(crate) fn interrupted(message: impl Into<String>, signal: u8) -> Self {
        Self { status: 128 + signal, ..Self::new(message) }
    }

    pub(crate) fn io(message: impl Into<String>, error: &std::io::Error) -> Self {
        let broken_pipe = error.kind() == std::io::ErrorKind::BrokenPipe;
        let status = if broken_pipe { 3 } else { 1 };
        Self { causes: vec![error.to_string()], status, ..Self::new(message) }
    }

    /// What another `bulbil` wrote to its standard error before it ended: its last error, with causes and hint.
    pub(crate) fn of_process(message: &str, stderr: &str) -> Self {
        let lines: Vec<_> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
        let Some(start) = lines.iter().rposition(|line| line.starts_with("error: ")) else {
            return Self::new(message).caused_by(*lines.last().unwrap_or(&"it said nothing"));
        };
        lines[start..].iter().fold(Self::new(message), |error, line| {
            if let Some(cause) = line.strip_prefix("error: ").or_else(|| line.strip_prefix("  caused by: ")) {
                error.caused_by(cause)
            } else if let Some(hint) = line.strip_prefix("hint: ") {
                error.hint(hint)
            } else {
                error
            }
        })
    }

    /// A file that was named cannot be opened.
    pub(crate) fn cannot_open(file: &std::path::Path, error: &std::io::Error) -> Self {
        let failed = Self::io(format!("cannot open `{}`", file.display()), error);
        if is_url(file) { failed.hint(URL_HINT) } else { failed }
    }

    pub(crate) fn caused_by(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert(hint.into());
        self
    }

    /// Replaces a hint by one that knows the command.
    pub(crate) fn hint_instead(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Adds a hint when the API answered with this code.
    pub(crate) fn hint_for(self, code: bulbil_control::ErrorCode, hint: impl Into<String>) -> Self {
        if self.code == Some(code) { self.hint(hint) } else { self }
    }

    /// Adds what to type next when a disk image was refused; `format_option` is the one that says its format. The words
    /// are the codes that refusals begin with.
    pub(crate) fn hint_from_causes(self, file: &std::path::Path, format_option: &str) -> Self {
        let says = |word: &str| self.causes.iter().any(|cause| cause.starts_with(word));
        let ends = |words: &str| self.causes.iter().any(|cause| cause.ends_with(words));
        let shown = file.display();
        let hint = if let Some(hint) = self.hint_of_file_below(says) {
            hint.to_owned()
        } else if is_url(file) {
            URL_HINT.to_owned()
        } else if says("has-backing-file") || says("differencing") {
            "name the image it is based on: --parent FILE".to_owned()
        } else if says("parent-mismatch") && (ends("no parent") || ends("no backing file")) {
            "it needs no other image: leave --parent out".to_owned()
        } else if says("parent-mismatch") {
            "see which parent it needs: bulbil disk info FILE of each".to_owned()
        } else if says("external-extent") {
            "its other files must lie in the directory that is named: --extent-dir DIR".to_owned()
        } else if says("no-such-snapshot") {
            format!("see which there are: bulbil disk info {shown}")
        } else if says("not a disk image") {
            format!("if it is a raw disk all the same, say so: {format_option} raw")
        } else if says("format-mismatch") {
            "leave the format out, and it is recognised".to_owned()
        } else if says("encrypted: the content, with ") {
            format!(
                "decrypt a copy of it: qemu-img convert --object secret,id=key,file=PASSWORD-FILE --image-opts \
                 driver=qcow2,encrypt.key-secret=key,file.filename={shown} -O qcow2 {}",
                flat_name(&shown.to_string())
            )
        } else if says("external-data-file") {
            format!("flatten it first: qemu-img convert -O qcow2 {shown} {}", flat_name(&shown.to_string()))
        } else if says("marked-corrupt") {
            format!("repair a copy of it: qemu-img check -r all {shown}")
        } else if says("unsupported-format")
            && QEMU_READS.iter().any(|name| self.causes.iter().any(|cause| cause.contains(name)))
        {
            format!("convert it first: qemu-img convert -O qcow2 {shown} {}", flat_name(&shown.to_string()))
        } else if says("unsupported-format") && self.causes.iter().any(|cause| cause.ends_with(" archive")) {
            "unpack it first, and take the image in it".to_owned()
        } else if says("sandbox-unavailable") {
            "go on without one, for a file that you trust: --no-sandbox".to_owned()
        } else {
            return self;
        };
        self.hint(hint)
    }

    /// What to type next when it was not the image that was refused but one that it, or a new one, is based on.
    fn hint_of_file_below(&self, says: impl Fn(&str) -> bool) -> Option<&'static str> {
        let needs_another = says("has-backing-file") || says("differencing");
        let is_raw = says("not a disk image");
        if self.message.ends_with(": its backing file cannot be read") {
            return match (needs_another, is_raw || says("format-mismatch")) {
                (true, _) => {
                    Some("it needs another image itself; flatten it first: bulbil disk convert IN OUT --parent FILE")
                }
                (_, true) if is_raw => Some("if it is a raw disk all the same, say so: --backing-format raw"),
                (_, true) => Some("leave --backing-format out, and it is recognised"),
                _ => None,
            };
        }
        if !self.message.contains(": its parent `") && !says("cannot use `") {
            return None;
        }
        match (needs_another, is_raw) {
            (true, _) => Some("name the image that this one is based on as well, after it: --parent FILE"),
            (_, true) => Some(
                "if it is a raw disk all the same, name a copy that says so: bulbil disk convert -f raw IN OUT.qcow2",
            ),
            _ => None,
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status)
    }

    /// Whoever reads our output is gone: nobody is left to tell.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        self.status == 3
    }
}

const URL_HINT: &str = "only files are read: download it first, and check its digest";

/// Whether what was named looks like `https://…`; it is taken for the name of a file all the same.
fn is_url(file: &std::path::Path) -> bool {
    let text = file.to_string_lossy();
    text.split_once("://").is_some_and(|(scheme, _)| !scheme.is_empty() && !scheme.contains('/'))
}

impl From<ControlError> for CliError {
    fn from(error: ControlError) -> Self {
        let code = Some(error.code());
        Self { causes: error.causes().to_vec(), code, ..Self::new(error.to_string()) }
            .hint_for(
                ErrorCode::OtherStore,
                "copy images between stores with `bulbil image copy`, or use another --data-dir",
            )
            .hint_for(
                ErrorCode::StoreKey,
                "say where the key of the store is: --store-key file:PATH or command:PROGRAM",
            )
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

/// The name of a copy of an image that needs no other file.
fn flat_name(file: &str) -> String {
    std::path::Path::new(file).with_extension("flat.qcow2").display().to_string()
}
