//! `ControlNetModel`: the way down of a U-Net, given a picture besides, whose every output goes through a convolution of 1 x 1.
//!
//! Follows diffusers 0.42.1, `models/controlnets/controlnet.py`. It is cut as the U-Net is; whole on every rank is what embeds the picture (0.1 %). A
//! `ControlNetUnionModel` is given several pictures in one forward ([`super::union`]).

use parallel::convolution::Placement;
use parallel::{ColumnParallelConv2d, Conv2d, Tensor, Tensors, Weights, ops};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::blocks::{Block, Conditions};
use super::union::{Union, UnionConfig};
use super::{DOWN_RESIDUALS, Embedders, MID_RESIDUAL, SIZE, UNet2DConditionConfig};
use crate::control::{Control, ControlNetwork, alone};
use crate::mmdit::{check_fixed, check_widths, unsupported};
use crate::{Error, Result};

/// Most convolutions that halve the picture; published ones have three.
const MAX_HALVINGS: usize = 8;

/// The class of a union network, and what it was called before the reference had it.
pub(crate) const UNIONS: [&str; 2] = ["ControlNetUnionModel", "ControlNetModel_Union"];
/// `conditioning_embedding_out_channels` of one that does not say it.
const UNION_WIDTHS: [usize; 4] = [48, 96, 192, 384];

/// `config.json` of a `ControlNetModel` or a `ControlNetUnionModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlNetConfig {
    /// Of the U-Net that it is the way down of.
    pub unet: UNet2DConditionConfig,
    own: Own,
    /// Of a `ControlNetUnionModel`.
    union: Option<UnionConfig>,
}

/// What it says of the picture.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Own {
    conditioning_channels: usize,
    conditioning_embedding_out_channels: Vec<usize>,
    controlnet_conditioning_channel_order: String,
    global_pool_conditions: bool,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            conditioning_channels: 3,
            conditioning_embedding_out_channels: vec![16, 32, 96, 256],
            controlnet_conditioning_channel_order: "rgb".into(),
            global_pool_conditions: false,
        }
    }
}

impl ControlNetConfig {
    /// From the file's fields. Its row of blocks ends in the middle: that of a U-Net with the same way up is looked at.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that is not what is known here.
    pub fn read(mut config: Map<String, Value>) -> Result<Self> {
        let bad = |error: serde_json::Error| unsupported("config.json", &error.to_string());
        let is_union = config.get("_class_name").and_then(Value::as_str).is_some_and(|class| UNIONS.contains(&class));
        let union = is_union.then(|| serde_json::from_value(Value::Object(config.clone()))).transpose().map_err(bad)?;
        if is_union {
            config.entry("conditioning_embedding_out_channels").or_insert(json!(UNION_WIDTHS));
        }
        let own: Own = serde_json::from_value(Value::Object(config.clone())).map_err(bad)?;
        let up = config.get("down_block_types").and_then(Value::as_array).map(|down| {
            let mirrored = |block: &Value| json!(block.as_str().unwrap_or_default().replace("Down", "Up"));
            down.iter().rev().map(mirrored).collect::<Vec<_>>()
        });
        if let Some(up) = up {
            config.insert("up_block_types".into(), up.into());
        }
        if let Some(channels) = config.get("in_channels").cloned() {
            config.insert("out_channels".into(), channels);
        }
        let unet: UNet2DConditionConfig = serde_json::from_value(Value::Object(config)).map_err(bad)?;
        let read = Self { unet, own, union };
        read.validate()?;
        Ok(read)
    }

    fn validate(&self) -> Result<()> {
        self.unet.validate()?;
        let own = &self.own;
        check_fixed(&self.unet.other, &[("class_embed_type", Value::Null), ("encoder_hid_dim_type", Value::Null)])?;
        if own.conditioning_channels != 3 {
            return Err(unsupported("conditioning_channels", &own.conditioning_channels));
        }
        if !(1..=MAX_HALVINGS).contains(&own.conditioning_embedding_out_channels.len()) {
            return Err(unsupported("conditioning_embedding_out_channels", &own.conditioning_embedding_out_channels));
        }
        check_widths(own.conditioning_embedding_out_channels.iter().map(|c| ("conditioning_embedding_out_channels", *c)))?;
        if !["rgb", "bgr"].contains(&own.controlnet_conditioning_channel_order.as_str()) {
            return Err(unsupported("controlnet_conditioning_channel_order", &own.controlnet_conditioning_channel_order));
        }
        if own.global_pool_conditions {
            return Err(unsupported("global_pool_conditions", &true));
        }
        self.union.as_ref().map_or(Ok(()), |union| union.validate(&self.unet))
    }

    /// Of a union network: how many kinds of pictures it knows.
    pub fn modes(&self) -> Option<usize> {
        self.union.as_ref().map(|union| union.num_control_type)
    }

    /// Pixels of the picture's side to one of the latents'.
    pub fn scale_factor(&self) -> usize {
        1 << (self.own.conditioning_embedding_out_channels.len() - 1)
    }

    /// Channels of what the way up takes again, in the order in which it is put there.
    fn skips(&self) -> Vec<usize> {
        let widths = &self.unet.block_out_channels;
        let mut skips = vec![widths[0]];
        for (at, width) in widths.iter().enumerate() {
            let halved = usize::from(at + 1 < widths.len());
            skips.extend(std::iter::repeat_n(*width, self.unet.layers_per_block + halved));
        }
        skips
    }

    /// How many tensors it gives.
    pub fn residuals(&self) -> usize {
        self.skips().len() + 1
    }
}

