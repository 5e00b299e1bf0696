//! Whole FLUX generations, through the stages that workers run.

use models::autoencoder_kl::AutoencoderKlConfig;
use models::flux::FluxDenoiser;
use models::model_dir::ModelDir;
use models::request::{Encoder, Guidance};
use tests::golden::{Case, Outcome};

use crate::pipeline::{Family, TextEncoder, generation, text};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let family = Family {
        denoiser: &FluxDenoiser::load(&dir).map_err(text)?,
        guidance: Guidance::TrueCfg,
        encoders: vec![
            TextEncoder { component: "text_encoder", tokenizer: "tokenizer", encoder: Encoder::First, tokens: Some(77) },
            TextEncoder { component: "text_encoder_2", tokenizer: "tokenizer_2", encoder: Encoder::Second, tokens: None },
        ],
        embeds: vec![
            ("encode_prompt.call0.0", "prompt_embeds"),
            ("encode_prompt.call0.1", "pooled_prompt_embeds"),
            ("encode_prompt.call1.0", "negative_prompt_embeds"),
            ("encode_prompt.call1.1", "negative_pooled_prompt_embeds"),
        ],
        inputs: vec!["timestep", "guidance", "img_ids", "txt_ids"],
        unscale: &|latents| vae.unscale(latents),
    };
    generation(case, &dir, &family)
}
