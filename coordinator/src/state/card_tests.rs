//! A model whose files are not the same on all workers, described first by the one that has others.

use proto::v1::{GroupLost, JobState, JoinGroup, ModelCard, ModelDescribed, model_described::Outcome};

use super::{tests::*, *};
use crate::testing;

/// The card that a worker of such files reads.
fn card(files: &str) -> ModelCard {
    let mut card = testing::card("emoji");
    card.components.iter_mut().for_each(|component| component.fingerprint = files.into());
    card
}

/// Who was asked to describe the model since the last time.
fn asked(cluster: &mut Cluster) -> Vec<String> {
    let mut asked = vec![];
    cluster.sent.retain(|(worker, command)| match command {
        Command::DescribeModel(_) => {
            asked.push(worker.clone());
            false
        }
        _ => true,
    });
    asked
}

fn describe(cluster: &mut Cluster, worker: &str, files: &str) {
    let outcome = Some(Outcome::Card(card(files)));
    cluster.report(worker, Report::ModelDescribed(ModelDescribed { model: "emoji".into(), outcome }));
}

/// Each worker that was asked to join is ready if its files are those that were described, and says that it cannot load otherwise.
fn load(cluster: &mut Cluster, odd: &str) {
    for (worker, join) in cluster.joins() {
        let JoinGroup { group_id, epoch, rank, fingerprint, .. } = join;
        let own = if worker == odd { "odd" } else { "good" };
        let report = if fingerprint == own {
            Report::GroupReady(proto::v1::GroupReady { group_id, epoch, rank })
        } else {
            let (reason, message) = ("LOAD_FAILED".into(), "another weight".into());
            Report::GroupLost(GroupLost { group_id, epoch, rank, reason, message })
        };
        cluster.report(&worker, report);
    }
}

/// Four workers, of which the first one, which describes the model, has other files than the others.
fn described_by_the_odd_one() -> (Cluster, String) {
    let mut cluster = Cluster::new();
    for worker in ["w1", "w2", "w3", "w4"] {
        cluster.join(worker);
    }
    assert_eq!(asked(&mut cluster), ["w1"]);
    describe(&mut cluster, "w1", "odd");
    let job = cluster.new_job();
    (cluster, job)
}

/// Time passes until somebody is asked to describe the model.
fn until_asked(cluster: &mut Cluster) -> String {
    for _ in 0..100 {
        load(cluster, "w1");
        if let Some(worker) = asked(cluster).pop() {
            return worker;
        }
        cluster.tick(1000);
    }
    panic!("nobody is asked: {}", cluster.state.models()[0].problem);
}

#[test]
fn a_model_that_nobody_can_load_as_it_was_described_is_described_by_another() {
    let (mut cluster, job) = described_by_the_odd_one();
    assert_eq!(until_asked(&mut cluster), "w2", "another than who described it");
    let waiting = cluster.new_job();
    let epochs: BTreeMap<String, u64> = cluster.state.groups.iter().map(|(id, group)| (id.clone(), group.epoch)).collect();
    describe(&mut cluster, "w2", "good");
    for _ in 0..100 {
        load(&mut cluster, "w1");
        cluster.tick(1000);
    }
    let model = &cluster.state.models()[0];
    assert!(model.ready, "{}", model.problem);
    assert!(cluster.state.groups.iter().all(|(id, group)| group.epoch > epochs[id]), "no epoch comes twice");
    assert_eq!(cluster.state.groups.values().count(), 3);
    for job in [job, waiting] {
        for task in cluster.tasks().iter().rev() {
            cluster.start(task);
            cluster.finish(task);
        }
        assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
    }
}

#[test]
fn a_card_that_says_nothing_new_or_does_not_fit_changes_nothing_and_the_next_worker_is_asked() {
    let (mut cluster, _) = described_by_the_odd_one();
    assert_eq!(until_asked(&mut cluster), "w2");
    let groups = |cluster: &Cluster| cluster.state.groups.iter().map(|(id, g)| (id.clone(), g.epoch)).collect::<Vec<_>>();
    let before = groups(&cluster);
    let alike = ModelCard { digest: "e".repeat(64), ..card("odd") };
    let described = ModelDescribed { model: "emoji".into(), outcome: Some(Outcome::Card(alike)) };
    cluster.report("w2", Report::ModelDescribed(described));
    assert_eq!(groups(&cluster), before);
    assert_eq!(until_asked(&mut cluster), "w3");
    let unfit = ModelCard { stages: vec![], ..card("good") };
    let described = ModelDescribed { model: "emoji".into(), outcome: Some(Outcome::Card(unfit)) };
    cluster.report("w3", Report::ModelDescribed(described));
    assert!(!cluster.state.models()[0].card.as_ref().unwrap().stages.is_empty());
    assert_eq!(until_asked(&mut cluster), "w4");
    let described = ModelDescribed { model: "emoji".into(), outcome: Some(Outcome::Error("it cannot read".into())) };
    cluster.report("w4", Report::ModelDescribed(described));
    cluster.new_job();
}
