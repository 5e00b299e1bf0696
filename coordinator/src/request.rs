//! What a client asked for, checked once: a `Request` has every default filled in and cannot be invalid.
//!
//! All that is wrong with a request is reported together, each with its field. What a model takes is said by its card.

use proto::{
    MAX_PROMPT_CHARS,
    v1::{Adapter, JobSpec, ModelCard, NoiseGenerator, Offset, Parameter, Size},
};

use crate::error::{Error, Result, Violation};

mod controls;

pub use controls::{MAX_BLOBS, blob_ids, blobs, brought};

/// Hex digits of a blob's id, which is a sha256.
pub const BLOB_ID_CHARS: usize = 64;

/// What a side is taken for that a job leaves to the model, in pixels: such models draw about a megapixel.
pub(crate) const OPEN_SIDE: u32 = 1024;

/// Fields every model takes, named in its card or not: they are about the request, not about the model, or checked by name.
const ALWAYS_TAKEN: [&str; 4] = ["controls", "embed_prompt", "guess_mode", "loras"];
/// Most adapters of one job; the same as workers take.
pub const MAX_LORAS: usize = 8;
/// Adapters that are named to one who names another: a model may have hundreds, and an error must fit what carries it.
const NAMED_ADAPTERS: usize = 5;
/// Most pictures that a model looks at beside the first: each has as many tokens as the picture that is drawn.
pub const MAX_MORE_IMAGES: usize = 3;
/// Most blocks that skip-layer guidance leaves out: the largest network has 57.
pub const MAX_SKIPPED_LAYERS: usize = 64;
/// Largest scale of an adapter, and smallest with a minus: beyond it nothing is left of the picture.
pub const MAX_LORA_SCALE: f64 = 100.0;

/// A job's specification, complete and within all limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    spec: JobSpec,
}

/// What the request is checked against besides the card.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Drawn by the server; taken if the client names none.
    pub seed: u64,
    /// The server's own ceiling for width * height * num_images_per_prompt, and what the pictures that a job brings cost beside it.
    pub max_pixels: u64,
    /// Fields that name a blob the server does not have.
    pub missing_blobs: &'a [String],
}

impl Request {
    /// Checks `spec` against `card` and fills in what it leaves open.
    pub fn parse(mut spec: JobSpec, card: &ModelCard, context: Context<'_>) -> Result<Self> {
        let mut check = Check { card, violations: Vec::new() };
        check.prompts(&spec);
        check.taken(&spec);
        check.blobs(&spec, context.missing_blobs);
        check.needs(&spec);
        check.loras(&spec);
        check.adapter_defaults(&mut spec);
        fill_in(&mut spec, card, context.seed);
        check.controls(&spec);
        check.refiner(&spec);
        check.required(&spec);
        check.numbers(&spec);
        check.noise_generator(&spec);
        check.pixels(&spec, card.max_pixels.min(context.max_pixels));
        if check.violations.is_empty() { Ok(Self { spec }) } else { Err(Error::InvalidRequest(check.violations)) }
    }

    /// The specification with every default filled in, the seed included.
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// It starts from a picture.
    pub fn has_image(&self) -> bool {
        !self.spec.image_blob_id.is_empty()
    }

    /// A picture says something of the one that is drawn.
    pub fn has_controls(&self) -> bool {
        !self.spec.controls.is_empty()
    }

    /// Another model goes on with its latents.
    pub fn has_refiner(&self) -> bool {
        self.spec.denoising_end.is_some_and(|end| end < 1.0)
    }

    /// The specification, for keeping.
    pub fn into_spec(self) -> JobSpec {
        self.spec
    }
}

/// Highest priority, and lowest with a minus.
pub const MAX_PRIORITY: i32 = 100;

/// Checks a client's id for its request: a UUID, or nothing.
pub fn check_request_id(request_id: &str) -> Result<()> {
    if request_id.is_empty() || uuid::Uuid::try_parse(request_id).is_ok() {
        return Ok(());
    }
    Err(Error::invalid("request_id", "must be a UUID"))
}

