//! Adapters on their way: to the worker that checks them, to the ranks that may need them, into tasks.

use proto::v1::{Adapter, GroupReady, HeldRank, JoinGroup, Lora, ModelCard, ModelDescribed, model_described::Outcome};

use super::tests::Cluster;
use super::*;
use crate::{models_file::AdapterConfig, testing};

/// Two workers, and a model with an adapter that is well and one that is not.
fn adapted(digest: &str) -> Cluster {
    let config =
        |name: &str| AdapterConfig { name: name.into(), path: format!("/loras/{name}").into(), defaults: BTreeMap::new() };
    let change = |model: &mut ModelConfig| model.adapters = vec![config("pixel"), config("torn")];
    let mut cluster = Cluster::with(change, Limits::default());
    cluster.join("w1");
    cluster.join("w2");
    describe(&mut cluster, digest);
    cluster
}

fn describe(cluster: &mut Cluster, digest: &str) {
    let components = vec!["transformer".to_owned()];
    let pixel = Adapter { name: "pixel".into(), digest: digest.into(), components, ..Adapter::default() };
    let torn = Adapter { name: "torn".into(), problem: "it is truncated".into(), ..Adapter::default() };
    let card = ModelCard { adapters: vec![pixel, torn], ..testing::card("emoji") };
    let described = ModelDescribed { model: "emoji".into(), outcome: Some(Outcome::Card(card)) };
    cluster.report("w1", Report::ModelDescribed(described));
}

/// Every rank that was asked to join says that it is ready.
pub(super) fn ready(cluster: &mut Cluster, joins: Vec<(String, JoinGroup)>) {
    for (worker, JoinGroup { group_id, epoch, rank, .. }) in joins {
        cluster.report(&worker, Report::GroupReady(GroupReady { group_id, epoch, rank }));
    }
}

/// The coordinator is another, and the workers hold what they held.
pub(super) fn restart_holding(cluster: &mut Cluster, joins: &[(String, JoinGroup)]) {
    cluster.restart(SavedSteps::new());
    for worker in ["w1", "w2"] {
        let mine = joins.iter().filter(|(member, _)| member == worker);
        let ranks = mine.map(|(_, join)| HeldRank { join: Some(join.clone()), ready: true }).collect();
        cluster.join_holding(worker, Holding { ranks, ..Holding::default() });
    }
}

#[test]
fn ranks_are_told_of_the_adapters_that_are_well_and_tasks_name_their_digests() {
    let mut cluster = adapted("ab");
    let asked = cluster.sent.iter().find_map(|(_, command)| match command {
        Command::DescribeModel(ask) => Some(ask.adapters.iter().map(|file| file.path.clone()).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(asked.unwrap(), ["/loras/pixel", "/loras/torn"]);
    let joins = cluster.joins();
    for (_, join) in &joins {
        let known: Vec<_> = join.adapters.iter().map(|file| (file.name.as_str(), file.digest.as_str())).collect();
        assert_eq!(known, [("pixel", "ab")], "{}", join.group_id);
    }
    ready(&mut cluster, joins);
    let mut submission = cluster.submission();
    submission.spec.loras = vec![Lora { name: "pixel".into(), scale: None }];
    cluster.submit(submission).unwrap();
    let tasks = cluster.tasks();
    assert!(!tasks.is_empty() && tasks.iter().all(|(_, task)| task.adapter_digests == ["ab"]));
}

#[test]
fn a_group_that_holds_another_adapter_of_the_name_does_not_go_on() {
    for (digest, goes_on) in [("ab", true), ("cd", false)] {
        let mut cluster = adapted("ab");
        let joins = cluster.joins();
        ready(&mut cluster, joins.clone());
        let epoch = cluster.epoch("emoji/transformer/0");
        restart_holding(&mut cluster, &joins);
        describe(&mut cluster, digest);
        cluster.tick(SETTLE);
        assert_eq!(cluster.epoch("emoji/transformer/0") == epoch, goes_on, "{digest}");
    }
}
