//! Stories of groups that are silent: some hang, some only work for long.

use proto::v1::{Control, JobSpec, Lora, RunTask, TaskProgress};

use super::{tests::*, *};

/// Far longer than five steps of those told here, and less than a group may take of which nothing is known.
const LONG: Millis = 10 * 60 * 1000;

type Change = fn(&mut JobSpec);

fn progress(cluster: &mut Cluster, (worker, task): &(String, RunTask), step: u32, steps: u32) {
    cluster.report(worker, Report::TaskProgress(TaskProgress { task: task.task.clone(), step, steps, saved_step: 0 }));
}

fn lost(cluster: &Cluster) -> Vec<&str> {
    let lost = cluster.effects.iter().filter_map(|effect| match effect {
        Effect::GroupLost { group_id, .. } => Some(group_id.as_str()),
        _ => None,
    });
    lost.collect()
}

fn new_tasks(cluster: &mut Cluster) -> Vec<(String, RunTask)> {
    cluster.new_job();
    cluster.tasks()
}

/// A stage without steps, from beginning to end in a millisecond.
fn do_at_once(cluster: &mut Cluster, task: &(String, RunTask)) {
    cluster.start(task);
    cluster.tick(1);
    progress(cluster, task, 1, 1);
    cluster.finish(task);
}

#[test]
fn a_new_prompt_may_take_long_after_many_that_were_known() {
    let mut cluster = Cluster::ready();
    for _ in 0..20 {
        let tasks = new_tasks(&mut cluster);
        for id in ["encode_text", "denoise", "decode"] {
            do_at_once(&mut cluster, stage(&tasks, id));
        }
    }
    let tasks = new_tasks(&mut cluster);
    cluster.start(stage(&tasks, "encode_text"));
    cluster.tick(LONG);
    assert!(lost(&cluster).is_empty(), "{:?}", lost(&cluster));
    cluster.tick(2 * LONG + 1);
    assert_eq!(lost(&cluster), ["emoji/text_encoder/0"], "but not for ever");
}

/// A job that denoises, and made two steps of a tenth of a second.
fn quick() -> (Cluster, Vec<(String, RunTask)>) {
    let mut cluster = Cluster::ready();
    let tasks = new_tasks(&mut cluster);
    do_at_once(&mut cluster, stage(&tasks, "encode_text"));
    cluster.start(stage(&tasks, "denoise"));
    for step in 1..=2 {
        cluster.tick(100);
        progress(&mut cluster, stage(&tasks, "denoise"), step, 4);
    }
    (cluster, tasks)
}

#[test]
fn the_first_step_of_a_job_unlike_the_one_before_may_take_long() {
    let plain = |_: &mut JobSpec| {};
    let adapted = |spec: &mut JobSpec| spec.loras = vec![Lora { name: "pixel".into(), scale: None }];
    let controlled = |spec: &mut JobSpec| spec.controls = vec![Control::default(); 2];
    let of_pictures = |spec: &mut JobSpec| spec.more_image_blob_ids = vec!["a".repeat(64); 3];
    let kinds: [(Change, bool); 4] = [(plain, false), (adapted, true), (controlled, true), (of_pictures, true)];
    for (index, (change, is_patient)) in kinds.into_iter().enumerate() {
        let (mut cluster, _) = quick();
        let tasks = new_tasks(&mut cluster);
        do_at_once(&mut cluster, stage(&tasks, "encode_text"));
        let number = cluster.state.jobs.by_id("job2").unwrap().number;
        change(&mut cluster.state.jobs.get_mut(number).unwrap().spec);
        cluster.start(stage(&tasks, "denoise"));
        cluster.tick(LONG);
        assert_eq!(lost(&cluster).is_empty(), is_patient, "kind {index}");
        cluster.tick(100);
        progress(&mut cluster, stage(&tasks, "denoise"), 1, 4);
        cluster.tick(2 * LONG);
        assert_eq!(lost(&cluster).len(), usize::from(!is_patient), "as slow as its last step may its next be: kind {index}");
    }
}

#[test]
fn an_output_that_is_handed_on_for_long_does_not_end_a_group_and_teaches_nothing() {
    let (mut cluster, tasks) = quick();
    let usual = cluster.state.groups["emoji/transformer/0"].pace;
    cluster.tick(100);
    progress(&mut cluster, stage(&tasks, "denoise"), 4, 4);
    cluster.tick(LONG);
    assert!(lost(&cluster).is_empty());
    cluster.finish(stage(&tasks, "denoise"));
    let tasks = new_tasks(&mut cluster);
    do_at_once(&mut cluster, stage(&tasks, "encode_text"));
    cluster.start(stage(&tasks, "denoise"));
    cluster.tick(5001);
    assert_eq!(lost(&cluster), ["emoji/transformer/0"], "it is as quick as it was: {usual:?}");
}

#[test]
fn jobs_that_step_together_do_not_make_a_step_seem_short() {
    let mut cluster = Cluster::ready();
    let jobs = [(); 2].map(|()| new_tasks(&mut cluster));
    for tasks in &jobs {
        do_at_once(&mut cluster, stage(tasks, "encode_text"));
        cluster.start(stage(tasks, "denoise"));
    }
    for step in 1..=10 {
        cluster.tick(8000);
        for tasks in &jobs {
            cluster.now += 1;
            progress(&mut cluster, stage(tasks, "denoise"), step, 20);
        }
    }
    cluster.tick(39_000);
    assert!(lost(&cluster).is_empty());
    cluster.tick(3_000);
    assert_eq!(lost(&cluster), ["emoji/transformer/0"]);
}
