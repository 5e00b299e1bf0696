//! Adapters on the bundled model: a job draws the same with them on every layout, alone and beside jobs with others or none; what
//! is wrong with an adapter is its job's failure, not the group's.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use models::blocks::{Layout, RankGroup};
use models::flux_transformer::FluxTransformerConfig;
use models::lora::card::{AdapterCard, Registered, describe};
use models::lora::store::{DEFAULT_CACHE_BYTES, Source, Sources};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::request::Lora;
use models::stage::{Inputs, Stage, StageEvent};
use models::{Error, Request};
use parallel::{Device, InProcess, Tensor, Tensors};
use tests::synthetic::{self, Random};

const STEPS: usize = 3;

fn emoji() -> ModelDir {
    ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/emoji")).unwrap()
}

/// Two adapters of the bundled transformer and one of its CLIP text encoder, in a folder.
fn write_adapters(dir: &Path) {
    let config: FluxTransformerConfig = emoji().config("transformer").unwrap();
    for (name, rank, seed) in [("pixel", 4, 1), ("outline", 3, 2)] {
        let tensors = synthetic::flux_lora(&config, rank, 0.3, seed).unwrap();
        candle_core::safetensors::save(&tensors, dir.join(format!("{name}.safetensors"))).unwrap();
    }
    let clip: serde_json::Value = emoji().config("text_encoder").unwrap();
    let (width, inner) = (clip["hidden_size"].as_u64().unwrap() as usize, clip["intermediate_size"].as_u64().unwrap() as usize);
    let (layer, mut random) = ("lora_te1_text_model_encoder_layers_0_mlp_fc1", Random::new(3));
    let tensors = [("lora_down", vec![2, width]), ("lora_up", vec![inner, 2])]
        .map(|(factor, shape)| (format!("{layer}.{factor}.weight"), random.tensor(&shape, 0.0, 0.5).unwrap()));
    let tensors = std::collections::HashMap::from(tensors);
    candle_core::safetensors::save(&tensors, dir.join("words.safetensors")).unwrap();
}

fn cards(dir: &Path, names: &[&str]) -> Vec<AdapterCard> {
    let registered: Vec<Registered> = names
        .iter()
        .map(|name| {
            let path = dir.join(format!("{name}.safetensors"));
            Registered { name: (*name).into(), path, defaults: Default::default() }
        })
        .collect();
    let model = emoji();
    describe(&model, &registry::describe(&model).unwrap(), &registered).unwrap()
}

fn sources(dir: &Path) -> Sources {
    let named = cards(dir, &["pixel", "outline", "words"]).into_iter().map(|card| {
        assert_eq!(card.problem, "");
        let path = dir.join(format!("{}.safetensors", card.name));
        Source { name: card.name, path, digest: card.digest, components: card.components }
    });
    Sources { named: named.collect(), cache_bytes: DEFAULT_CACHE_BYTES }
}

/// Runs `f` with the leader of a component's group whose ranks are threads; `adapters` gives each rank its own.
fn with_leader<T: Send>(
    component: &str,
    layout: Layout,
    adapters: impl Fn(usize) -> Sources + Sync,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    let (dir, adapters) = (&emoji(), &adapters);
    let load = move |rank: usize, link: InProcess| {
        let group = RankGroup::new(Arc::new(link), layout).unwrap();
        let spec = LoadSpec { dir, component, group, device: Device::Cpu, limits: Limits::default() };
        registry::load_with(spec, adapters(rank), &[], &mut |_| ()).unwrap()
    };
    // A pool for each rank: ranks wait for each other.
    let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    thread::scope(|scope| {
        let mut links = InProcess::group(layout.ranks()).into_iter().enumerate();
        let (_, leader) = links.next().unwrap();
        for (rank, link) in links {
            scope.spawn(move || {
                pool().install(|| match load(rank, link) {
                    Rank::Follower(follower) => drop(follower.run()),
                    Rank::Leader(_) => panic!("a second leader"),
                });
            });
        }
        pool().install(|| match load(0, leader) {
            Rank::Leader(mut stage) => f(&mut *stage),
            Rank::Follower(_) => panic!("rank 0 follows"),
        })
    })
}

fn job(seed: u64, loras: &[(&str, f64)]) -> Request {
    let loras = loras.iter().map(|(name, scale)| Lora { name: (*name).into(), scale: *scale }).collect();
    Request { prompt: "red heart".into(), num_inference_steps: STEPS, seed, max_sequence_length: 32, loras, ..Request::default() }
}

