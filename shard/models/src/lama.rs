//! LaMa: fills in what a mask covers, without a prompt and in one forward.
//!
//! Follows the authors' `bin/predict.py`: the picture at its own size, mirrored to a multiple of 8; what is not covered stays as it was. A directory is laid
//! out as diffusers' are: `model_index.json` names `"_class_name": "LaMaPipeline"` and the component `generator`, whose folder has the `generator` of the
//! authors' configuration as `config.json`, and the checkpoint's tensors as safetensors.

use std::fmt;

use parallel::{Device, Tensor, Tensors, Weights};
use serde_json::{Map, Value};

use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::image_io::{self, PictureLimits};
use crate::lama_generator::{LEAST_SIDE, LamaGenerator, LamaGeneratorConfig, MULTIPLE};
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::stage::{Inputs, OneAtATime, Waiting};
use crate::{Error, Payload, Request, Result, flow};

/// The class that a directory's index names; the reference has none.
pub const CLASSES: &[&str] = &["LaMaPipeline"];
const GENERATOR: &str = "generator";

/// The card of a LaMa directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    config(dir)?;
    let mut inpaint = StageCard::new("inpaint", StageKind::Inpaint, GENERATOR, &[]);
    inpaint.with_pictures = true;
    let card = Card {
        family: "lama".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: String::new(),
        digest: String::new(),
        // Small, and each of its layers needs all of the spectrum: held whole.
        components: vec![ComponentCard::of(dir, GENERATOR, 1, 1)?],
        stages: vec![inpaint],
        parameters: ["image_blob_id", "mask_image_blob_id"].map(|name| ParameterCard::field(name).required()).into(),
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: true,
    };
    card.with_defaults_of(dir)
}

fn config(dir: &ModelDir) -> Result<LamaGeneratorConfig> {
    LamaGeneratorConfig::read(dir.config::<Map<String, Value>>(GENERATOR)?)
}

/// Loads the generator.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, .. } = spec;
    if component != GENERATOR {
        return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{component}` is not `{GENERATOR}`") });
    }
    let generator = LamaGenerator::load(weights, &config(dir)?)?;
    Ok(Rank::Leader(Box::new(InpaintStage { generator, waiting: Waiting::default() })))
}

/// Fills in one picture after the other.
struct InpaintStage {
    generator: LamaGenerator,
    waiting: Waiting,
}

impl OneAtATime for InpaintStage {
    fn waiting(&mut self) -> &mut Waiting {
        &mut self.waiting
    }

    fn do_task(&mut self, _: &Request, inputs: &Inputs) -> Result<Payload> {
        let missing = |field| Error::Invalid { field, reason: "there is none".into() };
        let limits = PictureLimits::default();
        let image = inputs.pictures.image.as_deref().ok_or_else(|| missing("image"))?;
        let image = image_io::decode_picture(image, &limits)?;
        let (width, height) = (image.width(), image.height());
        if (width * height) as u64 > flow::MAX_PIXELS {
            let reason = format!("{width} x {height}: at most {} pixels", flow::MAX_PIXELS);
            return Err(Error::Invalid { field: "image", reason });
        }
        let mask = inputs.pictures.mask_image.as_deref().ok_or_else(|| missing("mask_image"))?;
        let mask = image_io::decode_picture(mask, &limits)
            .map_err(|error| Error::Invalid { field: "mask_image", reason: error.to_string() })?;
        let image = image_io::in_unit_range(&image, width, height)?;
        let filled = fill(&self.generator, &image, &image_io::preprocess_soft_mask(&mask, width, height)?)?;
        Ok(Payload::Image(Tensors::new().with("image", filled)))
    }
}

/// `image: [1, 3, H, W]` in 0..1 with what `mask: [1, 1, H, W]` covers with ones filled in.
pub fn fill(generator: &LamaGenerator, image: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = image.dims4()?;
    let predicted = generator.forward(&mirrored(image)?, &mirrored(mask)?)?.narrow(2, 0, h)?.narrow(3, 0, w)?;
    let known = image.broadcast_mul(&mask.affine(-1.0, 1.0)?)?;
    Ok((predicted.contiguous()?.broadcast_mul(mask)? + known)?)
}

/// Mirrored below and to the right to sides that the network takes; the outermost rows are repeated (numpy's `symmetric`).
fn mirrored(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let index = |side: usize| -> Result<Tensor> {
        let padded = side.next_multiple_of(MULTIPLE).max(LEAST_SIDE);
        let at = |i: usize| if (i / side).is_multiple_of(2) { i % side } else { side - 1 - i % side };
        Ok(Tensor::new((0..padded).map(|i| at(i) as u32).collect::<Vec<_>>(), &Device::Cpu)?)
    };
    Ok(x.index_select(&index(h)?, 2)?.index_select(&index(w)?, 3)?)
}

impl fmt::Debug for InpaintStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InpaintStage({:?})", self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_of_any_size_is_mirrored_to_one_that_the_network_takes() {
        let of = |side: usize| {
            let row = Tensor::arange(0f32, side as f32, &Device::Cpu).unwrap().reshape((1, 1, 1, side)).unwrap();
            mirrored(&row).unwrap().narrow(2, 0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(of(1), [0.0; 16]);
        assert_eq!(of(3)[..8], [0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0, 1.0]);
        assert_eq!(of(15)[13..], [13.0, 14.0, 14.0]);
        assert_eq!(of(16).len(), 16);
        assert_eq!((of(17).len(), of(17)[16..19].to_vec()), (24, vec![16.0, 16.0, 15.0]));
    }
}
