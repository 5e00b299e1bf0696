//! `config.json`, in its old shape (the text model's fields at the top) and its new one (under `text_config`).

use parallel::ops::Activation;
use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// Widest layer that is believed; the largest published model's is 29,568.
const MAX_WIDTH: usize = 1 << 20;
/// Most layers that are believed; the largest published model has 80.
const MAX_LAYERS: usize = 1 << 10;
/// Most tokens of a vocabulary that is believed; the published ones have 152,064.
const MAX_VOCAB: usize = 1 << 24;
/// Longest side of a patch or a window in pixels, or of a merged square of patches, that is believed.
const MAX_SIDE: usize = 1 << 12;

/// Configuration of a Qwen2.5-VL; what is not read here is ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Qwen25VlConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// `D`.
    pub hidden_size: usize,
    /// Width between the two layers of the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// `N`.
    pub num_attention_heads: usize,
    /// Heads of keys and values; each is for as many heads of queries.
    pub num_key_value_heads: usize,
    /// Only `silu`.
    pub hidden_act: String,
    /// Of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Only `default` (or `mrope`, its old name).
    pub rope_type: String,
    /// How many frequencies turn by time, by height and by width.
    pub mrope_section: Vec<usize>,
    /// Whether some layers see only near tokens; only not.
    pub use_sliding_window: bool,
    /// The token that a picture's features take the place of.
    pub image_token_id: i64,
    /// The vision tower.
    pub vision: Qwen25VlVisionConfig,
}

/// Configuration of the vision tower (`vision_config`).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct Qwen25VlVisionConfig {
    /// Blocks.
    pub depth: usize,
    /// `D` of the tower.
    pub hidden_size: usize,
    /// Width between the two layers of the feed-forward part.
    pub intermediate_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Of a picture.
    #[serde(alias = "in_chans")]
    pub in_channels: usize,
    /// `D` of the text model.
    pub out_hidden_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side in patches of the squares that become one token.
    pub spatial_merge_size: usize,
    /// Frames of a patch; a picture is repeated for each.
    pub temporal_patch_size: usize,
    /// Side in pixels of the windows within which most blocks attend.
    pub window_size: usize,
    /// The blocks that attend across the whole picture.
    pub fullatt_block_indexes: Vec<usize>,
    /// Only `silu`.
    pub hidden_act: String,
}

impl Default for Qwen25VlVisionConfig {
    fn default() -> Self {
        Self {
            depth: 32,
            hidden_size: 1280,
            intermediate_size: 3420,
            num_heads: 16,
            in_channels: 3,
            out_hidden_size: 3584,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            fullatt_block_indexes: vec![7, 15, 23, 31],
            hidden_act: "silu".into(),
        }
    }
}

/// The text model's fields, wherever they stand.
#[derive(Deserialize)]
struct Text {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "default_epsilon")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    /// The old name of `rope_parameters`, which it goes before.
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    use_sliding_window: bool,
}

#[derive(Deserialize)]
struct RopeParameters {
    mrope_section: Option<Vec<usize>>,
    rope_type: Option<String>,
    /// The old name.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
}

/// What stands at the top in either shape.
#[derive(Deserialize)]
struct Top {
    #[serde(default = "default_image_token")]
    image_token_id: i64,
    #[serde(default)]
    vision_config: Qwen25VlVisionConfig,
}

