//! The U-Net's layers by the names of Stability's code (`sgm`), which kohya keeps for XL.
//!
//! Follows `_maybe_map_sgm_blocks_to_diffusers` and `_convert_unet_lora_key` (diffusers 0.42.1, `loaders/lora_conversion_utils.py`): the original
//! counts all steps of the way down in one row and all of the way up in another, so where a block begins depends on how many layers
//! a block has. It differs where a step up has no attention: the upsampler is then the second of the step, and the converter takes it for one.

/// diffusers' name of a layer, flattened as `flat` is, of a network with so many residual blocks in each block down; `None`: it is none of
/// these names.
pub fn diffusers(flat: &str, layers_per_block: usize) -> Option<String> {
    let outside = match flat {
        "input_blocks_0_0" => "conv_in",
        "out_2" => "conv_out",
        "time_embed_0" => "time_embedding_linear_1",
        "time_embed_2" => "time_embedding_linear_2",
        "label_emb_0_0" => "add_embedding_linear_1",
        "label_emb_0_2" => "add_embedding_linear_2",
        _ => return inside(flat, layers_per_block),
    };
    Some(outside.to_owned())
}

/// Of a layer in a block.
fn inside(flat: &str, layers_per_block: usize) -> Option<String> {
    // Down a block ends with a downsampler, and up it has one layer more: both are as many steps.
    let steps = layers_per_block + 1;
    if let Some(rest) = flat.strip_prefix("input_blocks_") {
        let (step, rest) = numbered(rest)?;
        let step = step.checked_sub(1)?; // the first is `conv_in`
        let (block, layer) = (step / steps, step % steps);
        return match numbered(rest)? {
            (0, "op") => Some(format!("down_blocks_{block}_downsamplers_0_conv")),
            (0, rest) => Some(format!("down_blocks_{block}_resnets_{layer}_{}", resnet(rest)?)),
            (1, rest) => Some(format!("down_blocks_{block}_attentions_{layer}_{rest}")),
            _ => None,
        };
    }
    if let Some(rest) = flat.strip_prefix("middle_block_") {
        return match numbered(rest)? {
            (0, rest) => Some(format!("mid_block_resnets_0_{}", resnet(rest)?)),
            (1, rest) => Some(format!("mid_block_attentions_0_{rest}")),
            (2, rest) => Some(format!("mid_block_resnets_1_{}", resnet(rest)?)),
            _ => None,
        };
    }
    let (step, rest) = numbered(flat.strip_prefix("output_blocks_")?)?;
    let (block, layer) = (step / steps, step % steps);
    match numbered(rest)? {
        (1 | 2, "conv") => Some(format!("up_blocks_{block}_upsamplers_0_conv")),
        (0, rest) => Some(format!("up_blocks_{block}_resnets_{layer}_{}", resnet(rest)?)),
        (1, rest) => Some(format!("up_blocks_{block}_attentions_{layer}_{rest}")),
        _ => None,
    }
}

/// Of a layer in a residual block.
fn resnet(rest: &str) -> Option<&'static str> {
    match rest {
        "in_layers_2" => Some("conv1"),
        "emb_layers_1" => Some("time_emb_proj"),
        "out_layers_3" => Some("conv2"),
        "skip_connection" => Some("conv_shortcut"),
        _ => None,
    }
}

/// number `_` rest.
fn numbered(flat: &str) -> Option<(usize, &str)> {
    let (index, rest) = flat.split_once('_')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_in_one_row_are_layers_of_blocks() {
        let check = |flat: &str, layers_per_block: usize, expected: &str| {
            assert_eq!(diffusers(flat, layers_per_block).as_deref(), Some(expected), "{flat}");
        };
        let attn = "transformer_blocks_0_attn1_to_q";
        // As XL is: two layers a block.
        check(&format!("input_blocks_4_1_{attn}"), 2, &format!("down_blocks_1_attentions_0_{attn}"));
        check(&format!("input_blocks_8_1_{attn}"), 2, &format!("down_blocks_2_attentions_1_{attn}"));
        check("input_blocks_1_0_in_layers_2", 2, "down_blocks_0_resnets_0_conv1");
        check("input_blocks_2_0_emb_layers_1", 2, "down_blocks_0_resnets_1_time_emb_proj");
        check("input_blocks_4_0_skip_connection", 2, "down_blocks_1_resnets_0_conv_shortcut");
        check("input_blocks_6_0_op", 2, "down_blocks_1_downsamplers_0_conv");
        check("middle_block_0_out_layers_3", 2, "mid_block_resnets_0_conv2");
        check("middle_block_1_proj_in", 2, "mid_block_attentions_0_proj_in");
        check("middle_block_2_in_layers_2", 2, "mid_block_resnets_1_conv1");
        check(&format!("output_blocks_5_1_{attn}"), 2, &format!("up_blocks_1_attentions_2_{attn}"));
        check("output_blocks_2_2_conv", 2, "up_blocks_0_upsamplers_0_conv");
        check("output_blocks_8_0_out_layers_3", 2, "up_blocks_2_resnets_2_conv2");
        // Of a step without attention.
        check("output_blocks_2_1_conv", 2, "up_blocks_0_upsamplers_0_conv");
        // One layer a block.
        check(&format!("input_blocks_3_1_{attn}"), 1, &format!("down_blocks_1_attentions_0_{attn}"));
        check("input_blocks_2_0_op", 1, "down_blocks_0_downsamplers_0_conv");
        check(&format!("output_blocks_3_1_{attn}"), 1, &format!("up_blocks_1_attentions_1_{attn}"));
    }

    #[test]
    fn layers_outside_the_blocks_have_names_of_their_own() {
        let pairs = [
            ("input_blocks_0_0", "conv_in"),
            ("out_2", "conv_out"),
            ("time_embed_2", "time_embedding_linear_2"),
            ("label_emb_0_2", "add_embedding_linear_2"),
        ];
        pairs.iter().for_each(|(flat, expected)| assert_eq!(diffusers(flat, 2).as_deref(), Some(*expected)));
    }

    #[test]
    fn other_names_are_none() {
        let none = [
            "input_blocks_0_1_proj_in",
            "input_blocks_x_1_proj_in",
            "input_blocks_4_2_conv",
            "input_blocks_4_0_in_layers_0",
            "input_blocks_4",
            "middle_block_3_in_layers_2",
            "output_blocks_2_2_op",
            "double_blocks_0_img_attn_qkv",
            "",
        ];
        none.iter().for_each(|flat| assert_eq!(diffusers(flat, 2), None, "{flat}"));
    }
}
