//! What the configuration of a diffusion scheduler, or a run of it, asks for that is not here is refused by its field.

use models::scheduler::{DiffusionConfig, Run, StepNoise};
use models::{Error, Result};
use parallel::{DType, Device, Tensor};
use serde_json::{Value, json};

#[derive(Debug)]
struct Zeros;

impl StepNoise for Zeros {
    fn draw(&mut self, _step: usize, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
    }
}

fn config(class: &str, fields: Value) -> DiffusionConfig {
    DiffusionConfig::new(class, &fields).unwrap_or_else(|e| panic!("{class} {fields}: {e}"))
}

fn run(num_inference_steps: usize) -> Run {
    Run { num_inference_steps, ..Run::default() }
}

#[test]
fn a_configuration_that_asks_for_what_is_not_here_is_refused_by_its_field() {
    const SINGLE: &str = "DPMSolverSinglestepScheduler";
    for (class, fields, field) in [
        ("LMSDiscreteScheduler", json!({}), "scheduler (model_index.json)"),
        ("PNDMScheduler", json!({}), "scheduler: skip_prk_steps"),
        (SINGLE, json!({ "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min" }), "scheduler: algorithm_type"),
        (SINGLE, json!({ "algorithm_type": "dpmsolver" }), "scheduler: final_sigmas_type"),
        (SINGLE, json!({ "lambda_min_clipped": -5.1 }), "scheduler: lambda_min_clipped"),
        (SINGLE, json!({ "variance_type": "learned_range" }), "scheduler: variance_type"),
        (SINGLE, json!({ "solver_order": 4 }), "scheduler: solver_order"),
        (SINGLE, json!({ "use_beta_sigmas": true }), "scheduler: use_beta_sigmas"),
        ("KDPM2DiscreteScheduler", json!({ "prediction_type": "sample" }), "scheduler: prediction_type"),
        ("KDPM2DiscreteScheduler", json!({ "use_beta_sigmas": true }), "scheduler: use_beta_sigmas"),
        ("KDPM2AncestralDiscreteScheduler", json!({ "beta_schedule": "exp" }), "scheduler: beta_schedule"),
        ("TCDScheduler", json!({ "clip_sample": true }), "scheduler: clip_sample"),
        ("TCDScheduler", json!({ "thresholding": true }), "scheduler: thresholding"),
        ("TCDScheduler", json!({ "original_inference_steps": 0 }), "scheduler: original_inference_steps"),
    ] {
        match DiffusionConfig::new(class, &fields) {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field, "{class} {fields}"),
            other => panic!("{class} {fields}: {other:?}"),
        }
    }
}

#[test]
fn fields_that_a_class_does_not_take_are_not_looked_at() {
    let single = config("DPMSolverSinglestepScheduler", json!({}));
    let others =
        json!({ "timestep_spacing": "trailing", "steps_offset": 1, "use_lu_lambdas": true, "rescale_betas_zero_snr": true });
    let timesteps = |config: &DiffusionConfig| config.start(&run(5), None).map(|s| (s.timesteps().to_vec(), s.sigmas().to_vec()));
    assert_eq!(timesteps(&config(single.class(), others)).unwrap(), timesteps(&single).unwrap());
}

#[test]
fn a_run_that_does_not_fit_is_refused_by_its_field() {
    let (tcd, kdpm2) = (config("TCDScheduler", json!({})), config("KDPM2DiscreteScheduler", json!({})));
    for (config, run, field) in [
        (&tcd, run(51), "num_inference_steps"),
        (&tcd, Run { original_strength: Some(0.5), ..run(26) }, "num_inference_steps"),
        (&tcd, Run { original_inference_steps: Some(50), ..run(4) }, "original_inference_steps"),
        (&tcd, Run { eta: 1.5, ..run(4) }, "eta"),
        (&kdpm2, Run { begin: 1, ..run(4) }, "strength"),
        (&kdpm2, Run { begin: 8, ..run(4) }, "strength"),
    ] {
        match config.start(&run, Some(Box::new(Zeros))) {
            Err(Error::Invalid { field: found, .. }) => assert_eq!(found, field, "{run:?}"),
            other => panic!("{run:?}: {other:?}"),
        }
    }
}

#[test]
fn steps_that_draw_need_a_source_of_noise_and_others_none() {
    let stochastic = json!({ "algorithm_type": "sde-dpmsolver++", "skip_prk_steps": true });
    for (class, fields, draws) in [
        ("DDIMScheduler", json!({}), [false, true]),
        ("DDPMScheduler", json!({}), [true, true]),
        ("DPMSolverMultistepScheduler", json!({}), [false, false]),
        ("DPMSolverMultistepScheduler", stochastic.clone(), [true, true]),
        ("DPMSolverSinglestepScheduler", json!({}), [false, false]),
        ("DPMSolverSinglestepScheduler", stochastic.clone(), [true, true]),
        ("EulerDiscreteScheduler", json!({}), [false, false]),
        ("EulerAncestralDiscreteScheduler", json!({}), [true, true]),
        ("HeunDiscreteScheduler", json!({}), [false, false]),
        ("KDPM2DiscreteScheduler", json!({}), [false, false]),
        ("KDPM2AncestralDiscreteScheduler", json!({}), [true, true]),
        ("LCMScheduler", json!({}), [true, true]),
        ("PNDMScheduler", stochastic, [false, false]),
        ("TCDScheduler", json!({}), [false, true]),
        ("UniPCMultistepScheduler", json!({}), [false, false]),
    ] {
        let config = config(class, fields);
        assert_eq!(config.class(), class);
        for (eta, draws) in [0.0, 0.3].into_iter().zip(draws) {
            let without = config.start(&Run { eta, ..run(4) }, None);
            assert_eq!((config.draws(eta), without.is_err()), (draws, draws), "{class} with eta {eta}: {without:?}");
            config.start(&Run { eta, ..run(4) }, Some(Box::new(Zeros))).unwrap();
        }
    }
}