/// Checks how urgent a job may be.
pub fn check_urgency(priority: i32, timeout: Option<u64>) -> Result<()> {
    if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority) {
        return Err(Error::invalid("priority", format!("must be from -{MAX_PRIORITY} to {MAX_PRIORITY}")));
    }
    match timeout {
        Some(0) => Err(Error::invalid("timeout", "must be more than nothing")),
        _ => Ok(()),
    }
}

/// A name that can only be a blob's: 64 lower-case hex digits, so nothing that could be a path.
pub fn is_blob_id(id: &str) -> bool {
    id.len() == BLOB_ID_CHARS && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The numeric fields of a specification that are set.
fn numbers(spec: &JobSpec) -> [(&'static str, Option<f64>); 19] {
    [
        ("width", spec.width.map(f64::from)),
        ("height", spec.height.map(f64::from)),
        ("num_inference_steps", spec.num_inference_steps.map(f64::from)),
        ("guidance_scale", spec.guidance_scale),
        ("true_cfg_scale", spec.true_cfg_scale),
        ("num_images_per_prompt", spec.num_images_per_prompt.map(f64::from)),
        ("max_sequence_length", spec.max_sequence_length.map(f64::from)),
        ("strength", spec.strength),
        ("clip_skip", spec.clip_skip.map(f64::from)),
        ("shift", spec.shift),
        ("eta", spec.eta),
        ("guidance_rescale", spec.guidance_rescale),
        ("noise_level", spec.noise_level.map(f64::from)),
        ("denoising_end", spec.denoising_end),
        ("aesthetic_score", spec.aesthetic_score),
        ("negative_aesthetic_score", spec.negative_aesthetic_score),
        ("skip_layer_guidance_scale", spec.skip_layer_guidance_scale),
        ("skip_layer_guidance_start", spec.skip_layer_guidance_start),
        ("skip_layer_guidance_stop", spec.skip_layer_guidance_stop),
    ]
}

/// The fields that are two numbers each, from above and from the left.
fn pairs(spec: &JobSpec) -> [(&'static str, Option<[u32; 2]>); 6] {
    let size = |size: Option<Size>| size.map(|size| [size.height, size.width]);
    let offset = |offset: Option<Offset>| offset.map(|offset| [offset.top, offset.left]);
    [
        ("original_size", size(spec.original_size)),
        ("crops_coords_top_left", offset(spec.crops_coords_top_left)),
        ("target_size", size(spec.target_size)),
        ("negative_original_size", size(spec.negative_original_size)),
        ("negative_crops_coords_top_left", offset(spec.negative_crops_coords_top_left)),
        ("negative_target_size", size(spec.negative_target_size)),
    ]
}

/// Whether each field that is not a number is set.
fn others(spec: &JobSpec) -> [(&'static str, bool); 14] {
    [
        ("prompt_2", spec.prompt_2.is_some()),
        ("prompt_3", spec.prompt_3.is_some()),
        ("negative_prompt", spec.negative_prompt.is_some()),
        ("negative_prompt_2", spec.negative_prompt_2.is_some()),
        ("negative_prompt_3", spec.negative_prompt_3.is_some()),
        ("image_blob_id", !spec.image_blob_id.is_empty()),
        ("mask_image_blob_id", !spec.mask_image_blob_id.is_empty()),
        ("more_image_blob_ids", !spec.more_image_blob_ids.is_empty()),
        ("noise_generator", spec.noise_generator != NoiseGenerator::Unspecified as i32),
        ("skip_guidance_layers", !spec.skip_guidance_layers.is_empty()),
        ("loras", !spec.loras.is_empty()),
        ("embed_prompt", spec.embed_prompt),
        ("controls", !spec.controls.is_empty()),
        ("guess_mode", spec.guess_mode),
    ]
}

fn fill_in(spec: &mut JobSpec, card: &ModelCard, seed: u64) {
    let default = |name: &str| parameter(card, name).and_then(|parameter| parameter.default_value);
    // A card's defaults are whole numbers for these; `as` saturates where they are not, and the limits catch it.
    let whole = |name: &str| default(name).map(|value| value as u32);
    spec.width = spec.width.or(whole("width"));
    spec.height = spec.height.or(whole("height"));
    spec.num_inference_steps = spec.num_inference_steps.or(whole("num_inference_steps"));
    spec.guidance_scale = spec.guidance_scale.or(default("guidance_scale"));
    spec.true_cfg_scale = spec.true_cfg_scale.or(default("true_cfg_scale"));
    spec.max_sequence_length = spec.max_sequence_length.or(whole("max_sequence_length"));
    spec.clip_skip = spec.clip_skip.or(whole("clip_skip"));
    spec.shift = spec.shift.or(default("shift"));
    spec.eta = spec.eta.or(default("eta"));
    spec.guidance_rescale = spec.guidance_rescale.or(default("guidance_rescale"));
    spec.noise_level = spec.noise_level.or(whole("noise_level"));
    spec.denoising_end = spec.denoising_end.or(default("denoising_end"));
    spec.aesthetic_score = spec.aesthetic_score.or(default("aesthetic_score"));
    spec.negative_aesthetic_score = spec.negative_aesthetic_score.or(default("negative_aesthetic_score"));
    if !spec.skip_guidance_layers.is_empty() {
        spec.skip_layer_guidance_scale = spec.skip_layer_guidance_scale.or(default("skip_layer_guidance_scale"));
        spec.skip_layer_guidance_start = spec.skip_layer_guidance_start.or(default("skip_layer_guidance_start"));
        spec.skip_layer_guidance_stop = spec.skip_layer_guidance_stop.or(default("skip_layer_guidance_stop"));
    }
    controls::fill_in(&mut spec.controls);
    for lora in &mut spec.loras {
        lora.scale = lora.scale.or(Some(1.0));
    }
    spec.num_images_per_prompt = spec.num_images_per_prompt.or(whole("num_images_per_prompt")).or(Some(1));
    // Without guidance by two passes it would have no effect.
    if spec.true_cfg_scale.is_some_and(|scale| scale > 1.0) {
        let text = parameter(card, "negative_prompt").and_then(|parameter| parameter.default_text.clone());
        spec.negative_prompt = spec.negative_prompt.take().or(text);
    }
    spec.seed = spec.seed.or(Some(seed));
    if !spec.image_blob_id.is_empty() {
        spec.strength = spec.strength.or(default("strength"));
    }
    if spec.noise_generator == NoiseGenerator::Unspecified as i32 {
        spec.noise_generator = NoiseGenerator::TorchCpu as i32;
    }
}

fn adapter<'a>(card: &'a ModelCard, name: &str) -> Option<&'a Adapter> {
    card.adapters.iter().find(|adapter| adapter.name == name)
}

/// Those of a model, for one who named none of them.
fn known_adapters(card: &ModelCard) -> String {
    let names: Vec<&str> = card.adapters.iter().take(NAMED_ADAPTERS).map(|adapter| adapter.name.as_str()).collect();
    match (names.is_empty(), card.adapters.len() - names.len()) {
        (true, _) => "no adapters".to_owned(),
        (false, 0) => format!("only {}", names.join(", ")),
        (false, more) => format!("only {}, … and {more} more", names.join(", ")),
    }
}

fn parameter<'a>(card: &'a ModelCard, name: &str) -> Option<&'a Parameter> {
    card.parameters.iter().find(|parameter| parameter.name == name)
}

