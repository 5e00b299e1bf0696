//! PEFT's keys and diffusers': a layer's full name, then which factor it is.
//!
//! `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`; the component before the name may be `text_encoder`,
//! `text_encoder_2` or missing, and the factors may be `lora_down` and `lora_up` with an `alpha` beside them (as Lightning's are).
//! Without an alpha the scale is 1, or what diffusers wrote into the file's metadata.

use super::Part;
use super::file::AdapterFile;
use crate::Result;

/// Which of a layer's tensors a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `A: [rank, d_in]`, or of a convolution `[rank, C_in, k, k]`.
    Down,
    /// `B: [d_out, rank]`, or of a convolution `[C_out, rank, 1, 1]`.
    Up,
    /// One number.
    Alpha,
}

const ROLES: [(&str, Role); 13] = [
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".alpha", Role::Alpha),
];

/// What stands before the name, and whose layers are meant.
const PREFIXES: [(&str, Option<&str>); 7] = [
    ("base_model.model.", None),
    ("diffusion_model.", None),
    ("transformer.", None),
    ("unet.", None),
    ("text_encoder.", Some("text_encoder")),
    ("text_encoder_2.", Some("text_encoder_2")),
    ("text_encoder_3.", Some("text_encoder_3")),
];

/// A key as the layer it is for and the factor it is; `None`: it is neither.
pub fn split(key: &str) -> Option<(&str, Role)> {
    ROLES.iter().find_map(|(suffix, role)| Some((key.strip_suffix(suffix)?, *role)))
}

/// Whose layer a dotted name is, and its name there.
pub fn part(module: &str) -> (Part, &str) {
    let found = PREFIXES.iter().find_map(|(prefix, encoder)| Some((module.strip_prefix(prefix)?, *encoder)));
    match found {
        Some((name, Some(encoder))) => (Part::TextEncoder(encoder.to_owned()), name),
        Some((name, None)) => (Part::Denoiser, name),
        None => (Part::Denoiser, module),
    }
}

/// The names a layer may have in a checkpoint: transformers' CLIP has `text_model.` before all of them in some files only.
pub fn spellings(name: &str) -> [String; 2] {
    let other = match name.strip_prefix("text_model.") {
        Some(rest) => rest.to_owned(),
        None => format!("text_model.{name}"),
    };
    [name.to_owned(), other]
}

/// What the file's own configuration says of a layer: alpha over rank. `None`: nothing.
///
/// # Errors
/// When it wants what is not here: DoRA, a pattern that is a regular expression, a rank other than the tensor's.
pub fn configured_factor(file: &AdapterFile, component: &str, name: &str, rank: usize) -> Result<Option<f64>> {
    let entry = |field: &str| file.config(&format!("{component}.{field}"));
    let bad = |field: &str, reason: &str| Err(super::bad(file.path(), format!("metadata `{component}.{field}`: {reason}")));
    if entry("use_dora").and_then(serde_json::Value::as_bool) == Some(true) {
        return bad("use_dora", "DoRA is not supported");
    }
    let pattern = |field: &str| -> Result<Option<f64>> {
        let patterns = entry(field).and_then(serde_json::Value::as_object).into_iter().flatten();
        for (pattern, value) in patterns {
            if let Some(literal) = pattern.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-^".contains(*c)) {
                return bad(field, &format!("`{pattern}` with its `{literal}` is a regular expression, which is not supported"));
            }
            let end = pattern.strip_prefix('^');
            let whole = name == end.unwrap_or(pattern);
            let tail = end.is_none() && name.strip_suffix(pattern.as_str()).is_some_and(|rest| rest.ends_with('.'));
            if whole || tail {
                return Ok(value.as_f64());
            }
        }
        Ok(None)
    };
    let number = |field: &str| entry(field).and_then(serde_json::Value::as_f64);
    let wanted = pattern("rank_pattern")?.or_else(|| number("r"));
    if let Some(wanted) = wanted.filter(|wanted| *wanted != rank as f64) {
        return bad("r", &format!("says rank {wanted} of `{name}`, whose factors have rank {rank}"));
    }
    let Some(alpha) = pattern("alpha_pattern")?.or_else(|| number("lora_alpha")) else { return Ok(None) };
    let stabilised = entry("use_rslora").and_then(serde_json::Value::as_bool) == Some(true);
    let factor = alpha / if stabilised { (rank as f64).sqrt() } else { rank as f64 };
    if factor.is_finite() { Ok(Some(factor)) } else { bad("lora_alpha", "is not a finite number") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_a_component_a_layer_and_a_factor() {
        let check = |key: &str, encoder: Option<&str>, name: &str, role: Role| {
            let (module, found) = split(key).unwrap();
            let (part, found_name) = part(module);
            let expected = encoder.map_or(Part::Denoiser, |encoder| Part::TextEncoder(encoder.to_owned()));
            assert_eq!((part, found_name, found), (expected, name, role), "{key}");
        };
        check("transformer.blocks.0.to_q.lora_A.weight", None, "blocks.0.to_q", Role::Down);
        check("blocks.0.to_q.lora_up.weight", None, "blocks.0.to_q", Role::Up);
        check("diffusion_model.x.alpha", None, "x", Role::Alpha);
        let clip = "text_model.encoder.layers.0.self_attn.q_proj";
        check(&format!("text_encoder.{clip}.lora_B.weight"), Some("text_encoder"), clip, Role::Up);
        check(&format!("text_encoder_2.{clip}.lora_linear_layer.down.weight"), Some("text_encoder_2"), clip, Role::Down);
        assert_eq!(split("transformer.blocks.0.to_q.lora_magnitude_vector"), None);
        assert_eq!(spellings("text_model.a"), ["text_model.a", "a"]);
        assert_eq!(spellings("a"), ["a", "text_model.a"]);
    }
}
