//! `atelier generate`: a prompt in, a picture out.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use proto::v1::job_event::Kind;
use proto::v1::{
    Control, CreateJobRequest, Job, JobSpec, JobState, ListModelsRequest, Lora, NoiseGenerator, Offset, Size, WatchJobRequest,
};

use tokio::sync::watch;
use tonic::Code;

use crate::client::{Client, ServerArgs};
use crate::error::Error;
use crate::patience::Patience;
use crate::progress::Progress;
use crate::stop::{Reached, unless_stopped};
use crate::trace::Call;
use crate::{pictures, show};

/// Where a picture goes when nobody says.
pub(crate) const DEFAULT_OUT: &str = "atelier.png";
/// Longest time that can be asked for: a year.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How often it is looked why a job waits.
const LOOK: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    job: JobArgs,
}

/// What to draw and where to put it.
#[derive(Debug, Clone, Args)]
pub(crate) struct JobArgs {
    /// What the picture should show. May be left out for models that fill in a picture (LaMa).
    #[arg(default_value = "")]
    prompt: String,
    /// A name from `atelier models`. May be left out when only one is served.
    #[arg(long)]
    model: Option<String>,
    /// Width and height in pixels, such as 1024x768: of what is drawn, and what `--image` and `--control` pictures are brought to. Default: the model's own.
    #[arg(long, value_parser = size)]
    size: Option<(u32, u32)>,
    /// Denoising steps.
    #[arg(long, allow_negative_numbers = true)]
    steps: Option<u32>,
    /// Seed of the noise; the same seed gives the same picture.
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<u64>,
    /// Pictures.
    #[arg(short, allow_negative_numbers = true)]
    n: Option<u32>,
    /// Where the picture goes; several get -1, -2, ... before the extension.
    #[arg(long, default_value = DEFAULT_OUT)]
    pub(crate) out: PathBuf,
    /// What the picture should not show. Takes effect with --cfg above 1.
    #[arg(long)]
    negative: Option<String>,
    /// True classifier-free guidance; 1 is off.
    #[arg(long, allow_negative_numbers = true)]
    cfg: Option<f64>,
    /// Guidance, distilled or classifier-free, for models that have it.
    #[arg(long, allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Start from this picture, or edit it. May be repeated for models that look at several, which the prompt calls "Picture 1", "Picture 2" and so on.
    #[arg(long = "image")]
    images: Vec<PathBuf>,
    /// Repaint only where this picture is white.
    #[arg(long)]
    mask: Option<PathBuf>,
    /// How far to go from --image, 0 to 1.
    #[arg(long, allow_negative_numbers = true)]
    strength: Option<f64>,
    /// Tokens of the prompt that are read.
    #[arg(long, allow_negative_numbers = true)]
    max_sequence_length: Option<u32>,
    /// What the second text encoder reads, if not the prompt.
    #[arg(long)]
    prompt_2: Option<String>,
    /// What the third text encoder reads, if not the prompt.
    #[arg(long)]
    prompt_3: Option<String>,
    /// What the second text encoder reads, if not --negative.
    #[arg(long)]
    negative_2: Option<String>,
    /// What the third text encoder reads, if not --negative.
    #[arg(long)]
    negative_3: Option<String>,
    /// How many of the CLIP text encoder's last layers are left out.
    #[arg(long, allow_negative_numbers = true)]
    clip_skip: Option<u32>,
    /// Shift of the flow-matching timesteps, in place of the model's own.
    #[arg(long, allow_negative_numbers = true)]
    shift: Option<f64>,
    /// How much noise the scheduler's steps add (DDIM), 0 to 1.
    #[arg(long, allow_negative_numbers = true)]
    eta: Option<f64>,
    /// How far guidance is brought back to the standard deviation of the conditional pass, 0 to 1.
    #[arg(long, allow_negative_numbers = true)]
    guidance_rescale: Option<f64>,
    /// What Stable Diffusion XL is told: the size before scaling, WIDTHxHEIGHT.
    #[arg(long, value_parser = size)]
    original_size: Option<(u32, u32)>,
    /// What was cropped, TOP,LEFT.
    #[arg(long, value_parser = offset)]
    crops_coords_top_left: Option<Offset>,
    /// The size that is wanted, WIDTHxHEIGHT.
    #[arg(long, value_parser = size)]
    target_size: Option<(u32, u32)>,
    /// The same for the unconditional pass.
    #[arg(long, value_parser = size)]
    negative_original_size: Option<(u32, u32)>,
    /// The same for the unconditional pass.
    #[arg(long, value_parser = offset)]
    negative_crops_coords_top_left: Option<Offset>,
    /// The same for the unconditional pass.
    #[arg(long, value_parser = size)]
    negative_target_size: Option<(u32, u32)>,
    /// How much noise a picture that is enlarged gets (DeepFloyd IF), 0 to 999.
    #[arg(long, allow_negative_numbers = true)]
    noise_level: Option<u32>,
    /// The part of the denoising after which the refiner goes on (models that have one), 0 to 1; 1: without it.
    #[arg(long, allow_negative_numbers = true)]
    denoising_end: Option<f64>,
    /// What a refiner is told of how good the picture is to look, 0 to 10.
    #[arg(long, allow_negative_numbers = true)]
    aesthetic_score: Option<f64>,
    /// The same, for the unconditional pass.
    #[arg(long, allow_negative_numbers = true)]
    negative_aesthetic_score: Option<f64>,
    /// Skip-layer guidance: the blocks that an extra, repelling pass leaves out, such as 7,8,9.
    #[arg(long, value_delimiter = ',')]
    skip_guidance_layers: Vec<u32>,
    /// How strongly that pass repels.
    #[arg(long, allow_negative_numbers = true)]
    skip_layer_guidance_scale: Option<f64>,
    /// From this part of the steps on, 0 to 1.
    #[arg(long, allow_negative_numbers = true)]
    skip_layer_guidance_start: Option<f64>,
    /// Up to this part of the steps, 0 to 1.
    #[arg(long, allow_negative_numbers = true)]
    skip_layer_guidance_stop: Option<f64>,
    /// An adapter from `atelier models`, and how strongly it takes part: NAME or NAME:SCALE. May be repeated.
    #[arg(long = "lora", value_parser = lora)]
    loras: Vec<Lora>,
    /// A control network from `atelier models` and the picture it looks at: NAME=FILE, then if they are not 1 and all
    /// its scale and the part of the steps that it acts in: `canny=edges.png:0.8:0-0.6`. May be repeated.
    #[arg(long = "control", value_parser = control)]
    controls: Vec<ControlArg>,
    /// Which kind of picture each control's is, for networks that know several; one for each `--control`, and `none` for a network that knows one kind alone.
    #[arg(long, value_delimiter = ',', value_parser = mode)]
    control_mode: Vec<ControlMode>,
    /// ControlNets act on the conditional pass alone: for prompts that say little.
    #[arg(long)]
    guess_mode: bool,
    /// Draw the noise as torch does on CUDA.
    #[arg(long)]
    cuda_noise: bool,
    /// Write the prompt into the picture's metadata.
    #[arg(long)]
    embed_prompt: bool,
    /// Go before jobs of a lower priority, and take the place of a running one. -100 to 100.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    priority: i32,
    /// Seconds in which the picture is wanted: refused when that cannot be, ended when it was not.
    #[arg(long, value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// No progress bars.
    #[arg(long, short)]
    quiet: bool,
}

