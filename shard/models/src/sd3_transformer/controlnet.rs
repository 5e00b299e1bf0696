//! `SD3ControlNetModel`: some blocks like those of Stable Diffusion 3, given a picture's latents besides, whose every output goes through a linear
//! layer.
//!
//! Follows diffusers 0.42.1, `models/controlnets/controlnet_sd3.py`. It is cut as the transformer is.

use parallel::{ColumnParallelLinear, Tensor, Tensors, Weights};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::block::JointTransformerBlock;
use super::patch_embed::PatchEmbed;
use super::{Embedders, Sd3TransformerConfig};
use crate::Result;
use crate::control::{Control, ControlNetwork, alone};
use crate::mmdit::layers::column;
use crate::mmdit::{check_heads, unsupported};

/// `config.json` of an `SD3ControlNetModel`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sd3ControlNetConfig {
    /// Of the blocks.
    pub transformer: Sd3TransformerConfig,
    /// Whether it is given zeros in place of the pooled text, and latents that are scaled without the autoencoder's shift.
    pub force_zeros_for_pooled_projection: bool,
}

#[derive(Deserialize)]
struct Own {
    #[serde(default = "yes")]
    force_zeros_for_pooled_projection: bool,
}

fn yes() -> bool {
    true
}

impl Sd3ControlNetConfig {
    /// From the file's fields.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] with the first field that is not what is known here: SD3.5 large's ControlNets have blocks of another kind.
    pub fn read(config: Map<String, Value>) -> Result<Self> {
        let fixed =
            [("extra_conditioning_channels", json!(0)), ("pos_embed_type", json!("sincos")), ("use_pos_embed", json!(true))];
        for (field, value) in fixed {
            match config.get(field) {
                Some(found) if *found != value => return Err(unsupported(field, found)),
                _ => {}
            }
        }
        if config.get("joint_attention_dim") == Some(&Value::Null) {
            return Err(unsupported("joint_attention_dim", &Value::Null));
        }
        let bad = |error: serde_json::Error| unsupported("config.json", &error.to_string());
        let Own { force_zeros_for_pooled_projection } = serde_json::from_value(Value::Object(config.clone())).map_err(bad)?;
        let transformer: Sd3TransformerConfig = serde_json::from_value(Value::Object(config)).map_err(bad)?;
        transformer.validate()?;
        Ok(Self { transformer, force_zeros_for_pooled_projection })
    }
}

/// `SD3ControlNetModel`, or one rank's part of it.
#[derive(Debug)]
pub struct Sd3ControlNet {
    embedders: Embedders,
    pos_embed_input: PatchEmbed,
    transformer_blocks: Vec<(JointTransformerBlock, ColumnParallelLinear)>,
    force_zeros_for_pooled_projection: bool,
}

impl Sd3ControlNet {
    /// Reads what this rank holds of `w`, whose group shares every split tensor.
    pub fn load(w: &Weights, config: &Sd3ControlNetConfig) -> Result<Self> {
        let transformer = &config.transformer;
        check_heads(w, transformer.num_attention_heads)?;
        let d = transformer.inner_dim();
        // All its blocks have an output for the text: none is the last of a transformer.
        let row = Sd3TransformerConfig { num_layers: transformer.num_layers + 1, ..transformer.clone() };
        let block = |i: usize| {
            let block = JointTransformerBlock::load(&w.pp("transformer_blocks").pp(i), &row, i)?;
            Ok((block, column(&w.pp("controlnet_blocks").pp(i), d, d)?))
        };
        let network = Self {
            embedders: Embedders::load(w, transformer)?,
            pos_embed_input: PatchEmbed::load_without_positions(&w.pp("pos_embed_input"), transformer)?,
            transformer_blocks: (0..transformer.num_layers).map(block).collect::<Result<_>>()?,
            force_zeros_for_pooled_projection: config.force_zeros_for_pooled_projection,
        };
        w.finish()?;
        Ok(network)
    }
}

impl ControlNetwork for Sd3ControlNet {
    /// `cond: [B, C, H, W]`, as `hidden_states`.
    fn residuals(&self, inputs: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>> {
        let control = alone(controls)?;
        let embedders = &self.embedders;
        let (hidden_states, _) = embedders.pos_embed.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let (cond, _) = self.pos_embed_input.forward(control.cond)?;
        let mut hidden_states = (hidden_states + cond)?;
        let mut pooled: Tensor = inputs.get("pooled_projections")?.clone();
        if self.force_zeros_for_pooled_projection {
            pooled = pooled.zeros_like()?;
        }
        let temb = embedders.time_text_embed.forward(inputs.get("timestep")?, None, &pooled)?; // [B, D]
        let mut text = embedders.context_embedder.forward(inputs.get("encoder_hidden_states")?)?; // [B, L_txt, D]
        let mut residuals = Vec::with_capacity(self.transformer_blocks.len());
        for (i, (block, projection)) in self.transformer_blocks.iter().enumerate() {
            (text, hidden_states) = block.forward(hidden_states, text, &temb)?;
            residuals.push((format!("block_controlnet_hidden_states.{i}"), projection.forward_gathered(&hidden_states)?));
        }
        Ok(residuals)
    }
}
