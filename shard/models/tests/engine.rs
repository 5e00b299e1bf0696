//! The denoise engine over a made-up network: joining, batching, block ranges, cancelling.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use models::block_runner::{BlockRunner, Follower};
use models::blocks::{BlockModel, Layout, RankGroup};
use models::denoise::{DenoiseState, Denoiser, LastStep};
use models::engine::Engine;
use models::lora::file::AdapterFile;
use models::lora::mapping::Sites;
use models::lora::store::{AdapterStore, Source, Sources};
use models::registry::Limits;
use models::request::{Guidance, Lora};
use models::scheduler::{Scheduler, SchedulerState};
use models::stage::{Inputs, Stage, StageEvent, TaskKey};
use models::{Error, Payload, Request, Result};
use parallel::lora::{Adapters, Cut, Site};
use parallel::{DType, Device, InProcess, Tensor, Tensors};

/// A network that adds one per range, summed over the tensor-parallel ranks, and counts its forwards.
struct Counting {
    group: RankGroup,
    forwards: Arc<AtomicUsize>,
}

impl BlockModel for Counting {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(inputs.clone())
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        self.forwards.fetch_add(1, Ordering::SeqCst);
        let x = hidden.take("hidden_states")?;
        let tp = self.group.tensor.size() as f64;
        let sum = self.group.tensor.all_reduce(&(x / tp)?)?;
        Ok(hidden.with("hidden_states", (sum + 1.0)?))
    }

    fn output(&self, mut hidden: Tensors) -> Result<Tensors> {
        Ok(Tensors::new().with("sample", hidden.take("hidden_states")?))
    }
}

#[derive(Debug)]
struct Steps(Vec<f64>);

impl Scheduler for Steps {
    fn timesteps(&self) -> &[f64] {
        &self.0
    }

    fn step(&mut self, model_output: &Tensor, _step: usize, _sample: &Tensor) -> Result<Tensor> {
        Ok(model_output.clone())
    }

    fn scale_noise(&self, sample: &Tensor, _step: usize, _noise: &Tensor) -> Result<Tensor> {
        Ok(sample.clone())
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState::default()
    }
}

/// Starts at the seed and takes the network's output as the next sample; the width is the batch key.
struct Plain;

