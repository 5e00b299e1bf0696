//! models.toml says what a model is multiplied in, and may say another way when the next coordinator reads it: no picture is computed
//! partly in one way and partly in another.

use proto::v1::{Holding, JobState, Products, RunTask};

use super::{durable_tests::*, tests::*, *};
use crate::checkpoints::Saved;

/// As [`Cluster::restart`], by a coordinator whose models.toml says `products`.
fn restart_in(cluster: &mut Cluster, products: Products, saved: SavedSteps) {
    cluster.state.settings.models[0].products = products;
    cluster.restart(saved);
}

/// The job runs to its end as try `attempt`, and the denoising begins at `step`. Gives its other stages.
fn ends_well(cluster: &mut Cluster, job: &str, attempt: u32, step: u32) -> Vec<String> {
    let tasks = cluster.tasks();
    let denoise = &stage(&tasks, "denoise").1;
    assert_eq!((denoise.resume_step, reference(denoise).attempt), (step, attempt));
    for task in tasks.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    assert_eq!(cluster.job(job).state(), JobState::Succeeded);
    let stages = tasks.iter().map(|(_, task)| reference(task).stage.clone()).filter(|stage| stage != "denoise");
    let mut stages: Vec<String> = stages.collect();
    stages.sort();
    stages
}

/// What the workers hold of the job that is in the middle of its denoising.
fn held(cluster: &Cluster, tasks: &[(String, RunTask)]) -> BTreeMap<String, Holding> {
    let (denoise, decode) = (stage(tasks, "denoise").clone(), stage(tasks, "decode").clone());
    holdings(cluster, &[(denoise.0, denoise.1, true), (decode.0, decode.1, false)])
}

fn come_back(cluster: &mut Cluster, mut holdings: BTreeMap<String, Holding>) {
    for worker in ["w1", "w2", "w3"] {
        cluster.join_holding(worker, holdings.remove(worker).unwrap_or_default());
    }
    cluster.describe("w1");
    cluster.tick(SETTLE);
}

#[test]
fn workers_are_told_what_to_multiply_in_and_the_job_says_it() {
    let mut cluster = Cluster::with(|model| model.products = Products::Int8, Limits::default());
    cluster.join("w1");
    cluster.join("w2");
    cluster.describe("w1");
    let joins = cluster.joins();
    assert!(joins.len() == 4 && joins.iter().all(|(_, join)| join.products() == Products::Int8), "{joins:?}");
    assert_eq!(cluster.state.models()[0].products(), Products::Int8);
    let job = cluster.new_job();
    assert_eq!((cluster.job(&job).products(), cluster.records[&job].products()), (Products::Int8, Products::Int8));
}

#[test]
fn a_job_goes_on_from_its_checkpoint_in_the_way_it_began() {
    let (mut cluster, job, _) = denoising();
    cluster.restart(saved(&job, &[("encode_text", 0), ("denoise", 2)]));
    come_back(&mut cluster, BTreeMap::new());
    cluster.all_ready();
    assert_eq!(ends_well(&mut cluster, &job, 2, 2), ["decode"]);
    assert_eq!(cluster.job(&job).products(), Products::F32);
}

#[test]
fn a_job_begins_anew_where_its_model_is_multiplied_in_another_way() {
    let (mut cluster, job, _) = denoising();
    restart_in(&mut cluster, Products::Bf16, saved(&job, &[("encode_text", 0), ("denoise", 2)]));
    come_back(&mut cluster, BTreeMap::new());
    cluster.all_ready();
    let waited = cluster.state.events_after(&job, 0).unwrap().events.into_iter().find_map(|event| match event.kind {
        Some(proto::v1::job_event::Kind::Requeued(requeued)) => Some(requeued.message),
        _ => None,
    });
    let expected = "a new coordinator leads, and what was done of it in another way than bf16 is not used";
    assert_eq!(waited.as_deref(), Some(expected));
    assert_eq!(ends_well(&mut cluster, &job, 2, 0), ["decode", "encode_text"]);
    assert_eq!((cluster.job(&job).products(), cluster.records[&job].products()), (Products::Bf16, Products::Bf16));
}

