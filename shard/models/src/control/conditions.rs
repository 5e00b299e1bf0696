//! What a job's controls are to a denoiser: their pictures as their networks take them, and which of them take part in a pass.

use parallel::rng::Generator;
use parallel::{Device, Tensor, Tensors};

use super::CONTROLS;
use super::kind::{ControlFacts, ControlKind};
use crate::autoencoder_kl::Moments;
use crate::denoise::DenoiseState;
use crate::image_io::{self, PictureLimits};
use crate::request::Control;
use crate::stage::Inputs;
use crate::{Error, Request, Result, flow};

/// Under these names a job's controls' pictures are kept, in the job's order.
const KEPT: &str = "control_cond";
/// What the autoencoder's outputs of control pictures begin with.
pub(crate) const ENCODED: &str = "control";
/// Guess mode multiplies a ControlNet's first tensor by this and its last by one, the others by powers between.
const LEAST_GUESS: f64 = 0.1;

/// The control networks that a denoiser's jobs may name, in their group's order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    facts: Vec<ControlFacts>,
}

/// A pass of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Which, as the denoiser counts them.
    pub(crate) index: usize,
    /// It is classifier-free guidance's unconditional one.
    pub(crate) unconditional: bool,
}

impl Conditions {
    pub(crate) fn new(facts: &[ControlFacts]) -> Self {
        Self { facts: facts.to_vec() }
    }

    /// Keeps what `cond` makes of each control's picture, `[1, ..]` or as many as the passes have pictures.
    ///
    /// # Errors
    /// [`Error::Control`] with the first that no network here can be given.
    pub(crate) fn start(
        &self,
        request: &Request,
        kept: &mut Tensors,
        mut cond: impl FnMut(usize, &ControlFacts) -> Result<Tensor>,
    ) -> Result<()> {
        for (k, control) in request.controls.iter().enumerate() {
            let facts = &self.facts[self.index(control)?];
            let refuse = |reason: String| Err(Error::Control { name: control.name.clone(), reason });
            match (facts.kind.modes(), control.mode) {
                (Some(modes), Some(mode)) if mode < modes => {}
                (Some(modes), _) => return refuse(format!("it needs a mode of 0 to {}", modes - 1)),
                (None, Some(_)) => return refuse("it has no modes".into()),
                (None, None) => {}
            }
            let multiple = facts.kind.multiple();
            if !request.width.is_multiple_of(multiple) || !request.height.is_multiple_of(multiple) {
                return refuse(format!("it needs sides that are multiples of {multiple}"));
            }
            self.check_sums(request, k)?;
            kept.insert(format!("{KEPT}.{k}"), cond(k, facts)?);
        }
        Ok(())
    }

    /// Whether the k-th control's tensors can be added to those of the controls before it.
    fn check_sums(&self, request: &Request, k: usize) -> Result<()> {
        let control = &request.controls[k];
        let own = self.facts[self.index(control)?].kind.residuals();
        for other in &request.controls[..k] {
            let others = self.facts[self.index(other)?].kind.residuals();
            if let Some((of, count)) = own.iter().find(|(of, count)| others.get(*of).is_some_and(|other| other != *count)) {
                let reason =
                    format!("it gives {count} tensors of {of} and `{}` {}: they cannot be added", other.name, others[of]);
                return Err(Error::Control { name: control.name.clone(), reason });
            }
        }
        Ok(())
    }

    fn index(&self, control: &Control) -> Result<usize> {
        let found = self.facts.iter().position(|facts| facts.name == control.name);
        found.ok_or_else(|| Error::Control {
            name: control.name.clone(),
            reason: "no control network of this group has this name".into(),
        })
    }

