//! What a model says of itself: its components, the stages of its jobs, and what a job may set.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model_dir::ModelDir;
use crate::{Error, Result};

/// A file a model's directory may have: what this checkpoint wants where the family's defaults do not suit it, as a JSON object
/// of parameters.
pub const DEFAULTS_FILE: &str = "atelier.json";

/// A model as read from its directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// The family, such as "flux".
    pub family: String,
    /// The reference's class, such as "FluxPipeline".
    pub pipeline_class: String,
    /// The noise scheduler's class.
    pub scheduler: String,
    /// sha256 over every file of the directory, in hex; [`crate::registry::describe`] fills it in.
    pub digest: String,
    /// The networks it is made of.
    pub components: Vec<ComponentCard>,
    /// The stages of its jobs, upstream first.
    pub stages: Vec<StageCard>,
    /// What a job may set.
    pub parameters: Vec<ParameterCard>,
    /// width * height * num_images_per_prompt may not exceed this.
    pub max_pixels: u64,
    /// For models that look at the job's pictures at every step: pixels that each costs for each picture that is drawn; they count against `max_pixels`.
    #[serde(default)]
    pub pixels_per_image: u64,
    /// Its jobs have no prompt.
    #[serde(default)]
    pub without_prompt: bool,
}

/// One network of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentCard {
    /// Its folder.
    pub name: String,
    /// Bytes of its weights as stored.
    pub weight_bytes: u64,
    /// The degrees it can be cut into.
    pub tp_options: Vec<usize>,
    /// Into how many block ranges it can be cut at most; 1 means it cannot.
    pub max_block_ranges: usize,
    /// What [`ModelDir::fingerprint`] says of it; [`crate::registry::describe`] fills it in.
    #[serde(default)]
    pub fingerprint: String,
}

/// One stage of a model's jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageCard {
    /// Unique within the card.
    pub id: String,
    /// What kind of work it is.
    pub kind: StageKind,
    /// The component that does it.
    pub component: String,
    /// Ids of the stages whose outputs it takes.
    pub inputs: Vec<String>,
    /// Which jobs have it.
    pub condition: StageCondition,
    /// A stage before it; those after it that take that one's output take its output in place of it.
    pub replaces: String,
    /// It is given the job's own pictures.
    pub with_pictures: bool,
    /// It is given the pictures of the job's controls.
    pub with_controls: bool,
}

impl ComponentCard {
    /// The component `name` of `dir`, whose `heads` are divided over the ranks of each of at most `max_block_ranges` ranges.
    pub fn of(dir: &ModelDir, name: &str, heads: usize, max_block_ranges: usize) -> Result<Self> {
        let tp_options = [1, 2, 4, 8].into_iter().filter(|tp| heads.is_multiple_of(*tp)).collect();
        let weight_bytes = dir.weight_bytes(name)?;
        Ok(Self { name: name.into(), weight_bytes, tp_options, max_block_ranges, fingerprint: String::new() })
    }
}

impl StageCard {
    /// A stage; an EncodeImage stage is there only in jobs that start from a picture, and is given it.
    pub fn new(id: &str, kind: StageKind, component: &str, inputs: &[&str]) -> Self {
        let pictures = kind == StageKind::EncodeImage;
        let inputs = inputs.iter().map(|input| (*input).to_owned()).collect();
        Self {
            id: id.into(),
            kind,
            component: component.into(),
            inputs,
            condition: if pictures { StageCondition::WithImage } else { StageCondition::Always },
            replaces: String::new(),
            with_pictures: pictures,
            with_controls: false,
        }
    }

    /// A stage that goes on with what an earlier one, the last of its inputs, made of the latents, in jobs that leave it something.
    pub fn refining(id: &str, component: &str, inputs: &[&str]) -> Self {
        let replaces = inputs.last().copied().unwrap_or_default().to_owned();
        Self { condition: StageCondition::WithRefiner, replaces, ..Self::new(id, StageKind::Denoise, component, inputs) }
    }

    /// Those of a family whose control networks are given pictures as they are (the denoiser is given them) or their latents (the autoencoder is).
    pub fn with_controls(mut stages: Vec<Self>, kind: StageKind) -> Vec<Self> {
        stages.iter_mut().filter(|stage| stage.kind == kind).for_each(|stage| stage.with_controls = true);
        stages
    }

