//! What a `ControlNetUnionModel` has besides: one network for pictures of several kinds, given one of each at once.
//!
//! Follows diffusers 0.42.1, `models/controlnets/controlnet_union.py`. Each picture's mean at the latents' size goes, with what its kind is called,
//! through a few layers to a number for each channel, which is added to the picture everywhere. The reference's attention there is over the
//! batch (`nn.MultiheadAttention` with the batch first, not told so). Pictures and passes of a job have the same control pictures, so all that is
//! attended to is one value: attention is its projection, and what it would be of the sample's own mean is never used.

use parallel::ops::{self, Activation};
use parallel::weights::Shard;
use parallel::{Device, Linear, Tensor, Weights};
use serde::Deserialize;

use super::UNet2DConditionConfig;
use super::resnet::of_time;
use crate::control::Control;
use crate::mmdit::embeddings::{Mlp, timestep_embedding};
use crate::mmdit::layers::LayerNorm;
use crate::mmdit::{check_widths, unsupported};
use crate::{Error, Result};

/// Most kinds of pictures, and most layers; published ones have 8 and 1.
const MAX_TYPES: usize = 64;
const MAX_LAYERS: usize = 16;
/// Of the layer norms.
const EPS: f64 = 1e-5;
/// The part of packed projections that is the values'.
const VALUES: usize = 2;

/// What its `config.json` says of that.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct UnionConfig {
    pub(super) num_control_type: usize,
    num_trans_channel: usize,
    num_trans_layer: usize,
    num_proj_channel: usize,
}

impl Default for UnionConfig {
    fn default() -> Self {
        Self { num_control_type: 6, num_trans_channel: 320, num_trans_layer: 1, num_proj_channel: 320 }
    }
}

impl UnionConfig {
    pub(super) fn validate(&self, unet: &UNet2DConditionConfig) -> Result<()> {
        check_widths([("num_trans_channel", self.num_trans_channel)])?;
        let c = unet.block_out_channels[0];
        for (field, value) in [("num_trans_channel", self.num_trans_channel), ("num_proj_channel", self.num_proj_channel)] {
            if value != c {
                return Err(unsupported(field, &value));
            }
        }
        if !(1..=MAX_TYPES).contains(&self.num_control_type) {
            return Err(unsupported("num_control_type", &self.num_control_type));
        }
        if self.num_trans_layer > MAX_LAYERS {
            return Err(unsupported("num_trans_layer", &self.num_trans_layer));
        }
        match unet.addition_time_embed_dim {
            Some(each) => check_widths([("addition_time_embed_dim", each)]),
            None => Err(unsupported("addition_time_embed_dim", &"null")),
        }
    }
}

/// Whole on every rank.
#[derive(Debug)]
pub(super) struct Union {
    /// `[T, C]`: what each kind is called.
    task_embedding: Tensor,
    layers: Vec<Layer>,
    spatial_ch_projs: Linear,
    control_add_embedding: Mlp,
    types: usize,
    /// Sinusoids for each kind.
    each: usize,
}

impl Union {
    pub(super) fn load(w: &Weights, config: &UnionConfig, unet: &UNet2DConditionConfig) -> Result<Self> {
        let (c, types) = (config.num_trans_channel, config.num_control_type);
        let each = unet.addition_time_embed_dim.unwrap_or_default();
        of_time(|| {
            Ok(Self {
                task_embedding: w.get("task_embedding", &[types, c], Shard::Replicated)?,
                layers: (0..config.num_trans_layer)
                    .map(|i| Layer::load(&w.pp("transformer_layes").pp(i), c)) // as the reference spells it
                    .collect::<Result<_>>()?,
                spatial_ch_projs: Linear::load(&w.pp("spatial_ch_projs"), c, config.num_proj_channel)?,
                control_add_embedding: Mlp::load(&w.pp("control_add_embedding"), types * each, unet.time_embed_dim())?,
                types,
                each,
            })
        })
    }

    /// What is added to the timestep's embedding: which kinds there are, `[B, D]`.
    pub(super) fn temb(&self, controls: &[Control<'_>]) -> Result<Tensor> {
        let mut given: Vec<Vec<f32>> = Vec::new();
        for control in controls {
            for (row, mode) in mode(control)?.to_vec1::<u32>()?.into_iter().enumerate() {
                if given.len() <= row {
                    given.resize(row + 1, vec![0.0; self.types]);
                }
                let of_type = given[row].get_mut(mode as usize);
                *of_type.ok_or_else(|| invalid(format!("{mode} is none of {} modes", self.types)))? = 1.0;
            }
        }
        let given = Tensor::new(given, &Device::Cpu)?.to_device(self.task_embedding.device())?;
        let rows = given.dim(0)?;
        self.control_add_embedding.forward(&timestep_embedding(&given, self.each, 1.0)?.reshape((rows, self.types * self.each))?)
    }

    /// What is added to the sample of one control, whose picture at the latents' size is `condition: [B, C, H, W]`.
    pub(super) fn added(&self, control: &Control<'_>, condition: &Tensor) -> Result<Tensor> {
        let scaled = |x: Tensor| -> Result<Tensor> {
            let Some(scale) = control.scale else { return Ok(x) };
            let mut shape = vec![1; x.rank()];
            shape[0] = scale.dim(0)?;
            Ok(x.broadcast_mul(&scale.reshape(shape)?)?)
        };
        let feature = condition.mean((2, 3))?; // [B, C]
        let mut x = scaled((feature + self.task_embedding.index_select(mode(control)?, 0)?)?)?;
        for layer in &self.layers {
            x = layer.forward(&x)?;
        }
        let alpha = scaled(self.spatial_ch_projs.forward(&x)?)?;
        let (b, c) = alpha.dims2()?;
        Ok(scaled(condition.clone())?.broadcast_add(&alpha.reshape((b, c, 1, 1))?)?)
    }
}

fn mode<'a>(control: &Control<'a>) -> Result<&'a Tensor> {
    control.mode.ok_or_else(|| invalid("there is none".into()))
}

fn invalid(reason: String) -> Error {
    Error::Invalid { field: "controls.mode", reason }
}

/// `ResidualAttentionBlock` where there is one value to attend to.
#[derive(Debug)]
struct Layer {
    ln_1: LayerNorm,
    values: Linear,
    out_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    c_proj: Linear,
}

impl Layer {
    fn load(w: &Weights, c: usize) -> Result<Self> {
        let (attn, mlp) = (w.pp("attn"), w.pp("mlp"));
        Ok(Self {
            ln_1: LayerNorm::load(&w.pp("ln_1"), c, EPS)?,
            values: Linear::load_in_proj(&attn, c, VALUES)?,
            out_proj: Linear::load(&attn.pp("out_proj"), c, c)?,
            ln_2: LayerNorm::load(&w.pp("ln_2"), c, EPS)?,
            c_fc: Linear::load(&mlp.pp("c_fc"), c, 4 * c)?,
            c_proj: Linear::load(&mlp.pp("c_proj"), 4 * c, c)?,
        })
    }

    /// `[B, C]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.out_proj.forward(&self.values.forward(&self.ln_1.forward(x)?)?)?)?;
        let inner = ops::activate(&self.c_fc.forward(&self.ln_2.forward(&x)?)?, Activation::QuickGelu)?;
        Ok((x + self.c_proj.forward(&inner)?)?)
    }
}
