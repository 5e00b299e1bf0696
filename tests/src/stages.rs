//! Stages as workers run them, on ranks that are threads of the test.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use models::blocks::{Layout, RankGroup};
use models::control::ControlSource;
use models::lora::store::Sources;
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::stage::{Inputs, Stage, StageEvent};
use models::{Payload, Request};
use parallel::ops::Products;
use parallel::{Device, InProcess, Tensor};
use sha2::{Digest, Sha256};

/// Runs `f` with the leader of a component's group, whose ranks are threads with `threads` of computation each; every rank multiplies as
/// the thread that calls this does.
///
/// # Panics
/// When the component cannot be loaded so.
pub fn with_leader<T: Send>(
    dir: &Path,
    component: &str,
    layout: Layout,
    threads: usize,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    with_leader_within(Limits::default(), dir, component, layout, threads, f)
}

/// The same with limits of its own.
///
/// # Panics
/// As [`with_leader`].
pub fn with_leader_within<T: Send>(
    limits: Limits,
    dir: &Path,
    component: &str,
    layout: Layout,
    threads: usize,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    with_leader_holding(&[], limits, dir, component, layout, threads, f)
}

/// The same with control networks that jobs may name.
///
/// # Panics
/// As [`with_leader`].
pub fn with_leader_holding<T: Send>(
    controls: &[ControlSource],
    limits: Limits,
    dir: &Path,
    component: &str,
    layout: Layout,
    threads: usize,
    f: impl FnOnce(&mut dyn Stage) -> T + Send,
) -> T {
    let dir = &ModelDir::open(dir).expect("a model's directory");
    let load = move |link: InProcess| {
        let group = RankGroup::new(Arc::new(link), layout).expect("a group");
        let spec = LoadSpec { dir, component, group, device: Device::Cpu, limits };
        registry::load_with(spec, Sources::default(), controls, &mut |_| ()).expect("a rank loads")
    };
    // A pool for each rank: ranks wait for each other.
    let pool = || rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let products = Products::here();
    thread::scope(|scope| {
        let mut links = InProcess::group(layout.ranks()).into_iter();
        let leader = links.next().expect("at least one rank");
        for link in links {
            scope.spawn(move || {
                pool().install(|| {
                    products.scope(|| match load(link) {
                        Rank::Follower(follower) => drop(follower.run()),
                        Rank::Leader(_) => panic!("a second leader"),
                    });
                });
            });
        }
        pool().install(|| {
            products.scope(|| match load(leader) {
                Rank::Leader(mut stage) => f(&mut *stage),
                Rank::Follower(_) => panic!("rank 0 follows"),
            })
        })
    })
}

/// Runs the given jobs to their end; gives their payloads in the order of the keys, and the latents of the job `watched` after
/// each of its steps, as digests.
///
/// # Panics
/// When a job fails.
pub fn drain(stage: &mut dyn Stage, jobs: Vec<(u64, Request, Inputs)>, watched: u64) -> (Vec<Payload>, Vec<String>) {
    let (mut payloads, mut steps) = (Vec::new(), Vec::new());
    jobs.into_iter().for_each(|(key, request, inputs)| stage.start(key, request, inputs));
    let mut more = true;
    while more {
        let turn = stage.turn(&mut |event| match event {
            StageEvent::Step { key, state: Some(state), .. } if key == watched => steps.push(sha256(&state.latents)),
            StageEvent::Done { key, payload } => payloads.push((key, payload)),
            StageEvent::Failed { key, error, .. } => panic!("job {key}: {error}"),
            _ => {}
        });
        more = turn.expect("the group goes on");
    }
    payloads.sort_by_key(|(key, _)| *key);
    (payloads.into_iter().map(|(_, payload)| payload).collect(), steps)
}

/// The beginning of the digest of a tensor's elements.
///
/// # Panics
/// When they are not f32.
pub fn sha256(tensor: &Tensor) -> String {
    let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Sha256::digest(bytes).iter().take(8).map(|b| format!("{b:02x}")).collect()
}
