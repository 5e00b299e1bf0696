//! `config.json` of DeepFloyd IF's U-Nets.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::Result;
use crate::mmdit::{check_fixed, check_widths, unsupported};
use crate::unet_2d_condition::{OneOrMany, gcd};

/// Most resolutions that are believed; the published ones have 4 and 5.
const MAX_RESOLUTIONS: usize = 8;
/// Most residual blocks at a resolution that are believed; published ones have 8 at most.
const MAX_LAYERS: usize = 256;
/// Groups of the text's norm before attention, whatever the others'.
pub(super) const TEXT_GROUPS: usize = 32;

/// `config.json` of a `UNet2DConditionModel` of DeepFloyd IF.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct IfUNetConfig {
    /// Side of the pictures it was trained on.
    pub sample_size: usize,
    /// Channels of what is denoised, and of the picture beside it (in stages that enlarge).
    pub in_channels: usize,
    /// Channels of the output: of the noise and of its variance.
    pub out_channels: usize,
    /// From the finest resolution to the coarsest.
    pub down_block_types: Vec<IfDownBlockType>,
    /// From the coarsest resolution to the finest.
    pub up_block_types: Vec<IfUpBlockType>,
    /// Channels at each resolution, the finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks at each resolution (on the way up one more).
    pub layers_per_block: OneOrMany,
    /// The WIDTH of a head.
    pub attention_head_dim: usize,
    /// Width of T5's states.
    pub encoder_hid_dim: usize,
    /// Width that they are brought to.
    pub cross_attention_dim: usize,
    /// Groups of every group norm but the text's.
    pub norm_num_groups: usize,
    /// Of the residual blocks' norms.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// `timestep`: the noise level of the picture beside the sample is embedded as the timestep is.
    #[serde(default)]
    pub class_embed_type: Option<String>,
    /// What comes after the timestep's embedding and what is added to it, if anything.
    #[serde(default)]
    pub time_embedding_act_fn: Option<String>,
    /// Channels of the timestep's embedding inside the network, if not four times those of the finest resolution (stages that enlarge).
    #[serde(default)]
    pub time_embedding_dim: Option<usize>,
    /// Whether residual blocks take the timestep's embedding as it is (stages that enlarge), and do not activate it first.
    #[serde(default)]
    pub resnet_skip_time_act: bool,
    /// Whether places attend to the text alone (stages that enlarge), and not to each other: of the network, or of each resolution.
    #[serde(default)]
    pub only_cross_attention: Flags,
    /// The same in the middle, if it is said; else that of a network that says one thing for all, or no.
    #[serde(default)]
    pub mid_block_only_cross_attention: Option<bool>,
    /// Heads that the text is pooled by.
    #[serde(default = "pooling_heads")]
    pub addition_embed_type_num_heads: usize,
    /// What residual blocks are divided by.
    #[serde(default = "one")]
    pub resnet_out_scale_factor: f64,
    /// The same in the middle.
    #[serde(default = "one")]
    pub mid_block_scale_factor: f64,
    /// Whatever else the file says: refused where it would change the network.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

fn norm_eps() -> f64 {
    1e-5
}

fn one() -> f64 {
    1.0
}

fn pooling_heads() -> usize {
    64
}

/// One answer, or one for each resolution.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Flags {
    /// For all.
    One(bool),
    /// From the finest.
    Many(Vec<bool>),
}

impl Default for Flags {
    fn default() -> Self {
        Self::One(false)
    }
}

/// A block on the way to coarser resolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum IfDownBlockType {
    /// Residual blocks.
    ResnetDownsampleBlock2D,
    /// Residual blocks, and attention after each.
    SimpleCrossAttnDownBlock2D,
}

/// A block on the way back to finer resolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum IfUpBlockType {
    /// Residual blocks.
    ResnetUpsampleBlock2D,
    /// Residual blocks, and attention after each.
    SimpleCrossAttnUpBlock2D,
}

