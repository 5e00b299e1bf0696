//! Golden cases of whole generations: the reference's pictures, drawn on the device by the stages that workers run.
//!
//! The tests of the sources compare every step of every case; here the picture at the end is compared, which all of it went into.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use models::Request;
use models::blocks::RankGroup;
use models::card::{StageCard, StageCondition, StageKind};
use models::model_dir::{ModelDir, read_json};
use models::registry::{self, Limits, LoadSpec, Rank};
use models::stage::{Inputs, Pictures, StageEvent};
use parallel::{DType, Device, Error, Tensor};
use serde_json::Value;

use super::Bench;
use super::report::{Check, Report};

/// A case's own tolerance is 20 times the noise of f32 on a CPU. A GPU's exponentials and sums differ by more than another order of
/// additions; a wrong formula shows up as 1e-3 and more.
const GPU_TOLERANCE: f64 = 10.0;

/// Every case of a whole generation in `folder`.
pub(super) fn run(bench: &Bench, folder: Option<&Path>, report: &mut Report) {
    let Some(folder) = folder else {
        return report.add(Check::not_run("golden cases", "no folder of them is given (--golden or GOLDEN_DIR)"));
    };
    let cases = match cases(folder) {
        Ok(cases) if !cases.is_empty() => cases,
        Ok(_) => return report.add(Check::fail("golden cases", format!("there is none in {}", folder.display()))),
        Err(error) => return report.add(Check::fail("golden cases", error.to_string())),
    };
    for case in cases {
        let what = format!("golden {}", case.name());
        match case.unsupported() {
            Some(reason) => report.add(Check::not_run(what, reason)),
            None => report.take(&what, case.check(bench).map(|check| vec![check])),
        }
    }
}

struct Case {
    dir: PathBuf,
    json: Value,
}

fn cases(folder: &Path) -> models::Result<Vec<Case>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let dir = entry.map_err(io)?.path();
        let file = dir.join("case.json");
        if file.is_file() {
            let json: Value = read_json(&file)?;
            if json["kind"] == "pipeline" {
                cases.push(Case { dir, json });
            }
        }
    }
    cases.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(cases)
}

impl Case {
    fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn param(&self, name: &str) -> &Value {
        &self.json["params"][name]
    }

