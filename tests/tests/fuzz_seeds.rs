//! The fuzz targets as plain functions: they compile with the rest, and each takes its seeds. `scripts/fuzz` does what no list can.
#![allow(missing_docs, unused_attributes, unused_imports)] // targets are programs of their own
#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is how a target says no

use std::path::{Path, PathBuf};

// The targets name the fuzzer's macro by its crate: here that is this one.
extern crate self as libfuzzer_sys;

/// A target's body as a function.
#[macro_export]
macro_rules! fuzz_target {
    (|$input:ident: $kind:ty| $body:block) => {
        pub(super) fn run($input: $kind) $body
    };
    (init: $init:block, |$input:ident: $kind:ty| $body:block) => {
        pub(super) fn run($input: $kind) {
            $init
            $body
        }
    };
}

#[path = "../../fuzz/targets/checkpoint.rs"]
mod checkpoint;
#[path = "../../fuzz/targets/chunks.rs"]
mod chunks;
#[path = "../../fuzz/targets/gguf.rs"]
mod gguf;
#[path = "../../fuzz/targets/job_spec.rs"]
mod job_spec;
#[path = "../../fuzz/targets/journal.rs"]
mod journal;
#[path = "../../fuzz/targets/lora_keys.rs"]
mod lora_keys;
#[path = "../../fuzz/targets/models_toml.rs"]
mod models_toml;
#[path = "../../fuzz/targets/picture.rs"]
mod picture;
#[path = "../../fuzz/targets/safetensors.rs"]
mod safetensors;
#[path = "../../fuzz/targets/tokenizer.rs"]
mod tokenizer;
#[path = "../../fuzz/targets/watch.rs"]
mod watch;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no seeds");
    files.into_iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Each seed, and each cut short and with a byte turned at a few places.
fn disturbed(target: &str) -> impl Iterator<Item = Vec<u8>> {
    seeds(target).into_iter().flat_map(|seed| {
        let places: Vec<usize> = (1..8).map(|eighth| seed.len() * eighth / 8).filter(|at| *at < seed.len()).collect();
        let turned = |at: usize| {
            let mut bytes = seed.clone();
            bytes[at] ^= 0x81;
            bytes
        };
        let cut = places.iter().map(|at| seed[..*at].to_vec());
        let all: Vec<Vec<u8>> = cut.chain(places.iter().map(|at| turned(*at))).collect();
        [vec![seed], all].concat()
    })
}

#[test]
fn every_target_takes_its_seeds_whole_and_disturbed() {
    for (name, run) in [
        ("checkpoint", checkpoint::run as fn(&[u8])),
        ("chunks", chunks::run),
        ("gguf", gguf::run),
        ("job_spec", job_spec::run),
        ("journal", journal::run),
        ("picture", picture::run),
        ("safetensors", safetensors::run),
    ] {
        disturbed(name).for_each(|bytes| run(&bytes));
    }
    for seed in seeds("lora_keys") {
        lora_keys::run(std::str::from_utf8(&seed).unwrap());
    }
    models_toml::run(&std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/models.toml")).unwrap());
    for (length, repeats, text) in [(0, 0, ""), (77, 3, "a red heart"), (512, 255, "ﷺ é 日本"), (3, 1, " ")] {
        tokenizer::run((length, repeats, text));
    }
    for (after, page_size, token) in [(0, 0, ""), (u64::MAX, u32::MAX, "7"), (3, 1, "not a token")] {
        watch::run((after, page_size, token, "job-2", b"\x0a\x03abc"));
    }
}
