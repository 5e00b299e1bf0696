//! DiT, PixArt and Hunyuan-DiT alone, whole and cut, BERT, and whole generations. Cases: `pixart_*`, `dit_*`, `hunyuan_*`,
//! `bert`.

use std::sync::Arc;

use models::Request;
use models::autoencoder_kl::AutoencoderKlConfig;
use models::bert::{BertConfig, BertEncoder};
use models::blocks::{BlockModel, Layout, RangeOf};
use models::denoise::Denoiser;
use models::dit::DiTDenoiser;
use models::dit_transformer::{DiTTransformer, DiTTransformerConfig};
use models::hunyuan::HunyuanDenoiser;
use models::hunyuan_dit::{HunyuanDiT, HunyuanDiTConfig};
use models::model_dir::{ModelDir, read_json};
use models::pixart::PixArtDenoiser;
use models::pixart_transformer::{PixArtTransformer, PixArtTransformerConfig};
use models::request::{Encoder, Guidance};
use models::stage::Inputs;
use models::tokenizer::{Encoding, Tokenizer};
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use serde_json::Value;
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

use crate::pipeline::{
    Family, NOISE_TOLERANCE, TextEncoder, add, check_draws, check_embeds, check_start, decode, denoise, feed_noise, generation,
    jobs, load, one_by_one, run_stage, start, text,
};
use crate::transformers::{at_every_layout, block_by_block, inputs};

