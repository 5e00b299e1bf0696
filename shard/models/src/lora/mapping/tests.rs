use std::collections::HashMap;
use std::path::Path;

use parallel::Device;
use parallel::lora::Cut;

use super::*;

/// Two attention layers, a fused pair's targets, and a modulation of two halves.
fn transformer() -> Sites {
    let site = |name: &str, d_in, d_out| Site { name: name.into(), d_in, d_out, kernel: None, cut: Cut::Whole };
    let block = "single_transformer_blocks.0";
    Sites::new(
        "transformer",
        [
            site(&format!("{block}.attn.to_q"), 4, 4),
            site(&format!("{block}.attn.to_k"), 4, 4),
            site(&format!("{block}.attn.to_v"), 4, 4),
            site(&format!("{block}.proj_mlp"), 4, 16),
            site("norm_out.linear", 4, 8),
        ],
    )
}

fn encoder() -> Sites {
    Sites::new(
        "text_encoder",
        [Site { name: "encoder.layers.0.mlp.fc1".into(), d_in: 3, d_out: 5, kernel: None, cut: Cut::Whole }],
    )
}

/// Tensors whose elements count from 0, saved with `config` as diffusers' metadata.
fn write(dir: &Path, tensors: &[(&str, &[usize])], config: Option<&str>) -> std::path::PathBuf {
    let tensors: HashMap<String, Tensor> = tensors
        .iter()
        .map(|(name, shape)| {
            let elements = shape.iter().product::<usize>();
            let tensor = Tensor::arange(0f32, elements as f32, &Device::Cpu).unwrap();
            ((*name).to_owned(), tensor.reshape(*shape).unwrap())
        })
        .collect();
    let path = dir.join("adapter.safetensors");
    let metadata = config.map(|config| HashMap::from([("lora_adapter_metadata".to_owned(), config.to_owned())]));
    safetensors::serialize_to_file(&tensors, metadata, &path).unwrap();
    path
}

fn map(tensors: &[(&str, &[usize])], config: Option<&str>) -> Result<Vec<Change>> {
    let dir = tempfile::tempdir().unwrap();
    let file = AdapterFile::open(&write(dir.path(), tensors, config))?;
    changes(&file, &[encoder(), transformer()], false)
}

fn reason(result: Result<Vec<Change>>) -> String {
    result.unwrap_err().to_string()
}

const Q: &str = "single_transformer_blocks.0.attn.to_q";

