//! kohya's keys (sd-scripts): a prefix for the network, then the layer's name with `_` for every dot.
//!
//! `lora_unet_` is the denoiser whatever it is, `lora_te_` and `lora_te1_` the first text encoder, `lora_te2_` and `lora_te3_` the
//! others; where a model has two, T5 is the third all the same (`Sites::without_third_text_encoder`). Underscores cannot be told from dots, so names are compared with those of the network, flattened likewise. Where
//! kohya trains on the original code of a model, the layers have the original names: see [`super::flux_original`] and
//! [`super::sgm`].

use super::Part;

const PREFIXES: [(&str, Option<&str>); 6] = [
    ("lora_unet_", None),
    ("lora_transformer_", None),
    ("lora_te_", Some("text_encoder")),
    ("lora_te1_", Some("text_encoder")),
    ("lora_te2_", Some("text_encoder_2")),
    ("lora_te3_", Some("text_encoder_3")),
];

/// Whose layer a flattened name is, and the rest of it; `None`: it is not kohya's.
pub fn part(module: &str) -> Option<(Part, &str)> {
    PREFIXES.iter().find_map(|(prefix, encoder)| {
        let name = module.strip_prefix(prefix)?;
        Some((encoder.map_or(Part::Denoiser, |encoder| Part::TextEncoder(encoder.to_owned())), name))
    })
}

/// A layer's name as kohya writes it.
pub fn flattened(name: &str) -> String {
    name.replace('.', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_names_the_network() {
        assert_eq!(part("lora_unet_img_in"), Some((Part::Denoiser, "img_in")));
        assert_eq!(part("lora_te2_text_model_x"), Some((Part::TextEncoder("text_encoder_2".into()), "text_model_x")));
        assert_eq!(part("transformer_blocks.0.attn"), None);
        assert_eq!(flattened("transformer_blocks.0.attn.to_out.0"), "transformer_blocks_0_attn_to_out_0");
    }
}