/// `ControlNetModel`, or one rank's part of it.
#[derive(Debug)]
pub struct ControlNetModel {
    embedders: Embedders,
    cond_embedding: ConditioningEmbedding,
    /// Those down and the middle one.
    blocks: Vec<Block>,
    down_projections: Vec<ColumnParallelConv2d>,
    mid_projection: ColumnParallelConv2d,
    union: Option<Union>,
    config: ControlNetConfig,
}

impl ControlNetModel {
    /// Reads what this rank holds of `w`, whose group shares every split tensor.
    pub fn load(w: &Weights, config: &ControlNetConfig) -> Result<Self> {
        let unet = &config.unet;
        let c = |i: usize| config.own.conditioning_embedding_out_channels[i];
        let model = Self {
            embedders: Embedders::load(w, unet)?,
            cond_embedding: ConditioningEmbedding::load(&w.pp("controlnet_cond_embedding"), config, c(0))?,
            blocks: (0..=unet.resolutions()).map(|i| Block::load(w, unet, i)).collect::<Result<_>>()?,
            down_projections: config
                .skips()
                .into_iter()
                .enumerate()
                .map(|(i, c)| projection(&w.pp("controlnet_down_blocks").pp(i), c))
                .collect::<Result<_>>()?,
            mid_projection: projection(&w.pp("controlnet_mid_block"), unet.block_out_channels[unet.resolutions() - 1])?,
            union: config.union.as_ref().map(|union| Union::load(w, union, unet)).transpose()?,
            config: config.clone(),
        };
        w.finish()?;
        Ok(model)
    }
}

fn projection(w: &Weights, channels: usize) -> Result<ColumnParallelConv2d> {
    Ok(ColumnParallelConv2d::load(w, [channels, channels], 1)?)
}

impl ControlNetwork for ControlNetModel {
    fn residuals(&self, inputs: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>> {
        let unet = &self.config.unet;
        // A network for inpainting has a mask and a masked picture beside its latents.
        let sample = inputs.get("sample")?.narrow(1, 0, unet.in_channels)?.contiguous()?;
        let mut temb = self.embedders.temb(inputs, unet)?;
        let mut sample = self.embedders.conv_in.forward(&sample, Placement::same(SIZE))?;
        match &self.union {
            None => sample = (sample + self.cond_embedding.forward(alone(controls)?.cond)?)?,
            Some(union) => {
                temb = (temb + union.temb(controls)?)?;
                for control in controls {
                    sample = (sample + union.added(control, &self.cond_embedding.forward(control.cond)?)?)?;
                }
            }
        }
        let temb = ops::silu(&temb)?;
        let given = Conditions { temb: &temb, text: inputs.get("encoder_hidden_states")? };
        let mut skips = vec![sample.clone()];
        for block in &self.blocks {
            sample = match block {
                Block::Down(block) => block.forward(sample, &given, None, &mut skips)?,
                Block::Mid(block) => block.forward(&sample, &given)?,
                Block::Up(_) => return Err(Error::Rank { reason: "a ControlNet has no way up".into() }),
            };
        }
        let project = |conv: &ColumnParallelConv2d, x: &Tensor| conv.forward_gathered(x, Placement::same(1));
        let mut residuals = Vec::with_capacity(skips.len() + 1);
        for (i, (conv, skip)) in self.down_projections.iter().zip(&skips).enumerate() {
            residuals.push((format!("{DOWN_RESIDUALS}.{i}"), project(conv, skip)?));
        }
        residuals.push((MID_RESIDUAL.to_owned(), project(&self.mid_projection, &sample)?));
        Ok(residuals)
    }
}

/// `ControlNetConditioningEmbedding`: a picture at the latents' size.
#[derive(Debug)]
struct ConditioningEmbedding {
    conv_in: Conv2d,
    /// By turns at one size, and halving it.
    blocks: Vec<Conv2d>,
    conv_out: Conv2d,
    /// The picture's channels are turned round.
    bgr: bool,
}

impl ConditioningEmbedding {
    fn load(w: &Weights, config: &ControlNetConfig, first: usize) -> Result<Self> {
        let channels = &config.own.conditioning_embedding_out_channels;
        let mut blocks = Vec::new();
        for pair in channels.windows(2) {
            for c_out in [pair[0], pair[1]] {
                blocks.push(Conv2d::load(&w.pp("blocks").pp(blocks.len()), [pair[0], c_out], SIZE)?);
            }
        }
        let last = channels[channels.len() - 1];
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), [config.own.conditioning_channels, first], SIZE)?,
            blocks,
            conv_out: Conv2d::load(&w.pp("conv_out"), [last, config.unet.block_out_channels[0]], SIZE)?,
            bgr: config.own.controlnet_conditioning_channel_order == "bgr",
        })
    }

    /// `[B, 3, height, width]` in 0..1 gives `[B, C, H, W]`.
    fn forward(&self, cond: &Tensor) -> Result<Tensor> {
        let cond = if self.bgr { reversed(cond)? } else { cond.clone() };
        let mut x = ops::silu(&self.conv_in.forward(&cond, Placement::same(SIZE))?)?;
        for (i, conv) in self.blocks.iter().enumerate() {
            let at = if i % 2 == 0 { Placement::same(SIZE) } else { Placement { stride: 2, before: 1, after: 1 } };
            x = ops::silu(&conv.forward(&x, at)?)?;
        }
        Ok(self.conv_out.forward(&x, Placement::same(SIZE))?)
    }
}

fn reversed(cond: &Tensor) -> Result<Tensor> {
    let plane = |i: usize| cond.narrow(1, i, 1);
    Ok(Tensor::cat(&[plane(2)?, plane(1)?, plane(0)?], 1)?)
}
