//! What jobs need of the store of pictures, and who makes room in it.

use proto::v1::{ImageResult, JobState, TaskDone};

use super::{
    tests::{Cluster, reference},
    *,
};
use crate::error::Error;

/// Two pictures of [`PICTURE`] bytes are kept, and there is room for a third.
const LIMITS: fn() -> Limits = || Limits { blob_bytes: 100_000, total_blob_bytes: 480_000, ..Limits::default() };
const PICTURE: u64 = 100_000;

/// A job that has made a picture of [`PICTURE`] bytes, and the picture's id.
fn drawn(cluster: &mut Cluster) -> (String, String) {
    let job = cluster.new_job();
    let blob_id = format!("{:0>64}", job.trim_start_matches("job"));
    for (worker, task) in cluster.tasks().iter().rev() {
        let image = ImageResult { blob_id: blob_id.clone(), byte_size: PICTURE, ..ImageResult::default() };
        let images = if task.outputs.is_empty() { vec![image] } else { vec![] };
        let done = TaskDone { task: Some(reference(task).clone()), seconds: 0.5, images, stored: false };
        cluster.report(worker, Report::TaskDone(done));
    }
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
    (job, blob_id)
}

fn kept(cluster: &Cluster) -> Vec<String> {
    cluster.state.blobs_in_use().into_iter().collect()
}

#[test]
fn a_job_needs_its_inputs_until_it_is_over_and_no_longer() {
    for ends in ["cancelled", "failed"] {
        let mut cluster = Cluster::ready();
        let mut submission = cluster.submission();
        submission.spec.image_blob_id = "1".repeat(64);
        submission.spec.strength = Some(0.5);
        // What the card takes is not what this is about.
        let card = cluster.state.models[0].card.as_mut().unwrap();
        let parameter = |name: &str, maximum| v1::Parameter { name: name.into(), maximum, ..v1::Parameter::default() };
        card.parameters.extend([parameter("image_blob_id", 0.0), parameter("strength", 1.0)]);
        let job = cluster.submit(submission).unwrap().id;
        assert_eq!(cluster.state.blobs_in_use(), ["1".repeat(64)].into());
        let tasks = cluster.tasks();
        match ends {
            "cancelled" => {
                cluster.cancel(&job);
                cluster.tick(CANCEL_DEADLINE);
            }
            _ => cluster.fail(&tasks[0], "INTERNAL"),
        }
        assert!(cluster.job(&job).finish_time.is_some());
        assert!(cluster.state.blobs_in_use().is_empty(), "{ends}");
    }
}

#[test]
fn pictures_beyond_what_may_be_kept_go_the_oldest_first_and_jobs_and_request_ids_stay() {
    let mut cluster = Cluster::with(|_| {}, LIMITS()).made_ready();
    let drawn = [(); 4].map(|()| drawn(&mut cluster));
    assert_eq!(kept(&cluster), [drawn[2].1.clone(), drawn[3].1.clone()]);
    let dropped: Vec<bool> = drawn.iter().map(|(job, _)| cluster.job(job).pictures_dropped).collect();
    assert_eq!(dropped, [true, true, false, false]);
    let first = cluster.job(&drawn[0].0);
    assert_eq!((first.state(), first.images.len()), (JobState::Succeeded, 1), "how it ended can still be asked for");
    let again = Submission { request_id: first.request_id, job_id: "again".into(), ..cluster.submission() };
    assert_eq!(cluster.submit(again).unwrap().id, first.id, "no second job for the same request");
    // What was given up is written down.
    cluster.state.settings.limits.total_blob_bytes *= 10;
    cluster.restart(SavedSteps::new());
    cluster.tick(1);
    assert_eq!(kept(&cluster), [drawn[2].1.clone(), drawn[3].1.clone()]);
    assert_eq!(cluster.state.jobs.result_bytes(), 2 * PICTURE);
}

#[test]
fn a_store_that_became_smaller_gives_up_the_oldest_pictures_and_the_newest_stay() {
    let mut cluster = Cluster::with(|_| {}, LIMITS()).made_ready();
    let drawn = [(); 2].map(|()| drawn(&mut cluster));
    assert_eq!(kept(&cluster).len(), 2);
    cluster.state.settings.limits.total_blob_bytes = PICTURE;
    cluster.restart(SavedSteps::new());
    cluster.tick(1);
    assert_eq!(kept(&cluster), [drawn[1].1.clone()], "its client has not read it yet");
    assert!(cluster.job(&drawn[0].0).pictures_dropped);
    assert_eq!(cluster.state.jobs.result_bytes(), PICTURE);
}

#[test]
fn a_forgotten_jobs_pictures_are_counted_no_more() {
    let mut cluster = Cluster::with(|_| {}, Limits { finished_job_age: 60_000, ..LIMITS() }).made_ready();
    drawn(&mut cluster);
    assert_eq!(cluster.state.jobs.result_bytes(), PICTURE);
    cluster.tick(60_000);
    assert_eq!((cluster.state.jobs.result_bytes(), kept(&cluster).len()), (0, 0));
}

#[test]
fn a_job_is_refused_when_its_pictures_would_find_no_room() {
    let mut cluster = Cluster::with(|_| {}, LIMITS()).made_ready();
    let full = Submission { blob_bytes: 450_000, ..cluster.submission() };
    assert!(matches!(cluster.submit(full.clone()), Err(Error::BlobStoreFull(480_000))));
    assert!(cluster.submit(Submission { blob_bytes: 350_000, ..full }).is_ok());
    let mut ten = cluster.submission();
    ten.spec.num_images_per_prompt = Some(10);
    let card = cluster.state.models[0].card.as_mut().unwrap();
    card.parameters.push(v1::Parameter {
        name: "num_images_per_prompt".into(),
        minimum: 1.0,
        maximum: 10.0,
        default_value: Some(1.0),
        ..v1::Parameter::default()
    });
    let Err(Error::InvalidRequest(wrong)) = cluster.submit(ten) else { panic!("ten never fit") };
    assert_eq!(wrong[0].field, "spec");
    assert!(wrong[0].problem.contains("the store of pictures has 270000 for them"), "{}", wrong[0].problem);
}

#[test]
fn a_picture_that_the_model_looks_at_is_work_and_takes_no_room_among_the_results() {
    let mut cluster = Cluster::with(|_| {}, Limits::default()).made_ready();
    let card = cluster.state.models[0].card.as_mut().unwrap();
    card.pixels_per_image = 1000;
    let field = |name: &str| v1::Parameter { name: name.into(), ..v1::Parameter::default() };
    card.parameters.extend(["image_blob_id", "more_image_blob_ids"].map(field));
    let mut submission = cluster.submission();
    submission.spec.image_blob_id = "a".repeat(64);
    submission.spec.more_image_blob_ids = vec!["b".repeat(64); 2];
    let with = cluster.submit(submission).unwrap().id;
    let without = cluster.new_job();
    let of = |cluster: &Cluster, id: &str| {
        let job = cluster.state.jobs.by_id(id).unwrap();
        (job.pixels(), estimate::pixel_steps(job), estimate::picture_bytes(job, u64::MAX))
    };
    let (drawn, steps, bytes) = of(&cluster, &without);
    assert_eq!(of(&cluster, &with), (drawn + 3000, steps + 4 * 3000, bytes));
    cluster.restart(SavedSteps::new());
    assert_eq!(of(&cluster, &with), (drawn + 3000, steps + 4 * 3000, bytes), "and so after a restart, before the card is known");
}
