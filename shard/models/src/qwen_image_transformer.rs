//! The Qwen-Image transformer (Qwen team, "Qwen-Image Technical Report", <https://arxiv.org/abs/2508.02324>).
//!
//! Follows diffusers 0.42.1, `models/transformers/transformer_qwenimage.py`: its names, its order, its casts. It differs in
//! the slicing alone: heads and MLP columns are divided over the tensor-parallel ranks, and so is the modulation, which
//! diffusers' plan leaves whole on every rank (a third of the weights). Whole on every rank are only the embedders and
//! `proj_out` (0.1 %: a gather of their outputs would cost more than it saves) and the q/k norms (one head wide). Not here:
//! `use_layer3d_rope` and `use_additional_t_cond` (Qwen-Image-Layered), and clipping, which the reference does in f16 alone.

use parallel::{Linear, Shard, Tensor, Tensors, Weights, ops};
use serde::Deserialize;

use crate::Result;
use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::attention::{Heads, Rope};
use crate::mmdit::embeddings::{Mlp, TIME_CHANNELS, timestep_embedding};
use crate::mmdit::layers::{AdaLayerNorm, EPS, linear};
use crate::mmdit::residuals::Residuals;
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_heads, check_widths, load_if, load_range, not_held, unsupported};

mod block;
mod controlnet;
mod embeddings;

use block::QwenImageTransformerBlock;
pub use controlnet::{QwenImageControlNet, QwenImageControlNetConfig};
use embeddings::{PictureShapes, QwenEmbedRope, padding_bias};

/// Frame, row, column.
const AXES: usize = 3;
/// The reference's factor of a timestep of 0..1.
const TIME_SCALE: f32 = 1000.0;

/// `config.json` of a `QwenImageTransformer2DModel`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct QwenImageTransformerConfig {
    /// Side of a patch of latents; the pipeline packs them, the output layer is as wide as one.
    pub patch_size: usize,
    /// Channels of an image token.
    pub in_channels: usize,
    /// Channels of the latents in an output token; as `in_channels` if not given.
    pub out_channels: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of `encoder_hidden_states` (Qwen2.5-VL's).
    pub joint_attention_dim: usize,
    /// Not supported, nor does the reference's own module take the guidance it announces.
    pub guidance_embeds: bool,
    /// How the width of a head is divided over the axes of the positions.
    pub axes_dims_rope: Vec<usize>,
    /// Whether reference pictures are modulated as at timestep 0 (Qwen-Image-Edit-2511).
    pub zero_cond_t: bool,
    /// Not supported.
    pub use_additional_t_cond: bool,
    /// Not supported.
    pub use_layer3d_rope: bool,
}

impl Default for QwenImageTransformerConfig {
    fn default() -> Self {
        Self {
            patch_size: 2,
            in_channels: 64,
            out_channels: Some(16),
            num_layers: 60,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 3584,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            zero_cond_t: false,
            use_additional_t_cond: false,
            use_layer3d_rope: false,
        }
    }
}

impl QwenImageTransformerConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of an output token.
    pub fn token_channels(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels.unwrap_or(self.in_channels)
    }

    /// Whether this is a network at all, and one of those here.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        check_widths([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels.unwrap_or(self.in_channels)),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
        ])?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        if self.patch_size.saturating_mul(self.patch_size) > MAX_WIDTH || self.token_channels() > MAX_WIDTH {
            return Err(unsupported("patch_size", &self.patch_size));
        }
        if !(1..=MAX_BLOCKS).contains(&self.num_layers) {
            return Err(unsupported("num_layers", &self.num_layers));
        }
        let axes = &self.axes_dims_rope;
        let fits = axes.iter().try_fold(0usize, |sum, dim| sum.checked_add(*dim)) == Some(self.attention_head_dim);
        if axes.len() != AXES || !fits || axes.iter().any(|dim| dim % 2 == 1) {
            return Err(unsupported("axes_dims_rope", axes));
        }
        let absent = [
            ("guidance_embeds", self.guidance_embeds),
            ("use_additional_t_cond", self.use_additional_t_cond),
            ("use_layer3d_rope", self.use_layer3d_rope),
        ];
        match absent.into_iter().find(|(_, on)| *on) {
            Some((field, on)) => Err(unsupported(field, &on)),
            None => Ok(()),
        }
    }

    fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, width: self.attention_head_dim, qk_norm: true }
    }
}

