//! llama.cpp's names of a T5 encoder's tensors (`gguf-py/gguf/tensor_mapping.py`).

/// What the reference calls a tensor; `None`: it has none of these names.
pub(super) fn t5(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("shared.weight".to_owned()),
        "enc.output_norm.weight" => return Some("encoder.final_layer_norm.weight".to_owned()),
        _ => {}
    }
    let (index, layer) = name.strip_prefix("enc.blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let layer = match layer {
        "attn_norm" => "0.layer_norm",
        "attn_q" => "0.SelfAttention.q",
        "attn_k" => "0.SelfAttention.k",
        "attn_v" => "0.SelfAttention.v",
        "attn_o" => "0.SelfAttention.o",
        "attn_rel_b" => "0.SelfAttention.relative_attention_bias",
        "ffn_norm" => "1.layer_norm",
        "ffn_gate" => "1.DenseReluDense.wi_0",
        "ffn_up" => "1.DenseReluDense.wi_1",
        "ffn_down" => "1.DenseReluDense.wo",
        _ => return None,
    };
    Some(format!("encoder.block.{index}.layer.{layer}.weight"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_have_the_references_names() {
        let q = "encoder.block.23.layer.0.SelfAttention.q.weight";
        assert_eq!(t5("enc.blk.23.attn_q.weight").as_deref(), Some(q));
        assert_eq!(t5("token_embd.weight").as_deref(), Some("shared.weight"));
        assert_eq!(t5("dec.blk.0.attn_q.weight"), None);
        assert_eq!(t5("enc.blk.0.attn_q.bias"), None);
    }
}
