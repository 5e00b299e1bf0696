//! `config.json` of a `UNet2DConditionModel`.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::Result;
use crate::mmdit::{check_widths, unsupported};

/// Most resolutions that are believed; the published ones have 3 or 4.
const MAX_RESOLUTIONS: usize = 8;
/// Most layers of one kind in a block that are believed; SDXL has 10 transformer blocks in a row.
const MAX_LAYERS: usize = 256;

/// `config.json` of a `UNet2DConditionModel`: what Stable Diffusion 1, 2 and XL have in it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct UNet2DConditionConfig {
    /// Side of the latents the model was trained on.
    pub sample_size: Option<usize>,
    /// Channels of what is denoised, and of what comes beside it (inpainting: a mask and a masked picture).
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// From the finest resolution to the coarsest.
    pub down_block_types: Vec<DownBlockType>,
    /// From the coarsest resolution to the finest.
    pub up_block_types: Vec<UpBlockType>,
    /// Channels at each resolution, the finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks at each resolution (on the way up one more).
    pub layers_per_block: usize,
    /// Transformer blocks after each residual block, at each resolution.
    pub transformer_layers_per_block: OneOrMany,
    /// The NUMBER of heads at each resolution; see `num_attention_heads`.
    pub attention_head_dim: OneOrMany,
    /// The same, where `attention_head_dim` would say it otherwise.
    pub num_attention_heads: Option<OneOrMany>,
    /// Width of `encoder_hidden_states`, at each resolution.
    pub cross_attention_dim: OneOrMany,
    /// Whether the layers around transformer blocks are stored as linear layers, not as convolutions of 1 x 1.
    pub use_linear_projection: bool,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Of the residual blocks' norms.
    pub norm_eps: f64,
    /// `text_time` (XL): the pooled text and six numbers are embedded beside the timestep.
    pub addition_embed_type: Option<String>,
    /// Channels of each of those numbers.
    pub addition_time_embed_dim: Option<usize>,
    /// Channels of the pooled text and those numbers together.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Channels of the guidance scale's embedding (latent consistency models).
    pub time_cond_proj_dim: Option<usize>,
    /// Whatever else the file says: refused where it would change the network.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// A number for all resolutions, or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// For all.
    One(usize),
    /// For each, the finest first.
    Many(Vec<usize>),
}

impl OneOrMany {
    /// That of a resolution; 0 where there is none.
    pub fn at(&self, resolution: usize) -> usize {
        match self {
            Self::One(n) => *n,
            Self::Many(all) => all.get(resolution).copied().unwrap_or_default(),
        }
    }

    /// Whether there is one for each of `resolutions`, within `bounds`.
    fn fits(&self, resolutions: usize, bounds: Range<usize>) -> bool {
        match self {
            Self::One(n) => bounds.contains(n),
            Self::Many(all) => all.len() == resolutions && all.iter().all(|n| bounds.contains(n)),
        }
    }
}

/// A block on the way to coarser resolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks.
    DownBlock2D,
    /// Residual blocks, and transformer blocks after each.
    CrossAttnDownBlock2D,
}

/// A block on the way back to finer resolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks.
    UpBlock2D,
    /// Residual blocks, and transformer blocks after each.
    CrossAttnUpBlock2D,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        use DownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
        use UpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            down_block_types: vec![CrossAttnDownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D, DownBlock2D],
            up_block_types: vec![UpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D],
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: 2,
            transformer_layers_per_block: OneOrMany::One(1),
            attention_head_dim: OneOrMany::One(8),
            num_attention_heads: None,
            cross_attention_dim: OneOrMany::One(1280),
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            time_cond_proj_dim: None,
            other: BTreeMap::new(),
        }
    }
}

