//! Control networks on their way: to the worker that checks them, to the denoiser's ranks, into tasks.

use proto::v1::{Control, ControlNetwork, ModelCard, ModelDescribed, model_described::Outcome};

use super::adapter_tests::{ready, restart_holding};
use super::tests::Cluster;
use super::*;
use crate::{models_file::ControlConfig, testing};

/// A worker, and a model with a network that is well, one that is not, and one that cannot be cut as the denoiser is.
fn controlled(digest: &str) -> Cluster {
    let config = |name: &str| ControlConfig { name: name.into(), path: format!("/nets/{name}").into() };
    let change = |model: &mut ModelConfig| model.controls = vec![config("canny"), config("torn"), config("odd")];
    let mut cluster = Cluster::with(change, Limits::default());
    cluster.join("w1");
    cluster.join("w2");
    describe(&mut cluster, digest);
    cluster
}

fn describe(cluster: &mut Cluster, digest: &str) {
    describe_files(cluster, digest, "");
}

fn describe_files(cluster: &mut Cluster, digest: &str, fingerprint: &str) {
    let network = |name: &str, tp_options: &[u32]| ControlNetwork {
        name: name.into(),
        digest: digest.into(),
        fingerprint: fingerprint.into(),
        tp_options: tp_options.to_vec(),
        ..ControlNetwork::default()
    };
    let torn = ControlNetwork { problem: "it is truncated".into(), ..network("torn", &[]) };
    let mut card =
        ModelCard { controls: vec![network("canny", &[1, 2, 4]), torn, network("odd", &[3])], ..testing::card("emoji") };
    card.components.iter_mut().for_each(|component| component.fingerprint = fingerprint.into());
    let described = ModelDescribed { model: "emoji".into(), outcome: Some(Outcome::Card(card)) };
    cluster.report("w1", Report::ModelDescribed(described));
}

#[test]
fn the_denoisers_ranks_alone_are_told_of_networks_that_are_well_and_tasks_name_their_digests() {
    let mut cluster = controlled("ab");
    let asked = cluster.sent.iter().find_map(|(_, command)| match command {
        Command::DescribeModel(ask) => Some(ask.controls.iter().map(|folder| folder.path.clone()).collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(asked.unwrap(), ["/nets/canny", "/nets/torn", "/nets/odd"]);
    let joins = cluster.joins();
    for (_, join) in &joins {
        let told: Vec<_> = join.controls.iter().map(|folder| (folder.name.as_str(), folder.digest.as_str())).collect();
        let expected: &[(&str, &str)] = if join.component == "transformer" { &[("canny", "ab")] } else { &[] };
        assert_eq!(told, expected, "{}", join.group_id);
    }
    ready(&mut cluster, joins);
    let mut submission = cluster.submission();
    let control = Control { name: "canny".into(), image_blob_id: "a".repeat(64), ..Control::default() };
    submission.spec.controls = vec![control.clone(), control.clone()];
    cluster.submit(submission).unwrap();
    let tasks = cluster.tasks();
    assert!(!tasks.is_empty() && tasks.iter().all(|(_, task)| task.control_digests == ["ab", "ab"]));
    let given: Vec<_> = tasks.iter().filter(|(_, task)| task.with_controls).map(|(_, task)| task.kind()).collect();
    assert_eq!(given, [proto::v1::StageKind::EncodeImage], "a job with controls has that stage");
    assert!(cluster.state.blobs_in_use().contains(&control.image_blob_id));
    let mut submission = cluster.submission();
    submission.request_id = String::new();
    submission.spec.controls = vec![Control { name: "odd".into(), ..control }];
    let refused = cluster.submit(submission).unwrap_err().to_string();
    assert!(refused.contains("spec.controls[0].name") && refused.contains("it can be cut by [3]"), "{refused}");
}

#[test]
fn a_group_that_holds_another_network_of_the_name_does_not_go_on() {
    for (digest, goes_on) in [("ab", true), ("cd", false)] {
        let mut cluster = controlled("ab");
        let joins = cluster.joins();
        ready(&mut cluster, joins.clone());
        let groups = ["emoji/transformer/0", "emoji/vae/0"];
        let epochs = groups.map(|group| cluster.epoch(group));
        restart_holding(&mut cluster, &joins);
        describe(&mut cluster, digest);
        cluster.tick(SETTLE);
        assert_eq!(cluster.epoch(groups[0]) == epochs[0], goes_on, "{digest}");
        assert_eq!(cluster.epoch(groups[1]), epochs[1], "what holds none goes on");
    }
}

#[test]
fn a_group_whose_files_are_not_known_to_differ_goes_on() {
    let cases = [("", "", true), ("", "f1", true), ("f1", "", true), ("f1", "f1", true), ("f1", "f2", false)];
    for ((held, known, same), of_controls) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let mut cluster = controlled("ab");
        let mut joins = cluster.joins();
        ready(&mut cluster, joins.clone());
        let group = "emoji/transformer/0";
        let epoch = cluster.epoch(group);
        for (_, join) in &mut joins {
            if of_controls {
                join.controls.iter_mut().for_each(|folder| folder.fingerprint = held.into());
            } else {
                join.fingerprint = held.into();
            }
        }
        restart_holding(&mut cluster, &joins);
        describe_files(&mut cluster, "ab", known);
        cluster.tick(SETTLE);
        assert_eq!(cluster.epoch(group) == epoch, same, "held {held:?}, described {known:?}, of controls: {of_controls}");
    }
}
