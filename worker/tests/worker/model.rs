//! A model that only counts: every step sums a one over the ranks of its group.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use models::block_runner::{BlockRunner, Follower};
use models::blocks::{BlockModel, RankGroup};
use models::card::Card;
use models::registry::{LoadProgress, Rank};
use models::stage::{Inputs, Stage, StageEvent, TaskKey};
use models::{Error, Payload, Request, Result};
use parallel::{DType, Device, Tensor, Tensors};
use worker::{Backend, RankSpec};

/// What a step takes: long enough for a command to come between two.
const STEP: Duration = Duration::from_millis(5);

pub(crate) struct Counting;

impl Backend for Counting {
    fn describe(&self, path: &Path) -> Result<Card> {
        Err(Error::ModelDir { path: path.into(), reason: "is not described in this test".into() }).or_else(|error| {
            let card = Card {
                family: "fake".into(),
                pipeline_class: "FakePipeline".into(),
                scheduler: "FakeScheduler".into(),
                digest: "abc".into(),
                components: vec![],
                stages: vec![],
                parameters: vec![],
                max_pixels: 1,
            };
            if path.is_dir() { Ok(card) } else { Err(error) }
        })
    }

    fn load(&self, spec: RankSpec<'_>, on_open: &mut dyn FnMut(LoadProgress)) -> Result<Rank> {
        on_open(LoadProgress { read: Default::default(), total: 8 });
        let row = Box::new(Summing(spec.group.clone()));
        match spec.component {
            "broken" => Err(Error::Unsupported { field: "config.json: x".into(), value: "y".into() }),
            "panics" => panic!("as this test wants"),
            _ if !spec.group.is_leader() => Ok(Rank::Follower(Follower::new(row, spec.group))),
            component => {
                let size = spec.group.layout().ranks();
                let runner = BlockRunner::new(row, spec.group);
                Ok(Rank::Leader(Box::new(Steps { component: component.into(), runner, size, tasks: VecDeque::new() })))
            }
        }
    }
}

struct Summing(RankGroup);

impl BlockModel for Summing {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(inputs.clone())
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(Tensors::new().with("x", self.0.tensor.all_reduce(hidden.get("x")?)?))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }
}

struct Steps {
    component: String,
    runner: BlockRunner,
    size: usize,
    tasks: VecDeque<Task>,
}

struct Task {
    key: TaskKey,
    request: Request,
    inputs: Inputs,
    step: usize,
    cancelled: bool,
}

impl Stage for Steps {
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.tasks.push_back(Task { key, request, inputs, step: 0, cancelled: false });
    }

    /// Its tasks finish.
    fn park(&mut self, _: TaskKey) {}

    fn cancel(&mut self, key: TaskKey) {
        self.tasks.iter_mut().filter(|task| task.key == key).for_each(|task| task.cancelled = true);
    }

    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool> {
        let Some(mut task) = self.tasks.pop_front() else { return Ok(false) };
        let (key, step) = (task.key, task.step);
        if task.cancelled {
            on_event(StageEvent::Failed { key, error: Error::Cancelled, step });
            return Ok(true);
        }
        if step == 0 {
            on_event(StageEvent::Started { key });
        }
        if self.component == "transformer" && step < task.request.num_inference_steps {
            std::thread::sleep(STEP);
            let one = Tensors::new().with("x", Tensor::ones(1, DType::F32, &Device::Cpu)?);
            let sum = self.runner.forward(&one)?.get("x")?.to_vec1::<f32>()?;
            assert_eq!(sum, [self.size as f32]);
            task.step += 1;
            let (step, steps) = (task.step, task.request.num_inference_steps);
            on_event(StageEvent::Step { key, step, steps, state: None });
            self.tasks.push_back(task);
            return Ok(true);
        }
        match self.output(&task) {
            Ok(payload) => on_event(StageEvent::Done { key, payload }),
            Err(error) => on_event(StageEvent::Failed { key, error, step }),
        }
        Ok(true)
    }
}

impl Steps {
    fn output(&self, task: &Task) -> Result<Payload> {
        let Request { width, height, num_images_per_prompt: pictures, .. } = task.request;
        let zeros = |shape: (usize, usize, usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        Ok(match self.component.as_str() {
            "encoder" => {
                Payload::Conditioning(Tensors::new().with("prompt_embeds", Tensor::ones((1, 4), DType::F32, &Device::Cpu)?))
            }
            "transformer" => Payload::Latents(Tensors::new().with("latents", zeros((pictures, 4, height / 8, width / 8))?)),
            "vae" if task.inputs.pictures.image.is_some() => {
                let image = task.inputs.pictures.image.clone().unwrap_or_default();
                Payload::ImageLatents(Tensors::new().with("image.mean", Tensor::new(image, &Device::Cpu)?))
            }
            _ => {
                let (b, ..) = task.inputs.latents()?.dims4()?;
                Payload::Image(Tensors::new().with("image", zeros((b, 3, height, width))?))
            }
        })
    }
}
