//! The blocks of the row: down to coarser resolutions, the middle, and up again.

use parallel::convolution::Placement;
use parallel::ops::{self, Activation};
use parallel::{ColumnParallelConv2d, ColumnParallelLinear, Tensor, Weights};

use super::attention::AddedKvAttention;
use super::{IfDownBlockType, IfUNetConfig, IfUpBlockType};
use crate::mmdit::layers::with_bias;
use crate::unet_2d_condition::resnet::{GroupNorm, of_time};
use crate::{Error, Result};

/// Side of the kernels.
const SIZE: usize = 3;

/// A block of the row.
#[derive(Debug)]
pub(super) enum Block {
    Down(Level),
    Mid(Box<Middle>),
    Up(Level),
}

/// Two residual blocks, and attention between them.
#[derive(Debug)]
pub(super) struct Middle {
    resnets: [Resnet; 2],
    attention: AddedKvAttention,
}

/// Residual blocks of one resolution, attention after each or after none, and one more that changes the resolution.
#[derive(Debug)]
pub(super) struct Level {
    resnets: Vec<Resnet>,
    attentions: Vec<AddedKvAttention>,
    change: Option<Resnet>,
}

/// What a residual block does to the resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    Halve,
    Double,
}

impl Block {
    /// Block `index` of the row.
    pub(super) fn load(w: &Weights, config: &IfUNetConfig, index: usize) -> Result<Self> {
        let w = w.pp(config.prefix(index));
        match index.checked_sub(config.resolutions()) {
            None => Self::down(&w, config, index),
            Some(0) => Self::mid(&w, config),
            Some(up) => Self::up(&w, config, up - 1),
        }
    }

    fn down(w: &Weights, config: &IfUNetConfig, at: usize) -> Result<Self> {
        let widths = &config.block_out_channels;
        let (c_in, c, scale) = (widths[at.saturating_sub(1)], widths[at], config.resnet_out_scale_factor);
        let layers = config.layers_per_block.at(at);
        let resnet = |i: usize| {
            let channels = [if i == 0 { c_in } else { c }, c];
            Resnet::load(&w.pp("resnets").pp(i), config, channels, Change::None, scale)
        };
        let attends = config.down_block_types[at] == IfDownBlockType::SimpleCrossAttnDownBlock2D;
        let of_text = config.attends_to_text_alone(Some(at));
        let attention = |i: usize| AddedKvAttention::load(&w.pp("attentions").pp(i), config, at, of_text);
        let change = || Resnet::load(&w.pp("downsamplers.0"), config, [c, c], Change::Halve, scale);
        Ok(Self::Down(Level {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            attentions: (0..layers).filter(|_| attends).map(attention).collect::<Result<_>>()?,
            change: (at + 1 < widths.len()).then(change).transpose()?,
        }))
    }

    fn mid(w: &Weights, config: &IfUNetConfig) -> Result<Self> {
        let coarsest = config.resolutions() - 1;
        let (c, scale) = (config.block_out_channels[coarsest], config.mid_block_scale_factor);
        let resnet = |i: usize| Resnet::load(&w.pp("resnets").pp(i), config, [c, c], Change::None, scale);
        let attention = AddedKvAttention::load(&w.pp("attentions.0"), config, coarsest, config.attends_to_text_alone(None))?;
        Ok(Self::Mid(Box::new(Middle { resnets: [resnet(0)?, resnet(1)?], attention })))
    }

    /// The `up`-th on the way up.
    fn up(w: &Weights, config: &IfUNetConfig, up: usize) -> Result<Self> {
        let widths = &config.block_out_channels;
        let at = widths.len() - 1 - up; // its resolution
        let (c, c_before, finer) = (widths[at], widths[(at + 1).min(widths.len() - 1)], widths[at.saturating_sub(1)]);
        let (layers, scale) = (config.layers_per_block.at(at) + 1, config.resnet_out_scale_factor);
        let resnet = |i: usize| {
            let skip = if i + 1 == layers { finer } else { c };
            let before = if i == 0 { c_before } else { c };
            Resnet::load(&w.pp("resnets").pp(i), config, [before + skip, c], Change::None, scale)
        };
        let attends = config.up_block_types[up] == IfUpBlockType::SimpleCrossAttnUpBlock2D;
        let of_text = config.attends_to_text_alone(Some(at));
        let attention = |i: usize| AddedKvAttention::load(&w.pp("attentions").pp(i), config, at, of_text);
        let change = || Resnet::load(&w.pp("upsamplers.0"), config, [c, c], Change::Double, scale);
        Ok(Self::Up(Level {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            attentions: (0..layers).filter(|_| attends).map(attention).collect::<Result<_>>()?,
            change: (at > 0).then(change).transpose()?,
        }))
    }

