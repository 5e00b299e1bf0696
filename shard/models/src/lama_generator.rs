//! LaMa's generator (R. Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", <https://arxiv.org/abs/2109.07161>): a
//! convolutional network half of whose channels are convolved in the picture's spectrum, so that every place sees all others.
//!
//! Follows the authors' `saicinpainting/training/modules/ffc.py` (<https://github.com/advimman/lama>), `FFCResNetGenerator`, as `big-lama` is configured. The
//! norms, whose statistics are fixed, are folded into the convolutions before them. It is held whole by one rank: 51 million parameters.

use parallel::convolution::Placement;
use parallel::ops;
use parallel::{Conv2d, Tensor, Weights};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::mmdit::{check_widths, unsupported};
use crate::{Error, Result};

mod ffc;
mod folded;

use ffc::{FfcBnAct, Ratios};
use folded::{BatchNorm, Doubling};

/// Sides of pictures are multiples of this.
pub const MULTIPLE: usize = 8;
/// Least side: the coarsest resolution has room for a kernel's reflection.
pub const LEAST_SIDE: usize = 2 * MULTIPLE;
/// Most blocks that are believed; `big-lama` has 18.
const MAX_BLOCKS: usize = 256;
/// Side of the first and the last kernel.
const FIRST: usize = 7;
const SIZE: usize = 3;

/// The `generator` of a configuration of LaMa.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LamaGeneratorConfig {
    /// Channels of the picture and of the mask.
    pub input_nc: usize,
    /// Channels of the picture.
    pub output_nc: usize,
    /// Channels at the finest resolution.
    pub ngf: usize,
    /// How many times the resolution is halved.
    pub n_downsampling: usize,
    /// Residual blocks at the coarsest.
    pub n_blocks: usize,
    /// What comes last.
    pub add_out_act: String,
    /// Of the residual blocks.
    resnet_conv_kwargs: Kwargs,
    init_conv_kwargs: Kwargs,
    downsample_conv_kwargs: Kwargs,
}

/// Which parts of a convolution's channels are of the spectrum.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
struct Kwargs {
    ratio_gin: f64,
    ratio_gout: f64,
    #[serde(default)]
    enable_lfu: bool,
}