    /// The controls that take part in a pass of the job's next step: each one's place in the job and that of its network.
    fn active(&self, state: &DenoiseState, pass: Pass) -> Vec<(usize, usize)> {
        let request = &state.request;
        let in_time = |control: &Control| is_in_time(state, control);
        let in_pass = |index: usize| !(request.guess_mode && pass.unconditional && self.facts[index].kind.guesses());
        let each =
            request.controls.iter().enumerate().filter(|(_, control)| in_time(control) || self.is_joined(request, control));
        each.filter_map(|(k, control)| Some((k, self.index(control).ok()?))).filter(|(_, index)| in_pass(*index)).collect()
    }

    /// Whether a control is given to its network in one forward with others. There it takes part in every step, with a scale of zero out of its time: as in
    /// the reference, which multiplies what the network is given of each then, and not what it gives.
    fn is_joined(&self, request: &Request, control: &Control) -> bool {
        let joins = self.index(control).is_ok_and(|index| self.facts[index].kind.joins());
        joins && request.controls.iter().filter(|other| other.name == control.name).count() > 1
    }

    /// Puts what takes part in a pass among its inputs; says whether anything does.
    pub(crate) fn add(&self, state: &DenoiseState, pass: Pass, inputs: &mut Tensors) -> Result<bool> {
        let active = self.active(state, pass);
        let pictures = state.pictures();
        for (slot, (k, index)) in active.iter().enumerate() {
            let (control, facts) = (&state.request.controls[*k], &self.facts[*index]);
            let cond = state.tensors.get(&format!("{KEPT}.{k}"))?;
            let cond = match cond.dim(0)? {
                1 => flow::per_picture(cond, pictures)?,
                rows if rows == pictures => cond.clone(),
                // Each of the reference's two passes has latents of its own; any other has those of the conditional one.
                _ => cond.narrow(0, pass.index.min(1) * pictures, pictures)?,
            };
            inputs.insert(format!("{CONTROLS}.{slot}.cond"), cond);
            let joined = self.is_joined(&state.request, control);
            let own = if is_in_time(state, control) { control.conditioning_scale } else { 0.0 };
            let scales = scales(&facts.kind, if joined { 1.0 } else { own }, state.request.guess_mode);
            let mut insert = |name: &str, scales: Vec<f32>| -> Result<()> {
                let scales = Tensor::new(scales, &Device::Cpu)?.unsqueeze(0)?;
                inputs.insert(format!("{CONTROLS}.{slot}.{name}"), flow::per_picture(&scales, pictures)?);
                Ok(())
            };
            insert("scale", scales)?;
            if joined {
                insert("own_scale", vec![own as f32])?;
            }
            if let Some(mode) = control.mode {
                inputs.insert(format!("{CONTROLS}.{slot}.mode"), Tensor::full(mode as u32, pictures, &Device::Cpu)?);
            }
        }
        if !active.is_empty() {
            let networks: Vec<u32> = active.iter().map(|(_, index)| *index as u32).collect();
            inputs.insert(CONTROLS, Tensor::new(networks, &Device::Cpu)?);
        }
        Ok(!active.is_empty())
    }

    /// Passes with equal ones go together: the networks that take part, and whether their tensors are scaled one by one.
    pub(crate) fn key(&self, state: &DenoiseState, pass: Pass) -> Vec<usize> {
        let active = self.active(state, pass);
        let own = [active.len(), usize::from(state.request.guess_mode)];
        own.into_iter().chain(active.into_iter().map(|(_, index)| index)).collect()
    }

    /// Whether any takes part in a pass.
    pub(crate) fn take_part(&self, state: &DenoiseState, pass: Pass) -> bool {
        !self.active(state, pass).is_empty()
    }
}

/// Whether a control takes part in the job's next step, as the reference says it: `1 - float(i / n < start or (i + 1) / n > end)`.
fn is_in_time(state: &DenoiseState, control: &Control) -> bool {
    let (step, steps) = (state.step as f64, state.scheduler.planned_steps() as f64);
    !(step / steps < control.guidance_start || (step + 1.0) / steps > control.guidance_end)
}