fn silu() -> String {
    "silu".into()
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_image_token() -> i64 {
    151_655
}

impl TryFrom<Value> for Qwen25VlConfig {
    type Error = serde_json::Error;

    fn try_from(mut json: Value) -> Result<Self, serde_json::Error> {
        // The fixture's vision part says both `in_channels` and `in_chans`: the class reads the first.
        if let Some(vision) = json.get_mut("vision_config").and_then(Value::as_object_mut)
            && vision.contains_key("in_channels")
        {
            vision.remove("in_chans");
        }
        let text = json.get("text_config").filter(|text| text.is_object()).unwrap_or(&json).clone();
        let (text, top): (Text, Top) = (serde_json::from_value(text)?, serde_json::from_value(json)?);
        let rope = text.rope_scaling.as_ref().or(text.rope_parameters.as_ref());
        let rope_type = rope.and_then(|rope| rope.rope_type.clone().or_else(|| rope.old_type.clone()));
        Ok(Self {
            vocab_size: text.vocab_size,
            hidden_size: text.hidden_size,
            intermediate_size: text.intermediate_size,
            num_hidden_layers: text.num_hidden_layers,
            num_attention_heads: text.num_attention_heads,
            num_key_value_heads: text.num_key_value_heads.unwrap_or(text.num_attention_heads),
            hidden_act: text.hidden_act,
            rms_norm_eps: text.rms_norm_eps,
            rope_theta: rope.and_then(|rope| rope.rope_theta).or(text.rope_theta).unwrap_or(1e6),
            rope_type: rope_type.unwrap_or_else(|| "default".into()),
            mrope_section: rope.and_then(|rope| rope.mrope_section.clone()).unwrap_or_else(|| vec![16, 24, 24]),
            use_sliding_window: text.use_sliding_window,
            image_token_id: top.image_token_id,
            vision: top.vision_config,
        })
    }
}

impl Qwen25VlConfig {
    /// `Dh`.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// A tp of 1, 2, 4 or 8 can hold the model if it divides this: the widths that are cut, not the heads.
    pub fn tp_divisor(&self) -> usize {
        let (mut a, mut b) = (self.hidden_size, self.vision.hidden_size);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    }

    /// Refuses what this implementation does not have, numbers that cannot be, and widths that `tp` does not divide.
    pub(super) fn check(&self, tp: usize) -> Result<()> {
        let vision = &self.vision;
        ok("hidden_size", width(self.hidden_size), &self.hidden_size)?;
        ok("intermediate_size", width(self.intermediate_size), &self.intermediate_size)?;
        ok("vocab_size", (1..=MAX_VOCAB).contains(&self.vocab_size), &self.vocab_size)?;
        ok("num_hidden_layers", (1..=MAX_LAYERS).contains(&self.num_hidden_layers), &self.num_hidden_layers)?;
        ok("num_attention_heads", heads(self.num_attention_heads, self.hidden_size, 2), &self.num_attention_heads)?;
        let kv = self.num_key_value_heads;
        ok("num_key_value_heads", kv > 0 && self.num_attention_heads.is_multiple_of(kv), &kv)?;
        ok("hidden_act", self.hidden_act == "silu", &self.hidden_act)?;
        ok("rms_norm_eps", self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0, &self.rms_norm_eps)?;
        ok("rope_theta", self.rope_theta.is_normal() && self.rope_theta > 0.0, &self.rope_theta)?;
        ok("rope_type", ["default", "mrope"].contains(&self.rope_type.as_str()), &self.rope_type)?;
        let turned = self.mrope_section.iter().try_fold(0usize, |sum, part| sum.checked_add(*part));
        ok("mrope_section", turned == Some(self.head_dim() / 2), &self.mrope_section)?;
        ok("use_sliding_window", !self.use_sliding_window, &self.use_sliding_window)?;
        ok("vision_config.out_hidden_size", vision.out_hidden_size == self.hidden_size, &vision.out_hidden_size)?;
        vision.check()?;
        for (what, size) in [("hidden_size", self.hidden_size), ("vision_config.hidden_size", vision.hidden_size)] {
            if tp == 0 || !size.is_multiple_of(tp) {
                return Err(parallel::Error::Indivisible { what: what.into(), size, tp }.into());
            }
        }
        Ok(())
    }
}

impl Qwen25VlVisionConfig {
    /// Numbers of a patch's pixels, its frames included.
    pub(super) fn patch_width(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that become one token.
    pub(super) fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Side of a window in tokens.
    pub(super) fn window_tokens(&self) -> usize {
        self.window_size / self.spatial_merge_size / self.patch_size
    }

    fn check(&self) -> Result<()> {
        let side = |n: usize| (1..=MAX_SIDE).contains(&n);
        ok("vision_config.depth", (1..=MAX_LAYERS).contains(&self.depth), &self.depth)?;
        ok("vision_config.hidden_size", width(self.hidden_size), &self.hidden_size)?;
        ok("vision_config.intermediate_size", width(self.intermediate_size), &self.intermediate_size)?;
        // A quarter of a head's pairs and more: half turn by height, half by width.
        ok("vision_config.num_heads", heads(self.num_heads, self.hidden_size, 4), &self.num_heads)?;
        ok("vision_config.in_channels", side(self.in_channels), &self.in_channels)?;
        ok("vision_config.patch_size", side(self.patch_size), &self.patch_size)?;
        ok("vision_config.spatial_merge_size", side(self.spatial_merge_size), &self.spatial_merge_size)?;
        ok("vision_config.temporal_patch_size", side(self.temporal_patch_size), &self.temporal_patch_size)?;
        ok("vision_config.window_size", self.window_tokens() > 0, &self.window_size)?;
        ok("vision_config.hidden_act", self.hidden_act == "silu", &self.hidden_act)
    }
}

/// The feed-forward parts' function, the only one that `check` lets pass.
pub(super) const ACTIVATION: Activation = Activation::Silu;

fn width(n: usize) -> bool {
    (1..=MAX_WIDTH).contains(&n)
}

/// Heads of one width, a multiple of `pairs`.
fn heads(heads: usize, width: usize, pairs: usize) -> bool {
    heads > 0 && width.is_multiple_of(heads) && (width / heads).is_multiple_of(pairs)
}

fn ok(field: &str, good: bool, value: &dyn std::fmt::Debug) -> Result<()> {
    if good { Ok(()) } else { Err(Error::Unsupported { field: field.to_owned(), value: format!("{value:?}") }) }
}
