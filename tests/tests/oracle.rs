//! An implementation that is not ours agrees: candle-transformers' FLUX, on the same random weights.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;

use candle_nn::VarBuilder;
use candle_transformers::models::flux::{WithForward, model};
use models::blocks::{Layout, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use parallel::{DType, Device, Tensor, Weights};
use tests::ranks::run_block_model;
use tests::synthetic;

/// Relative to the largest value. candle computes the rotations in f32.
const TOLERANCE: f64 = 1e-4;

fn config(guidance_embeds: bool) -> FluxTransformerConfig {
    FluxTransformerConfig {
        in_channels: 16,
        num_layers: 2,
        num_single_layers: 3,
        attention_head_dim: 16,
        num_attention_heads: 4,
        joint_attention_dim: 48,
        pooled_projection_dim: 24,
        guidance_embeds,
        axes_dims_rope: vec![4, 6, 6],
        ..FluxTransformerConfig::default()
    }
}

#[test]
fn flux_equals_candle_transformers() {
    for guidance_embeds in [true, false] {
        let config = config(guidance_embeds);
        let tensors = synthetic::flux_transformer(&config, 3).unwrap();
        let inputs = synthetic::flux_inputs(&config, 2, (6, 4), 5, 4).unwrap();
        let get = |name: &str| inputs.get(name).unwrap();

        let vb = VarBuilder::from_tensors(bfl_names(&tensors, &config), DType::F32, &Device::Cpu);
        let oracle = model::Flux::new(&candle_config(&config), vb).unwrap();
        let per_item = |ids: &Tensor| ids.unsqueeze(0).unwrap().repeat((2, 1, 1)).unwrap();
        let (img_ids, txt_ids) = (per_item(get("img_ids")), per_item(get("txt_ids")));
        let (img, txt) = (get("hidden_states"), get("encoder_hidden_states"));
        let (t, y) = (get("timestep"), get("pooled_projections"));
        let expected = oracle.forward(img, &img_ids, txt, &txt_ids, t, y, inputs.find("guidance")).unwrap();

        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), &tensors).unwrap();
        let load = |w: &Weights, range: RangeOf| FluxTransformer::load(w, &config, range);
        let ran = run_block_model(dir.path(), Layout::SOLO, &inputs, load).unwrap();
        let max = |t: &Tensor| f64::from(t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap());
        let difference = max(&(ran.output("sample").unwrap() - &expected).unwrap()) / max(&expected);
        println!("flux, guidance {guidance_embeds}: differs from candle-transformers by {difference:.1e}");
        assert!(difference < TOLERANCE, "guidance {guidance_embeds}: differs by {difference:.1e}");
    }
}

fn candle_config(config: &FluxTransformerConfig) -> model::Config {
    model::Config {
        in_channels: config.in_channels,
        vec_in_dim: config.pooled_projection_dim,
        context_in_dim: config.joint_attention_dim,
        hidden_size: config.inner_dim(),
        mlp_ratio: 4.0,
        num_heads: config.num_attention_heads,
        depth: config.num_layers,
        depth_single_blocks: config.num_single_layers,
        axes_dim: config.axes_dims_rope.clone(),
        theta: 10_000,
        qkv_bias: true,
        guidance_embed: config.guidance_embeds,
    }
}

/// diffusers' names to Black Forest Labs': the inverse of diffusers' `convert_flux_to_diffusers.py`.
fn bfl_names(tensors: &HashMap<String, Tensor>, config: &FluxTransformerConfig) -> HashMap<String, Tensor> {
    let mut bfl = HashMap::new();
    for end in ["weight", "bias"] {
        let get = |name: String| tensors.get(&format!("{name}.{end}"));
        // One BFL layer is one of diffusers', or several on top of each other.
        let mut put = |to: String, from: &[String]| {
            let parts: Vec<&Tensor> = from.iter().filter_map(|name| get(name.clone())).collect();
            if parts.len() == from.len() {
                bfl.insert(format!("{to}.{end}"), Tensor::cat(&parts, 0).unwrap());
            }
        };
        let mut put_one = |to: &str, from: &str| put(to.to_owned(), &[from.to_owned()]);
        put_one("img_in", "x_embedder");
        put_one("txt_in", "context_embedder");
        put_one("final_layer.linear", "proj_out");
        for (to, from) in [("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")] {
            put_one(&format!("{to}.in_layer"), &format!("time_text_embed.{from}_embedder.linear_1"));
            put_one(&format!("{to}.out_layer"), &format!("time_text_embed.{from}_embedder.linear_2"));
        }
        for i in 0..config.num_layers {
            let (to, from) = (format!("double_blocks.{i}"), format!("transformer_blocks.{i}"));
            for (stream, suffix, out) in [("img", "", "to_out.0"), ("txt", "_context", "to_add_out")] {
                put(format!("{to}.{stream}_mod.lin"), &[format!("{from}.norm1{suffix}.linear")]);
                put(format!("{to}.{stream}_attn.proj"), &[format!("{from}.attn.{out}")]);
                put(format!("{to}.{stream}_mlp.0"), &[format!("{from}.ff{suffix}.net.0.proj")]);
                put(format!("{to}.{stream}_mlp.2"), &[format!("{from}.ff{suffix}.net.2")]);
            }
            put(format!("{to}.img_attn.qkv"), &["to_q", "to_k", "to_v"].map(|p| format!("{from}.attn.{p}")));
            let added = ["add_q_proj", "add_k_proj", "add_v_proj"];
            put(format!("{to}.txt_attn.qkv"), &added.map(|p| format!("{from}.attn.{p}")));
        }
        for i in 0..config.num_single_layers {
            let (to, from) = (format!("single_blocks.{i}"), format!("single_transformer_blocks.{i}"));
            put(format!("{to}.modulation.lin"), &[format!("{from}.norm.linear")]);
            let packed = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"];
            put(format!("{to}.linear1"), &packed.map(|p| format!("{from}.{p}")));
            put(format!("{to}.linear2"), &[format!("{from}.proj_out")]);
        }
        // diffusers: scale, shift; BFL: shift, scale.
        let norm_out = get("norm_out.linear".to_owned()).unwrap().chunk(2, 0).unwrap();
        let swapped = Tensor::cat(&[&norm_out[1], &norm_out[0]], 0).unwrap();
        bfl.insert(format!("final_layer.adaLN_modulation.1.{end}"), swapped);
    }
    for (name, tensor) in tensors {
        let name = name.replace("single_transformer_blocks", "single_blocks").replace("transformer_blocks", "double_blocks");
        let single = name.starts_with("single_blocks");
        let norms = [
            ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
            ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
            ("attn.norm_q.weight", if single { "norm.query_norm.scale" } else { "img_attn.norm.query_norm.scale" }),
            ("attn.norm_k.weight", if single { "norm.key_norm.scale" } else { "img_attn.norm.key_norm.scale" }),
        ];
        for (from, to) in norms {
            if let Some(block) = name.strip_suffix(from) {
                bfl.insert(format!("{block}{to}"), tensor.clone());
            }
        }
    }
    bfl
}
