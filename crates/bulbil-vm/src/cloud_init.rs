//! Reads what cloud-init leaves in `/run/cloud-init/status.json` and `result.json`.
//!
//! Two forms are understood. At first every stage has `errors`, `start`, `finished` (seconds since 1970). From 23.4
//! on a stage also has `recoverable_errors`, texts by log level; from 24.2 on the times are seconds since the kernel
//! started. `result.json` appears when the last stage is over, with `errors` of all stages.
//!
//! The guest wrote these files: their size and the number of texts are limited, and texts are freed of control
//! characters before anybody prints them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::console::plain_text;

/// Bytes of the largest file that is read; real ones have 1 to 10 KiB.
pub const MAX_STATUS_BYTES: usize = 1 << 20;

/// Texts kept of each kind.
const MAX_MESSAGES: usize = 50;

/// Characters of a text that are kept.
const MAX_MESSAGE_CHARS: usize = 1000;

/// The stages in the order they run. `modules-init` is in old files and never runs.
const STAGES: [&str; 4] = ["init-local", "init", "modules-config", "modules-final"];

/// What cloud-init says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInitReport {
    /// Whether the last stage is over.
    pub done: bool,
    /// The stage that runs now.
    pub stage: Option<String>,
    /// The datasource in cloud-init's words, `DataSourceEc2Local`.
    pub datasource: Option<String>,
    /// What failed.
    pub errors: Vec<String>,
    /// What went wrong but did not stop a stage (23.4 and later): log levels WARNING, ERROR and CRITICAL.
    pub recoverable_errors: Vec<String>,
    /// Use of settings that will go away.
    pub deprecations: Vec<String>,
}

impl CloudInitReport {
    /// Whether something did not happen that was asked for.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        !self.errors.is_empty() || !self.recoverable_errors.is_empty() || self.found_no_datasource()
    }

    /// Whether cloud-init found no metadata at all and so did nothing of what was asked.
    #[must_use]
    pub fn found_no_datasource(&self) -> bool {
        self.datasource.as_deref().is_some_and(|source| source.starts_with("DataSourceNone"))
    }
}

