//! Control networks: what a picture says of another (edges, depths, poses) on its way into a denoiser.
//!
//! A ControlNet (L. Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", <https://arxiv.org/abs/2302.05543>) is a copy of the
//! first part of a network that is given a picture besides; a T2I-Adapter (C. Mou et al., <https://arxiv.org/abs/2302.08453>) looks at the picture
//! alone. Either gives tensors that are added within the network. They are held by the ranks of the denoiser's first block range, cut over them as
//! it is, and run before it in the same forward: what they give goes on from there with the hidden states. So a job with controls is cut, batched, stopped
//! and resumed like any other.
//!
//! The inputs of a pass say what takes part in it: `controls: [K]` (u32) the place of each control's network among [`ControlNetworks`], and for the
//! k-th `controls.k.cond`, the picture as that network takes it, `controls.k.scale: [B, R]` or `[B, 1]`, what its R tensors are multiplied by, and
//! if it has modes `controls.k.mode: [B]` (u32). `controls.pass.NAME` takes the place of the input `NAME` for the control networks alone.

use std::fmt::Debug;
use std::sync::Arc;

use parallel::{Tensor, Tensors};

use crate::blocks::BlockModel;
use crate::{Error, Result};

pub mod card;
pub(crate) mod conditions;
pub mod kind;
pub mod networks;

pub use kind::ControlFacts;
pub use networks::{ControlNetworks, ControlSource, OpenControls};

/// The input that names the networks of a pass, and what the names of the others begin with.
pub(crate) const CONTROLS: &str = "controls";
/// Of inputs that are for control networks alone.
const PASS: &str = "controls.pass.";

/// A network that looks at a picture, or one rank's part of it.
pub trait ControlNetwork: Send + Sync + Debug {
    /// What it adds, by the names that these inputs have in the network that is controlled, in the reference's order. `inputs` are a pass's, as
    /// that network takes them.
    fn residuals(&self, inputs: &Tensors, control: &Control<'_>) -> Result<Vec<(String, Tensor)>>;
}

/// One control of a pass.
#[derive(Debug)]
pub struct Control<'a> {
    /// The picture: `[B, 3, height, width]` in 0..1, or its latents as the network takes its own.
    pub cond: &'a Tensor,
    /// Of a network that has several: which kind of picture it is, `[B]`, u32.
    pub mode: Option<&'a Tensor>,
}

/// A network with its control networks: the first block range, where there are any.
pub(crate) struct Controlled {
    base: Box<dyn BlockModel>,
    networks: Arc<ControlNetworks>,
}

impl Controlled {
    pub(crate) fn new(base: Box<dyn BlockModel>, networks: Arc<ControlNetworks>) -> Self {
        Self { base, networks }
    }
}

impl BlockModel for Controlled {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        match inputs.find(CONTROLS) {
            Some(picked) => self.base.embed(&with_residuals(&self.networks, &picked.to_vec1()?, inputs)?),
            None => self.base.embed(inputs),
        }
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        self.base.blocks(hidden)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        self.base.output(hidden)
    }
}

/// The inputs of the network alone, with what the `picked` control networks add.
fn with_residuals(networks: &ControlNetworks, picked: &[u32], inputs: &Tensors) -> Result<Tensors> {
    let is_own = |name: &str| name != CONTROLS && !name.starts_with(&format!("{CONTROLS}."));
    let mut own: Tensors =
        inputs.iter().filter(|(name, _)| is_own(name)).map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let mut pass = own.clone();
    for (name, tensor) in inputs.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(PASS)?, tensor))) {
        pass.insert(name, tensor.clone());
    }
    for (k, index) in picked.iter().enumerate() {
        let network = networks.get(*index as usize).ok_or_else(|| Error::Invalid {
            field: CONTROLS,
            reason: format!("there is no control network {index} in this group"),
        })?;
        let scale = inputs.get(&format!("{CONTROLS}.{k}.scale"))?;
        let control =
            Control { cond: inputs.get(&format!("{CONTROLS}.{k}.cond"))?, mode: inputs.find(&format!("{CONTROLS}.{k}.mode")) };
        for (i, (name, residual)) in network.residuals(&pass, &control)?.into_iter().enumerate() {
            let scaled = scaled(&residual, scale, i)?;
            let sum = match own.find(&name) {
                Some(before) => (before + scaled)?,
                None => scaled,
            };
            own.insert(name, sum);
        }
    }
    Ok(own)
}

/// The i-th residual, `[B, ..]`, times its column of `scale: [B, R]`, or the only one.
fn scaled(residual: &Tensor, scale: &Tensor, i: usize) -> Result<Tensor> {
    let column = if scale.dim(1)? == 1 { 0 } else { i };
    let mut shape = vec![1; residual.rank()];
    shape[0] = scale.dim(0)?;
    Ok(residual.broadcast_mul(&scale.narrow(1, column, 1)?.reshape(shape)?)?)
}