pub(crate) async fn run(args: GenerateArgs) -> Result<(), Error> {
    let mut client = Client::connect(&args.server).await?;
    draw(&mut client, &args.job).await
}

/// Asks for a job, shows it while it runs and writes its pictures.
pub(crate) async fn draw(client: &mut Client, args: &JobArgs) -> Result<(), Error> {
    let call = Call::begin();
    let (reached, _) = watch::channel(Reached::Nothing);
    let asker = client.clone();
    // Boxed: it is large.
    let drawn = unless_stopped(&asker, &reached, Box::pin(draw_in(client, args, &call, &reached))).await;
    call.ended(drawn.is_err());
    drawn
}

async fn draw_in(client: &mut Client, args: &JobArgs, call: &Call, reached: &watch::Sender<Reached>) -> Result<(), Error> {
    pictures::check_writable(&args.out, args.n.is_some_and(|n| n > 1))?;
    let spec = spec(client, args).await?;
    reached.send_replace(Reached::Asking);
    let job = create(client, args, spec, call).await?;
    eprintln!("job {}", job.id);
    reached.send_replace(Reached::Accepted(job.id.clone()));
    let followed = follow(client, &job.id, args.quiet).await;
    let (job, times) = followed.map_err(|error| match error {
        // As patience takes them.
        Error::Status(source) if matches!(source.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) => {
            Error::Away { job: job.id, source }
        }
        other => other,
    })?;
    pictures::fetch(client, &job, &args.out).await?;
    let seed = job.spec.as_ref().and_then(|s| s.seed).unwrap_or_default();
    println!("seed {seed} | {times}");
    Ok(())
}

