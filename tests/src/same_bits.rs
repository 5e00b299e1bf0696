//! Draws a picture on any layout, alone and among others, so that what comes of it can be compared.

use std::collections::BTreeSet;
use std::path::Path;

use models::blocks::Layout;
use models::stage::{Inputs, Stage};
use models::{Payload, Request};

use crate::stages::{self, sha256};

/// The job that is compared; its neighbours are 1, 2 and 3.
pub const JOB: u64 = 0;
const JOBS: u64 = 4;
/// Steps of each of the bundled model's jobs.
pub const STEPS: usize = 4;

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    /// Its directory.
    pub dir: &'a Path,
    /// Its text encoders.
    pub encoders: &'a [&'a str],
    /// The component that denoises.
    pub denoiser: &'a str,
    /// The text encoders are cut so at most.
    pub text_tp: usize,
    /// The job of a key.
    pub request: fn(u64) -> Request,
}

/// Runs `f` with the leader of a component's group, whose ranks are threads with `threads` of computation each.
///
/// # Panics
/// When the component cannot be loaded so.
pub fn with_leader<T: Send>(
    model: &Model<'_>,
    component: &str,
    layout: Layout,
    threads: usize,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    stages::with_leader(model.dir, component, layout, threads, f)
}

/// Runs the given jobs to their end; gives their payloads in the order of the keys, and [`JOB`]'s latents after each step.
///
/// # Panics
/// When a job fails.
pub fn drain(model: &Model<'_>, stage: &mut dyn Stage, jobs: Vec<(u64, Inputs)>) -> (Vec<Payload>, Vec<String>) {
    stages::drain(stage, jobs.into_iter().map(|(key, inputs)| (key, (model.request)(key), inputs)).collect(), JOB)
}

/// What the text encoders make of the jobs' prompts.
///
/// # Panics
/// When a job fails.
pub fn conditioning(model: &Model<'_>, tp: usize, threads: usize) -> Vec<Inputs> {
    let mut inputs = vec![Inputs::default(); JOBS as usize];
    let layout = Layout::new(tp.min(model.text_tp), 1);
    for encoder in model.encoders {
        let tasks = (0..JOBS).map(|key| (key, Inputs::default())).collect();
        let (payloads, _) = with_leader(model, encoder, layout, threads, |stage| drain(model, stage, tasks));
        inputs.iter_mut().zip(payloads).for_each(|(inputs, payload)| inputs.add(payload).expect("a part"));
    }
    inputs
}

/// [`JOB`]'s conditioning, its latents after every step, and its picture; once alone and once among all.
///
/// # Panics
/// When a job fails.
pub fn draw(model: &Model<'_>, layout: Layout, threads: usize) -> [Vec<String>; 2] {
    let inputs = conditioning(model, layout.tp, threads);
    let mut texts: Vec<String> = inputs[0].conditioning.iter().map(|(name, t)| format!("{name} {}", sha256(t))).collect();
    texts.sort();
    let runs = with_leader(model, model.denoiser, layout, threads, |stage| {
        let all: Vec<(u64, Inputs)> = (0..).zip(inputs).collect();
        [all[..1].to_vec(), all].map(|jobs| drain(model, stage, jobs))
    });
    runs.map(|(payloads, steps)| {
        assert_eq!(steps.len(), (model.request)(JOB).num_inference_steps);
        let decode = |stage: &mut dyn Stage| {
            let jobs = (0..).zip(payloads).map(|(key, payload)| {
                let mut inputs = Inputs::default();
                inputs.add(payload).expect("a part");
                (key, inputs)
            });
            sha256(drain(model, stage, jobs.collect()).0[0].image().expect("a picture"))
        };
        let picture = with_leader(model, "vae", Layout::SOLO, threads, decode);
        [texts.clone(), steps, vec![picture]].concat()
    })
}

/// At tp 1 to 8, in 1 to 3 ranges, on 1 and 2 threads; gives what is the same everywhere.
///
/// # Panics
/// When a layout gives something else.
pub fn check_every_layout(model: &Model<'_>) -> Vec<String> {
    let [expected, _] = draw(model, Layout::SOLO, 1);
    assert_eq!(expected.iter().collect::<BTreeSet<_>>().len(), expected.len(), "each says something: {expected:?}");
    for tp in [1, 2, 4, 8] {
        for block_ranges in [1, 2, 3] {
            for threads in [1, 2] {
                let [alone, batched] = draw(model, Layout::new(tp, block_ranges), threads);
                assert_eq!(alone, expected, "alone, tp {tp}, {block_ranges} ranges, {threads} threads");
                assert_eq!(batched, expected, "batched, tp {tp}, {block_ranges} ranges, {threads} threads");
            }
        }
    }
    expected
}

fn request(key: u64) -> Request {
    let prompts = ["red heart", "pizza on a blue background", "a strawberry on a green background", "a cat"];
    Request {
        prompt: prompts[key as usize].into(),
        negative_prompt: Some(String::new()),
        num_inference_steps: STEPS,
        true_cfg_scale: 3.0,
        seed: key,
        max_sequence_length: 32,
        ..Request::default()
    }
}

/// The bundled model.
#[must_use]
pub fn emoji() -> Model<'static> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../bundled/emoji"));
    Model { dir, encoders: &["text_encoder", "text_encoder_2"], denoiser: "transformer", text_tp: 8, request }
}
