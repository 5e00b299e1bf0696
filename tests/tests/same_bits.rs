//! One promise, on the bundled model: a job's latents after every step, and its picture, have the same bits on every layout,
//! with any number of threads, alone and in a batch with others.
//!
//! Nothing is recorded: instruction sets differ in the last bits (fused multiply-adds), layouts on one machine do not.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use models::blocks::{Layout, RankGroup};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::stage::{Inputs, Stage, StageEvent};
use models::{Error, Payload, Request};
use parallel::{Device, InProcess, Tensor};
use sha2::{Digest, Sha256};

const STEPS: usize = 4;
/// The job that is compared; its neighbours are 1, 2 and 3.
const JOB: u64 = 0;

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

/// Runs `f` with the leader of a component's group, whose ranks are threads with `threads` of computation each.
fn with_leader<T: Send>(component: &str, layout: Layout, threads: usize, f: impl FnOnce(&mut dyn Stage) -> T + Send) -> T {
    let dir = ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/emoji")).unwrap();
    let dir = &dir;
    let load = move |link: InProcess| {
        let group = RankGroup::new(Arc::new(link), layout).unwrap();
        registry::load(LoadSpec { dir, component, group, device: Device::Cpu, limits: Limits::default() }, &mut |_| ()).unwrap()
    };
    // A pool for each rank: ranks wait for each other.
    let pool = || rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    thread::scope(|scope| {
        let mut links = InProcess::group(layout.ranks()).into_iter();
        let leader = links.next().unwrap();
        for link in links {
            scope.spawn(move || {
                pool().install(|| match load(link) {
                    Rank::Follower(follower) => drop(follower.run()),
                    Rank::Leader(_) => panic!("a second leader"),
                });
            });
        }
        pool().install(|| match load(leader) {
            Rank::Leader(mut stage) => f(&mut *stage),
            Rank::Follower(_) => panic!("rank 0 follows"),
        })
    })
}

