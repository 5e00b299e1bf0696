use parallel::DType;

use super::*;

/// A denoiser of the published configurations.
fn denoiser(edits: bool) -> QwenImageDenoiser {
    let editing = edits.then_some(Editing { several: true, seen: 1 << 20, encoded: 1 << 20 });
    let scheduler = r#"{"use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
        "max_image_seq_len": 8192, "shift_terminal": 0.02}"#;
    let scheduler = serde_json::from_str(scheduler).unwrap();
    QwenImageDenoiser { editing, scheduler, vae: AutoencoderKlQwenImageConfig::default(), controls: Conditions::default() }
}

fn embeds(text_tokens: usize) -> Tensor {
    Tensor::zeros((1, text_tokens, 8), DType::F32, &Device::Cpu).unwrap()
}

/// With texts of 5 and 3 tokens, and the latents of a picture.
fn inputs(picture: Option<[usize; 2]>) -> Inputs {
    let zeros = |[h, w]: [usize; 2]| Tensor::zeros((1, 16, h, w), DType::F32, &Device::Cpu).unwrap();
    let latents = |size| Tensors::new().with("image.mean", zeros(size)).with("image.logvar", zeros(size));
    Inputs {
        conditioning: Tensors::new().with("prompt_embeds", embeds(5)).with("negative_prompt_embeds", embeds(3)),
        image_latents: picture.map(latents),
        ..Inputs::default()
    }
}

fn request() -> Request {
    Request { negative_prompt: Some(String::new()), true_cfg_scale: 4.0, num_inference_steps: 4, ..Request::default() }
}

fn field(result: Result<DenoiseState>) -> &'static str {
    match result {
        Err(Error::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_shift_of_the_job_takes_the_place_of_the_models_own() {
    let sigmas = |shift| denoiser(false).scheduler(&Request { shift, ..request() }, 4096).unwrap().sigmas().to_vec();
    let shifted: Vec<f32> = [1.0f64, 0.75, 0.5, 0.25].iter().map(|s| (3.0 * s / (1.0 + 2.0 * s)) as f32).collect();
    for (got, expected) in sigmas(Some(3.0)).iter().zip(&shifted) {
        assert!((got - expected).abs() < 1e-6, "{got} is not {expected}");
    }
    assert_eq!(sigmas(Some(3.0)).last(), Some(&0.0));
    let own = sigmas(None);
    assert!((own[3] - 0.02).abs() < 1e-6, "stretched to shift_terminal: {own:?}");
    for shift in [0.0, -1.0, f64::NAN] {
        let start = denoiser(false).start(Request { shift: Some(shift), ..request() }, inputs(None));
        assert_eq!(field(start), "shift");
    }
}

#[test]
fn the_two_passes_of_a_job_share_a_forward_only_with_texts_of_their_length() {
    let denoiser = denoiser(false);
    let state = denoiser.start(request(), inputs(None)).unwrap();
    let [cond, uncond] = [0, 1].map(|branch| denoiser.batch_key(&state, branch));
    assert_ne!(cond, uncond);
    let mut swapped = inputs(None);
    swapped.conditioning.insert("prompt_embeds", embeds(3));
    swapped.conditioning.insert("negative_prompt_embeds", embeds(5));
    let swapped = denoiser.start(request(), swapped).unwrap();
    assert_eq!([1, 0].map(|branch| denoiser.batch_key(&swapped, branch)), [cond, uncond]);
}

#[test]
fn an_edited_picture_follows_the_target_and_gives_the_sides_that_a_job_does_not_name() {
    let denoiser = denoiser(true);
    for ([height, width], grid) in [([0, 0], [3, 5]), ([64, 0], [4, 5]), ([0, 32], [3, 2]), ([64, 32], [4, 2])] {
        let request = Request { height, width, ..request() };
        let state = denoiser.start(request, inputs(Some([6, 10]))).unwrap();
        let shapes = state.tensors.get("img_shapes").unwrap().to_vec2::<u32>().unwrap();
        assert_eq!(shapes, [[1, grid[0] as u32, grid[1] as u32], [1, 3, 5]]);
        let target = grid[0] * grid[1];
        assert_eq!(state.latents.dims(), [1, target, 64]);
        for branch in denoiser.branches(&state).unwrap() {
            assert_eq!(branch.get("hidden_states").unwrap().dims(), [1, target + 15, 64]);
        }
    }
}

#[test]
fn edited_pictures_follow_each_other_and_the_last_one_gives_the_sides() {
    let denoiser = denoiser(true);
    let mut two = inputs(Some([6, 10]));
    let more = Tensor::ones((1, 16, 4, 8), DType::F32, &Device::Cpu).unwrap();
    two.image_latents.as_mut().unwrap().insert("image.1.mean", more);
    let state = denoiser.start(Request { height: 0, width: 0, ..request() }, two).unwrap();
    assert_eq!(state.tensors.get("img_shapes").unwrap().to_vec2::<u32>().unwrap(), [[1, 2, 4], [1, 3, 5], [1, 2, 4]]);
    let one = denoiser.start(Request { height: 32, width: 64, ..request() }, inputs(Some([6, 10]))).unwrap();
    let given = |state: &DenoiseState| denoiser.branches(state).unwrap()[0].get("hidden_states").unwrap().clone();
    assert_eq!((given(&state).dims(), given(&one).dims()), (&[1, 8 + 15 + 8, 64][..], &[1, 8 + 15, 64][..]));
    assert_ne!(denoiser.batch_key(&state, 0), denoiser.batch_key(&one, 0));
}

#[test]
fn what_an_editing_job_lacks_or_has_too_much_of_is_named() {
    assert_eq!(field(denoiser(true).start(request(), inputs(None))), "image");
    let open = Request { height: 0, width: 0, num_images_per_prompt: 5, ..request() };
    assert_eq!(field(denoiser(true).start(open, inputs(Some([128, 128])))), "num_images_per_prompt");
    assert_eq!(field(denoiser(false).start(Request { width: 0, ..request() }, inputs(None))), "width");
    assert_eq!(field(denoiser(false).start(Request { height: 8, ..request() }, inputs(None))), "height");
}

#[test]
fn guidance_keeps_the_length_of_every_token() {
    let token = |values: [f32; 2]| Tensor::new(&[[values]], &Device::Cpu).unwrap();
    // Combined it is (-3, 16), of length sqrt(265).
    let guided = guided_at_the_norm_of(&token([0.0, 4.0]), &token([1.0, 0.0]), 4.0).unwrap();
    let guided = guided.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let scale = 4.0 / 265f32.sqrt();
    assert!((guided[0] + 3.0 * scale).abs() < 1e-6 && (guided[1] - 16.0 * scale).abs() < 1e-6, "{guided:?}");
}
