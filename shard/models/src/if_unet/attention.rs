//! `Attention` with `AttnAddedKVProcessor`: every place of a picture attends to the text and to the others at once, or to the text alone.

use parallel::{ColumnParallelLinear, RowParallelLinear, Tensor, Weights, ops};

use super::IfUNetConfig;
use super::config::TEXT_GROUPS;
use crate::Result;
use crate::mmdit::layers::{column, row};
use crate::unet_2d_condition::resnet::GroupNorm;

const EPS: f64 = 1e-5;

/// Of this rank's heads, and a way round it.
#[derive(Debug)]
pub(super) struct AddedKvAttention {
    group_norm: GroupNorm,
    /// Of the text.
    norm_cross: GroupNorm,
    to_q: ColumnParallelLinear,
    /// Keys and values of the picture, where places attend to each other too.
    to_kv: Option<[ColumnParallelLinear; 2]>,
    add_k_proj: ColumnParallelLinear,
    add_v_proj: ColumnParallelLinear,
    to_out: RowParallelLinear,
    /// `N/tp`
    heads: usize,
}

impl AddedKvAttention {
    /// At a resolution of the network; `of_text` says whether to attend to the text alone.
    pub(super) fn load(w: &Weights, config: &IfUNetConfig, resolution: usize, of_text: bool) -> Result<Self> {
        let (d, text) = (config.block_out_channels[resolution], config.cross_attention_dim);
        let own = || -> Result<_> { Ok([column(&w.pp("to_k"), d, d)?, column(&w.pp("to_v"), d, d)?]) };
        Ok(Self {
            group_norm: GroupNorm::load(&w.pp("group_norm"), d, config.norm_num_groups, EPS)?,
            norm_cross: GroupNorm::load(&w.pp("norm_cross"), text, TEXT_GROUPS, EPS)?,
            to_q: column(&w.pp("to_q"), d, d)?,
            to_kv: (!of_text).then(own).transpose()?,
            add_k_proj: column(&w.pp("add_k_proj"), text, d)?,
            add_v_proj: column(&w.pp("add_v_proj"), text, d)?,
            to_out: row(&w.pp("to_out.0"), &[d], d)?,
            heads: config.heads(resolution) / w.group().size(),
        })
    }

    /// `x: [B, C, H, W]` and `text: [B, L, D]` give `[B, C, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let tokens = tokens(&self.group_norm.forward(x, None)?)?; // [B, H W, C]
        let by_channel = text.transpose(1, 2)?.contiguous()?.unsqueeze(3)?; // [B, D, L, 1]
        let text = self::tokens(&self.norm_cross.forward(&by_channel, None)?)?; // [B, L, D]
        let [mut k, mut v] = ColumnParallelLinear::forward_all([&self.add_k_proj, &self.add_v_proj], &text)?;
        let q = match &self.to_kv {
            None => self.to_q.forward(&tokens)?,
            Some([to_k, to_v]) => {
                let [q, own_k, own_v] = ColumnParallelLinear::forward_all([&self.to_q, to_k, to_v], &tokens)?;
                (k, v) = (Tensor::cat(&[k, own_k], 1)?, Tensor::cat(&[v, own_v], 1)?);
                q
            }
        };
        let heads = |x: &Tensor| -> Result<Tensor> {
            let (b, l, d) = x.dims3()?;
            Ok(x.reshape((b, l, self.heads, d / self.heads))?) // [B, L, D/tp] -> [B, L, N/tp, Dh]
        };
        let (q, k, v) = (heads(&q)?, heads(&k)?, heads(&v)?);
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        let out = self.to_out.forward(&ops::attention_of_tokens(&q, &k, &v, scale, None)?)?;
        let out = out.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?; // [B, H W, C] -> [B, C, H, W]
        Ok((out + x)?)
    }
}

/// `[B, C, H, W] -> [B, H W, C]`
fn tokens(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
}
