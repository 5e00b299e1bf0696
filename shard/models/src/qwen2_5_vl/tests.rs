use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parallel::collective::Placeholder;
use parallel::{Device, Solo};
use serde_json::{Value, json};

use super::*;

fn case() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/qwen2_5_vl_image")
}

fn recorded_json() -> Value {
    serde_json::from_slice(&std::fs::read(case().join("model/config.json")).unwrap()).unwrap()
}

fn recorded() -> Qwen25VlConfig {
    serde_json::from_value(recorded_json()).unwrap()
}

fn inputs() -> Tensors {
    let tensors = candle_core::safetensors::load(case().join("tensors.safetensors"), &Device::Cpu).unwrap();
    tensors.into_iter().filter_map(|(name, t)| Some((name.strip_prefix("in.")?.to_owned(), t))).collect()
}

fn open(dir: &Path) -> Weights {
    Weights::open(dir, Arc::new(Solo), DType::F32, &Device::Cpu).unwrap()
}

fn load() -> Qwen25VlModel {
    Qwen25VlModel::load(&open(&case().join("model")), &recorded(), RangeOf::WHOLE).unwrap()
}

fn invalid(field: &str, result: Result<Tensors>) {
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::Invalid { field: found, .. } if *found == field), "{error}");
}

#[test]
fn the_old_and_the_new_shape_of_a_configuration_say_the_same() {
    let mut old = recorded_json();
    old.as_object_mut().unwrap().remove("text_config");
    assert_eq!(serde_json::from_value::<Qwen25VlConfig>(old).unwrap(), recorded());

    let mut new = recorded_json();
    let rope = new["text_config"].as_object_mut().unwrap().remove("rope_scaling").unwrap();
    new["text_config"]["rope_parameters"] = rope;
    new["text_config"].as_object_mut().unwrap().remove("rope_theta");
    let new = json!({"text_config": new["text_config"], "vision_config": new["vision_config"], "image_token_id": 206});
    assert_eq!(serde_json::from_value::<Qwen25VlConfig>(new).unwrap(), recorded());
}

#[test]
fn a_configuration_of_what_is_not_here_is_refused_by_name() {
    recorded().check(8).unwrap();
    let check = |field: &str, change: &dyn Fn(&mut Qwen25VlConfig)| {
        let mut config = recorded();
        change(&mut config);
        let error = config.check(1).unwrap_err();
        let Error::Unsupported { field: got, .. } = error else { panic!("{field}: {error}") };
        assert_eq!(got, field);
    };
    check("hidden_size", &|c| c.hidden_size = usize::MAX);
    check("intermediate_size", &|c| c.intermediate_size = 0);
    check("vocab_size", &|c| c.vocab_size = 0);
    check("num_hidden_layers", &|c| c.num_hidden_layers = usize::MAX);
    check("num_attention_heads", &|c| c.num_attention_heads = 3);
    check("num_key_value_heads", &|c| c.num_key_value_heads = 0);
    check("hidden_act", &|c| c.hidden_act = "gelu".into());
    check("rms_norm_eps", &|c| c.rms_norm_eps = f64::NAN);
    check("rope_theta", &|c| c.rope_theta = 0.0);
    check("rope_type", &|c| c.rope_type = "yarn".into());
    check("mrope_section", &|c| c.mrope_section = vec![usize::MAX, 2]);
    check("use_sliding_window", &|c| c.use_sliding_window = true);
    check("vision_config.out_hidden_size", &|c| c.vision.out_hidden_size = 16);
    check("vision_config.depth", &|c| c.vision.depth = 0);
    check("vision_config.hidden_size", &|c| c.vision.hidden_size = 0);
    check("vision_config.num_heads", &|c| c.vision.num_heads = 16);
    check("vision_config.patch_size", &|c| c.vision.patch_size = 0);
    check("vision_config.spatial_merge_size", &|c| c.vision.spatial_merge_size = usize::MAX);
    check("vision_config.window_size", &|c| c.vision.window_size = 20);
    check("vision_config.hidden_act", &|c| c.vision.hidden_act = "quick_gelu".into());
}