#[test]
fn a_job_of_which_something_was_done_in_each_way_goes_on_with_what_was_done_in_its_own() {
    let (mut cluster, job, _) = denoising();
    let mut saved = saved(&job, &[("denoise", 3)]);
    let narrow = |stage: &str, step| Saved { stage: stage.to_owned(), step, products: Products::Bf16 };
    saved.get_mut(&job).unwrap().extend([narrow("encode_text", 0), narrow("denoise", 1)]);
    restart_in(&mut cluster, Products::Bf16, saved);
    come_back(&mut cluster, BTreeMap::new());
    cluster.all_ready();
    assert_eq!(ends_well(&mut cluster, &job, 2, 1), ["decode"]);
}

#[test]
fn what_an_older_program_left_is_not_used_since_it_did_not_say_its_way() {
    let (mut cluster, job, _) = denoising();
    cluster.records.get_mut(&job).unwrap().products = Products::Unspecified.into();
    let mut saved = saved(&job, &[("encode_text", 0), ("denoise", 2)]);
    saved.get_mut(&job).unwrap().iter_mut().for_each(|saved| saved.products = Products::Unspecified);
    cluster.restart(saved);
    come_back(&mut cluster, BTreeMap::new());
    cluster.all_ready();
    assert_eq!(ends_well(&mut cluster, &job, 2, 0), ["decode", "encode_text"]);
}

#[test]
fn a_standing_group_goes_on_only_in_the_way_that_models_toml_says() {
    for (way, goes_on) in [(Products::F32, true), (Products::Amx, false)] {
        let (mut cluster, job, tasks) = denoising();
        let held = held(&cluster, &tasks);
        let before = cluster.epoch("emoji/transformer/0");
        restart_in(&mut cluster, way, saved(&job, &[("encode_text", 0), ("denoise", 2)]));
        come_back(&mut cluster, held);
        assert_eq!(cluster.epoch("emoji/transformer/0") == before, goes_on, "{way}");
        assert_eq!(cluster.cancels().is_empty(), goes_on, "{way}: its tasks are given up with it");
        if !goes_on {
            let joins = cluster.joins();
            assert!(joins.len() == 4 && joins.iter().all(|(_, join)| join.products() == way), "{joins:?}");
        }
    }
}

#[test]
fn a_job_that_is_over_says_what_it_was_multiplied_in() {
    let (mut cluster, job, tasks) = denoising();
    for task in ["denoise", "decode"] {
        cluster.start(stage(&tasks, task));
        cluster.finish(stage(&tasks, task));
    }
    restart_in(&mut cluster, Products::Bf16, SavedSteps::new());
    let over = cluster.job(&job);
    assert_eq!((over.state(), over.products()), (JobState::Succeeded, Products::F32));
}

#[test]
fn a_group_waits_for_workers_that_can_and_says_so() {
    let mut cluster = Cluster::with(|model| model.products = Products::Amx, Limits::default());
    for worker in ["w1", "w2"] {
        let registration = Registration { products: vec![Products::F32.into()], ..crate::testing::worker(worker, "any") };
        cluster.apply(Event::WorkerJoined { worker: registration, holding: Holding::default() });
    }
    cluster.describe("w1");
    assert!(cluster.joins().is_empty());
    let problem = cluster.state.models()[0].problem.clone();
    assert!(problem.ends_with("that can multiply in amx, 0 are free"), "{problem}");
    cluster.join("w3");
    cluster.join("w4");
    let joins = cluster.joins();
    assert!(joins.len() == 4 && joins.iter().all(|(worker, _)| worker == "w3" || worker == "w4"), "{joins:?}");
}