#[test]
fn every_style_of_key_finds_its_layer() {
    let flat = "lora_unet_single_transformer_blocks_0_attn_to_q";
    for (down, up) in [
        (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight")),
        (format!("{Q}.lora_down.weight"), format!("{Q}.lora_up.weight")),
        (format!("base_model.model.{Q}.lora_A.default.weight"), format!("base_model.model.{Q}.lora_B.default.weight")),
        (format!("{flat}.lora_down.weight"), format!("{flat}.lora_up.weight")),
    ] {
        let found = map(&[(&down, &[2, 4]), (&up, &[4, 2])], None).unwrap();
        assert_eq!((found.len(), found[0].site.as_str(), found[0].factor), (1, Q, 1.0), "{down}");
        assert_eq!((found[0].component.as_str(), found[0].elements), ("transformer", 16));
    }
    for module in ["text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"] {
        let (down, up) = (format!("{module}.lora_down.weight"), format!("{module}.lora_up.weight"));
        let found = map(&[(&down, &[2, 3]), (&up, &[5, 2])], None).unwrap();
        assert_eq!((found[0].component.as_str(), found[0].site.as_str()), ("text_encoder", "encoder.layers.0.mlp.fc1"));
    }
}

#[test]
fn the_oldest_keys_are_named_after_the_attentions_processor() {
    let site = |name: &str| Site { name: name.to_owned(), d_in: 4, d_out: 4, kernel: None, cut: Cut::Whole };
    let attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
    let unet = Sites::new("unet", ["to_q", "to_out.0"].map(|name| site(&format!("{attention}.{name}"))));
    let clip = Sites::new("text_encoder", ["q_proj", "out_proj"].map(|name| site(&format!("encoder.layers.0.self_attn.{name}"))));
    let found = |module: &str| {
        let dir = tempfile::tempdir().unwrap();
        let [down, up] = ["down", "up"].map(|factor| format!("{module}_lora.{factor}.weight"));
        let file = AdapterFile::open(&write(dir.path(), &[(&down, &[2, 4]), (&up, &[4, 2])], None))?;
        Ok::<_, crate::Error>(changes(&file, &[clip.clone(), unet.clone()], false)?.remove(0).site)
    };
    for prefix in ["", "unet."] {
        assert_eq!(found(&format!("{prefix}{attention}.processor.to_q")).unwrap(), format!("{attention}.to_q"));
        assert_eq!(found(&format!("{prefix}{attention}.processor.to_out")).unwrap(), format!("{attention}.to_out.0"));
    }
    let text = "text_encoder.text_model.encoder.layers.0.self_attn";
    assert_eq!(found(&format!("{text}.to_q")).unwrap(), "encoder.layers.0.self_attn.q_proj");
    assert_eq!(found(&format!("{text}.to_out")).unwrap(), "encoder.layers.0.self_attn.out_proj");
    let error = found(&format!("{attention}.processor.add_k_proj")).unwrap_err().to_string();
    assert!(error.contains("for no layer of the model"), "{error}");
}

#[test]
fn kohyas_third_text_encoder_is_the_second_of_a_model_that_has_two() {
    let t5 = || {
        let site =
            Site { name: "encoder.block.0.layer.0.SelfAttention.q".into(), d_in: 3, d_out: 5, kernel: None, cut: Cut::Whole };
        Sites::new("text_encoder_2", [site])
    };
    let map = |module: &str, sites: Sites| {
        let dir = tempfile::tempdir().unwrap();
        let (down, up) = (format!("{module}.lora_down.weight"), format!("{module}.lora_up.weight"));
        let file = AdapterFile::open(&write(dir.path(), &[(&down, &[2, 3]), (&up, &[5, 2])], None))?;
        changes(&file, &[encoder(), sites, transformer()], false)
    };
    let flat = "encoder_block_0_layer_0_SelfAttention_q";
    for prefix in ["lora_te3", "lora_te2"] {
        let found = map(&format!("{prefix}_{flat}"), t5().without_third_text_encoder()).unwrap();
        assert_eq!((found.len(), found[0].component.as_str()), (1, "text_encoder_2"), "{prefix}");
    }
    map(&format!("lora_te3_{flat}"), t5()).unwrap_err();
    let of_another = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q";
    map(of_another, t5().without_third_text_encoder()).unwrap_err();
}

#[test]
fn a_fused_layer_is_several_and_swapped_halves_come_back() {
    let fused = "lora_unet_single_blocks_0_linear1";
    let last = "lora_unet_final_layer_adaLN_modulation_1";
    let (down, up, alpha) = (format!("{fused}.lora_down.weight"), format!("{fused}.lora_up.weight"), format!("{fused}.alpha"));
    let (last_down, last_up) = (format!("{last}.lora_down.weight"), format!("{last}.lora_up.weight"));
    let dir = tempfile::tempdir().unwrap();
    let tensors: [(&str, &[usize]); 5] =
        [(&down, &[2, 4]), (&up, &[28, 2]), (&alpha, &[1]), (&last_down, &[1, 4]), (&last_up, &[8, 1])];
    let file = AdapterFile::open(&write(dir.path(), &tensors, None)).unwrap();
    let found = changes(&file, &[transformer()], false).unwrap();
    let rows: Vec<(&str, usize, usize)> =
        found.iter().map(|change| (change.site.as_str(), change.rows[0].start, change.rows[0].end)).collect();
    let block = "single_transformer_blocks.0";
    let expected = [
        ("norm_out.linear".to_owned(), 4, 8),
        (format!("{block}.attn.to_k"), 4, 8),
        (format!("{block}.attn.to_q"), 0, 4),
        (format!("{block}.attn.to_v"), 8, 12),
        (format!("{block}.proj_mlp"), 12, 28),
    ];
    assert!(rows.iter().copied().eq(expected.iter().map(|(site, start, end)| (site.as_str(), *start, *end))), "{rows:?}");
    // An alpha of 0 is an alpha.
    assert_eq!(found[1].factor, 0.0);
    let b = found[0].factors(&file).unwrap().b.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(b, [4.0, 5.0, 6.0, 7.0, 0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn alpha_and_rank_may_be_in_the_metadata() {
    let (down, up) = (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight"));
    let factor = |config: &str| map(&[(&down, &[2, 4]), (&up, &[4, 2])], Some(config)).map(|found| found[0].factor);
    assert_eq!(factor(r#"{"transformer.lora_alpha": 4, "transformer.r": 2}"#).unwrap(), 2.0);
    let patterns = r#"{"transformer.lora_alpha": 4, "transformer.r": 8, "transformer.alpha_pattern": {"attn.to_q": 1, "to_k": 9},
        "transformer.rank_pattern": {"to_q": 2}}"#;
    assert_eq!(factor(patterns).unwrap(), 0.5);
    assert_eq!(factor(r#"{"text_encoder.lora_alpha": 4}"#).unwrap(), 1.0, "of another component");
    assert_eq!(factor(r#"{"transformer.lora_alpha": 4, "transformer.use_rslora": true}"#).unwrap(), 4.0 / 2f64.sqrt());
    for (config, named) in [
        (r#"{"transformer.use_dora": true}"#, "transformer.use_dora"),
        (r#"{"transformer.r": 3}"#, "transformer.r"),
        (r#"{"transformer.alpha_pattern": {"to_[qk]": 1}}"#, "transformer.alpha_pattern"),
    ] {
        let error = factor(config).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn keys_for_no_layer_are_listed() {
    let (down, up) = (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight"));
    let tensors: [(&str, &[usize]); 5] = [
        (&down, &[2, 4]),
        (&up, &[4, 2]),
        ("transformer.blocks.7.lora_A.weight", &[2, 4]),
        ("text_encoder_3.x.lora_B.weight", &[2, 4]),
        ("something.else", &[1]),
    ];
    let error = reason(map(&tensors, None));
    for key in ["`transformer.blocks.7.lora_A.weight`", "`text_encoder_3.x.lora_B.weight`", "`something.else`", "3 of its keys"] {
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_wrong_shape_and_a_factor_without_the_other_name_the_tensor() {
    let (down, up) = (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight"));
    assert!(reason(map(&[(&down, &[2, 5]), (&up, &[4, 2])], None)).contains(&format!("`{down}` has shape [2, 5]")));
    assert!(reason(map(&[(&down, &[2, 4]), (&up, &[4, 3])], None)).contains(&format!("`{up}` has shape [4, 3]")));
    assert!(reason(map(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 2])], None)).contains(&down));
    assert!(reason(map(&[(&down, &[2, 4])], None)).contains(&down));
}

#[test]
fn factors_of_single_pixels_are_matrices_if_both_are() {
    let (down, up) = (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight"));
    let dir = tempfile::tempdir().unwrap();
    let file = AdapterFile::open(&write(dir.path(), &[(&down, &[2, 4, 1, 1]), (&up, &[4, 2, 1, 1])], None)).unwrap();
    let found = changes(&file, &[transformer()], false).unwrap();
    let factors = found[0].factors(&file).unwrap();
    assert_eq!((found[0].elements, factors.a.dims(), factors.b.dims()), (16, [2, 4].as_slice(), [4, 2].as_slice()));
    assert!(reason(map(&[(&down, &[2, 4]), (&up, &[4, 2, 1, 1])], None)).contains(&format!("`{down}` has shape [2, 4]")));
    assert!(
        reason(map(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 3, 1, 1])], None)).contains(&format!("`{up}` has shape [4, 3, 1, 1]"))
    );
    assert!(
        reason(map(&[(&down, &[2, 4, 3, 3]), (&up, &[4, 2, 1, 1])], None)).contains(&format!("`{down}` has shape [2, 4, 3, 3]"))
    );
}

#[test]
fn a_convolutions_factors_have_its_kernel_and_single_pixels() {
    let site = |name: &str, size| Site { name: name.into(), d_in: 4, d_out: 6, kernel: Some(size), cut: Cut::Whole };
    let unet = Sites::new("unet", [site("conv_in", 3), site("down_blocks.0.resnets.0.conv_shortcut", 1)]);
    let map = |module: &str, a: &[usize], b: &[usize]| -> Result<Factors> {
        let dir = tempfile::tempdir().unwrap();
        let (down, up) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
        let file = AdapterFile::open(&write(dir.path(), &[(&down, a), (&up, b)], None))?;
        let found = changes(&file, std::slice::from_ref(&unet), false)?.remove(0);
        let factors = found.factors(&file)?;
        assert_eq!(bytes_of(std::slice::from_ref(&found), "unet"), 4 * (factors.a.elem_count() + factors.b.elem_count()) as u64);
        Ok(factors)
    };
    for module in ["unet.conv_in", "lora_unet_conv_in", "lora_unet_input_blocks_0_0"] {
        let factors = map(module, &[2, 4, 3, 3], &[6, 2, 1, 1]).unwrap();
        assert_eq!((factors.a.dims(), factors.b.dims()), ([2, 36].as_slice(), [6, 2].as_slice()), "{module}");
    }
    let shortcut = "unet.down_blocks.0.resnets.0.conv_shortcut";
    for (a, b) in [(&[2, 4][..], &[6, 2][..]), (&[2, 4, 1, 1], &[6, 2, 1, 1])] {
        assert_eq!(map(shortcut, a, b).unwrap().a.dims(), [2, 4]);
    }
    let refused = |a: &[usize], b: &[usize], factor: &str, found: &[usize]| {
        let error = map("unet.conv_in", a, b).unwrap_err().to_string();
        assert!(error.contains(&format!("`unet.conv_in.{factor}.weight` has shape {found:?}")), "{error}");
    };
    refused(&[2, 4, 1, 1], &[6, 2, 1, 1], "lora_A", &[2, 4, 1, 1]);
    refused(&[2, 4, 3], &[6, 2, 1, 1], "lora_A", &[2, 4, 3]);
    refused(&[2, 36], &[6, 2], "lora_A", &[2, 36]);
    refused(&[2, 4, 3, 3], &[6, 2], "lora_B", &[6, 2]);
    refused(&[2, 4, 3, 3], &[6, 2, 3, 3], "lora_B", &[6, 2, 3, 3]);
}

#[test]
fn the_blocks_of_the_original_u_net_are_as_long_as_the_models() {
    let unet = |layers: usize| {
        let site = |name: String| Site { name, d_in: 4, d_out: 4, kernel: None, cut: Cut::Whole };
        let resnets = (0..layers).map(|i| site(format!("down_blocks.0.resnets.{i}.time_emb_proj")));
        let blocks = (0..3).map(|block| site(format!("down_blocks.{block}.attentions.0.proj_in")));
        Sites::new("unet", resnets.chain(blocks))
    };
    let module = "lora_unet_input_blocks_4_1_proj_in";
    let (down, up) = (format!("{module}.lora_down.weight"), format!("{module}.lora_up.weight"));
    let dir = tempfile::tempdir().unwrap();
    let file = AdapterFile::open(&write(dir.path(), &[(&down, &[2, 4]), (&up, &[4, 2])], None)).unwrap();
    let found = |layers: usize| changes(&file, &[unet(layers)], false).map(|found| found[0].site.clone());
    assert_eq!(found(2).unwrap(), "down_blocks.1.attentions.0.proj_in");
    assert_eq!(found(3).unwrap_err().to_string().matches("for no layer").count(), 1, "the fourth step of four has a downsampler");
    assert!(found(0).is_err(), "it has no such blocks");
}

#[test]
fn two_tensors_for_one_layer_are_refused() {
    let (a, b) = (format!("transformer.{Q}.lora_A.weight"), format!("transformer.{Q}.lora_B.weight"));
    let (c, d) = (format!("{Q}.lora_down.weight"), format!("{Q}.lora_up.weight"));
    let error = reason(map(&[(&a, &[2, 4]), (&b, &[4, 2]), (&c, &[2, 4]), (&d, &[4, 2])], None));
    assert!(error.contains("both for"), "{error}");
}

#[test]
fn a_file_that_is_not_whole_or_claims_too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &[("a.lora_A.weight", &[2, 4])], None);
    let whole = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8], part: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = AdapterFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    for cut in [8, 20, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..cut], "truncated");
    }
    refused(&whole[..5], "shorter than 8 bytes");
    refused(&[&(100u64 << 20).to_le_bytes()[..], &whole[8..]].concat(), "header claims");
}

#[test]
fn a_folder_holds_one_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(AdapterFile::open(dir.path()).unwrap_err().to_string().contains("no safetensors"));
    let path = write(dir.path(), &[("a.lora_A.weight", &[2, 4])], None);
    let (file, folder) = (AdapterFile::open(&path).unwrap(), AdapterFile::open(dir.path()).unwrap());
    assert_eq!((file.digest(), file.path()), (folder.digest(), folder.path()));
    std::fs::copy(&path, dir.path().join("second.safetensors")).unwrap();
    assert!(AdapterFile::open(dir.path()).unwrap_err().to_string().contains("2 safetensors"));
}