fn sha256(tensor: &Tensor) -> String {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// Runs the given jobs to their end; gives their payloads in the order of the keys, and [`JOB`]'s latents after each step.
fn drain(stage: &mut dyn Stage, jobs: Vec<(u64, Inputs)>) -> (Vec<Payload>, Vec<String>) {
    let (mut payloads, mut steps) = (Vec::new(), Vec::new());
    jobs.into_iter().for_each(|(key, inputs)| stage.start(key, request(key), inputs));
    let mut more = true;
    while more {
        let turn = stage.turn(&mut |event| match event {
            StageEvent::Step { key: JOB, state: Some(state), .. } => steps.push(sha256(&state.latents)),
            StageEvent::Done { key, payload } => payloads.push((key, payload)),
            StageEvent::Failed { key, error, .. } => panic!("job {key}: {error}"),
            _ => {}
        });
        more = turn.unwrap();
    }
    payloads.sort_by_key(|(key, _)| *key);
    (payloads.into_iter().map(|(_, payload)| payload).collect(), steps)
}

/// What the text encoders make of the jobs' prompts.
fn conditioning(tp: usize, threads: usize, jobs: u64) -> Vec<Inputs> {
    let mut inputs = vec![Inputs::default(); jobs as usize];
    for encoder in ["text_encoder", "text_encoder_2"] {
        let tasks = (0..jobs).map(|key| (key, Inputs::default())).collect();
        let (payloads, _) = with_leader(encoder, Layout::new(tp, 1), threads, |stage| drain(stage, tasks));
        inputs.iter_mut().zip(payloads).for_each(|(inputs, payload)| inputs.add(payload).unwrap());
    }
    inputs
}

/// [`JOB`]'s conditioning, its latents after every step, and its picture; once alone and once among `jobs`.
fn draw(layout: Layout, threads: usize, jobs: u64) -> [Vec<String>; 2] {
    let inputs = conditioning(layout.tp, threads, jobs);
    let mut texts: Vec<String> = inputs[0].conditioning.iter().map(|(name, t)| format!("{name} {}", sha256(t))).collect();
    texts.sort();
    let runs = with_leader("transformer", layout, threads, |stage| {
        let all: Vec<(u64, Inputs)> = (0..).zip(inputs).collect();
        [all[..1].to_vec(), all].map(|jobs| drain(stage, jobs))
    });
    runs.map(|(payloads, steps)| {
        assert_eq!(steps.len(), STEPS);
        let decode = |stage: &mut dyn Stage| {
            let jobs = (0..).zip(payloads).map(|(key, payload)| {
                let mut inputs = Inputs::default();
                inputs.add(payload).unwrap();
                (key, inputs)
            });
            sha256(drain(stage, jobs.collect()).0[0].image().unwrap())
        };
        let picture = with_leader("vae", Layout::SOLO, threads, decode);
        [texts.clone(), steps, vec![picture]].concat()
    })
}

#[test]
fn latents_and_pictures_have_the_same_bits_on_every_layout_alone_and_batched() {
    let [expected, _] = draw(Layout::SOLO, 1, 1);
    assert_eq!(expected.iter().collect::<BTreeSet<_>>().len(), expected.len(), "each says something: {expected:?}");
    for tp in [1, 2, 4, 8] {
        for block_ranges in [1, 2, 3] {
            for threads in [1, 2] {
                let [alone, batched] = draw(Layout::new(tp, block_ranges), threads, 4);
                assert_eq!(alone, expected, "alone, tp {tp}, {block_ranges} ranges, {threads} threads");
                assert_eq!(batched, expected, "batched, tp {tp}, {block_ranges} ranges, {threads} threads");
            }
        }
    }
}

/// The layouts with lanes that are compared, smallest first.
const LANES: [Layout; 5] = [
    Layout::new(1, 1).with_cfg_parallel(2),
    Layout::new(1, 1).with_cfg_parallel(3),
    Layout::new(2, 1).with_cfg_parallel(2),
    Layout::new(1, 3).with_cfg_parallel(2),
    Layout::new(2, 2).with_cfg_parallel(2),
];

#[test]
fn the_two_passes_of_guidance_side_by_side_have_the_bits_of_one_batch() {
    let [expected, _] = draw(Layout::SOLO, 1, 1);
    for layout in LANES {
        let [alone, batched] = draw(layout, 1, 4);
        assert_eq!(alone, expected, "alone, {layout}");
        assert_eq!(batched, expected, "batched, {layout}");
    }
}

/// What came of [`JOB`] when `stop` was done to it after `steps` steps, among jobs that were left alone: its last event.
fn disturb(layout: Layout, inputs: &[Inputs], steps: usize, stop: fn(&mut dyn Stage)) -> Error {
    with_leader("transformer", layout, 1, |stage| {
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
    let inputs = conditioning(1, 1, 3);
    let (_, expected) = with_leader("transformer", Layout::SOLO, 1, |stage| drain(stage, vec![(JOB, inputs[0].clone())]));
    for (from, to) in LANES.into_iter().zip(LANES.into_iter().rev()) {
        let cancelled = disturb(from, &inputs, 1, |stage| stage.cancel(JOB));
        assert!(matches!(cancelled, Error::Cancelled), "{from}: {cancelled}");
        let parked = disturb(from, &inputs, 2, |stage| stage.park(JOB));
        let Error::Parked(Some(checkpoint)) = parked else { panic!("{from}: {parked}") };
        let step = checkpoint.step;
        assert!((2..STEPS).contains(&step), "{from}: parked after {step}");
        let rest = Inputs { checkpoint: Some(*checkpoint), ..inputs[0].clone() };
        let (_, steps) = with_leader("transformer", to, 1, |stage| drain(stage, vec![(JOB, rest)]));
        assert_eq!(steps, expected[step..], "from {from} to {to}");
    }
}
