//! What a picture says of its own making. Nothing here differs between two runs of the same job on the same plan: no id,
//! no time, no worker.

use proto::v1::{JobSpec, NoiseGenerator, Products, RunTask, StageKind};

/// The text chunks of picture number `index` of the task's job, whose model is multiplied in `products`.
pub(crate) fn text(
    run: &RunTask,
    spec: &JobSpec,
    scheduler: Option<&str>,
    products: Products,
    index: usize,
) -> Vec<(String, String)> {
    let mut text = Vec::new();
    let mut say = |key: &str, value: Option<String>| text.extend(value.map(|value| (format!("atelier:{key}"), value)));
    say("model", Some(spec.model.clone()));
    say("model_sha256", non_empty(&run.model_digest));
    // What fills in a picture in one forward draws nothing.
    let draws = run.kind() != StageKind::Inpaint;
    say("seed", spec.seed.filter(|_| draws).map(|v| v.to_string()));
    say("noise_generator", draws.then(|| noise_generator(spec).to_owned()));
    say("steps", spec.num_inference_steps.map(|v| v.to_string()));
    say("size", spec.width.zip(spec.height).map(|(width, height)| format!("{width}x{height}")));
    say("guidance_scale", spec.guidance_scale.map(|v| v.to_string()));
    say("true_cfg_scale", spec.true_cfg_scale.map(|v| v.to_string()));
    say("shift", spec.shift.map(|v| v.to_string()));
    say("eta", spec.eta.filter(|eta| *eta > 0.0).map(|v| v.to_string()));
    say("guidance_rescale", spec.guidance_rescale.filter(|part| *part > 0.0).map(|v| v.to_string()));
    say("noise_level", spec.noise_level.map(|v| v.to_string()));
    say("denoising_end", spec.denoising_end.map(|v| v.to_string()));
    // Only a refiner is told of them.
    let refined = spec.denoising_end.is_none_or(|end| end < 1.0);
    say("aesthetic_score", spec.aesthetic_score.filter(|_| refined).map(|v| v.to_string()));
    say("negative_aesthetic_score", spec.negative_aesthetic_score.filter(|_| refined).map(|v| v.to_string()));
    for (key, size) in [
        ("original_size", spec.original_size),
        ("target_size", spec.target_size),
        ("negative_original_size", spec.negative_original_size),
        ("negative_target_size", spec.negative_target_size),
    ] {
        say(key, size.map(|size| format!("{}x{}", size.width, size.height)));
    }
    for (key, offset) in [
        ("crops_coords_top_left", spec.crops_coords_top_left),
        ("negative_crops_coords_top_left", spec.negative_crops_coords_top_left),
    ] {
        say(key, offset.map(|offset| format!("{},{}", offset.top, offset.left)));
    }
    say("clip_skip", spec.clip_skip.map(|v| v.to_string()));
    say("skip_layer_guidance", skip_layer_guidance(spec));
    say("loras", non_empty(&loras(spec)));
    say("loras_sha256", non_empty(&run.adapter_digests.join(",")));
    say("controls", non_empty(&controls(spec)));
    say("controls_sha256", non_empty(&run.control_digests.join(",")));
    say("guess_mode", spec.guess_mode.then(|| "true".to_owned()));
    say("strength", spec.strength.filter(|_| !spec.image_blob_id.is_empty()).map(|v| v.to_string()));
    say("image", spec.num_images_per_prompt.filter(|n| *n > 1).map(|n| format!("{} of {n}", index + 1)));
    say("scheduler", scheduler.map(str::to_owned));
    say("layout", non_empty(&run.layout));
    say("products", Some(products.to_string()));
    say("version", Some(env!("CARGO_PKG_VERSION").to_owned()));
    if spec.embed_prompt {
        text.push(("prompt".into(), spec.prompt.clone()));
        let more = [
            ("prompt_2", &spec.prompt_2),
            ("negative_prompt", &spec.negative_prompt),
            ("negative_prompt_2", &spec.negative_prompt_2),
            ("prompt_3", &spec.prompt_3),
            ("negative_prompt_3", &spec.negative_prompt_3),
        ];
        text.extend(more.into_iter().filter_map(|(key, prompt)| Some((key.to_owned(), prompt.clone()?))));
    }
    text
}

