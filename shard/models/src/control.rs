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
//! if it has modes `controls.k.mode: [B]` (u32). Several for a network that takes them at once have `controls.k.own_scale: [B, 1]` as well, and are one
//! forward, whose tensors are multiplied by the first's `scale`. `controls.pass.NAME` takes the place of the input `NAME` for the control networks alone.

use std::fmt::Debug;
use std::sync::Arc;

use parallel::{Tensor, Tensors};

use crate::blocks::BlockModel;
use crate::{Error, Result};

pub mod card;
pub(crate) mod conditions;
pub mod kind;
pub mod networks;

pub use kind::{ControlFacts, ControlKind};
pub use networks::{ControlNetworks, ControlSource, OpenControls};

/// The input that names the networks of a pass, and what the names of the others begin with.
pub(crate) const CONTROLS: &str = "controls";
/// Of inputs that are for control networks alone.
const PASS: &str = "controls.pass.";

/// A network that looks at a picture, or one rank's part of it.
pub trait ControlNetwork: Send + Sync + Debug {
    /// What it adds, by the names that these inputs have in the network that is controlled, in the reference's order. `inputs` are a pass's, as
    /// that network takes them; `controls` is one, or as many as there are for a network that takes several at once ([`ControlKind::joins`]).
    fn residuals(&self, inputs: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>>;
}

/// One control of a pass.
#[derive(Debug)]
pub struct Control<'a> {
    /// The picture: `[B, 3, height, width]` in 0..1, or its latents as the network takes its own.
    pub cond: &'a Tensor,
    /// Of a network that has several: which kind of picture it is, `[B]`, u32.
    pub mode: Option<&'a Tensor>,
    /// Of one beside others in one forward of its network: how strongly it takes part, `[B, 1]`.
    pub scale: Option<&'a Tensor>,
}

/// The only control of a network that takes one.
pub(crate) fn alone<'a, 'b>(controls: &'a [Control<'b>]) -> Result<&'a Control<'b>> {
    match controls {
        [control] => Ok(control),
        _ => Err(Error::Invalid { field: CONTROLS, reason: format!("{} pictures for a network of one", controls.len()) }),
    }
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
    for (index, slots) in forwards(networks, picked) {
        let network = networks.get(index).ok_or_else(|| Error::Invalid {
            field: CONTROLS,
            reason: format!("there is no control network {index} in this group"),
        })?;
        let of_slot = |k: &usize, name: &str| inputs.find(&format!("{CONTROLS}.{k}.{name}"));
        let control = |k: &usize| {
            let cond = inputs.get(&format!("{CONTROLS}.{k}.cond"))?;
            Ok(Control { cond, mode: of_slot(k, "mode"), scale: of_slot(k, "own_scale") })
        };
        let scale = inputs.get(&format!("{CONTROLS}.{}.scale", slots[0]))?;
        let controls: Vec<Control<'_>> = slots.iter().map(control).collect::<Result<_>>()?;
        for (i, (name, residual)) in network.residuals(&pass, &controls)?.into_iter().enumerate() {
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

/// The forwards of control networks in a pass: each one's network, and the places of the controls that it is given.
fn forwards(networks: &ControlNetworks, picked: &[u32]) -> Vec<(usize, Vec<usize>)> {
    let mut forwards: Vec<(usize, Vec<usize>)> = Vec::new();
    for (k, index) in picked.iter().map(|index| *index as usize).enumerate() {
        let joins = networks.facts().get(index).is_some_and(|facts| facts.kind.joins());
        match forwards.iter_mut().find(|(other, _)| joins && *other == index) {
            Some((_, slots)) => slots.push(k),
            None => forwards.push((index, vec![k])),
        }
    }
    forwards
}

/// The i-th residual, `[B, ..]`, times its column of `scale: [B, R]`, or the only one.
fn scaled(residual: &Tensor, scale: &Tensor, i: usize) -> Result<Tensor> {
    let column = if scale.dim(1)? == 1 { 0 } else { i };
    let mut shape = vec![1; residual.rank()];
    shape[0] = scale.dim(0)?;
    Ok(residual.broadcast_mul(&scale.narrow(1, column, 1)?.reshape(shape)?)?)
}
