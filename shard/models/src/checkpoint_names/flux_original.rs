//! FLUX.1's tensors by the names of Black Forest Labs' code.
//!
//! Follows `convert_flux_transformer_checkpoint_to_diffusers` (diffusers 0.42.1, `loaders/single_file_utils.py`).

use std::ops::Range;

use parallel::checkpoint::Part;

use crate::lora::flux_original::original;

/// What a tensor is of diffusers' network; `None`: it has none of these names.
pub(super) fn parts(name: &str, shape: &[usize]) -> Option<Vec<Part>> {
    let rows = *shape.first()?;
    if let Some(norm) = name.strip_suffix(".scale") {
        return Some(vec![Part::whole(norm_of(norm)?, shape)]);
    }
    let (layer, kind) = name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let original = original(&layer.replace('.', "_"))?;
    let rows: Vec<Vec<Range<usize>>> = match original.sites.len() {
        1 if original.halves_swapped => vec![vec![rows / 2..rows, 0..rows / 2]],
        1 => return Some(vec![Part::whole(format!("{}.{kind}", original.sites[0]), shape)]),
        3 => (0..3).map(|i| std::iter::once(i * rows / 3..(i + 1) * rows / 3).collect()).collect(),
        // q, k, v, and the feed-forward part, which is four times as wide in every FLUX.1.
        _ => [(0, 1), (1, 2), (2, 3), (3, 7)].map(|(from, to)| std::iter::once(from * rows / 7..to * rows / 7).collect()).into(),
    };
    let part = |(site, rows)| Part { name: format!("{site}.{kind}"), rows };
    Some(original.sites.into_iter().zip(rows).map(part).collect())
}

/// The norms of queries and keys.
fn norm_of(name: &str) -> Option<String> {
    let (block, which) = name.split_once(".norm.")?;
    let which = match which {
        "query_norm" => "q",
        "key_norm" => "k",
        _ => return None,
    };
    if let Some(index) = block.strip_prefix("single_blocks.") {
        return Some(format!("single_transformer_blocks.{index}.attn.norm_{which}.weight"));
    }
    let (index, stream) = block.strip_prefix("double_blocks.")?.split_once('.')?;
    let added = match stream {
        "img_attn" => "",
        "txt_attn" => "added_",
        _ => return None,
    };
    Some(format!("transformer_blocks.{index}.attn.norm_{added}{which}.weight"))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
mod tests {
    use super::*;

    #[test]
    fn fused_layers_are_cut_and_the_last_modulation_is_turned() {
        let found = |name: &str, shape: &[usize]| {
            let parts = parts(name, shape).unwrap_or_default();
            parts.into_iter().map(|part| (part.name, part.rows)).collect::<Vec<_>>()
        };
        let linear1 = found("single_blocks.3.linear1.bias", &[70]);
        let block = "single_transformer_blocks.3";
        assert_eq!(linear1[2], (format!("{block}.attn.to_v.bias"), vec![20..30]));
        assert_eq!(linear1[3], (format!("{block}.proj_mlp.bias"), vec![30..70]));
        let qkv = found("double_blocks.0.txt_attn.qkv.weight", &[12, 4]);
        assert_eq!(qkv[1], ("transformer_blocks.0.attn.add_k_proj.weight".into(), vec![4..8]));
        let last = found("final_layer.adaLN_modulation.1.weight", &[8, 4]);
        assert_eq!(last, [("norm_out.linear.weight".into(), vec![4..8, 0..4])]);
        let norm = found("double_blocks.7.txt_attn.norm.key_norm.scale", &[128]);
        assert_eq!(norm, [("transformer_blocks.7.attn.norm_added_k.weight".into(), vec![0..128])]);
        let norm = found("single_blocks.7.norm.query_norm.scale", &[128]);
        assert_eq!(norm, [("single_transformer_blocks.7.attn.norm_q.weight".into(), vec![0..128])]);
        for other in ["double_blocks.0.img_attn.norm.other.scale", "a.scale", "img_in.scales", "img_in"] {
            assert_eq!(found(other, &[4]), [], "{other}");
        }
    }
}
