//! Qwen2.5-VL as a text encoder that may be shown pictures: S. Bai et al., "Qwen2.5-VL Technical Report",
//! <https://arxiv.org/abs/2502.13923>.
//!
//! Follows `transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py` (5.23.0) as far as the last hidden state: no `lm_head`, no
//! cache of keys, no video. Differences: heads and feed-forward columns of both networks are divided over the tensor-parallel
//! group, and so are the patch embedding and the columns of the token embedding; the layers can be cut into ranges, of which the
//! first holds the vision tower. Positions have three axes whenever there is a picture: that is what transformers 4 did and what
//! 5 does when it is given `mm_token_type_ids`, which diffusers' pipelines forget.

use parallel::{DType, Shard, Tensor, Tensors, Weights, ops};

use crate::autoencoder_kl::Tap;
use crate::blocks::{BlockModel, RangeOf};
use crate::clip::causal_mask;
use crate::t5::masked_scores;
use crate::token_embedding::TokenEmbedding;
use crate::{Error, Result};

mod config;
mod heads;
mod image_processor;
mod layers;
mod positions;
mod vision;
mod windows;

pub use config::{Qwen25VlConfig, Qwen25VlVisionConfig};
pub use image_processor::ImageProcessor;

use layers::DecoderLayer;
use positions::{MultimodalRope, Pictures, Rope};
use vision::VisionTower;

/// A range of the model's layers, as one rank of a group holds it.
///
/// Inputs `input_ids: [B, L]`; if padding is to be masked, `attention_mask: [B, L]` of zeros and ones; if there are pictures,
/// `pixel_values: [patches, C T P P]` and `image_grid_thw: [pictures, 3]`, as [`ImageProcessor`] makes them, in the order of their
/// tokens. Output `last_hidden_state: [B, L, D]`, after the final norm. Between the ranges travel `hidden_states: [B, L, D]`,
/// `rope.cos` and `rope.sin: [B, L, Dh/2]`, and the mask.
#[derive(Debug)]
pub struct Qwen25VlModel {
    config: Qwen25VlConfig,
    embed_tokens: Option<TokenEmbedding>,
    visual: Option<VisionTower>,
    layers: Vec<DecoderLayer>,
    /// Index of the first of `layers`.
    start: usize,
    norm: Option<Tensor>,
}

impl Qwen25VlModel {
    /// Reads this rank's part of the checkpoint whose root is `w`.
    ///
    /// # Errors
    /// Besides what a checkpoint may lack: a configuration that is not supported, widths that the group's tp does not divide.
    pub fn load(w: &Weights, config: &Qwen25VlConfig, range: RangeOf) -> Result<Self> {
        Self::load_parts(w, config, range, true)
    }

    /// As [`Self::load`] without the vision tower, for those who show it no pictures: given one, it fails.
    pub fn load_text(w: &Weights, config: &Qwen25VlConfig, range: RangeOf) -> Result<Self> {
        Self::load_parts(w, config, range, false)
    }

    fn load_parts(w: &Weights, config: &Qwen25VlConfig, range: RangeOf, with_visual: bool) -> Result<Self> {
        config.check(w.group().size())?;
        // Transformers 5 saves the names on the left, the hub's files have those on the right.
        let nested = w.contains("model.language_model.norm.weight");
        let (text, visual) = if nested { ("model.language_model", "model.visual") } else { ("model", "visual") };
        let text = w.pp(text);
        let mine = range.of(config.num_hidden_layers);
        let embedding = || TokenEmbedding::load(&text, "embed_tokens.weight", [config.vocab_size, config.hidden_size]);
        let norm = || text.get("norm.weight", &[config.hidden_size], Shard::Replicated);
        let model = Self {
            embed_tokens: range.is_first().then(embedding).transpose()?,
            visual: (range.is_first() && with_visual).then(|| VisionTower::load(&w.pp(visual), &config.vision)).transpose()?,
            layers: mine.clone().map(|i| DecoderLayer::load(&text.pp("layers").pp(i), config)).collect::<Result<_>>()?,
            start: mine.start,
            norm: range.is_last().then(norm).transpose()?,
            config: config.clone(),
        };
        // The other ranges' tensors are theirs to read; `lm_head` is for writing text.
        for other in (0..config.num_hidden_layers).filter(|i| !mine.contains(i)) {
            text.skip(format!("layers.{other}"));
        }
        text.skip("embed_tokens");
        text.skip("norm");
        if model.visual.is_none() {
            w.skip(visual);
        }
        w.skip("lm_head");
        w.finish()?;
        Ok(model)
    }

