//! Results: values of several programs for one measure, as a table and as JSON.

use serde_json::{Value, json};

/// Which values are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// One thing that was measured; Bulbil comes first among its programs.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    name: String,
    unit: &'static str,
    better: Better,
    programs: Vec<Program>,
}

#[derive(Clone, Debug)]
struct Program {
    name: String,
    values: Vec<f64>,
}

impl Program {
    fn best(&self, better: Better) -> f64 {
        match better {
            Better::Lower => self.values.iter().copied().fold(f64::INFINITY, f64::min),
            Better::Higher => self.values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
    }
}

/// All measures of a run, in the order in which they were first named.
#[derive(Debug, Default)]
pub(crate) struct Report {
    measures: Vec<Measure>,
    notes: Vec<String>,
}

impl Report {
    /// Adds one value.
    pub(crate) fn add(&mut self, measure: &str, unit: &'static str, better: Better, program: &str, value: f64) {
        let index = self.measures.iter().position(|known| known.name == measure).unwrap_or_else(|| {
            self.measures.push(Measure { name: measure.to_owned(), unit, better, programs: Vec::new() });
            self.measures.len() - 1
        });
        let programs = &mut self.measures[index].programs;
        match programs.iter_mut().find(|known| known.name == program) {
            Some(known) => known.values.push(value),
            None => programs.push(Program { name: program.to_owned(), values: vec![value] }),
        }
    }

    /// Adds a sentence to be read with the figures.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// The lines of a table for people.
    pub(crate) fn table(&self) -> Vec<String> {
        let name_width = self.measures.iter().map(|measure| measure.name.len()).max().unwrap_or(0);
        let names = self.measures.iter().flat_map(|measure| &measure.programs).map(|program| program.name.len());
        let program_width = names.max().unwrap_or(0);
        let mut lines = vec![format!(
            "{:name_width$}  {:program_width$}  {:>10} {:>10} {:8} {}",
            "measure", "program", "best", "median", "unit", "bulbil beside it, best (median)"
        )];
        for measure in &self.measures {
            for (number, program) in measure.programs.iter().enumerate() {
                let name = if number == 0 { measure.name.as_str() } else { "" };
                let (best, median) = (figure(program.best(measure.better)), figure(program.median()));
                let line = format!(
                    "{name:name_width$}  {:program_width$}  {best:>10} {median:>10} {:8} {}",
                    program.name,
                    measure.unit,
                    measure.comparison(program).unwrap_or_default(),
                );
                lines.push(line.trim_end().to_owned());
            }
        }
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines
    }

    /// The same for programs, with every single value.
    pub(crate) fn json(&self) -> Value {
        let measures: Vec<_> = self.measures.iter().map(Measure::json).collect();
        json!({ "measures": measures, "notes": self.notes })
    }
}

impl Measure {
    fn is_first(&self, program: &Program) -> bool {
        self.programs.first().is_some_and(|first| first.name == program.name)
    }

    /// How many times better the first program is: by best values and by medians.
    fn ratios(&self, program: &Program) -> Option<(f64, f64)> {
        let first = self.programs.first().filter(|_| !self.is_first(program))?;
        let ratio = |first: f64, other: f64| match self.better {
            Better::Lower => other / first,
            Better::Higher => first / other,
        };
        let best = ratio(first.best(self.better), program.best(self.better));
        let median = ratio(first.median(), program.median());
        (best.is_finite() && median.is_finite()).then_some((best, median))
    }

    fn comparison(&self, program: &Program) -> Option<String> {
        let (best, median) = self.ratios(program)?;
        let word = match (self.better, best >= 1.0) {
            (_, true) => "better",
            (_, false) => "WORSE",
        };
        Some(format!("{best:.2}x ({median:.2}x) {word}"))
    }

    fn json(&self) -> Value {
        let programs: Vec<_> = self.programs.iter().map(|program| self.program_json(program)).collect();
        let better = if self.better == Better::Lower { "lower" } else { "higher" };
        json!({ "name": self.name, "unit": self.unit, "better": better, "programs": programs })
    }

    fn program_json(&self, program: &Program) -> Value {
        let ratios = self.ratios(program);
        json!({
            "name": program.name,
            "best": program.best(self.better),
            "median": program.median(),
            "bulbil_ratio_best": ratios.map(|(best, _)| best),
            "bulbil_ratio_median": ratios.map(|(_, median)| median),
            "values": program.values,
        })
    }
}

/// A number with about four significant digits.
fn figure(value: f64) -> String {
    match value.abs() {
        x if x >= 1000.0 => format!("{value:.0}"),
        x if x >= 100.0 => format!("{value:.1}"),
        x if x >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(better: Better) -> Report {
        let mut report = Report::default();
        for (program, values) in [("bulbil", [4.0, 2.0, 3.0]), ("other", [8.0, 6.0, 9.0])] {
            for value in values {
                report.add("wall", "s", better, program, value);
            }
        }
        report
    }

    #[test]
    fn best_median_and_ratio_where_less_is_better() {
        let table = report(Better::Lower).table();
        assert_eq!(table.len(), 3);
        assert_eq!(table[1].split_whitespace().collect::<Vec<_>>(), ["wall", "bulbil", "2.000", "3.000", "s"]);
        assert!(table[2].ends_with("3.00x (2.67x) better"), "{}", table[2]);
    }

    #[test]
    fn a_lower_rate_is_worse() {
        let table = report(Better::Higher).table();
        assert!(table[2].ends_with("0.44x (0.38x) WORSE"), "{}", table[2]);
    }

    #[test]
    fn json_has_every_value_and_no_ratio_of_a_program_to_itself() {
        let json = report(Better::Lower).json();
        let programs = &json["measures"][0]["programs"];
        assert_eq!(programs[0]["values"], json!([4.0, 2.0, 3.0]));
        assert_eq!(programs[0]["bulbil_ratio_best"], Value::Null);
        assert_eq!(programs[1]["bulbil_ratio_best"], json!(3.0));
    }

    #[test]
    fn medians_of_even_counts_lie_between() {
        assert_eq!(Program { name: String::new(), values: vec![4.0, 1.0, 2.0, 9.0] }.median(), 3.0);
    }

    #[test]
    fn nothing_stored_has_no_ratio() {
        let mut report = Report::default();
        report.add("stored", "MiB", Better::Lower, "bulbil", 0.0);
        report.add("stored", "MiB", Better::Lower, "other", 5.0);
        assert!(report.table()[2].ends_with("MiB"));
    }
}
