//! FLUX.1's layers by the names of Black Forest Labs' code, which kohya and ComfyUI keep.
//!
//! Follows `_convert_kohya_flux_lora_to_diffusers` (diffusers 0.42.1, `loaders/lora_conversion_utils.py`): a fused layer's rows are
//! those of several layers, which share its `A`. Only the alphas of the last two layers, which the converter drops, are kept here:
//! a file's alpha is what it was trained with.

/// Layers that one tensor of the original names is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// diffusers' names, in the order of the rows.
    pub sites: Vec<String>,
    /// The rows are shift then scale, and diffusers has scale then shift.
    pub halves_swapped: bool,
}

/// What a name is for, its dots and underscores all underscores; `None`: it is none of FLUX's.
pub fn original(flat: &str) -> Option<Original> {
    let plain = |sites: Vec<String>| Some(Original { sites, halves_swapped: false });
    if let Some((index, rest)) = numbered(flat, "double_blocks_") {
        let sites: &[&str] = match rest {
            "img_attn_proj" => &["attn.to_out.0"],
            "img_attn_qkv" => &["attn.to_q", "attn.to_k", "attn.to_v"],
            "img_mlp_0" => &["ff.net.0.proj"],
            "img_mlp_2" => &["ff.net.2"],
            "img_mod_lin" => &["norm1.linear"],
            "txt_attn_proj" => &["attn.to_add_out"],
            "txt_attn_qkv" => &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "txt_mlp_0" => &["ff_context.net.0.proj"],
            "txt_mlp_2" => &["ff_context.net.2"],
            "txt_mod_lin" => &["norm1_context.linear"],
            _ => return None,
        };
        return plain(sites.iter().map(|site| format!("transformer_blocks.{index}.{site}")).collect());
    }
    if let Some((index, rest)) = numbered(flat, "single_blocks_") {
        let sites: &[&str] = match rest {
            "linear1" => &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
            "linear2" => &["proj_out"],
            "modulation_lin" => &["norm.linear"],
            _ => return None,
        };
        return plain(sites.iter().map(|site| format!("single_transformer_blocks.{index}.{site}")).collect());
    }
    let site = match flat {
        "img_in" => "x_embedder",
        "txt_in" => "context_embedder",
        "time_in_in_layer" => "time_text_embed.timestep_embedder.linear_1",
        "time_in_out_layer" => "time_text_embed.timestep_embedder.linear_2",
        "guidance_in_in_layer" => "time_text_embed.guidance_embedder.linear_1",
        "guidance_in_out_layer" => "time_text_embed.guidance_embedder.linear_2",
        "vector_in_in_layer" => "time_text_embed.text_embedder.linear_1",
        "vector_in_out_layer" => "time_text_embed.text_embedder.linear_2",
        "final_layer_linear" => "proj_out",
        "final_layer_adaLN_modulation_1" => {
            return Some(Original { sites: vec!["norm_out.linear".into()], halves_swapped: true });
        }
        _ => return None,
    };
    plain(vec![site.to_owned()])
}

/// `PREFIX` number `_` rest.
fn numbered<'a>(flat: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (index, rest) = flat.strip_prefix(prefix)?.split_once('_')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_layers_are_several() {
        let qkv = original("double_blocks_12_txt_attn_qkv").unwrap();
        let names = ["add_q_proj", "add_k_proj", "add_v_proj"].map(|name| format!("transformer_blocks.12.attn.{name}"));
        assert_eq!(qkv, Original { sites: names.to_vec(), halves_swapped: false });
        assert_eq!(original("single_blocks_0_linear1").unwrap().sites.len(), 4);
        assert!(original("final_layer_adaLN_modulation_1").unwrap().halves_swapped);
        assert_eq!(original("double_blocks_x_img_mod_lin"), None);
        assert_eq!(original("input_blocks_1_1_proj_in"), None);
    }
}