/// Asks for the job. The request's id makes it safe to ask again when the answer was lost with the coordinator.
async fn create(client: &mut Client, args: &JobArgs, spec: JobSpec, call: &Call) -> Result<Job, Error> {
    let request = CreateJobRequest {
        request_id: uuid::Uuid::new_v4().to_string(),
        spec: Some(spec),
        priority: args.priority,
        timeout: args.timeout.and_then(|timeout| timeout.try_into().ok()),
    };
    let patience = Patience::default();
    loop {
        match client.jobs.create_job(call.tagged(request.clone())).await {
            Ok(created) => return created.into_inner().job.ok_or(Error::Protocol("no job")),
            Err(status) => patience.wait(status).await?,
        }
    }
}

/// Follows a job to its end, across restarts of the coordinator.
async fn follow(client: &mut Client, job_id: &str, quiet: bool) -> Result<(Job, String), Error> {
    let mut progress = Progress::new(quiet);
    let (mut after_sequence, mut last) = (0, None);
    let mut patience = Patience::default();
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while last.as_ref().is_none_or(|job: &Job| !is_over(job)) {
        let request = WatchJobRequest { job_id: job_id.to_owned(), after_sequence };
        let mut events = match client.jobs.watch_job(request).await {
            Ok(events) => events.into_inner(),
            Err(status) => {
                progress.tell(format!("the coordinator is away: {}", status.message()));
                patience.wait(status).await?;
                continue;
            }
        };
        loop {
            let message = tokio::select! {
                message = events.message() => message,
                _ = look.tick() => {
                    if let Some(job) = last.as_ref().filter(|job| job.state() == JobState::Queued)
                        && let Some(problem) = show::problem(client, job).await
                    {
                        progress.tell(format!("queued: {problem}"));
                    }
                    continue;
                }
            };
            let event = match message {
                Ok(Some(message)) => message.event,
                Ok(None) => break,
                Err(status) => {
                    progress.tell(format!("the coordinator is away: {}", status.message()));
                    patience.wait(status).await?;
                    break;
                }
            };
            patience = Patience::default();
            let Some((sequence, kind)) = event.and_then(|event| Some((event.sequence, event.kind?))) else { continue };
            after_sequence = sequence;
            progress.on_event(&kind);
            if let Kind::StateChanged(job) = kind {
                last = Some(job);
            }
        }
    }
    let times = progress.finish();
    let job = last.ok_or(Error::Protocol("a job without events"))?;
    match job.state() {
        JobState::Succeeded => Ok((job, times)),
        JobState::Cancelled => Err(Error::Job("was cancelled".into())),
        _ => {
            let failure = job.failure.unwrap_or_default();
            let stage = if failure.stage.is_empty() { String::new() } else { format!(" in {}", failure.stage) };
            Err(Error::Job(format!("failed{stage}: {} ({})", failure.message, failure.reason)))
        }
    }
}

fn is_over(job: &Job) -> bool {
    matches!(job.state(), JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|d| !d.is_zero() && *d <= LONGEST);
    duration.ok_or_else(|| format!("must be more than 0 and at most {}", LONGEST.as_secs()))
}

