//! What a row of samples says.

use serde::Serialize;

/// The middle of a row of samples, and how far apart they are.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Half of the samples are below it.
    pub(crate) median: f64,
    /// A quarter of the samples are below it.
    pub(crate) low: f64,
    /// A quarter of the samples are above it.
    pub(crate) high: f64,
    /// How far off the median may be, with a confidence of some 95 % (the notch
    /// of a box plot, McGill, Tukey and Larsen 1978): 1.57 × (high − low) ÷ √n.
    /// Without meaning, and so without bound, for a single sample.
    pub(crate) doubt: f64,
    /// The number of samples.
    pub(crate) samples: usize,
}

impl Summary {
    /// None of nothing.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let low = quantile(&sorted, 0.25)?;
        let high = quantile(&sorted, 0.75)?;
        #[expect(clippy::cast_precision_loss, reason = "a few hundred at most")]
        let root = (samples.len() as f64).sqrt();
        Some(Self {
            median: quantile(&sorted, 0.5)?,
            low,
            high,
            doubt: if samples.len() > 1 {
                1.57 * (high - low) / root
            } else {
                f64::INFINITY
            },
            samples: samples.len(),
        })
    }
}

/// Each sample as a multiple of the one that was taken beside it: what slows
/// both down at the same time falls out.
pub(crate) fn ratios(samples: &[f64], references: &[f64]) -> Vec<f64> {
    samples
        .iter()
        .zip(references)
        .map(|(sample, reference)| sample / reference)
        .collect()
}

/// Between the two nearest of sorted samples, in proportion.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred at most")]
    let at = last as f64 * part;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (sorted[above] - sorted[below]) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_does_not_care_for_outliers() {
        let summary = Summary::of(&[3.0, 1.0, 1000.0, 2.0, 4.0]).unwrap();
        assert_eq!((summary.median, summary.low, summary.high), (3.0, 2.0, 4.0));
        assert_eq!(summary.samples, 5);
        assert!((summary.doubt - 1.57 * 2.0 / 5_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn between_two_samples_lies_their_mean() {
        let summary = Summary::of(&[10.0, 20.0]).unwrap();
        assert_eq!(
            (summary.median, summary.low, summary.high),
            (15.0, 12.5, 17.5)
        );
    }

    #[test]
    fn a_single_sample_proves_nothing() {
        let summary = Summary::of(&[7.0]).unwrap();
        assert_eq!((summary.median, summary.low, summary.high), (7.0, 7.0, 7.0));
        assert!(summary.doubt.is_infinite());
    }

    #[test]
    fn nothing_has_no_middle() {
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn ratios_pair_what_was_measured_together() {
        assert_eq!(ratios(&[2.0, 30.0], &[1.0, 10.0]), [2.0, 3.0]);
    }
}