/// What must not be said otherwise, as the published configurations of these families say it.
fn fixed() -> [(&'static str, Value); 26] {
    [
        ("act_fn", json!("silu")),
        ("attention_type", json!("default")),
        ("center_input_sample", json!(false)),
        ("class_embed_type", Value::Null),
        ("class_embeddings_concat", json!(false)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("cross_attention_norm", Value::Null),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("encoder_hid_dim", Value::Null),
        ("encoder_hid_dim_type", Value::Null),
        ("flip_sin_to_cos", json!(true)),
        ("freq_shift", json!(0)),
        ("mid_block_only_cross_attention", Value::Null),
        ("mid_block_scale_factor", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("num_class_embeds", Value::Null),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1.0)),
        ("resnet_skip_time_act", json!(false)),
        ("resnet_time_scale_shift", json!("default")),
        ("reverse_transformer_layers_per_block", Value::Null),
        ("time_embedding_act_fn", Value::Null),
        ("time_embedding_dim", Value::Null),
        ("time_embedding_type", json!("positional")),
    ]
}

/// Of the same number written in another way, as `1` and `1.0`.
fn same(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}

impl UNet2DConditionConfig {
    /// How many resolutions there are.
    pub fn resolutions(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Sides of latents are multiples of this: every resolution is half of the one before.
    pub fn multiple(&self) -> usize {
        1 << self.resolutions().saturating_sub(1).min(MAX_RESOLUTIONS)
    }

    /// Pixels to one place of what a T2I-Adapter adds to at each resolution, where `scale_factor` are to one of the latents: a block without transformer blocks
    /// is added to after it has halved.
    pub fn intrablock_scales(&self, scale_factor: usize) -> Vec<usize> {
        let last = self.resolutions() - 1;
        let halved = |i: usize| i < last && self.down_block_types.get(i) == Some(&DownBlockType::DownBlock2D);
        (0..=last).map(|i| scale_factor << (i + usize::from(halved(i)))).collect()
    }

    /// Blocks in a row: down, middle, up.
    pub fn blocks(&self) -> usize {
        2 * self.resolutions() + 1
    }

    /// Heads at a resolution.
    pub fn heads(&self, resolution: usize) -> usize {
        self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim).at(resolution)
    }

    /// Whether there are transformer blocks at a resolution.
    pub(super) fn attends(&self, resolution: usize) -> bool {
        let up = self.resolutions().checked_sub(resolution + 1).and_then(|up| self.up_block_types.get(up));
        self.down_block_types.get(resolution) == Some(&DownBlockType::CrossAttnDownBlock2D)
            || up == Some(&UpBlockType::CrossAttnUpBlock2D)
            || resolution + 1 == self.resolutions()
    }

    /// The greatest number that divides the heads of every resolution that attends, and the channels' groups: over so many ranks they can be
    /// divided.
    pub fn shares(&self) -> usize {
        let heads = (0..self.resolutions()).filter(|at| self.attends(*at)).map(|at| self.heads(at));
        heads.fold(self.norm_num_groups, gcd)
    }

    /// Channels of the timestep's embedding inside the network.
    pub(super) fn time_embed_dim(&self) -> usize {
        4 * self.block_out_channels.first().copied().unwrap_or_default()
    }

    /// Whether the pooled text and some numbers are embedded beside the timestep.
    pub fn has_text_time(&self) -> bool {
        self.addition_embed_type.is_some()
    }

    /// How many numbers are embedded beside the pooled text of `text` channels.
    pub fn time_ids(&self, text: usize) -> Option<usize> {
        let (all, each) = (self.projection_class_embeddings_input_dim?, self.addition_time_embed_dim?);
        all.checked_sub(text).filter(|rest| each > 0 && rest.is_multiple_of(each)).map(|rest| rest / each)
    }

    /// Whether this is a network that is known here.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) with the first field that is not.
    pub fn validate(&self) -> Result<()> {
        let n = self.resolutions();
        let ok =
            |field: &str, good: bool, value: &dyn std::fmt::Debug| if good { Ok(()) } else { Err(unsupported(field, value)) };
        ok("block_out_channels", (1..=MAX_RESOLUTIONS).contains(&n), &self.block_out_channels)?;
        check_widths(self.block_out_channels.iter().map(|width| ("block_out_channels", *width)))?;
        check_widths([
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("norm_num_groups", self.norm_num_groups),
        ])?;
        ok("down_block_types", self.down_block_types.len() == n, &self.down_block_types)?;
        ok("up_block_types", self.up_block_types.len() == n, &self.up_block_types)?;
        ok("layers_per_block", (1..=MAX_LAYERS).contains(&self.layers_per_block), &self.layers_per_block)?;
        let layers = &self.transformer_layers_per_block;
        ok("transformer_layers_per_block", layers.fits(n, 1..MAX_LAYERS), layers)?;
        let heads = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim);
        ok("attention_head_dim", heads.fits(n, 1..crate::mmdit::MAX_WIDTH), heads)?;
        ok("cross_attention_dim", self.cross_attention_dim.fits(n, 1..crate::mmdit::MAX_WIDTH), &self.cross_attention_dim)?;
        for (at, width) in self.block_out_channels.iter().enumerate() {
            ok("norm_num_groups", width.is_multiple_of(self.norm_num_groups), &self.norm_num_groups)?;
            ok("attention_head_dim", !self.attends(at) || width.is_multiple_of(self.heads(at)), &self.heads(at))?;
        }
        // Embeddings are of cosines and sines.
        ok("block_out_channels", self.block_out_channels[0].is_multiple_of(2), &self.block_out_channels)?;
        self.validate_embeddings()?;
        for (field, value) in fixed() {
            let found = self.other.get(field).unwrap_or(&value);
            ok(field, same(found, &value), found)?;
        }
        Ok(())
    }

    fn validate_embeddings(&self) -> Result<()> {
        match self.addition_embed_type.as_deref() {
            None => {}
            Some("text_time") => {
                let each = self.addition_time_embed_dim.unwrap_or_default();
                if each == 0 || !each.is_multiple_of(2) {
                    return Err(unsupported("addition_time_embed_dim", &self.addition_time_embed_dim));
                }
                let all = self.projection_class_embeddings_input_dim.unwrap_or_default();
                check_widths([("addition_time_embed_dim", each), ("projection_class_embeddings_input_dim", all)])?;
            }
            Some(other) => return Err(unsupported("addition_embed_type", &other)),
        }
        check_widths(self.time_cond_proj_dim.map(|width| ("time_cond_proj_dim", width)))
    }
}

pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn of(json: Value) -> UNet2DConditionConfig {
        serde_json::from_value(json).unwrap()
    }

    /// SDXL base's, in short.
    fn xl() -> UNet2DConditionConfig {
        of(json!({
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048, "use_linear_projection": true, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1,
        }))
    }

    #[test]
    fn heads_are_shared_only_where_there_are_any() {
        xl().validate().unwrap();
        // 5 heads at a resolution that does not attend do not count.
        assert_eq!((xl().shares(), xl().blocks(), xl().time_ids(1280)), (2, 7, Some(6)));
        let published = UNet2DConditionConfig::default();
        published.validate().unwrap();
        assert_eq!((published.shares(), published.blocks()), (8, 9));
    }

    #[test]
    fn what_would_change_the_network_is_refused_by_its_name() {
        let check = |field: &str, value: Value| {
            let mut config = json!({});
            config[field] = value;
            match of(config).validate() {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        };
        check("class_embed_type", json!("timestep"));
        check("encoder_hid_dim_type", json!("text_proj"));
        check("resnet_time_scale_shift", json!("scale_shift"));
        check("resnet_out_scale_factor", json!(1.5));
        check("block_out_channels", json!([]));
        check("block_out_channels", json!([320, 640, 1280, usize::MAX]));
        check("layers_per_block", json!(0));
        check("norm_num_groups", json!(3));
        check("attention_head_dim", json!(7));
        check("attention_head_dim", json!([8, 8]));
        check("addition_embed_type", json!("image"));
    }
}