impl Denoiser for Plain {
    fn start(&self, request: Request, _inputs: Inputs) -> Result<DenoiseState> {
        if request.width == 13 {
            return Err(Error::Invalid { field: "width", reason: "13".into() });
        }
        let latents = Tensor::full(request.seed as f32, (request.num_images_per_prompt, 1, request.width), &Device::Cpu)?;
        let scheduler = Box::new(Steps(vec![0.0; request.num_inference_steps]));
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors: Tensors::new(), last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let branch = Tensors::new().with("hidden_states", state.latents.clone());
        Ok(if state.request.cfg_scale(Guidance::TrueCfg).is_some() { vec![branch.clone(), branch] } else { vec![branch] })
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        vec![state.request.width]
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        state.latents = outputs[0].clone();
        state.last = Some(LastStep { model_output: outputs[0].clone(), prev_sample: outputs[0].clone() });
        Ok(())
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}

fn request(steps: usize, seed: u64) -> Request {
    Request { width: 4, height: 4, num_inference_steps: steps, seed, ..Request::default() }
}

/// What the engine told of a task.
#[derive(Debug, PartialEq)]
enum Told {
    Started(TaskKey),
    Step(TaskKey, usize),
    Done(TaskKey, f32),
    Cancelled(TaskKey, usize),
    Failed(TaskKey, String),
}

fn told(event: StageEvent<'_>) -> Told {
    match event {
        StageEvent::Started { key } => Told::Started(key),
        StageEvent::Step { key, step, .. } => Told::Step(key, step),
        StageEvent::Done { key, payload } => {
            let first = payload.tensors().get("latents").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            Told::Done(key, first)
        }
        StageEvent::Failed { key, error: Error::Cancelled, step } => Told::Cancelled(key, step),
        StageEvent::Failed { key, error, .. } => Told::Failed(key, error.to_string()),
    }
}

fn turn(engine: &mut Engine) -> (bool, Vec<Told>) {
    let mut events = Vec::new();
    let more = engine.turn(&mut |event| events.push(told(event))).unwrap();
    (more, events)
}

fn drain(engine: &mut Engine) -> Vec<Told> {
    let mut all = Vec::new();
    loop {
        let (more, events) = turn(engine);
        all.extend(events);
        if !more {
            return all;
        }
    }
}

/// Runs `f` on the leader of a group of `layout` whose other ranks follow on threads; also gives each rank's forwards.
fn with_engine<T>(layout: Layout, limits: Limits, f: impl FnOnce(&mut Engine, &[Arc<AtomicUsize>]) -> T) -> T {
    let counters: Vec<Arc<AtomicUsize>> = (0..layout.ranks()).map(|_| Arc::default()).collect();
    let mut links = InProcess::group(layout.ranks()).into_iter();
    let group = |link: InProcess| RankGroup::new(Arc::new(link), layout).unwrap();
    let model = |group: &RankGroup, rank: usize| Box::new(Counting { group: group.clone(), forwards: counters[rank].clone() });
    let leader = group(links.next().unwrap());
    thread::scope(|s| {
        for (i, link) in links.enumerate() {
            let group = group(link);
            let model = model(&group, i + 1);
            s.spawn(move || Follower::new(model, group).run());
        }
        let mut engine = Engine::new(Box::new(Plain), BlockRunner::new(model(&leader, 0), leader.clone()), limits);
        drop(leader);
        f(&mut engine, &counters)
    })
}

const LAYOUTS: [Layout; 9] = [
    Layout::SOLO,
    Layout::new(2, 1),
    Layout::new(1, 3),
    Layout::new(2, 2),
    Layout::new(4, 2),
    Layout::new(1, 1).with_cfg_parallel(2),
    Layout::new(1, 1).with_cfg_parallel(3),
    Layout::new(1, 3).with_cfg_parallel(2),
    Layout::new(2, 2).with_cfg_parallel(2),
];

#[test]
fn every_job_gets_its_own_result_on_every_layout() {
    for layout in LAYOUTS {
        let results = with_engine(layout, Limits { max_batch: 2, ..Limits::default() }, |engine, _| {
            for key in 0..5 {
                let negative_prompt = (key % 2 == 0).then(String::new);
                let width = if key < 3 { 4 } else { 6 };
                engine.start(
                    key,
                    Request { negative_prompt, true_cfg_scale: 2.0, width, ..request(2 + key as usize, 100 * key) },
                    Inputs::default(),
                );
            }
            drain(engine)
        });
        for key in 0..5u64 {
            let expected = (100 * key) as f32 + ((2 + key) * layout.block_ranges as u64) as f32;
            assert!(results.contains(&Told::Done(key, expected)), "{layout:?}: {key} should give {expected}: {results:?}");
        }
    }
}

#[test]
fn jobs_of_one_shape_share_a_forward_and_join_at_a_step_boundary() {
    with_engine(Layout::SOLO, Limits { max_batch: 4, ..Limits::default() }, |engine, forwards| {
        engine.start(1, request(3, 0), Inputs::default());
        assert_eq!(turn(engine).1, [Told::Started(1), Told::Step(1, 1)]);
        engine.start(2, request(3, 50), Inputs::default());
        assert_eq!(turn(engine).1, [Told::Started(2), Told::Step(1, 2), Told::Step(2, 1)]);
        assert_eq!(forwards[0].load(Ordering::SeqCst), 2, "two jobs, one forward");
        drain(engine);
        assert_eq!(forwards[0].load(Ordering::SeqCst), 4);
    });
}

#[test]
fn a_forward_holds_at_most_max_batch_pictures() {
    with_engine(Layout::SOLO, Limits { max_batch: 2, ..Limits::default() }, |engine, forwards| {
        (0..3).for_each(|key| engine.start(key, request(1, key), Inputs::default()));
        drain(engine);
        assert_eq!(forwards[0].load(Ordering::SeqCst), 2);
    });
}

#[test]
fn at_most_max_jobs_are_active_and_the_rest_follow() {
    with_engine(Layout::SOLO, Limits { max_jobs: 2, ..Limits::default() }, |engine, _| {
        (0..4).for_each(|key| engine.start(key, request(1, key), Inputs::default()));
        let (_, first) = turn(engine);
        assert_eq!(first.iter().filter(|t| matches!(t, Told::Started(_))).count(), 2);
        assert_eq!(drain(engine).iter().filter(|t| matches!(t, Told::Done(..))).count(), 2);
    });
}

#[test]
fn a_job_that_cannot_start_fails_alone() {
    with_engine(Layout::SOLO, Limits::default(), |engine, _| {
        engine.start(1, Request { width: 13, ..request(2, 0) }, Inputs::default());
        engine.start(2, request(2, 7), Inputs::default());
        let events = drain(engine);
        assert!(events.contains(&Told::Failed(1, "width: 13".into())) && events.contains(&Told::Done(2, 9.0)), "{events:?}");
    });
}

#[test]
fn cancelling_stops_every_rank_within_one_step_a_hundred_times() {
    for round in 0..100usize {
        // Of one pass a step on one lane, or of two passes on two.
        let lanes = 1 + round % 3 / 2;
        with_engine(Layout::new(2, 2).with_cfg_parallel(lanes), Limits::default(), |engine, forwards| {
            let negative_prompt = (lanes == 2).then(String::new);
            engine.start(1, Request { negative_prompt, true_cfg_scale: 2.0, ..request(1000, 0) }, Inputs::default());
            let mut steps = 0;
            while steps < round % 7 {
                steps += turn(engine).1.iter().filter(|t| matches!(t, Told::Step(..))).count();
            }
            // Half of the rounds cancel between two steps, half with a forward under way.
            if round % 2 == 1 {
                turn(engine);
            }
            engine.cancel(1);
            let events = drain(engine);
            let stopped: Vec<&Told> = events.iter().filter(|t| matches!(t, Told::Cancelled(..))).collect();
            assert_eq!(stopped.len(), 1, "round {round}: {events:?}");
            assert!(!events.iter().any(|t| matches!(t, Told::Step(..))), "round {round}: no step after the cancel: {events:?}");
            let counts: Vec<usize> = forwards.iter().map(|f| f.load(Ordering::SeqCst)).collect();
            assert!(
                counts.iter().all(|c| c.abs_diff(counts[0]) <= 1 && *c <= steps + 1),
                "round {round}: {counts:?} after {steps} steps"
            );
        });
    }
}

#[test]
fn the_two_passes_of_a_job_and_the_forwards_of_two_jobs_go_to_different_lanes() {
    let counts = |forwards: &[Arc<AtomicUsize>]| forwards.iter().map(|f| f.load(Ordering::SeqCst)).collect::<Vec<_>>();
    with_engine(Layout::SOLO.with_cfg_parallel(2), Limits::default(), |engine, forwards| {
        engine.start(
            1,
            Request { negative_prompt: Some(String::new()), true_cfg_scale: 2.0, ..request(3, 0) },
            Inputs::default(),
        );
        assert!(drain(engine).contains(&Told::Done(1, 3.0)));
        assert_eq!(counts(forwards), [3, 3], "one pass each in every step, though both would fit into one forward");
        [2, 3].into_iter().for_each(|key| engine.start(key, request(3, 10 * key), Inputs::default()));
        let events = drain(engine);
        assert!(events.contains(&Told::Done(2, 23.0)) && events.contains(&Told::Done(3, 33.0)), "{events:?}");
        assert_eq!(counts(forwards), [6, 6]);
    });
}

#[test]
fn a_lost_lane_ends_the_leader_with_a_typed_error() {
    let mut links = InProcess::group(2).into_iter();
    let group = RankGroup::new(Arc::new(links.next().unwrap()), Layout::SOLO.with_cfg_parallel(2)).unwrap();
    let model = Counting { group: group.clone(), forwards: Arc::default() };
    let mut engine = Engine::new(Box::new(Plain), BlockRunner::new(Box::new(model), group), Limits::default());
    drop(links.next());
    engine.start(1, request(2, 0), Inputs::default());
    assert!(engine.turn(&mut |_| ()).is_err_and(|e| e.loses_group()));
}

#[test]
fn a_lost_rank_ends_the_leader_with_a_typed_error() {
    let layout = Layout::new(2, 1);
    let mut links = InProcess::group(2).into_iter();
    let group = RankGroup::new(Arc::new(links.next().unwrap()), layout).unwrap();
    let model = Counting { group: group.clone(), forwards: Arc::default() };
    let mut engine = Engine::new(Box::new(Plain), BlockRunner::new(Box::new(model), group), Limits::default());
    drop(links.next());
    engine.start(1, request(2, 0), Inputs::default());
    let (send, receive) = mpsc::channel();
    thread::spawn(move || send.send(engine.turn(&mut |_| ())));
    let result = receive.recv_timeout(std::time::Duration::from_secs(5)).expect("no hang");
    assert!(result.is_err_and(|e| e.loses_group()));
}

/// An adapter of 8 numbers, in `dir`.
fn adapter(dir: &Path, name: &str) -> Source {
    let path = dir.join(format!("{name}.safetensors"));
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors = HashMap::from([("block.lora_A.weight", zeros((1, 4))), ("block.lora_B.weight", zeros((4, 1)))]);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let digest = AdapterFile::open(&path).unwrap().digest().to_owned();
    Source { name: name.into(), path, digest, components: vec!["transformer".into()] }
}

fn with_adapters(named: Vec<Source>, cache_bytes: u64) -> RankGroup {
    let sites = Sites::new("transformer", [Site { name: "block".into(), d_in: 4, d_out: 4, kernel: None, cut: Cut::Whole }]);
    let store = AdapterStore::new(Arc::new(Adapters::on(&Device::Cpu)), sites, Sources { named, cache_bytes });
    RankGroup::solo().with_adapters(Arc::new(store))
}

/// A network whose layers take adapters for a single item alone.
struct Single;

impl BlockModel for Single {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(inputs.clone())
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        match hidden.get("hidden_states")?.dim(0)? {
            1 => Ok(hidden),
            items => Err(parallel::Error::Adapted { found: vec![1, 4], items }.into()),
        }
    }