pub(crate) fn pixart(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: PixArtTransformerConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| PixArtTransformer::load(w, &config, range);
    let check_embedded = |case: &mut Case, hidden: &Tensors| {
        let taps = [
            ("tap.pos_embed", "hidden_states"),
            ("tap.adaln_single.0", "timestep"),
            ("tap.adaln_single.1", "embedded_timestep"),
            ("tap.caption_projection", "encoder_hidden_states"),
        ];
        taps.into_iter().try_for_each(|(tap, name)| check_reshaped(case, tap, hidden, name))
    };
    block_by_block(case, &dir, config.num_layers, load, check_embedded, check_block("transformer_blocks"))?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

pub(crate) fn dit(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: DiTTransformerConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| DiTTransformer::load(w, &config, range);
    let check_embedded = |case: &mut Case, hidden: &Tensors| check_reshaped(case, "tap.pos_embed", hidden, "hidden_states");
    block_by_block(case, &dir, config.num_layers, load, check_embedded, check_block("transformer_blocks"))?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

pub(crate) fn hunyuan(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: HunyuanDiTConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| HunyuanDiT::load(w, &config, range);
    let check_embedded = |case: &mut Case, hidden: &Tensors| {
        check_reshaped(case, "tap.pos_embed", hidden, "hidden_states")?;
        check_reshaped(case, "tap.time_extra_emb", hidden, "temb")?;
        check_t5(case, &config, hidden)
    };
    block_by_block(case, &dir, config.num_layers, load, check_embedded, check_block("blocks"))?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

/// Recorded is T5's text before its padding is replaced: what was not replaced is compared.
fn check_t5(case: &mut Case, config: &HunyuanDiTConfig, hidden: &Tensors) -> Outcome {
    let name = "tap.text_embedder";
    let got = hidden.get("encoder_hidden_states").and_then(|text| Ok(text.narrow(1, config.text_len, config.text_len_t5)?));
    let got = got.and_then(|got| Ok(got.flatten_to(1)?)).map_err(text)?; // [B, L, D] -> [B L, D]
    let kept = |mask: &Tensor, recorded: &Tensor| {
        let mask = mask.to_dtype(DType::U8)?.reshape(((), 1))?.broadcast_as(got.shape())?;
        mask.where_cond(&got, recorded)
    };
    let got = kept(case.tensor("in.text_embedding_mask_t5")?, case.tensor(name)?).map_err(text)?;
    case.check(name, &got)
}

fn check_reshaped(case: &mut Case, tap: &str, hidden: &Tensors, name: &str) -> Outcome {
    let recorded = case.tensor(tap)?.shape().clone();
    let got = hidden.get(name).and_then(|got| Ok(got.reshape(recorded)?)).map_err(text)?;
    case.check(tap, &got)
}

fn check_block(blocks: &'static str) -> impl FnMut(&mut Case, &Tensors, usize) -> Outcome {
    move |case, hidden, block| case.check(&format!("tap.{blocks}.{block}"), hidden.get("hidden_states").map_err(text)?)
}

pub(crate) fn bert(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: BertConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| BertEncoder::load(w, &config, range);
    let inputs = inputs(case);
    let whole = Weights::open(&dir, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(|e| e.to_string())?;
    let embedded = load(&whole, RangeOf::WHOLE).and_then(|model| model.embed(&inputs)).map_err(text)?;
    case.check("out.hidden_states.0", embedded.get("hidden_states").map_err(text)?)?;
    for layers in 1..=config.num_hidden_layers {
        // A network of the first layers alone.
        let first = BertConfig { num_hidden_layers: layers, ..config.clone() };
        let load = |w: &Weights, _: RangeOf| {
            (layers..config.num_hidden_layers).for_each(|i| w.skip(format!("encoder.layer.{i}")));
            BertEncoder::load(w, &first, RangeOf::WHOLE)
        };
        let ran = run_block_model(&dir, Layout::SOLO, &inputs, load).map_err(text)?;
        case.check(&format!("out.hidden_states.{layers}"), ran.output("last_hidden_state").map_err(text)?)?;
    }
    for (tp, block_ranges) in [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (4, 3)] {
        let ran = run_block_model(&dir, Layout::new(tp, block_ranges), &inputs, load).map_err(text)?;
        for output in &ran.outputs {
            for name in ["last_hidden_state", "pooler_output"] {
                let got = output.get(name).map_err(text)?;
                case.check(&format!("out.{name}"), got).map_err(|e| format!("at tp {tp} x {block_ranges} ranges: {e}"))?;
            }
        }
    }
    Ok(())
}

/// Captions are taken in lower case, so that their ids are compared here.
pub(crate) fn pixart_pipeline(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let family = Family {
        denoiser: &PixArtDenoiser::load(&dir).map_err(text)?,
        guidance: Guidance::Cfg,
        encoders: Vec::new(),
        embeds: vec![("encode_prompt.call0.0", "prompt_embeds"), ("encode_prompt.call0.2", "negative_prompt_embeds")],
        network: "transformer",
        inputs: ["timestep", "encoder_attention_mask", "added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"]
            .into_iter()
            .map(|name| (name, name))
            .chain([("arg0", "hidden_states")])
            .collect(),
        pictures: Vec::new(),
        encode: None,
        unscale: &|latents| vae.unscale(latents),
    };
    let jobs = jobs(case)?;
    let tokenizer = Tokenizer::load(&dir.root().join("tokenizer")).map_err(text)?.of_captions();
    for (call, caption) in [Some(jobs[0].prompt.as_str()), jobs[0].negative_prompt.as_deref()].into_iter().flatten().enumerate() {
        let Encoding { input_ids, attention_mask } = tokenizer.encode(caption, jobs[0].max_sequence_length).map_err(text)?;
        for (name, row) in [("input_ids", input_ids), ("attention_mask", attention_mask)] {
            let row = Tensor::new(vec![row], &Device::Cpu).map_err(|e| e.to_string())?;
            case.check_within(&format!("text_encoder.call{call}.{name}"), &row, 0.0)?;
        }
    }
    check_draws(case)?;
    let mut inputs = vec![Inputs::default(); jobs.len()];
    let outputs = one_by_one(case, &dir, "text_encoder", &jobs, &inputs)?;
    add(&mut inputs, outputs)?;
    let states = start(&family, &jobs, &inputs)?;
    check_embeds(case, &family, &states)?;
    check_start(case, &family, &states)?;
    let latents = denoise(case, &dir, family.network, &jobs, &inputs)?;
    decode(case, &dir, &family, &jobs, latents)
}

pub(crate) fn hunyuan_pipeline(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let encoder =
        |component, tokenizer, tokens| TextEncoder { component, tokenizer, encoder: Encoder::First, tokens: Some(tokens) };
    let named =
        ["text_embedding_mask", "text_embedding_mask_t5", "image_meta_size", "style", "image_rotary_emb.0", "image_rotary_emb.1"];
    let family = Family {
        denoiser: &HunyuanDenoiser::load(&dir).map_err(text)?,
        guidance: Guidance::Cfg,
        encoders: vec![encoder("text_encoder", "tokenizer", 77), encoder("text_encoder_2", "tokenizer_2", 256)],
        embeds: vec![
            ("encode_prompt.call0.0", "prompt_embeds"),
            ("encode_prompt.call0.1", "negative_prompt_embeds"),
            ("encode_prompt.call1.0", "prompt_embeds_2"),
            ("encode_prompt.call1.1", "negative_prompt_embeds_2"),
        ],
        network: "transformer",
        inputs: named.into_iter().map(|name| (name, name)).chain([("arg0", "hidden_states"), ("arg1", "timestep")]).collect(),
        pictures: Vec::new(),
        encode: None,
        unscale: &|latents| vae.unscale(latents),
    };
    generation(case, &dir, &family)
}

/// Classes in place of prompts. Recorded of every step are both halves of the reference's batch, which are alike.
pub(crate) fn dit_pipeline(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let denoiser = DiTDenoiser::load(&dir).map_err(text)?;
    let family = Family {
        denoiser: &denoiser,
        guidance: Guidance::Cfg,
        encoders: Vec::new(),
        embeds: Vec::new(),
        network: "transformer",
        inputs: Vec::new(),
        pictures: Vec::new(),
        encode: None,
        unscale: &|latents| vae.unscale(latents),
    };
    let number = |name: &str| case.param(name).as_f64().ok_or_else(|| format!("no {name}"));
    let (steps, scale) = (number("num_inference_steps")? as usize, number("guidance_scale")?);
    let job = |class: &Value| Request {
        prompt: class.to_string(),
        num_inference_steps: steps,
        guidance_scale: Some(scale),
        ..Request::default()
    };
    let jobs: Vec<Request> = case.param("class_labels").as_array().into_iter().flatten().map(job).collect();
    check_draws(case)?;
    let mut inputs = vec![Inputs::default(); jobs.len()];
    feed_noise(case, &jobs, &mut inputs)?;
    let branches: Vec<_> =
        start(&family, &jobs, &inputs)?.iter().map(|state| denoiser.branches(state).map_err(text)).collect::<Result<_, _>>()?;
    for (recorded, name) in [("arg0", "hidden_states"), ("timestep", "timestep"), ("class_labels", "class_labels")] {
        let halves = (0..2).flat_map(|half| branches.iter().map(move |of_job| of_job[half].get(name).cloned()));
        let halves = halves.collect::<Result<Vec<_>, _>>().map_err(text)?;
        let given = Tensor::cat(&halves, 0).map_err(|e| e.to_string())?;
        case.check_within(&format!("transformer.call0.in.{recorded}"), &given, NOISE_TOLERANCE)?;
    }
    // Several labels of a class, as the index has them.
    let named = |prompt: &str| denoiser.start(Request { prompt: prompt.into(), ..jobs[0].clone() }, Inputs::default());
    for (label, class) in [("golden retriever", 207u32), ("Carassius auratus", 1)] {
        let found =
            named(label).map_err(text)?.tensors.get("class_labels").and_then(|t| Ok(t.to_vec1::<u32>()?)).map_err(text)?;
        assert_eq!(found, [class], "{label}");
    }
    assert!(named("a red fox").is_err() && named("1000").is_err() && named("-1").is_err());
    let mut stage = load(case, &dir, family.network)?;
    let tasks: Vec<_> = jobs.iter().cloned().zip(inputs).collect();
    let mut samples = vec![Vec::new(); steps];
    let latents = run_stage(&mut *stage, &tasks, |step, sample| samples[step - 1].push(sample.clone()))?;
    for (step, rows) in samples.into_iter().enumerate() {
        let both = Tensor::cat(&[rows.clone(), rows].concat(), 0).map_err(|e| e.to_string())?;
        case.check(&format!("step{step:02}.prev_sample"), &both)?;
    }
    decode(case, &dir, &family, &jobs, latents)
}
