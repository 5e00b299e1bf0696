//! Which heads a rank computes.

use std::ops::Range;

use parallel::linear::share;
use parallel::{Collective, Tensor, ops};

use crate::Result;

/// A rank's share of an attention.
///
/// The projection that follows is cut by its input features, equally whatever the heads are. A head that the cut goes through is
/// computed by the ranks on both sides (28 heads over 8 ranks: four each, where three and a half are needed), and heads of keys
/// and values are on every rank that has one of their queries. So a head's bits are the same at every tp.
#[derive(Clone, Debug)]
pub(super) struct HeadShare {
    heads: Range<usize>,
    kv_heads: Range<usize>,
    /// Heads of queries for each of keys and values.
    per_kv: usize,
    /// `Dh`.
    width: usize,
    /// Features of the first head that are another rank's.
    before: usize,
    /// Features this rank hands on.
    features: usize,
}

impl HeadShare {
    /// Of `heads`, with `kv_heads` that divide them, each `width` wide.
    pub(super) fn new([heads, kv_heads, width]: [usize; 3], group: &dyn Collective) -> Self {
        let features = share(heads * width, group);
        let mine = features.start / width..features.end.div_ceil(width);
        let per_kv = heads / kv_heads;
        Self {
            kv_heads: mine.start / per_kv..mine.end.div_ceil(per_kv),
            before: features.start - mine.start * width,
            features: features.len(),
            heads: mine,
            per_kv,
            width,
        }
    }

    /// Rows of the queries' weight, which begin at row `first` of it.
    pub(super) fn query_rows(&self, first: usize) -> Range<usize> {
        first + self.heads.start * self.width..first + self.heads.end * self.width
    }

    /// Rows of the keys' or the values' weight, which begin at row `first` of it.
    pub(super) fn kv_rows(&self, first: usize) -> Range<usize> {
        first + self.kv_heads.start * self.width..first + self.kv_heads.end * self.width
    }

    /// `[B, L, (N here) Dh] -> [B, N here, L, Dh]`
    pub(super) fn split_queries(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::split_heads(x, self.heads.len())?)
    }

    /// The same for keys or values.
    pub(super) fn split_kv(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::split_heads(x, self.kv_heads.len())?)
    }

    /// Keys or values `[B, N_kv here, L, Dh]` for each head of queries: `[B, N here, L, Dh]`.
    pub(super) fn spread(&self, x: &Tensor) -> Result<Tensor> {
        if self.per_kv == 1 {
            return Ok(x.clone());
        }
        let of: Vec<u32> = self.heads.clone().map(|head| (head / self.per_kv - self.kv_heads.start) as u32).collect();
        Ok(x.index_select(&Tensor::from_vec(of, self.heads.len(), x.device())?, 1)?)
    }

    /// What this rank hands on of its heads: `[B, N here, L, Dh] -> [B, L, N Dh/tp]`.
    pub(super) fn merge(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::merge_heads(x)?.narrow(2, self.before, self.features)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use parallel::collective::Placeholder;

    use super::*;

    fn shares(heads: [usize; 3], tp: usize) -> Vec<HeadShare> {
        (0..tp).map(|rank| HeadShare::new(heads, &Placeholder { rank, size: tp })).collect()
    }

    #[test]
    fn twenty_eight_heads_over_eight_ranks_are_four_each_with_the_one_or_two_they_listen_to() {
        let shares = shares([28, 4, 128], 8);
        let heads: Vec<Range<usize>> = shares.iter().map(|s| s.heads.clone()).collect();
        assert_eq!(heads, [0..4, 3..7, 7..11, 10..14, 14..18, 17..21, 21..25, 24..28]);
        let kv: Vec<Range<usize>> = shares.iter().map(|s| s.kv_heads.clone()).collect();
        assert_eq!(kv, [0..1, 0..1, 1..2, 1..2, 2..3, 2..3, 3..4, 3..4]);
        assert!(shares.iter().all(|s| s.features == 448 && (s.before == 0 || s.before == 64)));
        assert_eq!((shares[1].query_rows(0), shares[1].kv_rows(1000)), (384..896, 1000..1128));
    }

    #[test]
    fn every_feature_is_handed_on_once() {
        for (heads, kv_heads, width) in [(28, 4, 128), (4, 2, 8), (16, 16, 80), (2, 1, 4), (12, 6, 2)] {
            for tp in [1, 2, 4, 8] {
                let mut next = 0;
                for share in shares([heads, kv_heads, width], tp) {
                    assert_eq!(share.heads.start * width + share.before, next);
                    next += share.features;
                    assert!(share.heads.end * width >= next && share.heads.end <= heads && share.kv_heads.end <= kv_heads);
                    let per_kv = heads / kv_heads;
                    assert!(share.heads.clone().all(|head| share.kv_heads.contains(&(head / per_kv))));
                }
                assert_eq!(next, heads * width);
            }
        }
    }
}
