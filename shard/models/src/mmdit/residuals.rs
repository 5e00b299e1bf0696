//! ControlNet residuals on their way through the block ranges.

use parallel::{Tensor, Tensors};

/// The residuals of one kind of blocks. So that a range need not know how many there were, each travels with the hidden states
/// under the index of the first block that gets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Residuals {
    /// Among the inputs they are `name.0`, `name.1`, ...
    pub(crate) name: &'static str,
    /// How many blocks get one: the first of their kind.
    pub(crate) blocks: usize,
}

impl Residuals {
    /// Puts the residuals among `inputs` with the hidden states. `index(block, residuals)` says which one a block gets.
    pub(crate) fn place(&self, inputs: &Tensors, hidden: &mut Tensors, index: impl Fn(usize, usize) -> usize) {
        let samples = inputs.list(self.name);
        let mut before = None;
        for block in (0..self.blocks).filter(|_| !samples.is_empty()) {
            let mine = index(block, samples.len());
            if let Some(sample) = samples.get(mine).filter(|_| before != Some(mine)) {
                hidden.insert(format!("{}.{block}", self.name), sample.clone());
            }
            before = Some(mine);
        }
    }

    /// `hidden_states` and the residual that block `block` gets, if there is one.
    pub(crate) fn add(&self, hidden_states: Tensor, hidden: &Tensors, block: usize) -> crate::Result<Tensor> {
        match self.of(hidden, block) {
            Some(residual) => Ok((hidden_states + residual)?),
            None => Ok(hidden_states),
        }
    }

    /// The residual that block `block` gets.
    pub(crate) fn of<'a>(&self, hidden: &'a Tensors, block: usize) -> Option<&'a Tensor> {
        self.first(hidden, block).and_then(|first| hidden.find(&format!("{}.{first}", self.name)))
    }

    /// Drops the residuals that no block from `end` on gets.
    pub(crate) fn drop_before(&self, hidden: &mut Tensors, end: usize) {
        let needed = if end < self.blocks { self.first(hidden, end).unwrap_or(end) } else { self.blocks };
        for first in 0..needed {
            // Most indices name no residual.
            let _ = hidden.take(&format!("{}.{first}", self.name));
        }
    }

    /// The first of the blocks that get the same residual as `block`.
    fn first(&self, hidden: &Tensors, block: usize) -> Option<usize> {
        let placed = |first: &usize| hidden.find(&format!("{}.{first}", self.name)).is_some();
        (0..=block).rev().filter(|_| block < self.blocks).find(placed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(name: &str, count: usize) -> Tensors {
        let at = |i: usize| (format!("{name}.{i}"), Tensor::new(&[i as f32], &parallel::Device::Cpu).unwrap());
        (0..count).map(at).collect()
    }

    #[test]
    fn every_block_gets_the_residual_it_is_meant_to_get_whatever_was_dropped_before() {
        for (blocks, count) in [(19, 5), (19, 19), (38, 10), (4, 2), (3, 2), (3, 7), (1, 1), (0, 2)] {
            let whole = |block: usize, count: usize| block / usize::max(blocks, 1).div_ceil(count);
            let part = |block: usize, count: usize| (block as f64 / (blocks as f64 / count as f64)) as usize;
            let rules: [&dyn Fn(usize, usize) -> usize; 2] = [&whole, &part];
            for rule in rules {
                let (residuals, mut hidden) = (Residuals { name: "r", blocks }, Tensors::new());
                residuals.place(&tensors("r", count), &mut hidden, rule);
                for block in 0..blocks {
                    let got = residuals.of(&hidden, block).unwrap().to_vec1::<f32>().unwrap()[0];
                    assert_eq!(got as usize, rule(block, count), "{blocks} blocks, {count} residuals");
                    residuals.drop_before(&mut hidden, block + 1);
                }
                assert!(hidden.is_empty() && residuals.of(&hidden, blocks).is_none());
            }
        }
    }
}
