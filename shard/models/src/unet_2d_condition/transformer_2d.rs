//! `Transformer2DModel`: every place of a picture is a token that attends to the others and to the text.

use parallel::{ColumnParallelLinear, RowParallelLinear, Tensor, Weights, ops};

use super::UNet2DConditionConfig;
use super::resnet::GroupNorm;
use crate::Result;
use crate::mmdit::layers::{LayerNorm, row};

/// Of the group norm before the blocks.
const NORM_EPS: f64 = 1e-6;
/// Of the layer norms in them.
const LAYER_NORM_EPS: f64 = 1e-5;
/// The feed-forward part's width over the model's.
const FF_RATIO: usize = 4;

/// Transformer blocks between two projections, and a way round them. Heads and feed-forward columns are divided over the ranks, and the columns
/// of both projections, which are gathered.
#[derive(Debug)]
pub(super) struct Transformer2D {
    norm: GroupNorm,
    proj_in: ColumnParallelLinear,
    transformer_blocks: Vec<BasicTransformerBlock>,
    proj_out: ColumnParallelLinear,
}

impl Transformer2D {
    /// At a resolution of the network.
    pub(super) fn load(w: &Weights, config: &UNet2DConditionConfig, resolution: usize) -> Result<Self> {
        let d = config.block_out_channels[resolution];
        let kernel: &[usize] = if config.use_linear_projection { &[d] } else { &[d, 1, 1] };
        let project = |name| ColumnParallelLinear::load_kernel(&w.pp(name), kernel, &[d]);
        let block = |i| BasicTransformerBlock::load(&w.pp("transformer_blocks").pp(i), config, resolution);
        Ok(Self {
            norm: GroupNorm::load(&w.pp("norm"), d, config.norm_num_groups, NORM_EPS)?,
            proj_in: project("proj_in")?,
            transformer_blocks: (0..config.transformer_layers_per_block.at(resolution)).map(block).collect::<Result<_>>()?,
            proj_out: project("proj_out")?,
        })
    }

    /// `x: [B, C, H, W]` and `text: [B, L, D]` give `[B, C, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let normed = self.norm.forward(x, None)?;
        let tokens = normed.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // [B, C, H, W] -> [B, H W, C]
        let mut tokens = self.proj_in.forward_gathered(&tokens)?;
        for block in &self.transformer_blocks {
            tokens = block.forward(tokens, text)?;
        }
        let tokens = self.proj_out.forward_gathered(&tokens)?;
        let y = tokens.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))?; // [B, H W, C] -> [B, C, H, W]
        Ok((y + x)?)
    }
}

/// `BasicTransformerBlock`: attention among the tokens, attention to the text, feed-forward.
#[derive(Debug)]
struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl BasicTransformerBlock {
    fn load(w: &Weights, config: &UNet2DConditionConfig, resolution: usize) -> Result<Self> {
        let (d, heads) = (config.block_out_channels[resolution], config.heads(resolution));
        let norm = |name| LayerNorm::load(&w.pp(name), d, LAYER_NORM_EPS);
        let attention = |name, d_text| Attention::load(&w.pp(name), [d, d_text], heads);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", d)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", config.cross_attention_dim.at(resolution))?,
            norm3: norm("norm3")?,
            ff: FeedForward::load(&w.pp("ff"), d)?,
        })
    }

    /// `x: [B, L, D]`, `text: [B, L_txt, D_txt]`.
    fn forward(&self, x: Tensor, text: &Tensor) -> Result<Tensor> {
        let normed = self.norm1.forward(&x)?;
        let x = (x + self.attn1.forward(&normed, None)?)?;
        let x = (&x + self.attn2.forward(&self.norm2.forward(&x)?, Some(text))?)?;
        Ok((&x + self.ff.forward(&self.norm3.forward(&x)?)?)?)
    }
}

/// `Attention`, of this rank's heads.
#[derive(Debug)]
struct Attention {
    to_q: ColumnParallelLinear,
    to_k: ColumnParallelLinear,
    to_v: ColumnParallelLinear,
    to_out: RowParallelLinear,
    heads: usize,
}

impl Attention {
    /// Of tokens of width `d` to those of `d_keys`.
    fn load(w: &Weights, [d, d_keys]: [usize; 2], heads: usize) -> Result<Self> {
        let project = |name, d_in| ColumnParallelLinear::load(&w.pp(name), d_in, &[d]);
        Ok(Self {
            to_q: project("to_q", d)?,
            to_k: project("to_k", d_keys)?,
            to_v: project("to_v", d_keys)?,
            to_out: row(&w.pp("to_out.0"), &[d], d)?,
            heads: heads / w.group().size(),
        })
    }

    /// `x: [B, L, D]` attends to `text`, or to itself.
    fn forward(&self, x: &Tensor, text: Option<&Tensor>) -> Result<Tensor> {
        let [q, k, v] = match text {
            None => ColumnParallelLinear::forward_all([&self.to_q, &self.to_k, &self.to_v], x)?,
            Some(text) => {
                let [k, v] = ColumnParallelLinear::forward_all([&self.to_k, &self.to_v], text)?;
                [self.to_q.forward(x)?, k, v]
            }
        };
        let heads = |x: &Tensor| {
            let (b, l, d) = x.dims3()?;
            x.reshape((b, l, self.heads, d / self.heads)) // [B, L, D/tp] -> [B, L, N/tp, Dh]
        };
        let (q, k, v) = (heads(&q)?, heads(&k)?, heads(&v)?);
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        Ok(self.to_out.forward(&ops::attention_of_tokens(&q, &k, &v, scale, None)?)?)
    }
}

/// `FeedForward` with `geglu`.
#[derive(Debug)]
struct FeedForward {
    proj: ColumnParallelLinear,
    out: RowParallelLinear,
}

impl FeedForward {
    fn load(w: &Weights, d: usize) -> Result<Self> {
        let (net, inner) = (w.pp("net"), FF_RATIO * d);
        Ok(Self { proj: ColumnParallelLinear::load(&net.pp("0.proj"), d, &[inner, inner])?, out: row(&net.pp(2), &[inner], d)? })
    }

    /// In between a rank holds `2 * 4D/tp` columns.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.out.forward(&ops::geglu(&self.proj.forward(x)?)?)?)
    }
}
