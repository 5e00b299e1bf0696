//! The oldest keys, of early diffusers: the factors were a part of the attention's processor and were called after it.
//!
//! `down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight` is for `attn1.to_out.0`, and of a text encoder
//! `self_attn.to_q_lora.up.weight` for `self_attn.q_proj`. The names are those of diffusers' `UNET_TO_DIFFUSERS` and
//! `DIFFUSERS_OLD_TO_PEFT`.

/// A text encoder's projections and what they were called.
const OF_TEXT: [(&str, &str); 4] = [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")];

/// The layer's name today; `None`: it is not of that style.
pub fn current(name: &str) -> Option<String> {
    let (attention, old) = name.rsplit_once('.')?;
    let today = OF_TEXT.iter().find(|(of_attention, _)| *of_attention == old)?;
    if attention.ends_with(".self_attn") {
        return Some(format!("{attention}.{}", today.1));
    }
    let attention = attention.strip_suffix(".processor").unwrap_or(attention);
    Some(if old == "to_out" { format!("{attention}.to_out.0") } else { format!("{attention}.{old}") })
}
