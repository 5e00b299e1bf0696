//! Figures side by side, for people or programs.

/// One figure.
#[derive(Debug)]
pub(super) struct Row {
    /// What was measured.
    pub(super) what: String,
    pub(super) figure: f64,
    pub(super) unit: &'static str,
    /// What it is measured against: in the same run, or wanted.
    pub(super) beside: String,
}

impl Row {
    pub(super) fn new(what: impl Into<String>, figure: f64, unit: &'static str, beside: impl Into<String>) -> Self {
        Self { what: what.into(), figure, unit, beside: beside.into() }
    }
}

/// Writes the rows to standard output.
pub(super) fn print(rows: &[Row], json: bool) {
    if json {
        for Row { what, figure, unit, beside } in rows {
            println!("{{\"what\":{what:?},\"figure\":{figure},\"unit\":{unit:?},\"beside\":{beside:?}}}");
        }
        return;
    }
    let width = rows.iter().map(|row| row.what.chars().count()).max().unwrap_or_default();
    for Row { what, figure, unit, beside } in rows {
        println!("{what:width$}  {figure:>12.2} {unit:<8} {beside}");
    }
}

/// The value below which `share` of the samples lie.
pub(super) fn percentile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let last = samples.len().saturating_sub(1);
    samples.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_samples() {
        let mut samples = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 1.0].map(|share| percentile(&mut samples, share)), [1.0, 3.0, 5.0]);
        assert!(percentile(&mut [], 0.5).is_nan());
    }
}
