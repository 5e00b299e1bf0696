//! Which control networks there are, and which belong to which models: the one list to extend for another.

use std::collections::BTreeMap;
use std::path::Path;

use parallel::Weights;
use serde_json::{Map, Value};

use super::ControlNetwork;
use crate::autoencoder_kl::AutoencoderKlConfig;
use crate::flux_transformer::{FluxControlNet, FluxControlNetConfig, FluxTransformerConfig};
use crate::mmdit::unsupported;
use crate::model_dir::{ModelDir, read_json};
use crate::qwen_image_transformer::{QwenImageControlNet, QwenImageControlNetConfig, QwenImageTransformerConfig};
use crate::sd3_transformer::{Sd3ControlNet, Sd3ControlNetConfig, Sd3TransformerConfig};
use crate::t2i_adapter::{T2iAdapter, T2iAdapterConfig};
use crate::unet_2d_condition::{ControlNetConfig, ControlNetModel, UNIONS, UNet2DConditionConfig};
use crate::{Error, Result, stable_diffusion, stable_diffusion_xl};

/// Pipelines whose transformer is controlled: not those that are given another picture's tokens or channels besides.
const FLUX: &[&str] = &["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"];
const SD3: &[&str] = crate::sd3::CLASSES;
const QWEN_IMAGE: &[&str] = &["QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"];

/// What a denoiser must know of one of its control networks.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlFacts {
    /// What jobs call it.
    pub name: String,
    /// What it is.
    pub kind: ControlKind,
}

/// A control network by its configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlKind {
    /// `ControlNetModel` or `ControlNetUnionModel`, of a U-Net.
    UNet(Box<ControlNetConfig>),
    /// `T2IAdapter`, of a U-Net.
    Adapter(T2iAdapterConfig),
    /// `FluxControlNetModel`
    Flux(FluxControlNetConfig),
    /// `SD3ControlNetModel`
    Sd3(Box<Sd3ControlNetConfig>),
    /// `QwenImageControlNetModel`
    QwenImage(QwenImageControlNetConfig),
}

impl ControlKind {
    /// From a network's folder: `config.json` says what it is.
    ///
    /// # Errors
    /// When there is none, or it is no network that is known here; the error names the field.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let config: Map<String, Value> = read_json(&path)?;
        let class = config.get("_class_name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let bad = |error: serde_json::Error| Error::ModelDir { path: path.clone(), reason: error.to_string() };
        let value = || Value::Object(config.clone());
        let kind = match class.as_str() {
            class if class == "ControlNetModel" || UNIONS.contains(&class) => {
                Self::UNet(Box::new(ControlNetConfig::read(config)?))
            }
            "T2IAdapter" => Self::Adapter(serde_json::from_value(value()).map_err(bad)?),
            "FluxControlNetModel" => Self::Flux(serde_json::from_value(value()).map_err(bad)?),
            "SD3ControlNetModel" => Self::Sd3(Box::new(Sd3ControlNetConfig::read(config)?)),
            "QwenImageControlNetModel" => Self::QwenImage(serde_json::from_value(value()).map_err(bad)?),
            other => return Err(unsupported("_class_name", &other)),
        };
        match &kind {
            Self::Adapter(config) => config.validate()?,
            Self::Flux(config) => config.validate()?,
            Self::QwenImage(config) => config.validate()?,
            Self::UNet(_) | Self::Sd3(_) => {}
        }
        Ok(kind)
    }

