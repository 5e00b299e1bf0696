//! torch's random numbers, so that a seed gives here the noise it gives there.
//!
//! [`TorchCpu`] follows `aten/src/ATen/native/cpu/DistributionTemplates.h` and `core/MT19937RNGEngine.h`: the stream of words is
//! exact for every seed and every mix of calls; normal numbers agree to rounding (torch takes its logarithm and cosine from
//! SLEEF, we from the `libm` crate, so that no C library has a say in a picture). [`TorchCuda`] follows
//! `aten/src/ATen/native/cuda/DistributionTemplates.h` and curand's Philox.
//!
//! Start reading at [`Generator`].

mod mt19937;
mod philox;

pub use mt19937::TorchCpu;
pub use philox::TorchCuda;

use candle_core::{Device, Tensor};

use crate::Result;

/// A job's own source of randomness: `torch.Generator(device).manual_seed(seed)`.
#[derive(Clone, Debug)]
pub enum Generator {
    /// `torch.Generator("cpu")`.
    Cpu(TorchCpu),
    /// `torch.Generator("cuda")`.
    Cuda(TorchCuda),
}

impl Generator {
    /// `torch.Generator("cpu").manual_seed(seed)`.
    pub fn cpu(seed: u64) -> Self {
        Generator::Cpu(TorchCpu::new(seed))
    }

    /// `torch.Generator("cuda").manual_seed(seed)`.
    pub fn cuda(seed: u64) -> Self {
        Generator::Cuda(TorchCuda::new(seed))
    }

    /// `torch.randn(shape, generator=self)` as f32 on the CPU, whatever device it is drawn for.
    pub fn randn(&mut self, shape: &[usize]) -> Result<Tensor> {
        let n = shape.iter().product();
        let values = match self {
            Generator::Cpu(generator) => generator.randn_f32(n),
            Generator::Cuda(generator) => generator.randn_f32(n),
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cloned_generator_goes_on_alike() {
        for mut generator in [Generator::cpu(7), Generator::cuda(7)] {
            generator.randn(&[3]).unwrap();
            let mut twin = generator.clone();
            let (a, b) = (generator.randn(&[2, 9]).unwrap(), twin.randn(&[2, 9]).unwrap());
            assert_eq!(a.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
        }
    }
}
