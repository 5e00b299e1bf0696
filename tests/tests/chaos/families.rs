//! A rank of each family is killed at each of its steps.

use std::path::Path;

use proto::v1::JobSpec;
use proto::v1::job_event::Kind;
use tests::cluster::Cluster;

use crate::{denoise_step, long, longest_gap, row, sha256};

/// The families' recorded pipelines, the schedule that each is by, and a picture's side: large enough that a step of a tiny model
/// is still under way when its rank is killed.
const FAMILIES: [(&str, &str, u32); 3] = [
    ("flux_dev_txt2img", "FLUX.1: flow match, shift by the picture's size", 192),
    ("sd3_txt2img", "SD3: flow match, fixed shift, guidance by two passes", 96),
    ("qwen_txt2img", "Qwen-Image: flow match, terminal shift, true guidance", 192),
];
const STEPS: u32 = 6;

fn models(family: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(family).join("pipeline");
    format!("[[model]]\nname = \"{family}\"\npath = {path:?}\n[model.components.transformer]\ntp = 2\n")
}

fn spec(family: &str, side: u32) -> JobSpec {
    JobSpec {
        model: family.into(),
        prompt: "a red fox".into(),
        negative_prompt: (family != "flux_dev_txt2img").then(|| "blurry".into()),
        width: Some(side),
        height: Some(side),
        num_inference_steps: Some(STEPS),
        seed: Some(7),
        ..JobSpec::default()
    }
}

#[tokio::test]
async fn a_rank_killed_at_each_step_of_each_schedule_leaves_the_picture_as_it_is() {
    let rounds = if long() { 10 } else { 1 };
    for (family, schedule, side) in FAMILIES {
        let mut cluster = Cluster::start(&models(family), &["", "", ""], None);
        let mut client = cluster.ready().await;
        let undisturbed = sha256(&client.run(spec(family, side)).await);
        let (mut gaps, mut again, mut kills) = (vec![], 0, 0);
        // 0: while the text is encoded; STEPS: between the last step and the picture.
        for step in (0..=STEPS).cycle().take(rounds * (STEPS as usize + 1)) {
            let job = client.create(spec(family, side)).await.unwrap().id;
            let reached = |event: &proto::v1::JobEvent| match &event.kind {
                Some(Kind::StageStarted(_)) => step == 0,
                _ => denoise_step(event).is_some_and(|at| at >= step),
            };
            client.watch(&job, 0, reached).await;
            cluster.workers.remove(kills % cluster.workers.len()).kill();
            cluster.add_worker("");
            kills += 1;
            gaps.push(longest_gap(&client.follow(&job, 0).await));
            let job = client.finish(&job).await;
            assert_eq!(sha256(&job), undisturbed, "{family}: killed at step {step}");
            again += u32::from(job.attempt > 1);
        }
        assert!(again > 0, "{family}: no kill came in time");
        row(schedule, kills);
        row("  killed, all the same bytes; jobs that went on elsewhere", again);
        row("  longest time without news of a job, loading included (ms)", gaps.iter().max().unwrap());
    }
}