async fn spec(client: &mut Client, args: &JobArgs) -> Result<JobSpec, Error> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => only_model(client).await?,
    };
    let mut spec = JobSpec {
        model,
        prompt: args.prompt.clone(),
        negative_prompt: args.negative.clone(),
        width: args.size.map(|s| s.0),
        height: args.size.map(|s| s.1),
        num_inference_steps: args.steps,
        guidance_scale: args.guidance,
        true_cfg_scale: args.cfg,
        seed: args.seed,
        num_images_per_prompt: args.n,
        strength: args.strength,
        max_sequence_length: args.max_sequence_length,
        embed_prompt: args.embed_prompt,
        prompt_2: args.prompt_2.clone(),
        prompt_3: args.prompt_3.clone(),
        negative_prompt_2: args.negative_2.clone(),
        negative_prompt_3: args.negative_3.clone(),
        clip_skip: args.clip_skip,
        shift: args.shift,
        eta: args.eta,
        guidance_rescale: args.guidance_rescale,
        noise_level: args.noise_level,
        denoising_end: args.denoising_end,
        aesthetic_score: args.aesthetic_score,
        negative_aesthetic_score: args.negative_aesthetic_score,
        original_size: args.original_size.map(told),
        crops_coords_top_left: args.crops_coords_top_left,
        target_size: args.target_size.map(told),
        negative_original_size: args.negative_original_size.map(told),
        negative_crops_coords_top_left: args.negative_crops_coords_top_left,
        negative_target_size: args.negative_target_size.map(told),
        skip_guidance_layers: args.skip_guidance_layers.clone(),
        skip_layer_guidance_scale: args.skip_layer_guidance_scale,
        skip_layer_guidance_start: args.skip_layer_guidance_start,
        skip_layer_guidance_stop: args.skip_layer_guidance_stop,
        loras: args.loras.clone(),
        guess_mode: args.guess_mode,
        ..Default::default()
    };
    if args.cuda_noise {
        spec.set_noise_generator(NoiseGenerator::TorchCuda);
    }
    if let Some((first, more)) = args.images.split_first() {
        spec.image_blob_id = client.upload("--image", first).await?;
        for image in more {
            spec.more_image_blob_ids.push(client.upload("--image", image).await?);
        }
    }
    if let Some(mask) = &args.mask {
        spec.mask_image_blob_id = client.upload("--mask", mask).await?;
    }
    if !args.control_mode.is_empty() && args.control_mode.len() != args.controls.len() {
        let reason = format!("{} modes for {} controls", args.control_mode.len(), args.controls.len());
        return Err(Error::Flag { flag: "--control-mode", reason });
    }
    for (k, control) in args.controls.iter().enumerate() {
        let image_blob_id = client.upload("--control", &control.picture).await?;
        spec.controls.push(Control {
            image_blob_id,
            mode: args.control_mode.get(k).and_then(|mode| mode.0),
            ..control.said.clone()
        });
    }
    Ok(spec)
}

async fn only_model(client: &mut Client) -> Result<String, Error> {
    let mut models = client.cluster.list_models(ListModelsRequest {}).await?.into_inner().models;
    match (models.pop(), models.len()) {
        (Some(model), 0) => Ok(model.name),
        (None, _) => Err(Error::Flag { flag: "--model", reason: "the server has none".into() }),
        (Some(last), _) => {
            let names: Vec<String> = models.into_iter().map(|m| m.name).chain([last.name]).collect();
            Err(Error::Flag { flag: "--model", reason: format!("choose one of {}", names.join(", ")) })
        }
    }
}

/// A control network and the file of the picture it looks at.
#[derive(Clone, Debug, PartialEq)]
struct ControlArg {
    said: Control,
    picture: PathBuf,
}

/// `NAME=FILE`, `NAME=FILE:SCALE` or `NAME=FILE:SCALE:START-END`.
fn control(text: &str) -> Result<ControlArg, String> {
    let wrong = || format!("`{text}` is not NAME=FILE, NAME=FILE:SCALE or NAME=FILE:SCALE:START-END");
    let (name, rest) = text.split_once('=').filter(|(name, rest)| !name.is_empty() && !rest.is_empty()).ok_or_else(wrong)?;
    let number = |text: &str| text.parse::<f64>().map_err(|_| wrong());
    let part = |text: &str| -> Result<(f64, f64), String> {
        let (start, end) = text.split_once('-').ok_or_else(wrong)?;
        Ok((number(start)?, number(end)?))
    };
    let mut said = Control { name: name.to_owned(), ..Control::default() };
    // What is not a number belongs to the file's name.
    let mut words: Vec<&str> = rest.split(':').collect();
    if let [_, .., scale, steps] = words.as_slice()
        && let (Ok(scale), Ok((start, end))) = (number(scale), part(steps))
    {
        (said.conditioning_scale, said.guidance_start, said.guidance_end) = (Some(scale), Some(start), Some(end));
        words.truncate(words.len() - 2);
    } else if let [_, .., scale] = words.as_slice()
        && let Ok(scale) = number(scale)
    {
        said.conditioning_scale = Some(scale);
        words.truncate(words.len() - 1);
    }
    Ok(ControlArg { said, picture: words.join(":").into() })
}