    /// `x: [B, C, H, W]`, `temb: [B, D]` as residual blocks take it, `text: [B, L, D_cross]`. What the way up takes again is put on `skips` and taken from its end.
    pub(super) fn forward(&self, x: Tensor, temb: &Tensor, text: &Tensor, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        match self {
            Self::Down(level) => level.down(x, temb, text, skips),
            Self::Up(level) => level.up(x, temb, text, skips),
            Self::Mid(middle) => {
                let Middle { resnets: [before, after], attention } = &**middle;
                after.forward(&attention.forward(&before.forward(&x, temb)?, text)?, temb)
            }
        }
    }
}

impl Level {
    fn down(&self, mut x: Tensor, temb: &Tensor, text: &Tensor, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = self.layer(i, resnet, &x, temb, text)?;
            skips.push(x.clone());
        }
        if let Some(change) = &self.change {
            x = change.forward(&x, temb)?;
            skips.push(x.clone());
        }
        Ok(x)
    }

    fn up(&self, mut x: Tensor, temb: &Tensor, text: &Tensor, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().ok_or_else(|| Error::Invalid {
                field: "down_block_res_samples",
                reason: "there are fewer than the way up takes".into(),
            })?;
            x = self.layer(i, resnet, &Tensor::cat(&[&x, &skip], 1)?, temb, text)?;
        }
        match &self.change {
            Some(change) => change.forward(&x, temb),
            None => Ok(x),
        }
    }

    fn layer(&self, i: usize, resnet: &Resnet, x: &Tensor, temb: &Tensor, text: &Tensor) -> Result<Tensor> {
        let x = resnet.forward(x, temb)?;
        match self.attentions.get(i) {
            Some(attention) => attention.forward(&x, text),
            None => Ok(x),
        }
    }
}

/// `ResnetBlock2D` with `scale_shift`: two convolutions, the timestep scaling and shifting what is between them, and a way round them.
///
/// A rank makes its share of each convolution's output channels; the norm between them and the timestep's projection are of those channels
/// alone. Before the second convolution and after it the channels are gathered.
#[derive(Debug)]
pub(super) struct Resnet {
    norm1: GroupNorm,
    conv1: ColumnParallelConv2d,
    time_emb_proj: ColumnParallelLinear,
    norm2: GroupNorm,
    conv2: ColumnParallelConv2d,
    conv_shortcut: Option<ColumnParallelConv2d>,
    change: Change,
    output_scale_factor: f64,
}

impl Resnet {
    fn load(w: &Weights, config: &IfUNetConfig, [c_in, c]: [usize; 2], change: Change, scale: f64) -> Result<Self> {
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let shortcut = || ColumnParallelConv2d::load(&w.pp("conv_shortcut"), [c_in, c], 1);
        let time = w.pp("time_emb_proj");
        Ok(Self {
            norm1: GroupNorm::load(&w.pp("norm1"), c_in, groups, eps)?,
            conv1: ColumnParallelConv2d::load(&w.pp("conv1"), [c_in, c], SIZE)?,
            // A rank has the scales of its channels and their shifts.
            time_emb_proj: of_time(|| Ok(ColumnParallelLinear::load(with_bias(&time)?, config.time_embed_dim(), &[c, c])?))?,
            norm2: GroupNorm::load_split(&w.pp("norm2"), c, groups, eps)?,
            conv2: ColumnParallelConv2d::load(&w.pp("conv2"), [c, c], SIZE)?,
            conv_shortcut: (c_in != c).then(shortcut).transpose()?,
            change,
            output_scale_factor: scale,
        })
    }

    /// `x: [B, C_in, H, W]` and `temb: [B, D]` give `[B, C, H', W']`, all on every rank.
    fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let same = Placement::same(SIZE);
        let h = self.changed(&self.norm1.forward(x, Some(Activation::Gelu))?)?;
        let x = self.changed(x)?;
        let h = self.conv1.forward(&h, same)?; // [B, C/tp, H', W']
        let h = self.modulated(&self.norm2.forward(&h, None)?, temb)?;
        let h = self.conv1.gather(&ops::activate(&h, Activation::Gelu)?)?; // [B, C, H', W']
        let residual = match &self.conv_shortcut {
            Some(conv) => conv.forward(&x, Placement::same(1))?,
            None => self.conv2.own(&x)?,
        };
        let y = (self.conv2.forward_plus(&h, same, &residual)? / self.output_scale_factor)?;
        Ok(self.conv2.gather(&y)?)
    }

    /// `h (1 + scale) + shift`, of this rank's channels.
    fn modulated(&self, h: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let (b, c, _, _) = h.dims4()?;
        let emb = self.time_emb_proj.forward(temb)?; // [B, 2 C/tp]
        let part = |at: usize| emb.narrow(1, at * c, c)?.contiguous()?.reshape((b, c, 1, 1));
        Ok(h.broadcast_mul(&(part(0)? + 1.0)?)?.broadcast_add(&part(1)?)?)
    }

    fn changed(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.change {
            Change::None => x.clone(),
            Change::Halve => x.avg_pool2d(2)?,
            Change::Double => ops::upsample_nearest2x(x)?,
        })
    }
}