/// `QwenImageTransformer2DModel`, or one rank's part of it.
///
/// Inputs of `embed`: `hidden_states: [B, L_img, C]`, the tokens of all pictures of an item one after the other;
/// `img_shapes: [P, 3]` (u32), the frames (1), rows and columns of each, the target first, the same for all items;
/// `encoder_hidden_states: [B, L_txt, D_txt]`; `timestep: [B]` (of 0..1); if texts are padded
/// `encoder_hidden_states_mask: [B, L_txt]` (0 or 1); and of a ControlNet `controlnet_block_samples.N: [B, L_img, D]`. Output:
/// `sample: [B, L_img, C_out]`.
#[derive(Debug)]
pub struct QwenImageTransformer {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    transformer_blocks: Vec<QwenImageTransformerBlock>,
    start: usize,
    /// On the last range.
    head: Option<Head>,
    zero_cond_t: bool,
    residuals: Residuals,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    pos_embed: QwenEmbedRope,
    timestep_embedder: Mlp,
    txt_norm: Tensor,
    txt_in: Linear,
    img_in: Linear,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    norm_out: AdaLayerNorm,
    proj_out: Linear,
}

impl QwenImageTransformer {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &QwenImageTransformerConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let before = ["time_text_embed", "txt_norm", "txt_in", "img_in"];
        let model = Self {
            embedders: load_if(range.is_first(), w, &before, || Embedders::load(w, config))?,
            transformer_blocks: load_range(w, "transformer_blocks", config.num_layers, range, |w, _| {
                QwenImageTransformerBlock::load(w, config)
            })?,
            start: range.of(config.num_layers).start,
            head: load_if(range.is_last(), w, &["norm_out", "proj_out"], || Head::load(w, config))?,
            zero_cond_t: config.zero_cond_t,
            residuals: Residuals { name: "controlnet_block_samples", blocks: config.num_layers },
        };
        w.finish()?;
        Ok(model)
    }
}

impl Embedders {
    fn load(w: &Weights, config: &QwenImageTransformerConfig) -> Result<Self> {
        let (d, d_txt) = (config.inner_dim(), config.joint_attention_dim);
        Ok(Self {
            pos_embed: QwenEmbedRope::new(&config.axes_dims_rope),
            timestep_embedder: Mlp::load(&w.pp("time_text_embed.timestep_embedder"), TIME_CHANNELS, d)?,
            txt_norm: w.pp("txt_norm").get("weight", &[d_txt], Shard::Replicated)?,
            txt_in: linear(&w.pp("txt_in"), d_txt, d)?,
            img_in: linear(&w.pp("img_in"), config.in_channels, d)?,
        })
    }

    /// With `zero_cond_t`, `temb` is `[2 B, D]`, the second half as at timestep 0.
    fn forward(&self, inputs: &Tensors, zero_cond_t: bool) -> Result<Embedded> {
        let hidden_states = self.img_in.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let (b, l_img, _) = hidden_states.dims3()?;
        let shapes = PictureShapes::of(inputs.get("img_shapes")?, l_img)?;

        let mut timestep = inputs.get("timestep")?.to_dtype(hidden_states.dtype())?;
        if zero_cond_t {
            timestep = Tensor::cat(&[&timestep, &timestep.zeros_like()?], 0)?; // [2 B]
        }
        let timesteps_proj = timestep_embedding(&timestep, TIME_CHANNELS, TIME_SCALE)?.to_dtype(hidden_states.dtype())?;
        let temb = self.timestep_embedder.forward(&timesteps_proj)?;

        let text = ops::rms_norm(inputs.get("encoder_hidden_states")?, &self.txt_norm, EPS)?;
        let encoder_hidden_states = self.txt_in.forward(&text)?; // [B, L_txt, D]
        let l_txt = encoder_hidden_states.dim(1)?;
        let rope = self.pos_embed.forward(&shapes, l_txt, hidden_states.device())?;
        let bias = match inputs.find("encoder_hidden_states_mask") {
            Some(mask) => padding_bias(mask, [b, l_txt], l_img)?,
            None => None,
        };
        Ok(Embedded { hidden_states, encoder_hidden_states, temb, rope, bias })
    }
}

/// What the blocks are given.
struct Embedded {
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rope: Rope,
    bias: Option<Tensor>,
}