/// A control's kind of picture, of a network that knows several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ControlMode(Option<u32>);

fn mode(text: &str) -> Result<ControlMode, String> {
    match text {
        "none" => Ok(ControlMode(None)),
        number => Ok(ControlMode(Some(number.parse().map_err(|_| format!("`{text}` is no mode: a number, or none"))?))),
    }
}

fn lora(text: &str) -> Result<Lora, String> {
    let Some((name, scale)) = text.split_once(':') else {
        return Ok(Lora { name: text.to_owned(), scale: None });
    };
    let scale: f64 = scale.parse().map_err(|_| format!("`{text}` is not NAME or NAME:SCALE"))?;
    Ok(Lora { name: name.to_owned(), scale: Some(scale) })
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let parse = |s: &str| s.parse::<u32>().map_err(|_| format!("`{text}` is not WIDTHxHEIGHT"));
    let (width, height) = text.split_once('x').ok_or_else(|| format!("`{text}` is not WIDTHxHEIGHT"))?;
    Ok((parse(width)?, parse(height)?))
}

fn told((width, height): (u32, u32)) -> Size {
    Size { height, width }
}

fn offset(text: &str) -> Result<Offset, String> {
    let parse = |s: &str| s.parse::<u32>().map_err(|_| format!("`{text}` is not TOP,LEFT"));
    let (top, left) = text.split_once(',').ok_or_else(|| format!("`{text}` is not TOP,LEFT"))?;
    Ok(Offset { top: parse(top)?, left: parse(left)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_from_the_top_and_from_the_left() {
        assert_eq!(offset("12,34"), Ok(Offset { top: 12, left: 34 }));
        assert!(offset("12").is_err() && offset("12,-1").is_err());
    }

    #[test]
    fn sizes_are_width_by_height() {
        assert_eq!(size("1024x768"), Ok((1024, 768)));
        assert!(size("1024").is_err() && size("ax3").is_err() && size("-1x3").is_err());
    }

    #[test]
    fn a_control_is_a_network_and_a_picture_and_may_have_a_scale_and_a_part_of_the_steps() {
        let plain = |name: &str, file: &str| ControlArg {
            said: Control { name: name.into(), ..Control::default() },
            picture: file.into(),
        };
        assert_eq!(control("canny=edges.png"), Ok(plain("canny", "edges.png")));
        let scaled = control("canny=a:b.png:0.8").unwrap();
        assert_eq!((scaled.picture, scaled.said.conditioning_scale), ("a:b.png".into(), Some(0.8)));
        let said = control("canny=edges.png:0.8:0.1-0.6").unwrap().said;
        assert_eq!((said.conditioning_scale, said.guidance_start, said.guidance_end), (Some(0.8), Some(0.1), Some(0.6)));
        assert!(control("canny").is_err() && control("=edges.png").is_err() && control("canny=").is_err());
    }

    #[test]
    fn a_control_has_a_mode_or_none() {
        assert_eq!((mode("3"), mode("none")), (Ok(ControlMode(Some(3))), Ok(ControlMode(None))));
        assert!(mode("").is_err() && mode("-1").is_err() && mode("canny").is_err());
    }

    #[test]
    fn an_adapter_may_have_a_scale() {
        assert_eq!(lora("pixel"), Ok(Lora { name: "pixel".into(), scale: None }));
        assert_eq!(lora("pixel:-0.8"), Ok(Lora { name: "pixel".into(), scale: Some(-0.8) }));
        assert!(lora("pixel:much").is_err());
    }
}