/// Made-up embeddings: what the text encoders give does not matter here.
fn inputs() -> Inputs {
    let config: FluxTransformerConfig = emoji().config("transformer").unwrap();
    let mut random = Random::new(9);
    let conditioning = Tensors::new()
        .with("prompt_embeds", random.tensor(&[1, 32, config.joint_attention_dim], 0.0, 1.0).unwrap())
        .with("pooled_prompt_embeds", random.tensor(&[1, config.pooled_projection_dim], 0.0, 1.0).unwrap());
    Inputs { conditioning, ..Inputs::default() }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// What each job came to, in their order: the bits of its latents, or its error.
fn draw(stage: &mut dyn Stage, jobs: &[Request]) -> Vec<Result<Vec<u32>, Error>> {
    let mut outcomes: Vec<Option<Result<Vec<u32>, Error>>> = jobs.iter().map(|_| None).collect();
    for (key, job) in jobs.iter().enumerate() {
        stage.start(key as u64, job.clone(), inputs());
    }
    let mut more = true;
    while more {
        more = stage
            .turn(&mut |event| match event {
                StageEvent::Done { key, payload } => {
                    let tensors = payload.tensors();
                    let output = tensors.find("latents").or_else(|| tensors.find("pooled_prompt_embeds")).unwrap();
                    outcomes[key as usize] = Some(Ok(bits(output)));
                }
                StageEvent::Failed { key, error, .. } => outcomes[key as usize] = Some(Err(error)),
                StageEvent::Started { .. } | StageEvent::Step { .. } => {}
            })
            .unwrap();
    }
    outcomes.into_iter().map(Option::unwrap).collect()
}

fn drawn(stage: &mut dyn Stage, jobs: &[Request]) -> Vec<Vec<u32>> {
    draw(stage, jobs).into_iter().map(Result::unwrap).collect()
}

fn four_jobs() -> [Request; 4] {
    [
        job(1, &[("pixel", 0.8)]),
        job(1, &[("outline", 1.0)]),
        job(1, &[("pixel", -0.3), ("outline", 1.2), ("words", 1.0)]),
        job(1, &[]),
    ]
}

#[test]
fn jobs_with_different_adapters_and_none_share_a_batch_and_each_draws_what_it_draws_alone_on_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    write_adapters(dir.path());
    let jobs = four_jobs();
    let alone: Vec<Vec<u32>> = with_leader(
        "transformer",
        Layout::SOLO,
        |_| sources(dir.path()),
        |stage| jobs.iter().map(|job| drawn(stage, std::slice::from_ref(job)).remove(0)).collect(),
    );
    for (i, one) in alone.iter().enumerate() {
        assert!(alone[..i].iter().all(|other| other != one), "job {i} draws something else than those before it");
    }
    let plain = with_leader("transformer", Layout::SOLO, |_| Sources::default(), |stage| drawn(stage, &jobs[3..]));
    assert_eq!(plain[0], alone[3], "without adapters nothing is changed");
    for tp in [1, 2, 4, 8] {
        for block_ranges in [1, 2, 3] {
            let layout = Layout::new(tp, block_ranges);
            let together = with_leader("transformer", layout, |_| sources(dir.path()), |stage| drawn(stage, &jobs));
            assert!(together == alone, "tp {tp}, {block_ranges} ranges");
        }
    }
}

#[test]
fn a_text_encoder_has_adapters_too_and_the_cache_of_prompts_tells_them_apart() {
    let dir = tempfile::tempdir().unwrap();
    write_adapters(dir.path());
    assert_eq!(cards(dir.path(), &["words"])[0].components, ["text_encoder"]);
    let jobs =
        [job(1, &[]), job(1, &[("words", 1.0)]), job(1, &[("words", 0.5)]), job(1, &[("pixel", 1.0)]), job(2, &[("words", 1.0)])];
    let solo = with_leader("text_encoder", Layout::SOLO, |_| sources(dir.path()), |stage| drawn(stage, &jobs));
    assert!(solo[0] != solo[1] && solo[1] != solo[2] && solo[0] != solo[2]);
    assert!(solo[3] == solo[0] && solo[4] == solo[1]);
    let cut = with_leader("text_encoder", Layout::new(2, 1), |_| sources(dir.path()), |stage| drawn(stage, &jobs));
    assert!(cut == solo);
}

