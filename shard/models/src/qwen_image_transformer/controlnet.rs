//! `QwenImageControlNetModel`: some blocks like those of Qwen-Image, given a picture's latents besides, whose every output goes through a linear
//! layer.
//!
//! Follows diffusers 0.42.1, `models/controlnets/controlnet_qwenimage.py`. It is cut as the transformer is.

use parallel::{ColumnParallelLinear, Linear, Tensor, Tensors, Weights};
use serde::Deserialize;

use super::block::{Context, QwenImageTransformerBlock};
use super::{Embedded, Embedders, QwenImageTransformerConfig};
use crate::Result;
use crate::control::{Control, ControlNetwork, alone};
use crate::mmdit::layers::{column, linear};
use crate::mmdit::{check_heads, unsupported};

/// `config.json` of a `QwenImageControlNetModel`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct QwenImageControlNetConfig {
    /// Of the blocks.
    #[serde(flatten)]
    pub transformer: QwenImageTransformerConfig,
    /// Channels of what is given beside the picture's latents (inpainting). Not here.
    pub extra_condition_channels: usize,
}

impl QwenImageControlNetConfig {
    /// Whether this is a network that is known here.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        self.transformer.validate()?;
        if self.extra_condition_channels != 0 {
            return Err(unsupported("extra_condition_channels", &self.extra_condition_channels));
        }
        if self.transformer.zero_cond_t {
            return Err(unsupported("zero_cond_t", &true));
        }
        Ok(())
    }
}

/// `QwenImageControlNetModel`, or one rank's part of it.
#[derive(Debug)]
pub struct QwenImageControlNet {
    embedders: Embedders,
    controlnet_x_embedder: Linear,
    transformer_blocks: Vec<(QwenImageTransformerBlock, ColumnParallelLinear)>,
}

impl QwenImageControlNet {
    /// Reads what this rank holds of `w`, whose group shares every split tensor.
    pub fn load(w: &Weights, config: &QwenImageControlNetConfig) -> Result<Self> {
        config.validate()?;
        let transformer = &config.transformer;
        check_heads(w, transformer.num_attention_heads)?;
        let d = transformer.inner_dim();
        let block = |i: usize| {
            let block = QwenImageTransformerBlock::load(&w.pp("transformer_blocks").pp(i), transformer)?;
            Ok((block, column(&w.pp("controlnet_blocks").pp(i), d, d)?))
        };
        let network = Self {
            embedders: Embedders::load(w, transformer)?,
            controlnet_x_embedder: linear(&w.pp("controlnet_x_embedder"), transformer.in_channels, d)?,
            transformer_blocks: (0..transformer.num_layers).map(block).collect::<Result<_>>()?,
        };
        w.finish()?;
        Ok(network)
    }
}

impl ControlNetwork for QwenImageControlNet {
    /// `cond: [B, L_img, C]`, packed as `hidden_states` are.
    fn residuals(&self, inputs: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>> {
        let control = alone(controls)?;
        let Embedded { hidden_states, mut encoder_hidden_states, temb, rope, bias } = self.embedders.forward(inputs, false)?;
        let mut hidden_states: Tensor = (hidden_states + self.controlnet_x_embedder.forward(control.cond)?)?;
        let context = Context { temb, rope, bias, target_tokens: None };
        let mut residuals = Vec::with_capacity(self.transformer_blocks.len());
        for (i, (block, projection)) in self.transformer_blocks.iter().enumerate() {
            (encoder_hidden_states, hidden_states) = block.forward(&hidden_states, &encoder_hidden_states, &context)?;
            residuals.push((format!("controlnet_block_samples.{i}"), projection.forward_gathered(&hidden_states)?));
        }
        Ok(residuals)
    }
}