    /// The stages of a family whose text encoders each read their prompt alone: they and, with an input picture, the autoencoder
    /// side by side, then `denoiser`, then the autoencoder.
    pub fn of_text_encoders(encoders: &[&str], denoiser: &str) -> Vec<Self> {
        let ids: Vec<String> = encoders.iter().map(|name| name.replace("text_encoder", "encode_text")).collect();
        let mut stages: Vec<Self> =
            ids.iter().zip(encoders).map(|(id, component)| Self::new(id, StageKind::EncodeText, component, &[])).collect();
        let inputs: Vec<&str> = ids.iter().map(String::as_str).chain(["encode_image"]).collect();
        stages.push(Self::new("encode_image", StageKind::EncodeImage, "vae", &[]));
        stages.push(Self::new("denoise", StageKind::Denoise, denoiser, &inputs));
        stages.push(Self::new("decode", StageKind::Decode, "vae", &["denoise"]));
        stages
    }
}

impl Card {
    /// Takes the defaults that the model's directory names.
    ///
    /// # Errors
    /// When a name is none of the parameters, or a value is outside its bounds.
    pub fn with_defaults_of(mut self, dir: &ModelDir) -> Result<Self> {
        let path = dir.root().join(DEFAULTS_FILE);
        if !path.is_file() {
            return Ok(self);
        }
        let defaults: serde_json::Map<String, Value> = crate::model_dir::read_json(&path)?;
        for (name, value) in defaults {
            let bad = |reason: &str| Error::ModelDir { path: path.clone(), reason: format!("`{name}`: {reason}") };
            let parameter =
                self.parameters.iter_mut().find(|p| p.name == name).ok_or_else(|| bad("is none of the model's parameters"))?;
            match (value, parameter.is_number()) {
                (Value::Number(n), true) => {
                    let value = n.as_f64().filter(|v| (parameter.minimum..=parameter.maximum).contains(v));
                    parameter.default = Some(value.ok_or_else(|| bad("is outside its bounds"))?);
                }
                (Value::String(text), false) => parameter.default_text = Some(text),
                _ => return Err(bad("has another type")),
            }
        }
        Ok(self)
    }
}

/// Which jobs have a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageCondition {
    /// All.
    Always,
    /// Those that start from a picture, or are given controls whose pictures the stage takes.
    WithImage,
    /// Those whose `denoising_end` is below 1.
    WithRefiner,
}

/// What kind of work a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageKind {
    /// Prompt to embeddings.
    EncodeText,
    /// Picture to latents.
    EncodeImage,
    /// Noise to latents.
    Denoise,
    /// Latents to picture.
    Decode,
    /// A picture and a mask to a picture.
    Inpaint,
}

/// A field of the request that a model takes. The bounds are for numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterCard {
    /// The field's name.
    pub name: String,
    /// Least value.
    pub minimum: f64,
    /// Greatest value.
    pub maximum: f64,
    /// The value must be a multiple of this; 0: any.
    pub multiple_of: f64,
    /// Taken when the job does not say.
    pub default: Option<f64>,
    /// The same for text.
    pub default_text: Option<String>,
    /// A job without it is refused.
    pub required: bool,
}

impl ParameterCard {
    /// A number between two bounds, with a default.
    pub fn number(name: &str, minimum: f64, maximum: f64, default: f64) -> Self {
        Self { minimum, maximum, default: Some(default), ..Self::field(name) }
    }

    /// Whether it is a number.
    pub fn is_number(&self) -> bool {
        self.minimum < self.maximum
    }

    /// The same, a multiple of `step`.
    pub fn multiple(self, step: f64) -> Self {
        Self { multiple_of: step, ..self }
    }

    /// A field that is not a number, such as a prompt or a picture.
    pub fn field(name: &str) -> Self {
        Self {
            name: name.into(),
            minimum: 0.0,
            maximum: 0.0,
            multiple_of: 0.0,
            default: None,
            default_text: None,
            required: false,
        }
    }

    /// The same, without a default: the job may leave it out.
    pub fn optional(self) -> Self {
        Self { default: None, ..self }
    }

    /// The same, in every job.
    pub fn required(self) -> Self {
        Self { required: true, ..self }
    }
}