#[test]
fn the_cache_drops_and_reads_again_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    write_adapters(dir.path());
    let jobs = [job(1, &[("pixel", 1.0)]), job(2, &[("outline", 1.0)])];
    let roomy = with_leader("transformer", Layout::SOLO, |_| sources(dir.path()), |stage| drawn(stage, &jobs));
    let size = |name: &str| std::fs::metadata(dir.path().join(format!("{name}.safetensors"))).unwrap().len();
    // Room for either: the factors are f32 in the file, too.
    let narrow = |_| Sources { cache_bytes: size("pixel").max(size("outline")), ..sources(dir.path()) };
    for layout in [Layout::SOLO, Layout::new(2, 2)] {
        let thrice = with_leader("transformer", layout, narrow, |stage| [0; 3].map(|_| drawn(stage, &jobs)));
        assert!(thrice.iter().all(|once| *once == roomy), "{layout:?}");
    }
    let both = job(1, &[("pixel", 1.0), ("outline", 1.0)]);
    let refused = with_leader("transformer", Layout::SOLO, narrow, |stage| draw(stage, &[both, job(1, &[])]));
    assert!(matches!(&refused[0], Err(Error::Adapter { name, reason }) if name == "outline" && reason.contains("do not fit")));
    assert!(refused[1].is_ok(), "the other job of the batch goes on");
}

#[test]
fn a_rank_that_cannot_read_the_file_fails_its_job_alone_and_the_group_goes_on() {
    let (dir, jobs) = (tempfile::tempdir().unwrap(), four_jobs());
    write_adapters(dir.path());
    let well = with_leader("transformer", Layout::SOLO, |_| sources(dir.path()), |stage| drawn(stage, &jobs));
    let broken = |rank: usize, bad: usize, change: &dyn Fn(&mut Source)| {
        let mut sources = sources(dir.path());
        if rank == bad {
            change(&mut sources.named[0]);
        }
        sources
    };
    let gone = |source: &mut Source| source.path = PathBuf::from("/nowhere/pixel.safetensors");
    let other = |source: &mut Source| source.digest = "00".repeat(32);
    let layout = Layout::new(2, 2);
    type Change<'a> = &'a (dyn Fn(&mut Source) + Sync);
    let changes: [(usize, Change<'_>, &str); 4] = [
        (0, &gone, "could not be read"),
        (1, &gone, "could not be read"),
        (2, &other, "sha256"),
        (3, &gone, "could not be read"),
    ];
    for (bad, change, told) in changes {
        let outcomes = with_leader(
            "transformer",
            layout,
            |rank| broken(rank, bad, &|s| change(s)),
            |stage| {
                let first = draw(stage, &jobs);
                // Again, to show that the group lives on.
                (first, draw(stage, &jobs[3..]))
            },
        );
        for (i, outcome) in outcomes.0.iter().enumerate() {
            match outcome {
                Ok(latents) => assert!([1, 3].contains(&i) && *latents == well[i], "rank {bad}, job {i}"),
                Err(Error::Adapter { name, reason }) => {
                    assert!([0, 2].contains(&i) && name == "pixel" && reason.contains(told), "rank {bad}, job {i}: {reason}");
                }
                Err(error) => panic!("rank {bad}, job {i}: {error}"),
            }
        }
        assert_eq!(*outcomes.1[0].as_ref().unwrap(), well[3], "rank {bad}");
    }
}

#[test]
fn an_adapter_nobody_registered_fails_its_job() {
    let outcomes =
        with_leader("transformer", Layout::SOLO, |_| Sources::default(), |stage| draw(stage, &[job(1, &[("x", 1.0)])]));
    assert!(matches!(&outcomes[0], Err(Error::Adapter { name, .. }) if name == "x"));
}

#[test]
fn an_adapter_may_bring_defaults_that_its_model_takes() {
    let dir = tempfile::tempdir().unwrap();
    write_adapters(dir.path());
    let with = |defaults: &[(&str, f64)]| {
        let defaults = defaults.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let registered = Registered { name: "pixel".into(), path: dir.path().join("pixel.safetensors"), defaults };
        let model = emoji();
        describe(&model, &registry::describe(&model).unwrap(), &[registered]).unwrap().remove(0)
    };
    std::fs::write(dir.path().join("atelier.json"), r#"{"num_inference_steps": 8, "true_cfg_scale": 1}"#).unwrap();
    let card = with(&[("true_cfg_scale", 2.0)]);
    assert_eq!(card.problem, "");
    assert_eq!(card.defaults, [("num_inference_steps".to_owned(), 8.0), ("true_cfg_scale".to_owned(), 2.0)].into());
    for (name, value) in [("width", 64.0), ("num_inference_steps", 0.0), ("num_inference_steps", 2.5), ("shift", 3.0)] {
        let problem = with(&[(name, value)]).problem;
        assert!(problem.contains(&format!("`{name}`")), "{name} = {value}: {problem}");
    }
}
