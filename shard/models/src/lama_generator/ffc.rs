//! `FFC_BN_ACT`: fast Fourier convolution, of local channels and of those of the spectrum, a norm and ReLU.

use parallel::convolution::Placement;
use parallel::ops::{self, Activation};
use parallel::{Conv2d, Tensor, Weights};

use super::folded::{BatchNorm, both, convolution};
use crate::Result;

/// Channels that go in and come out, at least one of them local.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ratios {
    pub(super) local: [usize; 2],
    pub(super) global: [usize; 2],
}

#[derive(Debug)]
pub(super) struct FfcBnAct {
    /// `convl2l` and, side by side with it, `convl2g`.
    of_local: Conv2d,
    convg2l: Option<Conv2d>,
    convg2g: Option<SpectralTransform>,
    /// Channels that come out.
    out: [usize; 2],
    /// What is laid around the picture, mirrored.
    padding: usize,
    stride: usize,
}

impl FfcBnAct {
    pub(super) fn load(w: &Weights, ratios: Ratios, size: usize, stride: usize) -> Result<Self> {
        let Ratios { local: [l_in, l_out], global: [g_in, g_out] } = ratios;
        let ffc = w.pp("ffc");
        let norm_l = BatchNorm::load(&w.pp("bn_l"), l_out)?;
        let norm_g = if g_out > 0 { Some(BatchNorm::load(&w.pp("bn_g"), g_out)?) } else { None };
        let (l2l, l2g) = (ffc.pp("convl2l"), ffc.pp("convl2g"));
        let spectral = |norm: &BatchNorm| SpectralTransform::load(&ffc.pp("convg2g"), [g_in, g_out], norm);
        let to_local = || convolution(&ffc.pp("convg2l"), [g_in, l_out], size, &norm_l, false);
        Ok(Self {
            of_local: match &norm_g {
                Some(norm_g) => both([&l2l, &l2g], l_in, [l_out, g_out], size, [&norm_l, norm_g])?,
                None => convolution(&l2l, [l_in, l_out], size, &norm_l, true)?,
            },
            convg2l: (g_in > 0).then(to_local).transpose()?,
            convg2g: norm_g.as_ref().filter(|_| g_in > 0).map(spectral).transpose()?,
            out: [l_out, g_out],
            padding: size / 2,
            stride,
        })
    }

    /// `[B, C, H, W]` of local channels and of those of the spectrum, if there are any.
    pub(super) fn forward(&self, local: &Tensor, global: Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)> {
        let at = Placement { stride: self.stride, before: 0, after: 0 };
        let [l_out, g_out] = self.out;
        let of_local = self.of_local.forward(&ops::reflect(local, self.padding)?, at)?; // [B, C_l + C_g, H', W']
        let mut out_local = of_local.narrow(1, 0, l_out)?;
        let mut out_global = if g_out > 0 { Some(of_local.narrow(1, l_out, g_out)?) } else { None };
        if let (Some(conv), Some(global)) = (&self.convg2l, global) {
            out_local = conv.forward_plus(&ops::reflect(global, self.padding)?, at, &out_local)?;
        }
        if let (Some(transform), Some(global), Some(out)) = (&self.convg2g, global, &out_global) {
            out_global = Some(transform.forward_plus(global, out)?);
        }
        let relu = |x: &Tensor| ops::activate(x, Activation::Relu);
        Ok((relu(&out_local)?, out_global.as_ref().map(relu).transpose()?))
    }
}

/// `SpectralTransform` with its `FourierUnit`, and the norm that comes after it.
#[derive(Debug)]
struct SpectralTransform {
    conv1: Conv2d,
    fu: Conv2d,
    conv2: Conv2d,
}

impl SpectralTransform {
    fn load(w: &Weights, [c_in, c_out]: [usize; 2], norm: &BatchNorm) -> Result<Self> {
        let half = c_out / 2;
        let (of_conv1, of_fu) = (BatchNorm::load(&w.pp("conv1.1"), half)?, BatchNorm::load(&w.pp("fu.bn"), 2 * half)?);
        Ok(Self {
            conv1: convolution(&w.pp("conv1.0"), [c_in, half], 1, &of_conv1, true)?,
            fu: convolution(&w.pp("fu.conv_layer"), [2 * half; 2], 1, &of_fu, true)?,
            conv2: convolution(&w.pp("conv2"), [half, c_out], 1, norm, false)?,
        })
    }

    /// `x: [B, C, H, W]`, and what its own is added to.
    fn forward_plus(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let at = Placement::same(1);
        let x = ops::activate(&self.conv1.forward(x, at)?, Activation::Relu)?;
        let spectrum = ops::rfft2(&x)?; // [B, C_out, H, W/2 + 1]
        let spectrum = ops::activate(&self.fu.forward(&spectrum, at)?, Activation::Relu)?;
        let everywhere = ops::irfft2(&spectrum, x.dim(3)?)?;
        Ok(self.conv2.forward_plus(&(x + everywhere)?, at, residual)?)
    }
}
