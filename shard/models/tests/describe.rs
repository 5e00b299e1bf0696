//! What is refused when a model's directory is offered, and not when its first job is half done. On the golden pipelines.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::os::unix::fs::symlink;
use std::path::Path;

use models::card::Card;
use models::model_dir::ModelDir;
use models::{Error, Result, registry};
use serde_json::Value;

const FAMILIES: [&str; 3] = ["flux_dev_txt2img", "sd3_txt2img", "qwen_txt2img"];

/// The card of a golden case's model whose scheduler's configuration was changed.
fn outline(case: &str, change: impl FnOnce(&mut Value)) -> Result<Card> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case).join("pipeline");
    let dir = tempfile::tempdir().unwrap();
    for entry in golden.read_dir().unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "scheduler" {
            symlink(entry.path().canonicalize().unwrap(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let config = std::fs::read(golden.join("scheduler/scheduler_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    std::fs::create_dir(dir.path().join("scheduler")).unwrap();
    std::fs::write(dir.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    registry::outline(&ModelDir::open(dir.path())?)
}

#[test]
fn a_model_of_another_scheduler_or_of_settings_that_are_not_here_is_refused_when_it_is_offered() {
    let changes: [(&str, Value); 4] = [
        ("_class_name", "FlowMatchHeunDiscreteScheduler".into()),
        ("use_beta_sigmas", true.into()),
        ("invert_sigmas", true.into()),
        ("stochastic_sampling", true.into()),
    ];
    for case in FAMILIES {
        outline(case, |_| ()).unwrap();
        for (name, value) in &changes {
            let outlined = outline(case, |config| config[*name] = value.clone());
            let Err(Error::Unsupported { field, .. }) = outlined else { panic!("{case}: {name} was taken") };
            assert!(field.contains(name), "{case}: {field} is not {name}");
        }
    }
}

#[test]
fn a_schedule_that_is_stretched_takes_two_steps_or_more() {
    for case in FAMILIES {
        for (terminal, least) in [(Value::Null, 1.0), (0.02.into(), 2.0)] {
            let card = outline(case, |config| config["shift_terminal"] = terminal).unwrap();
            let steps = card.parameters.iter().find(|parameter| parameter.name == "num_inference_steps").unwrap();
            assert_eq!(steps.minimum, least, "{case}");
        }
    }
}