/// What must not be said otherwise, as the published configurations say it. The first few must be said.
fn fixed() -> [(&'static str, Value); 17] {
    [
        ("act_fn", json!("gelu")),
        ("addition_embed_type", json!("text")),
        ("cross_attention_norm", json!("group_norm")),
        ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("center_input_sample", json!(false)),
        ("class_embeddings_concat", json!(false)),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("downsample_padding", json!(1)),
        ("dual_cross_attention", json!(false)),
        ("flip_sin_to_cos", json!(true)),
        ("freq_shift", json!(0)),
        ("num_attention_heads", Value::Null),
        ("num_class_embeds", Value::Null),
        ("time_cond_proj_dim", Value::Null),
        ("timestep_post_act", Value::Null),
    ]
}

/// How many of them a file must say: the reference's defaults are others.
const SAID: usize = 5;

impl IfUNetConfig {
    /// How many resolutions there are.
    pub fn resolutions(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Sides of pictures are multiples of this: every resolution is half of the one before.
    pub fn multiple(&self) -> usize {
        1 << self.resolutions().saturating_sub(1).min(MAX_RESOLUTIONS)
    }

    /// Blocks in a row: down, middle, up.
    pub fn blocks(&self) -> usize {
        2 * self.resolutions() + 1
    }

    /// Where the tensors of block `index` of the row are.
    pub(super) fn prefix(&self, index: usize) -> String {
        match index.checked_sub(self.resolutions()) {
            None => format!("down_blocks.{index}"),
            Some(0) => "mid_block".to_owned(),
            Some(up) => format!("up_blocks.{}", up - 1),
        }
    }

    /// Heads at a resolution.
    pub(super) fn heads(&self, resolution: usize) -> usize {
        self.block_out_channels[resolution] / self.attention_head_dim
    }

    fn attends(&self, resolution: usize) -> bool {
        let up = self.up_block_types.get(self.resolutions() - 1 - resolution);
        self.down_block_types.get(resolution) == Some(&IfDownBlockType::SimpleCrossAttnDownBlock2D)
            || up == Some(&IfUpBlockType::SimpleCrossAttnUpBlock2D)
            || resolution + 1 == self.resolutions()
    }

    /// The greatest number that divides the heads of every resolution that attends, the channels' groups and the timestep's channels: over so many ranks they
    /// can be divided.
    pub fn shares(&self) -> usize {
        (0..self.resolutions())
            .filter(|at| self.attends(*at))
            .map(|at| self.heads(at))
            .fold(gcd(self.norm_num_groups, self.time_embed_dim()), gcd)
    }

    /// Channels of the timestep's embedding inside the network.
    pub(super) fn time_embed_dim(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels[0])
    }

    /// Whether places attend to the text alone: at a resolution, or in the middle.
    pub(super) fn attends_to_text_alone(&self, resolution: Option<usize>) -> bool {
        match (resolution, &self.only_cross_attention) {
            (Some(_), Flags::One(all)) => *all,
            (Some(at), Flags::Many(each)) => each.get(at).copied().unwrap_or_default(),
            (None, Flags::One(all)) => self.mid_block_only_cross_attention.unwrap_or(*all),
            (None, Flags::Many(_)) => self.mid_block_only_cross_attention.unwrap_or_default(),
        }
    }

    /// Whether it is told the noise level of a picture beside the sample.
    pub fn has_noise_level(&self) -> bool {
        self.class_embed_type.is_some()
    }

    pub(super) fn activates_time(&self) -> bool {
        self.time_embedding_act_fn.is_some()
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
            ("sample_size", self.sample_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("attention_head_dim", self.attention_head_dim),
            ("encoder_hid_dim", self.encoder_hid_dim),
            ("cross_attention_dim", self.cross_attention_dim),
            ("norm_num_groups", self.norm_num_groups),
            ("addition_embed_type_num_heads", self.addition_embed_type_num_heads),
        ])?;
        check_widths(self.time_embedding_dim.map(|width| ("time_embedding_dim", width)))?;
        let flags = matches!(&self.only_cross_attention, Flags::Many(each) if each.len() != n);
        ok("only_cross_attention", !flags, &self.only_cross_attention)?;
        // Not said, it is what a width of the text's states means.
        let projection = self.other.get("encoder_hid_dim_type").filter(|kind| !kind.is_null() && **kind != "text_proj");
        ok("encoder_hid_dim_type", projection.is_none(), &projection)?;
        ok("down_block_types", self.down_block_types.len() == n, &self.down_block_types)?;
        ok("up_block_types", self.up_block_types.len() == n, &self.up_block_types)?;
        let layers = (0..n).all(|at| (1..=MAX_LAYERS).contains(&self.layers_per_block.at(at)));
        ok("layers_per_block", layers, &self.layers_per_block)?;
        for (at, width) in self.block_out_channels.iter().enumerate() {
            ok("norm_num_groups", width.is_multiple_of(self.norm_num_groups), &self.norm_num_groups)?;
            let whole = !self.attends(at) || width.is_multiple_of(self.attention_head_dim);
            ok("attention_head_dim", whole, &self.attention_head_dim)?;
        }
        // Embeddings are of cosines and sines.
        ok("block_out_channels", self.block_out_channels[0].is_multiple_of(2), &self.block_out_channels)?;
        ok("cross_attention_dim", self.cross_attention_dim.is_multiple_of(TEXT_GROUPS), &self.cross_attention_dim)?;
        let pooled = self.encoder_hid_dim.is_multiple_of(self.addition_embed_type_num_heads);
        ok("addition_embed_type_num_heads", pooled, &self.addition_embed_type_num_heads)?;
        ok("class_embed_type", matches!(self.class_embed_type.as_deref(), None | Some("timestep")), &self.class_embed_type)?;
        let act = matches!(self.time_embedding_act_fn.as_deref(), None | Some("gelu"));
        ok("time_embedding_act_fn", act, &self.time_embedding_act_fn)?;
        let scales =
            [("resnet_out_scale_factor", self.resnet_out_scale_factor), ("mid_block_scale_factor", self.mid_block_scale_factor)];
        for (field, scale) in scales {
            ok(field, scale.is_finite() && scale > 0.0, &scale)?;
        }
        for (field, _) in &fixed()[..SAID] {
            ok(field, self.other.contains_key(*field), &Value::Null)?;
        }
        check_fixed(&self.other, &fixed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// IF-I-XL's, in short.
    fn xl() -> Value {
        json!({
            "act_fn": "gelu", "addition_embed_type": "text", "addition_embed_type_num_heads": 64, "attention_head_dim": 64,
            "block_out_channels": [704, 1408, 2112, 2816], "cross_attention_dim": 2816, "cross_attention_norm": "group_norm",
            "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D",
                "SimpleCrossAttnDownBlock2D"],
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "encoder_hid_dim": 4096, "in_channels": 3, "layers_per_block": 3, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "norm_num_groups": 32, "out_channels": 6, "resnet_skip_time_act": false, "resnet_time_scale_shift": "scale_shift",
            "sample_size": 64
        })
    }

    #[test]
    fn published_networks_are_taken_and_what_would_change_them_is_refused_by_its_name() {
        let of = |value: Value| serde_json::from_value::<IfUNetConfig>(value).unwrap();
        let published = of(xl());
        published.validate().unwrap();
        // 22, 33 and 44 heads and 32 groups have nothing in common.
        assert_eq!((published.shares(), published.blocks(), published.multiple()), (1, 9, 8));
        let check = |field: &str, value: Value| {
            let mut config = xl();
            config[field] = value;
            match of(config).validate() {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        };
        check("act_fn", json!("silu"));
        check("class_embed_type", json!("projection"));
        check("resnet_time_scale_shift", json!("default"));
        check("resnet_out_scale_factor", json!(0.0));
        check("block_out_channels", json!([]));
        check("layers_per_block", json!([3, 3]));
        check("norm_num_groups", json!(3));
        check("attention_head_dim", json!(60));
        check("cross_attention_dim", json!(100));
        check("encoder_hid_dim_type", json!("image_proj"));
        check("only_cross_attention", json!([true]));
        check("time_embedding_dim", json!(0));
        let mut enlarging = xl();
        for (field, value) in [
            ("class_embed_type", json!("timestep")),
            ("encoder_hid_dim_type", json!("text_proj")),
            ("only_cross_attention", json!(true)),
            ("resnet_out_scale_factor", json!(1.41)),
            ("resnet_skip_time_act", json!(true)),
            ("time_embedding_act_fn", json!("gelu")),
            ("time_embedding_dim", json!(1024)),
        ] {
            enlarging[field] = value;
        }
        let enlarging = of(enlarging);
        enlarging.validate().unwrap();
        assert_eq!((enlarging.time_embed_dim(), enlarging.attends_to_text_alone(None)), (1024, true));
        let mut silent = xl();
        silent.as_object_mut().unwrap().remove("cross_attention_norm");
        assert!(matches!(of(silent).validate(), Err(Error::Unsupported { field, .. }) if field == "cross_attention_norm"));
    }
}