/// What a network's tensors are multiplied by: each by its own in guess mode, else all by one.
fn scales(kind: &ControlKind, scale: f64, guess_mode: bool) -> Vec<f32> {
    match kind {
        ControlKind::UNet(config) if guess_mode && kind.guesses() => {
            let last = (config.residuals() - 1) as f64;
            let ramp = |i: usize| libm::pow(10.0, libm::log10(LEAST_GUESS) * (1.0 - i as f64 / last)) as f32;
            (0..config.residuals()).map(|i| ramp(i) * scale as f32).collect()
        }
        _ => vec![scale as f32],
    }
}

/// The job's k-th control picture, of the job's size: `[1, 3, height, width]` in 0..1, or `[1, 1, height, width]` for a network that takes grey ones.
pub(crate) fn pixels(request: &Request, inputs: &Inputs, k: usize, facts: &ControlFacts) -> Result<Tensor> {
    let bytes =
        inputs.pictures.controls.get(k).ok_or(Error::Invalid { field: "controls", reason: "a picture is missing".into() })?;
    let picture = image_io::decode_picture(bytes, &PictureLimits::default()).map_err(|error| of_control(k, error))?;
    let (width, height) = (request.width, request.height);
    match facts.kind.takes_grey() {
        true => image_io::grey_in_unit_range(&picture, width, height),
        false => image_io::in_unit_range(&picture, width, height),
    }
}

/// Takes what the autoencoder made of control pictures out of `inputs`.
pub(crate) fn take_encoded(inputs: &mut Inputs) -> Tensors {
    let Some(encoded) = inputs.image_latents.take() else { return Tensors::new() };
    let (controls, others): (Tensors, Tensors) = {
        let (mut controls, mut others) = (Tensors::new(), Tensors::new());
        for (name, tensor) in encoded {
            let to = if name.starts_with(&format!("{ENCODED}.")) { &mut controls } else { &mut others };
            to.insert(name, tensor);
        }
        (controls, others)
    };
    inputs.image_latents = (!others.is_empty()).then_some(others);
    controls
}

/// `rows` draws from the distribution of the k-th control picture's latents, `[rows, C, H, W]`, not scaled; by the noise that was given for it, if
/// there is any.
pub(crate) fn latents(encoded: &Tensors, inputs: &Inputs, k: usize, rows: usize, generator: &mut Generator) -> Result<Tensor> {
    let moment = |part: &str| flow::per_picture(encoded.get(&format!("{ENCODED}.{k}.{part}"))?, rows);
    let moments = Moments { mean: moment("mean")?, logvar: moment("logvar")? };
    let noise = match inputs.control_noise.get(k) {
        Some(noise) => noise.clone(),
        None => generator.randn(moments.mean.dims())?,
    };
    moments.sample(&noise)
}

/// What is wrong with the k-th control's picture is wrong with that field.
pub(crate) fn of_control(k: usize, error: Error) -> Error {
    match error {
        Error::Invalid { reason, .. } => {
            Error::Invalid { field: "controls.image", reason: format!("of controls[{k}]: {reason}") }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::unet_2d_condition::ControlNetConfig;

    #[test]
    fn guess_mode_goes_up_from_a_tenth_by_equal_factors() {
        let config = ControlNetConfig::read(json!({"_class_name": "ControlNetModel"}).as_object().unwrap().clone()).unwrap();
        let kind = ControlKind::UNet(Box::new(config));
        assert_eq!(scales(&kind, 0.5, false), [0.5]);
        let guessed = scales(&kind, 1.0, true);
        // torch.logspace(-1, 0, 13)
        assert_eq!(guessed.len(), 13);
        for (i, expected) in [(0, 0.1), (1, 0.121_152_77), (6, 0.316_227_77), (12, 1.0)] {
            assert!((guessed[i] - expected).abs() < 1e-7, "{i}: {}", guessed[i]);
        }
    }
}