/// The files are not cloud-init's.
#[derive(Debug, thiserror::Error)]
pub enum CloudInitError {
    /// More bytes than any real file has.
    #[error("cloud-init's {file} has {length} bytes, more than {MAX_STATUS_BYTES}")]
    TooLarge {
        /// Which file.
        file: &'static str,
        /// Its length.
        length: usize,
    },
    /// Not JSON.
    #[error("cloud-init's {file} is not valid JSON")]
    NotJson {
        /// Which file.
        file: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// JSON of another form.
    #[error("cloud-init's {file} has no object `v1`")]
    NotVersion1 {
        /// Which file.
        file: &'static str,
    },
}

/// Reads `status.json` and, when it exists already, `result.json`.
///
/// # Errors
/// [`CloudInitError`] when a file is not what cloud-init writes.
pub fn parse_cloud_init_status(status: &str, result: Option<&str>) -> Result<CloudInitReport, CloudInitError> {
    let status = version_1("status.json", status)?;
    let result = result.map(|text| version_1("result.json", text)).transpose()?;
    let mut report = CloudInitReport {
        done: result.is_some() || is_over(&status),
        stage: text_field(&status, "stage"),
        datasource: result.as_ref().and_then(|r| text_field(r, "datasource")).or(text_field(&status, "datasource")),
        ..CloudInitReport::default()
    };
    for stage in STAGES.iter().filter_map(|&name| status.get(name)) {
        add_stage(&mut report, stage);
    }
    if let Some(errors) = result.as_ref().and_then(|result| result.get("errors")) {
        add_texts(&mut report.errors, errors);
    }
    Ok(report)
}

fn version_1(file: &'static str, text: &str) -> Result<Map<String, Value>, CloudInitError> {
    if text.len() > MAX_STATUS_BYTES {
        return Err(CloudInitError::TooLarge { file, length: text.len() });
    }
    let document: Value = serde_json::from_str(text).map_err(|source| CloudInitError::NotJson { file, source })?;
    match document.get("v1") {
        Some(Value::Object(fields)) => Ok(fields.clone()),
        _ => Err(CloudInitError::NotVersion1 { file }),
    }
}

/// Between two stages `stage` is null too, so the last one must have an end.
fn is_over(status: &Map<String, Value>) -> bool {
    let finished = status.get("modules-final").and_then(|stage| stage.get("finished"));
    status.get("stage").is_none_or(Value::is_null) && finished.is_some_and(Value::is_number)
}

fn add_stage(report: &mut CloudInitReport, stage: &Value) {
    if let Some(errors) = stage.get("errors") {
        add_texts(&mut report.errors, errors);
    }
    if let Some(Value::Object(levels)) = stage.get("recoverable_errors") {
        for (level, texts) in levels {
            match level.as_str() {
                "DEPRECATED" => add_texts(&mut report.deprecations, texts),
                _ => add_texts(&mut report.recoverable_errors, texts),
            }
        }
    }
}

fn add_texts(into: &mut Vec<String>, texts: &Value) {
    for text in texts.as_array().into_iter().flatten().filter_map(Value::as_str) {
        let text = clean(text);
        if into.len() < MAX_MESSAGES && !into.contains(&text) {
            into.push(text);
        }
    }
}

fn text_field(fields: &Map<String, Value>, name: &str) -> Option<String> {
    fields.get(name).and_then(Value::as_str).map(clean)
}

fn clean(text: &str) -> String {
    let short: String = text.chars().take(MAX_MESSAGE_CHARS).collect();
    plain_text(&short).lines().map(str::trim).collect::<Vec<_>>().join(" ").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> String {
        let path = format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn version_22_4_done_without_errors() {
        let report = parse_cloud_init_status(
            &fixture("cloud-init-22.4-done.status.json"),
            Some(&fixture("cloud-init-22.4-done.result.json")),
        )
        .unwrap();
        assert!(report.done && !report.is_degraded(), "{report:?}");
        assert_eq!(report.stage, None);
        assert_eq!(report.datasource.as_deref(), Some("DataSourceNoCloud [seed=/dev/vdb][dsmode=net]"));
    }

    #[test]
    fn version_22_4_with_failed_modules_lists_each_error_once() {
        let report = parse_cloud_init_status(
            &fixture("cloud-init-22.4-errors.status.json"),
            Some(&fixture("cloud-init-22.4-errors.result.json")),
        )
        .unwrap();
        assert!(report.done && report.is_degraded());
        assert_eq!(report.errors.len(), 2, "{:?}", report.errors);
        assert!(report.errors[0].contains("Invalid timezone Mars/Olympus"));
        assert!(report.errors[1].contains("scripts-user"));
    }

    #[test]
    fn recoverable_errors_degrade_and_deprecations_do_not() {
        let status = |level: &str| {
            format!(
                r#"{{"v1":{{"datasource":"DataSourceEc2Local","stage":null,
                "init-local":{{"errors":[],"recoverable_errors":{{}},"start":5.1,"finished":6.2}},
                "init":{{"errors":[],"recoverable_errors":{{"{level}":["a text"]}},"start":7.1,"finished":8.2}},
                "modules-config":{{"errors":[],"recoverable_errors":{{}},"start":9.1,"finished":10.2}},
                "modules-final":{{"errors":[],"recoverable_errors":{{}},"start":11.1,"finished":12.2}}}}}}"#
            )
        };
        let deprecated = parse_cloud_init_status(&status("DEPRECATED"), None).unwrap();
        assert!(deprecated.done && !deprecated.is_degraded());
        assert_eq!(deprecated.deprecations, ["a text"]);
        let warning = parse_cloud_init_status(&status("WARNING"), None).unwrap();
        assert!(warning.is_degraded());
        assert_eq!(warning.recoverable_errors, ["a text"]);
    }

    #[test]
    fn a_running_stage_is_not_done() {
        let running = r#"{"v1":{"datasource":null,"stage":"init","init":{"errors":[],"start":7.1,"finished":null}}}"#;
        let report = parse_cloud_init_status(running, None).unwrap();
        assert_eq!((report.done, report.stage.as_deref()), (false, Some("init")));
        let between = r#"{"v1":{"stage":null,"init":{"errors":[],"start":7.1,"finished":8.0},
            "modules-final":{"errors":[],"start":null,"finished":null}}}"#;
        assert!(!parse_cloud_init_status(between, None).unwrap().done);
    }

    #[test]
    fn no_datasource_is_a_problem_of_its_own() {
        let none = r#"{"v1":{"datasource":"DataSourceNone","errors":[]}}"#;
        let report = parse_cloud_init_status(r#"{"v1":{"stage":null}}"#, Some(none)).unwrap();
        assert!(report.done && report.found_no_datasource() && report.is_degraded());
    }

    #[test]
    fn texts_of_the_guest_cannot_steer_a_terminal() {
        let hostile =
            "{\"v1\":{\"datasource\":\"Data\\u001b[2JSource\",\"errors\":[\"a\\u001b]0;title\\u0007b\\nc\"]}}";
        let report = parse_cloud_init_status(r#"{"v1":{}}"#, Some(hostile)).unwrap();
        assert_eq!(report.datasource.as_deref(), Some("Data Source"));
        assert_eq!(report.errors, ["ab c"]);
    }

    #[test]
    fn other_documents_are_refused() {
        assert!(matches!(parse_cloud_init_status("", None), Err(CloudInitError::NotJson { .. })));
        assert!(matches!(parse_cloud_init_status("[]", None), Err(CloudInitError::NotVersion1 { .. })));
        let large = " ".repeat(MAX_STATUS_BYTES + 1);
        assert!(matches!(parse_cloud_init_status(&large, None), Err(CloudInitError::TooLarge { .. })));
    }
}
