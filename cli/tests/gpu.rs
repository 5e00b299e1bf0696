//! `atelier bench gpu`: the whole list on the processor, where every machine can run it, and one clear error where there is no GPU.

use std::process::{Command, Output};

use serde_json::Value;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atelier"));
    command.args(["bench", "gpu"]).args(args).env_remove("GOLDEN_DIR").output().expect("atelier runs")
}

fn points(output: &Output) -> Vec<Value> {
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
        .collect()
}

fn named<'a>(points: &'a [Value], prefix: &str) -> Vec<&'a Value> {
    points.iter().filter(|point| point["check"].as_str().is_some_and(|check| check.starts_with(prefix))).collect()
}

#[test]
fn the_whole_list_passes_on_the_processor() {
    let output = bench(&["--device", "cpu", "--golden", GOLDEN, "--json"]);
    let points = points(&output);
    assert!(output.status.success(), "{points:#?} {}", String::from_utf8_lossy(&output.stderr));
    let golden = named(&points, "golden ");
    let passed = golden.iter().filter(|point| point["outcome"] == "pass").count();
    assert!(passed >= 10, "{golden:#?}");
    // Whatever is left out says why.
    for point in golden.iter().filter(|point| point["outcome"] != "pass") {
        assert_eq!(point["outcome"], "not_run", "{point}");
        assert!(point["beside"].as_str().unwrap().contains("the tests of the sources run it"), "{point}");
    }
    for (prefix, outcomes) in [
        ("attention", vec!["pass", "measured"]),
        ("FLUX.1", vec!["pass", "measured"]),
        ("the device's limit", vec!["measured"]),
        ("tp 2 equals tp 1", vec!["pass", "pass"]),
        ("all_reduce", vec!["pass", "measured"]),
    ] {
        let found: Vec<&Value> = named(&points, prefix).iter().map(|point| &point["outcome"]).collect();
        assert_eq!(found, outcomes, "{prefix}: {points:#?}");
    }
    let equal = named(&points, "tp 2");
    assert!(equal.iter().all(|point| point["figure"] == 0.0), "the same bits: {equal:#?}");
    assert!(points.iter().filter(|point| point["outcome"] == "measured").all(|point| point["figure"].as_f64().unwrap() > 0.0));
}

#[test]
fn a_golden_picture_that_is_not_drawn_fails_the_list() {
    let cases = tempfile::tempdir().unwrap();
    let case = cases.path().join("flux_schnell_txt2img");
    std::fs::create_dir(&case).unwrap();
    for entry in std::fs::read_dir(format!("{GOLDEN}/flux_schnell_txt2img")).unwrap() {
        let path = entry.unwrap().path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&path, case.join(path.file_name().unwrap())).unwrap();
    }
    let text = std::fs::read_to_string(case.join("case.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["generator_seed"] = Value::from(json["generator_seed"].as_u64().unwrap() + 1);
    std::fs::remove_file(case.join("case.json")).unwrap();
    std::fs::write(case.join("case.json"), json.to_string()).unwrap();
    let output = bench(&["--device", "cpu", "--golden", cases.path().to_str().unwrap(), "--json"]);
    let points = points(&output);
    assert_eq!(named(&points, "golden flux_schnell_txt2img")[0]["outcome"], "fail", "{points:#?}");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of the checks failed"), "{points:#?}");
}

#[test]
fn without_golden_cases_the_list_says_that_they_were_not_run() {
    let output = bench(&["--device", "cpu"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains("golden cases")).expect("a line for them");
    assert!(line.starts_with("not run") && line.contains("GOLDEN_DIR"), "{text}");
    assert!(text.ends_with("1 not run\n") && output.status.success(), "{text}");
}

#[test]
fn a_gpu_that_is_not_there_is_one_clear_error_and_nothing_is_taken_in_its_place() {
    // The number of no GPU, so that it holds on a machine with some as well.
    let output = bench(&["--device", "cuda:99", "--json"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(text.lines().count() == 1 && text.contains("cannot compute on `cuda:99`"), "{text}");
    let wrong = bench(&["--device", "gpu"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("a device is `cpu` or `cuda:N`"), "{wrong:?}");
}