#[test]
fn the_published_model_can_be_cut_eight_ways() {
    let published = Qwen25VlConfig {
        hidden_size: 3584,
        intermediate_size: 18_944,
        num_hidden_layers: 28,
        num_attention_heads: 28,
        num_key_value_heads: 4,
        mrope_section: vec![16, 24, 24],
        vision: Qwen25VlVisionConfig::default(),
        ..recorded()
    };
    [1, 2, 4, 8].into_iter().for_each(|tp| published.check(tp).unwrap());
    assert!(published.tp_divisor().is_multiple_of(8));
    let odd =
        Qwen25VlConfig { hidden_size: 36, mrope_section: vec![2], num_attention_heads: 9, num_key_value_heads: 3, ..recorded() };
    let odd = Qwen25VlConfig { vision: Qwen25VlVisionConfig { out_hidden_size: 36, ..odd.vision.clone() }, ..odd };
    let error = odd.check(8).unwrap_err();
    assert!(
        matches!(&error, Error::Parallel(parallel::Error::Indivisible { what, size: 36, tp: 8 }) if what == "hidden_size"),
        "{error}"
    );
    assert_eq!(odd.tp_divisor(), 4);
}

#[test]
fn pictures_and_their_tokens_must_agree() {
    let model = load();
    model.embed(&inputs()).unwrap();
    let with = |name: &str, tensor: Tensor| model.embed(&inputs().with(name, tensor));
    let ids = inputs().get("input_ids").unwrap().clone();
    let pixels = inputs().get("pixel_values").unwrap().clone();
    let grid = |grid: [i64; 3]| Tensor::new(&[grid], &Device::Cpu).unwrap();

    invalid("input_ids", with("input_ids", ids.ones_like().unwrap()));
    invalid("input_ids", with("input_ids", (ids.ones_like().unwrap() * 206.0).unwrap()));
    invalid("pixel_values", with("pixel_values", pixels.narrow(0, 0, 56).unwrap()));
    invalid("pixel_values", with("pixel_values", pixels.narrow(1, 0, 588).unwrap()));
    for bad in [[2, 6, 10], [1, 5, 12], [1, 0, 10], [1, -6, 10], [1, 1 << 40, 2], [1, 60_000, 60_000]] {
        invalid("image_grid_thw", with("image_grid_thw", grid(bad)));
    }
    let mut without = inputs();
    without.take("image_grid_thw").unwrap();
    let error = model.embed(&without).unwrap_err();
    assert!(matches!(&error, Error::Parallel(parallel::Error::MissingInput { name }) if name == "image_grid_thw"), "{error}");
}

#[test]
fn without_the_vision_tower_texts_are_read_and_pictures_refused() {
    let w = open(&case().join("model"));
    let model = Qwen25VlModel::load_text(&w, &recorded(), RangeOf::WHOLE).unwrap();
    let whole = open(&case().join("model"));
    let seeing = Qwen25VlModel::load(&whole, &recorded(), RangeOf::WHOLE).unwrap();
    assert!(w.bytes_held() < whole.bytes_held());
    let ids = Tensor::new(&[[1u32, 5, 9, 206, 7]], &Device::Cpu).unwrap(); // the picture's token is a word as any other
    let text = Tensors::new().with("input_ids", ids);
    let run = |model: &Qwen25VlModel| {
        let output = model.output(model.blocks(model.embed(&text).unwrap()).unwrap()).unwrap();
        output.get("last_hidden_state").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(run(&model), run(&seeing));
    invalid("pixel_values", model.embed(&inputs()));
}

#[test]
fn a_tensor_too_many_or_too_few_is_named() {
    let path = case().join("model/model.safetensors");
    let good: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let error = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        Qwen25VlModel::load(&open(dir.path()), &recorded(), RangeOf::WHOLE).unwrap_err()
    };
    let norm = good["model.norm.weight"].clone();
    let extra = error(&|tensors| drop(tensors.insert("visual.blocks.4.norm1.weight".into(), norm.clone())));
    assert!(matches!(extra, Error::Parallel(parallel::Error::UnusedTensors { .. })), "{extra}");
    for name in [
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "visual.blocks.0.attn.qkv.bias",
        "visual.blocks.3.mlp.down_proj.bias",
        "visual.merger.mlp.2.bias",
    ] {
        let missing = error(&|tensors| drop(tensors.remove(name)));
        assert!(
            matches!(&missing, Error::Parallel(parallel::Error::MissingTensor { name: found }) if found == name),
            "{missing}"
        );
    }
}

#[test]
fn what_a_rank_would_hold_is_counted_without_reading_it() {
    for rank in 0..8 {
        let group = Arc::new(Placeholder { rank, size: 8 });
        let open = || Weights::open(&case().join("model"), group.clone(), DType::F32, &Device::Cpu).unwrap();
        let (read, measured) = (open(), open().measuring());
        Qwen25VlModel::load(&read, &recorded(), RangeOf::WHOLE).unwrap();
        Qwen25VlModel::load(&measured, &recorded(), RangeOf::WHOLE).unwrap();
        assert_eq!(read.bytes_held(), measured.bytes_held(), "rank {rank}");
    }
}
