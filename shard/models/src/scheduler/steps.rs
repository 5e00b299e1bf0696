//! The part of a schedule that a run goes through, and sums of tensors.

use parallel::{DType, Tensor};

use crate::{Error, Result};

/// The timesteps of a whole schedule, of which a run leaves some out at the beginning.
#[derive(Clone, Debug)]
pub(super) struct Steps {
    all: Vec<f64>,
    begin: usize,
}

impl Steps {
    /// # Errors
    /// [`Error::Invalid`] when nothing is left.
    pub(super) fn new(all: Vec<f64>, begin: usize) -> Result<Self> {
        if begin < all.len() {
            return Ok(Self { all, begin });
        }
        Err(Error::Invalid { field: "strength", reason: format!("no step is left of {} after skipping {begin}", all.len()) })
    }

    /// Those of the run.
    pub(super) fn left(&self) -> &[f64] {
        &self.all[self.begin..]
    }

    /// How many there are in the whole schedule.
    pub(super) fn all(&self) -> usize {
        self.all.len()
    }

    /// The place in the whole schedule of evaluation `step` of the run, and its timestep.
    pub(super) fn at(&self, step: usize) -> Result<(usize, f64)> {
        let place = self.begin.checked_add(step);
        let found = place.and_then(|place| Some((place, *self.all.get(place)?)));
        found.ok_or_else(|| Error::Invalid {
            field: "step",
            reason: format!("{step} is past the end of a schedule of {} steps", self.left().len()),
        })
    }
}

/// The sum of tensors, each times a number, in f32.
pub(super) fn sum(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (factor, tensor) in terms {
        let term = (tensor.to_dtype(DType::F32)? * *factor)?;
        sum = Some(match sum {
            Some(sum) => (sum + term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::Invalid { field: "step", reason: "a sum of nothing".into() })
}
