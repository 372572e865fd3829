//! Everything that is written to standard output and standard error.

use std::io::{IsTerminal as _, Write as _};

use serde::Serialize;

use crate::cli::OutputFormat;
use crate::error::{CliError, CliResult};

/// Results go to standard output, everything else to standard error.
#[derive(Debug)]
pub(crate) struct Printer {
    format: OutputFormat,
}

impl Printer {
    pub(crate) fn new(format: OutputFormat) -> Self {
        Self { format }
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.format == OutputFormat::Json
    }

    /// Writes a result: the document for programs, or the text for people.
    pub(crate) fn result(&self, document: &impl Serialize, text: impl FnOnce() -> String) -> CliResult<()> {
        let text = match self.format {
            OutputFormat::Json => serde_json::to_string_pretty(document)
                .map_err(|e| CliError::new("cannot write the result as JSON").caused_by(e.to_string()))?,
            OutputFormat::Table => text(),
        };
        self.raw(format!("{}\n", text.trim_end()).as_bytes())
    }

    /// Ends a command that removed several things: those that went are the result, what went wrong
    /// is told, and the last of it is the command's error.
    pub(crate) fn removed(&self, removed: &impl Serialize, mut errors: Vec<CliError>) -> CliResult<()> {
        if self.is_json() {
            self.result(removed, String::new)?;
        }
        let last = errors.pop();
        errors.iter().for_each(|error| self.error(error));
        last.map_or(Ok(()), Err)
    }

    /// Writes bytes to standard output as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) -> CliResult<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| CliError::io("cannot write to standard output", &e))
    }

    /// Tells how things go.
    pub(crate) fn note(&self, line: &str) {
        // Nobody may be listening; that is no reason to stop.
        drop(writeln!(std::io::stderr().lock(), "{line}"));
    }

    /// Tells what went wrong.
    pub(crate) fn error(&self, error: &CliError) {
        if error.is_broken_pipe() {
            return;
        }
        let (bold, plain) = if use_colour() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
        self.note(&format!("{bold}error{plain}: {}", error.message));
        for cause in &error.causes {
            self.note(&format!("  caused by: {cause}"));
        }
        if let Some(hint) = &error.hint {
            self.note(&format!("hint: {hint}"));
        }
    }
}

fn use_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::io::stderr().is_terminal()
}

/// Lays out rows below a heading; columns are as wide as they need to be.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heading.get(column).map(|h| h.chars().count())).max().unwrap_or(0)
    };
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().enumerate().map(|(i, cell)| format!("{cell:<width$}", width = width(i)));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let body = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    std::iter::once(line(heading.to_vec())).chain(body).collect::<Vec<_>>().join("\n")
}

/// Lays out names and values, one pair on each line.
pub(crate) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:<width$}  {value}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_have_no_trailing_spaces() {
        let rows = [vec!["web".to_owned(), "running".to_owned()], vec!["database".to_owned(), "-".to_owned()]];
        assert_eq!(table(&["NAME", "STATE"], &rows), "NAME      STATE\nweb       running\ndatabase  -");
    }
}
