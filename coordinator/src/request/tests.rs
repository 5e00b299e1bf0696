use proto::v1::{AdapterDefault, Lora};

use super::*;

fn number(name: &str, minimum: f64, maximum: f64, multiple_of: f64, default: f64) -> Parameter {
    Parameter { name: name.into(), minimum, maximum, multiple_of, default_value: Some(default), ..Parameter::default() }
}

#[test]
fn further_pictures_are_uploaded_blobs_behind_a_first_one() {
    let mut card = card();
    let blob = |c: &str| c.repeat(64);
    let fields = |card: &ModelCard, image: &str, more: &[String], missing: &[String]| {
        let spec = JobSpec { image_blob_id: image.into(), more_image_blob_ids: more.to_vec(), ..spec() };
        match Request::parse(spec, card, Context { seed: 1, max_pixels: u64::MAX, missing_blobs: missing }) {
            Ok(_) => vec![],
            Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(fields(&card, &blob("a"), &[blob("b")], &[]), ["spec.more_image_blob_ids"], "the model takes one");
    card.parameters.push(Parameter { name: "more_image_blob_ids".into(), ..Parameter::default() });
    assert!(fields(&card, &blob("a"), &[blob("b"), blob("c")], &[]).is_empty());
    assert_eq!(fields(&card, "", &[blob("b")], &[]), ["spec.more_image_blob_ids"]);
    assert_eq!(fields(&card, &blob("a"), &vec![blob("b"); 4], &[]), ["spec.more_image_blob_ids"]);
    assert_eq!(fields(&card, &blob("a"), &[blob("b"), "../b".into()], &[]), ["spec.more_image_blob_ids[1]"]);
    assert_eq!(fields(&card, &blob("a"), &[String::new()], &[]), ["spec.more_image_blob_ids[0]"]);
    let missing = ["more_image_blob_ids[0]".to_owned()];
    assert_eq!(fields(&card, &blob("a"), &[blob("b")], &missing), ["spec.more_image_blob_ids[0]"]);
}

fn card() -> ModelCard {
    ModelCard {
        name: "emoji".into(),
        parameters: vec![
            number("width", 64.0, 1e9, 16.0, 256.0),
            number("height", 64.0, 1e9, 16.0, 256.0),
            number("num_inference_steps", 1.0, 100.0, 0.0, 20.0),
            number("guidance_scale", 0.0, 20.0, 0.0, 3.5),
            number("num_images_per_prompt", 1.0, 10.0, 0.0, 1.0),
            number("strength", 0.0, 1.0, 0.0, 0.6),
            Parameter { name: "image_blob_id".into(), ..Parameter::default() },
            Parameter { name: "mask_image_blob_id".into(), ..Parameter::default() },
        ],
        max_pixels: 1 << 30,
        adapters: vec![
            adapter("fast", &[("num_inference_steps", 8.0), ("guidance_scale", 1.0)]),
            adapter("faster", &[("num_inference_steps", 4.0), ("guidance_scale", 1.0)]),
            adapter("pixel", &[]),
            Adapter { problem: "it is truncated".into(), ..adapter("torn", &[]) },
        ],
        ..ModelCard::default()
    }
}

fn adapter(name: &str, defaults: &[(&str, f64)]) -> Adapter {
    let default = |(name, value): &(&str, f64)| AdapterDefault { name: (*name).to_owned(), value: *value };
    Adapter { name: name.into(), defaults: defaults.iter().map(default).collect(), ..Adapter::default() }
}

fn with_loras(loras: &[(&str, Option<f64>)]) -> JobSpec {
    let lora = |(name, scale): &(&str, Option<f64>)| Lora { name: (*name).to_owned(), scale: *scale };
    JobSpec { loras: loras.iter().map(lora).collect(), ..spec() }
}

fn spec() -> JobSpec {
    JobSpec { model: "emoji".into(), prompt: "a red car".into(), ..JobSpec::default() }
}

fn parse(spec: JobSpec) -> Result<Request> {
    let context = Context { seed: 7, max_pixels: 10 * 2048 * 2048, missing_blobs: &[] };
    Request::parse(spec, &card(), context)
}

fn fields(spec: JobSpec) -> Vec<String> {
    match parse(spec) {
        Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|v| v.field).collect(),
        other => panic!("expected violations, found {other:?}"),
    }
}

#[test]
fn sizes_that_a_model_is_told_of_are_checked_number_by_number_and_those_of_the_other_pass_come_together() {
    let mut xl = card();
    let names =
        ["original_size", "target_size", "negative_original_size", "negative_target_size", "negative_crops_coords_top_left"];
    let told = |name: &str| Parameter { name: name.into(), maximum: 4096.0, multiple_of: 1.0, ..Parameter::default() };
    xl.parameters.extend(names.map(told));
    let spec = JobSpec { model: "emoji".into(), prompt: "a fox".into(), ..JobSpec::default() };
    let context = Context { seed: 7, max_pixels: u64::MAX, missing_blobs: &[] };
    let refused = |spec: JobSpec, card: &ModelCard| match Request::parse(spec, card, context) {
        Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
        other => panic!("{other:?}"),
    };
    let size = |height, width| Some(Size { height, width });
    let good = JobSpec { original_size: size(512, 640), ..spec.clone() };
    assert_eq!(Request::parse(good.clone(), &xl, context).unwrap().spec().original_size, size(512, 640));
    let none: Vec<String> = refused(good, &card());
    assert_eq!(none, ["spec.original_size"], "a model that is told nothing");
    assert_eq!(refused(JobSpec { target_size: size(64, 4097), ..spec.clone() }, &xl), ["spec.target_size"]);
    let alone = JobSpec { negative_original_size: size(64, 64), ..spec.clone() };
    assert_eq!(refused(alone, &xl), ["spec.negative_original_size"]);
    let crop = JobSpec { negative_crops_coords_top_left: Some(Offset { top: 1, left: 2 }), ..spec.clone() };
    assert_eq!(refused(crop, &xl), ["spec.negative_crops_coords_top_left"]);
    let both = JobSpec { negative_original_size: size(64, 64), negative_target_size: size(64, 64), ..spec.clone() };
    assert!(Request::parse(both, &xl, context).is_ok());
    assert_eq!(refused(JobSpec { eta: Some(0.5), ..spec }, &xl), ["spec.eta"]);
}

#[test]
fn a_prompt_is_enough_and_every_default_is_filled_in() {
    let spec = parse(spec()).unwrap().into_spec();
    assert_eq!((spec.width, spec.height, spec.num_inference_steps), (Some(256), Some(256), Some(20)));
    assert_eq!((spec.guidance_scale, spec.seed, spec.num_images_per_prompt), (Some(3.5), Some(7), Some(1)));
    assert_eq!(spec.noise_generator(), NoiseGenerator::TorchCpu);
    assert_eq!(spec.strength, None, "strength means nothing without a picture");
}

#[test]
fn the_clients_seed_is_kept() {
    assert_eq!(parse(JobSpec { seed: Some(u64::MAX), ..spec() }).unwrap().spec().seed, Some(u64::MAX));
}

#[test]
fn all_wrong_fields_are_reported_together() {
    let wrong = JobSpec {
        prompt: " ".into(),
        width: Some(100),
        num_inference_steps: Some(101),
        true_cfg_scale: Some(2.0),
        guidance_scale: Some(f64::NAN),
        ..spec()
    };
    let expected = ["spec.prompt", "spec.true_cfg_scale", "spec.width", "spec.num_inference_steps", "spec.guidance_scale"];
    assert_eq!(fields(wrong), expected);
}

#[test]
fn a_billion_pixels_are_refused_by_arithmetic_alone() {
    let huge =
        JobSpec { width: Some(4_294_967_280), height: Some(4_294_967_280), num_images_per_prompt: Some(4_294_967_280), ..spec() };
    assert!(fields(huge).contains(&"spec.width".to_owned()));
    let sides = JobSpec { width: Some(32_000), height: Some(32_000), ..spec() };
    assert_eq!(fields(sides), ["spec.width"]);
}

#[test]
fn strength_and_mask_need_a_picture() {
    let without = JobSpec { strength: Some(0.5), mask_image_blob_id: "a".repeat(64), ..spec() };
    assert_eq!(fields(without), ["spec.strength", "spec.mask_image_blob_id"]);
    let with = JobSpec { image_blob_id: "a".repeat(64), ..spec() };
    assert_eq!(parse(with).unwrap().spec().strength, Some(0.6));
}

#[test]
fn a_job_from_a_picture_leaves_the_base_model_a_step_before_its_refiner() {
    let mut refined = card();
    refined.parameters.push(number("denoising_end", 0.001, 1.0, 0.0, 0.8));
    let fields = |strength: f64, steps: u32, denoising_end: Option<f64>| {
        let (strength, num_inference_steps, image_blob_id) = (Some(strength), Some(steps), "a".repeat(64));
        let spec = JobSpec { strength, num_inference_steps, image_blob_id, denoising_end, ..spec() };
        match Request::parse(spec, &refined, Context { seed: 7, max_pixels: 1 << 30, missing_blobs: &[] }) {
            Ok(_) => vec![],
            Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
            Err(error) => panic!("{error}"),
        }
    };
    let refused = ["spec.strength"];
    assert!(fields(0.3, 50, None).is_empty());
    assert_eq!(fields(0.2, 50, None), refused, "the refiner has them all");
    assert_eq!(fields(0.1, 50, None), refused);
    assert!(fields(0.1, 50, Some(0.95)).is_empty());
    assert!(fields(0.1, 50, Some(1.0)).is_empty(), "the refiner has no part");
    assert_eq!(fields(0.3, 6, None), refused, "one step of six, and the refiner has one");
    assert_eq!(fields(0.7, 10, Some(0.3)), refused);
    assert!(fields(0.8, 10, Some(0.3)).is_empty());
}

#[test]
fn an_adapter_that_cannot_be_used_is_refused_by_field() {
    let names = with_loras(&[("pixel", None), ("nobody", None), ("../pixel", None), ("torn", None), ("pixel", None)]);
    assert_eq!(fields(names), (1..5).map(|i| format!("spec.loras[{i}].name")).collect::<Vec<_>>());
    let error = parse(with_loras(&[("torn", None)])).unwrap_err().to_string();
    assert!(error.contains("it is truncated"), "{error}");
    for scale in [f64::NAN, f64::INFINITY, 100.1, -100.1] {
        assert_eq!(fields(with_loras(&[("pixel", Some(scale))])), ["spec.loras[0].scale"]);
    }
    assert_eq!(fields(with_loras(&[("pixel", None); 9])), ["spec.loras"]);
    let plain = ModelCard { adapters: vec![], ..card() };
    let context = Context { seed: 7, max_pixels: 10 * 2048 * 2048, missing_blobs: &[] };
    let error = Request::parse(with_loras(&[("pixel", None)]), &plain, context).unwrap_err().to_string();
    assert!(error.contains("spec.loras[0].name") && error.contains("no adapters"), "{error}");
}

#[test]
fn an_adapter_brings_defaults_and_the_job_has_the_last_word() {
    let filled = parse(with_loras(&[("fast", None), ("pixel", Some(0.5))])).unwrap().into_spec();
    assert_eq!((filled.num_inference_steps, filled.guidance_scale), (Some(8), Some(1.0)));
    assert_eq!((filled.loras[0].scale, filled.loras[1].scale), (Some(1.0), Some(0.5)));
    let said = JobSpec { num_inference_steps: Some(9), ..with_loras(&[("fast", None), ("faster", None)]) };
    let filled = parse(said).unwrap().into_spec();
    assert_eq!((filled.num_inference_steps, filled.guidance_scale), (Some(9), Some(1.0)));
    let error = parse(with_loras(&[("fast", None), ("faster", None)])).unwrap_err().to_string();
    assert!(["spec.loras", "\"fast\"", "\"faster\"", "num_inference_steps"].iter().all(|part| error.contains(part)), "{error}");
}

#[test]
fn blocks_to_skip_are_held_to_the_cards_bounds() {
    let mut card = card();
    card.parameters.push(Parameter { name: "skip_guidance_layers".into(), maximum: 23.0, ..Parameter::default() });
    let parse = |layers: &[u32]| {
        let context = Context { seed: 7, max_pixels: 1 << 20, missing_blobs: &[] };
        Request::parse(JobSpec { skip_guidance_layers: layers.to_vec(), ..spec() }, &card, context)
    };
    parse(&[7, 8, 23]).unwrap();
    let Err(Error::InvalidRequest(violations)) = parse(&[7, 24]) else { panic!("24 was taken") };
    assert_eq!((violations.len(), violations[0].field.as_str()), (1, "spec.skip_guidance_layers"));
    let Err(Error::InvalidRequest(violations)) = parse(&vec![99; 1 << 18]) else { panic!("a quarter of a million was taken") };
    assert_eq!((violations.len(), violations[0].field.as_str()), (1, "spec.skip_guidance_layers"));
}

#[test]
fn a_side_that_is_left_to_the_model_counts_against_the_ceiling() {
    let mut card = card();
    card.parameters.iter_mut().for_each(|parameter| parameter.default_value = None);
    let parse = |spec: JobSpec, max_pixels: u64| Request::parse(spec, &card, Context { seed: 7, max_pixels, missing_blobs: &[] });
    let fields = |parsed: Result<Request>| match parsed {
        Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
        _ => vec![],
    };
    let open = || JobSpec { num_inference_steps: Some(1), ..spec() };
    let one = u64::from(OPEN_SIDE).pow(2);
    assert!(parse(open(), one).is_ok());
    assert_eq!(fields(parse(open(), one - 1)), ["spec.width"]);
    assert_eq!(fields(parse(JobSpec { num_images_per_prompt: Some(2), ..open() }, one)), ["spec.width"]);
    assert_eq!(fields(parse(JobSpec { height: Some(1040), ..open() }, one)), ["spec.width"]);
    assert!(parse(JobSpec { height: Some(512), ..open() }, one).is_ok());
}

#[test]
fn pictures_that_the_model_looks_at_count_against_the_ceiling() {
    let mut card = ModelCard { pixels_per_image: 1 << 20, ..card() };
    card.parameters.push(Parameter { name: "more_image_blob_ids".into(), ..Parameter::default() });
    let fields = |card: &ModelCard, more: usize, images: u32, max_pixels: u64| {
        let spec = JobSpec {
            image_blob_id: "a".repeat(64),
            more_image_blob_ids: vec!["b".repeat(64); more],
            num_images_per_prompt: Some(images),
            ..spec()
        };
        match Request::parse(spec, card, Context { seed: 7, max_pixels, missing_blobs: &[] }) {
            Ok(_) => vec![],
            Err(Error::InvalidRequest(violations)) => violations.into_iter().map(|violation| violation.field).collect(),
            Err(error) => panic!("{error}"),
        }
    };
    let one = (1 << 16) + (1 << 20);
    assert!(fields(&card, 0, 1, one).is_empty());
    assert!(fields(&card, 0, 2, 2 * one).is_empty());
    assert_eq!(fields(&card, 0, 2, 2 * one - 1), ["spec.num_images_per_prompt"]);
    assert_eq!(fields(&card, 1, 1, one), ["spec.more_image_blob_ids"]);
    assert!(fields(&card, 3, 2, 2 * ((1 << 16) + (4 << 20))).is_empty());
    assert_eq!(fields(&card, 3, 2, 2 * (1 << 16) - 1), ["spec.width"], "what is drawn is too much by itself");
    card.pixels_per_image = u64::MAX;
    assert_eq!(fields(&card, 3, 2, 1 << 30), ["spec.more_image_blob_ids"], "numbers end");
    card.pixels_per_image = 0;
    assert!(fields(&card, 3, 1, 1 << 16).is_empty());
}

#[test]
fn of_many_adapters_a_few_are_named() {
    let mut card = card();
    card.adapters = (0..256).map(|number| adapter(&format!("style{number}"), &[])).collect();
    let context = Context { seed: 7, max_pixels: 1 << 20, missing_blobs: &[] };
    let error = Request::parse(with_loras(&[("none", None)]), &card, context).unwrap_err().to_string();
    assert!(error.ends_with("only style0, style1, style2, style3, style4, … and 251 more"), "{error}");
}

#[test]
fn a_blob_id_is_never_a_path() {
    for id in ["../../etc/passwd", &"A".repeat(64), &"a".repeat(63)] {
        assert_eq!(fields(JobSpec { image_blob_id: id.to_owned(), ..spec() }), ["spec.image_blob_id"]);
    }
}

#[test]
fn a_prompt_has_at_most_32_000_characters_of_any_script() {
    assert!(parse(JobSpec { prompt: "馬".repeat(32_000), ..spec() }).is_ok());
    assert_eq!(fields(JobSpec { prompt: "馬".repeat(32_001), ..spec() }), ["spec.prompt"]);
}

#[test]
fn a_nul_in_any_prompt_is_refused_by_field() {
    assert_eq!(fields(JobSpec { prompt: "a red\0 car".into(), embed_prompt: true, ..spec() }), ["spec.prompt"]);
    let others = JobSpec {
        prompt_2: Some("\0".into()),
        prompt_3: Some("\0".into()),
        negative_prompt: Some("\0".into()),
        negative_prompt_2: Some("\0".into()),
        negative_prompt_3: Some("\0".into()),
        ..spec()
    };
    let refused = fields(others);
    for field in ["prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"] {
        assert!(refused.contains(&format!("spec.{field}")), "{field} of {refused:?}");
    }
}

#[test]
fn no_error_repeats_the_prompt() {
    let prompt = "secret".repeat(10_000);
    let error = parse(JobSpec { prompt, ..spec() }).unwrap_err();
    assert!(!error.to_string().contains("secret"));
}

#[test]
fn a_request_id_is_a_uuid() {
    assert!(check_request_id("").is_ok());
    assert!(check_request_id("6fa459ea-ee8a-4ca4-894e-db77e160355e").is_ok());
    assert!(check_request_id("one").is_err());
}