impl LamaGeneratorConfig {
    /// From a configuration, or its `generator`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that is not what is known here.
    pub fn read(mut config: Map<String, Value>) -> Result<Self> {
        let generator = resolved(config.remove("generator").unwrap_or(Value::Object(config)));
        if let Some(kind) = generator.get("kind").filter(|kind| *kind != "ffc_resnet") {
            return Err(unsupported("generator.kind", kind));
        }
        let config: Self = serde_json::from_value(generator).map_err(|e| unsupported("generator", &e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let ok =
            |field: &str, good: bool, value: &dyn std::fmt::Debug| if good { Ok(()) } else { Err(unsupported(field, value)) };
        ok("input_nc", self.input_nc == 4, &self.input_nc)?;
        ok("output_nc", self.output_nc == 3, &self.output_nc)?;
        check_widths([("ngf", self.ngf)])?;
        ok("n_downsampling", self.n_downsampling == 3, &self.n_downsampling)?;
        ok("n_blocks", (1..=MAX_BLOCKS).contains(&self.n_blocks), &self.n_blocks)?;
        ok("add_out_act", self.add_out_act == "sigmoid", &self.add_out_act)?;
        for (field, kwargs) in
            [("init_conv_kwargs", self.init_conv_kwargs), ("downsample_conv_kwargs", self.downsample_conv_kwargs)]
        {
            ok(field, kwargs.ratio_gin == 0.0 && kwargs.ratio_gout == 0.0 && !kwargs.enable_lfu, &kwargs)?;
        }
        let Kwargs { ratio_gin, ratio_gout, enable_lfu } = self.resnet_conv_kwargs;
        let both = ratio_gin == ratio_gout && ratio_gin > 0.0 && ratio_gin < 1.0 && !enable_lfu;
        ok("resnet_conv_kwargs", both, &self.resnet_conv_kwargs)?;
        let global = self.global();
        ok("resnet_conv_kwargs", global >= 2 && global.is_multiple_of(2) && global < self.width(), &self.resnet_conv_kwargs)
    }

    /// Channels at the coarsest resolution.
    fn width(&self) -> usize {
        self.ngf << self.n_downsampling
    }

    /// Of them those of the spectrum.
    fn global(&self) -> usize {
        (self.width() as f64 * self.resnet_conv_kwargs.ratio_gin) as usize
    }
}

/// The authors' configurations say some ratios by reference to others, such as `${generator.init_conv_kwargs.ratio_gout}`.
fn resolved(mut generator: Value) -> Value {
    const PARTS: [&str; 3] = ["init_conv_kwargs", "downsample_conv_kwargs", "resnet_conv_kwargs"];
    // One may refer to one that refers to another.
    for _ in PARTS {
        let before = generator.clone();
        let of = |text: &str| before.pointer(&text.strip_prefix("${generator")?.strip_suffix('}')?.replace('.', "/")).cloned();
        for part in PARTS {
            for value in generator.get_mut(part).and_then(Value::as_object_mut).into_iter().flat_map(|kwargs| kwargs.values_mut())
            {
                if let Some(referred) = value.as_str().and_then(of) {
                    *value = referred;
                }
            }
        }
    }
    generator
}

/// `FFCResNetGenerator`
#[derive(Debug)]
pub struct LamaGenerator {
    /// The first, and those that halve the resolution.
    down: Vec<FfcBnAct>,
    blocks: Vec<[FfcBnAct; 2]>,
    up: Vec<Doubling>,
    last: Conv2d,
}

impl LamaGenerator {
    /// Reads `generator.model.*` of `w`. What else a checkpoint of the authors' training has, such as a loss's network, is left alone, as they do.
    pub fn load(w: &Weights, config: &LamaGeneratorConfig) -> Result<Self> {
        for (name, ..) in w.tensors() {
            if let Some((part, _)) = name.split_once('.').filter(|(part, _)| *part != "generator") {
                w.skip(part);
            }
        }
        let (all, w) = (w, w.pp("generator.model"));
        let (n, local) = (config.n_downsampling, config.width() - config.global());
        let none = Ratios { local: [config.input_nc, config.ngf], global: [0, 0] };
        // 0 is the reflection around the picture.
        let mut down = vec![FfcBnAct::load(&w.pp(1), none, FIRST, 1)?];
        for i in 0..n {
            let (c_in, c_out) = (config.ngf << i, config.ngf << (i + 1));
            let to_both = i + 1 == n;
            let [to_local, to_global] = if to_both { [local, config.global()] } else { [c_out, 0] };
            down.push(FfcBnAct::load(&w.pp(2 + i), Ratios { local: [c_in, to_local], global: [0, to_global] }, SIZE, 2)?);
        }
        let both = Ratios { local: [local; 2], global: [config.global(); 2] };
        let block = |i: usize| {
            let w = w.pp(2 + n + i);
            Ok([FfcBnAct::load(&w.pp("conv1"), both, SIZE, 1)?, FfcBnAct::load(&w.pp("conv2"), both, SIZE, 1)?])
        };
        let blocks = (0..config.n_blocks).map(block).collect::<Result<_>>()?;
        // After them local and global channels become one; then three layers for each resolution.
        let after = 3 + n + config.n_blocks;
        let double = |i: usize| {
            let (c_in, c_out) = (config.ngf << (n - i), config.ngf << (n - i - 1));
            let norm = BatchNorm::load(&w.pp(after + 3 * i + 1), c_out)?;
            Doubling::load(&w.pp(after + 3 * i), [c_in, c_out], &norm)
        };
        let generator = Self {
            down,
            blocks,
            up: (0..n).map(double).collect::<Result<_>>()?,
            last: Conv2d::load(&w.pp(after + 3 * n + 1), [config.ngf, config.output_nc], FIRST)?,
        };
        all.finish()?;
        Ok(generator)
    }

    /// `image: [B, 3, H, W]` in 0..1 and `mask: [B, 1, H, W]`, 1 where it is to be filled, give the picture as it could be, `[B, 3, H, W]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when sides are not multiples of [`MULTIPLE`], or less than [`LEAST_SIDE`].
    pub fn forward(&self, image: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = image.dims4()?;
        if !h.is_multiple_of(MULTIPLE) || !w.is_multiple_of(MULTIPLE) || h.min(w) < LEAST_SIDE {
            let reason = format!("{h} x {w} pixels are not multiples of {MULTIPLE} of at least {LEAST_SIDE}");
            return Err(Error::Invalid { field: "image", reason });
        }
        let known = image.broadcast_mul(&mask.affine(-1.0, 1.0)?)?;
        let mut local = Tensor::cat(&[&known, mask], 1)?;
        let mut global = None;
        for layer in &self.down {
            (local, global) = layer.forward(&local, global.as_ref())?;
        }
        for [conv1, conv2] in &self.blocks {
            let (l, g) = conv1.forward(&local, global.as_ref())?;
            let (l, g) = conv2.forward(&l, g.as_ref())?;
            local = (local + l)?;
            global = match (global, g) {
                (Some(global), Some(g)) => Some((global + g)?),
                (global, g) => global.or(g),
            };
        }
        let mut x = match global {
            Some(global) => Tensor::cat(&[local, global], 1)?,
            None => local,
        };
        for doubling in &self.up {
            x = doubling.forward_relu(&x)?;
        }
        let at = Placement { stride: 1, before: 0, after: 0 };
        sigmoid(&self.last.forward(&ops::reflect(&x, FIRST / 2)?, at)?)
    }
}

/// By the crate's own exponential: no C library has a say in a picture.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    let of = |x: f32| (1.0 / (1.0 + libm::exp(f64::from(-x)))) as f32;
    let values = x.to_device(&parallel::Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(of).collect();
    Ok(Tensor::from_vec(values, x.shape(), &parallel::Device::Cpu)?.to_device(x.device())?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn big() -> Value {
        let none = json!({"ratio_gin": 0, "ratio_gout": 0, "enable_lfu": false});
        json!({"generator": {"kind": "ffc_resnet", "input_nc": 4, "output_nc": 3, "ngf": 64, "n_downsampling": 3, "n_blocks": 18,
            "add_out_act": "sigmoid", "init_conv_kwargs": none, "downsample_conv_kwargs": none,
            "resnet_conv_kwargs": {"ratio_gin": 0.75, "ratio_gout": 0.75, "enable_lfu": false}}})
    }

    #[test]
    fn big_lama_is_taken_and_what_would_change_it_is_refused_by_its_name() {
        let read = |value: Value| LamaGeneratorConfig::read(value.as_object().unwrap().clone());
        let config = read(big()).unwrap();
        assert_eq!((config.width(), config.global()), (512, 384));
        read(big()["generator"].clone()).unwrap();
        // As the authors' file has them.
        let mut referring = big();
        referring["generator"]["downsample_conv_kwargs"] = json!({"ratio_gin": "${generator.init_conv_kwargs.ratio_gout}",
            "ratio_gout": "${generator.downsample_conv_kwargs.ratio_gin}", "enable_lfu": false});
        referring["generator"]["resnet_conv_kwargs"]["ratio_gout"] = json!("${generator.resnet_conv_kwargs.ratio_gin}");
        assert_eq!(read(referring).unwrap(), config);
        for (field, value) in [
            ("input_nc", json!(5)),
            ("ngf", json!(0)),
            ("n_downsampling", json!(2)),
            ("n_blocks", json!(100_000)),
            ("add_out_act", json!("tanh")),
            ("resnet_conv_kwargs", json!({"ratio_gin": 0.75, "ratio_gout": 0.75, "enable_lfu": true})),
            ("resnet_conv_kwargs", json!({"ratio_gin": 1.0, "ratio_gout": 1.0})),
        ] {
            let mut config = big();
            config["generator"][field] = value;
            match read(config) {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
