//! The promise of every network that is cut: the same bits at every layout, and every rank reads its share alone.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use models::Result;
use models::blocks::{BlockModel, Layout, RangeOf};
use parallel::{Tensors, Weights};

use crate::ranks::{Ran, run_block_model};

/// A checkpoint, and which of it belongs where.
pub struct Checkpoint<'a> {
    /// Its folder.
    pub dir: &'a Path,
    /// Its tensors.
    pub tensors: &'a HashMap<String, Tensor>,
    /// Whether a tensor is whole on every rank that holds it.
    pub is_replicated: &'a dyn Fn(&str) -> bool,
    /// Whether a tensor belongs to the ranks of a range.
    pub is_held: &'a dyn Fn(&str, RangeOf) -> bool,
}

impl Checkpoint<'_> {
    /// Runs the network at one rank and at `layouts` (tp and block ranges), and returns the output of one rank.
    ///
    /// # Panics
    /// When an output differs in a bit, or a rank reads anything but its share.
    pub fn check<M: BlockModel>(
        &self,
        layouts: &[(usize, usize)],
        inputs: &Tensors,
        load: impl Fn(&Weights, RangeOf) -> Result<M> + Sync,
    ) -> Tensor {
        let run = |tp, block_ranges| -> Ran {
            run_block_model(self.dir, Layout::new(tp, block_ranges), inputs, &load).expect("the network runs")
        };
        let total: u64 = self.tensors.values().map(bytes).sum();
        let replicated: u64 = self.tensors.iter().filter(|(name, _)| (self.is_replicated)(name)).map(|(_, t)| bytes(t)).sum();
        let solo = run(1, 1);
        let expected = solo.output("sample").expect("an output");
        assert_eq!((solo.total_bytes, &solo.bytes_read), (total, &vec![total]));
        for (tp, block_ranges) in layouts.iter().copied() {
            let ran = run(tp, block_ranges);
            assert_eq!(ran.outputs.len(), tp);
            for output in &ran.outputs {
                assert!(bits(output.get("sample").expect("an output")) == bits(expected), "tp {tp} x {block_ranges}");
            }
            for (rank, read) in ran.bytes_read.iter().enumerate() {
                let range = RangeOf { index: rank / tp, count: block_ranges };
                let held = self.tensors.iter().filter(|(name, _)| (self.is_held)(name, range));
                let mine = |(name, t): (&String, &Tensor)| bytes(t) / if (self.is_replicated)(name) { 1 } else { tp as u64 };
                assert_eq!(*read, held.map(mine).sum::<u64>(), "rank {rank} of tp {tp} x {block_ranges}");
            }
            // Split tensors are read once over all ranks, the replicated ones once per rank.
            assert_eq!(ran.bytes_read.iter().sum::<u64>(), total + (tp as u64 - 1) * replicated);
        }
        expected.clone()
    }
}

impl std::fmt::Debug for Checkpoint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({} tensors)", self.tensors.len())
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

/// All elements, bit by bit.
///
/// # Panics
/// When they are not f32.
pub fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
    values.into_iter().map(f32::to_bits).collect()
}