impl Head {
    fn load(w: &Weights, config: &QwenImageTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            norm_out: AdaLayerNorm::load(&w.pp("norm_out.linear"), d, 2)?,
            proj_out: linear(&w.pp("proj_out"), d, config.token_channels())?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D]`,
/// `temb: [B, D]` (with `zero_cond_t` `[2 B, D]`, and `img_shapes` as given), `image_rotary_emb.cos` and
/// `.sin: [L_txt + L_img, Dh/2]`, with padded texts `attention_bias: [B, 1, 1, L_txt + L_img]`, and the ControlNet residuals
/// still to be added.
impl BlockModel for QwenImageTransformer {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let Embedded { hidden_states, encoder_hidden_states, temb, rope, bias } = embedders.forward(inputs, self.zero_cond_t)?;
        let mut hidden = Tensors::new()
            .with("hidden_states", hidden_states)
            .with("encoder_hidden_states", encoder_hidden_states)
            .with("temb", temb)
            .with("image_rotary_emb.cos", rope.cos)
            .with("image_rotary_emb.sin", rope.sin);
        if self.zero_cond_t {
            hidden.insert("img_shapes", inputs.get("img_shapes")?.clone());
        }
        if let Some(bias) = bias {
            hidden.insert("attention_bias", bias);
        }
        self.residuals.place(inputs, &mut hidden, |block, residuals| block / self.residuals.blocks.div_ceil(residuals));
        Ok(hidden)
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let temb = hidden.get("temb")?.clone();
        let rope = Rope { cos: hidden.get("image_rotary_emb.cos")?.clone(), sin: hidden.get("image_rotary_emb.sin")?.clone() };
        let bias = hidden.find("attention_bias").cloned();
        let mut hidden_states = hidden.take("hidden_states")?;
        let mut encoder_hidden_states = hidden.take("encoder_hidden_states")?;
        let shapes = || PictureShapes::of(hidden.get("img_shapes")?, hidden_states.dim(1)?);
        let target_tokens = self.zero_cond_t.then(shapes).transpose()?.map(|shapes| shapes.target_tokens());
        let context = block::Context { temb, rope, bias, target_tokens };
        for (index, block) in (self.start..).zip(&self.transformer_blocks) {
            (encoder_hidden_states, hidden_states) = block.forward(&hidden_states, &encoder_hidden_states, &context)?;
            hidden_states = self.residuals.add(hidden_states, &hidden, index)?;
        }
        self.residuals.drop_before(&mut hidden, self.start + self.transformer_blocks.len());
        Ok(hidden.with("hidden_states", hidden_states).with("encoder_hidden_states", encoder_hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let (hidden_states, temb) = (hidden.get("hidden_states")?, hidden.get("temb")?);
        // With zero_cond_t the first half; all tokens, those of reference pictures too, end at the job's own timestep.
        let temb = temb.narrow(0, 0, hidden_states.dim(0)?)?.contiguous()?;
        let hidden_states = head.norm_out.continuous(hidden_states, &temb)?;
        Ok(Tensors::new().with("sample", head.proj_out.forward(&hidden_states)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_configuration_that_cannot_be_or_is_not_here_is_a_typed_error() {
        let good = QwenImageTransformerConfig::default();
        good.validate().unwrap();
        assert_eq!((good.inner_dim(), good.token_channels()), (3072, 64));
        let check = |field: &str, config: QwenImageTransformerConfig| match config.validate() {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        };
        check("num_attention_heads", QwenImageTransformerConfig { num_attention_heads: 0, ..good.clone() });
        check("num_attention_heads", QwenImageTransformerConfig { num_attention_heads: 1 << 20, ..good.clone() });
        check("joint_attention_dim", QwenImageTransformerConfig { joint_attention_dim: usize::MAX, ..good.clone() });
        check("patch_size", QwenImageTransformerConfig { patch_size: 1 << 20, ..good.clone() });
        for num_layers in [0, usize::MAX] {
            check("num_layers", QwenImageTransformerConfig { num_layers, ..good.clone() });
        }
        for axes in [vec![16, 112], vec![16, 56, 54], vec![15, 57, 56], vec![usize::MAX, 56, 56]] {
            check("axes_dims_rope", QwenImageTransformerConfig { axes_dims_rope: axes, ..good.clone() });
        }
        check("guidance_embeds", QwenImageTransformerConfig { guidance_embeds: true, ..good.clone() });
        check("use_additional_t_cond", QwenImageTransformerConfig { use_additional_t_cond: true, ..good.clone() });
        check("use_layer3d_rope", QwenImageTransformerConfig { use_layer3d_rope: true, ..good });
    }
}
