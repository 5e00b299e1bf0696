//! A small model: text to a vector, a denoiser whose every step depends on every bit before it, and pictures of its latents.

use std::collections::VecDeque;
use std::time::Duration;

use models::block_runner::{BlockRunner, Follower};
use models::blocks::{BlockModel, RankGroup};
use models::card::Card;
use models::control::card::{ControlCard, RegisteredControl};
use models::denoise::{DenoiseState, Denoiser, LastStep};
use models::engine::Engine;
use models::lora::card::{AdapterCard, Registered};
use models::model_dir::Location;
use models::registry::{LoadProgress, Rank};
use models::scheduler::{
    FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, FlowMatchHeunDiscrete, FlowMatchHeunDiscreteConfig, Schedule, Scheduler,
};
use models::stage::{Inputs, Stage, StageEvent, TaskKey};
use models::{Error, Payload, Request, Result};
use parallel::{DType, Device, Tensor, Tensors};
use worker::{Backend, RankSpec};

/// What a step takes: long enough for a command to come between two.
const STEP: Duration = Duration::from_millis(5);

pub(crate) struct Small;

impl Backend for Small {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn describe(&self, location: &Location) -> Result<Card> {
        let path = &location.path;
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
                pixels_per_image: 0,
                without_prompt: false,
            };
            if path.is_dir() { Ok(card) } else { Err(error) }
        })
    }

    fn describe_adapters(&self, _: &Location, _: &Card, _: &[Registered]) -> Result<Vec<AdapterCard>> {
        Ok(vec![])
    }

    fn describe_controls(&self, _: &Location, _: &[RegisteredControl]) -> Result<Vec<ControlCard>> {
        Ok(vec![])
    }

    fn load(&self, spec: RankSpec<'_>, on_open: &mut dyn FnMut(LoadProgress)) -> Result<Rank> {
        on_open(LoadProgress::new(Default::default(), 8));
        let row = Box::new(Sine(spec.group.clone()));
        let heun = match spec.component {
            "broken" => return Err(Error::Unsupported { field: "config.json: x".into(), value: "y".into() }),
            "panics" => panic!("as this test wants"),
            _ if !spec.group.is_leader() => return Ok(Rank::Follower(Follower::new(row, spec.group))),
            "transformer" => false,
            "transformer-heun" => true,
            component => return Ok(Rank::Leader(Box::new(Whole { component: component.into(), tasks: VecDeque::new() }))),
        };
        let runner = BlockRunner::new(row, spec.group);
        Ok(Rank::Leader(Box::new(Engine::new(Box::new(Family { heun }), runner, spec.limits))))
    }
}

/// sin(7 x), with x summed over the ranks of the group.
struct Sine(RankGroup);

impl BlockModel for Sine {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(inputs.clone())
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        std::thread::sleep(STEP);
        let size = self.0.tensor.size();
        let ones = self.0.tensor.all_reduce(&Tensor::ones(1, DType::F32, &Device::Cpu)?)?;
        assert_eq!(ones.to_vec1::<f32>()?, [size as f32]);
        let x = self.0.tensor.all_reduce(&(hidden.get("x")? / size as f64)?)?;
        Ok(Tensors::new().with("sample", (x * 7.0)?.sin()?))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }
}

struct Family {
    heun: bool,
}

impl Family {
    fn scheduler(&self, num_inference_steps: usize) -> Result<Box<dyn Scheduler>> {
        let schedule = Schedule { num_inference_steps, ..Schedule::default() };
        Ok(if self.heun {
            Box::new(FlowMatchHeunDiscrete::new(&FlowMatchHeunDiscreteConfig::default(), &schedule)?)
        } else {
            Box::new(FlowMatchEulerDiscrete::new(&FlowMatchEulerDiscreteConfig::default(), &schedule)?)
        })
    }
}

impl Denoiser for Family {
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState> {
        let Request { width, height, num_images_per_prompt: pictures, .. } = request;
        let shape = (pictures, 4, height / 8, width / 8);
        let noise = Tensor::arange(0f32, (pictures * height * width / 16) as f32, &Device::Cpu)?.reshape(shape)?;
        let text = match inputs.conditioning.find("prompt_embeds") {
            Some(embeds) => f64::from(embeds.mean_all()?.to_scalar::<f32>()?),
            None => 0.0,
        };
        let latents = ((noise * (request.seed as f64 / 100.0))? + text)?;
        let scheduler = self.scheduler(request.num_inference_steps)?;
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors: inputs.conditioning, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        Ok(vec![Tensors::new().with("x", state.latents.clone())])
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        vec![state.request.width, state.request.height]
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let model_output = outputs[0].clone();
        let prev_sample = state.scheduler.step(&model_output, state.step, &state.latents)?;
        state.latents = prev_sample.clone();
        state.last = Some(LastStep { model_output, prev_sample });
        Ok(())
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}

/// A stage that does a whole task at a time.
struct Whole {
    component: String,
    tasks: VecDeque<(TaskKey, Request, Inputs, Option<Error>)>,
}

impl Whole {
    fn stop(&mut self, key: TaskKey, why: Error) {
        if let Some((.., stopped)) = self.tasks.iter_mut().find(|(k, ..)| *k == key) {
            *stopped = Some(why);
        }
    }
}

impl Stage for Whole {
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.tasks.push_back((key, request, inputs, None));
    }

    fn park(&mut self, key: TaskKey) {
        self.stop(key, Error::Parked(None));
    }

    fn cancel(&mut self, key: TaskKey) {
        self.stop(key, Error::Cancelled);
    }

    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool> {
        let Some((key, request, inputs, stopped)) = self.tasks.pop_front() else { return Ok(false) };
        if let Some(error) = stopped {
            on_event(StageEvent::Failed { key, error, step: 0 });
            return Ok(true);
        }
        on_event(StageEvent::Started { key });
        on_event(match output(&self.component, &request, &inputs) {
            Ok(payload) => StageEvent::Done { key, payload },
            Err(error) => StageEvent::Failed { key, error, step: 0 },
        });
        Ok(true)
    }
}

fn output(component: &str, request: &Request, inputs: &Inputs) -> Result<Payload> {
    Ok(match component {
        "encoder" => {
            let embeds = Tensor::full(request.prompt.len() as f32 / 10.0, (1, 4), &Device::Cpu)?;
            Payload::Conditioning(Tensors::new().with("prompt_embeds", embeds))
        }
        "vae" if inputs.pictures.image.is_some() => {
            let image = inputs.pictures.image.clone().unwrap_or_default();
            Payload::ImageLatents(Tensors::new().with("image.mean", Tensor::new(image, &Device::Cpu)?))
        }
        _ => {
            let (b, c, h, w) = inputs.latents()?.dims4()?;
            let wide = inputs.latents()?.narrow(1, 0, c.min(3))?.reshape((b, 3, h, 1, w, 1))?;
            let wide = wide.broadcast_as((b, 3, h, 8, w, 8))?.contiguous()?;
            // Small differences of the latents are large ones of the picture.
            let image = ((wide.reshape((b, 3, request.height, request.width))? * 1e4)?.sin()? * 0.5)?;
            Payload::Image(Tensors::new().with("image", (image + 0.5)?))
        }
    })
}
