//! One promise: a job's latents after every step, and its picture, have the same bits on every layout, with any number of
//! threads, alone and in a batch with others. Here on the bundled model; of each other family in a file of its own.
//!
//! Nothing is recorded: instruction sets differ in the last bits (fused multiply-adds), layouts on one machine do not.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::BTreeSet;
use std::path::Path;

use models::blocks::Layout;
use models::registry::Limits;
use models::stage::{Inputs, Stage, StageEvent};
use models::{Error, Payload, Request};
use tests::stages::{self, sha256};

#[path = "same_bits/sd3.rs"]
mod sd3;

/// The job that is compared; its neighbours are 1, 2 and 3.
const JOB: u64 = 0;
const JOBS: u64 = 4;
const STEPS: usize = 4;

/// What is drawn.
struct Model<'a> {
    dir: &'a Path,
    encoders: &'a [&'a str],
    /// The text encoders are cut so at most.
    text_tp: usize,
    request: fn(u64) -> Request,
}

/// Runs `f` with the leader of a component's group, whose ranks are threads with `threads` of computation each.
fn with_leader<T: Send>(
    model: &Model<'_>,
    component: &str,
    layout: Layout,
    threads: usize,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    stages::with_leader(model.dir, component, layout, threads, f)
}

/// Runs the given jobs to their end; gives their payloads in the order of the keys, and [`JOB`]'s latents after each step.
fn drain(model: &Model<'_>, stage: &mut dyn Stage, jobs: Vec<(u64, Inputs)>) -> (Vec<Payload>, Vec<String>) {
    stages::drain(stage, jobs.into_iter().map(|(key, inputs)| (key, (model.request)(key), inputs)).collect(), JOB)
}

/// What the text encoders make of the jobs' prompts.
fn conditioning(model: &Model<'_>, tp: usize, threads: usize) -> Vec<Inputs> {
    let mut inputs = vec![Inputs::default(); JOBS as usize];
    let layout = Layout::new(tp.min(model.text_tp), 1);
    for encoder in model.encoders {
        let tasks = (0..JOBS).map(|key| (key, Inputs::default())).collect();
        let (payloads, _) = with_leader(model, encoder, layout, threads, |stage| drain(model, stage, tasks));
        inputs.iter_mut().zip(payloads).for_each(|(inputs, payload)| inputs.add(payload).unwrap());
    }
    inputs
}

/// [`JOB`]'s conditioning, its latents after every step, and its picture; once alone and once among all.
fn draw(model: &Model<'_>, layout: Layout, threads: usize) -> [Vec<String>; 2] {
    let inputs = conditioning(model, layout.tp, threads);
    let mut texts: Vec<String> = inputs[0].conditioning.iter().map(|(name, t)| format!("{name} {}", sha256(t))).collect();
    texts.sort();
    let runs = with_leader(model, "transformer", layout, threads, |stage| {
        let all: Vec<(u64, Inputs)> = (0..).zip(inputs).collect();
        [all[..1].to_vec(), all].map(|jobs| drain(model, stage, jobs))
    });
    runs.map(|(payloads, steps)| {
        assert_eq!(steps.len(), (model.request)(JOB).num_inference_steps);
        let decode = |stage: &mut dyn Stage| {
            let jobs = (0..).zip(payloads).map(|(key, payload)| {
                let mut inputs = Inputs::default();
                inputs.add(payload).unwrap();
                (key, inputs)
            });
            sha256(drain(model, stage, jobs.collect()).0[0].image().unwrap())
        };
        let picture = with_leader(model, "vae", Layout::SOLO, threads, decode);
        [texts.clone(), steps, vec![picture]].concat()
    })
}

fn check_every_layout(model: &Model<'_>) {
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
fn emoji() -> Model<'static> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../bundled/emoji"));
    Model { dir, encoders: &["text_encoder", "text_encoder_2"], text_tp: 8, request }
}

#[test]
fn latents_and_pictures_have_the_same_bits_on_every_layout_alone_and_batched() {
    check_every_layout(&emoji());
}

