//! `FluxControlNetModel`: some blocks like those of FLUX.1, given a picture's latents besides, whose every output goes through a linear layer.
//!
//! Follows diffusers 0.42.1, `models/controlnets/controlnet_flux.py`. It is cut as the transformer is.

use parallel::{ColumnParallelLinear, Linear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;

use super::blocks::{FluxSingleTransformerBlock, FluxTransformerBlock};
use super::{Embedders, FluxTransformerConfig};
use crate::control::{Control, ControlNetwork, alone};
use crate::mmdit::attention::Rope;
use crate::mmdit::layers::{column, linear};
use crate::mmdit::{check_heads, check_widths, unsupported};
use crate::{Error, Result};

/// `config.json` of a `FluxControlNetModel`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FluxControlNetConfig {
    /// Of the blocks.
    #[serde(flatten)]
    pub transformer: FluxTransformerConfig,
    /// How many kinds of pictures it knows ("union"); none: one.
    pub num_mode: Option<usize>,
    /// Channels of a picture that is embedded as it is, not as latents. Not here.
    pub conditioning_embedding_channels: Option<usize>,
}

impl FluxControlNetConfig {
    /// Whether this is a network that is known here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        self.transformer.validate()?;
        if let Some(channels) = self.conditioning_embedding_channels {
            return Err(unsupported("conditioning_embedding_channels", &channels));
        }
        check_widths(self.num_mode.map(|modes| ("num_mode", modes)))
    }
}

/// `FluxControlNetModel`, or one rank's part of it.
#[derive(Debug)]
pub struct FluxControlNet {
    embedders: Embedders,
    controlnet_x_embedder: Linear,
    /// `[modes, D]`
    controlnet_mode_embedder: Option<Tensor>,
    transformer_blocks: Vec<(FluxTransformerBlock, ColumnParallelLinear)>,
    single_transformer_blocks: Vec<(FluxSingleTransformerBlock, ColumnParallelLinear)>,
}

impl FluxControlNet {
    /// Reads what this rank holds of `w`, whose group shares every split tensor.
    pub fn load(w: &Weights, config: &FluxControlNetConfig) -> Result<Self> {
        config.validate()?;
        let transformer = &config.transformer;
        check_heads(w, transformer.num_attention_heads)?;
        let d = transformer.inner_dim();
        let projection = |name: &str, i: usize| column(&w.pp(name).pp(i), d, d);
        let double = |i: usize| {
            let block = FluxTransformerBlock::load(&w.pp("transformer_blocks").pp(i), transformer)?;
            Ok((block, projection("controlnet_blocks", i)?))
        };
        let single = |i: usize| {
            let block = FluxSingleTransformerBlock::load(&w.pp("single_transformer_blocks").pp(i), transformer)?;
            Ok((block, projection("controlnet_single_blocks", i)?))
        };
        let modes = |modes| w.pp("controlnet_mode_embedder").get("weight", &[modes, d], Shard::Replicated);
        let network = Self {
            embedders: Embedders::load(w, transformer)?,
            controlnet_x_embedder: linear(&w.pp("controlnet_x_embedder"), transformer.in_channels, d)?,
            controlnet_mode_embedder: config.num_mode.map(modes).transpose()?,
            transformer_blocks: (0..transformer.num_layers).map(double).collect::<Result<_>>()?,
            single_transformer_blocks: (0..transformer.num_single_layers).map(single).collect::<Result<_>>()?,
        };
        w.finish()?;
        Ok(network)
    }

    /// Of a network with modes, the text and its positions with one token more before them: the mode's.
    fn with_mode(&self, text: Tensor, txt_ids: &Tensor, mode: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let Some(embedder) = &self.controlnet_mode_embedder else { return Ok((text, txt_ids.clone())) };
        let missing = || Error::Invalid { field: "controls", reason: "this network needs a mode".into() };
        let embedded = embedder.index_select(mode.ok_or_else(missing)?, 0)?.unsqueeze(1)?; // [B, 1, D]
        let txt_ids = Tensor::cat(&[&txt_ids.narrow(0, 0, 1)?, txt_ids], 0)?;
        Ok((Tensor::cat(&[embedded.to_dtype(text.dtype())?, text], 1)?, txt_ids))
    }
}

impl ControlNetwork for FluxControlNet {
    /// `cond: [B, L_img, C]`, packed as `hidden_states` are.
    fn residuals(&self, inputs: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>> {
        let control = alone(controls)?;
        let embedders = &self.embedders;
        let hidden_states = embedders.x_embedder.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let mut hidden_states = (hidden_states + self.controlnet_x_embedder.forward(control.cond)?)?;
        let temb = embedders.temb(inputs, hidden_states.dtype())?;
        let text = embedders.context_embedder.forward(inputs.get("encoder_hidden_states")?)?;
        let (mut text, txt_ids) = self.with_mode(text, inputs.get("txt_ids")?, control.mode)?;
        let rope: Rope = embedders.pos_embed.forward(&Tensor::cat(&[&txt_ids, inputs.get("img_ids")?], 0)?)?;
        let mut residuals = Vec::new();
        for (i, (block, projection)) in self.transformer_blocks.iter().enumerate() {
            (text, hidden_states) = block.forward(&hidden_states, &text, &temb, &rope)?;
            residuals.push((format!("controlnet_block_samples.{i}"), projection.forward_gathered(&hidden_states)?));
        }
        if self.single_transformer_blocks.is_empty() {
            return Ok(residuals);
        }
        let (l_txt, l_img) = (text.dim(1)?, hidden_states.dim(1)?);
        let mut stream = Tensor::cat(&[&text, &hidden_states], 1)?; // [B, L_txt + L_img, D]
        for (i, (block, projection)) in self.single_transformer_blocks.iter().enumerate() {
            stream = block.forward(&stream, &temb, &rope)?;
            let of_image = stream.narrow(1, l_txt, l_img)?.contiguous()?;
            residuals.push((format!("controlnet_single_block_samples.{i}"), projection.forward_gathered(&of_image)?));
        }
        Ok(residuals)
    }
}
