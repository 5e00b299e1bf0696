//! `atelier plan` says what each rank takes, to people and to programs, and what is wrong with what it was asked.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bundled/emoji");

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_atelier")).arg("plan").args(args).output().expect("atelier runs")
}

#[test]
fn lanes_hold_the_denoiser_again_and_the_rest_once() {
    let output = plan(&[BUNDLED, "--tp", "2", "--block-ranges", "2", "--cfg-parallel", "2", "--json"]);
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    for component in plan["components"].as_array().unwrap() {
        let ranks = component["ranks"].as_array().unwrap();
        let read: u64 = ranks.iter().filter_map(|rank| rank["reads_bytes"].as_u64()).sum();
        let lanes = if component["name"] == "transformer" { 2 } else { 1 };
        assert_eq!(component["layout"]["cfg_parallel"], lanes, "{component}");
        let (tp, ranges) = (component["layout"]["tp"].as_u64().unwrap(), component["layout"]["block_ranges"].as_u64().unwrap());
        assert_eq!(ranks.len() as u64, tp * ranges * lanes, "{component}");
        assert!(read >= (component["stored_bytes"].as_u64().unwrap() - (64 << 10)) * lanes, "{component}");
        let (first, second) = ranks.split_at(ranks.len() / lanes as usize);
        for (a, b) in first.iter().zip(second) {
            assert_eq!(a["reads_bytes"], b["reads_bytes"], "{component}");
        }
    }
}

#[test]
fn convolutions_are_planned_as_they_are_multiplied() {
    let holds = |products: &str| {
        let output = plan(&[BUNDLED, "--component", "vae", "--products", products, "--json"]);
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(plan["products"], products);
        plan["components"][0]["ranks"][0]["holds_bytes"].as_u64().unwrap()
    };
    let [wide, narrow] = ["f32", "bf16"].map(holds);
    assert!(narrow < wide, "{narrow} and {wide}");
}

/// Only the first block range holds control networks, and only what denoises.
#[test]
fn a_control_network_is_planned_with_the_denoisers_first_range() {
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
    let model = format!("{GOLDEN}/flux_dev_txt2img/pipeline");
    let control = format!("{GOLDEN}/flux_controlnet/controlnet");
    let holds = |more: &[&str]| -> Vec<u64> {
        let output = plan(&[&[&model, "--tp", "2", "--block-ranges", "2", "--json"], more].concat());
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let ranks = |component: &Value| component["ranks"].as_array().unwrap().clone();
        plan["components"].as_array().unwrap().iter().flat_map(ranks).map(|rank| rank["holds_bytes"].as_u64().unwrap()).collect()
    };
    let (without, with) = (holds(&[]), holds(&["--control", &control]));
    let more: Vec<usize> = (0..with.len()).filter(|rank| with[*rank] > without[*rank]).collect();
    assert_eq!(more.len(), 2, "{without:?} {with:?}");
    assert_eq!((0..with.len()).filter(|rank| with[*rank] == without[*rank]).count(), with.len() - 2);
    let foreign = plan(&[BUNDLED, "--control", &format!("{GOLDEN}/sd15_controlnet/controlnet")]);
    let said = String::from_utf8(foreign.stderr).unwrap();
    assert!(!foreign.status.success() && said.contains("--control") && said.contains("FluxPipeline"), "{said}");
}

#[test]
fn people_get_a_line_for_each_rank() {
    let output = plan(&[BUNDLED, "--component", "transformer", "--tp", "4", "--cfg-parallel", "2"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().filter(|line| line.starts_with("transformer") && line.contains("tp4x1xcfg2")).count(), 8, "{text}");
}

#[test]
fn a_reader_that_is_gone_is_no_error_of_ours() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_atelier"));
    let output =
        command.args(["plan", BUNDLED]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
}

#[test]
fn what_cannot_be_planned_is_named_by_flag() {
    let wrong: [(&[&str], &str); 7] = [
        (&["/nowhere"], "model_index.json"),
        (&[BUNDLED, "--tp", "3"], "--tp: 3 is none of [1, 2, 4, 8]"),
        (&[BUNDLED, "--component", "vae", "--tp", "2"], "--tp: vae can be cut by [1]"),
        (&[BUNDLED, "--block-ranges", "100"], "--block-ranges: no component can be cut into more than 9"),
        (&[BUNDLED, "--cfg-parallel", "0"], "--cfg-parallel: must be 1 to 8"),
        (&[BUNDLED, "--component", "vae", "--cfg-parallel", "2"], "--cfg-parallel: vae does not denoise"),
        (&[BUNDLED, "--component", "unet"], "--component: the model has no `unet`, only text_encoder"),
    ];
    for (args, expected) in wrong {
        let output = plan(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(expected), "{args:?}: {text}");
    }
}