/// The layouts with lanes that are compared, smallest first.
const LANES: [Layout; 5] = [
    Layout::new(1, 1).with_cfg_parallel(2),
    Layout::new(1, 1).with_cfg_parallel(3),
    Layout::new(2, 1).with_cfg_parallel(2),
    Layout::new(1, 3).with_cfg_parallel(2),
    Layout::new(2, 2).with_cfg_parallel(2),
];

/// Each of `layouts` gives what one rank gives.
fn check_lanes(model: &Model<'_>, layouts: &[Layout]) {
    let [expected, _] = draw(model, Layout::SOLO, 1);
    for layout in layouts {
        let [alone, batched] = draw(model, *layout, 1);
        assert_eq!(alone, expected, "alone, {layout}");
        assert_eq!(batched, expected, "batched, {layout}");
    }
}

#[test]
fn the_two_passes_of_guidance_side_by_side_have_the_bits_of_one_batch() {
    check_lanes(&emoji(), &LANES);
}

#[test]
fn the_two_passes_of_guidance_one_after_the_other_have_the_bits_of_one_batch() {
    let (model, inputs) = (emoji(), conditioning(&emoji(), 1, 1));
    let steps = |max_batch| {
        let limits = Limits { max_batch, ..Limits::default() };
        let run = |stage: &mut dyn Stage| drain(&model, stage, (0..).zip(inputs.clone()).collect()).1;
        stages::with_leader_within(limits, model.dir, "transformer", Layout::SOLO, 1, run)
    };
    assert_eq!(steps(1), steps(8));
}

/// What came of [`JOB`] when `stop` was done to it after `steps` steps, among jobs that were left alone: its last event.
fn disturb(layout: Layout, inputs: &[Inputs], steps: usize, stop: fn(&mut dyn Stage)) -> Error {
    with_leader(&emoji(), "transformer", layout, 1, |stage| {
        inputs.iter().zip(0..).for_each(|(inputs, key)| stage.start(key, request(key), inputs.clone()));
        let (mut done, mut others, mut end) = (0, 0, None);
        while end.is_none() || others + 1 < inputs.len() {
            let more = stage.turn(&mut |event| match event {
                StageEvent::Step { key: JOB, .. } => done += 1,
                StageEvent::Failed { key: JOB, error, .. } => end = Some(error),
                StageEvent::Done { .. } => others += 1,
                StageEvent::Failed { key, error, .. } => panic!("job {key}: {error}"),
                _ => {}
            });
            assert!(more.unwrap(), "all are over, {layout}");
            if done == steps && end.is_none() {
                stop(stage);
            }
        }
        end.unwrap()
    })
}

#[test]
fn a_job_parked_on_lanes_goes_on_elsewhere_with_the_same_bits_and_a_cancelled_one_stops_alone() {
    let inputs = conditioning(&emoji(), 1, 1)[..3].to_vec();
    let (_, expected) =
        with_leader(&emoji(), "transformer", Layout::SOLO, 1, |stage| drain(&emoji(), stage, vec![(JOB, inputs[0].clone())]));
    for (from, to) in LANES.into_iter().zip(LANES.into_iter().rev()) {
        let cancelled = disturb(from, &inputs, 1, |stage| stage.cancel(JOB));
        assert!(matches!(cancelled, Error::Cancelled), "{from}: {cancelled}");
        let parked = disturb(from, &inputs, 2, |stage| stage.park(JOB));
        let Error::Parked(Some(checkpoint)) = parked else { panic!("{from}: {parked}") };
        let step = checkpoint.step;
        assert!((2..STEPS).contains(&step), "{from}: parked after {step}");
        let rest = Inputs { checkpoint: Some(*checkpoint), ..inputs[0].clone() };
        let (_, steps) = with_leader(&emoji(), "transformer", to, 1, |stage| drain(&emoji(), stage, vec![(JOB, rest)]));
        assert_eq!(steps, expected[step..], "from {from} to {to}");
    }
}