    fn output(&self, mut hidden: Tensors) -> Result<Tensors> {
        Ok(Tensors::new().with("sample", hidden.take("hidden_states")?))
    }
}

#[test]
fn an_adapter_that_does_not_fit_a_batch_fails_its_own_job_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let group = with_adapters(vec![adapter(dir.path(), "a")], 64);
    let mut engine = Engine::new(Box::new(Plain), BlockRunner::new(Box::new(Single), group), Limits::default());
    let loras = vec![Lora { name: "a".into(), scale: 1.0 }];
    engine.start(1, Request { loras, ..request(2, 0) }, Inputs::default());
    engine.start(2, request(2, 7), Inputs::default());
    let told = drain(&mut engine);
    let failed = |told: &Told| matches!(told, Told::Failed(1, reason) if reason.starts_with("adapter `a`"));
    assert!(told.iter().any(failed) && told.contains(&Told::Done(2, 7.0)), "{told:?}");
}

#[test]
fn jobs_with_different_adapters_and_none_share_forwards() {
    let dir = tempfile::tempdir().unwrap();
    let named = vec![adapter(dir.path(), "a"), adapter(dir.path(), "b")];
    // Each adapter has 8 numbers of 4 bytes.
    for (cache_bytes, expected) in [(64, 4), (63, 6)] {
        let group = with_adapters(named.clone(), cache_bytes);
        let forwards = Arc::new(AtomicUsize::new(0));
        let model = Counting { group: group.clone(), forwards: forwards.clone() };
        let mut engine = Engine::new(Box::new(Plain), BlockRunner::new(Box::new(model), group), Limits::default());
        for (key, adapter) in [(1, Some("a")), (2, Some("b")), (3, None)] {
            let loras = adapter.map(|name| Lora { name: name.into(), scale: 1.0 }).into_iter().collect();
            engine.start(key, Request { loras, ..request(3, 0) }, Inputs::default());
        }
        let told = drain(&mut engine);
        assert_eq!(told.iter().filter(|told| matches!(told, Told::Done(_, 3.0))).count(), 3, "{told:?}");
        // Alone they would need nine. The first forward of an adapter, of which nothing is known yet, goes without others.
        assert_eq!(forwards.load(Ordering::SeqCst), expected, "{cache_bytes} bytes");
    }
}
