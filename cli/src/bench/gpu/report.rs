//! What came of each point of the list, for people or programs.

use parallel::device::Place;
use serde::Serialize;

use crate::error::Error;

/// What came of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Within what it is held against.
    Pass,
    /// Not so, or it could not be done.
    Fail,
    /// A speed, which is neither.
    Measured,
    /// Something that it takes is not here.
    NotRun,
}

/// One point.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    check: String,
    outcome: Outcome,
    /// None where nothing was measured.
    figure: Option<f64>,
    unit: &'static str,
    /// What the figure is held against, or why there is none.
    beside: String,
}

impl Check {
    /// A figure that must not be over `limit`.
    pub(super) fn within(
        check: impl Into<String>,
        figure: f64,
        limit: f64,
        unit: &'static str,
        beside: impl Into<String>,
    ) -> Self {
        // NaN is within nothing.
        let outcome = if figure <= limit { Outcome::Pass } else { Outcome::Fail };
        Self { check: check.into(), outcome, figure: Some(figure), unit, beside: beside.into() }
    }

    /// A speed.
    pub(super) fn measured(check: impl Into<String>, figure: f64, unit: &'static str, beside: impl Into<String>) -> Self {
        Self { check: check.into(), outcome: Outcome::Measured, figure: Some(figure), unit, beside: beside.into() }
    }

    /// What could not be done.
    pub(super) fn fail(check: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { check: check.into(), outcome: Outcome::Fail, figure: None, unit: "", beside: reason.into() }
    }

    /// What was not tried.
    pub(super) fn not_run(check: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { check: check.into(), outcome: Outcome::NotRun, figure: None, unit: "", beside: reason.into() }
    }
}

/// Prints points as they come, and counts.
pub(super) struct Report {
    json: bool,
    counts: [usize; 4],
}

impl Report {
    pub(super) fn new(json: bool, place: Place) -> Self {
        if !json {
            println!("on {place}");
        }
        Self { json, counts: [0; 4] }
    }

    pub(super) fn add(&mut self, check: Check) {
        self.counts[check.outcome as usize] += 1;
        if self.json {
            println!("{}", serde_json::json!(check));
            return;
        }
        let word = ["pass", "FAIL", "", "not run"][check.outcome as usize];
        let figure = check.figure.map_or(String::new(), |figure| match figure {
            small if small != 0.0 && small.abs() < 0.01 => format!("{small:.2e}"),
            figure => format!("{figure:.2}"),
        });
        println!("{word:<8}{:<44} {figure:>10} {:<9} {}", check.check, check.unit, check.beside);
    }

    /// The checks of a part of the list; its error, if it could not be done, is a failed point.
    pub(super) fn take(&mut self, what: &str, checks: models::Result<Vec<Check>>) {
        match checks {
            Ok(checks) => checks.into_iter().for_each(|check| self.add(check)),
            Err(error) => self.add(Check::fail(what, error.to_string())),
        }
    }

    /// The sum; an error if a point failed.
    pub(super) fn finish(self) -> Result<(), Error> {
        let [passed, failed, measured, not_run] = self.counts;
        if !self.json {
            println!("{passed} passed, {failed} failed, {measured} measured, {not_run} not run");
        }
        if failed == 0 { Ok(()) } else { Err(Error::Checks { failed }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_is_within_no_limit() {
        let outcome = |figure| Check::within("x", figure, 1.0, "", "").outcome;
        assert_eq!([0.0, 1.0, 1.5, f64::NAN].map(outcome), [Outcome::Pass, Outcome::Pass, Outcome::Fail, Outcome::Fail]);
    }

    #[test]
    fn one_failed_point_fails_the_list_and_one_not_run_does_not() {
        let mut report = Report::new(true, Place::Cpu);
        report.add(Check::not_run("a", "no second device"));
        report.add(Check::measured("b", 1.0, "GB/s", ""));
        assert!(report.finish().is_ok());
        let mut report = Report::new(true, Place::Cpu);
        report.take("c", Err(models::Error::Cancelled));
        assert!(matches!(report.finish(), Err(Error::Checks { failed: 1 })));
    }
}