    /// The reference's class.
    pub fn class(&self) -> &'static str {
        match self {
            Self::UNet(config) if config.modes().is_some() => UNIONS[0],
            Self::UNet(_) => "ControlNetModel",
            Self::Adapter(_) => "T2IAdapter",
            Self::Flux(_) => "FluxControlNetModel",
            Self::Sd3(_) => "SD3ControlNetModel",
            Self::QwenImage(_) => "QwenImageControlNetModel",
        }
    }

    /// How many kinds of pictures it knows, where a job must say which.
    pub fn modes(&self) -> Option<usize> {
        match self {
            Self::Flux(config) => config.num_mode,
            Self::UNet(config) => config.modes(),
            _ => None,
        }
    }

    /// Whether all controls of a job that name it are given to it in one forward.
    pub fn joins(&self) -> bool {
        matches!(self, Self::UNet(config) if config.modes().is_some())
    }

    /// Whether guess mode is anything to it.
    pub fn guesses(&self) -> bool {
        matches!(self, Self::UNet(config) if config.modes().is_none())
    }

    /// Whether it is given the picture itself, and not its latents.
    pub fn takes_pixels(&self) -> bool {
        matches!(self, Self::UNet(_) | Self::Adapter(_))
    }

    /// Whether the picture that it is given is grey.
    pub fn takes_grey(&self) -> bool {
        matches!(self, Self::Adapter(config) if config.in_channels == 1)
    }

    /// How many tensors of each kind it gives: networks that give different numbers of one kind cannot be added up.
    pub fn residuals(&self) -> BTreeMap<&'static str, usize> {
        match self {
            Self::UNet(config) => [("ControlNets", config.residuals())].into(),
            Self::Adapter(config) => [("T2I-Adapters", config.channels.len())].into(),
            Self::Flux(FluxControlNetConfig { transformer, .. }) => {
                let both =
                    [("double-stream blocks", transformer.num_layers), ("single-stream blocks", transformer.num_single_layers)];
                // One that gives none of a kind is in no other's way.
                both.into_iter().filter(|(_, count)| *count > 0).collect()
            }
            Self::Sd3(config) => [("blocks", config.transformer.num_layers)].into(),
            Self::QwenImage(config) => [("blocks", config.transformer.num_layers)].into(),
        }
    }

    /// Sides of pictures are multiples of this, in pixels, as far as it matters to this network.
    pub fn multiple(&self) -> usize {
        match self {
            Self::Adapter(config) => config.downscale_factor,
            _ => 1,
        }
    }

    /// Over so many ranks, and as many as divide that, it can be divided.
    pub fn shares(&self) -> usize {
        match self {
            Self::UNet(config) => config.unet.shares(),
            Self::Adapter(config) => config.shares(),
            Self::Flux(config) => config.transformer.num_attention_heads,
            Self::Sd3(config) => config.transformer.num_attention_heads,
            Self::QwenImage(config) => config.transformer.num_attention_heads,
        }
    }

    /// Reads what this rank holds of it.
    pub fn load(&self, w: &Weights) -> Result<Box<dyn ControlNetwork>> {
        Ok(match self {
            Self::UNet(config) => Box::new(ControlNetModel::load(w, config)?),
            Self::Adapter(config) => Box::new(T2iAdapter::load(w, config)?),
            Self::Flux(config) => Box::new(FluxControlNet::load(w, config)?),
            Self::Sd3(config) => Box::new(Sd3ControlNet::load(w, config)?),
            Self::QwenImage(config) => Box::new(QwenImageControlNet::load(w, config)?),
        })
    }

    /// Refuses a network that is not for the model in `dir`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that differs.
    pub fn check_fits(&self, dir: &ModelDir) -> Result<()> {
        let class = dir.pipeline_class();
        let of = |classes: &[&str]| {
            if classes.contains(&class) {
                return Ok(());
            }
            Err(Error::Unsupported { field: "_class_name".into(), value: format!("{} with a {class}", self.class()) })
        };
        match self {
            Self::UNet(config) => {
                of(&[stable_diffusion::CLASSES, stable_diffusion_xl::CLASSES].concat())?;
                let (unet, vae): (UNet2DConditionConfig, AutoencoderKlConfig) = (dir.config("unet")?, dir.config("vae")?);
                let own = &config.unet;
                same("in_channels", own.in_channels, vae.latent_channels)?;
                same("block_out_channels", &own.block_out_channels, &unet.block_out_channels)?;
                same("layers_per_block", own.layers_per_block, unet.layers_per_block)?;
                same("addition_embed_type", &own.addition_embed_type, &unet.addition_embed_type)?;
                let width = |config: &UNet2DConditionConfig| {
                    (0..config.resolutions()).map(|at| config.cross_attention_dim.at(at)).collect::<Vec<_>>()
                };
                same("cross_attention_dim", width(own), width(&unet))?;
                let added = |config: &UNet2DConditionConfig| config.projection_class_embeddings_input_dim.unwrap_or_default();
                same("projection_class_embeddings_input_dim", added(own), added(&unet))?;
                same("conditioning_embedding_out_channels", config.scale_factor(), vae.scale_factor())
            }
            Self::Adapter(config) => {
                of(&[stable_diffusion::CLASSES, stable_diffusion_xl::CLASSES].concat())?;
                let unet: UNet2DConditionConfig = dir.config("unet")?;
                let blocks = unet.resolutions();
                if !(blocks..=blocks + 1).contains(&config.channels.len()) {
                    return Err(unsupported("channels", &config.channels));
                }
                same("channels", &config.channels[..blocks], &unet.block_out_channels[..])?;
                let vae: AutoencoderKlConfig = dir.config("vae")?;
                let added = unet.intrablock_scales(vae.scale_factor());
                same("adapter_type and downscale_factor", &config.scales()[..blocks], &added[..])
            }
            Self::Flux(config) => {
                of(FLUX)?;
                let (own, base): (_, FluxTransformerConfig) = (&config.transformer, dir.config("transformer")?);
                same("in_channels", own.in_channels, base.in_channels)?;
                same("num_attention_heads * attention_head_dim", own.inner_dim(), base.inner_dim())?;
                same("joint_attention_dim", own.joint_attention_dim, base.joint_attention_dim)?;
                same("pooled_projection_dim", own.pooled_projection_dim, base.pooled_projection_dim)
            }
            Self::Sd3(config) => {
                of(SD3)?;
                let (own, base): (_, Sd3TransformerConfig) = (&config.transformer, dir.config("transformer")?);
                same("in_channels", own.in_channels, base.in_channels)?;
                same("patch_size", own.patch_size, base.patch_size)?;
                same("num_attention_heads * attention_head_dim", own.inner_dim(), base.inner_dim())?;
                same("joint_attention_dim", own.joint_attention_dim, base.joint_attention_dim)?;
                same("pooled_projection_dim", own.pooled_projection_dim, base.pooled_projection_dim)
            }
            Self::QwenImage(config) => {
                of(QWEN_IMAGE)?;
                let (own, base): (_, QwenImageTransformerConfig) = (&config.transformer, dir.config("transformer")?);
                same("in_channels", own.in_channels, base.in_channels)?;
                same("num_attention_heads * attention_head_dim", own.inner_dim(), base.inner_dim())?;
                same("joint_attention_dim", own.joint_attention_dim, base.joint_attention_dim)
            }
        }
    }
}

fn same<T: PartialEq + std::fmt::Debug>(field: &str, own: T, model: T) -> Result<()> {
    if own == model {
        return Ok(());
    }
    let plain = |value: String| value.replace("Some(", "").replace(')', "");
    let value = format!("{} beside the model's {}", plain(format!("{own:?}")), plain(format!("{model:?}")));
    Err(Error::Unsupported { field: field.into(), value })
}