/// "7,8,9 x 2.8 from 0.01 to 0.2".
fn skip_layer_guidance(spec: &JobSpec) -> Option<String> {
    let layers: Vec<String> = spec.skip_guidance_layers.iter().map(u32::to_string).collect();
    let (scale, start, stop) = (spec.skip_layer_guidance_scale?, spec.skip_layer_guidance_start?, spec.skip_layer_guidance_stop?);
    (!layers.is_empty()).then(|| format!("{} x {scale} from {start} to {stop}", layers.join(",")))
}

/// "canny x 0.8 from 0 to 1 of BLOB", with its mode if it has one; the blob's name is the sha256 of the picture.
fn controls(spec: &JobSpec) -> String {
    let each = spec.controls.iter().map(|control| {
        let mode = control.mode.map(|mode| format!(" mode {mode}")).unwrap_or_default();
        let (scale, start) = (control.conditioning_scale.unwrap_or(1.0), control.guidance_start.unwrap_or_default());
        let end = control.guidance_end.unwrap_or(1.0);
        format!("{}{mode} x {scale} from {start} to {end} of {}", control.name, control.image_blob_id)
    });
    each.collect::<Vec<_>>().join(",")
}

/// "pixel:0.8,outline:1".
fn loras(spec: &JobSpec) -> String {
    let each: Vec<String> = spec.loras.iter().map(|lora| format!("{}:{}", lora.name, lora.scale.unwrap_or(1.0))).collect();
    each.join(",")
}

fn noise_generator(spec: &JobSpec) -> &'static str {
    match spec.noise_generator() {
        NoiseGenerator::Unspecified | NoiseGenerator::TorchCpu => "torch_cpu",
        NoiseGenerator::TorchCuda => "torch_cuda",
    }
}

fn non_empty(value: &str) -> Option<String> {
    Some(value.to_owned()).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_in_the_picture_only_when_asked_for() {
        let spec = JobSpec { prompt: "a secret garden".into(), seed: Some(7), ..JobSpec::default() };
        let run = RunTask { layout: "transformer=tp2x1".into(), ..RunTask::default() };
        let kept = text(&run, &spec, Some("FlowMatchEulerDiscreteScheduler"), Products::Amx, 0);
        assert!(kept.contains(&("atelier:seed".into(), "7".into())), "{kept:?}");
        assert!(kept.contains(&("atelier:scheduler".into(), "FlowMatchEulerDiscreteScheduler".into())), "{kept:?}");
        assert!(kept.contains(&("atelier:products".into(), "amx".into())), "{kept:?}");
        assert!(!format!("{kept:?}").contains("secret"), "{kept:?}");
        assert!(!format!("{kept:?}").contains("lora"), "{kept:?}");
        let lora = proto::v1::Lora { name: "pixel".into(), scale: Some(0.8) };
        let adapted = JobSpec { loras: vec![lora], ..spec.clone() };
        let with_adapter = RunTask { adapter_digests: vec!["ab".into()], ..run.clone() };
        let kept = text(&with_adapter, &adapted, None, Products::F32, 0);
        assert!(kept.contains(&("atelier:loras".into(), "pixel:0.8".into())), "{kept:?}");
        assert!(kept.contains(&("atelier:loras_sha256".into(), "ab".into())), "{kept:?}");
        let told = text(&run, &JobSpec { embed_prompt: true, ..spec }, None, Products::F32, 0);
        assert!(told.contains(&("prompt".into(), "a secret garden".into())), "{told:?}");
    }
}