struct Check<'a> {
    card: &'a ModelCard,
    violations: Vec<Violation>,
}

impl Check<'_> {
    fn refuse(&mut self, field: &str, problem: impl Into<String>) {
        self.violations.push(Violation::new(format!("spec.{field}"), problem));
    }

    fn prompts(&mut self, spec: &JobSpec) {
        for (field, text) in [("negative_prompt_2", &spec.negative_prompt_2), ("negative_prompt_3", &spec.negative_prompt_3)] {
            if text.is_some() && spec.negative_prompt.is_none() {
                self.refuse(field, "needs negative_prompt");
            }
        }
        match (self.card.without_prompt, spec.prompt.trim().is_empty()) {
            // Guess mode is for jobs that say nothing.
            (false, true) if !spec.guess_mode => self.refuse("prompt", "must not be empty"),
            (true, false) => self.refuse("prompt", format!("model {:?} does not take it", self.card.name)),
            _ => {}
        }
        for (field, text) in [
            ("prompt", Some(&spec.prompt)),
            ("prompt_2", spec.prompt_2.as_ref()),
            ("negative_prompt", spec.negative_prompt.as_ref()),
            ("negative_prompt_2", spec.negative_prompt_2.as_ref()),
            ("prompt_3", spec.prompt_3.as_ref()),
            ("negative_prompt_3", spec.negative_prompt_3.as_ref()),
        ] {
            if text.is_some_and(|text| text.chars().nth(MAX_PROMPT_CHARS).is_some()) {
                self.refuse(field, format!("must be at most {MAX_PROMPT_CHARS} characters"));
            }
            // It ends a text in a picture's file, where `embed_prompt` puts the prompt.
            if text.is_some_and(|text| text.contains('\0')) {
                self.refuse(field, "must not hold a NUL character");
            }
        }
    }

    /// Refuses what the client set and the model does not take: ignoring it would give another picture than asked for.
    fn taken(&mut self, spec: &JobSpec) {
        let pairs = pairs(spec).map(|(name, value)| (name, value.is_some()));
        let set = numbers(spec).map(|(name, value)| (name, value.is_some())).into_iter().chain(pairs).chain(others(spec));
        for (name, _) in set.filter(|(_, is_set)| *is_set) {
            if !ALWAYS_TAKEN.contains(&name) && parameter(self.card, name).is_none() {
                self.refuse(name, format!("model {:?} does not take it", self.card.name));
            }
        }
    }

    /// Fields that are nothing without another.
    fn needs(&mut self, spec: &JobSpec) {
        for (field, value) in [
            ("skip_layer_guidance_scale", spec.skip_layer_guidance_scale),
            ("skip_layer_guidance_start", spec.skip_layer_guidance_start),
            ("skip_layer_guidance_stop", spec.skip_layer_guidance_stop),
        ] {
            if value.is_some() && spec.skip_guidance_layers.is_empty() {
                self.refuse(field, "needs skip_guidance_layers");
            }
        }
        let both = spec.negative_original_size.is_some() && spec.negative_target_size.is_some();
        for (field, is_set) in [
            ("negative_original_size", spec.negative_original_size.is_some()),
            ("negative_target_size", spec.negative_target_size.is_some()),
            ("negative_crops_coords_top_left", spec.negative_crops_coords_top_left.is_some()),
        ] {
            if is_set && !both {
                self.refuse(field, "needs both negative_original_size and negative_target_size");
            }
        }
        if spec.image_blob_id.is_empty() && spec.strength.is_some() {
            self.refuse("strength", "needs image_blob_id");
        }
        if spec.image_blob_id.is_empty() && !spec.mask_image_blob_id.is_empty() {
            self.refuse("mask_image_blob_id", "needs image_blob_id");
        }
        self.more_images(spec);
    }

    /// What can be said of further pictures without the model.
    fn more_images(&mut self, spec: &JobSpec) {
        let more = &spec.more_image_blob_ids;
        if more.len() > MAX_MORE_IMAGES {
            self.refuse("more_image_blob_ids", format!("must be at most {MAX_MORE_IMAGES}"));
        } else if spec.image_blob_id.is_empty() && !more.is_empty() {
            self.refuse("more_image_blob_ids", "needs image_blob_id");
        } else if let Some(k) = more.iter().position(String::is_empty) {
            self.refuse(&format!("more_image_blob_ids[{k}]"), "must be named");
        }
    }

    fn loras(&mut self, spec: &JobSpec) {
        if spec.loras.len() > MAX_LORAS {
            return self.refuse("loras", format!("must be at most {MAX_LORAS}"));
        }
        for (index, lora) in spec.loras.iter().enumerate() {
            let field = format!("loras[{index}].name");
            match adapter(self.card, &lora.name) {
                None => {
                    let known = known_adapters(self.card);
                    self.refuse(&field, format!("model {:?} has no adapter of this name, {known}", self.card.name));
                }
                Some(adapter) if !adapter.problem.is_empty() => {
                    self.refuse(&field, format!("adapter {:?} cannot be used: {}", adapter.name, adapter.problem));
                }
                Some(_) if spec.loras[..index].iter().any(|other| other.name == lora.name) => {
                    self.refuse(&field, "is named twice");
                }
                Some(_) => {}
            }
            if lora.scale.is_some_and(|scale| !scale.is_finite() || scale.abs() > MAX_LORA_SCALE) {
                self.refuse(&format!("loras[{index}].scale"), format!("must be -{MAX_LORA_SCALE} to {MAX_LORA_SCALE}"));
            }
        }
    }

    /// Takes what the job's adapters want where the job says nothing. Two that want different things cannot both be pleased.
    fn adapter_defaults(&mut self, spec: &mut JobSpec) {
        let used: Vec<&Adapter> = spec.loras.iter().filter_map(|lora| adapter(self.card, &lora.name)).collect();
        let mut wanted = |field: &str, is_set: bool| -> Option<f64> {
            if is_set {
                return None;
            }
            let wants = used.iter().filter_map(|adapter| {
                let default = adapter.defaults.iter().find(|default| default.name == field)?;
                Some((adapter.name.as_str(), default.value))
            });
            let wants: Vec<(&str, f64)> = wants.collect();
            let (first, value) = *wants.first()?;
            if let Some((second, other)) = wants.iter().find(|(_, other)| *other != value) {
                let problem = format!("adapter {first:?} wants {field} = {value} and {second:?} wants {other}: say which");
                self.refuse("loras", problem);
            }
            Some(value)
        };
        let steps = wanted("num_inference_steps", spec.num_inference_steps.is_some());
        let (true_cfg, guidance) =
            (wanted("true_cfg_scale", spec.true_cfg_scale.is_some()), wanted("guidance_scale", spec.guidance_scale.is_some()));
        let shift = wanted("shift", spec.shift.is_some());
        spec.num_inference_steps = spec.num_inference_steps.or(steps.map(|steps| steps as u32));
        spec.true_cfg_scale = spec.true_cfg_scale.or(true_cfg);
        spec.guidance_scale = spec.guidance_scale.or(guidance);
        spec.shift = spec.shift.or(shift);
    }

    fn required(&mut self, spec: &JobSpec) {
        let given =
            |name: &str| others(spec).contains(&(name, true)) || numbers(spec).iter().any(|(n, v)| *n == name && v.is_some());
        for parameter in self.card.parameters.iter().filter(|parameter| parameter.required) {
            if !given(&parameter.name) {
                self.refuse(&parameter.name, format!("model {:?} needs it", self.card.name));
            }
        }
    }

    fn numbers(&mut self, spec: &JobSpec) {
        for (name, value) in numbers(spec) {
            let Some(value) = value else { continue };
            if !value.is_finite() {
                self.refuse(name, "must be a finite number");
            } else if let Some(problem) = parameter(self.card, name).and_then(|limits| outside(value, limits)) {
                self.refuse(name, problem);
            }
        }
        for (name, pair) in pairs(spec) {
            let (Some(pair), Some(limits)) = (pair, parameter(self.card, name)) else { continue };
            if let Some(problem) = pair.into_iter().find_map(|value| outside(f64::from(value), limits)) {
                self.refuse(name, problem);
            }
        }
        // A message has room for a million of them: one problem is enough.
        let layers = parameter(self.card, "skip_guidance_layers");
        let problem = |layer: &u32| outside(f64::from(*layer), layers?);
        if spec.skip_guidance_layers.len() > MAX_SKIPPED_LAYERS {
            self.refuse("skip_guidance_layers", format!("must be at most {MAX_SKIPPED_LAYERS}"));
        } else if let Some(problem) = spec.skip_guidance_layers.iter().find_map(problem) {
            self.refuse("skip_guidance_layers", problem);
        }
    }

    /// A refiner goes on with latents alone, and after a step of the base model at least.
    fn refiner(&mut self, spec: &JobSpec) {
        if let (Some(strength), Some(end), Some(steps)) = (spec.strength, spec.denoising_end, spec.num_inference_steps)
            && end < 1.0
            && parameter(self.card, "denoising_end").is_some()
            && (f64::from(steps) * strength).floor() / f64::from(steps.max(1)) <= 1.0 - end + REMAINDER_TOLERANCE
        {
            let problem = format!(
                "{strength} of {steps} steps leaves the base model none before denoising_end = {end}: more, or a smaller denoising_end"
            );
            self.refuse("strength", problem);
        }
        if !spec.mask_image_blob_id.is_empty() && spec.denoising_end.is_some_and(|end| end < 1.0) {
            self.refuse(
                "mask_image_blob_id",
                format!("the refiner of model {:?} takes none: with denoising_end = 1 it has no part", self.card.name),
            );
        }
    }

    fn noise_generator(&mut self, spec: &JobSpec) {
        if NoiseGenerator::try_from(spec.noise_generator).is_err() {
            self.refuse("noise_generator", "must be one of the generators of NoiseGenerator");
        }
    }

    /// The product is checked before anything is allocated for it: three large factors fit no machine.
    fn pixels(&mut self, spec: &JobSpec, most: u64) {
        let images = spec.num_images_per_prompt.unwrap_or(1);
        for (field, value) in [("width", spec.width), ("height", spec.height), ("num_images_per_prompt", Some(images))] {
            if value == Some(0) {
                self.refuse(field, "must be at least 1");
            }
        }
        let (width, height) = (spec.width.unwrap_or(OPEN_SIDE), spec.height.unwrap_or(OPEN_SIDE));
        let pixels = (u64::from(width) * u64::from(height)).checked_mul(u64::from(images));
        if pixels.is_none_or(|pixels| pixels > most) {
            let is_open = spec.width.is_none() || spec.height.is_none();
            let open = if is_open { format!(" (a side that is not named counts as {OPEN_SIDE})") } else { String::new() };
            self.refuse(
                "width",
                format!("width * height * num_images_per_prompt = {width} * {height} * {images}{open}: at most {most} pixels"),
            );
            return;
        }
        let (brought, each) = (brought(spec), self.card.pixels_per_image);
        let beside = brought.checked_mul(each).and_then(|beside| beside.checked_mul(u64::from(images)));
        if beside.zip(pixels).and_then(|(beside, pixels)| pixels.checked_add(beside)).is_none_or(|all| all > most) {
            let field = if spec.more_image_blob_ids.is_empty() { "num_images_per_prompt" } else { "more_image_blob_ids" };
            let problem = format!(
                "(width * height + pictures * {each}) * num_images_per_prompt = ({width} * {height} + {brought} * {each}) * {images}: \
                 at most {most} pixels"
            );
            self.refuse(field, problem);
        }
    }
}

/// How far a remainder may be from zero to count as none: decimal fractions are not exact in binary.
const REMAINDER_TOLERANCE: f64 = 1e-9;

fn outside(value: f64, limits: &Parameter) -> Option<String> {
    let bounded = limits.minimum != 0.0 || limits.maximum != 0.0;
    if bounded && !(limits.minimum..=limits.maximum).contains(&value) {
        return Some(format!("{value}: must be {} to {}", limits.minimum, limits.maximum));
    }
    let quotient = value / limits.multiple_of;
    if limits.multiple_of > 0.0 && (quotient - quotient.round()).abs() > REMAINDER_TOLERANCE {
        return Some(format!("{value}: must be a multiple of {}", limits.multiple_of));
    }
    None
}

#[cfg(test)]
mod tests;
