//! Progress of long work: a bar for imports, a line for each phase of a boot.

use std::collections::HashSet;

use bulbil_control::{ExportProgress, ImportProgress, InstanceView, ScrubProgress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Printer;

/// The bar of work on the data of a disk, such as `importing`; it is drawn only on a terminal.
pub(crate) fn data_bar(work: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let template = "{msg} {wide_bar} {percent:>3}%  {bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left";
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(work);
    bar
}

/// Shows that a boot is going on; drawn only on a terminal.
pub(crate) fn boot_spinner() -> ProgressBar {
    let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    spinner.set_style(
        ProgressStyle::with_template("  {spinner} {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    spinner.enable_steady_tick(std::time::Duration::from_millis(200));
    spinner
}

/// Shows a step of an import.
pub(crate) fn show(bar: &ProgressBar, step: ImportProgress) {
    bar.set_length(step.total_bytes);
    bar.set_position(step.done_bytes);
}

/// Shows a step of an export or a conversion.
pub(crate) fn show_export(bar: &ProgressBar, step: ExportProgress) {
    bar.set_length(step.total_bytes);
    bar.set_position(step.done_bytes);
}

/// Shows a step of a scrub.
pub(crate) fn show_scrub(bar: &ProgressBar, step: ScrubProgress) {
    bar.set_length(step.total_bytes);
    bar.set_position(step.done_bytes);
}

/// Tells each phase of each instance once.
#[derive(Debug, Default)]
pub(crate) struct BootReport {
    told: HashSet<(String, String, u64)>,
}

impl BootReport {
    /// Writes the phases that are new.
    pub(crate) fn show(&mut self, instance: &InstanceView, several: bool, printer: &Printer) {
        for reached in &instance.run.phases {
            let key = (instance.record.id.to_string(), reached.phase.to_string(), reached.at_ms);
            if self.told.insert(key) {
                let who = if several { format!("{:<12} ", instance.record.name) } else { String::new() };
                let detail = reached.detail.as_deref().map(|detail| format!("  {detail}")).unwrap_or_default();
                printer.note(&format!("  {who}{:<20} {:>7}{detail}", reached.phase, seconds(reached.at_ms)));
            }
        }
    }
}

/// How long ago something was, as people read it.
pub(crate) fn since(started: std::time::Instant) -> String {
    seconds(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
}

/// Milliseconds as people read them: `43.2 s`.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}
