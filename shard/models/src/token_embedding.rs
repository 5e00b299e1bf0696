//! Token embeddings that are divided over the ranks.

use std::fmt;
use std::sync::Arc;

use parallel::{Collective, DType, Shard, Tensor, Weights};

use crate::Result;

/// A token embedding: each rank holds some of its columns. Most of a small mT5's weights are here.
pub(crate) struct TokenEmbedding {
    weight: Tensor,
    dtype: DType,
    group: Arc<dyn Collective>,
}

impl TokenEmbedding {
    /// Reads `name: [vocab_size, D]`.
    pub(crate) fn load(w: &Weights, name: &str, [vocab_size, d]: [usize; 2]) -> Result<Self> {
        let weight = w.get_narrow(name, &[vocab_size, d], Shard::split(1, d))?;
        Ok(Self { weight, dtype: w.dtype(), group: w.group().clone() })
    }

    /// `[B, L] -> [B, L, D]`
    pub(crate) fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, l) = ids.dims2()?;
        let ids = ids.to_device(self.weight.device())?.flatten_all()?;
        let x = self.weight.index_select(&ids, 0)?.to_dtype(self.dtype)?.reshape((b, l, ()))?; // [B, L, D/tp]
        Ok(self.group.all_gather(&x, 2)?)
    }
}

impl fmt::Debug for TokenEmbedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenEmbedding({:?}, rank {} of {})", self.weight.shape(), self.group.rank(), self.group.size())
    }
}