    /// Where each token is: time, height and width, `[3, B, L]`. For the inputs of the model.
    pub fn position_ids(&self, inputs: &Tensors) -> Result<Tensor> {
        let pictures = Pictures::of(inputs, &self.config.vision)?;
        positions::tensor(&positions::of(inputs, &pictures, &self.config)?)
    }

    /// What the pictures' tokens are replaced by: `[pictures' tokens, D]`. Tells `tap` what the submodules give, by the reference's
    /// names.
    pub fn image_features(&self, inputs: &Tensors, tap: Tap) -> Result<Tensor> {
        let pictures = Pictures::of(inputs, &self.config.vision)?;
        self.see(inputs.get("pixel_values")?, &pictures, tap)
    }

    /// As [`BlockModel::blocks`], telling `tap` what the submodules give.
    pub fn blocks_tapped(&self, mut hidden: Tensors, tap: Tap) -> Result<Tensors> {
        let mut x = hidden.take("hidden_states")?;
        if !self.layers.is_empty() {
            let rope = Rope { cos: hidden.get("rope.cos")?.clone(), sin: hidden.get("rope.sin")?.clone() };
            let mut mask = causal_mask(x.dim(1)?, x.dtype(), x.device())?; // [1, 1, L, L]
            if let Some(padding) = hidden.find("attention_mask") {
                mask = mask.broadcast_add(&masked_scores(padding, &x)?)?; // [B, 1, L, L]
            }
            for (i, layer) in (self.start..).zip(&self.layers) {
                x = layer.forward(&x, &mask, &rope, &mut |name, y| tap(&format!("model.language_model.layers.{i}.{name}"), y))?;
            }
        }
        Ok(hidden.with("hidden_states", x))
    }

    fn see(&self, pixel_values: &Tensor, pictures: &Pictures, tap: Tap) -> Result<Tensor> {
        let unseeing = || Error::Invalid { field: "pixel_values", reason: "the vision tower was not loaded here".into() };
        self.visual.as_ref().ok_or_else(unseeing)?.forward(pixel_values, pictures, tap)
    }

    /// The pictures' features in place of their tokens. `x: [B, L, D]`, `ids: [B, L]`.
    fn show(&self, x: &Tensor, ids: &Tensor, features: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x.dims3()?;
        let mut next = (b * l) as u32;
        let ids = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let row = |(i, id): (usize, i64)| {
            if id != self.config.image_token_id {
                return i as u32;
            }
            next += 1;
            next - 1
        };
        let rows: Vec<u32> = ids.into_iter().enumerate().map(row).collect();
        if next as usize != b * l + features.dim(0)? {
            let reason = format!("{} tokens for {} features of pictures", next as usize - b * l, features.dim(0)?);
            return Err(Error::Invalid { field: "input_ids", reason });
        }
        let rows = Tensor::from_vec(rows, b * l, x.device())?;
        let all = Tensor::cat(&[&x.reshape((b * l, d))?, &features.to_dtype(x.dtype())?], 0)?;
        Ok(all.index_select(&rows, 0)?.reshape((b, l, d))?)
    }
}

impl BlockModel for Qwen25VlModel {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let later = Error::Payload { stage: "qwen2.5-vl embedding", got: "later block range's" };
        let embed_tokens = self.embed_tokens.as_ref().ok_or(later)?;
        let ids = inputs.get("input_ids")?;
        let pictures = Pictures::of(inputs, &self.config.vision)?;
        let positions = positions::of(inputs, &pictures, &self.config)?;
        let mut x = embed_tokens.forward(ids)?;
        if !pictures.is_empty() {
            x = self.show(&x, ids, &self.see(inputs.get("pixel_values")?, &pictures, &mut |_, _| {})?)?;
        }
        let rope = MultimodalRope::new(&self.config).tables(&positions)?;
        let hidden = Tensors::new().with("hidden_states", x).with("rope.cos", rope.cos).with("rope.sin", rope.sin);
        Ok(match inputs.find("attention_mask") {
            Some(mask) => hidden.with("attention_mask", mask.clone()),
            None => hidden,
        })
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        self.blocks_tapped(hidden, &mut |_, _| {})
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let earlier = Error::Payload { stage: "qwen2.5-vl final norm", got: "earlier block range's" };
        let weight = self.norm.as_ref().ok_or(earlier)?;
        let x = ops::rms_norm(hidden.get("hidden_states")?, weight, self.config.rms_norm_eps)?;
        Ok(Tensors::new().with("last_hidden_state", x))
    }
}

#[cfg(test)]
mod tests;
