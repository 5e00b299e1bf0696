//! LaMa's generator, and a picture that it fills in at its own size. Cases: `lama_*`.

use std::sync::Arc;

use candle_core::Tensor;
use models::lama::fill;
use models::lama_generator::{LamaGenerator, LamaGeneratorConfig};
use models::model_dir::read_json;
use parallel::{DType, Device, Solo, Weights};
use tests::golden::{Case, Outcome};

use crate::pipeline::text;

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config = LamaGeneratorConfig::read(read_json(&dir.join("config.json")).map_err(text)?).map_err(text)?;
    let weights = Weights::open(&dir, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(text)?;
    let generator = LamaGenerator::load(&weights, &config).map_err(text)?;
    let (image, mask) = (case.tensor("in.image")?.clone(), case.tensor("in.mask")?.clone());
    case.check("out.predicted", &generator.forward(&image, &mask).map_err(text)?)?;
    case.check("out.inpainted", &fill(&generator, &image, &mask).map_err(text)?)?;
    // The recorded ones were mirrored to whole eights.
    let size: Vec<usize> =
        case.param("unpadded_size").as_array().into_iter().flatten().filter_map(|side| Some(side.as_u64()? as usize)).collect();
    let [height, width] = size[..] else { return Err("no size".into()) };
    let cropped = |x: &Tensor| x.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous();
    let (image, mask) = (cropped(&image).map_err(text)?, cropped(&mask).map_err(text)?);
    case.check("out.inpainted_cropped", &fill(&generator, &image, &mask).map_err(text)?)
}