    /// What of it only the sources' tests set up.
    fn unsupported(&self) -> Option<&'static str> {
        let has = |name: &str| !self.param(name).is_null();
        if self.param("prompt").is_array() || self.param("class_labels").is_array() {
            Some("several prompts share a generator; the tests of the sources run it")
        } else if self.json["lora"].is_array() {
            Some("it takes an adapter; the tests of the sources run it")
        } else if self.json.get("controlnet_weights").is_some() || self.json.get("adapter_weights").is_some() {
            Some("it takes a control; the tests of the sources run it")
        } else if has("prompt_embeds") {
            Some("it was given another case's text; the tests of the sources run it")
        } else if has("_auto_resize") || has("working_area_pixels") || !has("width") {
            Some("its picture has a size of its own; the tests of the sources run it")
        } else {
            None
        }
    }

    /// The picture against the recorded one.
    fn check(&self, bench: &Bench) -> models::Result<Check> {
        let folder = self.as_pipeline()?;
        let dir = ModelDir::open(folder.path())?;
        let image = self.draw(&dir, &bench.device)?.permute((0, 2, 3, 1))?;
        let tensors = candle_core::safetensors::load(self.dir.join("tensors.safetensors"), &Device::Cpu)?;
        let recorded = tensors.get("image").ok_or_else(|| self.bad("no picture is recorded"))?;
        if recorded.dims() != image.dims() {
            return Err(self.bad(&format!("drew {:?}, recorded is {:?}", image.dims(), recorded.dims())));
        }
        let error = (image - recorded)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let own = self.json["tolerance"]["image"]["suggested_atol"].as_f64().ok_or_else(|| self.bad("it has no tolerance"))?;
        let tolerance = if bench.on_cpu { own } else { own * GPU_TOLERANCE };
        Ok(Check::within(format!("golden {}", self.name()), error, tolerance, "", format!("of {tolerance:.1e} allowed")))
    }

    /// Stage by stage, as the model's card says.
    fn draw(&self, dir: &ModelDir, device: &Device) -> models::Result<Tensor> {
        let request = self.request()?;
        let pictures = self.pictures()?;
        let mut inputs = Inputs::default();
        for StageCard { kind, component, condition, with_pictures, .. } in registry::outline(dir)?.stages {
            if condition == StageCondition::WithImage && pictures.image.is_none() {
                continue;
            }
            // A picture that the request names is for those stages alone that ask for it.
            let given = if with_pictures { pictures.clone() } else { Pictures::default() };
            let task = match kind {
                StageKind::EncodeText | StageKind::EncodeImage => Inputs { pictures: given, ..Inputs::default() },
                StageKind::Denoise | StageKind::Decode | StageKind::Inpaint => {
                    Inputs { pictures: given, ..std::mem::take(&mut inputs) }
                }
            };
            let spec = LoadSpec {
                dir,
                component: &component,
                group: RankGroup::solo(),
                device: device.clone(),
                limits: Limits::default(),
            };
            let Rank::Leader(mut stage) = registry::load(spec, &mut |_| ())? else {
                return Err(self.bad("a group of one has a leader only"));
            };
            stage.start(0, request.clone(), task);
            let mut output = Err(self.bad("a stage gave nothing"));
            while stage.turn(&mut |event| match event {
                StageEvent::Done { payload, .. } => output = Ok(payload),
                StageEvent::Failed { error, .. } => output = Err(error),
                StageEvent::Started { .. } | StageEvent::Step { .. } => {}
            })? {}
            match output? {
                models::Payload::Image(mut tensors) => return Ok(tensors.take("image")?),
                output => inputs.add(output)?,
            }
        }
        Err(self.bad("no stage decodes"))
    }

    fn request(&self) -> models::Result<Request> {
        let text = |name: &str| self.param(name).as_str().map(str::to_owned);
        let number = |name: &str| self.param(name).as_f64();
        let size =
            |name: &str| number(name).map(|value| value as usize).ok_or_else(|| self.bad(&format!("no parameter `{name}`")));
        Ok(Request {
            prompt: text("prompt").ok_or_else(|| self.bad("no parameter `prompt`"))?,
            prompt_2: text("prompt_2"),
            prompt_3: text("prompt_3"),
            negative_prompt: text("negative_prompt"),
            width: size("width")?,
            height: size("height")?,
            num_inference_steps: size("num_inference_steps")?,
            guidance_scale: number("guidance_scale"),
            true_cfg_scale: number("true_cfg_scale").unwrap_or(1.0),
            seed: self.json["generator_seed"].as_u64().ok_or_else(|| self.bad("no generator_seed"))?,
            num_images_per_prompt: size("num_images_per_prompt").unwrap_or(1),
            strength: number("strength"),
            clip_skip: size("clip_skip").ok(),
            eta: number("eta").unwrap_or_default(),
            guidance_rescale: number("guidance_rescale").unwrap_or_default(),
            noise_level: size("noise_level").ok(),
            max_sequence_length: size("max_sequence_length").unwrap_or(512),
            ..Request::default()
        })
    }

    fn pictures(&self) -> models::Result<Pictures> {
        let read = |name: &str| {
            let path = self.param(name).as_str().map(|file| self.dir.join(file));
            path.map(|path| std::fs::read(&path).map_err(|source| Error::Io { path, source })).transpose()
        };
        Ok(Pictures { image: read("image")?, mask_image: read("mask_image")?, ..Pictures::default() })
    }

    /// The case's weights as a model of the case's class, with its scheduler: several were recorded with the weights of one.
    fn as_pipeline(&self) -> models::Result<tempfile::TempDir> {
        let named = self.json["weights"].as_str().ok_or_else(|| self.bad("it names no weights"))?;
        let weights = self.dir.parent().unwrap_or(&self.dir).join(named);
        let io = |source| Error::Io { path: weights.clone(), source };
        let folder = tempfile::tempdir().map_err(io)?;
        for entry in std::fs::read_dir(&weights).map_err(io)? {
            let path = entry.and_then(|entry| entry.path().canonicalize()).map_err(io)?;
            symlink(&path, folder.path().join(path.file_name().unwrap_or_default())).map_err(io)?;
        }
        let index = folder.path().join("model_index.json");
        let mut json: Value = read_json(&index)?;
        json["_class_name"] = self.json["pipeline_class"].clone();
        let mut scheduler = self.json["scheduler"]["config"].clone();
        scheduler["_class_name"] = self.json["scheduler"]["class"].clone();
        json["scheduler"][1] = scheduler["_class_name"].clone();
        let schedulers = folder.path().join("scheduler");
        std::fs::remove_file(&index).and_then(|()| std::fs::write(&index, json.to_string())).map_err(io)?;
        std::fs::remove_file(&schedulers).and_then(|()| std::fs::create_dir(&schedulers)).map_err(io)?;
        std::fs::write(schedulers.join("scheduler_config.json"), scheduler.to_string()).map_err(io)?;
        Ok(folder)
    }

    fn bad(&self, reason: &str) -> models::Error {
        models::Error::ModelDir { path: self.dir.clone(), reason: reason.to_owned() }
    }
}
