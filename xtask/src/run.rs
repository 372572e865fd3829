//! Running commands: each is echoed to standard error, and a failing one is named with a hint.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The root of the workspace.
pub(crate) fn workspace_root() -> PathBuf {
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest_dir).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// The cargo that started this task.
pub(crate) fn cargo() -> Cmd {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Cmd::new(program).shown_as("cargo")
}

/// Writes one line for the person who watches.
pub(crate) fn say(text: impl AsRef<str>) {
    // Nothing useful can be done when standard error is closed.
    drop(writeln!(std::io::stderr().lock(), "{}", text.as_ref()));
}

/// Writes one line of data, for a program that reads it.
pub(crate) fn print_data(text: impl AsRef<str>) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{}", text.as_ref()).context("cannot write to standard output")
}

/// Writes an error with what caused it.
pub(crate) fn report(error: &anyhow::Error) {
    say(format!("error: {error}"));
    for cause in error.chain().skip(1) {
        say(format!("  caused by: {cause}"));
    }
}

/// Whether a program of this name is in `PATH`, or in the folders where Debian keeps root's.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A command to be run.
pub(crate) struct Cmd {
    command: Command,
    shown_as: Option<String>,
    hint: Option<String>,
    quiet: bool,
}

impl Cmd {
    /// A command that runs in the root of the workspace.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(workspace_root());
        Self { command, shown_as: None, hint: None, quiet: false }
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// The program's name in the echoed line, where the real one is a long path.
    pub(crate) fn shown_as(mut self, name: &str) -> Self {
        self.shown_as = Some(name.to_owned());
        self
    }

    /// What to do when the command fails.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Does not echo the command.
    pub(crate) fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Runs the command with this process's standard streams.
    pub(crate) fn run(mut self) -> Result<()> {
        self.echo();
        let line = self.line();
        let status = self.command.status().with_context(|| self.cannot_start())?;
        if !status.success() {
            bail!(with_hint(format!("`{line}` failed: {status}"), self.hint.as_deref()));
        }
        Ok(())
    }

    /// Runs the command with no output of its own; true when it succeeded.
    pub(crate) fn succeeds(mut self) -> bool {
        self.command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
    }

    /// Runs the command and returns its standard output; its standard error goes to the person.
    pub(crate) fn read(mut self) -> Result<String> {
        self.echo();
        let line = self.line();
        self.command.stdin(Stdio::null()).stderr(Stdio::inherit());
        let Output { status, stdout, .. } = self.command.output().with_context(|| self.cannot_start())?;
        if !status.success() {
            bail!(with_hint(format!("`{line}` failed: {status}"), self.hint.as_deref()));
        }
        String::from_utf8(stdout).with_context(|| format!("`{line}` wrote something other than text"))
    }

    fn echo(&self) {
        if !self.quiet {
            say(format!("+ {}", self.line()));
        }
    }

    fn line(&self) -> String {
        let program = self.command.get_program().to_string_lossy();
        let program = self.shown_as.clone().unwrap_or_else(|| program.into_owned());
        let words =
            std::iter::once(program).chain(self.command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
        words.map(|word| quoted(&word)).collect::<Vec<_>>().join(" ")
    }

    fn cannot_start(&self) -> String {
        with_hint(format!("cannot start `{}`", self.line()), self.hint.as_deref())
    }
}

fn with_hint(message: String, hint: Option<&str>) -> String {
    hint.map_or_else(|| message.clone(), |hint| format!("{message}\nhint: {hint}"))
}

/// A word as a shell would want it typed.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The steps of a task: each is announced and timed.
pub(crate) struct Steps {
    times: Vec<(String, Duration)>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { times: Vec::new() }
    }

    /// Runs one step; a failure names it.
    pub(crate) fn step(&mut self, name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
        say(format!("\n== {name}"));
        let start = Instant::now();
        let result = body().with_context(|| format!("step `{name}` failed"));
        self.times.push((name.to_owned(), start.elapsed()));
        if result.is_err() {
            self.print_times();
        }
        result
    }

    /// Prints how long each step took.
    pub(crate) fn print_times(&self) {
        say("");
        for (name, time) in &self.times {
            say(format!("{:>8.1} s  {name}", time.as_secs_f64()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_spaces_or_quotes_are_quoted() {
        assert_eq!(quoted("a-b=c"), "a-b=c");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn a_failing_command_is_named_with_its_hint() {
        let error = Cmd::new("false").quiet().hint("try true").run().unwrap_err();
        assert_eq!(error.to_string(), "`false` failed: exit status: 1\nhint: try true");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Cmd::new("no-such-program-here").quiet().run().unwrap_err();
        assert_eq!(error.to_string(), "cannot start `no-such-program-here`");
    }
}
